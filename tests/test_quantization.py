"""Frozen layers stored in 8 or 4 bits give what layers with the rounded weights would give."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.quantization import QuantizedLinear, pack, quantize_linears
from sidestep.errors import UserError
from tests.factories import ADAPTERS, adapter_config, run_training, train_config
from tests.golden import golden_transformer
from tests.test_fused import INPUTS, TARGET
from tests.test_train import assert_same_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "error", "bits"), [("int8", 0.01, 8.2), ("nf4", 0.11, 4.3)])
def test_a_stored_weight_is_near_and_small(kind, error, bits):
    linear = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    stored = QuantizedLinear(linear, kind, CPU)
    assert (stored.weight - linear.weight).norm() < error * linear.weight.norm()
    assert stored.weight.dtype is torch.bfloat16
    assert sum(8 * buffer.nbytes for buffer in stored.buffers()) < bits * linear.weight.numel()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_row_of_zeros_stays_zero(kind):
    linear = nn.Linear(64, 3)
    linear.weight.data[1] = 0
    weight = QuantizedLinear(linear, kind, CPU).weight
    assert weight.isfinite().all()
    assert weight[1].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ADAPTERS)
def test_every_family_trains_as_on_the_rounded_weights(family, kind):
    def train(quantized):
        transformer = golden_transformer()
        quantize_linears(transformer.layers, kind, CPU)
        if not quantized:
            for module in list(transformer.layers.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, QuantizedLinear):
                        plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                        plain.weight, plain.bias = nn.Parameter(child.weight, requires_grad=False), child.bias
                        setattr(module, name, plain)
        WindowedAttention(transformer)
        torch.manual_seed(0)
        parameters = list(adapter_config(*ADAPTERS[family]).attach(transformer).parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        transformer.train()
        losses = []
        for _ in range(3):
            loss = (transformer(**INPUTS, return_dict=False)[0] - TARGET).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(quantized=True)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(quantized=False), rel=1e-6)


def test_nothing_but_the_stored_weight_is_kept_for_the_backward_pass():
    linear = QuantizedLinear(nn.Linear(64, 64, bias=False), "int8", CPU)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(torch.randn(5, 64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {linear.packed.data_ptr(), linear.scales.data_ptr()}


def test_a_transformer_is_loaded_in_less_memory(checkpoint_dir):
    checkpoint = find_checkpoint(checkpoint_dir, train_config().model_variant)

    def size(kind):
        model = checkpoint.load_transformer(device=CPU, dtype=torch.bfloat16, quantization=kind)
        return sum(tensor.nbytes for tensor in (*model.layers.parameters(), *model.layers.buffers()))

    assert size("int8") < 0.6 * size("none")
    assert size("nf4") < 0.4 * size("none")


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_run_on_stored_weights_goes_on_exactly_and_is_another_run_than_one_on_whole_weights(
    tmp_path, checkpoint_dir, dataset_dir, kind
):
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    settings = (*places, "adapter=lora", f"vram_profile.base_quantization={kind}")
    run_training(tmp_path / "whole", *settings, "max_epochs=2")
    run_training(tmp_path / "parts", *settings, "max_epochs=1")
    with pytest.raises(UserError, match=f"vram_profile.base_quantization={kind}"):
        run_training(tmp_path / "parts", *places, "adapter=lora", "max_epochs=2")
    run_training(tmp_path / "parts", *settings, "max_epochs=2")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")


def test_without_bitsandbytes_nf4_is_refused_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"base_quantization=nf4 needs bitsandbytes .*pip install 'sidestep\[8bit\]'"):
        pack(torch.zeros(64, 64), "nf4")
