"""Previews: music from the adapter's files while a run trains, without disturbing it."""

from __future__ import annotations

import errno
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.prompts import caption_prompt
from sidestep.checking.doctor import examine
from sidestep.errors import UserError
from sidestep.inference import previews
from sidestep.inference.generation import generate
from sidestep.inference.pipeline import Request, Sampling
from sidestep.training.previews import Previews, out_of_the_way
from sidestep.training.run import open_run
from sidestep.training.signals import Interrupted
from tests.factories import choices_of, generate_config, run_training, train_config, write_dataset

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
    for step in ("step_4", "step_8"):
        assert sorted(path.name for path in (run / "previews" / step).iterdir()) == ["previews.json", *names]
    listed = json.loads((run / "previews/step_8/previews.json").read_text())
    assert listed["step"] == 8
    assert listed["files"] == [{"file": names[0], "prompt": "quiet piano", "seed": 3, "scale": 1.0}]
    assert soundfile.info(run / "previews/base/prompt1-seed3-scale0.flac").duration == 1


def test_it_is_the_music_that_generate_makes_of_the_checkpoint(run, tmp_path, checkpoint_dir):
    for scale, folder in ((0, "base"), (1, "step_4")):
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


def test_the_default_prompts_are_the_captions_that_songs_were_trained_with(tmp_path, checkpoint_dir):
    """With the trigger word, which is what calls the adapter."""
    dataset = write_dataset(tmp_path / "songs", checkpoint_dir, lengths=[60, 60])
    prompt = caption_prompt("mystyle, warm jazz", bpm=None, timesignature="", keyscale="", duration=2)
    file = dataset / "conditions/song1.safetensors"
    save_file(load_file(file), file, {"texts": json.dumps({"caption": prompt})})
    typed = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset}", "previews.every_epochs=1")
    rendered = Previews(open_run(train_config(*typed), tmp_path / "run", choices_of(*typed)))
    assert [request.prompt for request in rendered.requests] == ["mystyle, warm jazz"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), torch.OutOfMemoryError("full")],
)
def test_a_preview_that_fails_costs_only_the_preview(tmp_path, places, monkeypatch, caplog, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("sidestep.training.previews.render", fail)
    run_training(tmp_path / "run", *places, *PREVIEWS, "previews.scales=[1]", "max_epochs=null", "max_steps=1")
    assert "previews of step 1" in caplog.text
    assert "training goes on" in caplog.text
    assert (tmp_path / "run/final").is_dir()
    assert not list((tmp_path / "run/previews").iterdir())


def test_music_that_was_deleted_is_made_again_and_costs_no_step(run, tmp_path, places, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    music = folder / "previews/base/prompt1-seed3-scale0.flac"
    music.unlink()
    typed = (*places, *PREVIEWS, "adapter.dropout=0.1", "max_epochs=3")
    rendered = Previews(open_run(train_config(*typed), folder, choices_of(*typed)))
    rendered._show(folder / "previews/base", None, 8)
    assert f"{music} is not shown in TensorBoard" in caplog.text
    rendered.render_base()
    assert music.is_file()


def test_memory_that_previews_of_the_base_model_need_is_not_blamed_on_a_step(run, tmp_path, places, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("sidestep.training.previews.render", fail)
    monkeypatch.setattr("sidestep.checking.dry_run.render", fail)
    typed = (*places, *PREVIEWS)
    about = train_config(*typed), tmp_path / "run", choices_of(*typed)
    with pytest.raises(UserError, match=r"use a smaller previews\.seconds than 1"):
        Previews(open_run(*about)).render_base()
    with pytest.raises(UserError, match=r"use a smaller previews\.seconds than 1"):
        examine(*about)


def test_music_that_is_not_finite_is_left_out_and_the_rest_is_kept(
    tmp_path, places, checkpoint_dir, monkeypatch, caplog
):
    sample = previews.sample_latents

    def sample_badly(*arguments, seed, **options):
        return sample(*arguments, seed=seed, **options) * (math.nan if seed == 4 else 1)

    monkeypatch.setattr(previews, "sample_latents", sample_badly)
    made = previews.render(
        find_checkpoint(checkpoint_dir, train_config().model_variant), None, [Request(prompt="piano", seconds=1)],
        seeds=[3, 4], scales=[0.0], sampling=Sampling(shift=1.0, num_inference_steps=1, guidance_scale=1.0),
        device=torch.device("cpu"), dtype=torch.float32, folder=tmp_path,
    )  # fmt: skip
    assert [(music.file, music.seed) for music in made] == [("prompt1-seed3-scale0.flac", 3)]
    assert "'piano' at scale 0 gave latents that are not finite" in caplog.text


def test_a_signal_while_previews_are_rendered_waits_for_the_piece_at_hand_only(tmp_path, places, monkeypatch, caplog):
    sample, sampled = previews.sample_latents, []

    def sample_and_signal(*arguments, **options):
        sampled.append(options["seed"])
        if options["seed"] == 3 and len(sampled) == 2:  # the first is the base model's
            signal.raise_signal(signal.SIGTERM)
        return sample(*arguments, **options)

    monkeypatch.setattr(previews, "sample_latents", sample_and_signal)
    typed = (*places, *PREVIEWS, "previews.scales=[0,1,0.5]", "max_epochs=1")
    with pytest.raises(Interrupted):
        run_training(tmp_path / "run", *typed)
    assert len(sampled) == 2
    assert (tmp_path / "run/checkpoints/epoch_1").is_dir()
    assert [path.name for path in (tmp_path / "run/previews").iterdir()] == ["base"]
    run_training(tmp_path / "run", *typed)
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == ["base", "step_4"]


@pytest.mark.parametrize(
    "files", [None, [{}], [5], [{"file": 5}], [{"file": "../x"}], {"file": "x"}, [{"file": "gone"}]]
)
def test_a_damaged_list_of_the_base_models_music_has_it_rendered_again(tmp_path, places, monkeypatch, files):
    typed = (*places, *PREVIEWS)
    rendered = Previews(open_run(train_config(*typed), tmp_path / "run", choices_of(*typed)))
    listed, again = tmp_path / "run/previews/base/previews.json", []
    listed.parent.mkdir(parents=True)
    listed.write_text(json.dumps({"hash": rendered._hash(), "files": files}))
    monkeypatch.setattr(rendered, "_render", lambda name, *_, **__: again.append(name))
    rendered.render_base()
    assert again == ["base"]
    (listed.parent / "music.flac").touch()
    listed.write_text(json.dumps({"hash": rendered._hash(), "files": [{"file": "music.flac"}]}))
    rendered.render_base()
    assert again == ["base"]


@pytest.mark.slow
def test_previews_that_were_due_when_a_run_was_stopped_are_rendered_when_it_goes_on(run, tmp_path, places):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/previews/step_8")
    run_training(tmp_path / "run", *places, *PREVIEWS, "adapter.dropout=0.1", "max_epochs=null", "max_steps=9")
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == ["base", "step_4", "step_8", "step_9"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("seeds=[-1]", "whole numbers"),
        ("seconds=0.001", "at least 0.08"),
        ("scales=[0]", "one of them not 0"),
        ("prompts=['']", "empty"),
    ],
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
