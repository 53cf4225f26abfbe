"""Previews: music from the adapter's files while a run trains, without disturbing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.errors import UserError
from sidestep.inference.generation import generate
from sidestep.training.previews import out_of_the_way
from tests.factories import generate_config, run_training, train_config

PREVIEWS = (
    "previews.every_epochs=1", "previews.prompts=[quiet piano]", "previews.seconds=1", "previews.seeds=[3]",
    "previews.num_inference_steps=2", "previews.scales=[0,1]",
)  # fmt: skip


@pytest.fixture(scope="module")
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, ...]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "save_every_epochs=1"


@pytest.fixture(scope="module")
def run(tmp_path_factory, places) -> Path:
    folder = tmp_path_factory.mktemp("previews") / "run"
    run_training(folder, *places, *PREVIEWS, "adapter.dropout=0.1", "max_epochs=2")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_each_epoch_has_music_a_picture_and_a_list(run):
    names = ["prompt1-seed3-scale1.flac", "prompt1-seed3-scale1.png"]
    for epoch in ("epoch_1", "epoch_2"):
        assert sorted(path.name for path in (run / "previews" / epoch).iterdir()) == ["previews.json", *names]
    listed = json.loads((run / "previews/epoch_2/previews.json").read_text())
    assert listed["step"] == 8
    assert listed["files"] == [{"file": names[0], "prompt": "quiet piano", "seed": 3, "scale": 1.0}]
    assert soundfile.info(run / "previews/base/prompt1-seed3-scale0.flac").duration == 1


def test_it_is_the_music_that_generate_makes_of_the_checkpoint(run, tmp_path, checkpoint_dir):
    for scale, folder in ((0, "base"), (1, "epoch_1")):
        (made,) = generate(
            generate_config(
                f"adapter_dir={run / 'checkpoints/epoch_1'}", f"scale={scale}", "seeds=[3]", "language=unknown",
                f"checkpoint_dir={checkpoint_dir}", f"output_dir={tmp_path / str(scale)}",
            )
        )  # fmt: skip
        expected, _ = soundfile.read(made)
        heard, _ = soundfile.read(run / f"previews/{folder}/prompt1-seed3-scale{scale}.flac")
        assert (heard == expected).all()


def test_rendering_changes_no_weight(run, tmp_path, places):
    run_training(tmp_path / "silent", *places, "adapter.dropout=0.1", "max_epochs=2")
    assert not (tmp_path / "silent/previews").exists()
    torch.testing.assert_close(weights(run / "final"), weights(tmp_path / "silent/final"), rtol=0, atol=0)


def test_tensorboard_has_the_sound_and_its_spectrogram(run):
    events = EventAccumulator(str(run / "runs"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    tags = {"previews/prompt1-seed3-scale0", "previews/prompt1-seed3-scale1"}
    assert tags <= set(events.Tags()["audio"])
    assert tags <= set(events.Tags()["images"])
    assert [event.step for event in events.Audio("previews/prompt1-seed3-scale1")] == [4, 8]


def test_songs_without_captions_need_a_prompt_before_anything_is_loaded(tmp_path, places):
    with pytest.raises(UserError, match=r"no captions to render previews of; type previews\.prompts="):
        run_training(tmp_path / "run", *places, "previews.every_epochs=1")


@pytest.mark.parametrize(
    ("typed", "message"),
    [("seeds=[-1]", "whole numbers"), ("seconds=0", "above 0"), ("scales=[]", "is empty"), ("prompts=['']", "empty")],
)
def test_settings_that_cannot_be_are_refused(typed, message):
    with pytest.raises(UserError, match=message):
        train_config(f"previews.{typed}")


@pytest.mark.gpu
def test_a_gpu_is_freed_of_the_model_and_gets_it_back_as_it_was():
    model = torch.nn.Linear(512, 512).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 512, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    used = torch.cuda.memory_allocated()
    with out_of_the_way(model, optimizer, torch.device("cuda")):
        assert torch.cuda.memory_allocated() < used / 2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        torch.testing.assert_close(state["exp_avg"], moment, rtol=0, atol=0)
    model(torch.ones(1, 512, device="cuda")).sum().backward()
    optimizer.step()
