"""Attention that computes only its band equals attention that masks the rest, and leaves padding out."""

import pytest
import torch

from sidestep.acestep import attention
from sidestep.acestep.attention import WindowedAttention
from tests.golden import golden_case, golden_transformer

WINDOW = 8  # of the golden model
LENGTHS = {"one token": 1, "within the window": 9, "masked whole": 32, "in blocks": 41, "whole blocks": 64, "long": 203}


def random_inputs(num_tokens, batch_size=1, num_condition_tokens=12, seed=0):
    """Inputs of a transformer for a number of latent patches."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch_size, *shape, generator=generator)

    t = torch.rand(batch_size, generator=generator)
    return {
        "hidden_states": draw(2 * num_tokens, 64),
        "timestep": t,
        "timestep_r": t,
        "encoder_hidden_states": draw(num_condition_tokens, 64),
        "context_latents": draw(2 * num_tokens, 128),
    }


def forward(transformer, inputs):
    return transformer(**inputs, return_dict=False)[0]


def gradients(transformer, loss):
    return torch.autograd.grad(loss, [layer.self_attn.to_k.weight for layer in transformer.layers])


@torch.no_grad()
@pytest.mark.parametrize("case", ["d1_odd_b1", "d2_b2", "d3_r_ne_t", "d4_len1", "d5_long"])
def test_the_transformer_repeats_the_original_decoder(case):
    transformer = golden_transformer()
    WindowedAttention(transformer)
    inputs, expected = golden_case(case)
    torch.testing.assert_close(forward(transformer, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("num_tokens", LENGTHS.values(), ids=LENGTHS)
def test_each_layer_gives_what_diffusers_gives_with_its_mask(num_tokens, batch_size):
    transformer = golden_transformer()
    torch.manual_seed(0)
    hidden_states = torch.randn(batch_size, num_tokens, 64)
    angles = torch.rand(num_tokens, 16)
    distance = (torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)).abs()
    band = torch.zeros(1, 1, num_tokens, num_tokens).masked_fill(distance > WINDOW, torch.finfo(torch.float32).min)

    for index, mask in ((0, band), (1, None)):  # a sliding and a full layer
        attn = transformer.layers[index].self_attn

        def run(mask, attn=attn):
            inputs = hidden_states.clone().requires_grad_()
            output = attn(inputs, image_rotary_emb=(angles.cos(), angles.sin()), attention_mask=mask)
            return output, *torch.autograd.grad(output.square().mean(), [inputs, *attn.parameters()])

        expected = run(mask)
        attention = WindowedAttention(transformer)
        actual = run(None)
        attention.remove()
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-6)
        for one, other in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [(32, 20, 13), (16, 9, 2), (120, 57, 9)], ids=["masked", "short", "in blocks"])
def test_a_padded_batch_equals_its_single_songs(lengths, gradient_checkpointing):
    condition_lengths = (12, 30, 7)
    songs = [random_inputs(n, 1, m, seed=n) for n, m in zip(lengths, condition_lengths, strict=True)]
    frame_mask = torch.arange(2 * max(lengths)) < 2 * torch.tensor(lengths)[:, None]
    condition_mask = torch.arange(max(condition_lengths)) < torch.tensor(condition_lengths)[:, None]
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([song[name][0] for song in songs], batch_first=True, padding_value=3.0)
        if songs[0][name].ndim > 1
        else torch.cat([song[name] for song in songs])
        for name in songs[0]
    }
    transformer = golden_transformer()
    attention = WindowedAttention(transformer)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    attention.set_padding(frame_mask, condition_mask)
    batched = forward(transformer, batch)
    assert batched.isfinite().all()
    batched_gradients = gradients(transformer, (batched * frame_mask[..., None]).square().sum())

    attention.remove()
    total = torch.zeros(())
    for i, (song, length) in enumerate(zip(songs, lengths, strict=True)):
        alone = forward(transformer, song)
        torch.testing.assert_close(batched[i, : 2 * length], alone[0], atol=1e-5, rtol=0)
        total = total + alone.square().sum()
    for one, other in zip(batched_gradients, gradients(transformer, total), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # backward there is none on a CPU; tests/test_gpu.py has it
@pytest.mark.parametrize("lengths", [(41,), (64,), (203,), (120, 57, 9)], ids=str)
def test_flex_attention_gives_what_blocks_give(lengths):
    inputs = random_inputs(max(lengths), len(lengths))
    frame_mask = torch.arange(2 * max(lengths)) < 2 * torch.tensor(lengths)[:, None] if len(lengths) > 1 else None
    outputs = []
    for flex in (False, True):
        transformer = golden_transformer()
        WindowedAttention(transformer, flex=flex).set_padding(frame_mask, None)
        outputs.append(forward(transformer, inputs))
    real = slice(None) if frame_mask is None else frame_mask
    assert outputs[1].isfinite().all()
    torch.testing.assert_close(outputs[0][real], outputs[1][real], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_describes_a_band_once_for_each_length(monkeypatch):
    described = []
    describe = attention.create_block_mask
    monkeypatch.setattr(
        attention, "create_block_mask", lambda *args, **options: described.append(args[3]) or describe(*args, **options)
    )
    attention._plain_band.cache_clear()
    transformer = golden_transformer()
    flex = WindowedAttention(transformer, flex=True)
    for num_tokens in (41, 64, 41):
        flex.set_padding(None, None)
        forward(transformer, random_inputs(num_tokens))
    assert described == [41, 64]
    frame_mask = torch.arange(82) < 2 * torch.tensor([41, 20])[:, None]
    for _ in range(2):  # what is padded may differ from batch to batch
        flex.set_padding(frame_mask, None)
        forward(transformer, random_inputs(41, 2))
    assert described == [41, 64, 41, 41]


def test_without_masks_padding_changes_the_result():
    transformer = golden_transformer()
    attention = WindowedAttention(transformer)
    song = random_inputs(40)
    padded = {**song, "encoder_hidden_states": torch.nn.functional.pad(song["encoder_hidden_states"], (0, 0, 0, 10))}
    with torch.no_grad():
        alone = forward(transformer, song)
        assert (forward(transformer, padded) - alone).abs().max() > 0.1
        attention.set_padding(None, torch.arange(22)[None] < 12)
        torch.testing.assert_close(forward(transformer, padded), alone, atol=1e-5, rtol=0)
        attention.set_padding(None, None)
        torch.testing.assert_close(forward(transformer, song), alone, atol=0, rtol=0)


def test_ten_steps_have_the_losses_of_masked_attention():
    inputs, target = random_inputs(100, 2), torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for windowed in (False, True):
        transformer = golden_transformer()
        if windowed:
            WindowedAttention(transformer)
        optimizer = torch.optim.SGD(transformer.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(10):
            loss = (forward(transformer, inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 0.01
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_transformer_makes_no_mask_of_all_pairs(monkeypatch):
    made = []
    monkeypatch.setattr(
        "diffusers.models.transformers.ace_step_transformer._create_4d_mask", lambda **sizes: made.append(sizes)
    )
    transformer = golden_transformer()
    attention = WindowedAttention(transformer)
    forward(transformer, random_inputs(50))
    assert not made
    attention.remove()
    forward(transformer, random_inputs(50))
    assert len(made) == 1


def test_a_mask_from_elsewhere_is_refused():
    transformer = golden_transformer()
    WindowedAttention(transformer)
    with pytest.raises(ValueError, match="set_padding"):
        transformer.layers[1].self_attn(torch.zeros(1, 4, 64), attention_mask=torch.zeros(1, 1, 1, 4))
