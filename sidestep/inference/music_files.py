"""Music files with the settings that made them inside, under names that tell different settings apart."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

import sidestep
from sidestep.data.audio import SAMPLE_RATE
from sidestep.errors import UserError
from sidestep.files import replacing

UNNAMED = {"final", "best", "checkpoints", "adapter"}  # folders of a run that do not tell one adapter from another


def adapter_name(path: Path) -> str:
    """Name an adapter after where it lies: ``outputs/first/lokr-base/final`` -> ``first-lokr-base``."""
    absolute = Path(os.path.abspath(path.with_suffix("") if path.is_file() else path))
    parts = [part for part in absolute.parts[1:] if part not in UNNAMED]
    return slug("-".join(parts[-2:]))


def slug(text: str) -> str:
    """Keep what every file system takes, at most 80 characters."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:80] or "music"


def music_name(title: str, settings: Mapping[str, Any]) -> str:
    """Name a file, without its suffix, so that other settings give another name and the same give the same."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug(title)}-seed{settings['seed']}-{digest}"


def write_music(path: Path, audio: Tensor, settings: Mapping[str, Any]) -> None:
    """Write a 16-bit file whose comment is the settings as JSON.

    Args:
        path: ends in .flac or .wav.
        audio: (2, S) at 48 kHz, within [-1, 1].
        settings: plain values.

    Raises:
        UserError: if the file cannot be written.
    """
    kind = path.suffix.removeprefix(".").upper()
    encoded = io.BytesIO()  # libsndfile does not say that a disk is full
    with soundfile.SoundFile(encoded, "w", SAMPLE_RATE, len(audio), subtype="PCM_16", format=kind) as file:
        file.title = path.stem
        file.software = f"sidestep {sidestep.__version__}"
        file.comment = json.dumps(settings)  # before the samples, or WAV leaves it out
        file.write(audio.T.numpy())
    try:
        with replacing(path) as partial:
            partial.write_bytes(encoded.getbuffer())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read what :func:`write_music` put beside the sound.

    Raises:
        UserError: if there is nothing of the kind.
    """
    try:
        with soundfile.SoundFile(path) as file:
            comment = _wav_comment(path) if file.format == "WAV" else file.comment
        settings = json.loads(comment)
    except (OSError, ValueError, RecursionError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path} is not music that sidestep made: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not music that sidestep made: its comment is {comment!r:.60}")
    return settings


def _wav_comment(path: Path) -> bytes:
    """Find the comment in the header of a WAV file; libsndfile writes it at any length but reads only 2 kB back."""
    with path.open("rb") as file:
        header = file.read(2**20)
    found = re.search(rb"LIST....INFO.*?ICMT(....)", header, re.DOTALL)
    return header[found.end() :][: int.from_bytes(found[1], "little")].rstrip(b"\0") if found else b""
