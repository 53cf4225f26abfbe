"""Datasets made in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidestep.acestep.toy import make_toy_songs
from sidestep.data.encode import preprocess
from sidestep.data.manifest import DatasetInfo, read_manifest
from sidestep.data.shards import Shard, hash_listing, merge_shards, shard_folder, write_shard
from sidestep.data.songs import read_songs
from sidestep.errors import UserError
from tests.factories import preprocess_config
from tests.forked import start


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    make_toy_songs(tmp_path / "songs")
    return tmp_path / "songs"


def typed(songs: Path, dataset_dir: Path, checkpoint_dir: Path) -> list[str]:
    return [f"audio_dir={songs}", f"dataset_dir={dataset_dir}", f"checkpoint_dir={checkpoint_dir}"]


def test_parts_done_at_the_same_time_give_the_dataset_that_one_process_would(tmp_path, songs, checkpoint_dir):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    preprocess(preprocess_config(*typed(songs, whole, checkpoint_dir)))
    common = [*typed(songs, parts, checkpoint_dir), "model_variant=base", "device=cpu"]
    both = [start(tmp_path, "-m", *common, "num_shards=2", f"shard={n}", command="preprocess") for n in (0, 1)]
    for process in both:
        assert process.finish() == 0, process.text
    # the one that ends last, or both where they end at once
    assert any("the dataset is put together\n" in process.text for process in both)
    assert read_manifest(parts) == read_manifest(whole)
    for file in whole.rglob("*.safetensors"):
        assert (parts / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_a_lost_part_is_run_again_and_what_it_had_done_is_kept(tmp_path, songs, checkpoint_dir):
    common = typed(songs, tmp_path / "data", checkpoint_dir)
    first = preprocess(preprocess_config(*common, "num_shards=2", "shard=0"))
    assert "still to do: 1" in str(first)
    with pytest.raises(UserError, match="is not a dataset"):
        read_manifest(tmp_path / "data")
    again = preprocess(preprocess_config(*common, "num_shards=2", "shard=0"))
    assert (len(again.changed), len(again.unchanged)) == (0, 2)
    second = preprocess(preprocess_config(*common, "num_shards=2", "shard=1"))
    assert "all 2 shards are done" in str(second)
    assert len(read_manifest(tmp_path / "data")[1]) == 4

    (songs / "01-paper-boats.caption.txt").write_text("another caption")
    changed = preprocess(preprocess_config(*common, "num_shards=2", "shard=0"))
    assert "still to do: 1 (which was done with other songs or words)" in str(changed)


def test_parts_are_of_the_same_songs_however_their_folder_is_typed(songs, monkeypatch):
    monkeypatch.chdir(songs.parent)
    spelled = [hash_listing(read_songs(folder).songs) for folder in (songs, Path("songs"), Path("songs/../songs"))]
    assert len(set(spelled)) == 1
    (songs / "04-low-tide.flac").unlink()
    assert hash_listing(read_songs(songs).songs) != spelled[0]


def test_a_part_none_of_whose_songs_can_be_used_does_not_stop_the_others(tmp_path, songs, checkpoint_dir):
    for name in ("02-night-train.flac", "04-low-tide.flac"):
        (songs / name).write_text("this is not audio")
    common = typed(songs, tmp_path / "data", checkpoint_dir)
    bad = preprocess(preprocess_config(*common, "num_shards=2", "shard=1"))
    assert len(bad.failed) == 2
    preprocess(preprocess_config(*common, "num_shards=2", "shard=0"))
    assert [song.audio for song in read_manifest(tmp_path / "data")[1]] == ["01-paper-boats.wav", "03-old-mill.wav"]


def test_an_entry_that_cannot_be_used_is_told_by_one_part_only(tmp_path, songs, checkpoint_dir):
    twice = [{"filename": "01-paper-boats.wav", "caption": "boats"}, {"filename": "01-paper-boats.wav", "caption": "b"}]
    (songs / "dataset.json").write_text(json.dumps({"samples": twice}))
    common = typed(songs, tmp_path / "data", checkpoint_dir)
    assert read_songs(songs).failed
    second = preprocess(preprocess_config(*common, "num_shards=2", "shard=1"))  # the first tells it
    assert not second.failed
    assert "next: " not in str(second)  # there is nothing to train on yet


def test_parts_made_with_other_settings_are_not_mixed(tmp_path, songs, checkpoint_dir):
    common = typed(songs, tmp_path / "data", checkpoint_dir)
    preprocess(preprocess_config(*common, "num_shards=2", "shard=0", "seed=1"))
    with pytest.raises(UserError, match="shard=0 and shard=1 of 2 were made with different seed; run one"):
        preprocess(preprocess_config(*common, "num_shards=2", "shard=1"))


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["shard=2", "num_shards=2"], "shard=2 must be from 0 to 1"),
        (["shard=0"], "shard and num_shards belong together"),
        (["num_shards=0", "shard=0"], "num_shards=0 must be at least 1"),
    ],
)
def test_parts_that_do_not_exist_are_refused(typed, answer):
    with pytest.raises(UserError, match=answer):
        preprocess_config("audio_dir=a", "dataset_dir=b", *typed)


def test_more_parts_than_songs_are_refused(tmp_path, songs, checkpoint_dir):
    with pytest.raises(UserError, match="num_shards=5 is more than the 4 songs"):
        preprocess(preprocess_config(*typed(songs, tmp_path / "d", checkpoint_dir), "num_shards=5", "shard=0"))


@pytest.mark.parametrize(
    "damage",
    [
        {"failed": []},
        {"listing": 5},
        {"songs": [{"audio": "a"}]},
        {"songs": {"a": {}}},
        {"info": {"total_seconds": "x"}},
    ],
)
def test_a_part_whose_record_has_values_of_another_kind_is_to_be_done_again(tmp_path, caplog, damage):
    info = DatasetInfo(model_variant="base", condition_width=8, fingerprints={}, settings={"custom_tags": []})
    (folder := shard_folder(tmp_path, 0, 1)).mkdir(parents=True)
    write_shard(folder, Shard(listing="x", info=info, songs=[]))
    whole = json.loads((folder / "shard.json").read_text())
    changed = {key: whole[key] | value if key == "info" else value for key, value in damage.items()}
    (folder / "shard.json").write_text(json.dumps(whole | changed))
    assert merge_shards(tmp_path, 1, [], "x") == ["0"]
    assert "shard.json cannot be understood" in caplog.text
