"""Lyrics whose lines carry times: LRC text and sections, and what of them is sung in a part of a song."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

TimedLine = tuple[float, str]
"""When a line begins, in seconds, and the line."""

_STAMP = re.compile(r"\[(\d{1,3}):(\d{1,2}(?:[.:,]\d{1,3})?)\]")
_WORD_STAMP = re.compile(r"<\d{1,3}:\d{1,2}(?:[.:,]\d{1,3})?>\s?")
_LRC_TAG = re.compile(r"\[(ar|ti|al|au|by|re|ve|la|lr|id|tool|length|offset|#)\s*:(.*)\]", re.IGNORECASE)
_OTHER_TAG = re.compile(r"\[[a-z_]+:.*\]")
"""What else programs put above the first time, in lower case; "[Chorus: Anna]" is a section."""
_SECTION = re.compile(r"\[[^\]\d][^\]]*\]\s*")


def parse_lrc(text: str) -> list[TimedLine] | None:
    """Read LRC text: ``[mm:ss.xx]`` in front of lines, several for a line that is repeated.

    A line without a time, such as ``[Verse]``, begins with the next one that has a time. The times of words
    (``<mm:ss.xx>``) and the tags of the file (``[ar:...]``) are left out; ``[offset:+500]`` shows lines that many
    milliseconds earlier.

    Returns:
        The lines by time, or None if most lines have none: "[1:30] guitar solo" between lines without times is a note.
    """
    lines: list[TimedLine] = []
    waiting: list[str] = []
    num_timed = num_untimed = 0
    offset = 0.0
    for line in text.splitlines():
        if tag := _LRC_TAG.fullmatch(line.strip()):
            if tag[1].lower() == "offset" and re.fullmatch(r"\s*[+-]?\d+\s*", tag[2]):
                offset = int(tag[2]) / 1000
            continue
        if not num_timed and _OTHER_TAG.fullmatch(line.strip()):
            continue
        words, times = line.strip(), []
        while stamp := _STAMP.match(words):
            times.append(60 * int(stamp[1]) + float(re.sub("[:,]", ".", stamp[2])))
            words = words[stamp.end() :].lstrip()
        words = _WORD_STAMP.sub("", words).strip()
        if not times:
            waiting += [words] if words else []
            num_untimed += bool(words) and not _SECTION.fullmatch(words)
            continue
        num_timed += 1
        lines += [(min(times), before) for before in waiting]
        lines += [(time, words) for time in times]
        waiting = []
    if not lines or num_untimed > num_timed:
        return None
    lines += [(lines[-1][0], rest) for rest in waiting]
    return sorted(((max(0.0, time - offset), words) for time, words in lines), key=lambda line: line[0])


def without_tags(text: str) -> str:
    """Leave the tags of LRC files out of lyrics that have no times; nothing is left where there is nothing else."""
    lines = text.split("\n")
    if all(_LRC_TAG.fullmatch(line.strip()) or _OTHER_TAG.fullmatch(line.strip()) for line in lines if line.strip()):
        return ""
    return "\n".join(line for line in lines if not _LRC_TAG.fullmatch(line.strip())).strip()


def parse_sections(value: Any) -> list[TimedLine]:
    """Read sections with times: ``[{"start": 12.5, "label": "Chorus", "lyrics": "..."}, ...]``.

    Raises:
        ValueError: saying what it must be.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('a list of sections such as {"start": 12.5, "label": "Chorus", "lyrics": "..."}')
    lines: list[TimedLine] = []
    sings = False
    for section in value:
        start: Any = section.get("start") if isinstance(section, dict) else None
        if type(start) not in (int, float) or not 0 <= start < math.inf:
            raise ValueError(f"sections that each have a start in seconds, not {section!r:.60}")
        label, words = section.get("label", ""), section.get("lyrics", section.get("text", ""))
        if not isinstance(label, str) or not isinstance(words, str):
            raise ValueError(f"sections whose label and lyrics are text, not {section!r:.60}")
        lines += [(float(start), f"[{label.strip().strip('[]')}]")] if label.strip() else []
        lines += [(float(start), line.strip()) for line in words.splitlines()]
        sings = sings or bool(words.strip())
    if not sings:
        raise ValueError("sections of which at least one has lyrics")
    return sorted(lines, key=lambda line: line[0])


def untimed(lines: Sequence[TimedLine]) -> str:
    """Write all lines without their times."""
    return "\n".join(words for _, words in lines).strip()


def sung_between(lines: Sequence[TimedLine], start: float, end: float) -> str:
    """Write the lines that begin in a part of a song, under the section they belong to.

    Args:
        lines: by time.
        start: of the part, in seconds.
        end: of the part, in seconds.

    Returns:
        The lines, or nothing if none begins there.
    """
    before = [words for time, words in lines if time < start and _SECTION.fullmatch(words)]
    inside = [words for time, words in lines if start <= time < end]
    if not any(words and not _SECTION.fullmatch(words) for words in inside):
        return ""
    first = next(words for words in inside if words)
    return "\n".join([*([] if _SECTION.fullmatch(first) else before[-1:]), *inside]).strip()
