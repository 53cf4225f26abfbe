"""A whole checkpoint with an adapter in its weights, written without holding it in memory.

A merged file has the tensors of its source, in the same types and order, so only the bytes of the changed
weights differ. Each file is therefore copied, and then those bytes are written over, one tensor at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import TEXT_ENCODER_FOLDER, VAE_FOLDER, Checkpoint
from sidestep.acestep.weight_files import open_safetensors
from sidestep.errors import UserError

_LENGTH = struct.Struct("<Q")  # a safetensors file begins with the length of its JSON header

Change = Callable[[Tensor, torch.dtype], Tensor]
"""From a weight in float32 to its new value in the type of the file."""


def write_merged(
    checkpoint: Checkpoint,
    folder: Path,
    changed: Mapping[tuple[Path, str], Change],
    metadata: Mapping[str, str],
) -> None:
    """Write a checkpoint of the same layout, shards and types, with some weights changed.

    The VAE and the text encoder are copied too, so that the folder can be moved and used as ``checkpoint_dir``.

    Args:
        checkpoint: the source.
        folder: the new ``checkpoint_dir``; exists and is empty.
        changed: file and key of a weight -> what makes its new value.
        metadata: added to the header of every file that changes.

    Raises:
        UserError: if the disk is too small, or a file is damaged.
    """
    files = _files(checkpoint)
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the merged checkpoint needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "type output_dir=<a folder on another disk>"
        )
    of_file: dict[Path, dict[str, Change]] = {}
    for (path, key), change in changed.items():
        of_file.setdefault(path, {})[key] = change
    for source, name in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in of_file:
            _copy_changed(source, target, of_file[source], metadata)
        else:
            shutil.copyfile(source, target)


def _files(checkpoint: Checkpoint) -> dict[Path, Path]:
    """Map each file of a checkpoint to its place in the copy."""
    if checkpoint.in_diffusers_layout:
        places = {checkpoint.folder: Path()}
    else:
        places = {
            checkpoint.folder: Path(checkpoint.variant.folder),
            **{checkpoint.root / name: Path(name) for name in (VAE_FOLDER, TEXT_ENCODER_FOLDER)},
        }
    files = {}
    for origin, place in places.items():
        for folder, folders, names in os.walk(origin, followlinks=True):  # downloaders link files and folders
            folders[:] = sorted(name for name in folders if not name.startswith("."))  # hidden is what they leave
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not name.startswith("."):
                    files[path] = place / path.relative_to(origin)
    silence = checkpoint.root / "silence_latent.pt"  # some copies of the checkpoints have it beside the variants
    return files | ({silence: Path(silence.name)} if silence.is_file() else {})


def _copy_changed(source: Path, target: Path, changed: Mapping[str, Change], metadata: Mapping[str, str]) -> None:
    with open_safetensors(source) as weights, source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(_LENGTH.unpack(old.read(_LENGTH.size))[0]))
        header["__metadata__"] = header.get("__metadata__", {}) | metadata
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors are aligned to eight bytes
        new.write(_LENGTH.pack(len(text)) + text)
        start = new.tell()
        shutil.copyfileobj(old, new, 1 << 20)
        for key, change in changed.items():
            weight = weights.get_tensor(key)
            new.seek(start + header[key]["data_offsets"][0])
            new.write(_bytes(change(weight.float(), weight.dtype)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
