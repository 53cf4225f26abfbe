"""Adapters on disk: PEFT folders and LyCORIS files, as sidestep, ACE-Step and Side-Step write them.

Whatever the family, reading gives the weights of each module under ACE-Step's own name with the scale multiplied in,
and playing adds the change that the family's formula makes of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.adapters import loha, lokr, lora, oft
from sidestep.adapters.base import AdapterConfig, SavedAdapter, by_kind, refuse_second
from sidestep.adapters.lycoris import file_name
from sidestep.errors import UserError
from sidestep.files import ensure_readable, sha256_of

WEIGHTS_FILES = (lora.WEIGHTS_FILE, lokr.WEIGHTS_FILE, loha.WEIGHTS_FILE)

Modules = dict[str, dict[str, Tensor]]


class AppliedAdapters:
    """Saved adapters on a transformer, for use and not for training. Its weights are not touched.

    The sum of the changes is kept beside each weight, in the weight's dtype, and multiplied on its own: added into
    a bfloat16 weight, most of a small change would be rounded away. This costs as much memory and time as the changed
    weights once more, and is the same for every family, strength and number of adapters.

    Args:
        transformer: an ``AceStepTransformer1DModel`` without an adapter; the changed layers get a child ``applied``.
        changes: diffusers path -> what to add to the weight there, in its shape and dtype.
    """

    def __init__(self, transformer: nn.Module, changes: Mapping[str, Tensor]) -> None:
        self.paths = [to_original(path) for path in changes]
        self.layers = [transformer.get_submodule(path) for path in changes]
        self.hooks = []
        for layer, change in zip(self.layers, changes.values(), strict=True):
            added = AddedChange(change)
            layer.add_module("applied", added)  # a child, so that the change goes wherever its layer is moved
            self.hooks.append(layer.register_forward_hook(added))

    def detach(self) -> None:
        """Take the adapters off. The transformer is the base model again."""
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            hook.remove()
            del layer.applied


class AddedChange(nn.Module):
    """A forward hook that adds ``change`` to the weight of a linear layer or a Conv1d."""

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.register_buffer("change", change, persistent=False)
        self.change: Tensor

    def forward(self, base: nn.Linear | nn.Conv1d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        if isinstance(base, nn.Conv1d):
            return output + nn.functional.conv1d(
                x, self.change, None, base.stride, base.padding, base.dilation, base.groups
            )
        return output + nn.functional.linear(x, self.change)


def attach_saved(transformer: nn.Module, path: Path, scale: float = 1.0) -> AppliedAdapters:
    """Put one saved adapter on a transformer; see :func:`apply_adapters`."""
    return apply_adapters(transformer, [(path, scale)])


def apply_adapters(transformer: nn.Module, adapters: Iterable[tuple[Path, float]]) -> AppliedAdapters:
    """Put saved adapters on a transformer, for use and not for training.

    Args:
        transformer: an ``AceStepTransformer1DModel`` without an adapter.
        adapters: folder or weights file of each, and its strength: 0 is exactly the base model, 1 the adapter as it
            was trained. The changes of several are added.

    Raises:
        UserError: if a file cannot be read, or any tensor in it does not fit this transformer.
    """
    refuse_second(transformer)
    changes: dict[str, Tensor] = {}
    for path, scale in adapters:
        saved = read_adapter(path)
        for original_path in saved.paths:
            name = to_diffusers(original_path)
            weight = _weight_at(transformer, name, saved)
            change = scale * saved.change(original_path, weight)
            if scale != 0:
                changes[name] = changes[name] + change if name in changes else change
    transformer.requires_grad_(False)
    for name, change in changes.items():
        changes[name] = change.to(transformer.get_submodule(name).weight.dtype)  # type: ignore[arg-type]
    return AppliedAdapters(transformer, changes)


def _weight_at(transformer: nn.Module, name: str, saved: SavedAdapter) -> Tensor:
    try:
        module = transformer.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Conv1d):
        raise UserError(f"{saved.path} has {to_original(name)}, which fits nothing in this transformer")
    return module.weight


def read_adapter(path: Path) -> SavedAdapter:
    """Read a LoRA, DoRA or OFT folder, or a LoKr or LoHa file.

    Args:
        path: the weights file, the folder it lies in, or the folder above an ``adapter`` folder, as ACE-Step's
            trainer makes them.

    Raises:
        UserError: if nothing is there, the file is damaged, or it uses what sidestep cannot reproduce.
    """
    weights = find_weights(path)
    tensors, metadata = _read_tensors(weights)
    if "lokr_config" in metadata:
        return _read_lokr(weights, tensors, metadata)
    if any(".hada_" in key for key in tensors):
        return _read_loha(weights, tensors, metadata)
    if weights.with_name(lora.CONFIG_FILE).is_file():
        return _read_peft(weights, tensors, metadata)
    if weights.name == lora.WEIGHTS_FILE:
        raise UserError(f"{weights} has no {lora.CONFIG_FILE} beside it, so its alpha is unknown; copy that file too")
    raise UserError(
        f"{weights} is no adapter: it has neither lokr_config in its header nor {lora.CONFIG_FILE} beside it"
    )


_ABOUT: dict[str, type] = {"model_variant": str, "custom_tags": list, "versions": dict}


def trained_on(saved: SavedAdapter) -> dict[str, Any]:
    """What sidestep wrote into the adapter when it was trained; empty for another program's adapter.

    Raises:
        UserError: if it is damaged.
    """
    try:
        about = json.loads(saved.metadata.get("sidestep", "{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UserError(
            f"{saved.path} has a header entry sidestep that is not a JSON object: it is damaged; copy it again"
        )
    for key, kind in _ABOUT.items():
        if key in about and not isinstance(about[key], kind):
            raise UserError(
                f"{saved.path}: its header has {key}={about[key]!r:.60}, which makes no sense; copy it again"
            )
    return about


def find_weights(path: Path) -> Path:
    """Find the weights file that ``path`` means.

    Raises:
        UserError: if there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the folder of an adapter or its .safetensors file")
    for folder in (path, path / "adapter"):
        found = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} holds two adapters, {found[0].name} and {found[1].name}; name the file you mean")
        if found:
            return found[0]
    raise UserError(f"{path} holds no adapter: none of {', '.join(WEIGHTS_FILES)} is there")


def fingerprint_adapter(path: Path) -> str:
    """Hash what decides an adapter's weights, wherever it lies; 64 hex digits.

    Raises:
        UserError: if there is no adapter.
    """
    weights = find_weights(path)
    config = weights.with_name(lora.CONFIG_FILE)
    digests = [sha256_of(file) for file in (weights, config) if file.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    ensure_readable(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file; copy or download it again ({error})"
        ) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds NaN or infinity in {key}; use an earlier checkpoint")
    return tensors, metadata


def _saved(
    path: Path, config: AdapterConfig, modules: Modules, scales: dict[str, float], metadata: dict[str, str]
) -> SavedAdapter:
    """Check that each module has the weights of its family, and multiply the scales in."""
    for original_path, leaves in modules.items():
        wanted = min(config.leaf_sets, key=lambda names: len(names ^ leaves.keys()))
        for leaf in sorted(wanted ^ leaves.keys()):
            has = "has no" if leaf in wanted else "also has"
            raise UserError(f"{path} {has} {original_path}.{leaf}, so it is no whole {config.family} adapter")
        folded = config.folded(leaves)
        leaves[folded] = leaves[folded] * scales[original_path]
    return SavedAdapter(path=path, config=config, modules=modules, scales=scales, metadata=metadata)


# PEFT


def _read_peft(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    config_path = path.with_name(lora.CONFIG_FILE)
    settings = _parse(config_path.read_bytes(), str(config_path))
    readers = {"LORA": _lora_config, "OFT": _oft_config}
    if str(settings.get("peft_type")) not in readers:
        raise UserError(
            f"{config_path} has peft_type {settings.get('peft_type')!r}; only {' and '.join(readers)} can be read"
        )
    if settings.get("bias", "none") != "none":
        raise UserError(f"{config_path} uses bias, which sidestep cannot read")
    modules: Modules = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            rf"{re.escape(lora.KEY_PREFIX)}(.+)\.(lora_[AB]\.weight|lora_magnitude_vector|oft_R\.weight)", key
        )
        if not match:
            raise UserError(
                f"{path} has {key}, which is not a LoRA key of the form {lora.KEY_PREFIX}<module>.lora_A.weight"
            )
        modules.setdefault(to_original(match[1]), {})[match[2]] = tensor
    config = readers[settings["peft_type"]](settings, modules, str(config_path))
    scales = {name: config.scale_of(name) if isinstance(config, lora.LoraConfig) else 1.0 for name in modules}
    return _saved(path, config, modules, scales, metadata)


def _lora_config(settings: Mapping[str, Any], modules: Modules, where: str) -> lora.LoraConfig:
    _refuse(
        settings,
        ("lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora", "alora_invocation_tokens"),
        where,
    )
    start = str(settings.get("init_lora_weights", True))
    if start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise UserError(f"{where} has init_lora_weights {start!r}, which changes the base model's weights as well")
    rank, alpha = _whole(settings, "r", where), _above_zero(settings, "lora_alpha", where)
    ranks = {name: _in_pattern(settings, "rank_pattern", name, rank, where) for name in modules}
    alphas = {name: _in_pattern(settings, "alpha_pattern", name, alpha, where) for name in modules}
    for name, leaves in modules.items():
        found = leaves["lora_A.weight"].shape[:1] if "lora_A.weight" in leaves else ()
        if found and found[0] != ranks[name]:
            raise UserError(f"{where} gives {name} rank {ranks[name]:g}, but its weights have rank {found[0]}")
    family = lora.DoraConfig if settings.get("use_dora") else lora.LoraConfig
    return family(
        rank=rank,
        alpha=alpha,
        use_rslora=bool(settings.get("use_rslora")),
        rank_pattern={name: int(other) for name, other in by_kind(ranks).items() if other != rank},
        alpha_pattern={name: other for name, other in by_kind(alphas).items() if other != alpha},
        target_modules=list(modules),
    )


def _in_pattern(settings: Mapping[str, Any], key: str, module: str, default: float, where: str) -> float:
    """Look a module up as PEFT does, under its original name or diffusers': the first pattern that it ends in."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where} has {key} {patterns!r:.60}, which must be an object of patterns")
    for pattern in patterns:
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, to_diffusers(module)))
        except re.error as error:
            raise UserError(f"{where} has {pattern!r} in {key}, which is not a pattern ({error})") from error
        if found:
            return _above_zero(patterns, pattern, f"{key} in {where}")
    return default


def _oft_config(settings: Mapping[str, Any], modules: Modules, where: str) -> oft.OftConfig:
    _refuse(settings, ("coft", "modules_to_save"), where)
    if not isinstance(settings.get("use_cayley_neumann"), bool):
        raise UserError(
            f"{where} does not say use_cayley_neumann, so its rotations are unknown; add it from the trainer"
        )
    terms = _whole(settings, "num_cayley_neumann_terms", where) if settings["use_cayley_neumann"] else 0
    if 0 < terms < 4:
        raise UserError(f"{where} uses num_cayley_neumann_terms={terms}, which sidestep cannot read")
    version = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version", "")))
    if terms and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
        raise UserError(f"{where} is of a PEFT before 0.18, whose approximate rotations sidestep cannot read")
    leaf = next(iter(modules.values())).get("oft_R.weight", torch.empty(1, 1))
    return oft.OftConfig(
        block_size=oft.block_size_of(leaf),
        block_share=bool(settings.get("block_share")),
        neumann_terms=terms,
        target_modules=list(modules),
    )


# LyCORIS


def _read_lokr(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    where = f"lokr_config in {path}"
    settings = _parse(metadata["lokr_config"], where)
    modules = _lycoris_modules(path, tensors)
    for leaves in modules.values():
        leaves.pop("alpha", None)  # players take it from lokr_config
    rank = _whole(settings, "linear_dim", where)
    full = [name for name, leaves in modules.items() if {"lokr_w1", "lokr_w2"} <= leaves.keys()]
    config = lokr.LokrConfig(
        rank=rank,
        alpha=_number(settings, "linear_alpha", where) or None,  # LyCORIS reads 0 as "the same as the rank"
        factor=_whole(settings, "factor", where, least=-1),
        decompose_both=bool(settings.get("decompose_both")) and not settings.get("full_matrix"),
        full_matrix=bool(settings.get("full_matrix")),
        weight_decompose=any("dora_scale" in leaves for leaves in modules.values()),
        target_modules=list(modules),
    )
    scales = {name: 1.0 if name in full else config.scale for name in modules}
    return _saved(path, config, modules, scales, metadata)


def _read_loha(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    modules = _lycoris_modules(path, tensors)
    ranks, alphas = {}, {}
    for name, leaves in modules.items():
        if "alpha" not in leaves or "hada_w1_b" not in leaves:
            missing = "alpha" if "alpha" not in leaves else "hada_w1_b"
            raise UserError(f"{path} has no {name}.{missing}, so it is no whole loha adapter")
        ranks[name], alphas[name] = len(leaves["hada_w1_b"]), leaves.pop("alpha").item()
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = loha.LohaConfig(rank=rank, alpha=alpha or None, target_modules=list(modules))
    scales = {name: (alphas[name] or ranks[name]) / ranks[name] for name in modules}
    return _saved(path, config, modules, scales, metadata)


_OUTSIDE = (
    "proj_in.1",
    "proj_out.1",
    "condition_embedder",
    *(
        f"{branch}.{layer}"
        for branch in ("time_embed", "time_embed_r")
        for layer in ("linear_1", "linear_2", "time_proj")
    ),
)
"""Layers outside of the blocks, which ACE-Step's and Side-Step's trainers wrap too."""


def _lycoris_modules(path: Path, tensors: Mapping[str, Tensor]) -> Modules:
    """Group the tensors by module, under the names that LyCORIS has written with underscores for dots."""
    outside = {file_name(name): name for name in _OUTSIDE}
    modules: Modules = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        inside = re.fullmatch(r"lycoris_layers_(\d+)_(self_attn|cross_attn|mlp)_(\w+)", module)
        name = f"layers.{inside[1]}.{inside[2]}.{inside[3]}" if inside else outside.get(module)
        if name is None:
            raise UserError(f"{path} has {key}, which fits nothing in ACE-Step's decoder")
        modules.setdefault(name, {})[leaf] = tensor
    return modules


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON; copy the adapter again ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where} is not a JSON object; copy the adapter again")
    return settings


def _refuse(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Refuse what would load with another effect than it was trained with."""
    for name in names:
        if settings.get(name):
            raise UserError(f"{where} uses {name}, which sidestep cannot read")


def _number(settings: Mapping[str, Any], name: str, where: str) -> float:
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**63:
        raise UserError(f"{where} needs a number for {name}, and has {value!r:.60}")
    return value


def _whole(settings: Mapping[str, Any], name: str, where: str, least: int = 1) -> int:
    value = _number(settings, name, where)
    if value != int(value) or value < least:
        raise UserError(f"{where} has {name} {value}, which must be a whole number of at least {least}")
    return int(value)


def _above_zero(settings: Mapping[str, Any], name: str, where: str) -> float:
    value = _number(settings, name, where)
    if not value > 0:
        raise UserError(f"{where} has {name} {value}, which must be above 0")
    return value
