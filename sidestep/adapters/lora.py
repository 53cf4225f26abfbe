"""LoRA, through PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import Adapter, AdapterConfig
from sidestep.config.schema import option
from sidestep.errors import UserError
from sidestep.files import replacing, write_text

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
KEY_PREFIX = "base_model.model."
"""PEFT puts this in front of every key. Without it ACE-Step reports success and loads nothing."""


@option("adapter", "lora")
@dataclass(kw_only=True)
class LoraConfig(AdapterConfig):
    """W + (alpha / rank) * B A (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 64
    default_lr: float = 1e-4
    dropout: float = 0.0
    """Share of a module's inputs that the adapter does not see, in training only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout={self.dropout} must be at least 0 and below 1")

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> LoraAdapter:
        import peft

        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.scale * self.rank,
                lora_dropout=self.dropout,
                target_modules=list(paths),
            ),
            transformer,
        )
        return LoraAdapter(transformer, paths, self)


class LoraAdapter(Adapter):
    """PEFT's LoRA layers, in the place of the linear layers they wrap."""

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: LoraConfig) -> None:
        self.transformer, self.config = transformer, config
        self.layers: dict[str, Any] = {path: transformer.get_submodule(path) for path in paths}
        for layer in self.layers.values():
            layer.lora_A.float()  # PEFT makes them in the dtype of the weight they wrap
            layer.lora_B.float()

    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        return {
            to_original(path): {
                "lora_A.weight": layer.lora_A["default"].weight,
                "lora_B.weight": layer.lora_B["default"].weight,
            }
            for path, layer in self.layers.items()
        }

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write a PEFT folder with alpha / rank multiplied into B and ``lora_alpha`` = ``r``.

        Diffusers and ComfyUI read only the tensors and assume a scale of 1, and ACE-Step reads the config, so this
        is the one form to which all three give the same strength.
        """
        from safetensors.torch import save_file

        tensors = {}
        for key, tensor in self.state_dict().items():
            scale = self.config.scale if key.endswith("lora_B.weight") else 1.0
            tensors[KEY_PREFIX + key] = (tensor * scale).cpu().contiguous()
        peft_config = {
            "base_model_name_or_path": "",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.config.rank,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.config.rank,
            "target_modules": sorted(set(self.config.target_modules)),
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        }
        with replacing(folder / WEIGHTS_FILE) as partial:
            save_file(tensors, partial, {"format": "pt", **metadata})
        write_text(folder / CONFIG_FILE, json.dumps(peft_config, indent=2) + "\n")

    def detach(self) -> None:
        for path, layer in self.layers.items():
            parent, _, name = path.rpartition(".")
            setattr(self.transformer.get_submodule(parent), name, layer.base_layer)
        del self.transformer.peft_config
