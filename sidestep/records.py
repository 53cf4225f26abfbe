"""Reading the JSON that runs leave behind, which may be damaged or edited by hand."""

from __future__ import annotations

import json
from typing import Any

_KINDS: dict[str, Any] = {
    "status": str,
    "step": int,
    "num_steps": int,
    "smoothed_loss": int | float | None,
    "settings": dict,
    "config": dict,
    "final": dict,
    "validation": dict,
    "error": str,
    "started": str,
    "finished": str,
    "host": str,
    "process": int,
    "job": str,
    "went_back_to": str,
    "stopped_early": bool,
    "memory_gib": int | float,
    "train_seconds": int | float,
}


def parse_json(text: str) -> Any:
    """Parse JSON; a whole number of more than 15 digits becomes a float, so that none is too large to compute with.

    Raises:
        ValueError: if it is not JSON.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 15 else float(digits))


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
    for key in ("best_loss", "best_step", "base_loss", "train_loss"):
        if not isinstance(value := record.get("validation", {}).get(key), int | float | None):
            raise ValueError(f"validation.{key} is {value!r:.60}")
    return record
