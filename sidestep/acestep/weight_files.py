"""Read JSON and safetensors files so that a missing or damaged one is named in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.errors import UserError

_RUNS, _RUN_LENGTH = 8, 8


@contextmanager
def open_safetensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a safetensors file for reading single tensors, memory-mapped.

    Raises:
        UserError: if it is missing, damaged or not a safetensors file, also when that shows only while reading.
    """
    try:
        file = safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error
    with file:
        try:
            yield file
        except SafetensorError as error:
            raise _damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"{path} is damaged or not JSON: {one_line(error)}; download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def locate_tensors(folder: Path, stem: str) -> dict[str, Path]:
    """Say which file holds each tensor of a model saved whole or in shards.

    Args:
        folder: where the model lies.
        stem: file name without ``.safetensors``; shards are listed in ``<stem>.safetensors.index.json``.

    Raises:
        UserError: if a file is missing or damaged.
    """
    whole = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        with open_safetensors(whole) as file:
            return dict.fromkeys(file.keys(), whole)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; download it again")
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, but {index.name} names it; download it again")
    return {key: folder / shard for key, shard in shards.items()}


def load_tensor(path: Path) -> Tensor:
    """Read a tensor of at least two dimensions saved by ``torch.save``.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make or download it again") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or not a tensor file; download it again") from error
    if not isinstance(tensor, Tensor) or tensor.ndim < 2:
        raise UserError(f"{path} holds no tensor of shape (1, channels, frames)")
    return tensor


def sample_values(tensor: Tensor) -> Tensor:
    """Take up to 64 values, in runs of neighbours so that few pages are read."""
    values = tensor.flatten()
    if len(values) <= _RUNS * _RUN_LENGTH:
        return values
    starts = torch.linspace(0, len(values) - _RUN_LENGTH, _RUNS, dtype=torch.float64).long()
    return values[(starts[:, None] + torch.arange(_RUN_LENGTH)).flatten()]


def one_line(error: Exception) -> str:
    """Give an error's text without line breaks."""
    return " ".join(str(error).split())


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or not a safetensors file ({one_line(error)}); make or download it again")
