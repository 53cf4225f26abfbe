"""The dataset folder: what ``python -m sidestep.preprocess`` writes and training reads.

    dataset_info.json                  which model it was made with, and how
    songs.jsonl                        one line per song, in training order
    latents/<hash>.safetensors         latents (T, 64) float16, one file per distinct audio file
    conditions/<hash>.safetensors      the parts of its conditions, each (tokens, D); see :func:`condition_keys`
    .checked                           which versions of these files training has read through; see ``checks``

Files are named by a hash of all that went into them, so that a song is encoded again only when its audio, its
text or the model changes. No padding and no context is stored; both are made where they are needed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import operator
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.data.sampler import reference_parts
from sidestep.errors import UserError
from sidestep.files import describe, refuse_pipe, write_text

FORMAT = 2
AGAIN = "run python -m sidestep.preprocess again"
INFO, SONGS = "dataset_info.json", "songs.jsonl"
PROMPTS = ("caption", "genre", "tag")
"""The texts a song may have in the place of its caption; "tag" is the custom tag alone."""

MOST_FRAMES = 25_000_000
"""Latent frames of the longest song there may be, a million seconds."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What JSON and pickles can hold, and no file of text."""

_FILE = re.compile(r"\w[\w./-]{0,254}", re.ASCII)


@dataclass(kw_only=True, slots=True)
class SongRecord:
    """One song of a dataset; one line of ``songs.jsonl``, which leaves out what has its default.

    Its lyrics, and every text as the model reads it, are in the header of its conditions file.
    """

    audio: str
    """Path of the audio file relative to the folder of songs."""
    latents: str
    """File of the latents, relative to the dataset folder."""
    conditions: str
    """File of the conditions, relative to the dataset folder."""
    prompt: str
    """Which text to train on unless the run says otherwise: "caption" or "genre"."""
    num_frames: int
    """Latent frames, 25 per second."""
    latents_sha256: str = ""
    """Hash of the file, 64 hex digits; empty in datasets that were made before there was one."""
    conditions_sha256: str = ""
    sound: str = ""
    """Hash of what it sounds like, the same in wav and flac; empty where it is not known."""
    caption: str = ""
    genre: str = ""
    language: str = ""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    is_instrumental: bool = False
    source: str = ""
    """Where the words came from, for example "sidecar" or "file name"."""
    repeat: int = 1
    """How often the song comes in an epoch."""
    weight: float = 1.0
    """What its loss is multiplied by."""
    prompts: list[str] = dataclasses.field(default_factory=lambda: ["caption"])
    """Which of "caption", "genre" and "tag" are stored."""
    is_timed: bool = False
    """Whether each window has lyrics of its own."""
    num_references: int = 0
    """How many parts of the song are stored as reference audio besides silence."""


_REQUIRED = ("audio", "latents", "conditions", "prompt", "num_frames")
_DEFAULTS = dataclasses.asdict(SongRecord(audio="", latents="", conditions="", prompt="", num_frames=0))


@dataclass(kw_only=True)
class DatasetInfo:
    """What a dataset was made with."""

    model_variant: str
    condition_width: int
    """D, the width of the stored conditions."""
    fingerprints: dict[str, str]
    """Of the checkpoint's vae, text_encoder and condition_encoder."""
    settings: dict[str, Any]
    """The preprocessing settings that shaped the data: custom_tags, tag_position, genre_ratio, window_seconds, ..."""
    num_songs: int = 0
    total_seconds: float = 0.0
    sidestep_version: str = ""
    format: int = FORMAT


def condition_keys(
    song: SongRecord, prompt: str, *, window: int | None, sings: bool, reference: int | None = None
) -> tuple[str, str, str]:
    """Name the three parts whose rows, one after the other, are a condition.

    The parts are independent: lyrics, reference and text go through different encoders, and the transformer does not
    see their order. So each is stored once, however many conditions it is part of.

    Args:
        song: which song.
        prompt: one of those it has.
        window: one of its windows, or None for a condition that speaks of the whole song.
        sings: False leaves the lyrics out.
        reference: which part of the song is its reference audio; None takes silence, or the file that all songs have.
    """
    lyrics = "lyrics" if sings or song.is_instrumental else "instrumental"
    if sings and window is not None and song.is_timed:
        lyrics = f"window.{window}.lyrics"
    sound = "reference" if reference is None else f"reference.{reference}"
    return lyrics, sound, prompt if window is None else f"window.{prompt}"


def write_manifest(folder: Path, info: DatasetInfo, songs: list[SongRecord]) -> None:
    """Write ``songs.jsonl`` and then ``dataset_info.json``, each complete or not at all."""
    lines = [json.dumps(_without_defaults(song), ensure_ascii=False) for song in songs]
    write_text(folder / SONGS, "".join(line + "\n" for line in lines))
    write_text(folder / INFO, json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False) + "\n")


def _without_defaults(song: SongRecord) -> dict[str, Any]:
    values = dataclasses.asdict(song)
    return {key: value for key, value in values.items() if key in _REQUIRED or value != _DEFAULTS[key]}


@contextmanager
def uncollected() -> Iterator[None]:
    """Stop garbage collection; it would go through all songs again and again while they are made, and find nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def read_manifest(folder: Path) -> tuple[DatasetInfo, list[SongRecord]]:
    """Read a dataset's description and its songs.

    Raises:
        UserError: if the folder is not a dataset, or a file in it cannot be understood.
    """
    if not os.path.lexists(folder / INFO):
        raise UserError(
            f"dataset_dir={folder} is not a dataset: no {INFO} ({describe(folder)}); "
            f"make one with python -m sidestep.preprocess audio_dir=<songs> dataset_dir={folder}"
        )
    where = str(folder / INFO)
    info: DatasetInfo = _parse(DatasetInfo, "".join(_lines(folder / INFO)), where)
    if info.format != FORMAT:
        raise UserError(f"{where} has format {info.format}; this sidestep reads format {FORMAT}")
    tags = info.settings.get("custom_tags")
    if not isinstance(tags, list):
        raise UserError(f"{where}: settings has no list custom_tags; {AGAIN}")
    if not all(isinstance(tag, str) and not HALF_CHARACTER.search(tag) for tag in tags):
        raise UserError(f"{where}: settings has custom_tags {tags!r:.60}, which are no words; {AGAIN}")
    window_seconds = info.settings.get("window_seconds")
    if window_seconds is not None and not (type(window_seconds) in (int, float) and 0.08 <= window_seconds <= 1e6):
        raise UserError(f"{where}: settings has window_seconds {window_seconds!r:.60}; {AGAIN}")
    songs_file = folder / SONGS
    lines = _lines(songs_file)
    songs = _parse_quickly(lines)
    if songs is None:  # something is wrong: find the line
        songs = [_parse(SongRecord, line, f"{songs_file} line {n}") for n, line in enumerate(lines, start=1)]
    if not songs:
        raise UserError(f"{songs_file} names no songs; {AGAIN}")
    for n, (song, line) in enumerate(zip(songs, lines, strict=True), start=1):
        if "\\ud" in line or "\\uD" in line:  # half a surrogate pair cannot be written anywhere
            for key, value in dataclasses.asdict(song).items():
                if HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
                    raise UserError(f"{songs_file} line {n}: {key} holds what is no character, {value!r:.60}; {AGAIN}")
        for file in (song.latents, song.conditions):
            if ".." in file or not _FILE.fullmatch(file):
                raise UserError(f"{songs_file}: {file[:60]!r} is no file of the dataset folder; {AGAIN}")
        if not 1 <= song.repeat < 10**6 or not 0 < song.weight <= 1e4 or song.prompt not in song.prompts:
            wrong = (
                "repeat must be at least 1 and below a million, weight a number above 0 and at most 10,000, and "
                "prompt one of prompts"
            )
            raise UserError(f"{songs_file} line {n}: {wrong}; {AGAIN}")
        if song.num_frames > MOST_FRAMES:
            raise UserError(f"{songs_file} line {n}: num_frames {song.num_frames:.6g} is too long for a song; {AGAIN}")
        if song.num_references and song.num_references != (parts := len(reference_parts(song.num_frames))):
            raise UserError(
                f"{songs_file} line {n}: num_references is {song.num_references:.6g}, and a song of {song.num_frames} "
                f"frames has {parts} or 0; {AGAIN}"
            )
        if song.prompts != ["caption"] and not all(prompt in PROMPTS for prompt in song.prompts):
            raise UserError(f"{songs_file} line {n}: prompts must be of {', '.join(PROMPTS)}; {AGAIN}")
    return info, songs


def names_stored_songs(path: Path) -> bool:
    """Whether a ``songs.jsonl`` is a dataset's own, and not a table of words that a person keeps."""
    try:
        return path.is_file() and _parse_quickly(_lines(path)) is not None
    except UserError:
        return False


def describes_dataset(path: Path) -> bool:
    """Whether a ``dataset_info.json`` is a dataset's own; other programs keep theirs under the same name."""
    try:
        return path.is_file() and isinstance(_parse(DatasetInfo, "".join(_lines(path)), str(path)), DatasetInfo)
    except UserError:
        return False


def parse_cuts(text: str) -> dict[str, int]:
    """Read what the header of a conditions file says about words that were too many: text -> tokens cut off.

    Raises:
        ValueError: if it says nothing of the kind.
        RecursionError: if it is nested too deeply.
    """
    cuts = json.loads(text)
    if not isinstance(cuts, dict) or not all(type(tokens) is int for tokens in cuts.values()):
        raise ValueError(f"found {text:.60}")
    return cuts


def _parse_quickly(lines: Sequence[str]) -> list[SongRecord] | None:
    """Make the records of all lines at once, 100,000 in about half a second; None if a line is wrong."""
    try:
        songs = [SongRecord(**row) for row in json.loads(f"[{','.join(lines)}]")]
    except (ValueError, TypeError, RecursionError):
        return None
    for name, wanted in typing.get_type_hints(SongRecord).items():
        if not set(map(type, map(operator.attrgetter(name), songs))) <= set(_known_types(wanted)):
            return None
    return songs if len(songs) == len(lines) else None


def _lines(path: Path) -> list[str]:
    try:
        refuse_pipe(path)
        with path.open(encoding="utf-8") as lines:
            return list(lines)
    except FileNotFoundError as error:
        found = f"cannot be read: {describe(path)}" if path.is_symlink() else "is missing"
        raise UserError(f"{path} {found}; {AGAIN}") from error
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
        known = _known_types(wanted)
        if type(value) not in known and not (wanted is float and type(value) is int):
            kind = " or ".join("null" if option is types.NoneType else option.__name__ for option in known)
            raise UserError(f"{where}: {name} must be {kind}, found {value!r:.60}; {AGAIN}")
    return record


def _known_types(wanted: Any) -> list[type[Any]]:
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    return [typing.get_origin(option) or option for option in options]
