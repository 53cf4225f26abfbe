"""Commands of sidestep as real processes that start at once, forked from one that has imported everything."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Command:
    """``python -m sidestep.<command>`` in a folder; what it says is in a file beside that folder.

    Args:
        folder: its working directory.
        words: the command and its settings.
        first: called in the process before the command; a function of a module, or a partial of one.
    """

    def __init__(self, folder: Path, *words: str, first: Callable[[], object] | None = None) -> None:
        self.log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.txt")
        self._process = CONTEXT.Process(target=_run, args=(str(folder), str(self.log), words, first))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait_for(self, words: str) -> bool:
        """Wait until it says something; False if it ended without."""
        while words not in self.said:
            if not self._process.is_alive():
                return words in self.said
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end and give its exit code: below 0 if a signal ended it."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> bool:
        """Send SIGKILL; False if it had ended before."""
        self._process.kill()
        return self.wait() == -signal.SIGKILL


def at_call(name: str, number: int, act: Callable[[], object]) -> None:
    """Do something before a function, like ``os.replace``, is called for the ``number``-th time from now."""
    owner, _, function = name.rpartition(".")
    holder, calls = pkgutil.resolve_name(owner), []
    real = getattr(holder, function)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            act()
        return real(*arguments, **options)

    setattr(holder, function, counted)


def obey_permissions() -> None:
    """Give up root's right to read and write everything; an ordinary user has none to give up."""
    version_3, this_process = 0x20080522, 0
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset((ctypes.c_uint32 * 2)(version_3, this_process), (ctypes.c_uint32 * 6)()) == 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long() -> None:
    time.sleep(600)


def fail() -> None:
    raise ZeroDivisionError("made by a test")


def _run(folder: str, log: str, words: tuple[str, ...], first: Callable[[], object] | None) -> None:
    os.chdir(folder)
    if first is not None:
        first()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = list(words)
    runpy.run_module(f"sidestep.{words[0]}", run_name="__main__", alter_sys=True)
