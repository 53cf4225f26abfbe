"""Reading the JSON that runs leave behind, which may be damaged or edited by hand."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_KINDS: dict[str, Any] = {
    "status": str,
    "step": int,
    "num_steps": int,
    "smoothed_loss": int | float | None,
    "settings": dict,
    "config": dict,
    "final": dict,
    "dataset": dict,
    "validation": dict,
    "error": str,
    "started": str,
    "finished": str,
    "host": str,
    "process": int,
    "job": str,
    "went_back_to": str,
    "went_back_hash": str,
    "run_id": str,
    "stopped_early": bool,
    "memory_gib": int | float,
    "train_seconds": int | float,
}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; a whole number of more than 15 digits becomes a float, so that none is too large to compute with.

    Raises:
        ValueError: if it is not JSON.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 15 else float(digits))


def make_record(cls: type[T], values: Any) -> T:
    """Make a dataclass of a JSON object whose values have the types of its fields.

    Args:
        cls: with fields of plain types, ``X | None`` and lists or dicts of plain types.
        values: what was parsed.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"found {values!r:.60}")
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{key!r:.60} is not known")
        if not _is_of(value, hints[key]):
            raise ValueError(f"{key} is {value!r:.60}")
    try:
        return cls(**values)
    except TypeError as error:  # a key is missing
        raise ValueError(str(error).partition(") ")[2]) from error


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value that was parsed from JSON is of a type; whole numbers are floats too, and truth is no number."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(kind))
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer is list:
        return isinstance(value, list) and all(_is_of(item, inner[0]) for item in value)
    if outer is dict:
        return isinstance(value, dict) and all(_is_of(k, inner[0]) and _is_of(v, inner[1]) for k, v in value.items())
    if isinstance(value, bool) or kind is Any:
        return kind in (bool, Any)
    return isinstance(value, int | float if kind is float else kind)


def parse_record(text: str) -> dict[str, Any]:
    """Parse a ``run.json``, whose keys have the types that a run gives them, as far as they are there.

    Raises:
        ValueError: saying what is wrong with it.
        RecursionError: if it is nested too deeply.
    """
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"found {record!r:.60}")
    for key, kind in _KINDS.items():
        if key in record and not isinstance(record[key], kind):
            raise ValueError(f"{key} is {record[key]!r:.60}")
    for key in ("best_loss", "best_train_loss", "best_step", "base_loss", "train_loss"):
        if not isinstance(value := record.get("validation", {}).get(key), int | float | None):
            raise ValueError(f"validation.{key} is {value!r:.60}")
    return record
