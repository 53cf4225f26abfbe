"""A disk that is really full: commands in a file system of two megabytes, most of it taken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.audio_files import write
from tests.processes import Command

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    "train", "model_variant=base", "device=cpu", "adapter.rank=8", "name=x", "max_epochs=2", "save_every_epochs=1",
    "vram_profile.batch_size=1", "vram_profile.gradient_accumulation_steps=1", "vram_profile.max_seconds=2",
    "hydra.run.dir=small/run",
]  # fmt: skip


def allowed() -> bool:
    """Whether this system lets us make a file system, in a namespace of our own that ends with the process."""
    tried = shutil.which("unshare") and subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return bool(tried) and tried.returncode == 0


pytestmark = pytest.mark.skipif(not allowed(), reason="needs a system on which unshare -rm may mount a tmpfs")


def fill_and_free(folder: Path, kilobytes: list[int], command: list[str], result: str) -> list[list[tuple[int, str]]]:
    """Run a command with a little space left, and again with enough; for each space in a new file system.

    Returns:
        For each space, exit code and words of the first and of the second. What was in ``small/<result>`` is in
        ``kept<space>``.
    """
    (folder / "small").mkdir()
    words = json.dumps([kilobytes, command, result])
    subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.test_full_disk", words],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    said: list[list[tuple[int, str]]] = json.loads((folder / "said.json").read_text())
    return said


def inside(kilobytes: list[int], command: list[str], result: str) -> None:
    """What happens in the namespace."""
    folder, said = Path.cwd(), []
    for space in kilobytes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "small"], check=True)
        (folder / "small/fill").write_bytes(bytes((2048 - space) * 1024))
        full = Command(folder, *command)
        outcome = [(full.wait(), full.said)]
        (folder / "small/fill").unlink()
        free = Command(folder, *command)
        said.append([*outcome, (free.wait(), free.said)])
        shutil.copytree(folder / "small" / result, folder / f"kept{space}")
        subprocess.run(["umount", "small"], check=True)
    (folder / "said.json").write_text(json.dumps(said))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def check_said(first: tuple[int, str], second: tuple[int, str], folder: str) -> None:
    assert first[0] == 1, first[1]
    assert "Traceback" not in first[1]
    assert "No space left on device" in first[1].splitlines()[-1]
    assert folder in first[1].splitlines()[-1]
    assert second[0] == 0, second[1]


SPACES = [[24], pytest.param([2, 4, 8, 12, 16, 20, 28, 40, 60, 100, 200, 300, 350, 400], marks=pytest.mark.slow)]


@pytest.mark.parametrize("spaces", SPACES)
def test_training_says_that_the_disk_is_full_and_goes_on_once_it_is_not(work, checkpoint_dir, dataset_dir, spaces):
    command = [*TRAIN, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"]
    said = fill_and_free(work, spaces, command, "run/final")
    whole = Command(work, *command)
    assert whole.wait() == 0, whole.said
    expected = load_file(work / "small/run/final/adapter_model.safetensors")
    for space, outcomes in zip(spaces, said, strict=True):
        check_said(*outcomes, "small/run")
        torch.testing.assert_close(load_file(work / f"kept{space}/adapter_model.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spaces", [pytest.param([2, 4, 8, 12, 16, 30, 60, 100], marks=pytest.mark.slow)])
def test_preprocessing_says_that_the_disk_is_full_and_goes_on_once_it_is_not(work, checkpoint_dir, spaces):
    noise = np.random.default_rng(0)
    for number in range(4):
        write(work / f"songs/{number}.wav", noise.uniform(-0.5, 0.5, (240_000, 2)), 48_000)
    places = [f"checkpoint_dir={checkpoint_dir}", "audio_dir=songs", "dataset_dir=small/data"]
    command = ["preprocess", *places, "model_variant=base", "device=cpu"]
    said = fill_and_free(work, spaces, command, "data")
    for space, outcomes in zip(spaces, said, strict=True):
        check_said(*outcomes, "small/data")
        assert len((work / f"kept{space}/songs.jsonl").read_text().splitlines()) == 4
        assert not list((work / f"kept{space}").rglob(".*partial*"))


if __name__ == "__main__":
    inside(*json.loads(sys.argv[1]))
