"""What a run shows in TensorBoard, and the services that it can send its numbers to."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from sidestep.errors import UserError
from tests.factories import run_training


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, str]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


def test_tensorboard_shows_speed_memory_and_a_table_of_settings(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=1", "optim.lr=0.003")
    events = EventAccumulator(str(tmp_path / "run/runs"))
    events.Reload()
    scalars = {"train/seconds_per_step", "train/tokens_per_second", "train/memory_gib", "train/smoothed_loss"}
    assert scalars <= set(events.Tags()["scalars"])
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))
    shown = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(shown).session_start_info.hparams
    assert settings["optim.lr"].number_value == 0.003
    assert settings["adapter"].string_value == "lora"
    assert not [path for path in (tmp_path / "run/runs").iterdir() if path.is_dir()]  # one run, not two


def test_a_service_gets_the_settings_and_every_step(tmp_path, places, monkeypatch):
    """With a stand-in for the wandb package, which would need an account."""
    received: dict[str, list] = {"init": [], "config": [], "log": [], "finish": []}
    run = types.SimpleNamespace(
        log=lambda values, step, **_: received["log"].append((step, values)),
        finish=lambda: received["finish"].append(True),
    )
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    wandb.init = lambda **options: received["init"].append(options) or run
    wandb.config = types.SimpleNamespace(update=lambda values, **_: received["config"].append(values))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    run_training(tmp_path / "first/run", *places, "tracking=wandb", "tracking.project=mine", "max_epochs=1")
    (init,) = received["init"]
    record = json.loads((tmp_path / "first/run/run.json").read_text())
    assert (init["project"], init["name"], init["resume"]) == ("mine", "first-run", "allow")
    assert init["id"] == record["run_id"] != ""
    assert received["config"][0]["optim.lr"] == 0.01
    assert sorted({step for step, values in received["log"] if "train/loss" in values}) == [1, 2, 3, 4]
    assert received["finish"] == [True]


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_without_its_package_is_refused_before_anything_is_written(tmp_path, places, service, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"tracking={service} needs the package {service}: pip install"):
        run_training(tmp_path / "run", *places, f"tracking={service}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
