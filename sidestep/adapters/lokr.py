"""LoKr, through LyCORIS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import AdapterConfig, module_kind, size
from sidestep.adapters.lycoris import LycorisAdapter
from sidestep.config.schema import option
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE = "lokr_weights.safetensors"


@option("adapter", "lokr")
@dataclass(kw_only=True)
class LokrConfig(AdapterConfig):
    """W + scale * (W1 kron W2) (Yeh et al. 2023, arXiv:2309.14859).

    W1 is the small factor and is kept full; W2 is W2a W2b of ``rank``, with scale = alpha / rank. Where ``rank`` is
    at least half of W2's longer side W2 is kept full too, and neither ``rank`` nor ``alpha`` means anything:
    the adapter's ``notes`` then say so.

    The same change of W takes a higher learning rate than LoRA's. Over 50 AdamW steps on one batch the best one was
    8 to 16 times LoRA's at rank 64 (widths 512 and 1024, rank a quarter of W2), so the default is ten times.
    """

    rank: int = 64
    default_lr: float = 1e-3
    factor: int = 8
    """Size of W1 (8 makes it 8x8, and W2 256x256 on a 2048x2048 layer); -1 makes the two nearly square."""
    decompose_both: bool = False
    """Write W1 as a product of ``rank`` too, where it is large enough."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise UserError(f"adapter.factor={self.factor} must be at least 1, or -1 for nearly square factors")

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> LokrAdapter:
        return LokrAdapter(transformer, paths, self)


class LokrAdapter(LycorisAdapter):
    """LoKr weights on a transformer, and their file as ACE-Step reads it."""

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: LokrConfig) -> None:
        from lycoris.modules.lokr import LokrModule

        self.config = config
        settings = {
            "lora_dim": config.rank,
            "alpha": config.scale * config.rank,
            "factor": config.factor,
            "decompose_both": config.decompose_both,
        }
        super().__init__(transformer, paths, LokrModule, settings)
        self.notes = self._notes()

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write ``lokr_weights.safetensors``; ACE-Step rebuilds the modules from ``lokr_config`` in its header."""
        lokr_config = {
            "linear_dim": self.config.rank,
            "linear_alpha": self.config.scale * self.config.rank,
            "factor": self.config.factor,
            "decompose_both": self.config.decompose_both,
            "use_tucker": False,
            "use_scalar": False,
            "weight_decompose": False,
            "target_modules": self.config.target_modules,
            "full_matrix": False,
            "bypass_mode": False,
            "rs_lora": False,
            "unbalanced_factorization": False,
        }
        header = {"algo": "lokr", "format": "lycoris", "lokr_config": json.dumps(lokr_config), **metadata}
        self.write(folder / WEIGHTS_FILE, header)

    def _notes(self) -> list[str]:
        """Say which settings have no effect, once for all kinds of module to which the same sizes apply."""
        kinds: dict[str, dict[str, None]] = {}  # sentence -> the kinds of module to name in it, in module order
        for path, layer in self.layers.items():
            kind, whole = module_kind(to_original(path)), size(layer.org_weight)
            if layer.use_w1 and layer.use_w2:
                sentence = (
                    f"adapter.rank={self.config.rank} and adapter.alpha have no effect on {{}} ({whole}: the factors "
                    f"{size(layer.lokr_w1)} and {size(layer.lokr_w2)} are full); {_advice(layer.lokr_w2)}"
                )
                kinds.setdefault(sentence, {})[kind] = None
            if layer.use_w1 and self.config.decompose_both:
                sentence = (
                    f"adapter.decompose_both has no effect on {{}} ({whole}: W1, {size(layer.lokr_w1)}, is full); "
                    f"{_advice(layer.lokr_w1)}"
                )
                kinds.setdefault(sentence, {})[kind] = None
        return [sentence.format(", ".join(names)) for sentence, names in kinds.items()]


def _advice(factor: Tensor) -> str:
    # LyCORIS keeps a factor full unless rank < longer side / 2
    rank = (max(factor.shape) - 1) // 2
    return f"use adapter.rank={rank} or less, or another adapter.factor" if rank else "use another adapter.factor"
