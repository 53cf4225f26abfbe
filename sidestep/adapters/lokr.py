"""LoKr, through LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sidestep.adapters.base import LowRankConfig, module_kind, size
from sidestep.adapters.lycoris import LycorisAdapter
from sidestep.config.schema import option
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE = "lokr_weights.safetensors"
_LEAF_SETS = tuple(
    frozenset({*w1, *w2, *length})
    for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    for length in ((), ("dora_scale",))
)


@option("adapter", "lokr")
@dataclass(kw_only=True)
class LokrConfig(LowRankConfig):
    """W + scale * (W1 kron W2) (Yeh et al. 2023, arXiv:2309.14859).

    W1 is the small factor and is kept full; W2 is W2a W2b of ``rank``, with scale = alpha / rank. Where ``rank`` is
    at least half of W2's longer side W2 is kept full too, and neither ``rank`` nor ``alpha`` means anything:
    the adapter's ``notes`` then say so.

    The same change of W takes a higher learning rate than LoRA's. Over 50 AdamW steps on one batch the best one was
    8 to 16 times LoRA's at rank 64 (widths 512 and 1024, rank a quarter of W2), so the default is ten times.
    """

    family: ClassVar[str] = "lokr"
    shaped_by: ClassVar[tuple[str, ...]] = ("rank", "factor", "decompose_both", "full_matrix", "weight_decompose")
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = _LEAF_SETS
    folded_into: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    rank: int = 64
    default_lr: float = 1e-3
    factor: int = 8
    """Size of W1 (8 makes it 8x8, and W2 256x256 on a 2048x2048 layer); -1 makes the two nearly square."""
    decompose_both: bool = False
    """Write W1 as a product of ``rank`` too, where it is large enough."""
    full_matrix: bool = False
    """Keep W1 and W2 full, whatever their size; rank, alpha and decompose_both then have no effect."""
    weight_decompose: bool = False
    """Train the length of each row of the weight apart from its direction, as DoRA does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise UserError(f"adapter.factor={self.factor} must be at least 1, or -1 for nearly square factors")
        if self.full_matrix and self.decompose_both:
            raise UserError("adapter.full_matrix=true contradicts adapter.decompose_both=true; leave one of them out")

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> LokrAdapter:
        return LokrAdapter(transformer, paths, self)

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        import torch

        w1, w2 = _factors(leaves)
        kernel = weight.shape[2:]
        w2 = w2.reshape(w2.shape[0], -1, *kernel)
        product = torch.kron(w1.reshape(*w1.shape, *[1] * len(kernel)), w2)
        if "dora_scale" not in leaves:
            return product
        from sidestep.adapters.layers import row_norms

        gain = leaves["dora_scale"].reshape(-1, *[1] * (weight.ndim - 1)) / row_norms(weight + product)
        return (gain - 1) * weight + gain * product

    def sides(self, leaves: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        w1, w2 = _factors(leaves)
        return w1.shape[0] * w2.shape[0], w1.shape[1] * w2[0].numel()

    def header(self) -> dict[str, Any]:
        """Return what ACE-Step rebuilds the modules from: ``lokr_config`` in the header of a file."""
        return {
            "linear_dim": self.rank,
            "linear_alpha": self.scale * self.rank,
            "factor": self.factor,
            "decompose_both": self.decompose_both,
            "use_tucker": False,
            "use_scalar": False,
            "weight_decompose": self.weight_decompose,
            "target_modules": self.target_modules,
            "full_matrix": self.full_matrix,
            "bypass_mode": False,
            "rs_lora": False,
            "unbalanced_factorization": False,
        }

    def players(self) -> list[str]:
        if self.weight_decompose:
            comfyui = (
                "- ComfyUI: only after `python -m sidestep.export format=comfyui`; it computes the lengths otherwise."
            )
        else:
            comfyui = f"- ComfyUI: put `{WEIGHTS_FILE}` into its LoRA folder."
        return [
            f"- ACE-Step: load `{WEIGHTS_FILE}`.",
            comfyui,
            "- diffusers: only after `python -m sidestep.export format=diffusers`.",
        ]


def _factors(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply out W1 and W2, where they are products."""
    w1, w2 = (
        leaves[name] if name in leaves else leaves[f"{name}_a"] @ leaves[f"{name}_b"].flatten(1)
        for name in ("lokr_w1", "lokr_w2")
    )
    return w1, w2


class LokrAdapter(LycorisAdapter):
    """LoKr weights on a transformer, and their file as ACE-Step reads it."""

    config: LokrConfig

    def __init__(self, transformer: nn.Module, paths: Sequence[str], config: LokrConfig) -> None:
        from sidestep.adapters.layers import DecomposedLokr, StructuredLokr

        self.config = config
        settings = {
            "lora_dim": config.rank,
            "alpha": config.scale * config.rank,
            "factor": config.factor,
            "decompose_both": config.decompose_both,
            "full_matrix": config.full_matrix,
        }
        super().__init__(transformer, paths, DecomposedLokr if config.weight_decompose else StructuredLokr, settings)
        self.notes = self._notes()

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write ``lokr_weights.safetensors``; ACE-Step rebuilds the modules from ``lokr_config`` in its header."""
        self.write(folder / WEIGHTS_FILE, "lokr", self.config.header(), metadata)

    def _notes(self) -> list[str]:
        """Say which settings have no effect, once for all kinds of module to which the same sizes apply."""
        if self.config.full_matrix:
            return ["adapter.rank and adapter.alpha have no effect, because of adapter.full_matrix=true"]
        kinds: dict[str, dict[str, None]] = {}  # sentence -> the kinds of module to name in it, in module order
        for path, layer in self.layers.items():
            kind, whole = module_kind(path), size(layer.org_weight)
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
