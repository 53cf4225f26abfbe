"""OFT, saved as PEFT does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import Adapter, AdapterConfig
from sidestep.adapters.lora import peft_targets, write_peft_folder
from sidestep.config.schema import option
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


MOST_TERMS = 100
"""Of the series that approximates rotations; each costs a product of matrices."""


@option("adapter", "oft")
@dataclass(kw_only=True)
class OftConfig(AdapterConfig):
    """W R, with R made of rotations of blocks of inputs (Qiu et al. 2023, arXiv:2306.07280).

    It has neither rank nor alpha: ``block_size`` decides how many parameters there are. Over 50 AdamW steps on one
    batch (width 512) four to eight times LoRA's learning rate was best.
    """

    family: ClassVar[str] = "oft"
    shaped_by: ClassVar[tuple[str, ...]] = ("block_size", "block_share")
    read_with: ClassVar[tuple[str, ...]] = ("neumann_terms",)
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_R.weight"}),)
    folded_into: ClassVar[tuple[str, ...]] = ("oft_R.weight",)

    default_lr: float = 4e-4
    block_size: int = 64
    """Inputs that are rotated together; must divide the number of inputs of every trained layer."""
    block_share: bool = False
    """Rotate all blocks of a layer alike, with one block's parameters."""
    neumann_terms: int = 0
    """0 for exact rotations; 4 or more for PEFT's quicker approximation by a series of so many terms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise UserError(f"adapter.block_size={self.block_size} must be at least 2")
        if self.neumann_terms != 0 and self.neumann_terms < 4:
            raise UserError(f"adapter.neumann_terms={self.neumann_terms} must be 0, for exact, or at least 4")

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> OftAdapter:
        for path in paths:
            inputs = cast("nn.Linear", transformer.get_submodule(path)).in_features
            if inputs % self.block_size != 0:
                raise UserError(
                    f"adapter.block_size={self.block_size} does not divide the {inputs} inputs of {to_original(path)}; "
                    f"use a divisor of it, or leave that layer out of adapter.target_modules"
                )
        return OftAdapter(transformer, paths, self)

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        import torch

        from sidestep.adapters.layers import turns

        leaf = leaves["oft_R.weight"]
        side = block_size_of(leaf)
        turn = turns(leaf, side, self.neumann_terms)
        blocks = weight.unflatten(1, (-1, side))
        return torch.einsum("orc,rkc->ork", blocks, turn.expand(blocks.shape[1], -1, -1)).flatten(1)

    def sides(self, leaves: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        leaf = leaves["oft_R.weight"]
        return None, None if self.block_share else len(leaf) * block_size_of(leaf)

    def players(self) -> list[str]:
        return [
            "- ACE-Step: load this folder as a LoRA; its scale has no effect on OFT.",
            "- diffusers, ComfyUI: only after `python -m sidestep.export format=lora`; they cannot read PEFT's OFT.",
        ]


def block_size_of(leaf: Tensor) -> int:
    """Find the side of the blocks whose upper triangles are the rows of ``leaf``, (blocks, side * (side - 1) / 2)."""
    return (1 + math.isqrt(1 + 8 * leaf.shape[1])) // 2


class OftAdapter(Adapter):
    """Rotations on a transformer."""

    config: OftConfig

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: OftConfig) -> None:
        from torch import nn

        from sidestep.adapters.layers import OftLayer

        self.transformer, self.config = transformer, config
        self.layers = {
            to_original(path): OftLayer(
                cast("nn.Linear", transformer.get_submodule(path)),
                config.block_size,
                config.block_share,
                config.neumann_terms,
            )
            for path in paths
        }
        # as a child of the transformer, where DistributedDataParallel and `.to(device)` find the parameters
        transformer.add_module("oft", nn.ModuleList(self.layers.values()))

    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        return {path: {"oft_R.weight": layer.weight} for path, layer in self.layers.items()}

    def scale_of(self, path: str) -> float:
        return 1.0

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write a PEFT folder."""
        settings = {
            "block_share": self.config.block_share,
            "coft": False,
            "init_weights": True,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": self.config.neumann_terms or 5,
            "oft_block_size": self.config.block_size,
            "peft_type": "OFT",
            "peft_version": "0.18.0",  # the first that approximates as we do
            "r": 0,
            "target_modules": peft_targets(self.config, self.layers),
            "use_cayley_neumann": self.config.neumann_terms > 0,
        }
        write_peft_folder(folder, self.baked(), settings, metadata)

    def detach(self) -> None:
        for layer in self.layers.values():
            layer.hook.remove()
        del self.transformer.oft
