"""LoRA and DoRA, through PEFT, and the folder that PEFT adapters are saved in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import Adapter, AdapterConfig, Attention, LowRankConfig, by_kind, ends_with, nearest
from sidestep.config.schema import option
from sidestep.errors import UserError
from sidestep.files import read_text, write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' ``load_lora_weights`` looks for first in a folder."""
CONFIG_FILE = "adapter_config.json"
CONVOLUTIONS = frozenset({"proj_in.1", "proj_out.1"})
KEY_PREFIX = "base_model.model."
"""PEFT puts this in front of every key. Without it ACE-Step reports success and loads nothing."""


@option("adapter", "lora")
@dataclass(kw_only=True)
class LoraConfig(LowRankConfig):
    """W + (alpha / rank) * B A (Hu et al. 2021, arXiv:2106.09685)."""

    family: ClassVar[str] = "lora"
    shaped_by: ClassVar[tuple[str, ...]] = ("rank", "rank_pattern")
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"lora_A.weight", "lora_B.weight"}),)
    folded_into: ClassVar[tuple[str, ...]] = ("lora_B.weight",)
    use_dora: ClassVar[bool] = False
    """Whether the lengths of rows are trained too."""

    rank: int = 64
    default_lr: float = 1e-4
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732); with alpha null, by sqrt(rank)."""
    # Any, because a typed dict cannot be overridden with keys that it does not have yet
    rank_pattern: Any = None
    """Other ranks for some modules, by name or ending: {q_proj:16}; the longest ending counts."""
    rank_pattern_file: str | None = None
    """File of python -m sidestep.analyze to take rank_pattern from."""
    alpha_pattern: Any = None
    """Other alphas for some modules, likewise."""
    dropout: float = 0.0
    """Share of a module's inputs that the adapter does not see, in training only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout={self.dropout} must be at least 0 and below 1")
        if self.rank_pattern_file is not None:
            if self.rank_pattern:
                raise UserError("adapter.rank_pattern_file already says what adapter.rank_pattern would; leave one out")
            self._read_rank_pattern(Path(self.rank_pattern_file))
            self.rank_pattern_file = None  # what counts is what it says
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, (int,))
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, (int, float))

    def _read_rank_pattern(self, path: Path) -> None:
        """Take the ranks of a file, if it was made for the same modules and budget."""
        content = read_rank_pattern(path)
        self.rank_pattern = content["rank_pattern"]
        for key in ("rank", "target_modules"):
            own, made = getattr(self, key), content.get(key, getattr(self, key))
            if sorted(own) != sorted(map(str, made)) if isinstance(made, list) else own != made:
                typed = f"[{','.join(map(str, made))}]" if isinstance(made, list) else made
                raise UserError(
                    f"adapter.rank_pattern_file={path} was made with {key}={typed}, and adapter.{key} is {own}; "
                    f"type adapter.{key}={typed}, or run python -m sidestep.analyze again"
                )
        about = content["about"] if isinstance(content.get("about"), dict) else {}
        self.analyzed_for, songs = about.get("model_variant"), about.get("songs")
        self.analyzed_songs = [*map(str, songs)] if isinstance(songs, list) else []

    def rank_of(self, original_path: str) -> int:
        """Return the rank of one module."""
        return int(_lookup(self.rank_pattern, original_path, self.rank))

    def scale_of(self, original_path: str) -> float:
        """Return what the change to one module's weight is multiplied by."""
        rank = self.rank_of(original_path)
        alpha = _lookup(self.alpha_pattern, original_path, rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> LoraAdapter:
        import peft

        originals = [to_original(path) for path in paths]
        for setting in ("rank_pattern", "alpha_pattern"):
            for ending in getattr(self, setting):
                if not any(ends_with(path, ending) for path in originals):
                    raise UserError(
                        f"adapter.{setting} has {ending!r}, which is no trained module; "
                        f"did you mean {nearest(ending, originals)}?"
                    )
        config = peft.LoraConfig(
            r=self.rank,
            rank_pattern={path: self.rank_of(to_original(path)) for path in paths} if self.rank_pattern else {},
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            target_modules=list(paths),
        )
        from torch import nn

        from sidestep.adapters.fused import FusedDora, FusedLora

        config._register_custom_module({nn.Linear: FusedDora if self.use_dora else FusedLora})
        peft.inject_adapter_in_model(config, transformer)
        return LoraAdapter(transformer, paths, self)

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        product = leaves["lora_B.weight"].flatten(1) @ leaves["lora_A.weight"].flatten(1)
        return product.reshape(weight.shape)

    def sides(self, leaves: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        return leaves["lora_B.weight"].shape[0], leaves["lora_A.weight"][0].numel()

    def players(self) -> list[str]:
        if diffusers_reads(self.target_modules):
            diffusers = "- diffusers: `pipeline.load_lora_weights(<this folder>)`."
        else:
            diffusers = "- diffusers: only after `python -m sidestep.export format=diffusers`, for want of a q_proj."
        return [
            "- ACE-Step: load this folder (the one that holds `adapter_config.json`) as a LoRA.",
            diffusers,
            "- ComfyUI: put `adapter_model.safetensors` into its LoRA folder.",
        ]


@option("adapter", "dora")
@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """LoRA, and a trained length m of each row: m * (W + s B A) / |W + s B A| (Liu et al. 2024, arXiv:2402.09353)."""

    family: ClassVar[str] = "dora"
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}),
    )
    use_dora: ClassVar[bool] = True

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        product = super().change(leaves, weight)
        norm = (weight + product).norm(dim=1)
        gain = (leaves["lora_magnitude_vector"] / norm).unsqueeze(1)
        return (gain - 1) * weight + gain * product

    def players(self) -> list[str]:
        acestep, diffusers, _ = super().players()
        return [
            acestep,
            diffusers,
            "- ComfyUI: only after `python -m sidestep.export format=comfyui`; it would leave the lengths out.",
        ]


def diffusers_reads(paths: Iterable[str]) -> bool:
    """Whether diffusers reads a PEFT folder with these modules, or endings of their names, whole.

    It takes a file for ACE-Step's by two of the names, and loads any other as nothing; two more it does not know.
    """
    paths = list(paths)
    return any(path.endswith(("q_proj", "k_proj")) for path in paths) and not CONVOLUTIONS.intersection(paths)


class LoraAdapter(Adapter):
    """PEFT's LoRA or DoRA layers, in the place of the linear layers they wrap."""

    config: LoraConfig

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: LoraConfig) -> None:
        self.transformer, self.config = transformer, config
        self.layers: dict[str, Any] = {to_original(path): transformer.get_submodule(path) for path in paths}
        self.paths = list(paths)
        for path, layer in self.layers.items():
            layer.scaling["default"] = config.scale_of(path)
            layer.lora_A.float()  # PEFT makes them in the dtype of the weight they wrap
            layer.lora_B.float()
            if config.use_dora:
                layer.lora_magnitude_vector.float()
                layer.measure()

    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        weights: dict[str, dict[str, nn.Parameter]] = {}
        for path, layer in self.layers.items():
            weights[path] = {
                "lora_A.weight": layer.lora_A["default"].weight,
                "lora_B.weight": layer.lora_B["default"].weight,
            }
            if self.config.use_dora:
                weights[path]["lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
        return weights

    def scale_of(self, path: str) -> float:
        return self.config.scale_of(path)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write a PEFT folder with the scale multiplied into B and ``lora_alpha`` = ``r``, for every module.

        Diffusers and ComfyUI read only the tensors and assume a scale of 1, and ACE-Step reads the config, so this
        is the one form to which all three give the same strength.
        """
        ranks = {path: self.config.rank_of(path) for path in self.layers}
        others = {name: rank for name, rank in by_kind(ranks).items() if rank != self.config.rank}
        settings = {
            "alpha_pattern": others,
            "init_lora_weights": True,
            "lora_alpha": self.config.rank,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.config.rank,
            "rank_pattern": others,
            "target_modules": peft_targets(self.config, self.layers),
            "use_dora": self.config.use_dora,
            "use_rslora": False,
        }
        write_peft_folder(folder, self.baked(), settings, metadata)

    def detach(self) -> None:
        for path, layer in zip(self.paths, self.layers.values(), strict=True):
            parent, _, name = path.rpartition(".")
            setattr(self.transformer.get_submodule(parent), name, layer.base_layer)
        del self.transformer.peft_config


def write_peft_folder(
    folder: Path, modules: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of a PEFT adapter into ``folder``, which exists.

    Args:
        folder: where to write.
        modules: original path -> leaf -> tensor.
        settings: of ``adapter_config.json``, besides those that are the same for every family.
        metadata: for the header of the weights.
    """
    tensors = {
        f"{KEY_PREFIX}{path}.{leaf}": tensor.float().cpu().contiguous()
        for path, leaves in modules.items()
        for leaf, tensor in leaves.items()
    }
    common = {
        "base_model_name_or_path": "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt", **metadata})
    write_text(folder / CONFIG_FILE, json.dumps({**common, **settings}, indent=2, sort_keys=True) + "\n")


def peft_targets(config: AdapterConfig, paths: Mapping[str, Any]) -> list[str]:
    """Name the modules so that PEFT, which knows no ``attention`` setting, wraps the same ones."""
    if config.attention is Attention.both:
        return sorted(set(config.target_modules))
    return sorted(paths)


def read_rank_pattern(path: Path) -> dict[str, Any]:
    """Read the file of ranks that ``python -m sidestep.analyze`` wrote.

    Raises:
        UserError: if the file is none of its.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"adapter.rank_pattern_file={path} cannot be read: {error}; make one with python -m sidestep.analyze"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("rank_pattern"), dict):
        raise UserError(
            f"adapter.rank_pattern_file={path} has no rank_pattern; make one with python -m sidestep.analyze"
        )
    return content


def _pattern(setting: str, value: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    """Check that a setting maps names to numbers above 0; null is the same as none."""
    pattern = {} if value is None else value
    if not isinstance(pattern, dict) or not all(
        type(number) in kinds and 0 < number <= 2**31 for number in pattern.values()
    ):
        kind = "whole number" if kinds == (int,) else "number"
        raise UserError(f"adapter.{setting}={value} must give each name a {kind} above 0, as in {{q_proj:16}}")
    return pattern


def _lookup(pattern: Mapping[str, float], original_path: str, default: float) -> float:
    endings = [ending for ending in pattern if ends_with(original_path, ending)]
    return pattern[max(endings, key=len)] if endings else default
