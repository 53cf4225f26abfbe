"""What every adapter family shares: its common settings, and what the training loop asks of it.

An adapter is attached to diffusers' ``AceStepTransformer1DModel`` in place. Users, files and the names below use
ACE-Step's own module names (``layers.0.self_attn.q_proj``), because that is what every player reads; only the
paths handed to the transformer are diffusers' (``layers.0.self_attn.to_q``).
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sidestep.acestep.keymap import to_original
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Adapter(ABC):
    """Weights attached to a frozen transformer. All of them are float32, whatever the transformer's dtype is."""

    notes: Sequence[str] = ()
    """One sentence for each setting that has no effect on this transformer."""

    @abstractmethod
    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters of each wrapped module: original path -> leaf name -> parameter, in module order."""

    @abstractmethod
    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the files that players read into ``folder``, which exists. ``metadata`` goes into the header."""

    @abstractmethod
    def detach(self) -> None:
        """Take the adapter off. The transformer is the base model again and stays frozen."""

    def parameters(self) -> Iterator[nn.Parameter]:
        for leaves in self.weights().values():
            yield from leaves.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they are trained, as ``<original path>.<leaf>``; they share memory with the adapter."""
        return {
            f"{path}.{leaf}": parameter.detach()
            for path, leaves in self.weights().items()
            for leaf, parameter in leaves.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], source: str = "the saved adapter state") -> None:
        """Copy every tensor of ``state`` into the adapter.

        Args:
            state: what ``state_dict`` returned; any float dtype and device.
            source: where it came from, for messages.

        Raises:
            UserError: if a tensor is missing, unknown or of another size. Nothing is copied then.
        """
        own = self.state_dict()
        if missing := [key for key in own if key not in state]:
            raise UserError(f"{source} has no {missing[0]}, which this adapter needs")
        if unknown := [key for key in state if key not in own]:
            raise UserError(f"{source} has {unknown[0]}, which fits nothing in this adapter")
        for key, tensor in state.items():
            if tensor.shape != own[key].shape:
                raise UserError(
                    f"{source} has {key} of size {size(tensor)} where {size(own[key])} is needed; "
                    f"it belongs to another model_variant or other adapter settings"
                )
        for key, tensor in state.items():
            own[key].copy_(tensor)

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of each kind of module, for example ``{"self_attn.q_proj": 1_572_864}``."""
        counts: Counter[str] = Counter()
        for path, leaves in self.weights().items():
            counts[module_kind(path)] += sum(parameter.numel() for parameter in leaves.values())
        return dict(counts)


@dataclass(kw_only=True)
class AdapterConfig:
    """Settings every family understands, so a sweep over ``adapter=lora,lokr`` can also sweep these."""

    rank: int
    """Inner width of the low-rank product."""
    alpha: float | None = None
    """The change to the weight is multiplied by alpha / rank; null means alpha = rank, which is 1."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """ACE-Step's names of the linear layers to train, or endings of them: ``cross_attn.q_proj``, ``up_proj``."""
    default_lr: float
    """Learning rate where ``optim.lr`` is not set."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapter.rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"adapter.alpha={self.alpha} must be above 0, or null to be the same as adapter.rank")
        if not self.target_modules:
            raise UserError("adapter.target_modules is empty; name at least one, for example [q_proj,v_proj]")
        if not self.default_lr > 0:
            raise UserError(f"adapter.default_lr={self.default_lr} must be above 0")

    @property
    def scale(self) -> float:
        """What the change to a weight is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, transformer: nn.Module, paths: Sequence[str] | None = None) -> Adapter:
        """Freeze the transformer and put weights on it that leave its output as it was.

        Args:
            transformer: an ``AceStepTransformer1DModel`` of any dtype, on any device; its own weights are not changed.
            paths: diffusers paths of exactly the modules to wrap, where a saved adapter names them. Otherwise
                those that ``target_modules`` match.

        Raises:
            UserError: if the transformer already carries an adapter, or a target matches nothing.
        """
        if hasattr(transformer, "peft_config") or hasattr(transformer, "lycoris"):
            raise UserError("the transformer already carries an adapter; detach it before attaching another")
        if paths is None:
            paths = resolve_targets(transformer, self.target_modules)
        transformer.requires_grad_(False)
        return self.wrap(transformer, paths)

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> Adapter:
        """Put this family's weights on the modules at ``paths`` of a frozen transformer."""
        raise UserError("no adapter is chosen; use adapter=lora or adapter=lokr")


def resolve_targets(transformer: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Find the linear layers inside the decoder's blocks whose original path is, or ends with, one of the targets.

    This is PEFT's rule for names, so ACE-Step finds the same modules from the same list.

    Returns:
        Their diffusers paths, in module order.

    Raises:
        UserError: naming a target that matches nothing, and the nearest name that does.
    """
    from torch import nn

    originals = {
        to_original(path): path
        for path, module in transformer.named_modules()
        if path.startswith("layers.") and isinstance(module, nn.Linear)
    }
    found: set[str] = set()
    for target in target_modules:
        matches = {path for path in originals if f".{path}".endswith(f".{target}")}
        if not matches:
            raise UserError(
                f"adapter.target_modules has {target!r}, which matches no linear layer of the transformer; "
                f"did you mean {_nearest(target, originals)}?"
            )
        found |= matches
    return [path for original, path in originals.items() if original in found]


def _nearest(target: str, paths: Mapping[str, str]) -> str:
    parts = [path.split(".") for path in paths]
    endings = sorted({".".join(part[-n:]) for part in parts for n in range(1, len(part) + 1)})
    # the diffusers names are spelt nothing like ACE-Step's, so translate before comparing
    return difflib.get_close_matches(to_original(target), endings, n=1, cutoff=0.0)[0]


def module_kind(original_path: str) -> str:
    """Name what a module is without saying in which block: ``layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    return re.sub(r"^layers\.\d+\.", "", original_path)


def size(tensor: Tensor) -> str:
    """Write a shape for people: ``64x2048``."""
    return "x".join(map(str, tensor.shape)) or "a single number"
