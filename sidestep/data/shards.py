"""A dataset made in parts by several processes or nodes, and put together by whichever is done last.

    <dataset_dir>/shards/3-of-8/shard.json    the songs of one part, once all of them are encoded

Encoded files are named by what they are made from and lie in one folder, so a part that is run again does nothing
twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidestep.data.manifest import HALF_CHARACTER, DatasetInfo, SongRecord, write_manifest
from sidestep.data.words import Song
from sidestep.errors import UserError
from sidestep.files import write_text
from sidestep.records import make_record, parse_json

log = logging.getLogger(__name__)

SHARDS = "shards"
"""Folder of a dataset that is or was made in parts."""


@dataclass(kw_only=True)
class Shard:
    """What one part came to."""

    listing: str
    """Hash of all songs there were, of this part and the others; parts of different lists do not belong together."""
    info: DatasetInfo
    songs: list[SongRecord]
    failed: dict[str, str] = field(default_factory=dict)
    """Songs left out, and why."""


def shard_folder(dataset_dir: Path, shard: int, num_shards: int) -> Path:
    """Where a part says what it came to."""
    return dataset_dir / SHARDS / f"{shard}-of-{num_shards}"


def songs_of(songs: Sequence[Song], shard: int, num_shards: int) -> list[Song]:
    """Every ``num_shards``-th song, which are as many and as long as those of any other part.

    Raises:
        UserError: if a part would have no songs.
    """
    if num_shards > len(songs):
        raise UserError(f"num_shards={num_shards} is more than the {len(songs)} songs there are; type fewer")
    return list(songs[shard::num_shards])


def hash_listing(songs: Sequence[Song]) -> str:
    """Hash everything that is known of the songs without reading their audio."""
    digest = hashlib.sha256()
    for song in songs:
        about = song.path.stat()
        values = {key: str(value) for key, value in dataclasses.asdict(song).items()}
        del values["path"]  # which is spelled as audio_dir is; the name says which file it is
        digest.update(json.dumps([values, about.st_size, about.st_mtime_ns], sort_keys=True).encode())
    return digest.hexdigest()


def write_shard(folder: Path, shard: Shard) -> None:
    """Write down what a part came to."""
    write_text(folder / "shard.json", json.dumps(dataclasses.asdict(shard), ensure_ascii=False) + "\n")


def merge_shards(dataset_dir: Path, num_shards: int, songs: Sequence[Song], listing: str) -> list[str]:
    """Write the manifest of the whole dataset, if every part is done.

    Args:
        dataset_dir: the dataset's folder; nobody else may write its manifest meanwhile.
        num_shards: how many parts there are.
        songs: all songs, in the order of training.
        listing: their hash.

    Returns:
        The number of each part that is not done, and whether it was done with other songs or words; empty if the
        manifest was written.

    Raises:
        UserError: if the parts were made with different models or settings.
    """
    shards = [_read(shard_folder(dataset_dir, number, num_shards) / "shard.json") for number in range(num_shards)]
    missing = [str(number) for number, shard in enumerate(shards) if shard is None]
    missing += [
        f"{number} (which was done with other songs or words)"
        for number, shard in enumerate(shards)
        if shard is not None and shard.listing != listing
    ]
    if missing:
        return missing
    done = [shard for shard in shards if shard is not None]
    first_number, first = next(((number, shard.info) for number, shard in enumerate(done) if shard.songs), (0, None))
    if first is None:
        reasons = "; ".join(reason for shard in done for reason in shard.failed.values())
        raise UserError(f"none of the {len(songs)} songs can be used: {reasons}")
    for number, shard in enumerate(done):
        if shard.songs and _made_with(shard.info) != _made_with(first):
            raise UserError(
                f"shard={first_number} and shard={number} of {num_shards} were made with different "
                f"{_differ(first, shard.info)}; run one of them again with the settings of the other"
            )
    records = {record.audio: record for shard in done for record in shard.songs}
    ordered = [records[song.name] for song in songs if song.name in records]
    info = dataclasses.replace(
        first, num_songs=len(ordered), total_seconds=sum(shard.info.total_seconds for shard in done)
    )
    write_manifest(dataset_dir, info, ordered)
    return []


def _made_with(info: DatasetInfo) -> DatasetInfo:
    return dataclasses.replace(info, num_songs=0, total_seconds=0.0)


def _differ(one: DatasetInfo, other: DatasetInfo) -> str:
    """Names of the settings that differ, or of what else does."""
    settings = sorted(
        key for key in {*one.settings, *other.settings} if one.settings.get(key) != other.settings.get(key)
    )
    return ", ".join(settings) or "models"


def _read(path: Path) -> Shard | None:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        if HALF_CHARACTER.search(json.dumps(values, ensure_ascii=False)):
            raise ValueError("it holds half a character")
        info = make_record(DatasetInfo, values["info"])
        songs = [make_record(SongRecord, record) for record in values["songs"]]
        return make_record(Shard, values | {"info": info, "songs": songs})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be understood (%s); run that part again", path, error)
        return None
