"""The words of each song: caption, lyrics, tempo and the rest, from whichever files give them.

Read in this order, each value of a later source taking the place of an earlier one:

    file name              "01 - My_song.wav" has the caption "My song" if nothing else gives one
    dataset.json           of ACE-Step's or Side-Step's dataset builder: {"metadata": ..., "samples": [...]},
                           or only the list; an entry belongs to the song its audio_path or filename names
    song.txt               Side-Step's "caption: ..." lines with the lyrics last, or, if the first line is no such
                           key, the lyrics alone, as in ACE-Step's older datasets
    song.json              an object with the keys of a dataset.json entry
    song.caption.txt       the caption alone
    song.lyrics.txt        the lyrics alone

Files beside a song win over dataset.json because they are what people edit by hand. An empty value counts as
not given. Every mistake in every file is collected and reported at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.acestep.prompts import INSTRUMENTAL, choose_genre
from sidestep.data.audio import find_audio
from sidestep.errors import UserError

TAG_POSITIONS = ("prepend", "append", "replace")
PROMPTS = ("caption", "genre")

_ALIASES = {"key": "keyscale", "signature": "timesignature", "time_signature": "timesignature"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_TRACK_NUMBER = re.compile(r"^(\d{2,3}\s*[-._]\s*|0\d\s+)")


@dataclass(kw_only=True)
class Song:
    """One audio file and its words."""

    path: Path
    name: str
    """Path relative to the folder of songs, with forward slashes."""
    caption: str = ""
    genre: str = ""
    lyrics: str = ""
    """Without control characters but newline and tab; empty for an instrumental."""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    """Numerator only: "4" for 4/4."""
    language: str = ""
    is_instrumental: bool = False
    custom_tag: str = ""
    prompt_override: str = ""
    """The song's own choice of "caption" or "genre", which wins over the genre ratio."""
    repeat: int = 1
    """Side-Step's oversampling. Every song counts once here; a larger number is noted."""
    prompt: str = "caption"
    """Which of "caption" and "genre" the song trains on."""
    source: str = "file name"
    """One of "dataset.json", "sidecar" and "file name": where the caption came from."""


@dataclass(kw_only=True)
class SongList:
    """The songs of a folder, and what was decided and noticed while reading them."""

    songs: list[Song]
    tag_position: str
    genre_ratio: int
    missing: list[str] = field(default_factory=list)
    """Entries of dataset.json whose audio file is not there."""
    notes: list[str] = field(default_factory=list)
    """Words and settings that were found and have no effect."""


def read_songs(
    audio_dir: Path,
    *,
    metadata_file: Path | None = None,
    custom_tag: str = "",
    tag_position: str = "prepend",
    genre_ratio: int = 0,
    language: str = "unknown",
) -> SongList:
    """Find the songs of a folder and read their words.

    Args:
        audio_dir: folder of songs, searched with its subfolders.
        metadata_file: a dataset.json; None takes the one in ``audio_dir`` if there is one.
        custom_tag: trigger word of every song; empty leaves it to each entry of dataset.json, then to its metadata.
        tag_position: where the tag goes; "prepend", the default, leaves it to dataset.json if the tag comes from there.
        genre_ratio: per cent of songs that train on their genre line; 0 leaves it to dataset.json.
        language: of songs that do not name one.

    Raises:
        UserError: naming every file and key that cannot be used.
    """
    problems: list[str] = []
    songs = [Song(path=path, name=path.relative_to(audio_dir).as_posix()) for path in find_audio(audio_dir)]
    if metadata_file is None and (audio_dir / "dataset.json").is_file():
        metadata_file = audio_dir / "dataset.json"
    listing = SongList(songs=songs, tag_position=tag_position, genre_ratio=genre_ratio)
    entries: dict[str, dict[str, Any]] = {}
    if metadata_file is not None:
        metadata, samples = _read_dataset_json(metadata_file)
        entries = _match_entries(samples, songs, audio_dir, metadata_file, listing.missing, problems)
        file_tag = _apply_metadata(metadata, listing, custom_tag, metadata_file, problems)
        for song in songs:
            song.custom_tag = file_tag
    for song in songs:
        where = f"{metadata_file} entry of {song.name}"
        _merge(song, entries.get(song.name, {}), "dataset.json", where, problems)
        for values, sidecar in _read_sidecars(song.path, metadata_file, problems):
            _merge(song, values, "sidecar", str(sidecar), problems)
        _complete(song, custom_tag, language, problems)
    if problems:
        raise UserError("; ".join(problems))
    _choose_prompts(listing)
    return listing


def caption_from_name(path: Path) -> str:
    """Make a caption of a file's name: underscores become spaces and a track number goes.

    >>> caption_from_name(Path("01 - My_song.wav"))
    'My song'
    """
    words = " ".join(_TRACK_NUMBER.sub("", path.stem).replace("_", " ").split())
    return words or path.stem


def _complete(song: Song, custom_tag: str, language: str, problems: list[str]) -> None:
    """Fill in what no source gave."""
    if _CONTROL.search(song.name):
        problems.append(f"{song.name!a}: the file name holds control characters or is not UTF-8; rename it")
    song.custom_tag = custom_tag or song.custom_tag
    song.caption = song.caption or caption_from_name(song.path)
    song.language = song.language or language
    if song.prompt_override == "genre" and not song.genre:
        problems.append(f"{song.name}: prompt_override is genre, but the song has no genre")


def _choose_prompts(listing: SongList) -> None:
    chosen = choose_genre(len(listing.songs), listing.genre_ratio)
    without_genre, unsung = [], []
    for index, song in enumerate(listing.songs):
        song.prompt = song.prompt_override or ("genre" if index in chosen and song.genre else "caption")
        if index in chosen and not song.genre and not song.prompt_override:
            without_genre.append(song.name)
        if song.is_instrumental and song.lyrics not in ("", INSTRUMENTAL):
            unsung.append(song.name)
        song.lyrics = "" if song.is_instrumental or song.lyrics == INSTRUMENTAL else song.lyrics
        song.is_instrumental = not song.lyrics
    for note, names in (
        ("chosen by the genre ratio but without a genre, so on their caption", without_genre),
        ("marked instrumental, so their lyrics are not used", unsung),
        ("ask to be repeated; every song counts once here", [song.name for song in listing.songs if song.repeat > 1]),
    ):
        if names:
            listing.notes.append(f"{note}: {_names(names)}")
    if listing.tag_position != "prepend" and not any(song.custom_tag for song in listing.songs):
        listing.notes.append(f"tag_position={listing.tag_position} has no effect, because no song has a custom_tag")


def _names(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# dataset.json


def _read_dataset_json(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the file-level metadata and the entries."""
    content = _read_json(path)
    if isinstance(content, list):
        content = {"samples": content}
    samples = content.get("samples") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else None
    if not isinstance(samples, list) or not isinstance(metadata, dict):
        keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f'{path} must be a list of songs or {{"metadata": {{...}}, "samples": [...]}}, it has {keys}')
    for index, entry in enumerate(samples):
        if not isinstance(entry, dict):
            raise UserError(f'{path} entry {index} must be an object such as {{"filename": ...}}, it is {entry!r}')
    return metadata, samples


def _apply_metadata(
    metadata: dict[str, Any], listing: SongList, custom_tag: str, path: Path, problems: list[str]
) -> str:
    """Take the file's own tag position and genre ratio where the settings leave them open; return its tag."""
    values: dict[str, Any] = {}
    for key, convert in _FILE_KEYS.items():
        if metadata.get(key) not in (None, ""):
            _convert(key, metadata[key], convert, values, f"{path} metadata", problems)
    if not custom_tag and listing.tag_position == "prepend":
        listing.tag_position = values.get("tag_position", "prepend")
    listing.genre_ratio = listing.genre_ratio or values.get("genre_ratio", 0)
    tag: str = values.get("custom_tag", "")
    return tag


def _match_entries(
    samples: list[dict[str, Any]],
    songs: list[Song],
    audio_dir: Path,
    path: Path,
    missing: list[str],
    problems: list[str],
) -> dict[str, dict[str, Any]]:
    """Find the song that each entry is about, by its audio_path and then by its file name.

    Paths written on another machine do not exist here, so the last part of one is enough if only one song has it.
    """
    by_path = {song.path.resolve(): song for song in songs}
    by_file_name: dict[str, list[Song]] = {}
    for song in songs:
        by_file_name.setdefault(song.path.name, []).append(song)
    matched: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(samples):
        values = (entry.get(key) for key in ("audio_path", "filename"))
        names = [value.replace("\\", "/") for value in values if isinstance(value, str) and value]
        if not names:
            problems.append(f"{path} entry {index}: neither audio_path nor filename names a file")
            continue
        candidates = [(folder / name).resolve() for name in names for folder in (path.parent, audio_dir)]
        found = [by_path[candidate] for candidate in candidates if candidate in by_path][:1]
        if not found:
            if any(file.is_file() and not file.is_relative_to(audio_dir.resolve()) for file in candidates):
                problems.append(f"{path} entry {index}: {names[0]} is outside audio_dir={audio_dir}; move it there")
                continue
            found = by_file_name.get(Path(names[-1]).name, [])
        if len(found) > 1:
            problems.append(f"{path} entry {index}: {names[0]} could be any of {_names([s.name for s in found])}")
        elif not found:
            missing.append(names[0])
        elif found[0].name in matched:
            problems.append(f"{path} entry {index}: {found[0].name} is named twice")
        else:
            matched[found[0].name] = entry
    return matched


# sidecars


def _read_sidecars(audio: Path, metadata_file: Path | None, problems: list[str]) -> list[tuple[dict[str, Any], Path]]:
    """Read the files beside a song, the one that wins last."""
    found: list[tuple[dict[str, Any], Path]] = []

    def read(suffix: str, parse: Callable[[Path], dict[str, Any]]) -> None:
        path = audio.with_name(audio.stem + suffix)
        if path.is_file() and path != metadata_file:
            try:
                found.append((parse(path), path))
            except UserError as error:
                problems.append(str(error))

    read(".txt", lambda path: _parse_txt(_read_text(path)))
    read(".json", _read_object)
    read(".caption.txt", lambda path: {"caption": _read_text(path)})
    read(".lyrics.txt", lambda path: {"lyrics": _read_text(path)})
    return found


def _parse_txt(text: str) -> dict[str, Any]:
    """Read Side-Step's ``key: value`` lines, or lyrics if the first line is not one.

    Caption and lyrics may go on over many lines, up to a key that was not seen yet; the lyrics come last. Keys that
    are not a song's are passed over, as they are in JSON.
    """
    if _key_of(text.strip().partition("\n")[0]) is None:
        return {"lyrics": text}
    values: dict[str, Any] = {}
    key = ""
    for line in text.strip().splitlines():
        name = _key_of(line)
        if name is not None and name not in values:
            key, line = name, line.partition(":")[2].strip()
            values[key] = line
        elif key in ("caption", "lyrics"):
            values[key] += f"\n{line}"
    return values


def _key_of(line: str) -> str | None:
    name, colon, _ = line.partition(":")
    name = name.strip().lower()
    return name if colon and _ALIASES.get(name, name) in _SONG_KEYS else None


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} must be an object such as {{"caption": ...}}, it is a {type(content).__name__}')
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error


# values


def _merge(song: Song, values: dict[str, Any], source: str, where: str, problems: list[str]) -> None:
    """Put the values one source gives into a song."""
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = _ALIASES.get(key, key)
        if name in _SONG_KEYS and value is not None and str(value).strip() not in ("", "N/A"):
            _convert(name, value, _SONG_KEYS[name], given, where, problems)
    if "lyrics" in given and "is_instrumental" not in given:
        song.is_instrumental = False  # lyrics beside the song win over a mark further away
    if "caption" in given:
        song.source = source
    for key, value in given.items():
        setattr(song, key, value)


def _convert(
    key: str, value: Any, convert: Callable[[Any], Any], into: dict[str, Any], where: str, problems: list[str]
) -> None:
    try:
        into[key] = convert(value)
    except ValueError as error:
        problems.append(f"{where}: {key} must be {error}, it is {str(value)[:60]!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    text = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if _CONTROL.search(text):
        raise ValueError("text without control characters")
    return text


def _line(value: Any) -> str:
    text = _text(value)
    if "\n" in text:
        raise ValueError("one line of text")
    return text


def _bpm(value: Any) -> int:
    message = "a number of beats per minute above 0"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(message) from None
    if not 0.5 <= number < 10_000:
        raise ValueError(message)
    return round(number)


def _timesignature(value: Any) -> str:
    """Keep the numerator, which is all that ACE-Step's prompt has room for."""
    match = re.fullmatch(r"(\d{1,2})(/\d{1,2})?", str(value).strip())
    if match is None:
        raise ValueError('a number of beats per bar such as "4" or "4/4"')
    return match[1]


def _bool(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def _percentage(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise ValueError("a whole number from 0 to 100")
    return value


def _repeat(value: Any) -> int:
    if isinstance(value, bool) or not str(value).strip().isdecimal():
        raise ValueError("a whole number")
    return int(str(value))


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return convert


_SONG_KEYS: dict[str, Callable[[Any], Any]] = {
    "caption": _text,
    "genre": _line,
    "lyrics": _text,
    "bpm": _bpm,
    "keyscale": _line,
    "timesignature": _timesignature,
    "language": _line,
    "is_instrumental": _bool,
    "custom_tag": _line,
    "prompt_override": _one_of(PROMPTS),
    "repeat": _repeat,
}
_FILE_KEYS: dict[str, Callable[[Any], Any]] = {
    "custom_tag": _line,
    "tag_position": _one_of(TAG_POSITIONS),
    "genre_ratio": _percentage,
}
