"""The loaded model against numbers from ACE-Step's original code."""

import pytest
import torch
from safetensors.torch import load_file

from sidestep.acestep.conditioning import context_latents
from tests.golden import GOLDEN, golden_case
from tests.golden_condition import golden_checkpoint

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return golden_checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def transformer(checkpoint):
    return checkpoint.load_transformer(**CPU)


@pytest.fixture(scope="module")
def condition_encoder(checkpoint):
    return checkpoint.load_condition_encoder(**CPU)


@torch.no_grad()
@pytest.mark.parametrize("case", ["d1_odd_b1", "d2_b2", "d3_r_ne_t", "d4_len1", "d5_long"])
def test_the_transformer_repeats_the_original_decoder(transformer, case):
    inputs, expected = golden_case(case)
    actual = transformer(**inputs, return_dict=False)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [
        "e1_nopad_b1",
        "e2_rightpad_b2",
        "e3_multi_refer_b2",
        "e4_leftpad_b2",
        "e5_zero_refer_1frame",
        "e6_long_lyrics",
    ],
)
def test_the_condition_encoder_repeats_the_original_encoder(condition_encoder, case):
    tensors = load_file(GOLDEN / "condition_encoder.safetensors")
    condition, mask = condition_encoder(
        text_hidden_states=tensors[f"{case}.text_hidden_states"],
        text_attention_mask=tensors[f"{case}.text_attention_mask"].bool(),
        lyric_hidden_states=tensors[f"{case}.lyric_hidden_states"],
        lyric_attention_mask=tensors[f"{case}.lyric_attention_mask"].bool(),
        refer_audio_acoustic_hidden_states_packed=tensors[f"{case}.refer"],
        refer_audio_order_mask=tensors[f"{case}.refer_order"],
    )
    torch.testing.assert_close(condition, tensors[f"{case}.out"], rtol=0, atol=1e-5)
    assert torch.equal(mask, tensors[f"{case}.out_mask"].bool())


@torch.no_grad()
def test_silence_and_ones_are_the_original_context_of_text_to_music(checkpoint, condition_encoder):
    tensors = load_file(GOLDEN / "prepare_condition.safetensors")
    case = "p1_text2music"
    silence = checkpoint.silence()
    context = context_latents(silence, tensors[f"{case}.src_latents"].shape[1])
    assert torch.equal(context.expand(2, -1, -1), tensors[f"{case}.context_latents"])

    condition, mask = condition_encoder(
        text_hidden_states=tensors[f"{case}.text_hidden_states"],
        text_attention_mask=tensors[f"{case}.text_attention_mask"].bool(),
        lyric_hidden_states=tensors[f"{case}.lyric_hidden_states"],
        lyric_attention_mask=tensors[f"{case}.lyric_attention_mask"].bool(),
        refer_audio_acoustic_hidden_states_packed=silence[None, :30].expand(2, -1, -1),
        refer_audio_order_mask=torch.tensor([0, 1]),
    )
    torch.testing.assert_close(condition, tensors[f"{case}.encoder_hidden_states"], rtol=0, atol=1e-5)
    assert torch.equal(mask, tensors[f"{case}.encoder_attention_mask"].bool())


def test_the_silence_latent_lies_in_the_encoder_as_its_pipeline_reads_it(checkpoint, condition_encoder):
    raw = load_file(GOLDEN / "silence.safetensors")["silence_latent_raw"].float()
    assert torch.equal(condition_encoder.silence_latent, raw.transpose(1, 2))
    assert torch.equal(checkpoint.silence(), raw[0].T)


def test_the_null_condition_is_read_without_its_encoder(checkpoint, condition_encoder):
    assert torch.equal(checkpoint.null_condition(), condition_encoder.null_condition_emb[0])
