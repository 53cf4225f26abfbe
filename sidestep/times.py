"""Times as they are written down and said."""

from __future__ import annotations

import calendar
import time


def now() -> str:
    """The time in UTC, to the second."""
    return at(time.time())


def at(seconds: float) -> str:
    """A time as :func:`now` writes it, from seconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def seconds_between(start: str, end: str) -> float:
    """Seconds from one :func:`now` to another; 0 where one of them is empty."""
    if not start or not end:
        return 0.0
    return float(_seconds(end) - _seconds(start))


def duration(seconds: float) -> str:
    """Write a time span as a person says it: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _seconds(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
