"""The words of each song: caption, lyrics, tempo and the rest, from whichever files give them.

Read in this order, each value of a later source taking the place of an earlier one:

    file name              "01 - My_song.wav" has the caption "My song" if nothing else gives one
    tags inside the file   title, genre, tempo, key and lyrics
    tables                 dataset.json, key_bpm.csv, metadata.csv and metadata.jsonl: see ``tables``; a line belongs to
                           the song its file name names
    song.txt               Side-Step's "caption: ..." lines with the lyrics last, or the lyrics alone, as in
                           ACE-Step's older datasets; ``_parse_txt`` tells them apart
    song.json              an object with the keys of a dataset.json entry
    song.lrc               lyrics with times
    song.caption.txt       the caption alone
    song.lyrics.txt        the lyrics alone
    songs.jsonl            what ``python -m sidestep.songs`` wrote; of a song in it, nothing else is read

Files beside a song win over tables because they are what people edit by hand. An empty value counts as
not given. A song with a mistake in the words that count is left out, with all of its mistakes by file and key. Tags
inside files are full of what programs left there, so those that cannot be used are only noted.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.acestep.prompts import choose_genre, is_instrumental_mark
from sidestep.data.audio import find_audio
from sidestep.data.names import composed, letters
from sidestep.data.tables import COLUMNS, FOUND, Entry, Table, parse_json, read_table
from sidestep.data.tags import can_read_tags, read_tags
from sidestep.data.words import ALIASES, CONTROL, SONG_KEYS, Song, merge
from sidestep.errors import UserError, printable
from sidestep.files import describe

_KEY_LINE = re.compile(r"\s*(\w+)\s*:(.*)")
_FORMS = {
    "keyscale": re.compile(r"[a-g]\s*(#|b|\u266f|\u266d|-?sharp|-?flat)?\s*(m|maj|min|major|minor)?"),
    "language": re.compile(r"[a-z]{2,3}([-_][a-z]{2,4})?|unknown"),
}
"""What the values of keys look like that otherwise take any text; in lower case."""
_OF_FILES = {*COLUMNS["file"], *COLUMNS["title"], *COLUMNS["artist"], "duration"}
"""Keys of an entry that may stand beside a song, where they are not needed."""
_TRACK_NUMBER = re.compile(r"^(\d{2,3}\s*[-._]\s*|0\d\s+)")


@dataclass(kw_only=True)
class SongList:
    """The songs of a folder, and what was decided and noticed while reading them."""

    songs: list[Song]
    tag_position: str
    genre_ratio: int
    failed: dict[str, str] = field(default_factory=dict)
    """Songs and entries of tables that cannot be used, and why."""
    missing: dict[str, str] = field(default_factory=dict)
    """Entries of tables whose audio file is not there, by file and line."""
    unanswered: dict[str, str] = field(default_factory=dict)
    """Songs about which a captioner gave no answer, and why."""
    undecodable: dict[str, str] = field(default_factory=dict)
    """Songs whose words are in order and whose audio cannot be read, and why; filled where somebody looked."""
    lost: dict[str, str] = field(default_factory=dict)
    """Those of ``failed`` that are lines of songs.jsonl: some song would be told other words in their place."""
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
    file_tags: bool = True,
) -> SongList:
    """Find the songs of a folder and read their words.

    Args:
        audio_dir: folder of songs, searched with its subfolders.
        metadata_file: a table; None takes those in ``audio_dir`` that have a name of :data:`tables.FOUND`.
        custom_tag: trigger word of every song; empty leaves it to each entry of a table, then to dataset.json.
        tag_position: where the tag goes; None leaves it to dataset.json, then to "prepend".
        genre_ratio: per cent of songs that train on their genre line; None leaves it to dataset.json, then to 0.
        language: of songs that do not name one.
        file_tags: whether to read the tags inside the files.

    Raises:
        UserError: if there are no songs, or a table cannot be read.
    """
    songs = [Song(path=path, name=path.relative_to(audio_dir).as_posix()) for path in find_audio(audio_dir)]
    if metadata_file is not None and not metadata_file.is_file():
        raise UserError(f"metadata_file={metadata_file} is not a file: {describe(metadata_file)}")
    paths = _find_tables(audio_dir, songs) if metadata_file is None else [metadata_file]
    tables = [table for path in paths if (table := read_table(path)).is_about_songs]
    passed_over = [] if metadata_file is None else _find_tables(audio_dir, songs)
    said = {key: value for table in tables for key, value in table.defaults.items()}
    listing = SongList(
        songs=songs,
        tag_position=tag_position or said.get("tag_position", "prepend"),
        genre_ratio=said.get("genre_ratio", 0) if genre_ratio is None else genre_ratio,
    )
    for table in tables:
        listing.failed |= table.failed
        if table.unused:
            listing.notes.append(f"not used from {table.path}: {_names(table.unused)}")
    finder = _SongFinder(songs, audio_dir)
    matched = [_match_entries(table, listing, finder) for table in tables]
    if others := [str(path) for path in passed_over if path.resolve() not in {path.resolve() for path in paths}]:
        listing.notes.append(f"metadata_file={metadata_file} is read in the place of {_names(others)}")
    final_lines = tuple(f"{table.path} line " for table in tables if table.is_final)
    listing.lost = {where: reason for where, reason in listing.failed.items() if where.startswith(final_lines)}
    if file_tags and not can_read_tags():
        file_tags = False
        listing.notes.append("tags inside the files are not read; that takes pip install 'sidestep[tags]'")
    replaced: list[str] = []
    in_tags: list[str] = []
    no_keys: list[str] = []
    unused: set[str] = set()
    beside = functools.cache(_by_lower_name)
    for song in songs:
        problems: dict[str, list[str]] = {}
        entries = [
            (table, found[song.name]) for table, found in zip(tables, matched, strict=True) if song.name in found
        ]
        final = [(table, entry) for table, entry in entries if table.is_final]
        if not final:
            song.custom_tag = said.get("custom_tag", "")
        if file_tags and not final:
            useless: dict[str, list[str]] = {}
            merge(song, read_tags(song.path), "file tags", song.name, useless)
            in_tags += [message for messages in useless.values() for message in messages]
        for table, entry in final or entries:
            replaced += merge(song, entry.values, table.path.name, f"{entry.where} of {song.name}", problems)
            if not table.is_final and isinstance(entry.values.get("keyscale"), str):
                no_keys += problems.pop("keyscale", [])  # programs write what they did not find there
        if not final:
            for words, sidecar, lines in _read_sidecars(song, beside, paths, listing.notes, unused, problems):
                replaced += merge(song, words, "sidecar", str(sidecar), problems, lines)
        _complete(song, custom_tag, language, problems)
        if problems:
            listing.failed[song.name] = printable("; ".join(itertools.chain(*problems.values())))
    for note, messages in (
        ("tags inside the files that cannot be used, and are not", in_tags),
        ("keys in tables that are none, and are not used", no_keys),
        ("cannot be used, but something nearer to the song says it right", replaced),
        ("keys of JSON files beside songs that are not used", sorted(unused)),
    ):
        if messages:
            listing.notes.append(f"{note}: {_names(messages, 5)}")
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


def _complete(song: Song, custom_tag: str, language: str, problems: dict[str, list[str]]) -> None:
    """Fill in what no source gave."""
    if CONTROL.search(song.name):
        problems["name"] = [f"{song.name!a}: the file name holds control characters or is not UTF-8; rename it"]
    song.custom_tag = custom_tag or song.custom_tag
    song.caption = song.caption or caption_from_name(song.path)
    song.language = song.language or language
    if song.prompt_override == "genre" and not song.genre:
        problems["prompt"] = [f"{song.name}: prompt_override is genre, but the song has no genre"]


def _choose_prompts(listing: SongList) -> None:
    chosen = choose_genre(len(listing.songs), listing.genre_ratio)
    without_genre, unsung, no_codes = [], [], []
    for index, song in enumerate(listing.songs):
        song.prompt = song.prompt_override or ("genre" if index in chosen and song.genre else "caption")
        if index in chosen and not song.genre and not song.prompt_override:
            without_genre.append(song.name)
        is_marked = is_instrumental_mark(song.lyrics)
        if song.is_instrumental and song.lyrics and not is_marked:
            unsung.append(song.name)
        if not _FORMS["language"].fullmatch(song.language.lower()):
            no_codes.append(f"{song.language} of {song.name}")
        song.says_instrumental = song.is_instrumental or is_marked
        song.lyrics = "" if song.says_instrumental else song.lyrics
        song.is_instrumental = not song.lyrics
        song.timed_lyrics = song.timed_lyrics if song.lyrics else []
    for note, names in (
        ("chosen by the genre ratio but without a genre, so on their caption", without_genre),
        ("marked instrumental, so their lyrics are not used", unsung),
        ("ACE-Step knows languages by codes such as en, and these are none", no_codes),
    ):
        if names:
            listing.notes.append(f"{note}: {_names(names)}")
    if listing.tag_position != "prepend" and not any(song.custom_tag for song in listing.songs):
        listing.notes.append(f"tag_position={listing.tag_position} has no effect, because no song has a custom_tag")


def _names(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# tables


def _find_tables(audio_dir: Path, songs: Sequence[Song]) -> list[Path]:
    """Find the tables of a folder of songs and of those below it, down to the songs.

    A song named ``dataset`` may have its words in dataset.json.
    """
    own_folders = {song.path.parent for song in songs}
    folders = own_folders.union(*(folder.parents for folder in own_folders))
    folders = {folder for folder in folders if folder.is_relative_to(audio_dir)}
    below = [folder / name for folder in sorted(folders) for name in ("metadata.csv", "metadata.jsonl")]
    wanted = [audio_dir / name for name in FOUND]
    wanted[-1:-1] = [path for path in below if path not in wanted]
    own = {song.path.with_suffix(".json") for song in songs}
    tables = [path for path in wanted if os.path.lexists(path)]
    for path in tables:
        _refuse_no_file(path)
    return [path for path in tables if not (path in own and _is_sidecar(path))]


def _refuse_no_file(path: Path) -> None:
    """Refuse what has the name of a file of words and is none, such as a link to a disk that is not there."""
    if not path.is_file():
        what = "leads to no file" if path.is_symlink() else "is no file"
        raise UserError(f"{path} {what}, and words would be missing without it; mend it, or delete it")


def _is_sidecar(path: Path) -> bool:
    content = _read_json(path)
    return isinstance(content, dict) and "samples" not in content


def _match_entries(table: Table, listing: SongList, finder: _SongFinder) -> dict[str, Entry]:
    """Give each song the entry that is about it; what cannot be given goes to ``failed`` and ``missing``."""
    matched: dict[str, _Match] = {}

    def miss(where: str, file: str) -> None:
        if table.is_final:
            listing.failed[where] = f"there is no audio file {file}"
        else:
            listing.missing[where] = file

    for entry in table.entries:
        try:
            match = finder.find(entry, table.path.parent)
            before = matched.get(match.song.name)
            if before is not None and before.shared == match.shared:
                raise ValueError(f"{match.song.name} is named twice; the first entry is used")
            if before is not None:  # whose path has less in common with the song's is about another
                match, other = (match, before) if match.shared > before.shared else (before, match)
                miss(other.entry.where, other.file)
            matched[match.song.name] = match
            if table.is_final and entry.unused:
                raise ValueError(f"{_names(entry.unused)}: there is no such key; there are {', '.join(SONG_KEYS)}")
        except LookupError as error:
            miss(entry.where, str(error.args[0]))
        except ValueError as error:
            listing.failed[entry.where] = str(error)
    if moved := [f"{match.file} as {name}" for name, match in matched.items() if match.is_in_another_folder]:
        listing.notes.append(f"{table.path} has these in other folders, and their names alone fit: {_names(moved, 5)}")
    return {name: match.entry for name, match in matched.items()}


@dataclass
class _Match:
    """An entry of a table, and the song that it is about."""

    entry: Entry
    song: Song
    shared: float
    """How many parts their paths have in common, counted from the end; infinite where they are the same file."""
    file: str = ""
    """What the entry calls it."""

    @property
    def is_in_another_folder(self) -> bool:
        return self.shared == 1 and "/" in self.file and "/" in self.song.name


class _SongFinder:
    """Finds the song that an entry of a table is about, by its path, or by its title where it has no file name.

    Paths written on another machine do not exist here, so the song that shares most of the path's end is taken.
    """

    def __init__(self, songs: Sequence[Song], audio_dir: Path) -> None:
        self._audio_dir = audio_dir
        folder = composed(os.path.realpath(audio_dir))
        self._reversed = {song.name: f"{folder}/{composed(song.name)}".split("/")[::-1] for song in songs}
        self._by_path = {os.path.realpath(song.path): song for song in songs}
        self._by_file: dict[str, list[Song]] = {}
        self._by_title: dict[str, list[Song]] = {}
        for song in songs:
            self._by_file.setdefault(composed(song.path.name), []).append(song)
            self._by_title.setdefault(letters(caption_from_name(song.path)), []).append(song)

    def find(self, entry: Entry, beside: Path) -> _Match:
        """Find the song of an entry in a table that lies in the folder ``beside``.

        Raises:
            LookupError: with the name of a file that is not there.
            ValueError: saying why the entry cannot be used.
        """
        values = entry.values
        if not isinstance(values, dict):
            raise ValueError(f'it must be an object such as {{"filename": ...}}, it is {values!r:.60}')
        names = [_as_path(value) for value in values.get("file", ()) if isinstance(value, str) and value.strip()]
        if any(CONTROL.search(name) for name in names):
            raise ValueError("its file name holds control characters")
        if not names:
            return _Match(entry, self._by_its_title(values), 0)
        candidates = [os.path.realpath(folder / name) for name in names for folder in (beside, self._audio_dir)]
        for candidate in candidates:
            if candidate in self._by_path:
                return _Match(entry, self._by_path[candidate], math.inf, names[0])
        inside = self._audio_dir.resolve()
        if any(os.path.isfile(file) and not Path(file).is_relative_to(inside) for file in candidates):
            raise ValueError(f"{names[0]} is outside audio_dir={self._audio_dir}; move it there")
        same_name = self._by_file.get(composed(names[-1].rpartition("/")[2]), [])
        if not same_name:
            raise LookupError(names[0][:200])
        shared, nearest = max((self._nearest(same_name, name) for name in names), key=lambda found: found[0])
        if len(nearest) > 1:
            raise ValueError(f"{names[0]} could be any of {_names([song.name for song in nearest])}")
        in_folder = beside.relative_to(self._audio_dir) if beside.is_relative_to(self._audio_dir) else Path()
        return _Match(entry, nearest[0], shared, (in_folder / names[0]).as_posix())

    def _nearest(self, songs: list[Song], path: str) -> tuple[int, list[Song]]:
        """Give those songs whose paths share most of the end of another path, and how many parts of it."""
        parts = composed(path).split("/")[::-1]
        for shared, part in enumerate(parts):
            nearer = [song for song in songs if self._reversed[song.name][shared : shared + 1] == [part]]
            if not nearer:
                return shared, songs
            songs = nearer
        return len(parts), songs

    def _by_its_title(self, values: dict[str, Any]) -> Song:
        title, artist = str(values.get("title") or "").strip(), str(values.get("artist") or "").strip()
        if not title:
            raise ValueError("neither audio_path nor filename names a file")
        for name in (f"{artist} - {title}", f"{title} - {artist}", title):
            found = self._by_title.get(letters(name), [])
            if len(found) > 1:
                raise ValueError(f"{title} could be any of {_names([song.name for song in found])}")
            if found:
                return found[0]
        raise LookupError(f"{artist} - {title}"[:200] if artist else title[:200])


def _as_path(text: str) -> str:
    if text.startswith("file://"):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return text.strip().replace("\\", "/")


# sidecars


def _read_sidecars(
    song: Song,
    beside: Callable[[Path], dict[str, list[str]]],
    tables: Sequence[Path],
    notes: list[str],
    unused: set[str],
    problems: dict[str, list[str]],
) -> list[tuple[dict[str, Any], Path, dict[str, int]]]:
    """Read the files beside a song, the one that wins last: values, the file, and lines of the values if known.

    Args:
        song: whose files are read.
        beside: gives the files of a folder by their names in lower case.
        tables: files that are not of one song.
        notes: gets what of a text file is not used.
        unused: gets the keys of a JSON file that are not used.
        problems: gets what cannot be read.
    """
    found: list[tuple[dict[str, Any], Path, dict[str, int]]] = []

    def read(suffix: str, parse: Callable[[Path], dict[str, Any]]) -> None:
        folder, stem = song.path.parent, song.path.stem
        names = [name for name in beside(folder).get((stem + suffix).lower(), []) if name.startswith(stem)]
        path = folder / (names[0] if names else stem + suffix)
        if names and path not in tables:
            try:
                _refuse_no_file(path)
                found.append((parse(path), path, lines if suffix == ".txt" else {}))
            except UserError as error:
                problems.setdefault("files", []).append(str(error))

    lines: dict[str, int] = {}

    def parse_txt(path: Path) -> dict[str, Any]:
        text = _read_text(path)
        values, other = _parse_txt(text, lines)
        if other:
            notes.append(f"not used from {path}: {_names(other)}")
        if not lines and (keys := [line.strip()[:60] for line in text.splitlines() if _is_sure_key(line)]):
            notes.append(f"{path} does not begin with a key, so all of it is lyrics, even {_names(keys)}")
        return values

    read(".txt", parse_txt)

    def parse_json_file(path: Path) -> dict[str, Any]:
        values = _read_object(path)
        unused.update(key for key in values if ALIASES.get(key, key) not in SONG_KEYS and key not in _OF_FILES)
        return values

    read(".json", parse_json_file)
    read(".lrc", lambda path: {"lyrics": _read_text(path)})
    read(".caption.txt", lambda path: {"caption": _read_text(path)})
    read(".lyrics.txt", lambda path: {"lyrics": _read_text(path)})
    return found


def _by_lower_name(folder: Path) -> dict[str, list[str]]:
    """List a folder by names in lower case; of names that differ in case alone, those in lower case come first."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder), reverse=True):
        names.setdefault(name.lower(), []).append(name)
    return names


def _parse_txt(text: str, at: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Read Side-Step's ``key: value`` lines, or lyrics alone.

    The lines at the top that look like ``word: ...`` decide: if one of them has a key of a song and a value that such
    a key can have, the file is of keys. Lyrics may begin with "Key: to my heart", which is no key of music.

    Caption and lyrics may go on over many lines, up to a key that was not seen yet. Lyrics come last, so only a key
    with a value that it can have ends them.

    Args:
        text: of the file.
        at: gets the line of each value.

    Returns:
        The values by key, and the lines that belong to none.
    """
    lines = text.rstrip().splitlines()
    top = itertools.takewhile(lambda line: not line.strip() or _KEY_LINE.match(line), lines)
    if not any(_is_sure_key(line) for line in top):
        return {"lyrics": text}, []
    values: dict[str, Any] = {}
    unused: list[str] = []
    key = ""
    for number, line in enumerate(lines, start=1):
        name, value = _split_key(line)
        if name in SONG_KEYS and name not in values and (key != "lyrics" or _is_sure_key(line)):
            key = name
            values[key], at[key] = value, number
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
    return ALIASES.get(key, key), match[2].strip()


def _is_sure_key(line: str) -> bool:
    """Say whether a line is a key of a song with a value that such a key can have."""
    key, value = _split_key(line)
    if key in _FORMS:
        return _FORMS[key].fullmatch(value.lower()) is not None
    try:
        return key in SONG_KEYS and SONG_KEYS[key](value) is not None
    except ValueError:
        return False


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} must be an object such as {{"caption": ...}}, it is a {type(content).__name__}')
    return content


def _read_json(path: Path) -> Any:
    return parse_json(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
