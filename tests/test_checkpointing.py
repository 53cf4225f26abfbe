"""What gradient checkpointing keeps, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from sidestep.acestep.attention import WindowedAttention
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import LoraConfig
from sidestep.config.settings import GradientCheckpointing
from sidestep.errors import UserError
from sidestep.training.checkpointing import enable_gradient_checkpointing
from tests.factories import train_config

LAYERS, WIDTH, TOKENS = 4, 512, 300
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def step(adapter, kind="none", share=1.0, dtype=torch.bfloat16):
    """The gradients of one training step, and the bytes kept for them per token and layer besides the weights."""
    torch.manual_seed(0)
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=WIDTH // 128,
        num_key_value_heads=WIDTH // 256, head_dim=128, encoder_hidden_size=64,
    ).to(dtype)  # fmt: skip
    WindowedAttention(transformer)
    parameters = list(adapter.attach(transformer).parameters())
    transformer.train()
    enable_gradient_checkpointing(transformer, GradientCheckpointing[kind], share)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def draw(length, channels):
        return torch.randn(1, length, channels, dtype=dtype)

    t = torch.tensor([0.5], dtype=dtype)
    inputs = [draw(2 * TOKENS, 64), t, t, draw(10, 64), draw(2 * TOKENS, 128)]
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = transformer(*inputs, return_dict=False)[0].float().square().mean()
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    return torch.autograd.grad(loss, parameters), size / TOKENS / LAYERS


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize(
    "adapter", [LoraConfig(rank=8, dropout=0.1, target_modules=TARGETS), LokrConfig(rank=4)], ids=["lora", "lokr"]
)
def test_gradients_are_the_same(adapter, kind, share):
    expected, _ = step(adapter)
    actual, _ = step(adapter, kind, share)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_what_is_kept_shrinks_with_the_kind_and_the_share():
    adapter = LoraConfig(rank=8, target_modules=TARGETS)
    everything = step(adapter)[1]
    full = step(adapter, "full")[1]
    half = step(adapter, "full", 0.5)[1]
    assert full < 0.06 * everything
    assert half == pytest.approx((everything + full) / 2, rel=0.05)  # what lies outside the layers is kept once


def test_products_and_attention_are_not_computed_again_by_selective_checkpointing():
    adapter = LoraConfig(rank=8, target_modules=TARGETS)
    flops = {}
    for kind in ("none", "selective", "full"):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            step(adapter, kind)
        flops[kind] = counter.get_total_flops()
    assert flops["full"] > 1.3 * flops["none"]
    assert flops["selective"] < 1.05 * flops["none"]


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"vram_profile\.checkpointed_share=0.* to recompute nothing type"):
        train_config("vram_profile.checkpointed_share=0")
