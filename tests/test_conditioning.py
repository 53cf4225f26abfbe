import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Model

from sidestep.acestep.conditioning import context_latents, encode_condition, tokenize
from sidestep.acestep.keymap import split_key
from sidestep.acestep.prompts import caption_prompt, lyrics_prompt

GOLDEN = Path(__file__).parent / "data/golden"
TEXT = caption_prompt("mytag, a calm piano piece", bpm=120, timesignature="4", keyscale="C major", duration=30)
LYRICS = lyrics_prompt("[Verse]\nhello world\n[Chorus]\nsing along", "en")


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "text_conditioning.safetensors")


@pytest.fixture(scope="module")
def silence():
    return load_file(GOLDEN / "silence.safetensors")["silence_latent_raw"][0].T.float()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tiny_text_encoder", local_files_only=True)


@pytest.fixture(scope="module")
def text_encoder():
    return Qwen3Model.from_pretrained(GOLDEN / "tiny_text_encoder", dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def condition_encoder():
    config = json.loads((GOLDEN / "config_tiny.json").read_text(encoding="utf-8"))
    widths = ["hidden_size", "intermediate_size", "text_hidden_dim", "head_dim", "sliding_window", "rope_theta"]
    counts = ["num_lyric_encoder_hidden_layers", "num_timbre_encoder_hidden_layers"]
    heads = ["num_attention_heads", "num_key_value_heads"]
    encoder = AceStepConditionEncoder(**{key: config[key] for key in widths + counts + heads})
    state = {"silence_latent": encoder.silence_latent}
    for key, weight in load_file(GOLDEN / "weights_tiny.safetensors").items():
        part, name = split_key(key) or ("", "")
        if part == "condition_encoder":
            state[name] = weight.float()
    encoder.load_state_dict(state)
    return encoder.eval()


def test_prompts_become_the_token_ids_of_inference(tokenizer, expected):
    text_ids, cut = tokenize(tokenizer, TEXT, 256)
    lyric_ids, _ = tokenize(tokenizer, LYRICS, 2048)
    assert cut == 0
    assert torch.equal(text_ids, expected["infer_text_ids"])
    assert torch.equal(lyric_ids, expected["infer_lyric_ids"])


def test_a_long_prompt_is_cut_and_the_cut_is_counted(tokenizer, expected):
    whole = expected["infer_text_ids"]
    ids, cut = tokenize(tokenizer, TEXT, 20)
    assert ids.shape == (1, 20)
    assert cut == whole.shape[1] - 20
    assert torch.equal(ids[:, :18], whole[:, :18])


def test_captions_pass_the_text_encoder_and_lyrics_only_its_embeddings(text_encoder, condition_encoder, expected):
    seen = {}
    parts = ("text_projector", "lyric_encoder", "timbre_encoder")
    hooks = [
        getattr(condition_encoder, part).register_forward_pre_hook(
            lambda module, args, kwargs, part=part: seen.update({part: [*args, *kwargs.values()]}), with_kwargs=True
        )
        for part in parts
    ]
    encode_condition(
        expected["infer_text_ids"],
        expected["infer_lyric_ids"],
        text_encoder=text_encoder,
        condition_encoder=condition_encoder,
        silence=torch.zeros(1000, 64),
    )
    for hook in hooks:
        hook.remove()
    (text,), (lyrics, mask), (reference, _) = (seen[part] for part in parts)
    torch.testing.assert_close(text, expected["infer_text_hidden"], rtol=0, atol=1e-5)
    assert torch.equal(lyrics, expected["infer_lyric_hidden"])
    assert mask.dtype is torch.bool
    assert reference.shape == (1, 750, 64)


def test_the_condition_is_that_of_inference(text_encoder, condition_encoder, silence, expected):
    condition = encode_condition(
        expected["infer_text_ids"],
        expected["infer_lyric_ids"],
        text_encoder=text_encoder,
        condition_encoder=condition_encoder,
        silence=silence,
    )
    assert expected["infer_encoder_mask"].all()
    torch.testing.assert_close(condition, expected["infer_encoder"][0], rtol=0, atol=1e-5)


def test_a_bfloat16_condition_keeps_every_token_past_256(text_encoder, condition_encoder, silence):
    ids = torch.arange(600).remainder(300)[None]
    condition = encode_condition(
        ids[:, :250],
        ids,
        text_encoder=text_encoder,
        condition_encoder=condition_encoder.to(torch.bfloat16),
        silence=silence,
    )
    condition_encoder.float()
    assert condition.shape == (600 + 1 + 250, 64)
    assert condition.dtype is torch.bfloat16


def test_context_latents_are_silence_beside_ones(silence):
    golden = load_file(GOLDEN / "prepare_condition.safetensors")
    context = context_latents(silence, 37)
    torch.testing.assert_close(context, golden["p1_text2music.context_latents"][0], rtol=0, atol=1e-5)


def test_context_past_the_end_of_silence_begins_again(silence):
    context = context_latents(silence, 2003)
    assert context.shape == (2003, 128)
    assert torch.equal(context[1000:2000, :64], silence)
    assert torch.equal(context[2000:, :64], silence[:3])
