"""Sweeps: one folder per point, a table that is always there, and what the same command does the second time."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.errors import UserError
from sidestep.reporting.runs import Plan, PlannedPoint, PointRecord, as_table, collect_points, read_point
from sidestep.times import now
from tests.forked import run, start

QUICK = [
    "model_variant=base", "device=cpu", "optim.lr=0.01", "max_epochs=null", "log_every_steps=1", "name=s",
    "vram_profile.batch_size=1", "vram_profile.gradient_accumulation_steps=1",
    "vram_profile.gradient_checkpointing=none", "vram_profile.max_seconds=2",
]  # fmt: skip


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> list[str]:
    return [f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", *QUICK]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (run_dir / "final").glob("*.safetensors")
    return load_file(path)


def status_by(sweep_dir: Path, *keys: str) -> dict[str, str]:
    return {" ".join(point.settings[key] for key in keys): point.status for point in collect_points(sweep_dir)}


def test_a_sweep_ends_with_a_table_and_exit_code_1_if_a_point_failed(tmp_path, places):
    """Two points have a bad setting, one goes to infinity; the fourth finishes, and every error is in its own log."""
    code, text = run(tmp_path, "-m", *places, "max_steps=8", "adapter.rank=2,0", "optim.lr=0.01,1e37")
    assert code == 1
    sweep = tmp_path / "outputs/s"
    status = {"2 0.01": "finished", "2 1e+37": "failed", "0 0.01": "failed", "0 1e+37": "failed"}
    assert status_by(sweep, "adapter.rank", "optim.lr") == status
    assert "1 finished, 3 failed" in text
    assert text.count("failed: adapter.rank=0 must be at least 1") == 2
    assert "failed: 5 steps in a row" in text
    assert "Traceback" not in text

    points = {(point.settings["adapter.rank"], point.settings["optim.lr"]): point for point in collect_points(sweep)}
    best, broken = points["2", "0.01"], points["2", "1e+37"]
    assert "5 steps in a row" in (sweep / broken.name / "train.log").read_text()
    assert "5 steps in a row" not in (sweep / best.name / "train.log").read_text()
    assert best.objective == json.loads((sweep / best.name / "run.json").read_text())["smoothed_loss"]
    assert (best.step, best.num_steps) == (8, 8)
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    assert {f"{row['adapter.rank']} {row['optim.lr']}": row["status"] for row in rows} == status
    assert [row["point"] for row in json.loads((sweep / "sweep.json").read_text())] == [row["point"] for row in rows]


def test_killed_in_the_middle_and_typed_again_a_sweep_finishes_the_rest_only(tmp_path, places):
    """SIGKILL while the second of two points trains; a third is added the second time."""
    typed = ["-m", *places, "save_every_steps=5", "max_steps=12"]
    killed = start(tmp_path, *typed, "adapter=lora,lokr", "adapter.rank=2")
    sweep = tmp_path / "outputs/s"
    while not list(sweep.glob("lokr*/checkpoints/step_5")):
        assert killed.process.is_alive(), killed.text
        time.sleep(0.02)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.finish()
    assert status_by(sweep, "adapter") == {"lora": "finished", "lokr": "interrupted"}
    (finished,) = sweep.glob("lora*/run.json")
    before = finished.read_text()

    code, text = run(tmp_path, *typed, "adapter=loha,lokr,lora", "adapter.rank=2")
    assert code == 0, text
    assert "is finished at step 12; raise max_steps to train on" in text
    assert "/checkpoints/step_5 at step 5" in text
    assert finished.read_text() == before
    assert status_by(sweep, "adapter") == dict.fromkeys(("lora", "lokr", "loha"), "finished")


def test_points_in_one_process_end_as_if_each_had_one_of_its_own(tmp_path, places, monkeypatch):
    """LyCORIS, PEFT and Accelerate keep things from one run to the next; none of it may reach the next point.

    The base model is read once for each precision that follows another.
    """
    read = Checkpoint._read

    def and_say_so(self, part, *arguments):
        print("reading the", part)
        return read(self, part, *arguments)

    monkeypatch.setattr(Checkpoint, "_read", and_say_so)
    typed = [*places, "max_steps=3", "save_every_epochs=null"]
    code, text = run(tmp_path, "-m", *typed, "precision=bf16,fp32", "adapter=lokr,dora")
    assert code == 0, text
    assert text.count("reading the transformer") == 2
    points = [point for point in collect_points(tmp_path / "outputs/s") if point.settings["precision"] == "fp32"]
    assert len(points) == 2
    for point in points:  # which came after two others
        overrides = read_point(tmp_path / "outputs/s" / point.name).overrides
        (tmp_path / "alone").mkdir(exist_ok=True)
        code, text = run(tmp_path / "alone", *overrides)
        assert code == 0, text
        expected = final_weights(tmp_path / "alone/outputs/s" / point.name)
        torch.testing.assert_close(final_weights(tmp_path / "outputs/s" / point.name), expected, rtol=0, atol=0)


def test_a_point_that_another_process_is_training_is_left_alone(tmp_path, places):
    sweep = tmp_path / "outputs/s"
    code, _ = run(tmp_path, "-m", *places, "max_steps=-1")
    assert code == 1
    (folder,) = (path.parent for path in sweep.glob("*/point.json"))
    busy = PointRecord(overrides=["max_steps=1"], started=now(), host=socket.gethostname(), process=os.getpid())
    busy.write(folder)
    code, text = run(tmp_path, "-m", *places, "max_steps=-1")
    assert code == 1
    assert f"is being trained by process {os.getpid()} on {socket.gethostname()}" in text
    assert read_point(folder) == busy


def test_points_that_were_not_begun_are_in_the_table_too(tmp_path):
    (tmp_path / "a").mkdir()
    PointRecord(overrides=["seed=1"], status="finished", objective=0.5, seconds=90).write(tmp_path / "a")
    points = [PlannedPoint(overrides=["seed=1"]), PlannedPoint(overrides=["seed=2"])]
    Plan(launched="2026-11-22T10:00:00Z", points=points).write(tmp_path)
    rows = collect_points(tmp_path)
    assert [(row.name, row.status) for row in rows] == [("a", "finished"), ("", "waiting")]
    table = as_table(rows, tmp_path).splitlines()
    assert table[1].split() == ["a", "finished", "0.5000", "2", "min"]
    assert table[2].split() == ["seed=2", "waiting"]
    assert table[-1] == "1 finished, 1 waiting"


def test_of_many_points_the_terminal_shows_the_best_and_counts_the_rest(tmp_path):
    for number in range(60):
        folder = tmp_path / f"seed{number}"
        folder.mkdir()
        PointRecord(overrides=[f"seed={number}"], status="finished", objective=100.0 - number).write(folder)
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["seed59", "seed58", "seed57"]
    assert "50 more" in lines[-2]
    assert lines[-1] == "60 finished"


def test_points_that_were_evaluated_differently_are_not_ranked(tmp_path):
    for name, objective, evaluated in (("a", 2.0, "one"), ("b", 1.0, "other")):
        folder = tmp_path / name
        folder.mkdir()
        PointRecord(overrides=[f"seed={objective}"], status="finished", objective=objective).write(folder)
        measured = {"hash": evaluated, "best_loss": objective}
        (folder / "run.json").write_text(json.dumps({"status": "finished", "validation": measured}))
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a", "b"]
    assert "evaluated in 2 ways" in lines[-2]


def test_a_folder_that_is_no_sweep_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no sweep \(it is empty\)"):
        collect_points(tmp_path)
