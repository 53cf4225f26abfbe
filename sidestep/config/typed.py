"""Settings as a person types them."""

from __future__ import annotations

import re
import shlex


def as_typed(key: str, value: str) -> str:
    """Write a setting so that the shell, and Hydra behind it, read it back."""
    if not re.fullmatch(r"(\.{0,2}/|[A-Za-z_])[\w./-]*", value, re.ASCII):
        escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
        value = f'"{escaped}"'
    return shlex.quote(f"{key}={value}")
