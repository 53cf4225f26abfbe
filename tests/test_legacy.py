"""Tensor files of ACE-Step's and Side-Step's preprocessing train as they are, or are refused with a reason."""

from __future__ import annotations

import json
import logging
import pickle
import shlex

import pytest
import torch

from sidestep.config.data import DataConfig
from sidestep.config.evaluation import ValidationConfig
from sidestep.data.dataset import SongDataset
from sidestep.data.holdout import content_id, hold_out
from sidestep.errors import UserError
from sidestep.training import fisher
from sidestep.training.fisher import analyze
from tests.factories import analyze_config, preprocess_config, run_training


def write_sample(path, *, frames=60, tokens=9, width=64, padding=20, mode=None, seed=0, **metadata):
    """A file as ACE-Step writes it: the condition is padded to a fixed length, and padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"audio_path": f"/music/mine/{path.stem}.wav", "filename": f"{path.stem}.wav", "caption": "a song"}
    torch.save(
        {
            "target_latents": torch.randn(frames + 10, 64, generator=generator).bfloat16(),
            "attention_mask": (torch.arange(frames + 10) < frames).float(),
            "encoder_hidden_states": torch.randn(tokens + padding, width, generator=generator).bfloat16(),
            "encoder_attention_mask": torch.arange(tokens + padding) < tokens,
            "context_latents": torch.zeros(frames + 10, 128),
            "metadata": about | ({"preprocess_mode": mode} if mode else {}) | metadata,
        },
        path,
    )


@pytest.fixture
def ace_step(tmp_path):
    folder = tmp_path / "ace"
    for i, name in enumerate(["one", "two"]):
        write_sample(folder / f"{name}.pt", frames=60 + 20 * i, tokens=9 + i, seed=i, mode="lora", bpm=90)
    manifest = {"metadata": {"name": "mine"}, "samples": ["two.pt", "one.pt"], "num_samples": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def side_step(tmp_path):
    folder = tmp_path / "side"
    write_sample(folder / "a__one.pt", custom_tag="zyx", repeat=3)
    write_sample(folder / "a__two.pt", frames=41, custom_tag="zyx", seed=1)
    (folder / "a__three.tmp.pt").write_bytes(b"half")
    (folder / "preprocess_meta.json").write_text(json.dumps({"model_variant": "base", "checksums": {}}))
    return folder


def open_dataset(folder, **config):
    return SongDataset(folder, max_seconds=2, seed=0, config=DataConfig(**config))


def test_padding_is_cropped_by_the_masks_of_the_file(ace_step):
    dataset = open_dataset(ace_step)
    assert [song.audio for song in dataset.songs] == ["two.wav", "one.wav"]
    assert [song.num_frames for song in dataset.songs] == [80, 60]
    stored = torch.load(ace_step / "two.pt", weights_only=True)
    for position in range(4):
        draw, example = dataset.draw(position), dataset[position]
        assert len(example.condition) == 10 - draw.song
        if draw.song == 0:
            frames = slice(draw.start, draw.start + draw.length)
            assert torch.equal(example.latents, stored["target_latents"][frames].float())
            assert torch.equal(example.condition, stored["encoder_hidden_states"][:10])


def test_side_steps_files_are_read_without_a_manifest(side_step):
    dataset = open_dataset(side_step)
    assert [song.latents for song in dataset.songs] == ["a__one.pt", "a__two.pt"]
    assert dataset.songs_per_epoch == 4
    assert (dataset.info.model_variant, dataset.info.settings["custom_tags"]) == ("base", ["zyx"])


def test_one_warning_says_what_differs_and_how_to_make_it_right(side_step, caplog):
    caplog.set_level(logging.WARNING, "sidestep")
    open_dataset(side_step)
    (record,) = caplog.records
    for part in (
        "their lyrics lack the form that inference gives them",
        "zeros, where inference has silence",
        f"python -m sidestep.preprocess audio_dir=/music/mine dataset_dir={side_step}-sidestep "
        "model_variant=base custom_tag=zyx makes them right",
    ):
        assert part in record.getMessage()


def test_a_run_trains_on_tensor_files_and_goes_on(ace_step, tmp_path, checkpoint_dir):
    places = ("adapter=lora", f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={ace_step}", "max_epochs=null")
    run_training(tmp_path / "run", *places, "max_steps=2")
    loss = run_training(tmp_path / "run", *places, "max_steps=3", "vram_profile.batch_size=1")
    assert loss == run_training(tmp_path / "whole", *places, "max_steps=3")


def test_a_leaking_reference_is_refused_unless_it_is_wanted(tmp_path, caplog):
    write_sample(tmp_path / "x/one.pt", mode="lokr")
    with pytest.raises(UserError, match=r"one\.pt the first, .*mode=lokr.*data\.allow_leaked_reference=true"):
        open_dataset(tmp_path / "x")
    caplog.set_level(logging.WARNING, "sidestep")
    assert len(open_dataset(tmp_path / "x", allow_leaked_reference=True).songs) == 1
    assert "their reference audio is the song itself" in caplog.text


def test_an_analysis_takes_a_leaking_reference_where_its_own_setting_says_so(tmp_path, checkpoint_dir, monkeypatch):
    write_sample(tmp_path / "x/one.pt", mode="lokr")
    opened = []
    monkeypatch.setattr(fisher, "check_dataset_fits", lambda dataset, _: opened.append(dataset) or 1 / 0)
    typed = (f"dataset_dir={tmp_path / 'x'}", f"checkpoint_dir={checkpoint_dir}")
    with pytest.raises(UserError, match=r"\(allow_leaked_reference=true for python -m sidestep\.analyze\)"):
        analyze(analyze_config(*typed))
    with pytest.raises(ZeroDivisionError):
        analyze(analyze_config(*typed, "allow_leaked_reference=true"))
    assert len(opened) == 1


def test_files_of_another_model_are_refused(side_step, tmp_path, checkpoint_dir):
    place = f"checkpoint_dir={checkpoint_dir}"
    (side_step / "preprocess_meta.json").write_text('{"model_variant": "acestep-v15-xl-turbo"}')
    with pytest.raises(UserError, match="was made for model_variant=xl_turbo, not base"):
        run_training(tmp_path / "run", place, f"dataset_dir={side_step}")
    write_sample(tmp_path / "wide/one.pt", width=48)
    with pytest.raises(UserError, match=r"has conditions of 48 channels, and model_variant=base reads 64"):
        run_training(tmp_path / "run", place, f"dataset_dir={tmp_path / 'wide'}")


def test_a_song_in_its_own_context_leaks_whatever_its_metadata_say(tmp_path):
    write_sample(tmp_path / "x/one.pt")
    sample = torch.load(tmp_path / "x/one.pt", weights_only=True)
    sample["context_latents"][:, :64] = sample["target_latents"]
    torch.save(sample, tmp_path / "x/one.pt")
    with pytest.raises(UserError, match=r"one\.pt the first, .*the song itself"):
        open_dataset(tmp_path / "x")


def test_the_command_that_makes_them_right_can_be_pasted(tmp_path, caplog):
    folder = tmp_path / "my tensors"
    write_sample(folder / "one.pt", audio_path="/my music/$(touch x)/it's.wav", custom_tag="a b")
    open_dataset(folder)
    command = caplog.records[-1].getMessage().partition("python -m sidestep.preprocess ")[2].partition(" makes")[0]
    config = preprocess_config(*shlex.split(command.replace("<variant>", "base")))
    assert (config.audio_dir, config.dataset_dir) == ("/my music/$(touch x)", f"{folder}-sidestep")
    assert config.custom_tag == "a b"


def test_files_of_one_name_in_two_subfolders_are_two_songs(tmp_path):
    folder = tmp_path / "x"
    for index, name in enumerate(["a/x.pt", "b/x.pt"]):
        write_sample(folder / name, seed=index)
    (folder / "manifest.json").write_text(json.dumps({"samples": ["a/x.pt", "b/x.pt"]}))
    songs = open_dataset(folder).songs
    assert [song.latents for song in songs] == ["a/x.pt", "b/x.pt"]
    assert len({content_id(song) for song in songs}) == 2


def test_the_same_latents_in_two_files_are_one_sound_whatever_else_they_hold(tmp_path):
    folder = tmp_path / "x"
    write_sample(folder / "b.pt")
    write_sample(folder / "sub/b.pt", tokens=7, caption="other words")
    write_sample(folder / "c.pt", seed=1)
    (folder / "manifest.json").write_text(json.dumps({"samples": ["b.pt", "sub/b.pt", "c.pt"]}))
    songs = open_dataset(folder).songs
    _, held_out = hold_out(songs, ValidationConfig(songs=["b.wav"]))
    assert held_out == [0, 1]
    with pytest.raises(UserError, match="which prior_dataset_dir also has"):
        hold_out(songs[1:], ValidationConfig(songs=["b.wav"]), others=songs[:1])


def test_padding_between_frames_is_left_out_too(tmp_path):
    write_sample(tmp_path / "x/one.pt")
    sample = torch.load(tmp_path / "x/one.pt", weights_only=True)
    sample["attention_mask"][3] = 0
    torch.save(sample, tmp_path / "x/one.pt")
    latents = open_dataset(tmp_path / "x").excerpt(0, 2, 4).latents
    assert torch.equal(latents, sample["target_latents"][[2, 4, 5, 6]].float())


def test_every_file_that_cannot_be_used_is_named_at_once(tmp_path):
    folder = tmp_path / "x"
    write_sample(folder / "good.pt")
    (folder / "text.pt").write_bytes(b"no tensors")
    (folder / "evil.pt").write_bytes(pickle.dumps(pytest.raises))
    torch.save([1], folder / "list.pt")
    torch.save({"target_latents": torch.zeros(4, 64)}, folder / "part.pt")
    write_sample(folder / "empty.pt", tokens=0)
    with pytest.raises(UserError) as error:
        open_dataset(folder)
    for name in ("text.pt cannot be read", "evil.pt cannot be read", "list.pt holds a list", "part.pt: attention_mask"):
        assert name in str(error.value)
    assert "empty.pt has 60 frames and 0 tokens that are not padding" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_latents", torch.empty(60, 64, device="meta")),
        ("attention_mask", torch.ones(60).to_sparse()),
        ("target_latents", torch.zeros(60, 64).to(torch.float8_e4m3fn)),
        ("context_latents", torch.empty(60, 128, device="meta")),
        ("metadata", {"caption": torch.ones(3)}),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path, name, value):
    write_sample(tmp_path / "one.pt")
    torch.save(torch.load(tmp_path / "one.pt", weights_only=True) | {name: value}, tmp_path / "one.pt")
    with pytest.raises(UserError, match=rf"one\.pt: ({name} must be plain numbers|'caption' of its {name})"):
        open_dataset(tmp_path)


def test_one_number_repeated_until_the_memory_is_full_is_refused(tmp_path):
    write_sample(tmp_path / "one.pt")
    sample = torch.load(tmp_path / "one.pt", weights_only=True)
    sample["target_latents"] = torch.zeros(1, 1).expand(2**34, 64)
    sample["attention_mask"] = torch.zeros(1).expand(2**34)
    torch.save(sample, tmp_path / "one.pt")
    with pytest.raises(UserError, match=r"one\.pt: target_latents must be plain numbers that the file itself holds"):
        open_dataset(tmp_path)


def test_a_manifest_names_files_inside_the_folder_only(ace_step):
    (ace_step / "manifest.json").write_text(json.dumps({"samples": ["../../etc/two.pt", "C:\\tensors\\one.pt"]}))
    assert [song.latents for song in open_dataset(ace_step).songs] == ["two.pt", "one.pt"]
    (ace_step / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json must be an object"):
        open_dataset(ace_step)


def test_lyrics_that_cannot_be_left_out_are_not(side_step):
    with pytest.raises(UserError, match=r"holds one condition per song, with its lyrics; leave data\.lyrics_dropout"):
        open_dataset(side_step, lyrics_dropout=0.1)


def test_changed_contents_are_another_dataset(side_step):
    before = open_dataset(side_step).fingerprint()
    assert open_dataset(side_step).fingerprint() == before
    write_sample(side_step / "a__two.pt", frames=41, custom_tag="zyx", seed=2)
    assert open_dataset(side_step).fingerprint() != before
