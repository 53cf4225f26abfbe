"""A disk that is really full: every command in a file system of two megabytes, most of it taken."""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[1]
SMALL = "mount -t tmpfs -o size=2m tmpfs small"
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


def fill_then_free(folder: Path, free_kilobytes: int, command: list[str], result: str) -> tuple[int, str, int, str]:
    """Run a command with a little space left and again with enough; what is in ``small/result`` comes out as ``kept``.

    Returns:
        Exit code and what was said of the first, and of the second.
    """
    (folder / "small").mkdir()
    script = f"""{SMALL} && head -c $(( (2048 - {free_kilobytes}) * 1024 )) /dev/zero > small/fill
        "$@" 2> full.txt; echo $? > full.code
        rm small/fill
        "$@" 2> free.txt; echo $? > free.code
        cp -r small/{result} kept"""
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m", f"sidestep.{command[0]}", *command[1:]],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    said = {name: (folder / f"{name}.txt").read_text() for name in ("full", "free")}
    code = {name: int((folder / f"{name}.code").read_text()) for name in ("full", "free")}
    return code["full"], said["full"], code["free"], said["free"]


SPACES = [24, 300, *(pytest.param(space, marks=pytest.mark.slow) for space in (2, 8, 12, 16, 20, 60, 100, 200, 400))]


@pytest.mark.parametrize("space", SPACES)
def test_training_says_that_the_disk_is_full_and_goes_on_once_it_is_not(tmp_path, checkpoint_dir, dataset_dir, space):
    command = [*TRAIN, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"]
    full, said, again, said_again = fill_then_free(tmp_path, space, command, "run/final")
    assert full == 1
    assert "Traceback" not in said
    assert "No space left on device" in said.splitlines()[-1]
    assert again == 0, said_again
    (tmp_path / "whole").mkdir()
    whole = [sys.executable, "-m", f"sidestep.{command[0]}", *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(whole, cwd=tmp_path / "whole", env=environment, capture_output=True, check=True)
    expected = load_file(tmp_path / "whole/small/run/final/adapter_model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "kept/adapter_model.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("space", [12, *(pytest.param(space, marks=pytest.mark.slow) for space in (2, 8, 30, 60, 100))])
def test_preprocessing_says_that_the_disk_is_full_and_goes_on_once_it_is_not(tmp_path, checkpoint_dir, space):
    noise = np.random.default_rng(0)
    for number in range(4):
        write(tmp_path / f"songs/{number}.wav", noise.uniform(-0.5, 0.5, (240_000, 2)), 48_000)
    places = [f"checkpoint_dir={checkpoint_dir}", "audio_dir=songs", "dataset_dir=small/data"]
    command = ["preprocess", *places, "model_variant=base", "device=cpu"]
    full, said, again, said_again = fill_then_free(tmp_path, space, command, "data")
    assert full == 1
    assert "Traceback" not in said
    assert "No space left on device" in said.splitlines()[-1]
    assert again == 0, said_again
    assert len((tmp_path / "kept/songs.jsonl").read_text().splitlines()) == 4
    assert not list((tmp_path / "kept").rglob(".*partial*"))
