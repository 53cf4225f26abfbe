"""What gradient checkpointing and offloading keep on the device, and that they change nothing."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from sidestep.acestep import checkpoint
from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.quantization import quantize_linears
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from sidestep.adapters.oft import OftConfig
from sidestep.config.gate import read_profiles
from sidestep.config.settings import GradientCheckpointing
from sidestep.devices import place, tensors_of
from sidestep.errors import UserError
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.offload import OffloadedBlocks, first_blocks
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


@pytest.mark.parametrize(
    "adapter", [LoraConfig(rank=8, dropout=0.1, target_modules=TARGETS), LokrConfig(rank=4)], ids=["lora", "lokr"]
)
def test_gradients_are_the_same(adapter):
    expected, _ = step(adapter)
    for kind, share in product(("selective", "full"), (0.5, 1.0)):
        actual, _ = step(adapter, kind, share)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other), f"{kind} {share}"


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


def small_transformer(quantization="none", num_layers=LAYERS, width=128):
    torch.manual_seed(0)
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=num_layers, hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, head_dim=64, encoder_hidden_size=64, sliding_window=16,
    )  # fmt: skip
    transformer.requires_grad_(False)
    if quantization != "none":
        quantize_linears(transformer.layers, quantization, torch.device("cpu"))
    WindowedAttention(transformer)
    return transformer.train()


def losses_of_steps(transformer, parameters):
    """Losses of three AdamW steps, with an evaluation after the first one, and sums of the trained weights."""
    device, dtype = transformer.device, transformer.dtype
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, length, width, generator=generator).to(device, dtype)
        for length, width in ((80, 64), (10, 64), (80, 128))
    ]
    t = torch.tensor([0.5], device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    numbers = []
    for step in range(3):
        loss = transformer(inputs[0], t, t, *inputs[1:], return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        numbers.append(loss.detach().float())
        if step == 0:
            with torch.no_grad():
                numbers.append(transformer(inputs[0], t, t, *inputs[1:], return_dict=False)[0].float().mean())
    return torch.stack(numbers + [parameter.detach().sum() for parameter in parameters])


LORA = LoraConfig(rank=8, dropout=0.1, target_modules=TARGETS)


@pytest.mark.parametrize(
    ("adapter", "quantization", "kind", "share"),
    [
        pytest.param(LORA, "none", "full", 1.0, id="lora"),
        pytest.param(LORA, "none", "full", 0.5, id="lora, half"),
        pytest.param(LORA, "none", "selective", 1.0, id="lora, selective"),
        pytest.param(LokrConfig(rank=4), "int8", "full", 1.0, id="lokr, int8"),
        pytest.param(DoraConfig(rank=4), "none", "full", 1.0, id="dora"),
        pytest.param(OftConfig(), "int8", "selective", 0.5, id="oft, int8, selective, half"),
    ],
)
def test_training_is_the_same_while_frozen_weights_wait_in_main_memory(adapter, quantization, kind, share):
    results = []
    for offloaded_share in (0.0, share):
        transformer = small_transformer(quantization)
        parameters = list(adapter.attach(transformer).parameters())
        enable_gradient_checkpointing(transformer, GradientCheckpointing[kind], share)
        OffloadedBlocks(first_blocks(transformer, offloaded_share), torch.device("cpu"))
        torch.manual_seed(1)
        results.append(losses_of_steps(transformer, parameters))
    assert torch.equal(*results)


def test_no_more_than_two_blocks_are_on_the_device_at_once():
    transformer = small_transformer()
    blocks = list(transformer.layers)
    offloaded = OffloadedBlocks(blocks, torch.device("cpu"))
    buffers = {buffer.untyped_storage().data_ptr() for buffer in offloaded._buffers}
    assert len(buffers) == 2
    seen = []

    def look(block, args):
        seen.append([b.self_attn.to_q.weight.untyped_storage().data_ptr() in buffers for b in blocks])

    for block in blocks:
        block.self_attn.register_forward_pre_hook(look)
    with torch.no_grad():
        transformer(
            torch.randn(1, 80, 64), torch.tensor([0.5]), torch.tensor([0.5]), torch.randn(1, 10, 64),
            torch.randn(1, 80, 128), return_dict=False,
        )  # fmt: skip
    assert seen == [[other is block for other in blocks] for block in blocks]


def test_no_room_in_main_memory_names_the_setting(monkeypatch):
    blocks = small_transformer().layers

    def full(*size, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"no 1 MiB of main memory .*smaller vram_profile\.offloaded_share") as error:
        OffloadedBlocks(blocks, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_weights_that_wait_are_never_read_onto_the_device(checkpoint_dir, monkeypatch):
    """Here "meta" is the device: what is read there has no values, and cannot come back from it."""
    read = checkpoint.open_safetensors

    @contextmanager
    def reading(path, device="cpu"):
        with read(path) as file:
            yield SimpleNamespace(get_tensor=lambda key: file.get_tensor(key).to(device))

    monkeypatch.setattr(checkpoint, "open_safetensors", reading)
    transformer = find_checkpoint(checkpoint_dir, train_config().model_variant).load_transformer(
        device=torch.device("meta"), dtype=torch.bfloat16, waiting_share=0.5
    )
    waiting = [name for name, tensor in transformer.state_dict().items() if tensor.device.type == "cpu"]
    half = len(transformer.layers) // 2
    assert set(waiting) == {f"layers.{n}.{name}" for n in range(half) for name in transformer.layers[n].state_dict()}


def test_what_waits_is_not_placed_with_the_rest():
    transformer = small_transformer("int8")
    buffer = transformer.layers[2].self_attn.to_q.packed
    place(transformer, torch.device("cpu"))
    assert transformer.layers[2].self_attn.to_q.packed is buffer
    place(transformer, torch.device("meta"), waiting=tensors_of(transformer))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # "meta" takes no values
        place(transformer, torch.device("meta"), waiting=tensors_of(transformer.layers))


def test_weights_that_wait_in_main_memory_must_be_asked_for_again():
    with pytest.raises(UserError, match=r"offloaded_share=1 needs as large a share .* that is 0; type vram_profile"):
        train_config("vram_profile=24gb", "vram_profile.offloaded_share=1").vram_profile.resolve(read_profiles(), 24)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"vram_profile\.checkpointed_share=0.* to recompute nothing type"):
        train_config("vram_profile.checkpointed_share=0")
