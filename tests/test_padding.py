"""A padded batch must give what each song alone would give."""

import pytest
import torch

from sidestep.acestep.padding import PaddingMasks
from tests.golden import golden_transformer

FRAMES, TOKENS = [64, 40, 26], [12, 30, 7]


@pytest.fixture(scope="module")
def songs():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return [(draw(t, 64), draw(length, 64), draw(t, 128)) for t, length in zip(FRAMES, TOKENS, strict=True)]


def forward(transformer, latents, condition, context, t):
    return transformer(
        hidden_states=latents,
        timestep=t,
        timestep_r=t,
        encoder_hidden_states=condition,
        context_latents=context,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_padded_batch_equals_its_single_songs(songs, gradient_checkpointing):
    transformer = golden_transformer()
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    t = torch.tensor([0.3, 0.6, 0.9])
    pad = torch.nn.utils.rnn.pad_sequence
    latents, condition, context = (pad(rows, batch_first=True, padding_value=3.0) for rows in zip(*songs, strict=True))
    frame_mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    condition_mask = torch.arange(max(TOKENS)) < torch.tensor(TOKENS)[:, None]
    weight = transformer.layers[0].self_attn.to_k.weight

    masks = PaddingMasks(transformer)
    masks.set(frame_mask, condition_mask)
    batched = forward(transformer, latents, condition, context, t)
    (batched_gradient,) = torch.autograd.grad((batched * frame_mask[..., None]).square().sum(), weight)
    masks.remove()

    total = 0.0
    for i, (one_latents, one_condition, one_context) in enumerate(songs):
        alone = forward(transformer, one_latents[None], one_condition[None], one_context[None], t[i : i + 1])
        torch.testing.assert_close(batched[i, : FRAMES[i]], alone[0], atol=1e-5, rtol=0)
        total = total + alone.square().sum()
    (gradient,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(batched_gradient, gradient, atol=1e-4, rtol=1e-4)


def test_without_masks_padding_changes_the_result(songs):
    transformer = golden_transformer()
    latents, condition, context = songs[1]
    t = torch.tensor([0.5])
    padded = torch.nn.functional.pad(condition, (0, 0, 0, 10))
    with torch.no_grad():
        alone = forward(transformer, latents[None], condition[None], context[None], t)
        wrong = forward(transformer, latents[None], padded[None], context[None], t)
    assert (alone - wrong).abs().max() > 0.1
