"""A frozen decoder that keeps less and takes less time gives what diffusers' own gives."""

from __future__ import annotations

import pytest
import torch

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.frozen import FrozenMLP, FrozenNorm, lay_side_by_side, streamline
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from tests.test_checkpointing import TARGETS, small_transformer

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def output_and_gradients(dtype, streamlined):
    """A forward pass, the gradients of an adapter in float32, and the bytes kept between them.

    Where ``streamlined`` is None, only the layout in memory is changed.
    """
    transformer = small_transformer(width=256).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if streamlined is None:
        lay_side_by_side(transformer)  # in another order the same numbers have other last bits
    elif streamlined:
        streamline(transformer)
        assert isinstance(transformer.layers[0].mlp, FrozenMLP)
        assert isinstance(transformer.norm_out, FrozenNorm)
    WindowedAttention(transformer)
    parameters = list(LoraConfig(rank=8, target_modules=TARGETS).attach(transformer).parameters())
    for parameter in parameters:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    x, condition, context = (
        torch.randn(2, length, width, generator=generator).to(dtype)
        for length, width in ((80, 64), (10, 64), (80, 128))
    )
    t = torch.tensor([0.3, 0.8], dtype=dtype)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", BFLOAT16, enabled=dtype is BFLOAT16),
    ):
        output = transformer(x, t, t, condition, context, return_dict=False)[0]
    gradients = torch.autograd.grad(output.float().square().mean(), parameters)
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients]), size


@pytest.fixture(scope="module")
def results():
    return {
        (dtype, streamlined): output_and_gradients(dtype, streamlined)
        for dtype in (FLOAT32, BFLOAT16)
        for streamlined in (False, None, True)
    }


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_norms_and_mlps_give_the_same_to_the_last_bit(results, dtype):
    assert torch.equal(results[dtype, None][0], results[dtype, True][0])


def test_outputs_are_the_same_however_tokens_lie_in_memory(results):
    torch.testing.assert_close(results[FLOAT32, True][0], results[FLOAT32, False][0], rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same_in_float32(results):
    expected, actual = results[FLOAT32, False][1], results[FLOAT32, True][1]
    assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_gradients_in_bfloat16_are_as_near_to_those_in_float32(results):
    exact = results[FLOAT32, False][1]
    usual, ours = ((results[BFLOAT16, streamlined][1] - exact).norm() for streamlined in (False, True))
    assert ours < 1.02 * usual


def test_a_third_less_is_kept_in_bfloat16(results):
    assert results[BFLOAT16, True][2] < 0.67 * results[BFLOAT16, False][2]


def test_the_names_of_the_weights_stay():
    transformer = small_transformer()
    names = list(transformer.state_dict())
    streamline(transformer)
    assert list(transformer.state_dict()) == names


@pytest.mark.parametrize("batch_size", [1, 2])
def test_tokens_and_their_gradients_lie_side_by_side_in_every_layer(batch_size):
    transformer = small_transformer()
    streamline(transformer)
    WindowedAttention(transformer)
    LoraConfig(rank=2, target_modules=TARGETS).attach(transformer)
    layouts = []

    def look(layer, inputs, output):
        layouts.append(output.is_contiguous())
        output.register_hook(lambda gradient: layouts.append(gradient.is_contiguous()))

    for layer in transformer.layers:
        layer.register_forward_hook(look)
    x, condition, context = (
        torch.randn(batch_size, length, width) for length, width in ((80, 64), (10, 64), (80, 128))
    )
    t = torch.full((batch_size,), 0.5)
    transformer(x, t, t, condition, context, return_dict=False)[0].square().mean().backward()
    assert layouts == [True] * 2 * len(transformer.layers)


@pytest.mark.parametrize("family", [LoraConfig, DoraConfig, LokrConfig])
def test_what_the_last_layer_of_an_mlp_takes_is_made_again_to_the_last_bit(family):
    def gradients(takes_gate):
        torch.manual_seed(0)
        transformer = small_transformer(width=256)
        streamline(transformer)
        parameters = list(family(rank=4, target_modules=["q_proj", "down_proj"]).attach(transformer).parameters())
        for parameter in parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape)
        for layer in transformer.layers:
            assert layer.mlp.down_proj.takes_gate
            layer.mlp.down_proj.takes_gate = takes_gate
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x, condition, context = (torch.randn(1, length, width) for length, width in ((80, 64), (10, 64), (80, 128)))
        t = torch.tensor([0.5])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = transformer(x, t, t, condition, context, return_dict=False)[0]
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return torch.autograd.grad(output.square().mean(), parameters), size, transformer

    (expected, size_before, transformer), (actual, size, _) = gradients(False), gradients(True)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    width = transformer.layers[0].mlp.up_proj.out_features
    assert size_before - size == len(transformer.layers) * 40 * width * 4
