"""Every file of a dataset, read through before a run trains on it, and then remembered until it changes.

    <dataset_dir>/.checked    a hash per file that was found whole: of its name, size and time of change, and of what
                              it must hold

What cannot be read there, or was damaged, costs another look at the files and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sidestep.times import duration

log = logging.getLogger(__name__)

REMEMBERED = ".checked"
PATIENCE = 10.0
"""Seconds between two lines about how far it is; what was found is written down as often."""
_RULES = "1"
"""Another word when more is looked for, so that files are looked at again."""


class Checkable(Protocol):
    """A folder of songs whose files can be read through."""

    folder: Path

    def files(self, index: int) -> dict[str, str]:
        """Files of a song, relative to the folder, and in words what each must hold."""

    def check(self, index: int, file: str) -> None:
        """Read one of them once, whole.

        Raises:
            UserError: if it is damaged, or does not hold what it must.
        """


def check_files(
    source: Checkable, songs: Iterable[int], spare: Path | None = None, *, process: int = 0, num_processes: int = 1
) -> None:
    """Read every file of some songs, but for those that were read before and have not changed since.

    Args:
        source: the folder of songs.
        songs: their numbers in it.
        spare: where to remember what was found if the folder itself may not be written.
        process: which of the processes this is; each reads its share.
        num_processes: how many there are.

    Raises:
        UserError: naming the first file that is damaged, of the wrong shape, or not finite.
    """
    first_song: dict[tuple[str, str], int] = {}
    for index in songs:
        for named in source.files(index).items():
            first_song.setdefault(named, index)
    share = list(first_song.items())[process::num_processes]
    memory = _Memory([source.folder] if spare is None else [source.folder, spare])
    began = said = time.monotonic()
    try:
        for number, ((file, holds), index) in enumerate(share):
            mark = _mark(source.folder, file, holds)
            if mark in memory.known:
                continue
            source.check(index, file)
            memory.found += [mark]
            if time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                log.info("reading the files of %s once: %d of %d", source.folder, number + 1, len(share))
                memory.write()
    finally:
        memory.write()
    if said > began:
        log.info("all files of %s are whole; that took %s", source.folder, duration(time.monotonic() - began))


def _mark(folder: Path, file: str, holds: str) -> str:
    """Sixteen hex digits of one version of a file; none if it cannot be asked, which reading it will explain."""
    try:
        status = (folder / file).stat()
    except (OSError, ValueError):
        return ""
    version = (_RULES, file, holds, status.st_size, status.st_mtime_ns, status.st_mode)
    return hashlib.blake2b(repr(version).encode(), digest_size=8).hexdigest()


class _Memory:
    """What was found whole, in a file that several processes and runs may add to at once.

    Args:
        folders: where it may be; the first that can be written gets what is new.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.found: list[str] = []
        self.known: set[str] = set()
        for folder in folders:
            try:
                if (folder / REMEMBERED).is_file():
                    self.known |= set((folder / REMEMBERED).read_text(encoding="ascii", errors="replace").split())
            except OSError as error:
                log.warning("%s cannot be read (%s), so files are read again", folder / REMEMBERED, error.strerror)

    def write(self) -> None:
        """Add what is new; where nobody can, the next start reads those files again."""
        lines = "".join(f"\n{mark}" for mark in self.found if mark)  # in front, so that a torn line spoils only itself
        for folder in self.folders if lines else ():
            try:
                # no link, which may lead out of the folder, and no pipe, which may let nobody write
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                with open(os.open(folder / REMEMBERED, flags, 0o666), "a", encoding="ascii") as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        continue
                    file.write(lines)
            except OSError:
                continue
            self.found.clear()
            return
