"""Runs that are stopped, killed and refused, as real processes."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep.errors import UserError
from sidestep.files import alone_in
from sidestep.training.state import load_checkpoint
from tests.factories import run_training
from tests.processes import Command, at_call, die, fail, sleep_long

TRAIN = [
    "train",
    "name=kill",
    "model_variant=base",
    "device=cpu",
    "adapter.rank=2",
    "optim.lr=0.01",
    "log_every_steps=1",
    "vram_profile.batch_size=1",
    "vram_profile.gradient_accumulation_steps=2",
    "vram_profile.gradient_checkpointing=none",
    "vram_profile.max_seconds=2",
    "save_every_epochs=null",
]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "final").glob("*.safetensors")
    return load_file(path)


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> list[str]:
    return [f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder that commands are typed in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run_of(work: Path) -> Path:
    (run,) = (work / "outputs/kill").iterdir()
    return run


def train_undisturbed(folder: Path, *settings: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    whole = Command(folder, *TRAIN, *settings)
    assert whole.wait() == 0, whole.said
    return final_weights(run_of(folder))


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"))],
)
def test_a_signal_saves_and_stops_and_the_same_command_ends_as_if_nothing_had_happened(work, places, name):
    number = signal.Signals[name]
    stopped = Command(work, *TRAIN, *places, "max_epochs=null", "max_steps=300")
    assert stopped.wait_for("step 3 of"), stopped.said
    stopped.send(number)
    assert stopped.wait() == 128 + number, stopped.said
    assert f"stopped by {name}" in stopped.said
    run = run_of(work)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{load_checkpoint(checkpoint).step}"
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"

    length = ["max_epochs=null", f"max_steps={load_checkpoint(checkpoint).step + 2}"]
    resumed = Command(work, *TRAIN, *places, *length)
    assert resumed.wait() == 0, resumed.said
    assert f"continuing from {run.relative_to(work)}/checkpoints/{checkpoint.name}" in resumed.said
    expected = train_undisturbed(work.with_name("whole"), *places, *length)
    torch.testing.assert_close(final_weights(run), expected, rtol=0, atol=0)


def test_a_second_sigint_stops_at_once_and_without_a_traceback(work, places):
    """The first waits for the end of a micro-batch, which here takes ten minutes."""
    endless = partial(at_call, "sidestep.training.forward.Forward.__call__", 7, sleep_long)
    stopped = Command(work, *TRAIN, *places, "max_epochs=5", "save_every_steps=1", first=endless)
    assert stopped.wait_for("checkpoints/step_3"), stopped.said
    stopped.send(signal.SIGINT)
    assert stopped.wait_for("SIGINT: saving"), stopped.said
    stopped.send(signal.SIGINT)
    assert stopped.wait() == 128 + signal.SIGINT, stopped.said
    assert stopped.said.splitlines()[-1] == "stopped; the same command goes on from what is on disk"
    assert load_checkpoint(run_of(work) / "checkpoints/step_3").step == 3


def test_a_fault_of_our_own_keeps_its_traceback_on_the_terminal_and_in_the_log_and_names_the_folder(work, places):
    broken = partial(at_call, "sidestep.training.forward.Forward.__call__", 7, fail)
    failed = Command(work, *TRAIN, *places, "max_epochs=5", "save_every_steps=1", first=broken)
    assert failed.wait() == 1
    run = run_of(work)
    for text in (failed.said, (run / "train.log").read_text()):
        assert text.count("Traceback (most recent call last)") == 1
        assert "ZeroDivisionError: made by a test" in text
        assert f"a fault of sidestep, please report it; the folder is {run}" in text
    assert "ZeroDivisionError" in json.loads((run / "run.json").read_text())["error"]
    again = Command(work, *TRAIN, *places, "max_epochs=5", "save_every_steps=1")
    assert again.wait() == 0, again.said
    assert "continuing from" in again.said


def test_a_second_process_on_the_same_run_is_refused_with_the_firsts_host_and_number(work, places):
    first = Command(work, *TRAIN, *places, "max_epochs=10000")
    assert first.wait_for("step 2 of"), first.said
    second = Command(work, *TRAIN, *places, "max_epochs=10000")
    assert second.wait() == 1
    assert first.kill()
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in second.said.splitlines()[-1]

    third = Command(work, *TRAIN, *places, "max_epochs=1")
    assert third.wait() == 0, third.said  # the lock of the killed process does not block


def test_a_folder_is_free_again_when_its_owner_leaves(tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match=r"in use by process \d+ on"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_only_the_newest_checkpoints_are_kept_if_asked_and_those_at_round_numbers(tmp_path, places):
    (tmp_path / "run/best").mkdir(parents=True)
    run_training(tmp_path / "run", *places, "max_epochs=7", "save_every_epochs=1", "keep_last=2", "keep_every=3")
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["epoch_3", "epoch_6", "epoch_7"]
    assert (tmp_path / "run/best").is_dir()


@pytest.mark.parametrize("gradient", ["infinite", "finite"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, places, monkeypatch, caplog, gradient):
    """One loss is made infinite; the weights after that step are those before it, and the run goes on."""
    from sidestep.training.flow import VelocityLoss

    loss, calls = VelocityLoss.loss, []

    def broken_once(self, *arguments):
        calls.append(None)
        right = loss(self, *arguments)
        if len(calls) != 3:
            return right
        return right * float("inf") if gradient == "infinite" else right + float("inf")

    monkeypatch.setattr(VelocityLoss, "loss", broken_once)
    run_training(tmp_path / "run", *places, "max_epochs=null", "max_steps=4", "save_every_steps=1")
    states = [load_checkpoint(tmp_path / f"run/checkpoints/{name}") for name in ("step_2", "step_3", "epoch_1")]
    torch.testing.assert_close(states[1].adapter, states[0].adapter, rtol=0, atol=0)
    torch.testing.assert_close(states[1].optimizer["state"], states[0].optimizer["state"], rtol=0, atol=0)
    assert any(not torch.equal(states[2].adapter[key], states[1].adapter[key]) for key in states[1].adapter)
    assert "step 3: loss inf" in caplog.text


def test_after_too_many_bad_steps_the_last_good_state_is_saved_and_the_cause_named(tmp_path, places):
    with pytest.raises(UserError) as raised:
        run_training(tmp_path / "run", *places, "max_epochs=50", "optim.lr=1e37", "optim.max_grad_norm=1e38")
    message = str(raised.value)
    assert "5 steps in a row" in message
    assert "the songs were song" in message
    assert "at t=0." in message
    assert "layers.0.self_attn" in message
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.name == "step_1"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] is None
    assert not (tmp_path / "run/final").exists()


def test_a_loss_that_overflows_alone_is_told_from_gradients_that_do(tmp_path, places, monkeypatch):
    from sidestep.training.flow import VelocityLoss

    loss = VelocityLoss.loss
    monkeypatch.setattr(VelocityLoss, "loss", lambda *arguments: loss(*arguments) + float("inf"))
    with pytest.raises(UserError, match=r"5 steps in a row, .*; it arises in the loss; "):
        run_training(tmp_path / "run", *places, "max_epochs=50")


MOMENTS = ("training ", "step ", "saved ", "saved ", "all ", "finished ")
"""Lines after which a process is killed: loading, stepping, writing a checkpoint or rotating them, writing final/."""


@pytest.mark.parametrize(
    ("adapter", "num_kills"),
    [("lokr", 2), ("lora", 2), *(pytest.param(name, 30, marks=pytest.mark.slow) for name in ("lokr", "lora", "dora"))],
)
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(work, places, record_property, adapter, num_kills):
    """Each command is the same; one that ends before it can be killed has nothing left to do, and all begins anew."""
    settings = [*places, f"adapter={adapter}", "max_epochs=null", "max_steps=24", "save_every_steps=2", "keep_last=2"]
    expected = train_undisturbed(work.with_name("whole"), *settings)

    chance = random.Random(f"{adapter} {num_kills}")
    num_killed = 0
    while num_killed < num_kills:
        process = Command(work, *TRAIN, *settings)
        moment = chance.choice(MOMENTS)
        process.wait_for(moment)
        time.sleep(chance.random() * 0.05)
        if process.kill():
            num_killed += 1
            record_property("killed", num_killed)
        else:
            assert process.wait() == 0, process.said
            torch.testing.assert_close(final_weights(run_of(work)), expected, rtol=0, atol=0)
            shutil.rmtree(work / "outputs")
    last = Command(work, *TRAIN, *settings)
    assert last.wait() == 0, last.said
    run = run_of(work)
    torch.testing.assert_close(final_weights(run), expected, rtol=0, atol=0)
    assert not list(run.rglob(".*partial*"))


@pytest.mark.parametrize(
    ("function", "every"),
    [("os.replace", 4), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("os.replace", "os.fsync"))],
)
def test_killed_at_one_write_after_another_a_run_ends_with_the_same_weights(
    work, places, record_property, function, every
):
    """SIGKILL from inside, before the first, second, ... file is flushed or gets its name, in run after run."""
    settings = [*places, "adapter=lokr", "max_epochs=null", "max_steps=6", "save_every_steps=1", "keep_last=2"]
    expected = train_undisturbed(work.with_name("whole"), *settings)
    for number in itertools.count(1, every):
        process = Command(work, *TRAIN, *settings, first=partial(at_call, function, number, die))
        if process.wait() != -signal.SIGKILL:
            break
        record_property("killed", number)
    assert process.wait() == 0, process.said
    assert number > 3
    torch.testing.assert_close(final_weights(run_of(work)), expected, rtol=0, atol=0)
    assert not list(run_of(work).rglob(".*partial*"))
