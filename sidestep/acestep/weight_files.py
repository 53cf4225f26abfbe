"""Read JSON and safetensors files so that a missing or damaged one is named in one line."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.errors import UserError
from sidestep.files import ensure_readable, read_text

MOST_LAYERS = 1000
_RUNS, _RUN_LENGTH = 8, 8

UNPICKLING_ERRORS = (
    *(OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, struct.error, pickle.UnpicklingError),
)
"""What ``torch.load`` raises on damaged bytes, which its unpickler takes for instructions."""


@contextmanager
def open_safetensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a safetensors file for reading single tensors, memory-mapped.

    Raises:
        UserError: if it is missing, damaged or not a safetensors file, also when that shows only while reading.
    """
    try:
        ensure_readable(path)
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
        values = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
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
        UserError: if a file is missing or damaged, or the index and its shards do not name the same tensors.
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
        if Path(shard).name != shard:
            raise UserError(f"{index} names {shard!r:.60}, which is no file beside it; download it again")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, but {index.name} names it; download it again")
        with open_safetensors(folder / shard) as file:
            found = set(file.keys())
        listed = {key for key, holder in shards.items() if holder == shard}
        for key in sorted(found - listed):
            raise UserError(f"{folder / shard} holds {key}, which {index.name} does not list; download both again")
        for key in sorted(listed - found):
            raise UserError(f"{folder / shard} lacks {key}, which {index.name} lists; download both again")
    return {key: folder / shard for key, shard in shards.items()}


@contextmanager
def building_from(path: Path) -> Iterator[None]:
    """Name the file when a library cannot build a model or tokenizer of what it says.

    Raises:
        UserError: whatever goes wrong in the block.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises no narrower one, transformers asserts
        raise UserError(
            f"{path} is damaged or another model's ({type(error).__name__}: {one_line(error)}); download it again"
        ) from error


def check_sizes(config: dict[str, Any], names: Iterable[str], path: Path) -> None:
    """Refuse a config in which a size, or a list of them, is missing or no whole number of at least 1.

    Raises:
        UserError: naming the file and the key.
    """
    for name in names:
        if name not in config:
            raise UserError(f"{path} has no {name}; is it the config of the right model?")
        sizes = config[name] if type(config[name]) is list else [config[name]]
        most = largest_size(name)
        if not 0 < len(sizes) <= MOST_LAYERS or not all(type(size) is int and 1 <= size <= most for size in sizes):
            raise UserError(f"{path}: {name} must be from 1 to {most}, found {config[name]!r:.60}; download it again")


def largest_size(name: str) -> int:
    """What a size in a config may be, far past any model's, so that none fills the memory before it is refused."""
    return MOST_LAYERS if name.endswith("layers") else 2**20


def load_tensor(path: Path) -> Tensor:
    """Read a tensor of at least two dimensions saved by ``torch.save``.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        ensure_readable(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise UserError(f"{path} is damaged or not a tensor file; download it again") from error
    if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not holds_its_values(tensor, path):
        raise UserError(f"{path} holds no tensor of shape (1, channels, frames)")
    return tensor.detach()


def holds_its_values(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor read from a file is nothing but numbers in that file.

    A pickle may say as well that it is sparse, on no device at all, or one number repeated until the memory is full.
    """
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.nbytes <= path.stat().st_size


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
