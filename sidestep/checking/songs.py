"""What is odd about the songs of a dataset, before a run spends hours on them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from sidestep.data.audio import SILENT_PEAK
from sidestep.data.dataset import SongDataset, StoredSongs
from sidestep.data.holdout import content_id
from sidestep.data.manifest import AGAIN, SongRecord, parse_cuts

SHOWN = 3
_TRACK = re.compile(r"^\d+[\s._-]+")
_VERSION = re.compile(
    r"[\(\[].*?[\)\]]|\bv\d+\b|\b(?:live|demo|instrumental|acapella|acoustic|edit|version|take|part|pt|"
    r"mix|remix|rmx|master|remaster|remastered) *\d*\b"
)
_NUMBER_ONLY = re.compile(r"(?:track *)?\d+")


def check_songs(dataset: SongDataset, held_out: Sequence[int]) -> list[str]:
    """Describe every oddity in one line each; nothing if there is none.

    Args:
        dataset: all songs, those of a prior dataset too.
        held_out: numbers of those that are only evaluated.
    """
    notes, songs = [], dataset.songs
    same = defaultdict(list)
    for song in songs:
        same[content_id(song)].append(song.audio)
    if doubles := [names for names in same.values() if len(names) > 1]:
        notes.append(f"the same sound under several names: {_some(' = '.join(names) for names in doubles)}")
    for source in dataset.sources:
        if isinstance(source, StoredSongs):  # others' tensor files do not say
            notes += _from_headers(source)
    if blank := [song.audio for song in songs if not song.caption.strip() or song.source == "file name"]:
        notes.append(f"captioned by the file name, or not at all: {_some(blank)}")
    notes += _families(songs, set(held_out))
    return notes


def _from_headers(source: StoredSongs) -> list[str]:
    """What preprocessing wrote into the headers of the files: how loud a song is, and what was cut from its words."""
    silent, clipped, cut, damaged = [], [], [], []
    folder = source.folder
    for song in source.songs:
        try:
            peak = float(_metadata(folder / song.latents).get("peak", "0.5"))
            cuts = parse_cuts(_metadata(folder / song.conditions).get("cut", "{}"))
        except (SafetensorError, OSError, ValueError, RecursionError):
            damaged.append(song.audio)
            continue
        if peak < SILENT_PEAK:
            silent.append(song.audio)
        elif peak >= 1:
            clipped.append(f"{song.audio} (peak {peak:.2f})")
        cut += [f"{song.audio} ({tokens} tokens of {text})" for text, tokens in cuts.items() if tokens]
    found = {
        f"cannot be read, {AGAIN}": damaged,
        "silent": silent,
        "reaching full scale, so perhaps clipped": clipped,
        "with words past what ACE-Step reads": cut,
    }
    return [f"{what}: {_some(names)}" for what, names in found.items() if names]


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata() or {}


def _families(songs: Sequence[SongRecord], held_out: set[int]) -> list[str]:
    """Songs that are named like versions of one another and lie on both sides of the split."""
    families = defaultdict(list)
    for number, song in enumerate(songs):
        families[family_of(song.audio)].append(number)
    split = [
        f"{songs[numbers[0]].audio} and {songs[numbers[1]].audio}"
        for numbers in families.values()
        if 0 < len(held_out & set(numbers)) < len(numbers)
    ]
    if not split:
        return []
    return [
        f"named like versions of one song, on both sides of the split, which makes validation look better than it is: "
        f"{_some(split)}; type validation.songs=[...] with all versions"
    ]


def family_of(audio: str) -> str:
    """A file name without its track number, brackets and words like live: what versions of a song have in common.

    Other numbers stay, since "track 1" and "track 2" are two songs. A name that is nothing but a number says which song
    of its folder it is, so the folder is named too.
    """
    path = PurePosixPath(audio)
    stem = path.stem.lower()
    words = re.sub(r"[_.\-\s]+", " ", _TRACK.sub("", stem))
    family = " ".join(_VERSION.sub(" ", words).split()) or stem
    return f"{path.parent}/{family}" if _NUMBER_ONLY.fullmatch(family) else family


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{', '.join(listed[:SHOWN])}{more}"
