"""Preprocessing that is killed again and again, as real processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.audio_files import write

ROOT = Path(__file__).resolve().parents[1]
NUM_SONGS = 8
MOMENTS = ("encoding audio", "encoding words")


def start(dataset_dir: Path, songs: Path, checkpoint_dir: Path) -> subprocess.Popen[str]:
    places = [f"audio_dir={songs}", f"dataset_dir={dataset_dir}", f"checkpoint_dir={checkpoint_dir}"]
    return subprocess.Popen(
        [sys.executable, "-m", "sidestep.preprocess", *places, "model_variant=base", "device=cpu"],
        cwd=dataset_dir.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read the log until a line says it, or the process ends because it had nothing left to do there."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but its logs, which tell of each attempt, and the lock."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in files.items()
        if name.parts[0] != "logs" and name.name not in (".lock", ".owner")
    }


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    noise = np.random.default_rng(0)
    for number in range(NUM_SONGS):
        write(folder / f"{number}.wav", noise.uniform(-0.5, 0.5, (48_000, 2)), 48_000)
        (folder / f"{number}.caption.txt").write_text(f"caption {number}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("num_kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_dataset_ends_the_same_to_the_byte(tmp_path, songs, checkpoint_dir, num_kills):
    """SIGKILL while loading and encoding, and just after; the same command again each time."""
    whole = start(tmp_path / "whole", songs, checkpoint_dir)
    _, log = whole.communicate()
    assert whole.returncode == 0, log

    chance = random.Random(num_kills)
    num_killed = 0
    while num_killed < num_kills:
        process = start(tmp_path / "parts", songs, checkpoint_dir)
        wait_for(process, chance.choice(MOMENTS))
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            num_killed += 1
        else:  # it was done before, so there is nothing left to kill
            shutil.rmtree(tmp_path / "parts")
    last = start(tmp_path / "parts", songs, checkpoint_dir)
    _, log = last.communicate()
    assert last.returncode == 0, log
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")  # with nothing half-written beside
