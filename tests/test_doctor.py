"""The doctor: what it notices, what it predicts, and that it leaves nothing behind."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.checking import doctor
from sidestep.checking.doctor import examine, num_checkpoints
from sidestep.checking.dry_run import measure_step
from sidestep.checking.songs import check_songs, family_of
from sidestep.data.manifest import SongRecord, read_manifest
from sidestep.doctor import examine_sweep
from sidestep.training.run import open_run
from tests.factories import choices_of, train_config


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, str]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


@pytest.fixture(autouse=True)
def _said(caplog):
    caplog.set_level(logging.INFO, "sidestep")


def look(folder: Path, *typed: str) -> float | None:
    return examine(train_config(*typed), folder / "outputs/test/run", choices_of(*typed))


def test_a_sound_run_is_described_and_nothing_is_written(tmp_path, places, caplog):
    hours = look(tmp_path, *places, "validation.songs=[song2.wav]", "max_epochs=3")
    assert hours is not None
    assert hours > 0
    assert "songs     4, 0.2 minutes, 1 of them held out" in caplog.text
    assert "memory    weights 0.00122 + adapter" in caplog.text
    assert "9 steps" in caplog.text
    assert not list(tmp_path.iterdir())


def test_oddities_of_the_songs_are_named(tmp_path, dataset_dir):
    data = shutil.copytree(dataset_dir, tmp_path / "data")
    _, songs = read_manifest(data)
    songs[3].latents = songs[2].latents
    quiet, loud = torch.zeros(10, 64).half(), torch.ones(10, 64).half()
    save_file({"latents": quiet}, data / songs[0].latents, metadata={"peak": "0.0"})
    save_file({"latents": loud}, data / songs[1].latents, metadata={"peak": "1.3"})
    words = {"caption": torch.ones(3, 64)}
    save_file(words, data / songs[1].conditions, metadata={"cut": json.dumps({"lyrics": 12, "prompt": 0})})
    notes = "\n".join(check_songs(data, songs, held_out=[]))
    assert "the same sound under several names: song2.wav = song3.wav" in notes
    assert "silent: song0.wav" in notes
    assert "perhaps clipped: song1.wav (peak 1.30)" in notes
    assert "past what ACE-Step reads: song1.wav (12 tokens of lyrics)" in notes
    assert "captioned by the file name, or not at all: song0.wav, song1.wav, song2.wav and 1 more" in notes


def test_versions_of_one_song_on_both_sides_of_the_split_are_named(tmp_path):
    names = ["Old Mill.wav", "02 - old mill (live).flac", "night.wav"]
    songs = [
        SongRecord(audio=n, latents=f"l/{i}", conditions=f"c/{i}", prompt="caption", num_frames=50, caption="x")
        for i, n in enumerate(names)
    ]
    assert family_of(names[0]) == family_of(names[1]) == "old mill"
    assert family_of("12.wav") == "12"
    split, whole = (
        [note for note in check_songs(tmp_path, songs, held_out) if "both sides" in note] for held_out in ([0], [0, 1])
    )
    assert "Old Mill.wav and 02 - old mill (live).flac" in split[0]
    assert whole == []


def test_the_memory_of_each_part_is_what_the_tensors_take(tmp_path, places, checkpoint_dir):
    typed = (*places, "adapter=lora", "adapter.rank=4")
    run = open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))
    need = measure_step(run)
    transformer = find_checkpoint(checkpoint_dir, run.config.model_variant).load_transformer(
        device=torch.device("cpu"), dtype=torch.float32
    )
    weights = sum(parameter.numel() for parameter in transformer.parameters())
    adapter = sum(parameter.numel() for parameter in run.config.adapter.attach(transformer).parameters())
    assert need.weights * 2**30 == 4 * weights
    assert need.adapter * 2**30 == need.gradients * 2**30 == 4 * adapter
    assert need.optimizer * 2**30 == pytest.approx(8 * adapter, rel=0.05)  # and a counter for each tensor
    assert need.longest_seconds == 2
    recomputed = (*typed, "vram_profile.gradient_checkpointing=full")
    less = measure_step(open_run(train_config(*recomputed), tmp_path / "run", choices_of(*recomputed)))
    assert less.activations < need.activations / 2


def test_a_card_that_is_too_small_gets_the_setting_to_change(tmp_path, places, monkeypatch, caplog):
    def too_small(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "measure_step", too_small)
    assert look(tmp_path, *places) is None
    assert "does not fit" in caplog.text
    assert "use vram_profile.gradient_checkpointing=full" in caplog.text


def test_checkpoints_are_counted_as_the_run_will_write_them(tmp_path, places):
    typed = (*places, "max_epochs=25", "save_every_epochs=10")
    assert num_checkpoints(open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))) == 3


def test_a_sweep_is_summed_up_and_a_point_that_cannot_be_is_named(tmp_path, places, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = [*places, "device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    with pytest.raises(SystemExit):
        examine_sweep([*typed, "adapter.rank=2,0"])
    assert "point 2 of 2" in caplog.text
    assert "adapter.rank=0 must be at least 1" in caplog.text
    assert "2 points: at most 0.00 hours of devices in all; 1 cannot be begun" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "chosen",
    [pytest.param(["-m", "adapter.rank=2,0"], marks=pytest.mark.slow), ["sweep=rank", "adapter.rank=0,2"]],
    ids=["-m", "sweep=rank"],
)
def test_the_command_examines_every_point_of_a_sweep_and_launches_nothing(tmp_path, places, chosen):
    typed = ["device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    done = subprocess.run(
        [sys.executable, "-m", "sidestep.doctor", *places, *typed, *chosen],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "point 2 of " in done.stderr
    assert "points: at most" in done.stderr
    assert not (tmp_path / "outputs").exists()
