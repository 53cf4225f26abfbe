"""The words of a song: which keys there are, what their values look like, and how one source is merged into another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.data.lyrics import TimedLine, parse_lrc, parse_sections, untimed, without_tags

ESTIMATED = ("caption", "lyrics", "bpm", "keyscale")
TAG_POSITIONS = ("prepend", "append", "replace")

ALIASES = {
    "key": "keyscale",
    "signature": "timesignature",
    "time_signature": "timesignature",
    "instrumental": "is_instrumental",
}
_SAME = {"lyrics": "sections", "sections": "lyrics"}  # either takes the place of the other
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_NOTES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_KEY = re.compile(r"([A-G])[\s-]*(#|b|♯|♭|sharp|flat)?[\s-]*(major|minor|maj|min|m)?", re.IGNORECASE)
_TWICE = re.compile(r"([^()]+)\(([^()]+)\)")
"""A key in two spellings, as Mixxx writes it: 8A (Am)."""
_WHOLE = re.compile(r"(?<=\d)\.0+$")
"""What pandas puts behind whole numbers in a column that has gaps."""
_SIGNS = {"♯": "#", "sharp": "#", "♭": "b", "flat": "b"}
_WHEEL = re.compile(r"0?([1-9]|1[0-2])([ABdm])", re.IGNORECASE)
_MAJOR_OF_WHEEL = ("B", "F#", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E")
"""Camelot's 1B to 12B; 1A to 12A are the minor keys of the same notes."""
_MINOR_OF_WHEEL = ("Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "Db")


@dataclass(kw_only=True)
class Song:
    """One audio file and its words."""

    path: Path
    name: str
    """Path relative to the folder of songs, with forward slashes."""
    caption: str = ""
    genre: str = ""
    lyrics: str = ""
    """Without control characters but newline and tab, and without times; empty for an instrumental."""
    timed_lyrics: list[TimedLine] = field(default_factory=list)
    """The lines with the times at which they begin, where they are known."""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    """Numerator only: "4" for 4/4."""
    language: str = ""
    is_instrumental: bool = False
    says_instrumental: bool = False
    """Whether some source says so, and not only none has lyrics."""
    custom_tag: str = ""
    prompt_override: str = ""
    """The song's own choice of "caption" or "genre", which wins over the genre ratio."""
    repeat: int = 1
    """How often the song comes in an epoch."""
    weight: float = 1.0
    """What its loss is multiplied by."""
    estimated: list[str] = field(default_factory=list)
    """Keys whose values nobody wrote: they were heard by an analysis or a model."""
    prompt: str = "caption"
    """Which of "caption" and "genre" the song trains on."""
    source: str = "file name"
    """Where the caption came from: "file name", "file tags", "sidecar", or the name of a metadata file."""


def merge(
    song: Song,
    values: Mapping[str, Any],
    source: str,
    where: str,
    problems: dict[str, list[str]],
    lines: Mapping[str, int] | None = None,
) -> list[str]:
    """Put the values that one source gives into a song; an empty value counts as not given.

    Args:
        song: gets the values.
        values: by key; keys that are none of a song's are passed over.
        source: what the song remembers, if its caption comes from here.
        where: file and line, for messages.
        problems: gets one message for each value that cannot be used, by key; loses those of keys that this source
            gives a good value for, because only the value that counts can fail a song.
        lines: of the file, where each value begins.

    Returns:
        The messages that were lost.
    """
    given: dict[str, Any] = {}
    faults: dict[str, list[str]] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name in SONG_KEYS and not is_missing(name, value):
            found: list[str] = []
            place = f"{where} line {lines[name]}" if lines and name in lines else where
            convert(name, value, SONG_KEYS[name], given, place, found)
            if found:
                faults.setdefault(name, []).extend(found)
    names = given.keys() | {other for name, other in _SAME.items() if name in given}
    replaced = [message for name in SONG_KEYS if name in names for message in problems.pop(name, [])]
    for name, messages in faults.items():
        if name not in given:
            problems.setdefault(name, []).extend(messages)
    if timed := given.pop("sections", None) or (parse_lrc(given["lyrics"]) if "lyrics" in given else None):
        given["timed_lyrics"], given["lyrics"] = timed, untimed(timed)
    elif "lyrics" in given:
        given["lyrics"] = without_tags(given["lyrics"])
        if given["lyrics"] != song.lyrics:
            given["timed_lyrics"] = []  # other words than those whose times were known
    if given.get("lyrics") and "is_instrumental" not in given:
        song.is_instrumental = False  # lyrics beside the song win over a mark further away
    if "caption" in given:
        song.source = source
    marked = given.pop("estimated", [])
    song.estimated = sorted({*marked, *(key for key in song.estimated if key not in given)})
    for key, value in given.items():
        setattr(song, key, value)
    return replaced


def is_missing(key: str, value: Any) -> bool:
    """Say whether a value is none: programs write 0 for a tempo they did not measure, dashes, and LRC of tags alone."""
    text = "" if value is None else str(value).strip()
    if key == "bpm" and re.fullmatch(r"0+([.,]0*)?", text):
        return True
    return text in ("", "N/A", "-") or (key == "lyrics" and not without_tags(text))


def convert(
    key: str, value: Any, conversion: Callable[[Any], Any], into: dict[str, Any], where: str, problems: list[str]
) -> None:
    """Convert one value into its place, or say what it must be."""
    try:
        into[key] = conversion(value)
    except ValueError as error:
        problems.append(f"{where}: {key} must be {error}, it is {str(value)[:60]!r}")


def spell_key(text: str) -> str:
    """Spell a key of music as ACE-Step does, however it is written, also on a DJ's wheel; anything else stays.

    >>> spell_key("F#m"), spell_key("A-flat Major"), spell_key("8A"), spell_key("1d"), spell_key("8A (Am)")
    ('F# minor', 'Ab major', 'A minor', 'C major', 'A minor')
    """
    if twice := _TWICE.fullmatch(text.strip()):
        one, other = (spell_key(spelling.strip()) for spelling in twice.groups())
        return one if one == other else text
    if key := _KEY.fullmatch(text.strip()):
        sign = (key[2] or "").lower()
        is_minor = key[3] is not None and not key[3].lower().startswith("maj") and key[3] != "M"
        return f"{key[1].upper()}{_SIGNS.get(sign, sign)} {'minor' if is_minor else 'major'}"
    if wheel := _WHEEL.fullmatch(text):
        number, letter = int(wheel[1]), wheel[2].lower()
        if letter in "dm":  # Open Key counts from C, where Camelot has 8
            number = (number + 6) % 12 + 1
        is_minor = letter in "am"
        note = (_MINOR_OF_WHEEL if is_minor else _MAJOR_OF_WHEEL)[number - 1]
        return f"{note} {'minor' if is_minor else 'major'}"
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    text = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if CONTROL.search(text):
        raise ValueError("text without control characters")
    return text


def _line(value: Any) -> str:
    text = _text(value)
    if "\n" in text:
        raise ValueError("one line of text")
    return text


def _bpm(value: Any) -> int:
    message = "a number of beats per minute from 0.5 to 9999"
    try:
        words = re.sub(r"\s*bpm$", "", str(value).strip(), flags=re.IGNORECASE)
        words = re.sub(r"^(\d+),(\d+)$", r"\1.\2", words)  # the decimal comma of many countries
        number = math.nan if isinstance(value, bool) else float(words)
    except ValueError:
        raise ValueError(message) from None
    if not 0.5 <= number < 10_000:
        raise ValueError(message)
    return round(number)


def _keyscale(value: Any) -> str:
    key = spell_key(_line(value))
    if not re.fullmatch("[A-G][#b]? (major|minor)", key):
        raise ValueError('a key such as "C major" or "F# minor"')
    return key


def _timesignature(value: Any) -> str:
    """Keep the numerator, which is all that ACE-Step's prompt has room for."""
    match = re.fullmatch(r"([1-9]\d?)(\.0+)?(\s*/\s*[1-9]\d?)?", str(value).strip(), re.ASCII)
    if match is None:
        raise ValueError('a number of beats per bar such as "4" or "4/4"')
    return match[1]


def _bool(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[_WHOLE.sub("", str(value).strip().lower())]
    except KeyError:
        raise ValueError("true or false") from None


def _percentage(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise ValueError("a whole number from 0 to 100")
    return value


def _repeat(value: Any) -> int:
    text = _WHOLE.sub("", str(value).strip())
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise ValueError("a whole number of at least 1")
    return int(text)


def _weight(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= 1e4:
        raise ValueError("a number above 0, up to 10,000")
    return number


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def conversion(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return conversion


def _estimated(value: Any) -> list[str]:
    names = [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(","))]
    if not set(names) <= set(ESTIMATED):
        raise ValueError(f"some of {', '.join(ESTIMATED)}")
    return names


SONG_KEYS: dict[str, Callable[[Any], Any]] = {
    "caption": _text,
    "genre": _line,
    "lyrics": _text,
    "sections": parse_sections,
    "bpm": _bpm,
    "keyscale": _keyscale,
    "timesignature": _timesignature,
    "language": _line,
    "is_instrumental": _bool,
    "custom_tag": _line,
    "prompt_override": _one_of(("caption", "genre")),
    "repeat": _repeat,
    "weight": _weight,
    "estimated": _estimated,
}
"""What a source may say about one song, and what makes a value of it."""
FILE_KEYS: dict[str, Callable[[Any], Any]] = {
    "custom_tag": _line,
    "tag_position": _one_of(TAG_POSITIONS),
    "genre_ratio": _percentage,
}
"""What a dataset.json may say about all songs."""
