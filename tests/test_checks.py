"""A dataset's files are read through once, by each process its share, and again only when they change."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.data import checks
from sidestep.data.checks import REMEMBERED
from sidestep.data.dataset import SongDataset, StoredSongs
from sidestep.data.manifest import DatasetInfo, SongRecord, write_manifest
from sidestep.errors import UserError
from sidestep.processes import failing_together

NUM_FILES = 8


@pytest.fixture
def data(dataset_dir, tmp_path) -> Path:
    """A dataset of four songs that nobody has looked at."""
    shutil.copytree(dataset_dir, tmp_path / "data", ignore=shutil.ignore_patterns(REMEMBERED))
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are read."""
    files: list[str] = []
    read_parts = StoredSongs._read

    def note(self, song, file, *arguments):
        files.append(file)
        return read_parts(self, song, file, *arguments)

    monkeypatch.setattr(StoredSongs, "_read", note)
    return files


def check(folder: Path, spare: Path | None = None, **share: int) -> None:
    SongDataset(folder, max_seconds=4, seed=0).check_tensors(spare, **share)


def rewrite(path: Path, **changes: torch.Tensor) -> None:
    """Put other tensors into a file, at another time."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors | changes, path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_a_second_look_reads_only_what_has_changed(data, read):
    check(data)
    assert len(read) == len(set(read)) == NUM_FILES
    read.clear()
    check(data)
    assert read == []
    rewrite(data / "latents/song1.safetensors")
    check(data)
    assert read == ["latents/song1.safetensors"]


def test_a_file_that_changed_for_the_worse_is_named_and_what_was_seen_before_it_is_remembered(data, read):
    check(data)
    rewrite(data / "conditions/song2.safetensors", caption=torch.full((4, 64), torch.nan))
    for _ in range(2):
        read.clear()
        with pytest.raises(UserError, match=r"conditions/song2\.safetensors of song2\.wav holds NaN"):
            check(data)
        assert read == ["conditions/song2.safetensors"]


def test_each_process_reads_its_share_and_knows_what_the_others_found(data, read):
    for process in range(3):
        check(data, process=process, num_processes=3)
    assert sorted(read) == sorted(
        {file for song in StoredSongs(data).songs for file in (song.latents, song.conditions)}
    )
    read.clear()
    check(data)
    assert read == []


@pytest.mark.parametrize("damage", [b"", b"\xff\x00 nonsense", "half"])
def test_damage_to_what_is_remembered_costs_only_another_look(data, read, damage):
    check(data)
    memory = data / REMEMBERED
    memory.write_bytes(memory.read_bytes()[:70] if damage == "half" else damage)
    read.clear()
    check(data)
    assert 0 < len(read) <= NUM_FILES
    read.clear()
    check(data)
    assert read == []


def test_of_a_dataset_that_may_not_be_written_the_run_remembers(data, read, tmp_path):
    (data / REMEMBERED).mkdir()  # which is not to be written, whoever runs this
    (tmp_path / "run").mkdir()
    check(data, tmp_path / "run")
    read.clear()
    check(data, tmp_path / "run")
    assert read == []
    check(data)  # nowhere to remember
    assert len(read) == NUM_FILES


def test_a_file_with_many_texts_and_windows_is_opened_once(tmp_path, read):
    for folder in ("latents", "conditions"):
        (tmp_path / folder).mkdir()
    save_file({"latents": torch.zeros(250, 64).half()}, tmp_path / "latents/0.safetensors")
    texts = ["lyrics", "instrumental", "reference", "caption", "tag", "window.caption", "window.tag"]
    parts = {key: torch.ones(1, 8) for key in [*texts, *(f"window.{n}.lyrics" for n in range(3))]}
    save_file(parts, tmp_path / "conditions/0.safetensors")
    song = SongRecord(
        audio="a.wav", latents="latents/0.safetensors", conditions="conditions/0.safetensors", prompt="caption",
        num_frames=250, prompts=["caption", "tag"], is_timed=True,
    )  # fmt: skip
    settings = {"custom_tags": [], "window_seconds": 4.0}
    write_manifest(
        tmp_path, DatasetInfo(model_variant="base", condition_width=8, fingerprints={}, settings=settings), [song]
    )
    check(tmp_path)
    assert read == ["latents/0.safetensors", "conditions/0.safetensors"]
    del parts["window.2.lyrics"]
    save_file(parts, tmp_path / "conditions/0.safetensors")
    with pytest.raises(UserError, match=r"0\.safetensors of a\.wav cannot be read"):
        check(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_was_found_is_remembered_in_a_file_of_the_folder_or_not_at_all(data, tmp_path, kind):
    (tmp_path / "spare").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (data / REMEMBERED).symlink_to(outside) if kind == "link" else os.mkfifo(data / REMEMBERED)
    check(data, tmp_path / "spare")
    assert outside.read_text() == "mine"
    assert len((tmp_path / "spare" / REMEMBERED).read_text().split()) == NUM_FILES


def test_what_takes_long_is_told_and_remembered_on_the_way(data, monkeypatch, caplog):
    monkeypatch.setattr(checks, "PATIENCE", 0)
    with caplog.at_level(logging.INFO, "sidestep"):
        check(data)
    assert f"reading the files of {data} once: 5 of {NUM_FILES}" in caplog.text
    assert f"all files of {data} are whole" in caplog.text


def test_what_one_process_cannot_read_ends_all_of_them(monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, "song7 is damaged"])
    waited = []
    together = partial(failing_together, 2, lambda: waited.append(True))
    with pytest.raises(UserError, match="song7 is damaged"), together():
        pass
    with pytest.raises(OSError, match="the disk of this process"), together():  # which the others are told too
        raise OSError("the disk of this process")
    assert len(waited) == 2
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, None])
    with pytest.raises(UserError, match="song3 is damaged"), together():
        raise UserError("song3 is damaged")
    with failing_together(1, lambda: None):
        pass
