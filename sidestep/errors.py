"""The one exception sidestep raises for something the user can mend, and what it becomes in a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """A wrong setting, a missing file or an unusable checkpoint.

    The command line prints only the message, on one line, so write it for the person at the terminal:
    what is wrong, where it was set, and what to type instead. What is quoted from a file or its name may hold line
    breaks or terminal escapes; they are shown as in Python's strings.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda char: ascii(char[0])[1:-1], message))


class SharedError(UserError):
    """What every process of a run refuses at the same place, so that all of them can go on to another run."""


@contextmanager
def shared() -> Iterator[None]:
    """Around what every process of a run does alike, as reading its settings: what one refuses, all do.

    Raises:
        SharedError: in place of a UserError.
    """
    try:
        yield
    except UserError as error:
        raise SharedError(str(error)) from error


class PointFailed(Exception):  # noqa: N818  it is a result, written down, and not a mistake of this program
    """A point of a sweep failed, which is in its log and its record; the other points go on.

    Attributes:
        in_all: whether it failed in every process of the run.
    """

    def __init__(self, message: str, *, in_all: bool = False) -> None:
        super().__init__(message)
        self.in_all = in_all


def printable(text: str) -> str:
    """Escape text that would end a line or move the cursor, as names of files may."""
    return text if text.isprintable() else ascii(text)[1:-1]
