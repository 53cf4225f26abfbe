"""Runs that are stopped, killed and refused, as real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep.errors import UserError
from sidestep.files import alone_in
from sidestep.training.state import load_checkpoint
from tests.factories import run_training

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
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


def start(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sidestep.train", *QUICK, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(process: subprocess.Popen[str], words: str, lines: list[str]) -> None:
    """Read the log until a line says it."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)}")


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "final").glob("*.safetensors")
    return load_file(path)


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> list[str]:
    return [f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "name=kill"]


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1", "SIGUSR2"))]
)
def test_a_signal_saves_and_stops_and_the_same_command_ends_as_if_nothing_had_happened(tmp_path, places, name):
    length = ["max_epochs=null", "max_steps=300"]
    stopped = start(tmp_path, *places, *length)
    lines: list[str] = []
    wait_for(stopped, "step 5 of", lines)
    stopped.send_signal(getattr(signal, name))
    _, rest = stopped.communicate()
    assert stopped.returncode == 128 + getattr(signal, name), rest
    assert f"stopped by {name}" in rest
    run = next((tmp_path / "outputs/kill").iterdir())
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{load_checkpoint(checkpoint).step}"
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"

    length = ["max_epochs=null", f"max_steps={load_checkpoint(checkpoint).step + 5}"]
    resumed = start(tmp_path, *places, *length)
    _, log = resumed.communicate()
    assert resumed.returncode == 0, log
    assert f"continuing from {run.relative_to(tmp_path)}/checkpoints/{checkpoint.name}" in log
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole", *places, *length)
    assert whole.wait() == 0
    whole.communicate()
    expected = final_weights(next((tmp_path / "whole/outputs/kill").iterdir()))
    torch.testing.assert_close(final_weights(run), expected, rtol=0, atol=0)


def test_a_second_process_on_the_same_run_is_refused_with_the_firsts_host_and_number(tmp_path, places):
    first = start(tmp_path, *places, "max_epochs=10000")
    wait_for(first, "step 2 of", [])
    second = start(tmp_path, *places, "max_epochs=10000")
    _, log = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in log.splitlines()[-1]

    third = start(tmp_path, *places, "max_epochs=1")
    assert third.wait() == 0, third.communicate()[1]  # the lock of the killed process does not block
    third.communicate()


def test_a_folder_is_free_again_when_its_owner_leaves(tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match=r"in use by process \d+ on"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_only_the_newest_checkpoints_are_kept_if_asked_and_those_at_round_numbers(tmp_path, places):
    where = tuple(places[:2])
    run_training(tmp_path / "run", *where, "max_epochs=7", "save_every_epochs=1", "keep_last=2", "keep_every=3")
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["epoch_3", "epoch_6", "epoch_7"]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, places, monkeypatch, caplog):
    """One loss is made infinite; the weights after that step are those before it, and the run goes on."""
    from sidestep.training.flow import VelocityLoss

    loss, calls = VelocityLoss.loss, []

    def broken_once(self, *arguments):
        calls.append(None)
        return loss(self, *arguments) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(VelocityLoss, "loss", broken_once)
    run_training(tmp_path / "run", *places[:2], "max_epochs=null", "max_steps=4", "save_every_steps=1")
    states = [load_checkpoint(tmp_path / f"run/checkpoints/{name}") for name in ("step_2", "step_3", "epoch_1")]
    torch.testing.assert_close(states[1].adapter, states[0].adapter, rtol=0, atol=0)
    torch.testing.assert_close(states[1].optimizer["state"], states[0].optimizer["state"], rtol=0, atol=0)
    assert any(not torch.equal(states[2].adapter[key], states[1].adapter[key]) for key in states[1].adapter)
    assert "step 3: loss inf" in caplog.text


def test_after_too_many_bad_steps_the_last_good_state_is_saved_and_the_cause_named(tmp_path, places):
    with pytest.raises(UserError) as raised:
        run_training(tmp_path / "run", *places[:2], "max_epochs=50", "optim.lr=1e38", "optim.max_grad_norm=1e38")
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


@pytest.mark.parametrize(("adapter", "num_kills"), [("lokr", 3), pytest.param("lora", 25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, places, adapter, num_kills):
    """SIGKILL while loading, training, writing checkpoints and writing final/; the same command again each time."""
    settings = [*places, f"adapter={adapter}", "max_epochs=null", "max_steps=60", "save_every_steps=5"]
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole", *settings)
    assert whole.wait() == 0
    whole.communicate()
    expected = final_weights(next((tmp_path / "whole/outputs/kill").iterdir()))

    chance = random.Random(adapter)
    for _ in range(num_kills):
        process = start(tmp_path, *settings)
        wait_for(process, chance.choice(["step ", "saved ", "training "]), [])
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
    last = start(tmp_path, *settings)
    _, log = last.communicate()
    assert last.returncode == 0, log
    run = next((tmp_path / "outputs/kill").iterdir())
    torch.testing.assert_close(final_weights(run), expected, rtol=0, atol=0)
    assert not list(run.rglob(".*partial*"))


def test_a_full_disk_is_named_and_the_checkpoint_before_it_is_whole(tmp_path, places, monkeypatch):
    settings = (*places[:2], "max_epochs=3", "save_every_epochs=1")
    save = torch.save

    def full(state, path):
        if state["step"] > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoints/epoch_2 cannot be written .*No space left on device"):
        run_training(tmp_path / "run", *settings)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch_1"]
    run_training(tmp_path / "run", *settings)
    run_training(tmp_path / "whole", *settings)
    expected = final_weights(tmp_path / "whole")
    torch.testing.assert_close(final_weights(tmp_path / "run"), expected, rtol=0, atol=0)
