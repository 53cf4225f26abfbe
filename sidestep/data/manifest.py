"""The dataset folder: what ``python -m sidestep.preprocess`` writes and training reads.

    dataset_info.json                  which model it was made with, and how
    songs.jsonl                        one line per song, in training order
    latents/<hash>.safetensors         latents (T, 64) float16, one file per distinct audio
    conditions/<hash>.safetensors      condition per prompt, (L, D), for example "caption" and "genre"

Files are named by a hash of all that went into them, so that a song is encoded again only when its audio, its
text or the model changes. No padding and no context is stored; both are made where they are needed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.files import describe, write_text

FORMAT = 1
AGAIN = "run python -m sidestep.preprocess again"
INFO, SONGS = "dataset_info.json", "songs.jsonl"


@dataclass(kw_only=True)
class SongRecord:
    """One song of a dataset; one line of ``songs.jsonl``."""

    audio: str
    """Path of the audio file relative to the folder of songs."""
    latents: str
    """File of the latents, relative to the dataset folder."""
    conditions: str
    """File of the conditions, relative to the dataset folder."""
    prompt: str
    """Which condition to train on: "caption" or "genre"."""
    num_frames: int
    """Latent frames, 25 per second."""
    caption: str = ""
    genre: str = ""
    lyrics: str = ""
    language: str = ""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    is_instrumental: bool = False
    source: str = ""
    """Where the words came from: "dataset.json", "sidecar" or "file name"."""


@dataclass(kw_only=True)
class DatasetInfo:
    """What a dataset was made with."""

    model_variant: str
    condition_width: int
    """D, the width of the stored conditions."""
    fingerprints: dict[str, str]
    """Of the checkpoint's vae, text_encoder and condition_encoder."""
    settings: dict[str, Any]
    """The preprocessing settings that shaped the data: custom_tags, tag_position, genre_ratio, language, seed, ..."""
    num_songs: int = 0
    total_seconds: float = 0.0
    sidestep_version: str = ""
    format: int = FORMAT


def write_manifest(folder: Path, info: DatasetInfo, songs: list[SongRecord]) -> None:
    """Write ``songs.jsonl`` and then ``dataset_info.json``, each complete or not at all."""
    lines = [json.dumps(dataclasses.asdict(song), ensure_ascii=False) for song in songs]
    write_text(folder / SONGS, "".join(line + "\n" for line in lines))
    write_text(folder / INFO, json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> tuple[DatasetInfo, list[SongRecord]]:
    """Read a dataset's description and its songs.

    Raises:
        UserError: if the folder is not a dataset, or a file in it cannot be understood.
    """
    if not (folder / INFO).is_file():
        raise UserError(
            f"dataset_dir={folder} is not a dataset: no {INFO} ({describe(folder)}); "
            f"make one with python -m sidestep.preprocess audio_dir=<songs> dataset_dir={folder}"
        )
    where = str(folder / INFO)
    info: DatasetInfo = _parse(DatasetInfo, "".join(_lines(folder / INFO)), where)
    if info.format != FORMAT:
        raise UserError(f"{where} has format {info.format}; this sidestep reads format {FORMAT}")
    if not isinstance(info.settings.get("custom_tags"), list):
        raise UserError(f"{where}: settings has no list custom_tags; {AGAIN}")
    songs_file = folder / SONGS
    songs = [_parse(SongRecord, line, f"{songs_file} line {n}") for n, line in enumerate(_lines(songs_file), start=1)]
    if not songs:
        raise UserError(f"{songs_file} names no songs; {AGAIN}")
    for song in songs:
        for file in (song.latents, song.conditions):
            if ".." in file or not re.fullmatch(r"\w[\w./-]{0,254}", file, re.ASCII):
                raise UserError(f"{songs_file}: {file[:60]!r} is no file of the dataset folder; {AGAIN}")
    return info, songs


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            return list(lines)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; {AGAIN}") from error


def _parse(cls: type[Any], text: str, where: str) -> Any:
    """Make a dataclass of one JSON object whose values have the types of its fields."""
    try:
        record = cls(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} cannot be understood: {error}; {AGAIN}") from error
    for name, wanted in typing.get_type_hints(cls).items():
        value = getattr(record, name)
        options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
        known = [typing.get_origin(option) or option for option in options]
        if type(value) not in known and not (wanted is float and type(value) is int):
            kind = " or ".join("null" if option is types.NoneType else option.__name__ for option in known)
            raise UserError(f"{where}: {name} must be {kind}, found {value!r:.60}; {AGAIN}")
    return record
