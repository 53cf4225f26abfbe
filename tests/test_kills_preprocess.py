"""Preprocessing that is killed again and again, as real processes."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.audio_files import write
from tests.processes import Command, at_call, die

NUM_SONGS = 6
MOMENTS = ("encoding audio", "encoding words")


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


@pytest.fixture
def command(songs, checkpoint_dir) -> list[str]:
    places = [f"audio_dir={songs}", "dataset_dir=data", f"checkpoint_dir={checkpoint_dir}"]
    return ["preprocess", *places, "model_variant=base", "device=cpu"]


def in_folder(folder: Path, command: list[str], **options: object) -> Command:
    folder.mkdir(exist_ok=True)
    return Command(folder, *command, **options)


def check_same(tmp_path: Path, command: list[str]) -> None:
    """Let the killed one finish, and compare with one that was never killed."""
    for name in ("parts", "whole"):
        process = in_folder(tmp_path / name, command)
        assert process.wait() == 0, process.said
    assert contents(tmp_path / "parts/data") == contents(tmp_path / "whole/data")  # with nothing half-written beside


@pytest.mark.parametrize("num_kills", [pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_dataset_ends_the_same_to_the_byte(tmp_path, command, record_property, num_kills):
    """SIGKILL while loading and encoding, and just after; the same command again each time."""
    chance = random.Random(num_kills)
    num_killed = 0
    while num_killed < num_kills:
        process = in_folder(tmp_path / "parts", command)
        process.wait_for(chance.choice(MOMENTS))
        time.sleep(chance.random() * 0.3)
        if process.kill():
            num_killed += 1
            record_property("killed", num_killed)
        else:  # it was done before, so there is nothing left to kill
            assert process.wait() == 0, process.said
            shutil.rmtree(tmp_path / "parts/data")
    check_same(tmp_path, command)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_one_file_after_another_the_dataset_ends_the_same_to_the_byte(
    tmp_path, command, record_property, every
):
    """SIGKILL from inside, before the first, second, ... file gets its name; begun anew each time."""
    for number in itertools.count(1, every):
        shutil.rmtree(tmp_path / "parts/data", ignore_errors=True)
        process = in_folder(tmp_path / "parts", command, first=partial(at_call, "os.replace", number, die))
        if process.wait() != -signal.SIGKILL:
            break
        record_property("killed", number)
        assert not (tmp_path / "parts/data/dataset_info.json").exists()
        again = in_folder(tmp_path / "parts", command)
        assert again.wait() == 0, again.said
    assert number > 2 * NUM_SONGS
    check_same(tmp_path, command)
