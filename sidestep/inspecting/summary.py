"""What an adapter is: read from its files alone, and beside the base model where that is there."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sidestep.adapters.base import SavedAdapter, module_kind
from sidestep.adapters.convert import depends_on_weights, stand_in
from sidestep.adapters.files import trained_on
from sidestep.adapters.oft import OftConfig
from sidestep.errors import UserError
from sidestep.exporting.base_weights import BaseWeights
from sidestep.records import parse_json

_TINY = torch.finfo(torch.float32).tiny
_COLUMNS = {"self_attn": "self", "cross_attn": "cross", "mlp": "mlp"}


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """How large the change of one weight is."""

    norm: float
    """Frobenius norm of the change."""
    relative: float | None
    """The same, relative to the base weight's norm; None without the base model."""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """One number for each kind of module in each block."""

    kinds: list[str]
    """Columns, in module order: ``self_attn.q_proj``."""
    blocks: list[int]
    """Rows."""
    values: list[list[float | None]]
    """[row][column]; None where the adapter has no such module."""
    relative: bool
    """Whether values are shares of the base weight, or plain norms."""
    others: dict[str, float]
    """Modules outside of the blocks."""

    @property
    def largest(self) -> float:
        """The largest value, as it is shown."""
        return max((self.shown(value) for value in self._all()), default=0.0)

    def shown(self, value: float) -> float:
        """Turn a share into per cent; leave a norm as it is."""
        return 100 * value if self.relative else value

    def text(self, value: float | None) -> str:
        """Write one value, with as many decimals as every other, and three digits of the largest at least."""
        if value is None:
            return ""
        decimals = 1 if self.largest >= 100 else max(2, 2 - math.floor(math.log10(self.largest or 1)))
        return f"{self.shown(value):.{decimals}f}"

    def _all(self) -> list[float]:
        return [*self.others.values(), *(value for row in self.values for value in row if value is not None)]

    @property
    def unit(self) -> str:
        return "change in % of the base weight's norm" if self.relative else "norm of the change"

    def lines(self) -> list[str]:
        """Write the numbers as a table, blocks down and kinds across."""
        lines = []
        if self.blocks:
            lines.append("block  " + "".join(f"{short_kind(kind):>12}" for kind in self.kinds))
            for block, row in zip(self.blocks, self.values, strict=True):
                lines.append(f"{block:<7}" + "".join(f"{self.text(value) or '-':>12}" for value in row))
        return lines + [f"{path:<40} {self.text(value):>6}" for path, value in self.others.items()]


def short_kind(kind: str) -> str:
    """Shorten the name of a kind for a column: ``self_attn.q_proj`` -> ``self q``."""
    part, _, layer = kind.partition(".")
    return f"{_COLUMNS.get(part, part)} {layer.removesuffix('_proj')}".strip()


def measure_changes(saved: SavedAdapter, base: BaseWeights | None) -> dict[str, LayerChange]:
    """Measure the change of each module's weight at full strength.

    Returns:
        Original path -> its size. Empty where the change depends on the weights and ``base`` is None.

    Raises:
        UserError: if the adapter does not fit the base model.
    """
    if base is None and depends_on_weights(saved):
        return {}
    changes = {}
    for path in saved.paths:
        weight = stand_in(saved, path) if base is None else base.read(path)
        norm, of_weight = saved.change(path, weight).norm().item(), max(weight.norm().item(), _TINY)
        changes[path] = LayerChange(norm=norm, relative=None if base is None else norm / of_weight)
    return changes


def heatmap(changes: Mapping[str, LayerChange]) -> Heatmap:
    """Arrange changes by block and kind of module."""
    relative = all(change.relative is not None for change in changes.values())
    values = {path: change.norm if change.relative is None else change.relative for path, change in changes.items()}
    cells, others = {}, {}
    for path, value in values.items():
        if found := re.match(r"layers\.(\d+)\.", path):
            cells[int(found[1]), module_kind(path)] = value
        else:
            others[path] = value
    blocks = sorted({block for block, _ in cells})
    kinds = sorted({kind for _, kind in cells}, key=_order)
    return Heatmap(
        kinds=kinds,
        blocks=blocks,
        values=[[cells.get((block, kind)) for kind in kinds] for block in blocks],
        relative=relative,
        others=others,
    )


def facts(saved: SavedAdapter) -> list[tuple[str, str]]:
    """Say what the files tell: family, rank, scale, size, and what it was trained on.

    Returns:
        Pairs of a name and a text, in the order to show them.
    """
    tensors = [tensor for leaves in saved.modules.values() for tensor in leaves.values()]
    rows = [
        ("file", str(saved.path)),
        ("family", saved.family + (", weight-decomposed" if _has_leaf(saved, "dora_scale") else "")),
        ("rank", _ranks(saved)),
        *([("block size", str(saved.config.block_size))] if isinstance(saved.config, OftConfig) else []),
        ("effective scale", _counted(f"{scale:g}" for scale in saved.scales.values())),
        (
            "modules",
            f"{len(saved.paths)}: {', '.join(sorted({module_kind(path) for path in saved.paths}, key=_order))}",
        ),
        ("parameters", f"{sum(tensor.numel() for tensor in tensors):,}"),
        ("size on disk", f"{saved.path.stat().st_size / 1e6:,.2f} MB"),
    ]
    return rows + _training(trained_on(saved), saved)


def _training(about: Mapping[str, Any], saved: SavedAdapter) -> list[tuple[str, str]]:
    if not about:
        return [("trained on", "unknown: the header has no entry of sidestep's")]
    versions = about.get("versions", {})
    rows = [
        ("model variant", f"{about.get('model_variant')} (checkpoint {about.get('checkpoint')})"),
        ("trained for", f"{about.get('step')} steps, {about.get('epoch')} epochs"),
        ("dataset", str(about.get("dataset"))),
        ("trigger words", ", ".join(map(str, about.get("custom_tags", []))) or "none"),
        (
            "sample with",
            f"shift {about.get('shift')}, {about.get('num_inference_steps')} steps, "
            f"guidance {about.get('guidance_scale')}",
        ),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return rows + ([("exported", _export(saved))] if "sidestep_export" in saved.metadata else [])


def _export(saved: SavedAdapter) -> str:
    try:
        done = parse_json(saved.metadata["sidestep_export"])
        lost = f", {done['worst_error']:.2%} lost in the worst layer" if "worst_error" in done else ""
        return f"from {done['family']} at strength {done['scale']:g}{lost}"
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"{saved.path}: the entry sidestep_export of its header is damaged; copy it again") from error


def _ranks(saved: SavedAdapter) -> str:
    return _counted(_rank(leaves) for leaves in saved.modules.values())


def _rank(leaves: Mapping[str, torch.Tensor]) -> str:
    """Read the inner width from the tensors, which cannot be wrong about it."""
    if "lora_A.weight" in leaves:
        return str(leaves["lora_A.weight"].shape[0])
    inner = [tensor.shape[0] for leaf, tensor in leaves.items() if leaf.endswith("_b")]
    if inner:
        return str(inner[0])
    return "full" if any("lokr" in leaf for leaf in leaves) else "none"


def _counted(words: Any) -> str:
    """Write each word once, with how often it came: ``4 (30 of 32), 8 (2 of 32)``; of many only the outermost."""
    counts = Counter(words)
    total = sum(counts.values())
    if len(counts) == 1:
        return next(iter(counts))
    if len(counts) > 3:
        ordered = sorted(counts, key=_as_number)
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(f"{word} ({count} of {total})" for word, count in counts.most_common())


def _as_number(word: str) -> float:
    try:
        return float(word)
    except ValueError:  # full
        return math.inf


def _has_leaf(saved: SavedAdapter, leaf: str) -> bool:
    return any(leaf in leaves for leaves in saved.modules.values())


def _order(kind: str) -> tuple[int, int, str]:
    """Columns as the block computes: self attention, cross attention, MLP; q, k, v, o within."""
    part, _, layer = kind.partition(".")
    parts, layers = list(_COLUMNS), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return (
        parts.index(part) if part in parts else len(parts),
        layers.index(layer) if layer in layers else len(layers),
        kind,
    )
