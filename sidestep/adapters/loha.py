"""LoHa, through LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sidestep.adapters.base import LowRankConfig
from sidestep.adapters.lycoris import LycorisAdapter
from sidestep.config.schema import option

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE = "loha_weights.safetensors"


@option("adapter", "loha")
@dataclass(kw_only=True)
class LohaConfig(LowRankConfig):
    """W + (alpha / rank) * (W1a W1b) * (W2a W2b), element by element (Hyeon-Woo et al. 2021, arXiv:2108.06098).

    The change can have a rank of up to ``rank`` squared, from twice LoRA's parameters. It starts from larger numbers
    than LoRA: over 50 AdamW steps on one batch (width 512) half of LoRA's learning rate was best.
    """

    family: ClassVar[str] = "loha"
    shaped_by: ClassVar[tuple[str, ...]] = ("rank",)
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),)
    folded_into: ClassVar[tuple[str, ...]] = ("hada_w1_a",)

    rank: int = 32
    default_lr: float = 5e-5

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> LohaAdapter:
        return LohaAdapter(transformer, paths, self)

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        first = leaves["hada_w1_a"] @ leaves["hada_w1_b"].flatten(1)
        return (first * (leaves["hada_w2_a"] @ leaves["hada_w2_b"].flatten(1))).reshape(weight.shape)

    def sides(self, leaves: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        return leaves["hada_w1_a"].shape[0], leaves["hada_w1_b"][0].numel()

    def players(self) -> list[str]:
        return [
            "- ACE-Step, diffusers: only after `python -m sidestep.export format=lora`; they have no LoHa.",
            f"- ComfyUI: put `{WEIGHTS_FILE}` into its LoRA folder.",
        ]


class LohaAdapter(LycorisAdapter):
    """LoHa weights on a transformer."""

    config: LohaConfig

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: LohaConfig) -> None:
        from sidestep.adapters.layers import FoldedLoha

        self.config = config
        settings = {"lora_dim": config.rank, "alpha": config.scale * config.rank}
        super().__init__(transformer, paths, FoldedLoha, settings)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write ``loha_weights.safetensors``, with the header that LoKr's file has in ACE-Step."""
        loha_config = {
            "linear_dim": self.config.rank,
            "linear_alpha": self.config.scale * self.config.rank,
            "use_tucker": False,
            "use_scalar": False,
            "weight_decompose": False,
            "target_modules": self.config.target_modules,
            "bypass_mode": False,
            "rs_lora": False,
        }
        self.write(folder / WEIGHTS_FILE, "loha", loha_config, metadata)
