"""Sweeps on a real Slurm cluster, which lasts as long as these tests. Run with make test-slurm.

Two nodes are for most of them; on the third, a run waits for its time limit meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep.acestep.toy import make_toy_songs
from sidestep.cli import run_command
from sidestep.config.settings import TrainConfig
from sidestep.data.manifest import read_manifest
from sidestep.reporting.runs import read_point
from sidestep.train import train_command
from tests.forked import Command
from tests.test_processes import start_group

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"), reason="Slurm is not installed"
    ),
]

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = [
    "cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_process=1", "cluster.memory_gib=2",
    "cluster.time_minutes=5", "cluster.sbatch=['--exclude=mini3']",
]  # fmt: skip
PATIENCE = 120.0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster; gives the environment to run commands in."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    env |= {
        "MINI_SLURM_NODES": "3",
        "MINI_SLURM_DIR": str(tmp_path_factory.mktemp("slurm")),
        "MINI_SLURM_PORT": str(20000 + os.getpid() % 9000),
    }
    script = ["bash", str(ROOT / "tests/mini_slurm.sh")]
    subprocess.run([*script, "start"], env=env, check=True, timeout=60)
    try:
        told = subprocess.run([*script, "env"], env=env, check=True, capture_output=True, text=True).stdout
        for line in told.splitlines():
            key, value = line.removeprefix("export ").split("=", 1)
            env[key] = value.replace("$PATH", env["PATH"])
        yield env
    finally:
        subprocess.run([*script, "stop"], env=env, timeout=60, check=False)


@pytest.fixture(scope="module")
def places(checkpoint_dir: Path, dataset_dir: Path) -> list[str]:
    return [
        f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "name=s", "model_variant=base", "device=cpu",
        "adapter=lokr", "optim.lr=0.01", "max_epochs=null", "log_every_steps=5", "vram_profile.batch_size=1",
        "vram_profile.gradient_accumulation_steps=1", "vram_profile.max_seconds=2",
        "vram_profile.gradient_checkpointing=none", "save_every_epochs=null",
    ]  # fmt: skip


def start(env: dict[str, str], folder: Path, *typed: str, command: str = "train") -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", f"sidestep.{command}", *typed],
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored in what a shell runs in the background
    )


def start_here(folder: Path, *typed: str, world_size: int = 1) -> list[Command]:
    """Begin the same command without Slurm, in copies of this process, which has imported everything."""

    def call() -> None:
        sys.argv = ["sidestep.train", *typed]
        run_command("train", TrainConfig, train_command)

    return start_group(folder, world_size, call)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, text
    return text


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.1)


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("outputs/s/*/train.log"))


def only_run(folder: Path) -> Path:
    (run,) = (path.parent for path in folder.glob("outputs/s/*/train.log"))
    return run


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("outputs/s/*/final/*.safetensors")
    return load_file(path)


def state_of(env: dict[str, str], job: str) -> str:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], env=env, text=True, capture_output=True, check=True)
    return dict(word.partition("=")[::2] for word in shown.stdout.split())["JobState"]


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: dict[str, str], places: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run has begun that needs longer than the two minutes that its job may take; the second test ends it."""
    folder = tmp_path_factory.mktemp("limited")
    limit = ["cluster.time_minutes=2", "cluster.signal_seconds=60", "cluster.wait=false", "max_steps=1000000"]
    limit += ["cluster.sbatch=['--nodelist=mini3']", f"cluster.python=nice -n 5 {sys.executable}"]  # others go first
    finish(start(slurm, folder / "parts", *places, *CLUSTER[:-1], *limit))
    return folder


def test_a_run_on_two_nodes_that_is_preempted_twice_ends_with_the_same_weights(slurm, tmp_path, places):
    length = "max_steps=150"
    two = ["cluster.nodes=2", "cluster.partition=preempt"]
    parts = start(slurm, tmp_path / "parts", *places, *CLUSTER, *two, length)
    whole = start_here(tmp_path / "whole", *places, length, world_size=2)
    for times in (0, 1):
        until(lambda times=times: log_of(tmp_path / "parts").count("continuing from") == times, f"start {times}")
        before = log_of(tmp_path / "parts").count("left, ")
        until(lambda before=before: log_of(tmp_path / "parts").count("left, ") > before, "a step")
        urgent = [
            "sbatch",
            "--partition=debug",
            "--nodelist=mini[1-2]",
            "--exclusive",
            "--time=1",
            "--output=/dev/null",
        ]
        subprocess.run([*urgent, "--wrap=true"], env=slurm, check=True, stdout=subprocess.DEVNULL)
    finish(parts)
    assert log_of(tmp_path / "parts").count("continuing from") == 2
    assert log_of(tmp_path / "parts").count("of 2 songs each") == 3
    assert [process.finish() for process in whole] == [0, 0], whole[0].text
    torch.testing.assert_close(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"), rtol=0, atol=0)
    assert state_of(slurm, read_point(only_run(tmp_path / "parts")).job) == "COMPLETED"


def test_a_run_that_needs_longer_than_its_job_may_goes_on_in_a_new_one(slurm, limited, places):
    """A real time limit: a minute before it Slurm sends the signal, the run saves, and the same job begins again."""
    until(lambda: "going on in a new job" in log_of(limited / "parts"), "the signal before the time limit")
    until(lambda: "continuing from" in log_of(limited / "parts"), "the second job")
    run = only_run(limited / "parts")
    job = read_point(run).job
    step = json.loads((run / "run.json").read_text())["step"]
    until(lambda: f"step {(step // 5 + 2) * 5} of" in log_of(limited / "parts"), "steps after the saved one")
    subprocess.run(["scancel", job], env=slurm, check=True)
    until(lambda: json.loads((run / "run.json").read_text())["status"] == "interrupted", "saved when cancelled")
    assert "the same command goes on from here" in log_of(limited / "parts")
    until(lambda: state_of(slurm, job) == "CANCELLED", "the end of the job")

    length = f"max_steps={json.loads((run / 'run.json').read_text())['step'] + 5}"
    for process in [start_here(limited / folder, *places, length)[0] for folder in ("parts", "whole")]:
        assert process.finish() == 0, process.text
    torch.testing.assert_close(final_weights(limited / "parts"), final_weights(limited / "whole"), rtol=0, atol=0)


def test_a_bad_point_and_a_killed_one_cost_only_themselves(slurm, tmp_path, places):
    """Six points, of which one has a bad setting and one is killed; typed again, only those two are submitted."""
    typed = [*places, *CLUSTER, "max_steps=3,4,5,6,-1,1000000"]

    def kill_the_last(job_before: str = "") -> None:
        until(lambda: bool(list(tmp_path.glob("outputs/s/*1000000*/point.json"))), "the sixth point")
        (run,) = tmp_path.glob("outputs/s/*1000000*")
        until(lambda: read_point(run).job != job_before and read_point(run).status == "running", "its job")
        os.kill(read_point(run).process, signal.SIGKILL)

    head = start(slurm, tmp_path, *typed)
    kill_the_last()
    text = finish(head, 1)
    assert "4 finished, 2 failed" in text
    assert "failed: max_steps=-1 must be at least 1" in text
    points = {path.parent.name: read_point(path.parent) for path in tmp_path.glob("outputs/s/*/point.json")}
    bad, killed = (next(p for name, p in points.items() if key in name) for key in ("steps-1", "1000000"))
    assert "ended without a result, Slurm calls it FAILED" in killed.error
    assert state_of(slurm, bad.job) == state_of(slurm, killed.job) == "FAILED"
    good = [point for point in points.values() if point.status == "finished"]
    assert {state_of(slurm, point.job) for point in good} == {"COMPLETED"}

    head = start(slurm, tmp_path, *typed)
    kill_the_last(killed.job)
    text = finish(head, 1)
    assert text.count("is finished") == 4
    assert text.count("is job") == 2
    for path in tmp_path.glob("outputs/s/*/point.json"):
        assert read_point(path.parent).error or read_point(path.parent) == points[path.parent.name]


def test_points_are_left_in_the_queue_found_there_again_and_cancelled_by_ctrl_c(slurm, tmp_path, places):
    typed = [*places, *CLUSTER, "max_steps=1000000", "seed=0,1", "cluster.array_width=1"]
    text = finish(start(slurm, tmp_path, *typed, "cluster.wait=false"))
    assert "2 submitted" in text
    until(lambda: "step 5 of" in log_of(tmp_path), "a step of the first point")
    seen = finish(start(slurm, tmp_path, "sweep_dir=outputs/s", command="report"))
    assert "1 submitted, 1 running" in seen

    head = start(slurm, tmp_path, *typed)
    lines = []
    while len([line for line in lines if "is in the queue already" in line]) < 2:
        lines.append(head.stdout.readline())
        assert lines[-1], "".join(lines)
    time.sleep(0.5)
    head.send_signal(signal.SIGINT)
    assert "cancelled 2 jobs" in finish(head, 128 + signal.SIGINT)
    queue = [
        "squeue",
        "--noheader",
        "--states=all",
        "--format=%T",
        "--array",
        f"--jobs={read_point(only_run(tmp_path)).job.split('_')[0]}",
    ]
    until(lambda: set(subprocess.check_output(queue, env=slurm, text=True).split()) == {"CANCELLED"}, "cancelled")
    assert "saved outputs" in log_of(tmp_path)


def test_a_dataset_is_made_in_parts_by_jobs_and_a_lost_part_is_run_again(slurm, tmp_path, checkpoint_dir):
    make_toy_songs(tmp_path / "songs")
    places = [f"audio_dir={tmp_path / 'songs'}", f"dataset_dir={tmp_path / 'data'}", f"checkpoint_dir={checkpoint_dir}"]
    typed = [*places, "model_variant=base", "device=cpu", "num_shards=2", "shard=range(0,2)", *CLUSTER]
    finish(start(slurm, tmp_path, *typed, command="preprocess"))
    assert len(read_manifest(tmp_path / "data")[1]) == 4
    manifest = (tmp_path / "data/songs.jsonl").read_bytes()
    (tmp_path / "data/songs.jsonl").unlink()
    shutil.rmtree(tmp_path / "data/shards/1-of-2")
    text = finish(start(slurm, tmp_path, *typed, command="preprocess"))
    assert "2 finished" in text
    assert (tmp_path / "data/songs.jsonl").read_bytes() == manifest


def test_the_plain_batch_script_saves_and_goes_on_when_it_is_told_to_stop(slurm, tmp_path, places):
    script = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--exclude=mini3", "--time=5"]
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    env = slurm | {"PYTHON": sys.executable}
    submitted = [*script, "scripts/train.sbatch", *places, "max_steps=100"]
    job = subprocess.check_output(submitted, env=env, cwd=tmp_path, text=True).strip()
    until(lambda: "step 5 of" in log_of(tmp_path), "a step")
    subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)
    until(lambda: "finished at step 100" in log_of(tmp_path), "the end of the run")
    assert "stopped by SIGUSR2" in log_of(tmp_path)
    assert "continuing from" in log_of(tmp_path)
    until(lambda: state_of(slurm, job) == "COMPLETED", "the end of the job")
