"""The doctor: what it notices, what it predicts, and that it leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.checking import doctor
from sidestep.checking.doctor import (
    Cost,
    evaluated_songs,
    examine,
    num_checkpoints,
    rendered_pieces,
    times_done,
    what_decides_cost,
    what_would_fit,
)
from sidestep.checking.dry_run import Need, PreviewTimes, longest_micro_batch, measure_step
from sidestep.checking.songs import check_songs, family_of
from sidestep.config.settings import AttentionKernel
from sidestep.data.dataset import SongDataset
from sidestep.data.manifest import read_manifest, write_manifest
from sidestep.doctor import dearest_point, examine_sweep, main
from sidestep.errors import UserError
from sidestep.inference import previews
from sidestep.training.memory import MemoryPlan
from sidestep.training.run import open_run
from sidestep.training.validation import Validation
from tests.factories import choices_of, run_training, train_config, write_dataset


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, str]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


@pytest.fixture(autouse=True)
def _said(caplog):
    caplog.set_level(logging.INFO, "sidestep")


def look(folder: Path, *typed: str) -> Cost | None:
    return examine(train_config(*typed), folder / "outputs/test/run", choices_of(*typed))


def test_a_sound_run_is_described_and_nothing_is_written(tmp_path, places, caplog):
    cost = look(tmp_path, *places, "validation.songs=[song2.wav]", "max_epochs=3")
    assert cost is not None
    assert cost.hours > 0
    assert cost.gib > 0
    assert "songs     4, 0.2 minutes, 1 of them held out" in caplog.text
    assert "memory    weights 0.00122 + adapter" in caplog.text
    assert "(9 of 0." in caplog.text
    assert "(1 times)" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_song_that_was_changed_is_refused_as_training_would(tmp_path, checkpoint_dir):
    data = write_dataset(tmp_path / "data", checkpoint_dir, lengths=[50, 50])
    _, songs = read_manifest(data)
    path = data / songs[1].latents
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}.* was changed since it was written"):
        look(tmp_path, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={data}")


def test_oddities_of_the_songs_are_named(tmp_path, dataset_dir):
    data = shutil.copytree(dataset_dir, tmp_path / "data")
    info, songs = read_manifest(data)
    songs[3].latents = songs[2].latents
    write_manifest(data, info, songs)
    quiet, loud = torch.zeros(10, 64).half(), torch.ones(10, 64).half()
    save_file({"latents": quiet}, data / songs[0].latents, metadata={"peak": "0.0"})
    save_file({"latents": loud}, data / songs[1].latents, metadata={"peak": "1.3"})
    words = {"caption": torch.ones(3, 64)}
    save_file(words, data / songs[1].conditions, metadata={"cut": json.dumps({"lyrics": 12, "prompt": 0})})
    notes = "\n".join(check_songs(SongDataset(data, max_seconds=2, seed=0), held_out=[]))
    assert "the same sound under several names: song2.wav = song3.wav" in notes
    assert "silent: song0.wav" in notes
    assert "perhaps clipped: song1.wav (peak 1.30)" in notes
    assert "past what ACE-Step reads: song1.wav (12 tokens of lyrics)" in notes
    assert "captioned by the file name, or not at all: song0.wav, song1.wav, song2.wav and 1 more" in notes


def test_versions_of_one_song_on_both_sides_of_the_split_are_named(tmp_path, checkpoint_dir):
    data = write_dataset(tmp_path / "data", checkpoint_dir, lengths=[50, 50, 50])
    info, songs = read_manifest(data)
    for song, name in zip(songs, ["Old Mill.wav", "02 - old mill (live).flac", "night.wav"], strict=True):
        song.audio, song.caption = name, "x"
    write_manifest(data, info, songs)
    dataset = SongDataset(data, max_seconds=2, seed=0)
    split, whole = (
        [note for note in check_songs(dataset, held_out) if "both sides" in note] for held_out in ([0], [0, 1])
    )
    assert "Old Mill.wav and 02 - old mill (live).flac" in split[0]
    assert whole == []


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("Old Mill.wav", "02 - old mill (live).flac"), True),
        (("old_mill_take_2.wav", "Old Mill - Take 3.wav", "old mill v2.wav"), True),
        (("Sun.wav", "Sun_take2.wav", "sun-remastered.wav", "Sun rmx.wav", "live/Sun.wav"), True),
        (("take five.wav", "mixed feelings.wav", "mixed.wav"), False),
        (("a/01.wav", "b/01.wav"), False),
        (("a/Track 1.wav", "b/track 1.wav"), False),
        (("track 1.wav", "track 2.wav"), False),
        (("12.wav", "13.wav"), False),
        (("99 luftballons.wav", "luftballons 98.wav"), False),
    ],
)
def test_names_are_of_one_family_where_only_words_for_versions_differ(names, same):
    assert (len({family_of(name) for name in names}) == 1) is same


def test_songs_of_another_dataset_and_of_another_trainer_are_looked_up_where_they_are(
    tmp_path, places, checkpoint_dir, caplog
):
    prior = write_dataset(tmp_path / "prior", checkpoint_dir, lengths=[90, 90])
    look(tmp_path, *places, f"prior_dataset_dir={prior}")
    assert "songs     4, 0.2 minutes, none held out" in caplog.text
    assert f"2 of {prior}, 0.1 minutes, in every second batch" in caplog.text
    assert "cannot be read" not in caplog.text

    (tmp_path / "theirs").mkdir()
    for name in ("a", "b"):
        tensors = {
            "target_latents": torch.randn(60, 64),
            "attention_mask": torch.ones(60),
            "encoder_hidden_states": torch.randn(7, 64),
            "encoder_attention_mask": torch.ones(7),
            "metadata": {"filename": f"{name}.wav", "caption": "piano"},
        }
        torch.save(tensors, tmp_path / f"theirs/{name}.pt")
    caplog.clear()
    cost = look(tmp_path, places[0], f"dataset_dir={tmp_path / 'theirs'}", "max_epochs=1")
    assert cost is not None
    assert "cannot be read" not in caplog.text


def test_the_steps_that_are_measured_are_those_the_run_will_make(tmp_path, places, checkpoint_dir):
    """Windows shorter than max_seconds, and a prior dataset whose songs are longer than the run's own."""
    typed = (*places, "max_seconds=20", "vram_profile.max_seconds=20", "vram_profile.batch_size=2")
    prior = write_dataset(tmp_path / "prior", checkpoint_dir, lengths=[400, 420])
    run = open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))
    own = max(song.num_frames for song in run.dataset.songs)
    assert longest_micro_batch(run).latents.shape[:2] == (2, own // 2 * 2)
    typed += (f"prior_dataset_dir={prior}",)
    both = longest_micro_batch(open_run(train_config(*typed), tmp_path / "run", choices_of(*typed)))
    assert both.latents.shape[:2] == (2, 420)
    assert min(both.songs) >= 4

    info, songs = read_manifest(prior)
    info.settings["window_seconds"] = 4.0
    write_manifest(prior, info, songs)
    for song in songs:
        parts = {**load_file(prior / song.conditions), "window.caption": torch.randn(3, 64)}
        save_file(parts, prior / song.conditions)
    typed = (places[0], f"dataset_dir={prior}", "max_seconds=20")
    windows = longest_micro_batch(open_run(train_config(*typed), tmp_path / "run", choices_of(*typed)))
    assert windows.latents.shape[1] == 100


@pytest.mark.slow
def test_evaluations_and_previews_are_counted_as_the_run_will_do_them(tmp_path, places, monkeypatch, caplog):
    typed = (
        *places, "validation.songs=[song2.wav]", "validation.every_epochs=2", "validation.num_times=2",
        "max_epochs=3", "ema_decay=0.9", "previews.every_epochs=2", "previews.prompts=[piano]",
        "previews.scales=[0,0.5]", "previews.seconds=1", "previews.num_inference_steps=1",
    )  # fmt: skip
    needs, measure = [], doctor.measure_step
    monkeypatch.setattr(doctor, "measure_step", lambda *a: needs.append(measure(*a)) or needs[-1])
    cost = look(tmp_path, *typed)
    assert "(2 times)" in caplog.text
    assert "(3 of 1 s)" in caplog.text
    run = open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))
    (need,) = needs
    assert need.seconds_per_song > 0
    assert min(need.previews.models, need.previews.piece, need.previews.sampling_step) > 0
    assert cost.hours * 3600 > run.num_steps * need.seconds_per_step
    evaluated, rendered = [], []
    song_losses, write_music = Validation._song_losses, previews.write_music
    monkeypatch.setattr(Validation, "_song_losses", lambda *a: evaluated.append(1) or song_losses(*a))
    monkeypatch.setattr(previews, "write_music", lambda *a: rendered.append(1) or write_music(*a))
    run_training(tmp_path / "run", *typed)
    assert len(evaluated) == evaluated_songs(run)
    assert len(rendered) == sum(rendered_pieces(run)) == 3
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()) / 2**30
    assert 0.7 * cost.gib < taken < cost.gib


def test_what_is_done_every_few_epochs_is_counted_as_the_loop_does_it(tmp_path, places):
    for every, batch_size, epochs in ((1, 1, 3), (2, 3, 5), (5, 16, 9), (4, 1, 8)):
        typed = (*places, f"max_epochs={epochs}", f"vram_profile.batch_size={batch_size}")
        run = open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))
        done = sum(run.is_due(step, every) for step in range(1, run.num_steps + 1))
        assert times_done(run, every) == done


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
    assert less.activations < need.activations


def test_a_card_that_is_too_small_gets_the_setting_to_change(tmp_path, places, monkeypatch, caplog):
    def too_small(run, kept):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "measure_step", too_small)
    assert look(tmp_path, *places) is None
    assert "does not fit" in caplog.text
    assert "use vram_profile.gradient_checkpointing=selective" in caplog.text


def test_an_evaluation_that_does_not_fit_is_not_called_a_step(tmp_path, places, monkeypatch):
    def too_small(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    held_out = (*places, "validation.songs=[song2.wav]", "validation.seconds=30")
    monkeypatch.setattr("sidestep.checking.dry_run._time_forward", too_small)
    with pytest.raises(UserError, match=r"evaluating a held-out song .* smaller validation\.seconds than 30"):
        look(tmp_path, *held_out)
    monkeypatch.setattr(Validation, "_song_losses", too_small)
    with pytest.raises(UserError, match=r"evaluating a held-out song .* smaller validation\.seconds than 30"):
        run_training(tmp_path / "outputs/run", *held_out)


def test_what_would_fit_names_no_more_than_is_needed(tmp_path, places, monkeypatch):
    typed = (*places, "vram_profile.batch_size=4", "max_seconds=60")
    run = open_run(train_config(*typed), tmp_path / "run", choices_of(*typed))

    def plan(model, adapter, optim, memory, dtype):
        activations = memory.max_seconds / 10 * memory.batch_size
        activations /= {"none": 1, "selective": 2, "full": 10}[memory.gradient_checkpointing]
        weights = {"none": 4, "int8": 2, "nf4": 1}[memory.base_quantization]
        return MemoryPlan(weights, 0, 0, 0, activations, 0)

    monkeypatch.setattr(doctor, "plan_memory", plan)
    one = "use vram_profile.batch_size=1"
    assert what_would_fit(run, 14) == f"{one} vram_profile.gradient_accumulation_steps=4"
    full = "vram_profile.gradient_checkpointing=full vram_profile"
    assert what_would_fit(run, 6) == f"{one} {full}.gradient_accumulation_steps=4"
    assert what_would_fit(run, 3.3) == f"{one} {full}.base_quantization=int8 vram_profile.gradient_accumulation_steps=4"
    assert "nothing that can be given up" in what_would_fit(run, 1)


@pytest.mark.parametrize(
    ("typed", "count"),
    [
        ("max_epochs=25 save_every_epochs=10", 3),
        ("max_epochs=25 save_every_epochs=1 keep_last=2", 2),
        ("max_epochs=25 save_every_epochs=1 keep_last=2 keep_every=10", 5),  # 10, 20, 24, 25, and one to be safe
        ("max_epochs=25 save_every_epochs=4 keep_last=2 keep_every=10", 4),  # 20, 24, 25, likewise
        ("max_epochs=25 save_every_epochs=10 keep_last=5 keep_every=2", 3),
    ],
)
def test_checkpoints_are_counted_as_the_run_will_keep_them(tmp_path, places, typed, count):
    settings = (*places, *typed.split())
    assert num_checkpoints(open_run(train_config(*settings), tmp_path / "run", choices_of(*settings))) == count


def test_music_is_counted_on_the_disk_and_in_tensorboard(tmp_path, places, monkeypatch, caplog):
    nothing = Need(0, 1, 0, 0, 0, 0, 0, 0, previews=PreviewTimes(0, 0, 0))
    monkeypatch.setattr(doctor, "measure_step", lambda *_: nothing)
    cost = look(tmp_path, *places, "max_epochs=2", "previews.every_epochs=1", "previews.seconds=10")
    samples = 10 * 48_000 * 6  # two prompts of the base model and of two epochs
    assert cost.music_gib * 2**30 > samples * 4  # two channels of 16 bits
    assert (cost.gib - cost.music_gib) * 2**30 > samples * 2  # one channel
    assert "6 previews, here and in TensorBoard" in caplog.text


def test_points_that_fit_one_by_one_may_not_fit_together(monkeypatch, caplog):
    monkeypatch.setattr("sidestep.doctor._examine", lambda *_: Cost(hours=1, gib=45, music_gib=1))
    monkeypatch.setattr(doctor, "free_gib", lambda folder: 69.5)
    typed = ["dataset_dir=data", "name=s"]
    with pytest.raises(SystemExit):
        examine_sweep([*typed, "seed=1,2"])
    assert "2 points: at most 2.00 hours of devices and about 90 GiB of disk in all; 0 cannot be begun" in caplog.text
    assert "that does not fit on the disk, of which 69.5 GiB are free; use keep_last=3" in caplog.text
    examine_sweep([*typed, "seed=1"])


def test_a_sweep_is_summed_up_and_a_point_that_cannot_be_is_named(tmp_path, places, caplog, monkeypatch):
    """Points that differ in their learning rate only cost the same, and the model is read once."""
    monkeypatch.chdir(tmp_path)
    read, steps = [], []
    whole, measure = Checkpoint._read, doctor.measure_step
    monkeypatch.setattr(Checkpoint, "_read", lambda *a: read.append(a[1]) or whole(*a))
    monkeypatch.setattr(doctor, "measure_step", lambda *a: steps.append(1) or measure(*a))
    typed = [*places, "device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    with pytest.raises(SystemExit):
        examine_sweep([*typed, "adapter.rank=2,0,4", "optim.lr=1e-4,1e-3"])
    assert "point 6 of 6" in caplog.text
    assert "adapter.rank=0 must be at least 1" in caplog.text
    assert "6 points: at most" in caplog.text
    assert "in all; 2 cannot be begun" in caplog.text
    assert len(steps) == 2
    assert read == ["transformer"]
    assert caplog.text.count("versions  sidestep") == caplog.text.count("songs     4") == 1
    assert caplog.text.count("time      at most") == 4
    assert not list(tmp_path.iterdir())


def test_points_that_differ_in_what_a_step_costs_are_measured_apart(tmp_path, places):
    def key(*typed: str) -> str:
        return what_decides_cost(open_run(train_config(*places, *typed), tmp_path, choices_of(*places, *typed)))

    assert key("adapter.dropout=0.1") == key("adapter.dropout=0.2") != key("adapter.dropout=0")
    run = open_run(train_config(*places), tmp_path, choices_of(*places))
    for other in ({"attention_kernel": AttentionKernel.flex}, {"compile": True}):  # which a CPU would refuse
        assert what_decides_cost(replace(run, config=replace(run.config, **other))) != what_decides_cost(run)


def test_a_sweep_that_chooses_its_points_is_taken_at_its_dearest():
    params = {"optim.lr": "tag(log, interval(1e-5, 3e-3))", "adapter.rank": "choice(8, 64, 16)"}
    typed = ["sweep=optuna", "adapter=lokr,lora", "seed=range(1,4)", "name=s"]
    assert dearest_point(params, typed) == [
        "optim.lr=0.003", "adapter.rank=64", "sweep=optuna", "adapter=lokr", "seed=3", "name=s",
    ]  # fmt: skip


def test_a_sweep_that_chooses_its_points_is_priced_by_how_many_it_chooses(places, caplog):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    typed = [*places, "device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    examine_sweep([*typed, "sweep=optuna", "hydra.sweeper.n_trials=3"])
    assert "this sweep chooses 3 points as it goes" in caplog.text
    assert "not an upper bound" in caplog.text
    assert "optim.lr=0.003 adapter.rank=64" in caplog.text
    assert "3 points: at most" in caplog.text


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("-m adapter=lora,lokr nam=x", "nam is not a setting; did you mean name?"),
        ("-m adapter=lora,lokr x=[", "cannot read x=["),
        ("-m --bogus adapter=lora,lokr", "--bogus is not an option"),
        ("adapter=lora,lokr", "adapter=lora,lokr is several values; add -m"),
    ],
)
def test_a_mistyped_sweep_is_answered_in_one_line(typed, answer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor", *typed.split()])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit, match=re.escape(answer)):
        main()


def test_a_ready_sweep_is_examined_without_m_and_launches_nothing(tmp_path, places, caplog, monkeypatch):
    typed = ["device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["doctor", *places, *typed, "sweep=rank", "adapter.rank=0,2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "2 points: at most" in caplog.text
    assert "1 cannot be begun" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_examines_every_point_of_a_sweep_and_launches_nothing(tmp_path, places):
    typed = ["device=cpu", "model_variant=base", "max_epochs=null", "max_steps=2", "max_seconds=1", "name=s"]
    done = subprocess.run(
        [sys.executable, "-m", "sidestep.doctor", *places, *typed, "-m", "adapter.rank=2,0"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "point 2 of 2" in done.stderr
    assert "2 points: at most" in done.stderr
    assert not (tmp_path / "outputs").exists()
