"""The words of a folder of songs in one form, songs.jsonl: written, listed, edited."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestep.captioner import ModelConfig
from sidestep.config.data import SongsConfig
from sidestep.data.audio import probe_audio
from sidestep.data.estimates import ask, estimate
from sidestep.data.lyrics import TimedLine
from sidestep.data.names import is_named
from sidestep.data.songs import SongList, caption_from_name, read_songs
from sidestep.data.tables import OF_ALL_SONGS, SONGS
from sidestep.data.tags import can_read_tags, read_tags
from sidestep.data.words import Song, merge
from sidestep.errors import UserError, printable
from sidestep.files import write_text

KEYS = (
    "caption", "genre", "lyrics", "is_instrumental", "bpm", "keyscale", "timesignature", "language", "custom_tag",
    "prompt_override", "repeat", "weight", "estimated",
)  # fmt: skip
"""What a line of songs.jsonl may hold besides the file, in this order; what has its default is left out."""


def list_songs(config: SongsConfig) -> SongList:
    """Print the songs of a folder, what is wrong with them, and what the settings would change.

    Returns:
        The songs, as they are with the changes.

    Raises:
        UserError: if there are no songs, or changes are to be written while words cannot be used.
    """
    audio_dir = Path(config.audio_dir)
    table = None if config.metadata_file is None else Path(config.metadata_file)
    listing = read_songs(audio_dir, metadata_file=table, file_tags=config.file_tags)
    for song in listing.songs:
        try:
            probe_audio(song.path)
        except UserError as error:
            listing.undecodable[song.name] = str(error)
    before = {song.name: dataclasses.replace(song) for song in listing.songs}
    chosen = [song for song in listing.songs if is_named(song.name, config.only)]
    for song in chosen:
        _edit(song, config)
    if config.estimate:
        listing.notes += estimate(chosen, Path(config.cache_dir))
    if isinstance(config.captioner, ModelConfig):
        listing.notes += ask(chosen, config.captioner, Path(config.cache_dir), listing.unanswered)
    for song in listing.songs:
        _print_song(song, before[song.name])
    _print_faults(listing)
    changed = sum(song != before[song.name] for song in listing.songs)
    target = audio_dir / SONGS
    if not config.write:
        if changed:
            print(f"{changed} songs would change; nothing is written without write=true")
        return listing
    if listing.failed:
        raise UserError(
            f"{target} is not written while {len(listing.failed)} songs or entries cannot be used; mend them first"
        )
    if target.exists():
        shutil.copyfile(target, _free_name(target.with_suffix(".jsonl.bak")))
    write_songs(target, listing)
    print(f"wrote {target}: {len(listing.songs)} songs, {changed} changed; preprocessing reads it in place of the rest")
    return listing


def write_songs(path: Path, listing: SongList) -> None:
    """Write songs.jsonl, complete or not at all.

    What holds for all songs is written also where it is the default, since a dataset.json there may say otherwise.
    """
    of_all = {key: getattr(listing, key) for key in OF_ALL_SONGS}
    lines = [of_all, *(as_line(song) for song in listing.songs)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def as_line(song: Song) -> dict[str, Any]:
    """Give the words of a song by key, as a line of songs.jsonl; lyrics with times are LRC."""
    values: dict[str, Any] = {"audio": song.name}
    default = Song(path=song.path, name=song.name, language="unknown")
    for key in KEYS:
        value = write_lrc(song.timed_lyrics) if key == "lyrics" and song.timed_lyrics else getattr(song, key)
        if key == "is_instrumental":  # where no source has lyrics, they may only be missing
            value = song.says_instrumental
        if value != getattr(default, key):
            values[key] = value
    if song.caption == caption_from_name(song.path):  # nobody wrote it, and whoever reads the line makes it again
        values.pop("caption", None)
    return values


def _free_name(path: Path) -> Path:
    """The path, or the first of path2, path3, ... that nothing has yet."""
    names = (path.with_name(f"{path.name}{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def write_lrc(lines: Sequence[TimedLine]) -> str:
    """Write lines with their times as LRC; the inverse of :func:`lyrics.parse_lrc`."""
    return "\n".join(f"[{int(time // 60):02d}:{time % 60:06.3f}]{words}" for time, words in lines)


def _edit(song: Song, config: SongsConfig) -> None:
    tag = config.remove_tag
    if tag and song.custom_tag == tag:
        song.custom_tag = ""
    if tag:
        song.caption = ", ".join(part for part in song.caption.split(", ") if part != tag) or song.caption
    if config.add_tag:
        song.custom_tag = config.add_tag
    if config.fill:
        if not can_read_tags():
            raise UserError("fill=true reads tags inside the files; that takes pip install 'sidestep[tags]'")
        filled = dataclasses.replace(song)
        merge(filled, read_tags(song.path), "file tags", song.name, {})
        for key in ("genre", "bpm", "keyscale", "lyrics"):
            if getattr(song, key) in ("", None) and not (key == "lyrics" and song.says_instrumental):
                setattr(song, key, getattr(filled, key))
        if not song.timed_lyrics and song.lyrics == filled.lyrics:
            song.timed_lyrics = filled.timed_lyrics


def _print_song(song: Song, before: Song) -> None:
    about = [f"{song.caption} ({song.source})", song.genre, f"{song.bpm} bpm" if song.bpm else "", song.keyscale]
    if song.lyrics:
        about.append(f"{len(song.lyrics.splitlines())} lines{' with times' if song.timed_lyrics else ''}")
        about.append(song.language if song.language != "unknown" else "")
    about.append(f"tag {song.custom_tag}" if song.custom_tag else "")
    about.append(f"repeat {song.repeat}" if song.repeat != 1 else "")
    about.append(f"weight {song.weight:g}" if song.weight != 1 else "")
    about.append(f"estimated: {', '.join(song.estimated)}" if song.estimated else "")
    print(printable(f"{song.name}: {' | '.join(part for part in about if part)}"))
    old, new = as_line(before), as_line(song)
    for key in KEYS:
        if old.get(key) != new.get(key):
            was, becomes = (json.dumps(line.get(key), ensure_ascii=False) for line in (old, new))
            print(f"  {key}: {was} -> {becomes}")


def _print_faults(listing: SongList) -> None:
    for name, reason in listing.failed.items():
        print(printable(f"cannot be used: {name}: {reason}"))
    for name, reason in listing.unanswered.items():
        print(printable(f"no answer about {name}: {reason}"))
    for reason in listing.undecodable.values():
        print(printable(reason))
    for where, name in listing.missing.items():
        print(printable(f"{where}: there is no audio file {name}"))
    for note in listing.notes:
        print(printable(note))
    guessed = sum(song.source == "file name" for song in listing.songs)
    faults = len(listing.failed) + len(listing.undecodable) + len(listing.missing)
    print(f"{len(listing.songs)} songs, {guessed} captioned by their file name, {faults} faults")
