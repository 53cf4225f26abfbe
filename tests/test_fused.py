"""Fused layers against the formulas written out in float64, and against PEFT's and LyCORIS's own layers."""

import types

import peft
import pytest
import torch
from lycoris.modules.lokr import LokrModule
from torch import nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.frozen import streamline
from sidestep.adapters.layers import StructuredLokr
from sidestep.adapters.loha import LohaConfig
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from sidestep.errors import UserError
from sidestep.training.loop import compile_blocks
from tests.golden import golden_case, golden_transformer

DECODER_SHAPES = [(2048, 2048), (2048, 1024), (2048, 6144), (6144, 2048)]  # inputs and outputs
INPUTS, _ = golden_case()
TARGET = torch.randn(INPUTS["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "lora": LoraConfig(rank=4, alpha=8),
    "lora of ranks": LoraConfig(rank=4, use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": DoraConfig(rank=4, alpha=8),
    "lokr": LokrConfig(rank=3, alpha=6, factor=4),
    "lokr of full factors": LokrConfig(),
    "lokr of two products": LokrConfig(rank=1, alpha=2, decompose_both=True),
}


class OneLayer(nn.Module):
    """A layer where adapters look for it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        block = nn.Module()
        block.self_attn = nn.Module()
        block.self_attn.to_q = base
        self.layers = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0].self_attn.to_q(x)


def one_layer(config, inputs, outputs, *, size, dtype=torch.float32, bias=False):
    """A frozen layer of weights of 0.02 with an adapter on it, whose change of the weight has entries of ``size``.

    Returns the layer, the adapter, and the change as a function of its trained weights in float64.
    """
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(base.weight, std=0.02)
    model = OneLayer(base.to(dtype))
    config.target_modules = ["q_proj"]
    adapter = config.attach(model)
    (path,) = adapter.weights()

    def change(leaves):
        scale = adapter.scale_of(path)
        return scale * config.change(dict(zip(adapter.weights()[path], leaves, strict=True)), base.weight.double())

    parameters = list(adapter.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    factor = (size / change([p.detach().double() for p in parameters]).std()) ** (1 / len(parameters))
    for parameter in parameters:
        parameter.data *= factor.float()
    return model, parameters, change


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def errors(model, parameters, change, tokens=6):
    """Relative errors of the output and of every gradient, against float64."""
    base = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens // 2, base.shape[1], generator=generator).to(base.dtype).requires_grad_()
    output = model(x)
    upstream = torch.randn(output.shape, generator=generator).to(base.dtype)
    gradients = torch.autograd.grad(output, [x, *parameters], upstream)

    exact_x = x.detach().double().requires_grad_()
    leaves = [parameter.detach().double().requires_grad_() for parameter in parameters]
    exact = exact_x @ (base.double() + change(leaves)).T
    exact_gradients = torch.autograd.grad(exact, [exact_x, *leaves], upstream.double())
    pairs = zip([output, *gradients], [exact, *exact_gradients], strict=True)
    return [relative_error(actual.detach(), expected.detach()) for actual, expected in pairs]


@pytest.mark.parametrize("rank", [16, 1024], ids=["product", "full"])
@pytest.mark.parametrize("factor", [-1, 8, 16])
@pytest.mark.parametrize(("inputs", "outputs"), DECODER_SHAPES)
def test_lokr_equals_its_formula_without_the_kronecker_product(inputs, outputs, factor, rank):
    config = LokrConfig(rank=rank, alpha=2 * rank, factor=factor)
    layer = one_layer(config, inputs, outputs, size=0.02)
    assert max(errors(*layer)) < 2e-6


@pytest.mark.parametrize(("inputs", "outputs"), DECODER_SHAPES)
def test_lokr_of_two_products_equals_its_formula(inputs, outputs):
    config = LokrConfig(rank=3, alpha=6, factor=16, decompose_both=True)
    layer = one_layer(config, inputs, outputs, size=0.02)
    assert len(layer[1]) == 4
    assert max(errors(*layer)) < 2e-6


@pytest.mark.parametrize(("inputs", "outputs"), DECODER_SHAPES)
def test_lora_equals_its_formula(inputs, outputs):
    assert max(errors(*one_layer(LoraConfig(rank=64, alpha=128), inputs, outputs, size=0.02))) < 2e-6


def survival(model, parameters, change):
    """The frozen weight, inputs, and a function that gives the share of the change which is found in an output."""
    base = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    x = torch.randn(256, 512).bfloat16()
    expected = x.double() @ change([parameter.detach().double() for parameter in parameters]).T
    without = torch.nn.functional.linear(x, base)

    def share(output):
        return ((output.double() - without.double()) * expected).sum() / expected.square().sum()

    assert share(without + expected.bfloat16()) < 0.5  # added to what is rounded already
    return base, x, share


def decomposed(inputs, outputs, *, size, longer, dtype=torch.float32):
    """A DoRA layer with rows longer than the frozen ones by up to a share, and the change of its weight in float64.

    ``size`` is that of the entries of scale * B A.
    """
    model, parameters, _ = one_layer(DoraConfig(rank=64, alpha=128), inputs, outputs, size=1, dtype=dtype)
    base = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    a, b, _ = parameters
    factor = (size / (2 * b @ a).std()).detach().sqrt()
    a.data *= factor
    b.data *= factor
    parameters[2].data = base.detach().float().norm(dim=1) * (1 + longer * torch.rand(outputs))

    def change(leaves):
        a, b, magnitude = leaves
        weight = base.double() + 2 * b @ a
        return (magnitude / weight.detach().norm(dim=1))[:, None] * weight - base.double()

    return model, parameters, change


@pytest.mark.parametrize(("inputs", "outputs"), DECODER_SHAPES)
def test_dora_equals_its_formula_without_the_changed_weight(inputs, outputs):
    assert max(errors(*decomposed(inputs, outputs, size=0.002, longer=0.3))) < 2e-6


def test_a_young_dora_survives_in_bfloat16():
    model, parameters, change = decomposed(512, 512, size=1e-5, longer=0, dtype=torch.bfloat16)
    _, x, share = survival(model, parameters, change)
    assert share(model(x).detach()) == pytest.approx(1, abs=0.05)
    assert max(errors(model, parameters, change, tokens=256)) < 0.01


def test_dora_in_bfloat16_is_as_exact_as_peft_s_with_outputs_in_float32():
    model, parameters, change = decomposed(512, 512, size=0.002, longer=0.3, dtype=torch.bfloat16)
    ours = errors(model, parameters, change, tokens=256)
    layer = model.layers[0].self_attn.to_q
    layer.forward = types.MethodType(peft.tuners.lora.Linear.forward, layer)
    with torch.autocast("cpu", torch.bfloat16):  # its products are rounded, and its output is not
        theirs = errors(model, parameters, change, tokens=256)
    assert max(ours) < 1.1 * max(theirs)


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=4), DoraConfig(rank=4), LokrConfig(rank=3, factor=4)], ids=["lora", "dora", "lokr"]
)
def test_a_layers_bias_is_added(config):
    model, _, change = one_layer(config, 64, 32, size=0.02, bias=True)
    base = model.layers[0].self_attn.to_q
    base = getattr(base, "base_layer", base)
    leaves = [parameter.detach().double() for parameter in model.parameters() if parameter.requires_grad]
    x = torch.randn(5, 64)
    expected = x.double() @ (base.weight.double() + change(leaves)).T + base.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=16),
        LoraConfig(rank=16, dropout=1e-6),
        LokrConfig(rank=16, factor=8),
        LokrConfig(rank=64, factor=8),
        LohaConfig(rank=8),
    ],
    ids=["lora", "lora with dropout", "lokr", "lokr of full factors", "loha"],
)
def test_a_change_of_1e_5_survives_in_bfloat16(config):
    """The output moves by far less than its last digit, but on average by as much as in float64."""
    model, parameters, change = one_layer(config, 512, 512, size=1e-5, dtype=torch.bfloat16)
    base, x, share = survival(model, parameters, change)
    assert share(model(x).detach()) == pytest.approx(1, abs=0.05)
    rebuilt = base.double() + change([parameter.detach().double() for parameter in parameters])
    assert share(torch.nn.functional.linear(x, rebuilt.bfloat16())) < 0.5  # added to the weight
    assert max(errors(model, parameters, change, tokens=256)) < 0.01


@pytest.mark.parametrize(("config", "kept_of_rank"), [(LoraConfig(rank=4), 12), (LokrConfig(rank=3, factor=4), 0)])
def test_only_the_inputs_are_kept_and_neighbours_share_them(config, kept_of_rank):
    model = golden_transformer()
    config.attach(model)
    attention = model.layers[0].self_attn
    x = torch.randn(10, 64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    numbers = {at: tensor.numel() for at, tensor in kept.items() if at not in weights}
    assert numbers.pop(x.untyped_storage().data_ptr()) == 10 * 64
    assert sum(numbers.values()) == 10 * kept_of_rank
    assert len(outputs) == 3


def test_dropout_is_peft_s():
    model, parameters, _ = one_layer(LoraConfig(rank=4, alpha=8, dropout=0.3), 64, 32, size=0.02)
    layer = model.layers[0].self_attn.to_q
    x = torch.randn(3, 5, 64, requires_grad=True)
    results = []
    for forward in (layer.forward, types.MethodType(peft.tuners.lora.Linear.forward, layer)):
        torch.manual_seed(1)
        output = forward(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *parameters])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), results[0][0])


def ten_losses(config, *, plain=False, gradient_checkpointing=False):
    torch.manual_seed(0)
    transformer = golden_transformer()
    adapter = config.attach(transformer)
    if plain:
        for layer in adapter.layers.values():
            if isinstance(layer, StructuredLokr):
                layer.org_module[0].forward = types.MethodType(LokrModule.forward, layer)
            else:
                layer.forward = types.MethodType(peft.tuners.lora.Linear.forward, layer)
    else:
        WindowedAttention(transformer)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = (transformer(**INPUTS, return_dict=False)[0] - TARGET).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_ten_steps_have_the_losses_of_peft_and_lycoris_with_masked_attention(config):
    losses = ten_losses(config)
    assert losses[0] - losses[-1] > 0.01
    assert losses == pytest.approx(ten_losses(config, plain=True), rel=1e-5)
    assert losses == ten_losses(config, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's own, while it traces
@pytest.mark.parametrize("config", [LoraConfig(rank=4), LokrConfig(rank=3, factor=4)], ids=["lora", "lokr"])
def test_a_block_is_traced_whole_and_keeps_its_gradients(config):
    """With the backend that traces the backward pass too, and then runs PyTorch's own kernels."""

    def gradients(compiled):
        torch.manual_seed(0)
        torch._dynamo.reset()
        transformer = golden_transformer()
        transformer.layers = transformer.layers[:2]  # one of each attention
        parameters = list(config.attach(transformer).parameters())
        WindowedAttention(transformer)
        if compiled:
            compile_blocks(transformer, torch.device("cpu"), backend="aot_eager")
        loss = (transformer(**INPUTS, return_dict=False)[0] - TARGET).square().mean()
        return torch.autograd.grad(loss, parameters)

    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(gradients(compiled=True), gradients(compiled=False), rtol=0, atol=1e-8)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiling_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="compile=true needs a CUDA GPU, and this is cpu; leave it out"):
        compile_blocks(golden_transformer(), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.slow
def test_songs_of_many_lengths_are_compiled_a_few_times(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    transformer = golden_transformer().requires_grad_(False)
    streamline(transformer)
    attention = WindowedAttention(transformer)
    LoraConfig(rank=4).attach(transformer)
    compile_blocks(transformer, torch.device("cpu"), backend="eager")
    t = torch.tensor([0.5])
    graphs = []
    for num_tokens, num_condition_tokens in ((120, 20), (120, 25), (96, 33), (150, 41), (101, 57), (130, 90)):
        attention.set_padding(None, None)
        latents, condition, context = (
            torch.randn(1, length, width)
            for length, width in ((2 * num_tokens, 64), (num_condition_tokens, 64), (2 * num_tokens, 128))
        )
        transformer(latents, t, t, condition, context, return_dict=False)[0].square().mean().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2] < 12  # after the third song there is nothing that was not compiled for any length
