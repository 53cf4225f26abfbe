"""Files that hold the words of many songs: dataset.json, CSV and JSONL, whoever wrote them.

dataset.json        of ACE-Step's or Side-Step's dataset builder: {"metadata": ..., "samples": [...]} or the list
metadata.csv/jsonl  of Hugging Face's audiofolder, in any folder of songs; file_name names the song
*.csv, *.tsv, *.txt of DJ programs (rekordbox, Serato, Mixed In Key, Mixxx, ...), with a head line
*.nml               playlists of Traktor
songs.jsonl         sidestep's own, written by ``python -m sidestep.songs``; a line without a song is about all of them
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.data.traktor import read_tracks
from sidestep.data.words import FILE_KEYS, convert
from sidestep.errors import UserError, printable

SONGS = "songs.jsonl"
FOUND = ("dataset.json", "key_bpm.csv", "metadata.csv", "metadata.jsonl", SONGS)
"""Read without being named, in this order; in folders of songs below audio_dir, only those of audiofolder are."""

COLUMNS = {
    "file": ("audio", "audio_path", "file_name", "filename", "file name", "file", "file path",
             "filepath", "path", "location", "file location", "track location"),
    "title": ("track title", "title", "name", "track", "track name", "song"),
    "artist": ("artist", "artists", "track artist"),
    "caption": ("caption", "prompt", "description", "text"),
    "genre": ("genre", "genres", "style"),
    "lyrics": ("lyrics", "lyric"),
    "sections": ("sections",),
    "bpm": ("bpm", "tempo"),
    "keyscale": ("key", "keyscale", "key result", "initial key", "initialkey", "tonality", "camelot", "camelot key",
                 "key (camelot)", "open key"),
    "timesignature": ("timesignature", "time signature", "time_signature", "signature", "meter"),
    "language": ("language", "lang"),
    "is_instrumental": ("is_instrumental", "instrumental"),
    "custom_tag": ("custom_tag",),
    "prompt_override": ("prompt_override",),
    "repeat": ("repeat", "repeats"),
    "weight": ("weight",),
    "estimated": ("estimated",),
}  # fmt: skip
"""Key of an entry -> what programs call it, in any case; of several, the first that has a value counts."""

OF_ALL_SONGS = ("tag_position", "genre_ratio")
"""What songs.jsonl says once for all its songs, in a line of its own; each has a custom_tag of its own."""

_BY_NAME = {name: key for key, names in COLUMNS.items() for name in names}


@dataclass
class Entry:
    """What one line says about one song."""

    values: Any
    """By key; of JSON, anything."""
    where: str
    """File and line."""
    unused: list[str] = field(default_factory=list)
    """What of it says nothing about a song."""


@dataclass
class Table:
    """The entries of one file."""

    path: Path
    entries: list[Entry]
    defaults: dict[str, Any] = field(default_factory=dict)
    """What it says about all songs: custom_tag, tag_position, genre_ratio."""
    failed: dict[str, str] = field(default_factory=dict)
    """Lines that cannot be read, and why."""
    unused: list[str] = field(default_factory=list)
    """Columns and keys that say nothing about a song."""

    @property
    def is_about_songs(self) -> bool:
        """Whether it is not the songs.jsonl of a dataset folder, which preprocessing wrote."""
        return not any(isinstance(entry.values, dict) and "latents" in entry.values for entry in self.entries[:1])

    @property
    def is_final(self) -> bool:
        """Whether nothing else is read about a song that is in it."""
        return self.path.name == SONGS


def read_table(path: Path) -> Table:
    """Read a file with the words of many songs.

    Raises:
        UserError: if the file as a whole cannot be read; a line that cannot goes to ``failed``.
    """
    text = _decode(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path, text)
    if suffix == ".json":
        return _read_json(path, text)
    if suffix == ".nml":
        return _read_nml(path, text)
    return _read_csv(path, text)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Raises:
        UserError: if it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # rekordbox exports UTF-16
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}; save it as UTF-8") from error


def _read_json(path: Path, text: str) -> Table:
    content = parse_json(text, str(path))
    if isinstance(content, list):
        content = {"samples": content}
    samples = content.get("samples") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else None
    if not isinstance(samples, list) or not isinstance(metadata, dict):
        keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        wanted = '{"metadata": {...}, "samples": [...]}'
        raise UserError(f"{path} must be a list of songs or {wanted}, it has {printable(keys):.200}")
    problems: list[str] = []
    defaults = _convert_defaults(metadata, f"{path} metadata", problems)
    if problems:
        raise UserError("; ".join(problems))
    entries = [_entry(entry, f"{path} entry {i}") for i, entry in enumerate(samples, start=1)]
    return Table(path, entries, defaults, unused=_unused(entries))


def _convert_defaults(values: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Take what is said about all songs."""
    defaults: dict[str, Any] = {}
    for key, conversion in FILE_KEYS.items():
        if values.get(key) not in (None, ""):
            convert(key, values[key], conversion, defaults, where, problems)
    return defaults


def _read_jsonl(path: Path, text: str) -> Table:
    table = Table(path, [])
    for number, line in enumerate(text.split("\n"), start=1):  # other ends of lines may stand in values
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            values = parse_json(line, where)
        except UserError as error:
            table.failed[where] = str(error).removeprefix(f"{where} ")
            continue
        if table.is_final and isinstance(values, dict) and values and values.keys() <= {*OF_ALL_SONGS}:
            problems: list[str] = []
            table.defaults |= _convert_defaults(values, where, problems)
            if problems:
                table.failed[where] = "; ".join(problems).removeprefix(f"{where}: ")
        else:
            table.entries.append(_entry(values, where))
    table.unused = [] if table.is_final else _unused(table.entries)
    return table


def _read_nml(path: Path, text: str) -> Table:
    try:
        tracks = read_tracks(text)
    except ValueError as error:
        raise UserError(f"{path} is not a playlist of Traktor: {error}") from error
    return Table(path, [_entry(track, f"{path} track {i}") for i, track in enumerate(tracks, start=1)])


def _read_csv(path: Path, text: str) -> Table:
    head, _, rest = text.partition("\n")
    above = 0
    if chosen := re.fullmatch(r'"?sep=(.)"?\s*', head, re.IGNORECASE):  # for Excel, which hides this line
        text, above = rest, 1
        head = text.partition("\n")[0]
    delimiter = chosen[1] if chosen else max(",;\t", key=head.count)
    rows = _split_rows(path, text, delimiter, above)
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    table = Table(path, [], unused=[name for name in names if name and name not in _BY_NAME])
    if not {_BY_NAME.get(name) for name in names} & {"file", "title"}:
        raise UserError(
            f"{path} must begin with a line of column names, one of which says which song: file_name, file, path, "
            f"location or title; it begins with {head.strip()[:80]!r}"
        )
    for line, row in rows[1:]:
        where = f"{path} line {line}"
        if len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
            count = f"it has {len(row)} values for {len(names)} columns"
            table.failed[where] = f'{count}; a value with {delimiter!r} in it is written in quotes: "a, b"'
        elif any(cell.strip() for cell in row):
            cells = zip(reversed(names[: len(row)]), reversed(row[: len(names)]), strict=True)  # the first one counts
            table.entries.append(_entry({name: cell for name, cell in cells if cell.strip()}, where))
    return table


def _split_rows(path: Path, text: str, delimiter: str, above: int) -> list[tuple[int, list[str]]]:
    """Split a table into rows, each with the number of its line.

    DJ programs separate by tabs and write quotes as they are: a title may begin with one that nothing ends. Where
    quotes cannot stand around values, or would keep a tab in one, they are part of the text.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if delimiter == "\t":
        with contextlib.suppress(csv.Error):
            rows = _numbered(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True), above)
            if not any("\t" in cell for _, row in rows for cell in row):
                return rows
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        _refuse_open_quote(path, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), above)
    try:
        return _numbered(reader, above)
    except csv.Error as error:
        raise UserError(f"{path} line {above + reader.line_num} cannot be read as CSV: {error}") from error


def _refuse_open_quote(path: Path, reader: Any, above: int) -> None:
    """Refuse a table with a quote that nothing ends: all songs below it would be part of one value."""
    line = above + 1
    try:
        for _ in reader:
            line = above + reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise UserError(f'{path} line {line} has a " that nothing ends; write another one behind it') from error


def _numbered(reader: Any, above: int) -> list[tuple[int, list[str]]]:
    rows = []
    line = above + 1
    for row in reader:
        rows.append((line, row))
        line = above + reader.line_num + 1
    return rows


def _unused(entries: list[Entry]) -> list[str]:
    """Name each key once that says nothing about a song."""
    return list(dict.fromkeys(name for entry in entries for name in entry.unused))


def _entry(values: Any, where: str) -> Entry:
    """Give the values of an entry sidestep's own names."""
    if not isinstance(values, dict):
        return Entry(values, where)
    named: dict[str, Any] = {"latents": ""} if "latents" in values else {}
    lower = {str(name).strip().lower(): value for name, value in values.items()}
    for key, names in COLUMNS.items():
        given = [lower[name] for name in names if lower.get(name) not in (None, "")]
        if given:
            named[key] = given if key == "file" else given[0]
    return Entry(named, where, [name for name in lower if name not in _BY_NAME and name != "latents"])
