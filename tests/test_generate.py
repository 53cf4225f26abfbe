"""Listening: what is sampled, what is written, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.adapters import SavedAdapter
from sidestep.config.gate import compose_or_explain, read_variant
from sidestep.errors import UserError
from sidestep.exporting.export import export
from sidestep.generate import quote_words
from sidestep.inference.generation import choose_sampling, choose_variant, generate, read_played, read_request
from sidestep.inference.music_files import adapter_name, read_settings, write_music
from sidestep.inference.pipeline import (
    MIN_FRAMES,
    Request,
    Sampling,
    decode_latents,
    encode_request,
    finish,
    sample_latents,
    stream_layers,
)
from tests.factories import export_config, generate_config, run_training, write_dataset
from tests.golden import GOLDEN, golden_transformer
from tests.test_checkpoint import save_in_diffusers_layout
from tests.test_demo import run_command

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
WORDS = {"prompt": "calm, slow", "lyrics": "[verse]\nhello", "bpm": 90, "keyscale": "C major", "timesignature": "4"}
TURBO_TIMES = {  # the original model's own tables
    1: [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    2: [1.0, 14 / 15, 6 / 7, 10 / 13, 2 / 3, 6 / 11, 0.4, 2 / 9],
    3: [1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint_dir, dataset_dir) -> Path:
    """Folders lora and lokr with adapters for the base toy, and turbo with one for the turbo toy."""
    root = tmp_path_factory.mktemp("runs")
    turbo_data = write_dataset(root / "data", checkpoint_dir, lengths=[60, 80], variant="turbo")
    for name, adapter, variant, data in (
        ("lora", "lora", "base", dataset_dir),
        ("lokr", "lokr", "base", dataset_dir),
        ("turbo", "lora", "turbo", turbo_data),
    ):
        run_training(
            root / name, f"adapter={adapter}", f"model_variant={variant}", f"dataset_dir={data}",
            f"checkpoint_dir={checkpoint_dir}", "max_epochs=null", "max_steps=5", "seed=1", "optim.lr=0.1",
        )  # fmt: skip
    return root


def make(checkpoint_dir: Path, folder: Path, *overrides: str) -> list[Path]:
    return generate(generate_config(f"checkpoint_dir={checkpoint_dir}", f"output_dir={folder}", *overrides))


def samples_of(file: Path) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(file, dtype="float32", always_2d=True)[0])


# sampling


def original_sampler(transformer, noise, condition, null_condition, context, times, guidance_scale):
    """The sampler of the original model: Euler steps, with APG where there is guidance."""

    def velocity(latents, t, condition):
        return transformer(latents, t, t, condition, context, return_dict=False)[0]

    latents, running = noise, torch.zeros(())
    for time, following in pairwise([*times, 0.0]):
        t = torch.tensor([time])
        predicted = velocity(latents, t, condition)
        if guidance_scale > 1:
            running = predicted - velocity(latents, t, null_condition) - 0.75 * running
            norm = running.square().sum(dim=1, keepdim=True).sqrt()
            update, along = (running * (2.5 / norm).clamp(max=1)).double(), predicted.double()
            update -= (update * along).sum(1, keepdim=True) / along.square().sum(1, keepdim=True) * along
            predicted = predicted + (guidance_scale - 1) * update.float()
        latents = latents - (time - following) * predicted
    return latents


@pytest.mark.parametrize(
    ("times", "shift", "guidance_scale"),
    [
        *((table, shift, 1.0) for shift, table in TURBO_TIMES.items()),
        *(([s * u / (1 + (s - 1) * u) for u in (1 - i / 12 for i in range(12))], s, g) for s, g in [(1, 7), (3, 4)]),
    ],
)
def test_sampling_equals_the_original_sampler(times, shift, guidance_scale):
    transformer = golden_transformer()
    null_condition = load_file(GOLDEN / "weights_tiny.safetensors")["null_condition_emb"].float()
    generator = torch.Generator().manual_seed(1)
    condition, silence = torch.randn(21, 64, generator=generator), torch.randn(50, 64, generator=generator)
    sampling = Sampling(shift=shift, num_inference_steps=len(times), guidance_scale=guidance_scale)

    actual = sample_latents(
        transformer, condition, null_condition=null_condition[0], silence=silence, num_frames=57, sampling=sampling,
        seed=9,
    )  # fmt: skip

    noise = torch.randn(1, 57, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = original_sampler(
            transformer, noise, condition[None], null_condition, context_latents(silence, 57)[None], times,
            guidance_scale,
        )[0]  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "guidance_scale"), [("base", 7.0), ("turbo", 1.0)])
def test_the_three_steps_equal_the_whole_pipeline_of_diffusers(checkpoint_dir, name, guidance_scale):
    checkpoint = find_checkpoint(checkpoint_dir, read_variant(name))
    tokenizer, text_encoder = checkpoint.load_text_encoder(**CPU)
    condition_encoder, transformer = checkpoint.load_condition_encoder(**CPU), checkpoint.load_transformer(**CPU)
    silence = checkpoint.silence()
    vae = checkpoint.load_vae(**CPU)
    request = Request(seconds=5.5, language="en", **WORDS)
    sampling = Sampling(shift=2.0, num_inference_steps=3, guidance_scale=guidance_scale)

    condition, _ = encode_request(
        request, tokenizer=tokenizer, text_encoder=text_encoder, condition_encoder=condition_encoder, silence=silence
    )
    latents = sample_latents(
        transformer, condition, null_condition=checkpoint.null_condition(), silence=silence,
        num_frames=request.num_frames, sampling=sampling, seed=5,
    )  # fmt: skip
    actual = finish(decode_latents(vae, latents, tile_seconds=30), request.num_samples)

    whole = AceStepPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer,
        condition_encoder=condition_encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    expected = whole(
        **WORDS, audio_duration=5.5, vocal_language="en", num_inference_steps=3, guidance_scale=guidance_scale,
        shift=2.0, generator=torch.Generator().manual_seed(5),
    ).audios[0]  # fmt: skip
    assert request.num_frames == math.ceil(5.5 * 25)
    expected = expected[:, : request.num_samples]  # diffusers leaves the rest of the last frame in
    torch.testing.assert_close(actual, expected * actual.abs().max() / expected.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "words", [WORDS, {**WORDS, "bpm": None, "keyscale": "", "timesignature": ""}, {**WORDS, "lyrics": "[Instrumental]"}]
)
def test_prompts_are_those_of_diffusers_to_the_byte(words):
    request = Request(seconds=12.7, language="de", **words)
    pipeline = AceStepPipeline.__new__(AceStepPipeline)
    assert request.prompts() == pipeline._format_prompt(**words, vocal_language="de", audio_duration=12.7)


def test_empty_lyrics_are_an_instrumental():
    assert Request(prompt="x", seconds=9).prompts() == Request(prompt="x", seconds=9, lyrics="[Instrumental]").prompts()


def test_music_shorter_than_the_model_makes_is_cut_from_what_it_makes():
    request = Request(prompt="x", seconds=2.0)
    assert (request.num_frames, request.num_samples) == (MIN_FRAMES, 96_000)
    assert "- duration: 2 seconds\n" in request.prompts()[0]
    assert finish(torch.ones(2, MIN_FRAMES * 1920), request.num_samples).shape == (2, 96_000)


@pytest.mark.parametrize("num_frames", [7, 14, 28, 55, 56, 129])
def test_any_number_of_frames_can_be_sampled(num_frames):
    """(n / 25) * 25 is more than n for some of these."""
    latents = sample_latents(
        golden_transformer(), torch.zeros(3, 64), null_condition=torch.zeros(1, 64), silence=torch.zeros(50, 64),
        num_frames=num_frames, sampling=Sampling(shift=1.0, num_inference_steps=1, guidance_scale=1.0), seed=0,
    )  # fmt: skip
    assert latents.shape == (num_frames, 64)


def test_music_decoded_in_tiles_is_that_decoded_at_once(checkpoint_dir):
    vae = find_checkpoint(checkpoint_dir, read_variant("base")).load_vae(**CPU)
    latents = torch.randn(301, 64, generator=torch.Generator().manual_seed(2))
    whole = decode_latents(vae, latents, tile_seconds=30)
    tiled = decode_latents(vae, latents, tile_seconds=5)
    assert tiled.shape == whole.shape == (2, 301 * 1920)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_a_transformer_whose_layers_come_and_go_gives_the_same(monkeypatch):
    arguments = {
        "condition": torch.ones(3, 64), "null_condition": torch.zeros(1, 64), "silence": torch.zeros(50, 64),
        "num_frames": 20, "sampling": Sampling(shift=1.0, num_inference_steps=2, guidance_scale=3.0), "seed": 0,
    }  # fmt: skip
    expected = sample_latents(golden_transformer(), **arguments)
    transformer, moves, move = golden_transformer(), [], torch.nn.Module.to
    layers = list(transformer.layers)

    def noted(module, device):
        moves.append((layers.index(module) if module in layers else None, str(device)))
        return move(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    stream_layers(transformer, torch.device("cpu", 0))
    torch.testing.assert_close(sample_latents(transformer, **arguments), expected, rtol=0, atol=0)
    # twice, for two steps, and condition and null condition are one batch
    expected_moves = [(layer, device) for layer in range(4) for device in ("cpu:0", "cpu")]
    assert [move for move in moves if move[0] is not None] == 2 * expected_moves


# adapters


def test_scale_0_is_the_base_model_to_the_bit_and_other_scales_are_not(trained, checkpoint_dir, tmp_path):
    base = make(checkpoint_dir, tmp_path, "model_variant=base", "guidance_scale=3")[0]
    for name in ("lora", "lokr"):
        played = [
            samples_of(make(checkpoint_dir, tmp_path, f"adapter_dir={trained / name / 'final'}", f"scale={scale}",
                            "guidance_scale=3")[0])
            for scale in (0, 0.5, 1)
        ]  # fmt: skip
        assert torch.equal(played[0], samples_of(base))
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert (played[one] - played[other]).abs().max() > 0.01


def test_half_the_scale_is_half_the_change_of_the_weights(trained, checkpoint_dir, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(trained / "lora" / "final", half)
    weights = load_file(half / "adapter_model.safetensors")
    halved = {key: tensor * (0.5 if "lora_B" in key else 1) for key, tensor in weights.items()}
    save_file(halved, half / "adapter_model.safetensors")

    actual = make(checkpoint_dir, tmp_path, f"adapter_dir={trained / 'lora' / 'final'}", "scale=0.5")[0]
    expected = make(checkpoint_dir, tmp_path, f"adapter_dir={half}", "model_variant=base")[0]
    torch.testing.assert_close(samples_of(actual), samples_of(expected), rtol=0, atol=1e-3)


def test_two_adapters_play_together(trained, checkpoint_dir, tmp_path):
    both = f"[{trained / 'lora' / 'final'},{trained / 'lokr' / 'final'}]"
    together = make(checkpoint_dir, tmp_path, f"adapter_dir={both}", "scale=[1,0.5]")[0]
    alone = make(checkpoint_dir, tmp_path, f"adapter_dir={trained / 'lora' / 'final'}")[0]
    with_second_at_0 = make(checkpoint_dir, tmp_path, f"adapter_dir={both}", "scale=[1,0]")[0]
    assert "lora+" in together.name
    assert "lokr-at-0.5" in together.name
    assert (samples_of(together) - samples_of(alone)).abs().max() > 0.01
    assert torch.equal(samples_of(with_second_at_0), samples_of(alone))


@pytest.mark.parametrize("name", ["lora", "lokr"])
def test_half_precision_plays_nearly_the_same(trained, checkpoint_dir, tmp_path, name):
    adapter = f"adapter_dir={trained / name / 'final'}"
    exact, rounded = (
        samples_of(make(checkpoint_dir, tmp_path, adapter, f"precision={precision}", "guidance_scale=1")[0])
        for precision in ("fp32", "bf16")
    )
    assert torch.corrcoef(torch.stack([exact.flatten(), rounded.flatten()]))[0, 1] > 0.95


# files


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_a_file_is_stereo_at_48_khz_with_its_settings_inside(trained, checkpoint_dir, tmp_path, kind):
    words = ('prompt="warm jazz, soft drums"', 'lyrics="[verse]\nein schöner Tag"', "bpm=90", "keyscale=C major")
    adapter = f"adapter_dir={trained / 'lokr' / 'final'}"
    file = make(checkpoint_dir, tmp_path / "music", *words, adapter, f"format={kind}", "seeds=7", "seconds=1.3")[0]

    assert re.fullmatch(rf"runs\d+-lokr-seed7-[0-9a-f]{{8}}\.{kind}", file.name)
    assert [path.name for path in (tmp_path / "music").iterdir()] == [file.name]
    info = soundfile.info(file)
    assert (info.samplerate, info.channels, info.frames) == (48_000, 2, 62_400)
    samples = samples_of(file)
    assert samples.isfinite().all()
    assert samples.abs().max() == pytest.approx(10 ** (-1 / 20), abs=1e-4)
    assert samples.std() > 0.01
    assert not torch.equal(samples[:, 0], samples[:, 1])
    settings = read_settings(file)
    assert settings["prompt"] == "warm jazz, soft drums"
    assert settings["lyrics"] == "[verse]\nein schöner Tag"
    assert settings["seed"] == 7
    assert settings["model_variant"] == "base"
    assert settings["adapters"][0]["scale"] == 1
    assert str(tmp_path) not in json.dumps(settings)
    assert str(trained) not in json.dumps(settings)


def test_long_lyrics_fit_into_either_kind_of_file(tmp_path):
    settings = {"lyrics": "eine lange Zeile über das Meer\n" * 600}
    for kind in ("flac", "wav"):
        write_music(tmp_path / f"song.{kind}", torch.zeros(2, 100), settings)
        assert read_settings(tmp_path / f"song.{kind}") == settings


def test_the_same_settings_make_the_same_file_and_others_another(checkpoint_dir, tmp_path):
    first, second = make(checkpoint_dir, tmp_path, "model_variant=turbo", "seeds=[0,1]")
    before = {file: file.read_bytes() for file in (first, second)}
    assert before[first] != before[second]
    assert make(checkpoint_dir, tmp_path, "model_variant=turbo", "seeds=1") == [second]
    assert second.read_bytes() == before[second]
    assert make(checkpoint_dir, tmp_path, "model_variant=turbo", "seeds=1", "shift=2")[0] not in (first, second)
    assert make(checkpoint_dir, tmp_path, "model_variant=turbo", "seeds=1", "prompt=loud")[0] not in (first, second)


def test_both_layouts_of_a_checkpoint_make_the_same_file(checkpoint_dir, tmp_path):
    save_in_diffusers_layout(find_checkpoint(checkpoint_dir, read_variant("base")), tmp_path / "model")
    original = make(checkpoint_dir, tmp_path / "original", "model_variant=base")[0]
    converted = make(tmp_path / "model", tmp_path / "converted", "model_variant=base")[0]
    assert original.name == converted.name
    assert original.read_bytes() == converted.read_bytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("outputs/first/lokr-base/final", "first-lokr-base"),
        ("outputs/first/lokr-base/checkpoints/epoch_10", "lokr-base-epoch_10"),
        ("outputs/sweep/lora-lr0.0001/final/", "sweep-lora-lr0.0001"),
        ("my loras/jazz & blues", "my-loras-jazz-blues"),
    ],
)
def test_a_file_is_named_after_where_its_adapter_lies(path, name):
    assert adapter_name(Path(path)) == name


# settings


def test_what_is_not_typed_comes_from_the_adapter_and_then_from_the_model(trained):
    adapter = read_played(trained / "turbo" / "final", 1.0)
    adapter.about.update(shift=2.5, num_inference_steps=6)
    variant = choose_variant(None, [adapter])
    assert variant == read_variant("turbo")
    unset = generate_config("num_inference_steps=null")
    assert choose_sampling(unset, variant, [adapter]) == Sampling(
        shift=2.5, num_inference_steps=6, guidance_scale=variant.guidance_scale
    )
    assert choose_sampling(generate_config("shift=2", "num_inference_steps=4"), variant, [adapter]) == Sampling(
        shift=2.0, num_inference_steps=4, guidance_scale=variant.guidance_scale
    )


def test_on_another_model_the_adapters_sampling_does_not_count(trained, caplog):
    adapter = read_played(trained / "turbo" / "final", 1.0)
    variant = choose_variant(read_variant("sft"), [adapter])
    sampling = choose_sampling(generate_config("num_inference_steps=null"), variant, [adapter])
    assert sampling.num_inference_steps == variant.num_inference_steps == 50
    assert "was trained on turbo and now plays on sft" in caplog.text


def test_a_model_with_the_adapter_in_it_already_is_pointed_out(trained, checkpoint_dir, tmp_path, caplog):
    adapter = f"adapter_dir={trained / 'lora' / 'final'}"
    make(checkpoint_dir, tmp_path, adapter)
    assert "was trained on another model" not in caplog.text
    merged = export(
        export_config(adapter, f"checkpoint_dir={checkpoint_dir}", "format=merged", f"output_dir={tmp_path / 'merged'}")
    )
    make(merged, tmp_path, adapter)
    assert f"was trained on another model (base) than the one in {merged}" in caplog.text


def test_too_little_memory_for_an_adapter_is_one_line(trained, checkpoint_dir, tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SavedAdapter, "change", no_memory)
    message = refused(checkpoint_dir, tmp_path, f"adapter_dir={trained / 'lora' / 'final'}")
    assert "the transformer ran out of memory at seconds=1; use seconds=0.5 or offload=true" in message


def test_a_trigger_word_that_is_missing_is_named(trained, checkpoint_dir, tmp_path, caplog):
    tagged = tmp_path / "tagged"
    shutil.copytree(trained / "turbo" / "final", tagged)
    weights = load_file(tagged / "adapter_model.safetensors")
    about = {"model_variant": "turbo", "custom_tags": ["zydeco9"]}
    save_file(weights, tagged / "adapter_model.safetensors", {"sidestep": json.dumps(about)})
    caplog.set_level(logging.INFO)
    make(checkpoint_dir, tmp_path, f"adapter_dir={tagged}")
    assert "trained with the trigger word zydeco9, which is not in the prompt" in caplog.text
    caplog.clear()
    make(checkpoint_dir, tmp_path, f"adapter_dir={tagged}", "prompt=Zydeco9 piano")
    assert "trigger word" not in caplog.text


def test_words_too_long_for_the_model_are_named(checkpoint_dir, tmp_path, caplog):
    make(checkpoint_dir, tmp_path, "model_variant=turbo", f"lyrics={'la ' * 3000}")
    assert re.search(r"the last \d+ tokens of the lyrics are past what ACE-Step reads", caplog.text)


def test_words_are_read_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "song.txt").write_text("\ufeff[verse]\nHello, [you]\n", encoding="utf-8")
    (tmp_path / "my prompt.txt").write_text("warm jazz, soft drums\n", encoding="utf-8")
    request = read_request(generate_config("prompt=@my prompt.txt", "lyrics=@song.txt"))
    assert request.prompt == "warm jazz, soft drums"
    assert request.lyrics == "[verse]\nHello, [you]"


@pytest.mark.parametrize(
    "words",
    [
        "warm jazz, soft drums",
        "don't stop",
        'say "hi", loudly',
        "[verse]\nHello (you)\n\n[chorus]",
        "naïve café, 音楽",
        "120",
        "ends in a backslash \\",
        'a \\" b',
        "100% ${x} = {y}",
        "@my song.txt",
        "F# minor",
    ],
)
def test_words_arrive_as_they_were_typed(words):
    typed = quote_words([f"prompt={words}", "seconds=1"])
    assert compose_or_explain("generate", typed).prompt == words
    assert typed[1] == "seconds=1"


def test_words_that_are_quoted_already_and_sweeps_are_left_alone():
    assert quote_words(['prompt="a, b"', "prompt='a'", "lyrics="]) == ['prompt="a, b"', "prompt='a'", "lyrics="]
    assert quote_words(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]


# refusals


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["seconds=0.001"], "seconds=0.001 must be at least 0.08 seconds"),
        (["shift=1e-9"], "shift=1e-09 must be at least 0.001"),
        (["seconds=601"], "use seconds=600 or less"),
        (["prompt="], "prompt is empty"),
        (["prompt=???"], "prompt must be set"),
        (["seeds=[]"], "at least one"),
        (["seeds=[1,1]"], "same seed twice"),
        (["seeds=-1"], "must be whole numbers"),
        (["seeds=18446744073709551616"], "must be whole numbers"),
        (["scale=0.5"], "no effect without adapter_dir"),
        (["adapter_dir=[a,b]", "scale=[1]"], "scale has 1 numbers for 2 adapters"),
        (["adapter_dir=a", "scale=loud"], "scale=loud must be a number"),
        (["adapter_dir=a", "scale=nan"], "scale=nan must be a finite number"),
        (["adapter_dir=a", "scale=true"], "scale=True must be a number"),
        (["adapter_dir=[[a]]"], "must be a folder, or a list"),
        (["guidance_scale=0.5"], "guidance_scale=0.5 must be at least 1"),
        (["tile_seconds=4"], "must be at least 5"),
        (["model_variant.shift=2"], "choose that first"),
        (["adapter_dri=a"], "did you mean adapter_dir"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_loaded(typed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate_config(*typed)


def refused(checkpoint_dir: Path, folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refusal:
        make(checkpoint_dir, folder, *overrides)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_is_missing_or_does_not_fit_is_one_line(trained, checkpoint_dir, tmp_path):
    adapter = f"adapter_dir={trained / 'turbo' / 'final'}"
    assert "type model_variant=" in refused(checkpoint_dir, tmp_path)
    assert "holds no adapter" in refused(checkpoint_dir, tmp_path, f"adapter_dir={tmp_path}")
    assert "does not exist" in refused(checkpoint_dir, tmp_path, f"adapter_dir={tmp_path / 'nothing'}")
    assert "download_checkpoint.py turbo" in refused(tmp_path, tmp_path, adapter)
    assert "has no effect on turbo" in refused(checkpoint_dir, tmp_path, adapter, "guidance_scale=3")
    message = refused(checkpoint_dir, tmp_path, adapter, "model_variant=xl_turbo")
    assert "was trained on turbo, which has another size than xl_turbo; use model_variant=turbo" in message
    assert "cannot be written" in refused(checkpoint_dir, Path(__file__), adapter)


def test_an_adapter_of_another_program_needs_the_model_named(trained, checkpoint_dir, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(trained / "turbo" / "final", foreign)
    save_file(load_file(foreign / "adapter_model.safetensors"), foreign / "adapter_model.safetensors")
    message = refused(checkpoint_dir, tmp_path, f"adapter_dir={foreign}")
    assert "does not say what it was trained on; type model_variant=turbo" in message
    assert make(checkpoint_dir, tmp_path, f"adapter_dir={foreign}", "model_variant=turbo")[0].is_file()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "is damaged; copy it again"),
        ('{"model_variant": "huge"}', "model_variant 'huge' is not known"),
        ('{"model_variant": "turbo", "shift": "much"}', "has shift='much'; type shift=... yourself"),
        ('{"model_variant": "turbo", "shift": 1e-9}', "has shift=1e-09; type shift=... yourself"),
    ],
)
def test_a_header_that_makes_no_sense_is_one_line(trained, checkpoint_dir, tmp_path, about, message):
    odd = tmp_path / "odd"
    shutil.copytree(trained / "turbo" / "final", odd)
    save_file(load_file(odd / "adapter_model.safetensors"), odd / "adapter_model.safetensors", {"sidestep": about})
    assert message in refused(checkpoint_dir, tmp_path, f"adapter_dir={odd}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"bell \x07"])
def test_words_that_cannot_be_read_are_one_line(checkpoint_dir, tmp_path, content):
    if content is not None:
        (tmp_path / "song.txt").write_bytes(content)
    message = refused(checkpoint_dir, tmp_path, "model_variant=base", f"lyrics=@{tmp_path / 'song.txt'}")
    assert "song.txt" in message


# the command


def test_the_command_prints_the_files_it_made(trained, checkpoint_dir, tmp_path):
    (tmp_path / "song.txt").write_text("[verse]\nHello", encoding="utf-8")
    adapter = f"adapter_dir={trained / 'turbo' / 'final'}"
    typed = (f"checkpoint_dir={checkpoint_dir}", "prompt=naïve jazz, soft", "lyrics=@song.txt", "seconds=1")
    done = run_command(tmp_path, adapter, *typed, "seeds=[3,4]", command="generate")
    assert done.returncode == 0, done.stderr
    files = done.stdout.splitlines()
    assert [read_settings(tmp_path / file)["seed"] for file in files] == [3, 4]
    assert read_settings(tmp_path / files[0])["prompt"] == "naïve jazz, soft"
    assert "turbo with" in done.stderr
    assert (tmp_path / "outputs/generated/logs/generate.log").is_file()
