"""The demo as a user runs it: from a shell, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.adapters.files import attach_saved
from sidestep.data.dataset import SongDataset
from sidestep.training.flow import noisy_latents_and_velocity
from tests.factories import train_config

DEMO = ("experiment=demo", "adapter=lora", "model_variant=turbo", "max_epochs=20", "name=x")
TIMES = [0.1, 0.3, 0.5, 0.7, 0.9]


def run_command(folder: Path, *arguments: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"sidestep.{command}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def fixed_loss(transformer, dataset: SongDataset, silence: torch.Tensor) -> float:
    """Velocity loss over every song at fixed times and noise, so that two models can be compared."""
    transformer.eval()
    generator = torch.Generator().manual_seed(11)
    losses = []
    for position in range(len(dataset.songs)):
        example = dataset[position]
        latents = example.latents[None]
        for time in TIMES:
            t = torch.tensor([time])
            noise = torch.randn(latents.shape, generator=generator)
            noisy_latents, velocity = noisy_latents_and_velocity(latents, noise, t)
            context = context_latents(silence, latents.shape[1])[None]
            with torch.no_grad():
                predicted = transformer(noisy_latents, t, t, example.condition[None], context, return_dict=False)[0]
            losses.append((predicted - velocity).square().mean().item())
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = run_command(
        folder,
        "experiment=demo",
        "adapter=lora",
        "model_variant=turbo",
        "max_epochs=20",
        "name=x",
        "save_every_epochs=10",
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_it_says_first_that_the_model_is_a_toy_and_last_where_the_adapter_is(demo):
    lines = (demo / "stderr.txt").read_text().splitlines()
    assert "random toy" in lines[0]
    assert "outputs/x/lora-turbo-demo/final" in lines[-1]
    assert "next:" in lines[-1]
    assert (demo / "outputs/x/lora-turbo-demo/final/README.md").is_file()


def test_a_run_folder_has_its_log_and_its_settings(demo):
    run = demo / "outputs/x/lora-turbo-demo"
    assert {"train.log", ".hydra", "run.json", "metrics.jsonl", "final", "checkpoints", "runs"} <= {
        p.name for p in run.iterdir()
    }
    assert "step 5 of" in (run / "train.log").read_text()
    assert (run / ".hydra/overrides.yaml").is_file()


def test_training_lowers_the_loss_on_fixed_noise_and_times_by_a_fifth(demo):
    checkpoint = find_checkpoint(demo / "outputs/demo-model", train_config("model_variant=turbo").model_variant)
    dataset = SongDataset(demo / "outputs/demo-data/turbo", max_seconds=6, seed=123)
    silence = checkpoint.silence()
    transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
    before = fixed_loss(transformer, dataset, silence)
    attach_saved(transformer, demo / "outputs/x/lora-turbo-demo/final")
    after = fixed_loss(transformer, dataset, silence)
    assert after < 0.8 * before, f"{before:.3f} before, {after:.3f} after"


def test_the_same_command_again_returns_at_once(demo):
    before = json.loads((demo / "outputs/x/lora-turbo-demo/run.json").read_text())
    done = run_command(demo, *DEMO)
    assert done.returncode == 0, done.stderr
    assert "is finished at step" in done.stderr
    assert "4 unchanged" in done.stderr
    assert json.loads((demo / "outputs/x/lora-turbo-demo/run.json").read_text()) == before


@pytest.mark.slow  # tests/test_sweep.py has sweeps that cost less
def test_a_sweep_gives_each_point_its_own_adapter_and_survives_a_bad_point(demo):
    done = run_command(
        demo, "-m", "experiment=demo", "adapter=lora,lokr", "model_variant=turbo", "max_epochs=null",
        "max_steps=2", "adapter.rank=2,0", "name=s",
    )  # fmt: skip
    assert done.returncode == 1
    assert "adapter.rank=0 must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr
    finished = sorted(path.parent.name for path in (demo / "outputs/s").glob("*/final"))
    assert finished == ["lokr-turbo-rank2-demo", "lora-turbo-rank2-demo"]


@pytest.mark.slow
def test_demos_that_begin_together_wait_for_each_other(tmp_path):
    """As the points of a sweep do under a launcher with several processes."""
    code = (
        "from tests.factories import train_config; from sidestep.demo import prepare_demo; "
        "prepare_demo(train_config('experiment=demo', 'dataset_dir=data/base'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, log = process.communicate()
        assert process.returncode == 0, log.decode()
    assert len(SongDataset(tmp_path / "data/base", max_seconds=6, seed=0).songs) == 4


@pytest.mark.slow
def test_preprocessing_says_what_it_skipped_and_exits_with_1(demo, tmp_path):
    songs = tmp_path / "songs"
    songs.mkdir()
    (songs / "good one.wav").write_bytes((demo / "outputs/demo-model/songs/01-paper-boats.wav").read_bytes())
    (songs / "bad.wav").write_text("this is not audio")
    places = (f"audio_dir={songs}", f"dataset_dir={tmp_path / 'data'}", f"checkpoint_dir={demo / 'outputs/demo-model'}")
    done = run_command(tmp_path, *places, "model_variant=turbo", command="preprocess")
    assert done.returncode == 1
    assert "skipped bad.wav" in done.stderr
    assert "1 songs in" in done.stderr
    assert "captions: 1 from file name" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_does_not_touch_folders_that_are_not_its_own(demo, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/songs.jsonl").write_text("my own")
    for setting in ("dataset_dir=mine", "checkpoint_dir=mine"):
        done = run_command(tmp_path, "experiment=demo", setting, "name=y")
        assert done.returncode == 1
        assert "mine was not made by the demo" in done.stderr
    assert (tmp_path / "mine/songs.jsonl").read_text() == "my own"
    assert len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["dataset_dir=nothing"], "python scripts/download_checkpoint.py turbo"),
        pytest.param(
            ["dataset_dir=nothing", "checkpoint_dir=outputs/demo-model"],
            "dataset_dir=nothing is not a dataset",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(demo, arguments, answer):
    done = run_command(demo, *arguments, "model_variant=turbo", "name=missing")
    assert done.returncode == 1
    assert answer in done.stderr
    assert len(done.stderr.splitlines()) == 1
