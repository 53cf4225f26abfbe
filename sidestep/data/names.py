"""Names of songs, as files have them and as tables and people write them."""

from __future__ import annotations

import re
import unicodedata
from fnmatch import fnmatchcase


def composed(name: str) -> str:
    """Spell a name the one way: Macs write accents apart from their letters (NFD), most others in one (NFC)."""
    return unicodedata.normalize("NFC", name)


def letters(title: str) -> str:
    """Keep of a title what the name of a file can have too: AC/DC and "Heroes" are AC DC and Heroes on a disk."""
    return " ".join(re.findall(r"[^\W_]+", composed(title).casefold())) or title


def is_named(name: str, typed: str) -> bool:
    """Say whether a song is meant by what was typed: its name, brackets and all, or a pattern such as ``live/*``."""
    name, typed = composed(name), composed(typed)
    return name == typed or fnmatchcase(name, typed)
