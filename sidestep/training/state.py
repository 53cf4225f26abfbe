"""Checkpoints of a run: written whole or not at all, checked before they are used.

checkpoints/epoch_N/  or  checkpoints/step_N/
    the adapter's own files, ready for players
    training_state.pt     tensors and plain values: adapter, optimiser, step, losses, settings
    manifest.json         size and hash of each file
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.weight_files import UNPICKLING_ERRORS
from sidestep.errors import UserError
from sidestep.files import describe, discarding, hidden_name, replacing_folder, sha256_of
from sidestep.records import make_record

log = logging.getLogger(__name__)

STATE, MANIFEST = "training_state.pt", "manifest.json"
FORMAT = 1
_FILES = {
    "dataset": "other songs than dataset_dir or prior_dataset_dir holds now",
    "checkpoint": "another model than checkpoint_dir holds now",
    "checkpoint_constants": "another model than checkpoint_dir holds now",
    "init_from": "another init_from than is typed now",
}
"""Settings that are hashes of files, which say nothing to who reads them, and what it means that one has changed."""
_NAME = re.compile(r"(epoch|step)_\d+")


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
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """The running mean of the adapter's weights; empty without one."""


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
            write_manifest(partial, state.step)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); the checkpoints before it are whole; "
            f"mend that and type the same command again"
        ) from error


def remove_old_checkpoints(output_dir: Path, step: int, *, keep_last: int, keep_every: int | None) -> None:
    """Delete all checkpoints but the newest ``keep_last`` and those whose number ``keep_every`` divides.

    Args:
        output_dir: the run's folder.
        step: the one just saved; checkpoints of later steps are not counted, and not touched.
        keep_last: at least 1.
        keep_every: None keeps no others.
    """
    folders = [folder for number, folder in checkpoints_by_step(output_dir) if number <= step]
    for folder in folders[keep_last:]:
        if keep_every is None or int(folder.name.rpartition("_")[2]) % keep_every != 0:
            try:
                with discarding(folder) as doomed:
                    shutil.rmtree(doomed)
                log.info("removed %s", folder)
            except OSError as error:  # the new checkpoint is saved, so there is nothing to stop for
                left = folder if folder.exists() else hidden_name(folder, "doomed")
                log.warning("%s cannot be removed (%s); delete %s by hand", folder, error.strerror, left)


def load_checkpoint(folder: Path) -> TrainingState:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        UserError: if a file is missing or was changed, or does not hold what it must.
        OSError: if the disk does not let it be read.
    """
    _verify(folder)
    try:  # the bytes first: an error of the disk does not say that they are damaged
        content = io.BytesIO((folder / STATE).read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{folder / STATE} is missing") from error
    try:
        saved = torch.load(content, weights_only=True, map_location="cpu")
    except UNPICKLING_ERRORS as error:
        if "allocate memory" in str(error):  # nor does too little memory
            raise
        raise UserError(f"{folder / STATE} is not a training state ({type(error).__name__})") from error
    if not isinstance(saved, dict) or saved.pop("format", None) != FORMAT:
        raise UserError(f"{folder / STATE} was written by another version of sidestep")
    try:
        return make_record(TrainingState, saved)
    except ValueError as error:
        raise UserError(f"{folder / STATE} was written by another version of sidestep: {error}") from error


def newest_checkpoint(output_dir: Path) -> tuple[Path, TrainingState] | None:
    """Read the newest checkpoint of a run that is whole, passing over damaged ones with a warning that names them.

    Raises:
        UserError: if there are checkpoints and all are damaged; beginning anew would write over what is left of them.
            Or if their folder is out of reach.
    """
    for _, folder in checkpoints_by_step(output_dir):
        try:
            return folder, load_checkpoint(folder)
        except UserError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    if damaged := checkpoint_folders(output_dir):
        raise UserError(
            f"no checkpoint of {output_dir} can be read ({', '.join(folder.name for folder in damaged[:5])} are "
            f"damaged); move {output_dir} away to begin anew, or give this run another name=..."
        )
    return None


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, readable or not; folders of any other name are the user's own.

    Raises:
        UserError: if what has the name of their folder is none, such as a link to a disk that is not mounted.
    """
    folder = output_dir / "checkpoints"
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    if os.path.lexists(folder):
        found = f"a link to {os.readlink(folder)}, which is not there" if folder.is_symlink() else "no folder"
        raise UserError(f"{folder} is {found}; bring the checkpoints back, or give this run another name=...")
    return []


def checkpoints_by_step(output_dir: Path) -> list[tuple[int, Path]]:
    """The step and folder of each checkpoint whose manifest can be read, newest first."""
    return sorted(_steps(output_dir), key=lambda pair: pair[0], reverse=True)


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


def fingerprint_checkpoint(path: Path) -> str:
    """Hash what the checkpoint that ``resume_from`` means holds; 64 hex digits, none if no manifest can be read."""
    try:
        return _hash(read_manifest(path.parent if path.is_file() else path))
    except (UserError, OSError):
        return ""


def check_same_settings(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to continue from a checkpoint that was trained with other settings.

    Raises:
        UserError: naming every setting that differs.
    """
    differing = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if differing:
        typed = [f"{key}={_shown(saved, key)} (now {_shown(now, key)})" for key in differing if key not in _FILES]
        files = list(dict.fromkeys(_FILES[key] for key in differing if key in _FILES))
        mend = ["type those settings again"] * bool(typed) + ["put those files back"] * bool(files)
        raise UserError(
            f"{where} was trained with {', '.join(typed + files)}; {' and '.join(mend)} to continue it, "
            f"or give this run another name=..."
        )


def _shown(settings: dict[str, Any], key: str) -> str:
    return str(settings[key]).replace(" ", "") if key in settings else "unset"


def _steps(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for folder in checkpoint_folders(output_dir):
        try:
            yield read_manifest(folder)["step"], folder
        except UserError as error:
            log.warning("passing over a damaged checkpoint: %s", error)


def write_manifest(folder: Path, step: int) -> None:
    """Write the size and hash of each file of a checkpoint folder, and a hash of all that."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"step": step, "files": files}
    text = json.dumps(manifest | {"sha256": _hash(manifest)}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint folder should hold: the step, and the size and hash of each file.

    Raises:
        UserError: if it cannot be read, or was changed.
    """
    path = folder / MANIFEST
    if path.is_fifo():
        raise UserError(f"{path} is a pipe, not a file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError) as error:
        # other errors of the disk do not say that the file is damaged
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _hash(manifest):
        raise UserError(f"{path} was changed since it was written (its hash differs)")
    if not _is_manifest(manifest):
        raise UserError(f"{path} is not the list of files of a checkpoint")
    return manifest


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether values have the types that are read, and names are of files in the folder; a hash does not tell that."""
    files = manifest.get("files")
    return (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and all(Path(name).name == name and isinstance(about, dict) for name, about in files.items())
        and all({"bytes", "sha256"} <= about.keys() for about in files.values())
    )


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _verify(folder: Path) -> None:
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise UserError(f"{path} was changed or cut short since it was written (its hash differs)")
