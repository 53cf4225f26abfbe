"""The words of each song: caption, lyrics, tempo and the rest, from whichever files give them.

Read in this order, each value of a later source taking the place of an earlier one:

    file name              "01 - My_song.wav" has the caption "My song" if nothing else gives one
    dataset.json           of ACE-Step's or Side-Step's dataset builder: {"metadata": ..., "samples": [...]},
                           or only the list; an entry belongs to the song its audio_path or filename names
    song.txt               Side-Step's "caption: ..." lines with the lyrics last, or the lyrics alone, as in
                           ACE-Step's older datasets; ``_parse_txt`` tells them apart
    song.json              an object with the keys of a dataset.json entry
    song.caption.txt       the caption alone
    song.lyrics.txt        the lyrics alone

Files beside a song win over dataset.json because they are what people edit by hand. An empty value counts as
not given. A song with a mistake in its words is left out, with all of its mistakes by file and key.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.acestep.prompts import INSTRUMENTAL, choose_genre
from sidestep.data.audio import find_audio
from sidestep.data.lyrics import TimedLine
from sidestep.errors import UserError
from sidestep.files import describe

TAG_POSITIONS = ("prepend", "append", "replace")
PROMPTS = ("caption", "genre")

_ALIASES = {"key": "keyscale", "signature": "timesignature", "time_signature": "timesignature"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_KEY_LINE = re.compile(r"\s*(\w+)\s*:(.*)")
_FORMS = {
    "keyscale": re.compile(r"[a-g]\s*(#|b|\u266f|\u266d|-?sharp|-?flat)?\s*(m|maj|min|major|minor)?"),
    "language": re.compile(r"[a-z]{2,3}([-_][a-z]{2,4})?|unknown"),
}
"""What the values of keys look like that otherwise take any text; in lower case."""
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
    timed_lyrics: list[TimedLine] = field(default_factory=list)
    """The lines with the times at which they begin, where they are known."""
    repeat: int = 1
    """How often the song comes in an epoch."""
    weight: float = 1.0
    """What its loss is multiplied by."""
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
    failed: dict[str, str] = field(default_factory=dict)
    """Songs and entries of dataset.json that cannot be used, and why."""
    missing: list[str] = field(default_factory=list)
    """Entries of dataset.json whose audio file is not there."""
    notes: list[str] = field(default_factory=list)
    """Words and settings that were found and have no effect."""


def read_songs(
    audio_dir: Path,
    *,
    metadata_file: Path | None = None,
    custom_tag: str = "",
    tag_position: str | None = None,
    genre_ratio: int | None = None,
    language: str = "unknown",
) -> SongList:
    """Find the songs of a folder and read their words.

    Args:
        audio_dir: folder of songs, searched with its subfolders.
        metadata_file: a dataset.json; None takes the one in ``audio_dir`` if there is one.
        custom_tag: trigger word of every song; empty leaves it to each entry of dataset.json, then to its metadata.
        tag_position: where the tag goes; None leaves it to dataset.json, then to "prepend".
        genre_ratio: per cent of songs that train on their genre line; None leaves it to dataset.json, then to 0.
        language: of songs that do not name one.

    Raises:
        UserError: if there are no songs, or a dataset.json cannot be read.
    """
    songs = [Song(path=path, name=path.relative_to(audio_dir).as_posix()) for path in find_audio(audio_dir)]
    if metadata_file is None:
        metadata_file = _find_dataset_json(audio_dir, songs)
    elif not metadata_file.is_file():
        raise UserError(f"metadata_file={metadata_file} is not a file: {describe(metadata_file)}")
    listing = SongList(songs=songs, tag_position=tag_position or "prepend", genre_ratio=genre_ratio or 0)
    entries: dict[str, dict[str, Any]] = {}
    if metadata_file is not None:
        metadata, samples = _read_dataset_json(metadata_file)
        values = _read_metadata(metadata, metadata_file)
        if tag_position is None:
            listing.tag_position = values.get("tag_position", "prepend")
        if genre_ratio is None:
            listing.genre_ratio = values.get("genre_ratio", 0)
        for song in songs:
            song.custom_tag = values.get("custom_tag", "")
        entries = _match_entries(samples, listing, audio_dir, metadata_file)
    for song in songs:
        problems: list[str] = []
        _merge(song, entries.get(song.name, {}), "dataset.json", f"{metadata_file} entry of {song.name}", problems)
        for words, sidecar in _read_sidecars(song, metadata_file, listing.notes, problems):
            _merge(song, words, "sidecar", str(sidecar), problems)
        _complete(song, custom_tag, language, problems)
        if problems:
            listing.failed[song.name] = printable("; ".join(problems))
    _choose_prompts(listing)
    listing.songs = [song for song in songs if song.name not in listing.failed]
    return listing


def caption_from_name(path: Path) -> str:
    """Make a caption of a file's name: underscores become spaces and a track number goes.

    >>> caption_from_name(Path("01 - My_song.wav"))
    'My song'
    """
    words = " ".join(_TRACK_NUMBER.sub("", path.stem).replace("_", " ").split())
    return words or path.stem


def printable(text: str) -> str:
    """Escape text that would end a line or move the cursor, as names of files may."""
    return text if text.isprintable() else ascii(text)[1:-1]


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
    ):
        if names:
            listing.notes.append(f"{note}: {_names(names)}")
    if listing.tag_position != "prepend" and not any(song.custom_tag for song in listing.songs):
        listing.notes.append(f"tag_position={listing.tag_position} has no effect, because no song has a custom_tag")


def _names(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# dataset.json


def _find_dataset_json(audio_dir: Path, songs: list[Song]) -> Path | None:
    """Find the dataset.json of a folder, unless it is the words of a song named ``dataset``."""
    path = audio_dir / "dataset.json"
    if not path.is_file():
        return None
    if any(song.path.with_suffix(".json") == path for song in songs):
        content = _read_json(path)
        if isinstance(content, dict) and "samples" not in content:
            return None
    return path


def _read_dataset_json(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Read the metadata of all songs and the entries."""
    content = _read_json(path)
    if isinstance(content, list):
        content = {"samples": content}
    samples = content.get("samples") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else None
    if not isinstance(samples, list) or not isinstance(metadata, dict):
        keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        wanted = '{"metadata": {...}, "samples": [...]}'
        raise UserError(f"{path} must be a list of songs or {wanted}, it has {printable(keys):.200}")
    return metadata, samples


def _read_metadata(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check what dataset.json says about all songs."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, convert in _FILE_KEYS.items():
        if metadata.get(key) not in (None, ""):
            _convert(key, metadata[key], convert, values, f"{path} metadata", problems)
    if problems:
        raise UserError("; ".join(problems))
    return values


def _match_entries(samples: list[Any], listing: SongList, audio_dir: Path, path: Path) -> dict[str, dict[str, Any]]:
    """Give each song the entry that is about it; what cannot be given goes to ``failed`` and ``missing``."""
    songs = {os.path.realpath(song.path): song for song in listing.songs}
    matched: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(samples):
        try:
            song = _song_of(entry, songs, audio_dir, path.parent)
            if song.name in matched:
                raise ValueError(f"{song.name} is named twice; the first entry is used")
            matched[song.name] = entry
        except LookupError as error:
            listing.missing.append(str(error.args[0]))
        except ValueError as error:
            listing.failed[f"{path} entry {index}"] = str(error)
    return matched


def _song_of(entry: Any, songs: dict[str, Song], audio_dir: Path, beside: Path) -> Song:
    """Find the song that an entry is about, by its audio_path and then by its file name.

    Paths written on another machine do not exist here, so the last part of one is enough if only one song has it.

    Raises:
        LookupError: with the name of a file that is not there.
        ValueError: saying why the entry cannot be used.
    """
    if not isinstance(entry, dict):
        raise ValueError(f'it must be an object such as {{"filename": ...}}, it is {entry!r:.60}')
    values = (entry.get(key) for key in ("audio_path", "filename"))
    names = [value.replace("\\", "/") for value in values if isinstance(value, str) and value]
    if not names:
        raise ValueError("neither audio_path nor filename names a file")
    if any(_CONTROL.search(name) for name in names):
        raise ValueError("its file name holds control characters")
    candidates = [os.path.realpath(folder / name) for name in names for folder in (beside, audio_dir)]
    for candidate in candidates:
        if candidate in songs:
            return songs[candidate]
    if any(os.path.isfile(file) and not Path(file).is_relative_to(audio_dir.resolve()) for file in candidates):
        raise ValueError(f"{names[0]} is outside audio_dir={audio_dir}; move it there")
    same_name = [song for song in songs.values() if song.path.name == names[-1].rpartition("/")[2]]
    if len(same_name) > 1:
        raise ValueError(f"{names[0]} could be any of {_names([song.name for song in same_name])}")
    if not same_name:
        raise LookupError(names[0][:200])
    return same_name[0]


# sidecars


def _read_sidecars(
    song: Song, metadata_file: Path | None, notes: list[str], problems: list[str]
) -> list[tuple[dict[str, Any], Path]]:
    """Read the files beside a song, the one that wins last."""
    found: list[tuple[dict[str, Any], Path]] = []

    def read(suffix: str, parse: Callable[[Path], dict[str, Any]]) -> None:
        path = song.path.with_name(song.path.stem + suffix)
        if os.path.isfile(path) and path != metadata_file:  # unlike Path.is_file, it takes a name of any length
            try:
                found.append((parse(path), path))
            except UserError as error:
                problems.append(str(error))

    def parse_txt(path: Path) -> dict[str, Any]:
        values, unused = _parse_txt(_read_text(path))
        if unused:
            notes.append(f"not used from {path}: {_names(unused)}")
        return values

    read(".txt", parse_txt)
    read(".json", _read_object)
    read(".caption.txt", lambda path: {"caption": _read_text(path)})
    read(".lyrics.txt", lambda path: {"lyrics": _read_text(path)})
    return found


def _parse_txt(text: str) -> tuple[dict[str, Any], list[str]]:
    """Read Side-Step's ``key: value`` lines, or lyrics alone.

    The lines at the top that look like ``word: ...`` decide: if one of them has a key of a song and a value that such
    a key can have, the file is of keys. Lyrics may begin with "Key: to my heart", which is no key of music.

    Caption and lyrics may go on over many lines, up to a key that was not seen yet. Lyrics come last, so only a key
    with a value that it can have ends them.

    Returns:
        The values by key, and the lines that belong to none.
    """
    lines = text.strip().splitlines()
    top = itertools.takewhile(lambda line: not line.strip() or _KEY_LINE.match(line), lines)
    if not any(_is_sure_key(line) for line in top):
        return {"lyrics": text}, []
    values: dict[str, Any] = {}
    unused: list[str] = []
    key = ""
    for line in lines:
        name, value = _split_key(line)
        if name in _SONG_KEYS and name not in values and (key != "lyrics" or _is_sure_key(line)):
            key = name
            values[key] = value
        elif key in ("caption", "lyrics"):
            values[key] += f"\n{line}"
        elif line.strip():
            unused.append(line.strip()[:60])
    return values, unused


def _split_key(line: str) -> tuple[str, str]:
    match = _KEY_LINE.match(line)
    if match is None:
        return "", ""
    key = match[1].lower()
    return _ALIASES.get(key, key), match[2].strip()


def _is_sure_key(line: str) -> bool:
    """Say whether a line is a key of a song with a value that such a key can have."""
    key, value = _split_key(line)
    if key in _FORMS:
        return _FORMS[key].fullmatch(value.lower()) is not None
    try:
        return key in _SONG_KEYS and _SONG_KEYS[key](value) is not None
    except ValueError:
        return False


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} must be an object such as {{"caption": ...}}, it is a {type(content).__name__}')
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
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
        words = re.sub(r"\s*bpm$", "", str(value).strip(), flags=re.IGNORECASE)
        number = math.nan if isinstance(value, bool) else float(words)
    except ValueError:
        raise ValueError(message) from None
    if not 0.5 <= number < 10_000:
        raise ValueError(message)
    return round(number)


def _timesignature(value: Any) -> str:
    """Keep the numerator, which is all that ACE-Step's prompt has room for."""
    match = re.fullmatch(r"([1-9]\d?)(\.0+)?(\s*/\s*[1-9]\d?)?", str(value).strip(), re.ASCII)
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
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise ValueError("a whole number of at least 1")
    return int(text)


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
