"""Files that are never seen half-written, and words about what lies where."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_HOST = re.sub(r"[^A-Za-z0-9]+", "", socket.gethostname())


_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced|doomed)-(?P<host>[A-Za-z0-9]*)-(?P<process>\d{1,9})")


def hidden_name(path: Path, kind: str) -> Path:
    """The hidden name under which this process keeps what it has not finished with.

    Args:
        path: what it is to become, or was.
        kind: ``partial`` is being written, ``replaced`` may be needed again, ``doomed`` is being deleted.
    """
    return path.with_name(f".{path.name}.{kind}-{_HOST}-{os.getpid()}")


def describe(folder: Path, limit: int = 5) -> str:
    """Say in a few words what a folder holds, for messages about what was found where something else should be."""
    if folder.is_symlink() and not folder.exists():
        return f"it is a link to {os.readlink(folder)}, which is not there"
    if not folder.exists():
        return "it does not exist"
    if not folder.is_dir():
        return "it is a file, not a folder" if folder.is_file() else "it is neither a file nor a folder"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"it holds {', '.join(names[:limit])}{more}" if names else "it is empty"


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent, even after a power cut."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is complete or absent, and whose bytes depend on nothing but what is in it.

    Safetensors' own ``save_file`` puts the metadata in another order each time, and lets only the owner read the file.
    """
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to eight bytes
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[start:])


def ensure_readable(path: Path) -> None:
    """Raise what keeps a file from being opened; safetensors would say that it does not exist, whatever it is."""
    refuse_pipe(path)
    path.open("rb").close()


def refuse_pipe(path: Path) -> None:
    """Raise an error for a named pipe, since opening it would wait for ever."""
    if path.is_fifo():
        raise OSError(errno.EINVAL, "it is a pipe, not a file", str(path))


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Read a text file; unlike ``Path.read_text`` this does not wait for ever at a named pipe."""
    refuse_pipe(path)
    return path.read_text(encoding=encoding, errors=errors)


class LogFile(logging.FileHandler):
    """The log of a command; unlike its parent it does not wait for ever at a named pipe."""

    def __init__(self, filename: str, encoding: str) -> None:
        refuse_pipe(Path(filename))
        super().__init__(filename, encoding=encoding)


@contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Let an error name ``path`` where it names nothing, as errors of writing do, or something in ``partial``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            unnamed = error.errno is not None
        else:
            unnamed = partial is not None and Path(os.fsdecode(error.filename)).is_relative_to(partial)
        if unnamed:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; once the block ends without an error, it becomes ``path``."""
    partial = hidden_name(path, "partial")
    try:
        with naming(path, partial):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path, *, alone: bool = False) -> None:
    """Delete what :func:`replacing` and :func:`replacing_folder` left in a folder when their process was killed.

    Args:
        folder: where to look.
        alone: nobody else may be writing there (see :func:`alone_in`), so that whatever lies there was left behind:
            by processes of other machines, which cannot be asked whether they live, and by one that was killed and
            whose number another process has now.
    """
    import psutil

    for path in folder.glob(".*"):
        left = _LEFT.fullmatch(path.name)
        if left is None:
            continue
        process = int(left["process"])
        # in a container a new process often gets the number of the one that was killed
        dead = process == os.getpid() or not psutil.pid_exists(process)
        if alone or (dead and left["host"] == _HOST):
            target = folder / left["name"]
            if left["kind"] == "replaced" and not target.exists():
                os.replace(path, target)  # killed between taking the old folder away and putting the new one there
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; once the block ends without an error, it becomes ``folder``.

    Where that is a link, the folder that it points at is replaced.

    Raises:
        UserError: if something else than a folder has its name.
    """
    typed, folder = folder, Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    remove_abandoned(folder.parent)
    if os.path.lexists(typed) and not folder.is_dir():
        raise UserError(f"{typed} is no folder, and one is to be written there; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden_name(folder, "partial")
    partial.mkdir()
    try:
        with naming(folder, partial):
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                sync(path)
            sync(partial)
            old = hidden_name(folder, "replaced")
            if folder.exists():
                os.replace(folder, old)  # a folder cannot replace one that is not empty
            os.replace(partial, folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    except UserError as error:  # what was found wrong in it should not be looked for under a hidden name
        raise UserError(str(error).replace(str(partial), str(folder))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep_others(old: Path, new: Path) -> None:
    """Copy what lies in a folder under names that the folder to replace it has not."""
    for path in old.iterdir() if old.is_dir() else ():
        if not (new / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)


@contextmanager
def alone_in(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; a process that died does not block the next.

    Args:
        folder: an existing folder; each process that wants it for itself must ask here.
        wait: stand in line for it instead of refusing.

    Raises:
        UserError: naming the host and process that is already there, or if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    owner = folder / ".owner"
    lock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            try:
                refuse_pipe(owner)
                who = owner.read_text(encoding="utf-8", errors="replace").strip()[:200]
            except OSError:  # it is only just coming or going
                who = "another process"
            if not wait:
                raise UserError(f"{folder} is in use by {who}; wait for it or stop it") from error
            log.info("waiting for %s, which is in use by %s", folder, who)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    try:
        with naming(owner):
            refuse_pipe(owner)
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def discarding(folder: Path) -> Iterator[Path]:
    """Take a folder out of sight before the block deletes it, so that nobody finds it half-deleted."""
    doomed = hidden_name(folder, "doomed")
    os.replace(folder, doomed)
    yield doomed


def sync(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hashes_of(folder: Path) -> dict[str, str]:
    """Hash every file of a folder: name -> 64 hex digits."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def sha256_of(path: Path) -> str:
    """Hash a file's bytes; 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
