"""Checkpoints of a run: written whole or not at all, checked before they are used.

checkpoints/epoch_N/  or  checkpoints/step_N/
    the adapter's own files, ready for players
    training_state.pt     tensors and plain values: adapter, optimiser, step, losses, settings
    manifest.json         size and hash of each file
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sidestep.errors import UserError
from sidestep.files import describe, discarding, replacing_folder, sha256_of

log = logging.getLogger(__name__)

STATE, MANIFEST = "training_state.pt", "manifest.json"
FORMAT = 1

_UNPICKLING_ERRORS = (
    *(OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError),
    pickle.UnpicklingError,
)
"""What ``torch.load`` raises on damaged bytes, which its unpickler takes for instructions."""


@dataclass
class TrainingState:
    """Everything that changes while a run trains, besides what the seed decides."""

    step: int
    """Optimiser steps done."""
    num_steps: int
    """Optimiser steps that the run was to have."""
    smoothed_loss: float
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    """Of fp16's loss scaling; empty otherwise."""
    settings: dict[str, Any]
    """Those that decide the weights; a run with others must not continue from here."""


def save_checkpoint(folder: Path, state: TrainingState, write_adapter: Any) -> None:
    """Write a checkpoint folder.

    Args:
        folder: checkpoints/epoch_N or checkpoints/step_N; replaced if it exists.
        state: what to continue from.
        write_adapter: called with a folder to write the adapter's player-ready files into.
    """
    try:
        with replacing_folder(folder) as partial:
            write_adapter(partial)
            with (partial / STATE).open("wb") as file:  # torch's own writer does not say that the disk is full
                torch.save({"format": FORMAT, **vars(state)}, file)
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in sorted(partial.iterdir())
                if path.is_file()
            }
            (partial / MANIFEST).write_text(json.dumps({"step": state.step, "files": files}, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); the checkpoints before it are whole; "
            f"mend that and type the same command again"
        ) from error


def remove_old_checkpoints(output_dir: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Delete all checkpoints but the newest ``keep_last`` and those whose number ``keep_every`` divides."""
    for folder in checkpoints_by_step(output_dir)[keep_last:]:
        if keep_every is None or int(folder.name.rpartition("_")[2]) % keep_every != 0:
            with discarding(folder) as doomed:
                shutil.rmtree(doomed)
            log.info("removed %s", folder)


def load_checkpoint(folder: Path) -> TrainingState:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        UserError: if a file is missing, was changed or cannot be read.
    """
    _verify(folder)
    try:
        saved = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    except _UNPICKLING_ERRORS as error:
        raise UserError(f"{folder / STATE} is not a training state ({type(error).__name__})") from error
    names = {field.name for field in fields(TrainingState)}
    if not isinstance(saved, dict) or saved.pop("format", None) != FORMAT or saved.keys() != names:
        raise UserError(f"{folder / STATE} was written by another version of sidestep")
    return TrainingState(**saved)


def newest_checkpoint(output_dir: Path) -> tuple[Path, TrainingState] | None:
    """Read the newest checkpoint of a run that is whole, passing over damaged ones with a warning that names them."""
    for folder in checkpoints_by_step(output_dir):
        try:
            return folder, load_checkpoint(folder)
        except UserError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def checkpoints_by_step(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    return [folder for _, folder in sorted(_steps(output_dir), key=lambda pair: pair[0], reverse=True)]


def checkpoint_folder(path: Path) -> Path:
    """Find the checkpoint that ``resume_from`` means: a folder, or any file in it.

    Raises:
        UserError: if there is none.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / STATE).is_file():
        raise UserError(
            f"resume_from={path} is not a checkpoint: no {STATE} in {folder} ({describe(folder)}); "
            f"point it at a run's checkpoints/epoch_N"
        )
    return folder


def check_same_settings(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to continue from a checkpoint that was trained with other settings.

    Raises:
        UserError: naming every setting that differs.
    """
    differing = [
        f"{key}={_shown(saved, key)} (now {_shown(now, key)})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"{where} was trained with {', '.join(differing)}; type those settings again to continue it, "
            f"or give this run another name=..."
        )


def _shown(settings: dict[str, Any], key: str) -> str:
    return str(settings[key]).replace(" ", "") if key in settings else "unset"


def _steps(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for folder in (output_dir / "checkpoints").glob("*_*[0-9]"):
        if folder.name.startswith("."):
            continue
        try:
            yield int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"]), folder
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            log.warning("passing over %s: its %s cannot be read (%s)", folder, MANIFEST, error)


def _verify(folder: Path) -> None:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if STATE not in expected:
        raise UserError(f"{folder / MANIFEST} does not list {STATE}")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not os.path.isfile(path):  # unlike Path.is_file, it takes a name of any length
            raise UserError(f"{path} is missing")
        if path.stat().st_size != size or sha256_of(path) != digest:
            raise UserError(f"{path} was changed or cut short since it was written (its hash differs)")
