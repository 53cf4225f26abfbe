"""Reading adapters: PEFT LoRA folders and LyCORIS LoKr files, as sidestep, ACE-Step and Side-Step write them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidestep.acestep.keymap import to_original
from sidestep.adapters import lokr, lora
from sidestep.adapters.base import Adapter, AdapterConfig
from sidestep.adapters.lycoris import file_name
from sidestep.errors import UserError


@dataclass(kw_only=True)
class SavedAdapter:
    """An adapter read from disk, not yet put on a transformer."""

    path: Path
    """The file with the weights."""
    config: AdapterConfig
    """The settings it was made with; ``target_modules`` are as the file has them."""
    modules: dict[str, dict[str, Tensor]]
    """Name of each module as the file writes it (original path, or LyCORIS's with underscores) -> leaf -> tensor."""
    metadata: dict[str, str]
    """The header of the weights file."""


def attach_saved(transformer: nn.Module, path: Path) -> Adapter:
    """Put a saved adapter on a transformer, for use and not for training.

    Args:
        transformer: an ``AceStepTransformer1DModel`` without an adapter.
        path: the adapter's folder or its weights file.

    Raises:
        UserError: if the file cannot be read, or any tensor in it does not fit this transformer.
    """
    saved = read_adapter(path)
    names = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            names[to_original(name)] = names[file_name(name)] = name
    state, paths = {}, []
    for saved_name, leaves in saved.modules.items():
        if saved_name not in names:
            key = ".".join([saved_name, *leaves][:2])
            raise UserError(f"{saved.path} has {key}, which fits nothing in this transformer")
        path_here = names[saved_name]
        paths.append(path_here)
        state.update({f"{to_original(path_here)}.{leaf}": tensor for leaf, tensor in leaves.items()})
    adapter = saved.config.attach(transformer, paths)
    try:
        adapter.load_state_dict(state, source=str(saved.path))
    except UserError:
        adapter.detach()
        raise
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return adapter


def read_adapter(path: Path) -> SavedAdapter:
    """Read a LoRA folder or a LoKr file.

    Args:
        path: the weights file, the folder it lies in, or the folder above an ``adapter`` folder, as ACE-Step's
            trainer makes them.

    Raises:
        UserError: if nothing is there, the file is damaged, or it uses what sidestep cannot reproduce.
    """
    weights = _find_weights(path)
    tensors, metadata = _read_tensors(weights)
    if "lokr_config" in metadata:
        return _read_lokr(weights, tensors, metadata)
    if weights.with_name(lora.CONFIG_FILE).is_file():
        return _read_lora(weights, tensors, metadata)
    if weights.name == lora.WEIGHTS_FILE:
        raise UserError(f"{weights} has no {lora.CONFIG_FILE} beside it, so its alpha is unknown; copy that file too")
    raise UserError(
        f"{weights} is no adapter: it has neither lokr_config in its header nor {lora.CONFIG_FILE} beside it"
    )


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the folder of an adapter or its .safetensors file")
    for folder in (path, path / "adapter"):
        found = [folder / name for name in (lora.WEIGHTS_FILE, lokr.WEIGHTS_FILE) if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} holds two adapters, {found[0].name} and {found[1].name}; name the file you mean")
        if found:
            return found[0]
    raise UserError(f"{path} holds no adapter: neither {lora.WEIGHTS_FILE} nor {lokr.WEIGHTS_FILE} is there")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
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


def _read_lora(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    config_path = path.with_name(lora.CONFIG_FILE)
    settings = _parse(config_path.read_bytes(), str(config_path))
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{config_path} has peft_type {settings.get('peft_type')!r}; only LORA can be read")
    _refuse(settings, ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias"), str(config_path))
    rank, alpha = _number(settings, "r", config_path), _number(settings, "lora_alpha", config_path)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(lora.KEY_PREFIX)}(.+)\.(lora_[AB]\.weight)", key)
        if not match:
            raise UserError(
                f"{path} has {key}, which is not a LoRA key of the form {lora.KEY_PREFIX}<module>.lora_A.weight"
            )
        modules.setdefault(match[1], {})[match[2]] = tensor
    config = lora.LoraConfig(rank=int(rank), alpha=alpha, target_modules=sorted(modules))
    return SavedAdapter(path=path, config=config, modules=modules, metadata=metadata)


def _read_lokr(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    where = f"lokr_config in {path}"
    settings = _parse(metadata["lokr_config"], where)
    _refuse(settings, ("weight_decompose", "full_matrix", "use_tucker", "unbalanced_factorization"), where)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        leaves = modules.setdefault(module, {})
        if leaf != "alpha":  # players take it from lokr_config
            leaves[leaf] = tensor
    config = lokr.LokrConfig(
        rank=int(_number(settings, "linear_dim", where)),
        alpha=_number(settings, "linear_alpha", where) or None,  # LyCORIS reads 0 as "the same as the rank"
        factor=int(_number(settings, "factor", where)),
        decompose_both=bool(settings.get("decompose_both")),
        target_modules=list(settings.get("target_modules") or sorted(modules)),
    )
    return SavedAdapter(path=path, config=config, modules=modules, metadata=metadata)


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON; copy the adapter again ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where} is not a JSON object; copy the adapter again")
    return settings


def _refuse(settings: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Refuse what would load with another effect than it was trained with."""
    for name in names:
        if settings.get(name):
            raise UserError(f"{where} uses {name}, which sidestep cannot read")


def _number(settings: Mapping[str, Any], name: str, where: str | Path) -> float:
    value = settings.get(name)
    if not isinstance(value, int | float):
        raise UserError(f"{where} needs a number for {name}, and has {value!r}")
    return value
