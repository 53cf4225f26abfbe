"""Families as their real players load them, other trainers' files, strengths, and runs that start from an adapter."""

import dataclasses
import json
import logging
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from diffusers.loaders.lora_pipeline import AceStepLoraLoaderMixin
from lycoris import LycorisNetwork, create_lycoris
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.adapters.base import Attention, SavedAdapter
from sidestep.adapters.files import apply_adapters, attach_saved, read_adapter
from sidestep.adapters.loha import LohaConfig
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from sidestep.adapters.oft import OftConfig
from sidestep.errors import UserError
from sidestep.training.final import verify_saved
from tests.factories import run_training, train_config
from tests.golden import golden_transformer
from tests.test_adapters import (
    EVERY_FAMILY,
    FAMILIES,
    decoder_with_original_names,
    output,
    rewrite,
    snapshot,
    train,
    trained,
)

MIXED = {"rank_pattern": {"q_proj": 2, "layers.1.cross_attn.k_proj": 3}, "alpha_pattern": {"v_proj": 16}}


def families(*names):
    return pytest.mark.parametrize("config", [EVERY_FAMILY[name] for name in names], ids=names)


# players


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=8, use_rslora=True, **MIXED),
        DoraConfig(rank=4, alpha=8, **MIXED),
        LoraConfig(rank=4, alpha=8, attention=Attention.self, target_modules=["q_proj", "mlp.up_proj"]),
        OftConfig(block_size=16),
        OftConfig(block_size=8, block_share=True),
        OftConfig(block_size=16, neumann_terms=5, attention=Attention.cross),
    ],
    ids=["rslora-patterns", "dora-patterns", "self-attention", "oft", "oft-shared", "oft-neumann"],
)
def test_peft_loads_the_folder_on_ace_steps_own_names_as_ace_step_does(config, tmp_path):
    expected = trained(config, tmp_path)
    transformer = golden_transformer()
    model = peft.PeftModel.from_pretrained(decoder_with_original_names(transformer), tmp_path)
    tuned = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and name
    }
    assert tuned == set(read_adapter(tmp_path).paths)
    merged = model.merge_and_unload()
    with torch.no_grad():
        for name in tuned:
            transformer.get_submodule(to_diffusers(name)).weight.copy_(merged.get_submodule(name).weight)
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(rank=4, alpha=8, use_rslora=True, **MIXED), DoraConfig(rank=4, alpha=8, **MIXED)],
    ids=["rslora-patterns", "dora-patterns"],
)
def test_diffusers_loads_mixed_ranks_and_lengths_to_the_same_output(config, tmp_path):
    expected = trained(config, tmp_path)
    state, metadata = AceStepLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert all("lora" in key for key in state)  # what load_lora_weights asks of a file
    transformer = golden_transformer()
    transformer.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LokrConfig(rank=3, alpha=6, factor=4, weight_decompose=True),
        LokrConfig(full_matrix=True, alpha=3),
        LokrConfig(full_matrix=True, weight_decompose=True, attention=Attention.cross),
        LohaConfig(rank=2, alpha=4),
    ],
    ids=["lokr-lengths", "lokr-full-matrix", "lokr-full-lengths", "loha"],
)
def test_lycoris_rebuilds_the_modules_from_the_header(config, tmp_path):
    expected = trained(config, tmp_path)
    saved = read_adapter(tmp_path)
    settings = json.loads(saved.metadata[f"{config.family}_config"])
    settings.pop("target_modules")
    settings["dora_wd"] = settings.pop("weight_decompose")  # as ACE-Step renames it
    LycorisNetwork.apply_preset({"exclude_name": [], "lora_prefix": "lycoris"})
    transformer = golden_transformer()
    network = create_lycoris(transformer, algo=config.family, **settings)
    network.apply_to()
    _, unexpected = network.load_state_dict(with_diffusers_names(load_file(saved.path)), strict=False)
    assert not unexpected
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


def with_diffusers_names(tensors):
    return {
        re.sub(r"_([qkv])_proj\.", r"_to_\1.", key.replace("_o_proj.", "_to_out_0.")): value
        for key, value in tensors.items()
    }


def test_a_card_names_only_players_that_read_the_file():
    def says(config):
        return "\n".join(config.players())

    assert "export" not in says(LoraConfig())
    assert "diffusers: only after" in says(LoraConfig(target_modules=["v_proj", "mlp.up_proj"]))
    assert "ComfyUI: only after" in says(DoraConfig())
    assert "ComfyUI: only after" in says(LokrConfig(weight_decompose=True))
    assert "ComfyUI: put" in says(LokrConfig())
    assert "ACE-Step, diffusers: only after" in says(LohaConfig())
    assert "scale has no effect" in says(OftConfig())


# strength


@FAMILIES
def test_a_merged_weight_gives_what_the_adapter_gives_at_that_strength(config, tmp_path):
    trained(config, tmp_path)
    saved = read_adapter(tmp_path)
    played, merged = golden_transformer(), golden_transformer()
    attach_saved(played, tmp_path, scale=0.5)
    with torch.no_grad():
        for path in saved.paths:
            weight = merged.get_submodule(to_diffusers(path)).weight
            assert torch.equal(saved.merged_weight(path, weight, scale=0), weight)
            weight.copy_(saved.merged_weight(path, weight, scale=0.5))
        torch.testing.assert_close(output(played), output(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_is_the_base_model_to_the_last_bit(dtype, tmp_path):
    trained(EVERY_FAMILY["dora"], tmp_path)
    transformer = golden_transformer().to(dtype)
    base = output(transformer, dtype)
    adapter = attach_saved(transformer, tmp_path, scale=0)
    assert torch.equal(output(transformer, dtype), base)
    adapter.detach()
    assert torch.equal(output(transformer, dtype), base)


def test_several_adapters_add_up_whatever_their_order(tmp_path):
    names = ("lora", "lokr", "oft")
    for name in names:
        trained(EVERY_FAMILY[name], tmp_path / name)
    outputs = []
    for order in (names, names[::-1]):
        transformer = golden_transformer()
        base = output(transformer).detach()
        applied = apply_adapters(transformer, [(tmp_path / name, 0.5) for name in order])
        outputs.append(output(transformer).detach())
        with pytest.raises(UserError, match="already carries an adapter"):
            attach_saved(transformer, tmp_path / "lora")
        applied.detach()
        assert torch.equal(output(transformer), base)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)

    halves, whole = golden_transformer(), golden_transformer()
    apply_adapters(halves, [(tmp_path / "lokr", 0.25), (tmp_path / "lokr", 0.75)])
    attach_saved(whole, tmp_path / "lokr")
    torch.testing.assert_close(output(halves), output(whole), rtol=0, atol=1e-5)


def test_a_weak_adapter_played_on_bfloat16_weights_is_not_rounded_away(tmp_path):
    config = LoraConfig(rank=4)
    transformer = golden_transformer()
    adapter = config.attach(transformer)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 5e-3
    adapter.save(tmp_path, {})
    half = torch.randn(16, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        played = golden_transformer().to(dtype)
        layer = played.layers[0].self_attn.to_q
        layer.weight.data[:, 32:] = -layer.weight.data[:, :32]  # so that the output is the adapter's change alone
        attach_saved(played, tmp_path)
        changes.append(layer(torch.cat([half, half], dim=1).to(dtype)).detach().float())
    exact, rounded = changes
    assert (rounded - exact).norm() < 0.02 * exact.norm()


# settings


def test_the_longest_ending_of_a_pattern_decides_and_the_scale_follows_the_rank():
    config = LoraConfig(
        rank=4, alpha=8, rank_pattern={"layers.0.self_attn.q_proj": 1, "q_proj": 2}, alpha_pattern={"k_proj": 2}
    )
    weights = config.attach(golden_transformer()).weights()
    ranks = {path: len(leaves["lora_A.weight"]) for path, leaves in weights.items()}
    assert ranks["layers.0.self_attn.q_proj"] == 1
    assert ranks["layers.0.cross_attn.q_proj"] == ranks["layers.1.self_attn.q_proj"] == 2
    assert ranks["layers.0.self_attn.k_proj"] == 4
    assert config.scale_of("layers.0.self_attn.q_proj") == 8
    assert config.scale_of("layers.0.self_attn.k_proj") == 0.5
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scale_of("layers.0.self_attn.q_proj") == 4


@pytest.mark.parametrize("name", ["lora", "dora", "lokr", "loha", "oft"])
def test_one_kind_of_attention_can_be_trained(name):
    config = EVERY_FAMILY[name]
    for attention in (Attention.self, Attention.cross):
        chosen = replace(config, attention=attention, target_modules=["q_proj", "mlp.down_proj"])
        paths = list(chosen.attach(golden_transformer()).weights())
        expected = {f"layers.{i}.{attention}_attn.q_proj" for i in range(4)}
        assert set(paths) == expected | {f"layers.{i}.mlp.down_proj" for i in range(4)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank_pattern={"q_prj": 2}), "'q_prj', which is no trained module; did you mean q_proj?"),
        (lambda: LoraConfig(alpha_pattern={"up_proj": 2.0}), "alpha_pattern has 'up_proj', which is no trained module"),
        (lambda: LoraConfig(rank_pattern={"q_proj": 2.5}), "rank_pattern={'q_proj': 2.5} must give each name a whole"),
        (lambda: LoraConfig(alpha_pattern={"q_proj": 0}), "alpha_pattern={'q_proj': 0} must give each name a number"),
        (lambda: LoraConfig(rank_pattern=8), "adapter.rank_pattern=8 must give each name a whole number above 0"),
        (
            lambda: LoraConfig(attention=Attention.self, target_modules=["cross_attn.q_proj"]),
            "'cross_attn.q_proj', which adapter.attention=self leaves out",
        ),
        (lambda: LokrConfig(full_matrix=True, decompose_both=True), "contradicts adapter.decompose_both=true"),
        (lambda: OftConfig(block_size=24), "block_size=24 does not divide the 64 inputs of layers.0.self_attn.q_proj"),
        (lambda: OftConfig(block_size=1), "block_size=1 must be at least 2"),
        (lambda: OftConfig(neumann_terms=3), "neumann_terms=3 must be 0, for exact, or at least 4"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused_with_what_to_type(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make().attach(golden_transformer())


def test_settings_of_a_family_are_typed_and_others_are_refused_by_name():
    config = train_config("adapter.rank_pattern={layers.0.self_attn.q_proj:2,k_proj:8}", "adapter.attention=cross")
    assert config.adapter.rank_pattern == {"layers.0.self_attn.q_proj": 2, "k_proj": 8}
    assert config.adapter.attention is Attention.cross
    assert train_config("adapter=dora").adapter == DoraConfig(rank=4)
    for overrides, message in (
        (["adapter=lokr", "adapter.use_scalar=true"], "adapter.use_scalar is not a setting"),
        (["adapter=lokr", "adapter.dropout=0.1"], "adapter.dropout is a setting of adapter=dora and adapter=lora only"),
        (["adapter=oft", "+adapter.rank=4"], "adapter.rank is a setting of"),
    ):
        with pytest.raises(UserError, match=message):
            train_config(*overrides)


def test_full_matrix_says_which_settings_have_no_effect():
    adapter = LokrConfig(full_matrix=True, rank=2).attach(golden_transformer())
    assert adapter.notes == ["adapter.rank and adapter.alpha have no effect, because of adapter.full_matrix=true"]
    assert set(adapter.weights()["layers.0.self_attn.q_proj"]) == {"lokr_w1", "lokr_w2"}


def test_an_exact_rotation_keeps_the_length_of_every_row(tmp_path):
    trained(EVERY_FAMILY["oft"], tmp_path)
    saved, weight = read_adapter(tmp_path), torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    turned = saved.merged_weight("layers.0.self_attn.q_proj", weight)
    torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1))
    assert (turned - weight).norm() > 0.01 * weight.norm()


# files of other trainers


def write_foreign_peft(folder, config, transformer):
    """Save what PEFT trained on diffusers' transformer as ACE-Step's trainer would have, with original names."""
    folder.mkdir()
    state = peft.get_peft_model_state_dict(transformer, adapter_name="default")
    tensors = {f"base_model.model.{to_original(key)}": value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"to_q": 2, r"layers\.[01]\..*to_k": 3}, "alpha_pattern": {"to_k": 1, "to_v": 2}},
        {"rank_pattern": {"^layers.0.self_attn.to_q": 1, "to_q": 2}, "alpha_pattern": {"to_q": 9}, "use_dora": True},
    ],
    ids=["rslora", "dora", "patterns", "dora-patterns"],
)
@pytest.mark.parametrize("named_by", ["diffusers", "original"])
def test_a_lora_of_another_trainer_gives_the_output_it_was_trained_to(settings, named_by, tmp_path):
    transformer = golden_transformer()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"], **settings
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, transformer)
    expected = output(transformer).detach()
    if named_by == "original":
        for key in ("rank_pattern", "alpha_pattern"):
            renamed = {re.sub(r"to_([qkv])", r"\1_proj", name): v for name, v in getattr(config, key).items()}
            setattr(config, key, renamed)
    write_foreign_peft(tmp_path / "theirs", config, transformer)
    fresh = golden_transformer()
    base = output(fresh).detach()
    attach_saved(fresh, tmp_path / "theirs")
    torch.testing.assert_close(output(fresh).detach(), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings", [{}, {"use_cayley_neumann": False}, {"block_share": True}, {"r": 4, "oft_block_size": 0}]
)
def test_an_oft_folder_of_peft_gives_the_output_it_was_trained_to(settings, tmp_path):
    transformer = golden_transformer()
    config = peft.OFTConfig(
        **{"oft_block_size": 16, "init_weights": False, "target_modules": ["to_q", "mlp.down_proj"], **settings}
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, transformer)
    expected = output(transformer).detach()
    write_foreign_peft(tmp_path / "theirs", config, transformer)
    fresh = golden_transformer()
    base = output(fresh).detach()
    attach_saved(fresh, tmp_path / "theirs")
    torch.testing.assert_close(output(fresh).detach(), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 0.01


def write_whole_lycoris(folder, algorithm, settings, trains=""):
    """Write an adapter for every layer, as the peers' trainers make it; give its output.

    Args:
        folder: where to write.
        algorithm: lokr or loha.
        settings: of LyCORIS.
        trains: pattern of the names of layers that were trained; the others are as they began.
    """
    torch.manual_seed(0)
    LycorisNetwork.apply_preset({"exclude_name": [], "lora_prefix": "lycoris"})
    transformer = golden_transformer()
    settings = {"linear_dim": 1, "linear_alpha": 2, **settings}
    network = create_lycoris(transformer, algo=algorithm, **settings)
    network.apply_to()
    assert len(network.loras) == 52
    for layer in network.loras:
        for name, parameter in layer.named_parameters() if re.search(trains, layer.lora_name) else ():
            if name == "dora_scale":
                parameter.data.mul_(1.5)
            else:
                nn.init.normal_(parameter, std=0.2)
    expected = output(transformer).detach()
    tensors = {
        re.sub(r"_to_([qkv])\.", r"_\1_proj.", key.replace("_to_out_0.", "_o_proj.")).replace("_in_conv.", "_in_1."): v
        for key, v in network.state_dict().items()
    }
    assert any("dora_scale" in key for key in tensors) == ("dora_wd" in settings)
    header = {"lokr_config": json.dumps(settings)} if algorithm == "lokr" else {}  # Side-Step writes no loha_config
    save_file(tensors, folder / f"{algorithm}_weights.safetensors", {"algo": algorithm, **header})
    return expected


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("lokr", {"factor": 4, "dora_wd": True}),
        ("lokr", {"factor": -1, "full_matrix": True}),
        ("lokr", {"factor": 4, "unbalanced_factorization": True, "decompose_both": True}),
        ("loha", {}),
    ],
    ids=["lokr-lengths", "lokr-full-matrix", "lokr-unbalanced", "loha"],
)
def test_a_lycoris_file_for_every_layer_gives_the_output_it_was_trained_to(algorithm, settings, tmp_path):
    base, expected = output(golden_transformer()).detach(), write_whole_lycoris(tmp_path, algorithm, settings)
    fresh = golden_transformer()
    adapter = attach_saved(fresh, tmp_path)
    torch.testing.assert_close(output(fresh).detach(), expected, rtol=0, atol=1e-5)
    assert {"proj_in.1", "time_embed_r.time_proj"} < set(adapter.paths)
    assert (expected - base).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dora", {"use_qalora": True}, "uses use_qalora"),
        ("oft", {"coft": True}, "uses coft"),
        ("oft", {"use_cayley_neumann": None}, "does not say use_cayley_neumann"),
        ("oft", {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}, "uses num_cayley_neumann_terms=2"),
        ("oft", {"use_cayley_neumann": True, "peft_version": "0.17.1"}, "is of a PEFT before 0.18"),
    ],
)
def test_a_peft_setting_that_cannot_be_reproduced_is_refused_by_name(name, change, message, tmp_path):
    trained(EVERY_FAMILY[name], tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("lokr", "lokr_w2_b"), ("loha", "hada_w2_a"), ("loha", "alpha"), ("dora", "lora_A.weight")],
)
def test_a_file_without_one_of_its_tensors_is_refused_by_its_name(name, leaf, tmp_path):
    trained(EVERY_FAMILY[name], tmp_path)
    path = read_adapter(tmp_path).path

    def remove(tensors):
        tensors.pop(next(key for key in tensors if key.endswith(f"q_proj.{leaf}")))

    rewrite(path, remove)
    with pytest.raises(
        UserError, match=rf"has no layers\.0\.(self|cross)_attn\.q_proj\.{re.escape(leaf)}, so it is no whole"
    ):
        attach_saved(golden_transformer(), tmp_path)


# a run that starts from an adapter


@pytest.mark.parametrize("name", list(EVERY_FAMILY))
def test_an_adapter_that_starts_from_a_saved_one_gives_its_output(name, tmp_path):
    config = EVERY_FAMILY[name]
    expected = trained(config, tmp_path)
    transformer = golden_transformer()
    other_alpha = {"alpha": 3} if hasattr(config, "alpha") else {}
    adapter = replace(config, **other_alpha).attach(transformer)
    adapter.start_from(read_adapter(tmp_path))
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)
    train(transformer, adapter, steps=1)
    assert not torch.equal(output(transformer), expected)


@pytest.mark.parametrize("lengths", [{}, {"dora_wd": True}], ids=["plain", "lengths"])
def test_a_run_starts_from_ace_steps_lokr_which_holds_every_layer_and_trained_only_some(tmp_path, caplog, lengths):
    expected = write_whole_lycoris(
        tmp_path, "lokr", {"linear_dim": 64, "factor": -1, **lengths}, trains=r"attn_to_(q|k|v|out_0)$"
    )
    transformer = golden_transformer()
    config = LokrConfig(factor=-1, weight_decompose=bool(lengths))
    config.attach(transformer).start_from(read_adapter(tmp_path))
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)
    assert (expected - output(golden_transformer())).abs().max() > 0.01
    assert caplog.text == ""


def test_a_run_starts_from_side_steps_lokr_without_the_layers_outside_of_the_blocks_and_names_them(tmp_path, caplog):
    write_whole_lycoris(tmp_path, "lokr", {"linear_dim": 64, "factor": -1})
    saved = read_adapter(tmp_path)
    with pytest.raises(UserError, match=re.escape(
        "type adapter.target_modules=[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj]"
    )):  # fmt: skip
        LokrConfig(factor=-1).attach(golden_transformer()).start_from(saved)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    transformer = golden_transformer()
    LokrConfig(factor=-1, target_modules=targets).attach(transformer).start_from(saved)
    assert re.search(r"also changes condition_embedder, proj_in\.1, .* which lie outside of the blocks", caplog.text)
    inside = {path: leaves for path, leaves in saved.modules.items() if path.startswith("layers.")}
    played = golden_transformer()
    apply_adapters(played, [(dataclasses.replace(saved, modules=inside), 1.0)])
    torch.testing.assert_close(output(transformer), output(played), rtol=0, atol=1e-5)


def test_each_layer_of_a_loha_has_its_own_alpha(tmp_path):
    trained(LohaConfig(rank=2, alpha=4), tmp_path)
    path, key = tmp_path / "loha_weights.safetensors", "lycoris_layers_1_cross_attn_k_proj.alpha"
    before = read_adapter(path).change("layers.1.cross_attn.k_proj", torch.zeros(32, 64))
    rewrite(path, lambda tensors: tensors.update({key: torch.tensor(1.0)}))
    after = read_adapter(path)
    torch.testing.assert_close(after.change("layers.1.cross_attn.k_proj", torch.zeros(32, 64)), before / 4)
    assert after.scales["layers.0.cross_attn.k_proj"] == 2


# memory


def test_applying_adapters_holds_no_more_than_one_change_in_float32_at_a_time(tmp_path, monkeypatch):
    trained(EVERY_FAMILY["lora"], tmp_path)
    made, alive, change = [], [], SavedAdapter.change

    def counted(self, path, weight, scale=1.0):
        alive.append(sum(reference() is not None for reference in made))
        result = change(self, path, weight, scale)
        if not result.is_meta:
            made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(SavedAdapter, "change", counted)
    transformer = golden_transformer().to(torch.bfloat16)
    applied = apply_adapters(transformer, [(tmp_path, 1.0)])
    assert len(made) == 32
    assert max(alive) == 0
    assert {buffer.dtype for layer in applied.layers for buffer in layer.applied.buffers()} == {torch.bfloat16}


@FAMILIES
def test_changes_that_are_not_kept_are_those_that_are(config, tmp_path):
    expected = trained(config, tmp_path)
    transformer = golden_transformer()
    applied = apply_adapters(transformer, [(tmp_path, 1.0)], keep=False)
    assert not [buffer for layer in applied.layers for buffer in layer.applied.buffers()]
    with torch.no_grad():
        torch.testing.assert_close(output(transformer), expected, rtol=0, atol=1e-5)


def no_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 MiB")


def test_too_little_memory_for_a_change_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    trained(EVERY_FAMILY["lora"], tmp_path)
    monkeypatch.setattr(LoraConfig, "change", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        attach_saved(golden_transformer(), tmp_path)


def test_a_run_with_too_little_memory_to_play_what_it_saved_ends_all_the_same(tmp_path, monkeypatch, caplog):
    transformer = golden_transformer()
    snapshot_of_bare = snapshot(transformer)
    adapter = EVERY_FAMILY["lora"].attach(transformer)
    train(transformer, adapter)
    adapter.save(tmp_path, {})
    trained_weights = adapter.state_dict()
    change = LoraConfig.change
    monkeypatch.setattr(LoraConfig, "change", lambda *a: change(*a) if a[2].is_meta else no_memory())
    example = SimpleNamespace(latents=torch.zeros(20, 64), condition=torch.zeros(3, 64))
    verify_saved(tmp_path, adapter, transformer, example, torch.zeros(50, 64))
    assert "too little memory left to play the saved adapter; its tensors are those that were trained" in caplog.text
    assert snapshot(transformer) == snapshot_of_bare
    adapter = EVERY_FAMILY["lora"].attach(transformer)
    adapter.load_state_dict(trained_weights)
    rewrite(tmp_path / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(UserError, match="does not hold what was trained"):
        verify_saved(tmp_path, adapter, transformer, example, torch.zeros(50, 64))


def test_more_modules_than_the_saved_ones_may_be_trained(tmp_path):
    expected = trained(LoraConfig(rank=4, target_modules=["q_proj"]), tmp_path)
    transformer = golden_transformer()
    LoraConfig(rank=4).attach(transformer).start_from(read_adapter(tmp_path))
    torch.testing.assert_close(output(transformer).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (LoraConfig(rank=4), LokrConfig(), "is a lora adapter, and this run trains lokr; type adapter=lora"),
        (LoraConfig(rank=4), LoraConfig(rank=8), "of other sizes than this run; type adapter.rank=4"),
        (LoraConfig(rank=4, rank_pattern={"q_proj": 2}), LoraConfig(rank=4),
         "type 'adapter.rank_pattern={cross_attn.q_proj:2,self_attn.q_proj:2}'"),
        (LokrConfig(rank=3, factor=4, weight_decompose=True), LokrConfig(rank=3),
         "type adapter.factor=4 adapter.weight_decompose=true"),
        (OftConfig(block_size=16), OftConfig(block_size=32), "type adapter.block_size=16"),
        (OftConfig(block_size=16, neumann_terms=5), OftConfig(block_size=16), "type adapter.neumann_terms=5"),
        (LoraConfig(rank=4), LoraConfig(rank=4, target_modules=["v_proj"], attention=Attention.self),
         "type adapter.target_modules=[k_proj,o_proj,q_proj,v_proj] adapter.attention=both"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_the_run_says_what_to_type(saved, wanted, message, tmp_path):
    trained(saved, tmp_path)
    adapter = wanted.attach(golden_transformer())
    with pytest.raises(UserError, match=re.escape(message)):
        adapter.start_from(read_adapter(tmp_path))


def run(output_dir, checkpoint_dir, dataset_dir, *overrides):
    return run_training(
        output_dir, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "save_every_steps=2",
        "save_every_epochs=null", *overrides,
    )  # fmt: skip


def test_a_run_starts_from_an_adapter_and_goes_on_without_it(tmp_path, checkpoint_dir, dataset_dir, caplog):
    run(tmp_path / "first", checkpoint_dir, dataset_dir, "max_steps=4", "adapter=lokr")
    start = tmp_path / "first/final"
    more = ["adapter=lokr", "adapter.alpha=2", f"init_from={start}"]
    run(tmp_path / "whole", checkpoint_dir, dataset_dir, "max_steps=4", *more)
    assert "starting from the weights of" in caplog.text
    run(tmp_path / "parts", checkpoint_dir, dataset_dir, "max_steps=2", *more)
    start.rename(tmp_path / "moved")
    caplog.clear()
    run(tmp_path / "parts", checkpoint_dir, dataset_dir, "max_steps=4", *more)
    assert "starting from the weights of" not in caplog.text
    whole, parts = (load_file(tmp_path / name / "final/lokr_weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with safe_open(tmp_path / "parts/final/lokr_weights.safetensors", "pt") as file:
        assert str(tmp_path) not in json.dumps(file.metadata())

    with pytest.raises(UserError, match="final does not exist"):
        run(tmp_path / "new", checkpoint_dir, dataset_dir, "max_steps=4", *more)
    with pytest.raises(UserError, match="was trained with another init_from than is typed now"):
        run(tmp_path / "parts", checkpoint_dir, dataset_dir, "max_steps=6", *more[:2])
    with pytest.raises(UserError, match="type adapter=lokr"):
        run(tmp_path / "other", checkpoint_dir, dataset_dir, "max_steps=4", f"init_from={tmp_path / 'moved'}")


@pytest.mark.parametrize(
    ("adapter", "weights"),
    [
        ("dora", "adapter_model"), ("oft", "adapter_model"),
        pytest.param("loha", "loha_weights", marks=pytest.mark.slow),
        pytest.param("lokr", "lokr_weights", marks=pytest.mark.slow),  # also in tests/test_train.py
    ],
)  # fmt: skip
def test_a_stopped_run_of_any_family_ends_with_the_weights_of_an_unbroken_one(
    adapter, weights, tmp_path, checkpoint_dir, dataset_dir, caplog
):
    caplog.set_level(logging.INFO)
    more = {"lokr": ["adapter.weight_decompose=true"], "oft": ["adapter.block_size=16"]}.get(adapter, [])
    run(tmp_path / "whole", checkpoint_dir, dataset_dir, "max_steps=4", f"adapter={adapter}", *more)
    for steps in (2, 4):
        run(tmp_path / "parts", checkpoint_dir, dataset_dir, f"max_steps={steps}", f"adapter={adapter}", *more)
    assert "continuing from" in caplog.text
    for folder in ("final", "checkpoints/step_2", "checkpoints/epoch_1"):
        files = [load_file(tmp_path / name / folder / f"{weights}.safetensors") for name in ("whole", "parts")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    card = (tmp_path / "whole/final/README.md").read_text(encoding="utf-8")
    assert all(line in card for line in train_config(f"adapter={adapter}", *more).adapter.players())
