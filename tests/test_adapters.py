import json
import logging
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from diffusers.loaders.lora_pipeline import AceStepLoraLoaderMixin
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules.lokr import logging_force_full_matrix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.adapters.base import AdapterConfig, resolve_targets
from sidestep.adapters.files import attach_saved, read_adapter
from sidestep.adapters.loha import LohaConfig
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from sidestep.adapters.oft import OftConfig
from sidestep.errors import UserError
from tests.golden import GOLDEN, golden_case, golden_transformer

INPUTS, _ = golden_case()
TARGET = torch.randn(INPUTS["hidden_states"].shape, generator=torch.Generator().manual_seed(0))

LORA = LoraConfig(rank=4, alpha=8)
LOKR_LOW_RANK = LokrConfig(rank=3, alpha=6, factor=4)
LOKR_FULL = LokrConfig()
LOKR_BOTH = LokrConfig(rank=1, alpha=2, decompose_both=True)
EVERY_FAMILY = {
    "lora": LORA,
    "rslora": LoraConfig(rank=4, use_rslora=True, rank_pattern={"q_proj": 2, "cross_attn.q_proj": 3}),
    "dora": DoraConfig(rank=4, alpha=8),
    "lokr": LOKR_LOW_RANK,
    "lokr-full": LOKR_FULL,
    "lokr-both": LOKR_BOTH,
    "lokr-lengths": LokrConfig(rank=3, alpha=6, factor=4, weight_decompose=True),
    "loha": LohaConfig(rank=2, alpha=4),
    "oft": OftConfig(block_size=16),
    "oft-shared": OftConfig(block_size=8, block_share=True, neumann_terms=6),
}
FAMILIES = pytest.mark.parametrize("config", EVERY_FAMILY.values(), ids=EVERY_FAMILY)


def output(transformer, dtype=torch.float32):
    return transformer(**{name: tensor.to(dtype) for name, tensor in INPUTS.items()}).sample


def train(transformer, adapter, steps=3):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (output(transformer) - TARGET).square().mean().backward()
        optimizer.step()


def trained(config, folder: Path):
    """Train an adapter, save it, and return the output of the transformer it was trained on."""
    transformer = golden_transformer()
    adapter = config.attach(transformer)
    train(transformer, adapter)
    folder.mkdir(exist_ok=True)
    adapter.save(folder, {"model_variant": "base"})
    return output(transformer).detach()


def snapshot(module):
    """What a module is made of: its submodules by identity, and the attributes of each."""
    return [(name, id(child), sorted(vars(child))) for name, child in module.named_modules()]


def wrapped(adapter):
    return list(adapter.weights())


@pytest.fixture
def lora_folder(tmp_path):
    trained(LORA, tmp_path / "final")
    return tmp_path / "final"


# the adapters ACE-Step wrote


@pytest.mark.parametrize("name", ["lora", "lokr_d2a4"])
def test_an_adapter_saved_by_ace_step_gives_ace_steps_output(name):
    expected = load_file(GOLDEN / "adapters/outputs.safetensors")
    transformer = golden_transformer()
    adapter = attach_saved(transformer, GOLDEN / "adapters" / name)
    with torch.no_grad():
        torch.testing.assert_close(output(transformer), expected[f"{name}.out"], rtol=0, atol=1e-5)
        assert (output(transformer) - expected["base.out"]).abs().max() > 1
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert len(adapter.paths) == 32


def test_a_lokr_file_that_wraps_every_layer_as_ace_steps_trainer_writes_it_loads(tmp_path):
    # LyCORIS's own network, on every Linear and Conv1d, in the form that adds to the weight
    torch.manual_seed(0)
    transformer = golden_transformer()
    network = create_lycoris(transformer, linear_dim=4, linear_alpha=8, algo="lokr", factor=4)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    settings = {"linear_dim": 4, "linear_alpha": 8, "factor": 4, "decompose_both": False}
    tensors = {
        re.sub(r"_to_([qkv])\.", r"_\1_proj.", key.replace("_to_out_0.", "_o_proj.")).replace(
            "_in_conv.", "_in_1."
        ): value
        for key, value in network.state_dict().items()
    }
    save_file(tensors, tmp_path / "lokr_weights.safetensors", {"lokr_config": json.dumps(settings)})
    expected = output(transformer).detach()

    fresh = golden_transformer()
    adapter = attach_saved(fresh, tmp_path)
    torch.testing.assert_close(output(fresh).detach(), expected, rtol=0, atol=1e-5)
    assert {"proj_in.1", "condition_embedder", "time_embed.linear_1"} < set(adapter.paths)


def test_ace_steps_folder_with_a_nested_adapter_folder_is_read(tmp_path, lora_folder):
    lora_folder.rename(tmp_path / "adapter")
    assert read_adapter(tmp_path).path == tmp_path / "adapter/adapter_model.safetensors"
    assert read_adapter(tmp_path / "adapter/adapter_model.safetensors").config.rank == 4


# attaching


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_and_then_learns_with_every_tensor(config, dtype):
    transformer = golden_transformer().to(dtype)
    base = output(transformer, dtype).detach()
    adapter = config.attach(transformer)
    assert torch.equal(output(transformer, dtype).detach(), base)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (output(transformer, dtype).float() - TARGET).square().mean().backward()
        optimizer.step()
    for name, parameter in zip(adapter.state_dict(), adapter.parameters(), strict=True):
        assert parameter.dtype == torch.float32, name
        assert parameter.grad.abs().max() > 0, name
    trainable = {id(parameter) for parameter in transformer.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter.parameters()}
    assert transformer.layers[0].self_attn.norm_q.weight.dtype == dtype


@FAMILIES
def test_an_adapter_under_autocast_stays_in_float32_and_follows_the_float32_output(config):
    transformer = golden_transformer()
    adapter = config.attach(transformer)
    train(transformer, adapter)
    exact = output(transformer).detach()
    transformer.to(torch.bfloat16)
    adapter.detach()
    fresh = golden_transformer().to(torch.bfloat16)
    again = config.attach(fresh)
    again.load_state_dict(adapter.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        loss = (output(fresh) - TARGET).square().mean()
        close = output(fresh).detach().float()
    loss.backward()
    assert {p.dtype for p in again.parameters()} == {p.grad.dtype for p in again.parameters()} == {torch.float32}
    # bfloat16 alone moves this model's output by up to 0.07; the adapter moves it much further
    assert (close - exact).abs().mean() < 0.05


# shared rotations are left out: they turn both halves alike, and cancel as the weights do
@pytest.mark.parametrize("name", [name for name in EVERY_FAMILY if name != "oft-shared"])
def test_a_young_adapter_is_not_rounded_away_by_bfloat16_weights(name):
    config = EVERY_FAMILY[name]
    size = 0.05 if name in ("loha", "lokr-both") else 5e-3  # a product of three or four such numbers is smaller
    torch.manual_seed(0)
    half = torch.randn(16, 32, dtype=torch.bfloat16)
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        transformer = golden_transformer().to(dtype)
        layer = transformer.layers[0].self_attn.to_q
        # weights that cancel, so that the output is the adapter's change alone and not rounded with anything else
        layer.weight.data[:, 32:] = -layer.weight.data[:, :32]
        torch.manual_seed(0)
        for parameter in config.attach(transformer).parameters():
            parameter.data = torch.randn_like(parameter) * size
        changes.append(transformer.layers[0].self_attn.to_q(torch.cat([half, half], dim=1).to(dtype)).detach().float())
    exact, rounded = changes
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@FAMILIES
def test_detaching_leaves_the_base_model_as_it_was(config):
    transformer = golden_transformer()
    before, base = snapshot(transformer), output(transformer).detach()
    adapter = config.attach(transformer)
    train(transformer, adapter)
    assert (output(transformer) - base).abs().max() > 0.01
    adapter.detach()
    assert snapshot(transformer) == before
    assert torch.equal(output(transformer), base)


@FAMILIES
def test_only_the_targets_are_wrapped(config):
    adapter = config.attach(golden_transformer())
    paths = wrapped(adapter)
    assert len(paths) == 32
    assert all(re.fullmatch(r"layers\.\d\.(self|cross)_attn\.[qkvo]_proj", path) for path in paths)
    counts = adapter.parameter_counts()
    assert len(counts) == 8
    assert sum(counts.values()) == sum(parameter.numel() for parameter in adapter.parameters())


def test_one_attachment_leaves_no_targets_behind_for_the_next():
    first = LokrConfig(rank=3, target_modules=["cross_attn.q_proj"]).attach(golden_transformer())
    second = LokrConfig(rank=3, target_modules=["layers.3.mlp.up_proj", "mlp.down_proj"]).attach(golden_transformer())
    assert wrapped(first) == [f"layers.{i}.cross_attn.q_proj" for i in range(4)]
    assert set(wrapped(second)) == {"layers.3.mlp.up_proj"} | {f"layers.{i}.mlp.down_proj" for i in range(4)}


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("q_prj", "q_proj"), ("to_q", "q_proj"), ("cross_atn.k_proj", "cross_attn.k_proj"), ("up", "up_proj")],
)
def test_an_unknown_target_is_refused_with_the_nearest_name(target, nearest):
    with pytest.raises(UserError, match=re.escape(f"did you mean {nearest}?")):
        resolve_targets(golden_transformer(), ["v_proj", target])


def test_a_layer_outside_the_blocks_is_not_a_target():
    with pytest.raises(UserError, match="'condition_embedder', which matches no linear layer"):
        resolve_targets(golden_transformer(), ["condition_embedder"])


@pytest.mark.parametrize("first", [LORA, LOKR_FULL], ids=["lora", "lokr"])
def test_a_second_adapter_on_the_same_transformer_is_refused(first):
    transformer = golden_transformer()
    adapter = first.attach(transformer)
    for second in (LORA, LOKR_FULL):
        with pytest.raises(UserError, match="already carries an adapter"):
            second.attach(transformer)
    adapter.detach()
    LORA.attach(transformer)


def test_lokr_says_once_which_settings_have_no_effect():
    notes = LokrConfig(decompose_both=True, target_modules=["q_proj", "k_proj"]).attach(golden_transformer()).notes
    assert notes[0] == (
        "adapter.rank=64 and adapter.alpha have no effect on self_attn.q_proj, cross_attn.q_proj (64x64: the factors "
        "8x8 and 8x8 are full); use adapter.rank=3 or less, or another adapter.factor"
    )
    assert notes[1].startswith("adapter.decompose_both has no effect on self_attn.q_proj, cross_attn.q_proj (64x64: W1")
    assert len(notes) == 4
    obeyed = LokrConfig(rank=3, decompose_both=True, target_modules=["q_proj", "k_proj"]).attach(golden_transformer())
    assert obeyed.notes == []


def test_the_default_lokr_has_capacity_on_the_real_width():
    attention = nn.ModuleDict({"q_proj": nn.Linear(2048, 2048, bias=False)})
    transformer = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    adapter = LokrConfig(target_modules=["q_proj"]).attach(transformer)
    assert adapter.parameter_counts() == {"self_attn.q_proj": 8 * 8 + 2 * 256 * 64}
    assert adapter.notes == []


def test_lycoris_prints_nothing(capsys):
    logging_force_full_matrix.cache_clear()  # what it would say, it says once per process
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger("LyCORIS").addHandler(handler)
    LOKR_FULL.attach(golden_transformer())
    logging.getLogger("LyCORIS").removeHandler(handler)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), r"adapter\.rank=0 must be at least 1"),
        (lambda: LoraConfig(alpha=0), r"adapter\.alpha=0 must be above 0"),
        (lambda: LoraConfig(dropout=1), r"adapter\.dropout=1 must be at least 0 and below 1"),
        (lambda: LoraConfig(target_modules=[]), r"adapter\.target_modules is empty"),
        (lambda: LokrConfig(factor=0), r"adapter\.factor=0 must be at least 1, or -1"),
        (lambda: AdapterConfig(default_lr=1e-4).attach(golden_transformer()), "no adapter is chosen"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


# saving and loading


@FAMILIES
def test_a_saved_adapter_gives_the_output_it_was_trained_to(config, tmp_path):
    expected = trained(config, tmp_path)
    transformer = golden_transformer()
    base = output(transformer).detach()
    attach_saved(transformer, tmp_path)
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 0.01
    assert all(path.suffix in (".safetensors", ".json") for path in tmp_path.iterdir())


@FAMILIES
def test_training_goes_on_exactly_from_a_state_dict(config):
    transformer = golden_transformer()
    adapter = config.attach(transformer)
    train(transformer, adapter)
    other = golden_transformer()
    resumed = config.attach(other)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
    assert torch.equal(output(other), output(transformer))
    assert list(resumed.state_dict()) == list(adapter.state_dict())


def test_a_state_dict_that_does_not_match_is_refused_and_changes_nothing():
    adapter = LORA.attach(golden_transformer())
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    key = "layers.3.mlp.up_proj.lora_A.weight"
    with pytest.raises(UserError, match=f"state has {key}, which fits nothing"):
        adapter.load_state_dict({**before, key: torch.ones(4, 64)})
    with pytest.raises(UserError, match=r"has no layers\.0\.self_attn\.q_proj\.lora_A\.weight"):
        adapter.load_state_dict({})
    with pytest.raises(UserError, match="of size 8x64 where 4x64 is needed"):
        adapter.load_state_dict(LoraConfig(rank=8).attach(golden_transformer()).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_diffusers_loads_a_saved_lora_to_the_same_output(tmp_path):
    expected = trained(LORA, tmp_path)
    state, metadata = AceStepLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    transformer = golden_transformer()
    transformer.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "targets", [["q_proj", "o_proj"], ["layers.1.mlp.up_proj", "cross_attn.k_proj"]], ids=["suffixes", "some-layers"]
)
def test_peft_loads_a_saved_lora_on_ace_steps_own_names(targets, tmp_path):
    config = LoraConfig(rank=4, alpha=8, target_modules=targets)
    expected = trained(config, tmp_path)
    transformer = golden_transformer()
    decoder = decoder_with_original_names(transformer)
    model = peft.PeftModel.from_pretrained(decoder, tmp_path)
    layers = [name for name, module in decoder.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert {to_diffusers(name) for name in layers} == set(resolve_targets(golden_transformer(), targets))

    merged = model.merge_and_unload()
    with torch.no_grad():
        for name in layers:
            transformer.get_submodule(to_diffusers(name)).weight.copy_(merged.get_submodule(name).weight)
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


def decoder_with_original_names(transformer):
    """A tree of the transformer's linear layers under ACE-Step's names. It cannot run; PEFT only needs the names."""
    decoder = nn.Module()
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            *parents, name = to_original(path).split(".")
            node = decoder
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = node.get_submodule(parent)
            copy = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            copy.load_state_dict(module.state_dict())
            node.add_module(name, copy)
    return decoder


def test_a_saved_lora_folder_says_what_peft_needs_and_no_more(lora_folder):
    config = peft.LoraConfig.from_pretrained(lora_folder)  # a warning would fail this test
    assert (config.r, config.lora_alpha) == (4, 4)
    text = (lora_folder / "adapter_config.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert str(lora_folder.parent) not in text
    with safe_open(lora_folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model_variant": "base"}
        assert set(file.keys()) == set(load_file(GOLDEN / "adapters/lora/adapter_model.safetensors"))
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_a_saved_lokr_file_has_the_keys_and_header_of_ace_steps(tmp_path):
    config = LokrConfig(rank=2, alpha=4, factor=4)
    trained(config, tmp_path)
    tensors, headers = {}, {}
    for name, path in {"ours": tmp_path, "theirs": GOLDEN / "adapters/lokr_d2a4"}.items():
        with safe_open(path / "lokr_weights.safetensors", "pt") as file:
            tensors[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            headers[name] = file.metadata()
    assert {key: (t.shape, t.dtype) for key, t in tensors["ours"].items()} == {
        key: (t.shape, t.dtype) for key, t in tensors["theirs"].items()
    }
    assert tensors["ours"]["lycoris_layers_0_self_attn_q_proj.alpha"] == 4
    assert headers["ours"].pop("model_variant") == "base"
    configs = {name: json.loads(header.pop("lokr_config")) for name, header in headers.items()}
    assert configs["ours"] == configs["theirs"]
    assert headers["ours"] == headers["theirs"]


@pytest.mark.parametrize("config", [LOKR_LOW_RANK, LOKR_FULL, LOKR_BOTH], ids=["low-rank", "full", "both"])
def test_lycoris_rebuilds_a_saved_lokr_from_its_header_as_ace_step_does(config, tmp_path):
    expected = trained(config, tmp_path)
    saved = read_adapter(tmp_path)
    settings = json.loads(saved.metadata["lokr_config"])
    targets = settings.pop("target_modules")
    LycorisNetwork.apply_preset({"exclude_name": [], "lora_prefix": "lycoris"})
    transformer = golden_transformer()
    network = create_lycoris(transformer, algo="lokr", **settings)
    network.apply_to()
    tensors = load_file(saved.path)
    renamed = {
        re.sub(r"_([qkv])_proj\.", r"_to_\1.", key.replace("_o_proj.", "_to_out_0.")): value
        for key, value in tensors.items()
    }
    missing, unexpected = network.load_state_dict(renamed, strict=False)
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert not unexpected
    assert len(missing) + len(tensors) == len(network.state_dict())
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


# files that cannot be used


def test_a_folder_that_is_not_there_or_holds_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="nosuch does not exist"):
        read_adapter(tmp_path / "nosuch")
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_a_folder_with_two_adapters_is_refused(lora_folder):
    LOKR_FULL.attach(golden_transformer()).save(lora_folder, {})
    with pytest.raises(UserError, match="holds two adapters"):
        read_adapter(lora_folder)
    assert isinstance(read_adapter(lora_folder / "lokr_weights.safetensors").config, LokrConfig)


@pytest.mark.parametrize("damage", [b"", b"<!DOCTYPE html><html>Not found</html>", None], ids=["empty", "html", "cut"])
def test_a_damaged_file_is_refused_in_one_line(lora_folder, damage):
    path = lora_folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UserError, match="is not a whole safetensors file") as caught:
        read_adapter(lora_folder)
    assert "\n" not in str(caught.value)


def test_a_lora_without_its_config_is_refused(lora_folder):
    (lora_folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"has no adapter_config\.json beside it"):
        read_adapter(lora_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA and OFT"),
        ({"use_dora": True}, "lora_magnitude_vector, so it is no whole dora adapter"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj rank 2, but its weights have rank 4"),
        ({"alpha_pattern": {"q_(proj": 2}}, "which is not a pattern"),
        ({"bias": "lora_only"}, "uses bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights as well"),
        ({"lora_alpha": None}, "needs a number for lora_alpha, and has None"),
        ({"init_lora_weights": "lora_ga"}, "changes the base model's weights as well"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        (
            {"target_modules": ["q_proj"]},
            r"does not name layers\.0\.\w+_attn\.k_proj in target_modules, so other players",
        ),
        ({"target_modules": r".*\.q_proj"}, r"does not name layers\.0\.\w+_attn\.k_proj in target_modules"),
        ({"target_modules": 5}, "target_modules 5, which must be a list of names or a pattern"),
    ],
)
def test_a_lora_that_would_load_with_another_effect_is_refused(lora_folder, change, message):
    path = lora_folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_adapter(lora_folder)


def test_the_strength_is_the_files_own(lora_folder):
    base, path = output(golden_transformer()).detach(), lora_folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    outputs = []
    for change in ({"lora_alpha": 8}, {"lora_alpha": 4, "use_rslora": True}, {}):
        path.write_text(json.dumps(settings | change), encoding="utf-8")
        transformer = golden_transformer()
        attach_saved(transformer, lora_folder)
        outputs.append(output(transformer).detach())
    # r = 4: alpha / r = 8 / 4 equals rank-stabilised alpha / sqrt(r) = 4 / 2
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 0.01
    assert (outputs[2] - base).abs().max() > 0.01


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_file_with_nan_is_refused_by_the_tensors_name(lora_folder):
    key = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(lora_folder / "adapter_model.safetensors", lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(UserError, match=f"holds NaN or infinity in {key}"):
        read_adapter(lora_folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers.0.self_attn.q_proj", "layers.9.self_attn.q_proj", "layers.9.self_attn.q_proj, which fits nothing"),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn_norm", "layers.0.self_attn_norm, which fits nothing"),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_norm", "layers.0.self_attn.q_norm, which fits nothing"),
        ("model.layers.0.", "model.decoder.layers.0.", "has decoder.layers.0."),
        ("base_model.model.layers.0.", "layers.0.", "not a LoRA key"),
        (".lora_A.weight", ".lora_A.default.weight", "not a LoRA key"),
    ],
)
def test_a_key_that_would_load_as_nothing_is_refused(lora_folder, old, new, message):
    def rename(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    rewrite(lora_folder / "adapter_model.safetensors", rename)
    with pytest.raises(UserError, match=re.escape(message)):
        attach_saved(golden_transformer(), lora_folder)


LORA_KEY = "base_model.model.layers.0.self_attn.q_proj."
LYCORIS_KEY = "lycoris_layers_0_self_attn_q_proj."


@pytest.mark.parametrize(
    ("name", "key", "tensor"),
    [
        ("lora", LORA_KEY + "lora_A.weight", torch.tensor(1.0)),
        ("lora", LORA_KEY + "lora_B.weight", torch.tensor(1.0)),
        ("lora", LORA_KEY + "lora_A.weight", torch.ones(64)),
        ("lora", LORA_KEY + "lora_A.weight", torch.ones(0, 64)),
        ("dora", LORA_KEY + "lora_magnitude_vector", torch.tensor(1.0)),
        ("dora", LORA_KEY + "lora_magnitude_vector", torch.ones(64, 1)),
        ("lokr", LYCORIS_KEY + "lokr_w1", torch.tensor(1.0)),
        ("lokr", LYCORIS_KEY + "lokr_w2_a", torch.ones(48)),
        ("lokr", LYCORIS_KEY + "lokr_w2_b", torch.tensor(1.0)),
        ("loha", LYCORIS_KEY + "alpha", torch.ones(3)),
        ("loha", LYCORIS_KEY + "hada_w1_b", torch.tensor(1.0)),
        ("oft", LORA_KEY + "oft_R.weight", torch.tensor(1.0)),
        ("oft", LORA_KEY + "oft_R.weight", torch.ones(480)),
    ],
)
def test_a_tensor_with_other_dimensions_than_its_name_has_is_refused(name, key, tensor, tmp_path):
    EVERY_FAMILY[name].attach(golden_transformer()).save(tmp_path, {})
    rewrite(read_adapter(tmp_path).path, lambda tensors: tensors.update({key: tensor}))
    with pytest.raises(UserError, match=f"has {re.escape(key)} of size .*; copy the adapter again"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LOKR_LOW_RANK, {"linear_dim": 64}, r"has linear_dim 64, but the weights of layers\.0\.\S+ have rank 3"),
        (LOKR_LOW_RANK, {"full_matrix": True}, "says full_matrix, but the weights of"),
        (LOKR_LOW_RANK, {"weight_decompose": True}, r"has weight_decompose True, but layers\.0\.\S+ has no dora_scale"),
        (LOKR_LOW_RANK, {"factor": 8}, r"has factor 8, but the factors of layers\.0\.\S+ have 4 and 16 rows"),
        (EVERY_FAMILY["lokr-lengths"], {"weight_decompose": False}, r"layers\.0\.\S+ has a dora_scale"),
    ],
)
def test_a_lokr_header_from_which_players_would_make_other_layers_is_refused(config, change, message, tmp_path):
    config.attach(golden_transformer()).save(tmp_path, {})
    path = tmp_path / "lokr_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lokr_config"])
    save_file(load_file(path), path, {"lokr_config": json.dumps(header | change)})
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            OftConfig(block_size=16),
            {"block_share": True},
            r"says block_share, but layers\.0\.\S+ has 4 blocks",
        ),
        (OftConfig(block_size=16), {"oft_block_size": 8}, r"the blocks of layers\.0\.\S+ have 16 inputs"),
    ],
)
def test_an_oft_config_that_contradicts_the_blocks_is_refused(config, change, message, tmp_path):
    config.attach(golden_transformer()).save(tmp_path, {})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


def test_one_layer_under_two_names_is_refused(lora_folder):
    def double(tensors):
        tensors.update(
            {key.replace("q_proj", "to_q"): 2 * tensor for key, tensor in tensors.items() if "q_proj" in key}
        )

    rewrite(lora_folder / "adapter_model.safetensors", double)
    with pytest.raises(UserError, match=r"has layers\.0\.\w+_attn\.q_proj\.lora_A\.weight twice"):
        read_adapter(lora_folder)


def test_weights_that_overflow_are_refused(lora_folder):
    rewrite(lora_folder / "adapter_model.safetensors", lambda tensors: [t.mul_(1e25) for t in tensors.values()])
    with pytest.raises(UserError, match="so large that at strength 1 they are not finite"):
        attach_saved(golden_transformer(), lora_folder)


def test_a_missing_tensor_is_refused_and_the_transformer_is_left_as_it_was(lora_folder):
    key = "base_model.model.layers.2.cross_attn.o_proj.lora_B.weight"
    rewrite(lora_folder / "adapter_model.safetensors", lambda tensors: tensors.pop(key))
    transformer = golden_transformer()
    before = snapshot(transformer)
    with pytest.raises(UserError, match=r"has no layers\.2\.cross_attn\.o_proj\.lora_B\.weight"):
        attach_saved(transformer, lora_folder)
    assert snapshot(transformer) == before


@pytest.mark.parametrize("name", [name for name in EVERY_FAMILY if name != "oft-shared"])  # which fits any width
def test_an_adapter_for_a_model_of_another_width_is_refused_with_both_sizes(name, tmp_path):
    trained(EVERY_FAMILY[name], tmp_path)
    transformer = golden_transformer()
    for layer in transformer.layers:
        layer.self_attn.to_q = nn.Linear(80, 160, bias=False)
    with pytest.raises(
        UserError, match=r"of size \d+x\d+ where \d+x\d+ is needed; it belongs to another model_variant"
    ):
        attach_saved(transformer, tmp_path)
