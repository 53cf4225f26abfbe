"""Commands run as processes of their own, without the seconds that importing everything takes each time."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from sidestep.cli import run_command
from sidestep.config import settings

IMPORTED_BY_EVERY_RUN = (
    "diffusers.models.transformers.ace_step_transformer",
    "peft",
    "lycoris",
    "sidestep.training.loop",
)


@dataclass
class Command:
    """A command of sidestep that is running, in a copy of this process."""

    process: BaseProcess
    out: Path
    """What it prints and logs."""

    def finish(self) -> int:
        """Wait for it and give its exit code."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    @property
    def text(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")


def start(folder: Path, *arguments: str, command: str = "train") -> Command:
    """Begin ``python -m sidestep.<command> <arguments>`` in a folder."""

    def call() -> None:
        sys.argv = [f"sidestep.{command}", *arguments]
        module = importlib.import_module(f"sidestep.{command}")
        run_command(command, getattr(settings, f"{command.capitalize()}Config"), getattr(module, f"{command}_command"))

    return start_call(folder, call)


def start_call(folder: Path, call: Callable[[], object], env: Mapping[str, str] | None = None) -> Command:
    """Begin a function in a process of its own that works in a folder, with ``env`` added to its environment."""
    for module in IMPORTED_BY_EVERY_RUN:  # once for all of them
        importlib.import_module(module)
    out = folder / f"out-{len(list(folder.glob('out-*')))}.txt"
    out.touch()
    process = multiprocessing.get_context("fork").Process(target=_enter, args=(folder, call, env or {}, out))
    process.start()
    return Command(process, out)


def run(folder: Path, *arguments: str, command: str = "train") -> tuple[int, str]:
    """Run a command to its end; give its exit code and what it wrote."""
    running = start(folder, *arguments, command=command)
    return running.finish(), running.text


def _enter(folder: Path, call: Callable[[], object], env: Mapping[str, str], out: Path) -> None:
    """Leave behind what this copy has from pytest: its output, its log handlers, its folder."""
    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    os.chdir(folder)
    os.environ.update(env)
    # PyTorch makes its pool of threads anew in the first call after a fork; two threads at once may find it half-made
    torch.set_num_threads(torch.get_num_threads())
    call()
