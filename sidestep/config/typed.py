"""Settings as a person types them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence


def as_typed(key: str, value: str | Sequence[str]) -> str:
    """Write a setting so that the shell, and Hydra behind it, read it back."""
    text = _quoted(value) if isinstance(value, str) else f"[{','.join(map(_quoted, value))}]"
    return shlex.quote(f"{key}={text}")


def _quoted(value: str) -> str:
    if not re.fullmatch(r"(\.{0,2}/|[A-Za-z_])[\w./-]*", value, re.ASCII):
        escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
        return f'"{escaped}"'
    return value
