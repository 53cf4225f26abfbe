"""Validation: numbers that can be compared, and a run that is not disturbed by them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.adapters.files import attach_saved, saved_step
from sidestep.config.evaluation import ValidationConfig
from sidestep.data.dataset import SongDataset
from sidestep.data.holdout import content_id, hold_out, lowest_places
from sidestep.data.manifest import SongRecord
from sidestep.errors import UserError
from sidestep.seeds import derive_seed
from sidestep.training.flow import noisy_latents_and_velocity
from sidestep.training.run import Run, open_run
from sidestep.training.signals import Interrupted
from sidestep.training.validation import Evaluation, Validation, _read_rows, read_evaluations, verdict
from tests.factories import choices_of, run_training, train_config

ROOT = Path(__file__).resolve().parents[1]
BASE_LOSSES = [3.7451820, 4.1207902, 3.6045548]
"""Of the toy model on the two held-out songs of the toy dataset, at three times; recorded on 2 shared CPU cores."""
HELD_OUT = ("validation.songs=[song1.wav,song2.wav]", "validation.num_times=3", "validation.scales=[0.5,1]")


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, str]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


def songs_named(*names: str) -> list[SongRecord]:
    return [
        SongRecord(audio=f"{n}.wav", latents=f"latents/{n}.safetensors", conditions="c", prompt="caption", num_frames=9)
        for n in names
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


# the split


def test_a_song_stays_on_its_side_when_songs_are_added():
    songs = songs_named(*(f"song{i}" for i in range(400)))
    config = ValidationConfig(fraction=0.2)
    few, many = (
        {chosen[number].audio for number in hold_out(chosen, config)[1]} for chosen in (songs[:50], songs[::-1])
    )
    assert few == many & {song.audio for song in songs[:50]}
    assert 55 < len(many) < 105


def test_the_same_sound_under_two_names_is_on_one_side():
    songs = songs_named("a", "b", "c", "d")
    songs[3].latents = songs[0].latents
    songs[0].sound = songs[2].sound = songs[3].sound = "one recording"
    _, held_out = hold_out(songs, ValidationConfig(songs=["a.wav"]))
    assert held_out == [0, 2, 3]


def test_one_song_is_held_out_where_the_fraction_would_hold_out_none():
    train_on, held_out = hold_out(songs_named("a", "b", "c"), ValidationConfig(fraction=0.001))
    assert (len(train_on), len(held_out)) == (2, 1)


def test_a_song_is_named_as_it_is_called_with_brackets_and_accents():
    songs = songs_named("My Song [Live]", "Cafe\u0301", "other")
    assert hold_out(songs, ValidationConfig(songs=["My Song [Live].wav"]))[1] == [0]
    assert hold_out(songs, ValidationConfig(songs=["Caf\xe9.wav", "[M]y*"]))[1] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"songs": ["nope*"]}, "'nope\\*', which is no song of the dataset"),
        ({"songs": ["*"]}, "hold out all 3 songs"),
    ],
)
def test_a_split_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        hold_out(songs_named("a", "b", "c"), ValidationConfig(**settings))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("validation.fraction=1.0",), "below 1"),
        (("validation.fraction=0.1", "validation.songs=[a.wav]"), "leave validation.fraction=0.1 out"),
        (("validation.patience=2",), "no effect without held-out songs"),
        (("validation.num_times=0", "validation.fraction=0.1"), "at least 1"),
        (("validation.num_times=101", "validation.fraction=0.1"), "no more than 100"),
        (("validation.scales=[1,1.0000001]",), "the same scale twice"),
        (("previews.scales=[1,1]",), "the same scale twice"),
        (("validation.secnds=3",), "did you mean validation.seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(typed, message):
    with pytest.raises(UserError, match=message):
        train_config(*typed)


# the numbers


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint_dir, dataset_dir) -> Path:
    """A run of three epochs on two songs, with two held out, evaluated after every epoch."""
    folder = tmp_path_factory.mktemp("validation") / "run"
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    loss = run_training(
        folder, *places, *HELD_OUT, "adapter.dropout=0.1", "validation.every_epochs=1", "max_epochs=3",
        "save_every_epochs=1", "vram_profile.batch_size=2",
    )  # fmt: skip
    (folder / "returned.txt").write_text(repr(loss))
    return folder


def test_the_loss_is_what_the_saved_adapter_gives_by_hand(run, checkpoint_dir, dataset_dir):
    """Each held-out song alone, at each time, with the noise that its content decides."""
    checkpoint = find_checkpoint(checkpoint_dir, train_config().model_variant)
    silence = checkpoint.silence()
    dataset = SongDataset(dataset_dir, max_seconds=30, seed=0)

    def by_hand(transformer) -> list[float]:
        transformer.eval()
        sums = [0.0, 0.0, 0.0]
        for number in (1, 2):
            name = content_id(dataset.songs[number])
            length = dataset.songs[number].num_frames // 2 * 2  # the songs are shorter than an excerpt may be
            start = derive_seed(0, f"validation excerpt {name}") % (dataset.songs[number].num_frames - length + 1)
            example = dataset.excerpt(number, start, length)
            context = context_latents(silence, length)[None]
            for k, time in enumerate((1 / 6, 1 / 2, 5 / 6)):
                draw = torch.Generator().manual_seed(derive_seed(0, f"validation noise {name}", k))
                noise = torch.randn(example.latents.shape, generator=draw)[None]
                t = torch.tensor([time])
                noisy, velocity = noisy_latents_and_velocity(example.latents[None], noise, t)
                with torch.no_grad():
                    given = transformer(noisy, t, t, example.condition[None], context, return_dict=False)[0]
                sums[k] += (given - velocity).square().mean().item() / 2
        return sums

    last = read_evaluations(run)[-1]
    assert last["base_losses"] == pytest.approx(BASE_LOSSES, rel=1e-4)
    transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
    assert last["base_losses"] == pytest.approx(by_hand(transformer), rel=1e-4)
    attach_saved(transformer, run / "final")
    assert last["losses"] == pytest.approx(by_hand(transformer), rel=1e-4)
    assert last["loss"] == pytest.approx(sum(last["losses"]) / 3)
    assert last["difference"] == pytest.approx(last["loss"] - last["base_loss"])


def test_a_run_evaluates_every_epoch_and_keeps_its_best_adapter(run):
    rows = read_evaluations(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    best = min(rows, key=lambda row: row["loss"])
    record = json.loads((run / "run.json").read_text())["validation"]
    assert record["best_train_loss"] == best["train_loss"]
    assert record["best_loss"] == best["loss"] == float((run / "returned.txt").read_text())
    assert record["best_step"] == best["step"]
    assert record["hash"] == best["hash"]
    assert list(record["scales"]) == ["0.5", "1"]
    assert record["scales"]["1"] == pytest.approx(best["loss"], rel=1e-5)
    kept = run / f"checkpoints/epoch_{best['step']}"
    torch.testing.assert_close(weights(run / "best"), weights(kept), rtol=0, atol=0)
    assert all(row["drift"] > 0 for row in rows)
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [1, 2, 3]
    assert "validation_by_time/0.500" in events.Tags()["scalars"]


def test_evaluating_more_often_changes_no_weight(run, tmp_path, places):
    run_training(
        tmp_path / "rarely", *places, *HELD_OUT, "adapter.dropout=0.1", "validation.every_epochs=50", "max_epochs=3",
        "save_every_epochs=1", "vram_profile.batch_size=2",
    )  # fmt: skip
    assert [row["step"] for row in read_evaluations(tmp_path / "rarely")] == [3]
    torch.testing.assert_close(weights(tmp_path / "rarely/final"), weights(run / "final"), rtol=0, atol=0)


def test_other_seeds_and_batches_see_the_same_songs_and_another_grid_does_not(run, tmp_path, places):
    first = read_evaluations(run)[0]
    run_training(tmp_path / "a", *places, *HELD_OUT, "seed=9", "vram_profile.batch_size=1", "max_epochs=1")
    other = read_evaluations(tmp_path / "a")[0]
    assert other["hash"] == first["hash"]
    assert other["base_loss"] == pytest.approx(first["base_loss"], rel=1e-6)
    assert other["loss"] != first["loss"]
    run_training(tmp_path / "b", *places, *HELD_OUT, "validation.num_times=2", "max_epochs=1")
    assert read_evaluations(tmp_path / "b")[0]["hash"] != first["hash"]


def test_a_run_that_goes_on_remembers_its_best(run, tmp_path, places, caplog):
    settings = (
        *places, *HELD_OUT, "adapter.dropout=0.1", "validation.every_epochs=1", "save_every_epochs=1",
        "vram_profile.batch_size=2",
    )  # fmt: skip
    run_training(tmp_path / "run", *settings, "max_epochs=2")
    caplog.clear()
    loss = run_training(tmp_path / "run", *settings, "max_epochs=3")
    assert "evaluating the base model" not in caplog.text  # it was when the run began
    assert read_evaluations(tmp_path / "run") == read_evaluations(run)
    assert loss == float((run / "returned.txt").read_text())
    assert run_training(tmp_path / "run", *settings, "max_epochs=3") == loss


IMPATIENT = (
    *HELD_OUT, "optim.lr=0.5", "validation.every_epochs=1", "max_epochs=50", "save_every_epochs=null",
    "validation.patience=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def ended_early(tmp_path_factory, checkpoint_dir, dataset_dir) -> Path:
    folder = tmp_path_factory.mktemp("early") / "run"
    run_training(folder, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", *IMPATIENT)
    return folder


def test_a_run_without_improvement_ends_early_and_stays_ended(ended_early, places, caplog):
    rows = read_evaluations(ended_early)
    record = json.loads((ended_early / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["step"] == rows[-1]["step"] == rows[-2]["step"] + 2 < 100
    assert min(rows, key=lambda row: row["loss"]) == rows[-2]
    caplog.set_level("INFO")
    assert run_training(ended_early, *places, *IMPATIENT) == rows[-2]["loss"]
    assert "raise validation.patience to train on" in caplog.text
    assert "previews" not in caplog.text
    run_training(ended_early, *places, *IMPATIENT, "previews.every_epochs=1", "previews.prompts=[piano]")
    assert "previews not made for a finished run" in caplog.text


def test_other_settings_of_validation_choose_among_what_is_left_of_a_run_and_train_no_step(
    ended_early, tmp_path, places
):
    folder = tmp_path / "run"
    shutil.copytree(ended_early, folder)
    before, record = read_evaluations(folder), json.loads((folder / "run.json").read_text())
    loss = run_training(folder, *places, *IMPATIENT, "validation.num_times=4")
    after = json.loads((folder / "run.json").read_text())
    rows = [row for row in read_evaluations(folder) if row["hash"] == after["validation"]["hash"]]
    assert after["step"] == record["step"]
    assert [row["step"] for row in rows] == [record["validation"]["best_step"], record["step"]]
    assert loss == min(row["loss"] for row in rows) == after["validation"]["best_loss"]
    assert saved_step(folder / "best") == after["validation"]["best_step"]
    torch.testing.assert_close(weights(folder / "final"), weights(ended_early / "final"), rtol=0, atol=0)

    assert run_training(folder, *places, *IMPATIENT) == record["validation"]["best_loss"]
    assert [row for row in read_evaluations(folder) if row["hash"] == record["validation"]["hash"]] == before


def test_a_run_that_goes_on_without_its_best_adapter_is_as_patient_as_before(tmp_path, places, monkeypatch):
    """It is evaluated at steps 2 and 4, saved at step 3, and killed; the adapter of step 2 is nowhere then."""
    settings = (
        *places, *HELD_OUT, "vram_profile.batch_size=2", "validation.every_epochs=2", "save_every_epochs=3",
        "validation.patience=1", "max_epochs=6", "validation.scales=[1]",
    )  # fmt: skip
    expected = run_training(tmp_path / "unbroken", *settings)
    save = Run.save_checkpoint

    def save_or_die(run, step, *arguments, **options):
        if step == 6:
            raise OSError("killed")
        save(run, step, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_checkpoint", save_or_die)
        with pytest.raises(OSError, match="killed"):
            run_training(tmp_path / "run", *settings)
    assert saved_step(tmp_path / "run/best") == 4
    assert run_training(tmp_path / "run", *settings) == expected
    assert read_evaluations(tmp_path / "run") == read_evaluations(tmp_path / "unbroken")
    torch.testing.assert_close(weights(tmp_path / "run/final"), weights(tmp_path / "unbroken/final"), rtol=0, atol=0)


EVERY_EPOCH = (
    *HELD_OUT, "adapter.dropout=0.1", "validation.every_epochs=1", "save_every_epochs=1", "vram_profile.batch_size=2",
)  # fmt: skip
"""The settings of ``run``, but for how long it is."""


def opened(folder: Path, *typed: str) -> Run:
    return open_run(train_config(*typed), folder, choices_of(*typed))


def test_what_decides_the_losses_decides_the_hash_and_nothing_else_does(tmp_path, places):
    run = opened(tmp_path, *places, *HELD_OUT)
    validation, memory, record = run.config.validation, run.memory, run.record

    def hash_with(**changes) -> str:
        return dataclasses.replace(run, **changes).validation_hash()

    decide = [
        {"precision": "bf16"},
        {"memory": dataclasses.replace(memory, base_quantization="int8")},
        {"null_condition": run.null_condition + 1},
        {"record": dataclasses.replace(record, model={**record.model, "constants": "another silence"})},
        {"record": dataclasses.replace(record, model={**record.model, "fingerprint": "other weights"})},
        {"config": dataclasses.replace(run.config, validation=dataclasses.replace(validation, seconds=1))},
        {"config": dataclasses.replace(run.config, validation=dataclasses.replace(validation, num_times=2))},
        {"evaluated": [1]},
    ]
    assert len({run.validation_hash(), *(hash_with(**changes) for changes in decide)}) == 1 + len(decide)
    assert hash_with(config=dataclasses.replace(run.config, seed=9)) == run.validation_hash()
    assert hash_with(memory=dataclasses.replace(memory, batch_size=7, max_seconds=1)) == run.validation_hash()


def test_no_more_than_max_songs_are_evaluated_and_adding_songs_keeps_most_of_them():
    songs = songs_named(*(f"song{i}" for i in range(400)))
    few, many = ({songs[number].audio for number in lowest_places(songs, range(count), 20)} for count in (380, 400))
    assert len(few) == len(many) == 20
    assert len(few & many) > 15
    assert lowest_places(songs, [3, 1, 2], None) == [1, 2, 3]


def test_going_back_sets_aside_all_that_came_later(run, tmp_path, places):
    """So that best/ is the adapter that run.json speaks of, and no music of another future is left."""
    shutil.copytree(run, tmp_path / "run")
    later = tmp_path / "run/previews/step_3"
    later.mkdir(parents=True)
    assert saved_step(run / "best") == 3
    before = json.loads((run / "run.json").read_text())
    back = f"resume_from={tmp_path / 'run/checkpoints/epoch_1'}"
    loss = run_training(tmp_path / "run", *places, *EVERY_EPOCH, "max_epochs=2", back)

    (aside,) = (tmp_path / "run/set_aside").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == ["best", "epoch_2", "epoch_3", "previews"]
    assert not later.exists()
    record = json.loads((tmp_path / "run/run.json").read_text())
    rows = read_evaluations(tmp_path / "run")
    assert rows == read_evaluations(run)[:2]
    assert loss == record["validation"]["best_loss"] == min(row["loss"] for row in rows)
    assert saved_step(tmp_path / "run/best") == record["validation"]["best_step"]
    assert record["run_id"] != before["run_id"]


def test_the_best_adapter_is_taken_from_its_checkpoint_where_best_is_another(run, tmp_path, places):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    again = opened(folder, *places, *EVERY_EPOCH, "max_epochs=4")
    assert again.restore_best([3, 2]) == 3
    assert not (folder / "set_aside").exists()

    assert again.restore_best([2, 1]) == 2
    assert saved_step(folder / "best") == 2
    assert sorted(path.name for path in (folder / "best").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    torch.testing.assert_close(weights(folder / "best"), weights(run / "checkpoints/epoch_2"), rtol=0, atol=0)
    assert saved_step(folder / "set_aside/best_step_3") == 3
    assert again.restore_best([3, 2]) == 3
    torch.testing.assert_close(weights(folder / "best"), weights(run / "best"), rtol=0, atol=0)
    assert again.restore_best([2]) == 2

    shutil.rmtree(folder / "best")
    assert again.restore_best([9]) == 0


def test_a_signal_during_an_evaluation_stops_it_and_it_is_made_when_the_run_goes_on(run, tmp_path, places, monkeypatch):
    settings = (*places, *EVERY_EPOCH, "max_epochs=3", "save_every_epochs=null")
    evaluate, calls = Validation._song_losses, []

    def stop_at_the_seventh(*arguments):
        calls.append(arguments)
        if len(calls) == 7:  # four are of the base model, two of step 1
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(Validation, "_song_losses", stop_at_the_seventh)
    with pytest.raises(Interrupted):
        run_training(tmp_path / "run", *settings)
    assert len(calls) == 7
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_1"]
    assert read_evaluations(tmp_path / "run") == []

    assert run_training(tmp_path / "run", *settings) == float((run / "returned.txt").read_text())
    assert read_evaluations(tmp_path / "run") == read_evaluations(run)


def test_a_finished_run_is_evaluated_again_when_validation_changes_but_never_on_songs_it_learnt(run, tmp_path, places):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = (*places, *EVERY_EPOCH, "max_epochs=3")
    run_training(folder, *settings, "validation.scales=[2]")
    assert list(json.loads((folder / "run.json").read_text())["validation"]["scales"]) == ["2"]
    assert read_evaluations(folder) == read_evaluations(run)

    run_training(folder, *settings, "validation.num_times=2")
    record = json.loads((folder / "run.json").read_text())["validation"]
    assert record["hash"] == read_evaluations(folder)[-1]["hash"] != read_evaluations(run)[-1]["hash"]
    assert saved_step(folder / "best") == record["best_step"] == 1  # among the three checkpoints, though 3 was in best/
    assert saved_step(folder / "set_aside/best_step_3") == 3

    with pytest.raises(
        UserError, match=r"validation\.songs=\[song1\.wav,song2\.wav\], and \[song3\.wav\] would train on other songs"
    ):
        run_training(folder, *settings, "validation.songs=[song3.wav]")


def test_the_verdict_tells_learning_by_heart_from_diverging():
    last = Evaluation(
        step=9, epoch=9, hash="", num_songs=2, loss=1.2, base_loss=1.1, difference=0.1, difference_error=0.0,
        times=[], losses=[], base_losses=[], train_loss=0.8, train_base_loss=1.0, drift=0.1, ema_loss=None,
    )  # fmt: skip
    said = verdict(last, 4, 1.0, {0.5: 1.05, 1.0: 1.0})
    assert said[0].startswith("best/ is step 4")
    assert "by heart" in said[1]
    assert "of the scales tried on best/, 1 has" in said[2]
    assert "of the scales tried on best/, 1 has" in verdict(last, 4, 1.0, {2.0: math.nan, 1.0: 1.0})[2]
    diverged = dataclasses.replace(last, loss=math.nan, train_loss=7.0)
    assert "training diverged; use a lower optim.lr" in verdict(diverged, 4, 1.0, {})[1]
    assert "use a lower optim.lr" in verdict(diverged, 4, 1.1, {})[0]
    assert verdict(diverged, 0, math.inf, {}) == [
        "no evaluation gave a finite loss, so there is no best/; use a lower optim.lr"
    ]


def test_settings_without_effect_are_named():
    config = train_config("validation.num_times=3", "previews.seconds=5")
    assert config.validation.without_effect() == [
        "validation.num_times has no effect without held-out songs; type validation.fraction=0.1"
    ]
    assert config.previews.without_effect() == ["previews.seconds has no effect without previews.every_epochs=10"]
    assert train_config().validation.without_effect() == train_config().previews.without_effect() == []


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, tmp_path, checkpoint_dir, dataset_dir):
    """And one of them renders while the other waits."""
    settings = [
        "previews.every_epochs=1", "previews.prompts=[piano]", "previews.seconds=1", "previews.num_inference_steps=1",
        "name=ddp", "model_variant=base", "device=cpu", "adapter.rank=4", "adapter.dropout=0.1", "optim.lr=0.01",
        f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", *HELD_OUT, "validation.every_epochs=1",
        "max_epochs=1", "vram_profile.batch_size=1", "vram_profile.max_seconds=2", "schedule.warmup_steps=2",
        "vram_profile.gradient_checkpointing=none", "vram_profile.gradient_accumulation_steps=1",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sidestep.train"]
    done = subprocess.run(
        [sys.executable, *launcher, *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/ddp/*")
    assert sorted(path.name for path in (folder / "previews").iterdir()) == ["base", "step_1"]
    (row,) = read_evaluations(folder)
    scales = json.loads((folder / "run.json").read_text())["validation"]["scales"]
    assert scales["1"] == pytest.approx(row["loss"], rel=1e-5)
    assert row["base_loss"] == pytest.approx(read_evaluations(run)[0]["base_loss"], rel=1e-6)
    assert row["hash"] == read_evaluations(run)[0]["hash"]


def test_without_held_out_songs_nothing_is_evaluated(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=null", "max_steps=1")
    assert not (tmp_path / "run/validation.jsonl").exists()
    assert not (tmp_path / "run/best").exists()


def test_the_mean_of_the_weights_is_kept_evaluated_and_saved_without_touching_training(run, tmp_path, places):
    """Over a stop in the middle, against the mean of the checkpoints' weights taken by hand."""
    settings = (
        *places, *HELD_OUT, "adapter.dropout=0.1", "validation.every_epochs=3", "save_every_epochs=1",
        "vram_profile.batch_size=2", "ema_decay=0.2",
    )  # fmt: skip
    run_training(tmp_path / "run", *settings, "max_epochs=2")
    run_training(tmp_path / "run", *settings, "max_epochs=3")
    torch.testing.assert_close(weights(tmp_path / "run/final"), weights(run / "final"), rtol=0, atol=0)

    states = [torch.load(run / f"checkpoints/epoch_{n}/training_state.pt", weights_only=True) for n in (1, 2, 3)]
    kept = torch.load(tmp_path / "run/checkpoints/epoch_3/training_state.pt", weights_only=True)["ema"]
    key = next(key for key in kept if key.endswith("lora_B.weight"))
    first, second, third = (state["adapter"][key] for state in states)
    before = torch.load(tmp_path / "run/checkpoints/epoch_1/training_state.pt", weights_only=True)["ema"][key]
    assert not torch.equal(before, first)
    expected = 0.2 * (0.2 * before + 0.8 * second) + 0.8 * third
    torch.testing.assert_close(kept[key], expected)
    assert not torch.equal(weights(tmp_path / "run/final_ema")[f"base_model.model.{key}"], third)
    assert read_evaluations(tmp_path / "run")[-1]["ema_loss"] != read_evaluations(tmp_path / "run")[-1]["loss"]


def test_rows_of_another_version_are_passed_over_with_one_warning(tmp_path, caplog):
    (tmp_path / "validation.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    assert _read_rows(tmp_path) == []
    (warning,) = caplog.messages
    assert warning.startswith(f"2 rows of {tmp_path / 'validation.jsonl'} are not as this version writes them")
