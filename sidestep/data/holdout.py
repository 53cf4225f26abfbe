"""Which songs are held out of training: decided by what is in them, so that adding songs moves none of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from sidestep.config.evaluation import ValidationConfig
from sidestep.data.manifest import SongRecord
from sidestep.data.names import is_named
from sidestep.errors import UserError
from sidestep.seeds import derive_seed


def content_id(song: SongRecord) -> str:
    """What tells a song from others by its sound: its hash, or where that is not known the name of its latents."""
    return song.sound or PurePosixPath(song.latents).stem


def place_of(song: SongRecord) -> float:
    """A number in [0, 1) that depends on the sound only; songs below ``validation.fraction`` are held out."""
    return derive_seed(0, f"held out {content_id(song)}") / 2**63


def lowest_places(songs: Sequence[SongRecord], numbers: Sequence[int], limit: int | None) -> list[int]:
    """Choose no more than ``limit`` of some songs, by their sound: adding songs changes as few of them as can be.

    Returns:
        Their numbers, in the order of ``songs``.
    """
    return sorted(sorted(numbers, key=lambda number: place_of(songs[number]))[:limit])


def hold_out(
    songs: Sequence[SongRecord], config: ValidationConfig, others: Sequence[SongRecord] = ()
) -> tuple[list[int], list[int]]:
    """Split songs into those to train on and those held out.

    The same sound is never on both sides. With ``fraction``, a song stays on its side whatever is added, but for the
    one song that is held out where none would be.

    Args:
        songs: to split.
        config: how.
        others: songs that are trained on in any case.

    Returns:
        Their numbers: to train on, and held out; in the order of ``songs``.

    Raises:
        UserError: if a name matches no song, nothing is left to train on, or one of ``others`` is held out.
    """
    if config.songs:
        for name in config.songs:
            if not any(is_named(song.audio, name) for song in songs):
                raise UserError(
                    f"validation.songs has {name!r}, which is no song of the dataset; its first is {songs[0].audio!r}"
                )
        named = {content_id(song) for song in songs if any(is_named(song.audio, name) for name in config.songs)}
    elif config.fraction:
        first = min(songs, key=place_of)
        named = {content_id(song) for song in songs if place_of(song) < config.fraction} or {content_id(first)}
    else:
        named = set()
    if both := [song.audio for song in others if content_id(song) in named]:
        raise UserError(
            f"validation holds out {both[0]}, which prior_dataset_dir also has, so that it would be trained on; "
            f"take it out of one of the two datasets"
        )
    held_out = [number for number, song in enumerate(songs) if content_id(song) in named]
    if len(held_out) == len(songs):
        raise UserError(
            f"validation would hold out all {len(songs)} songs of the dataset and leave none to train on; "
            f"use a smaller validation.fraction than {config.fraction:g}, or name fewer in validation.songs"
        )
    return [number for number in range(len(songs)) if content_id(songs[number]) not in named], held_out
