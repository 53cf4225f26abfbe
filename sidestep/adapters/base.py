"""What every adapter family shares: its common settings, and what the training loop asks of it.

An adapter is attached to diffusers' ``AceStepTransformer1DModel`` in place. Users, files and the names below use
ACE-Step's own module names (``layers.0.self_attn.q_proj``), because that is what every player reads; only the
paths handed to the transformer are diffusers' (``layers.0.self_attn.to_q``).
"""

from __future__ import annotations

import difflib
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


log = logging.getLogger(__name__)

T = TypeVar("T")

CARRIERS = ("peft_config", "lycoris", "oft", "applied")
"""Attributes by which a transformer, or a layer of it, shows that it carries an adapter."""


class Adapter(ABC):
    """Weights attached to a frozen transformer. All of them are float32, whatever the transformer's dtype is."""

    config: AdapterConfig
    """The settings it was made with."""
    transformer: nn.Module
    """What it is attached to."""
    notes: Sequence[str] = ()
    """One sentence for each setting that has no effect on this transformer."""

    @abstractmethod
    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters of each wrapped module: original path -> leaf name -> parameter, in module order."""

    @abstractmethod
    def scale_of(self, path: str) -> float:
        """Return what the change to the module at an original path is multiplied by."""

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

    def baked(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of each module with its scale multiplied in, so that the family's formula needs none."""
        baked = {path: {leaf: p.detach() for leaf, p in leaves.items()} for path, leaves in self.weights().items()}
        for path, leaves in baked.items():
            leaf = self.config.folded(leaves)
            leaves[leaf] = leaves[leaf] * self.scale_of(path)
        return baked

    def start_from(self, saved: SavedAdapter) -> None:
        """Copy a saved adapter's weights, so that this one gives the same output. Modules it does not have keep theirs.

        Layers outside of the blocks, which the peers' LoKr files hold too, are left out with a warning if they act.

        Raises:
            UserError: if its family, modules or sizes are not this adapter's, with the setting that makes them so.
        """
        saved.require_family(self.config)
        if any(getattr(saved.config, key) != getattr(self.config, key) for key in self.config.read_with):
            raise UserError(f"{saved.path} would act otherwise in this run; {saved.settings_to_type(self.config)}")
        own, state = self.weights(), self.state_dict()
        strange = [path for path in saved.paths if path not in own and saved.acts_on(self.transformer, path)]
        if inside := [path for path in strange if path.startswith("layers.")]:
            kept = [path for path in saved.paths if path in own]
            targets = ",".join(sorted({path.rpartition(".")[2] for path in inside + kept}))
            attention = "" if self.config.attention is Attention.both else " adapter.attention=both"
            raise UserError(
                f"{saved.path} has {inside[0]}, which this run does not train; "
                f"type adapter.target_modules=[{targets}]{attention}"
            )
        if strange:
            log.warning(
                "%s also changes %s, which lie outside of the blocks and are not trained here; this run starts "
                "without those changes",
                saved.path,
                ", ".join(strange),
            )
        for path, leaves in saved.modules.items():
            if path not in own:
                continue
            shapes = {leaf: tensor.shape for leaf, tensor in leaves.items()}
            if shapes != {leaf: parameter.shape for leaf, parameter in own[path].items()}:
                raise UserError(
                    f"{saved.path} has {path} of other sizes than this run; {saved.settings_to_type(self.config)}"
                )
            state.update({f"{path}.{leaf}": tensor for leaf, tensor in leaves.items()})
            folded = self.config.folded(leaves)
            state[f"{path}.{folded}"] = leaves[folded] / self.scale_of(path)
        self.load_state_dict(state, str(saved.path))

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of each kind of module, for example ``{"self_attn.q_proj": 1_572_864}``."""
        counts: Counter[str] = Counter()
        for path, leaves in self.weights().items():
            counts[module_kind(path)] += sum(parameter.numel() for parameter in leaves.values())
        return dict(counts)


class Attention(StrEnum):
    """Names equal values, because OmegaConf matches an enum by name."""

    both = "both"
    self = "self"
    cross = "cross"


@dataclass(kw_only=True)
class AdapterConfig:
    """Settings every family understands, so a sweep over ``adapter=lora,oft`` can also sweep these."""

    family: ClassVar[str] = ""
    """The option of the group ``adapter``."""
    shaped_by: ClassVar[tuple[str, ...]] = ()
    """Settings that decide the sizes of the weights."""
    read_with: ClassVar[tuple[str, ...]] = ()
    """Settings with which weights of the same sizes make another change."""
    leaf_sets: ClassVar[tuple[frozenset[str], ...]] = ()
    """What the weights of one module are called, in each of the forms they come in."""
    folded_into: ClassVar[tuple[str, ...]] = ()
    """The leaf that a module's scale is multiplied into: the first of these that it has."""

    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """ACE-Step's names of the linear layers to train, or endings of them: ``cross_attn.q_proj``, ``up_proj``."""
    attention: Attention = Attention.both
    """Which attention to train: self, cross or both. Targets outside of attention stay."""
    default_lr: float
    """Learning rate where ``optim.lr`` is not set."""

    def __post_init__(self) -> None:
        self.analyzed_for: str | None = None  # no field: it is checked once and is no setting
        """Name of the model variant that a file of ranks was made for."""
        self.analyzed_songs: list[str] = []
        """Content ids of the songs that it was measured on."""
        if not self.target_modules:
            raise UserError("adapter.target_modules is empty; name at least one, for example [q_proj,v_proj]")
        if not self.default_lr > 0:
            raise UserError(f"adapter.default_lr={self.default_lr} must be above 0")

    def attach(self, transformer: nn.Module) -> Adapter:
        """Freeze the transformer and put weights on it that leave its output as it was.

        Args:
            transformer: an ``AceStepTransformer1DModel`` of any dtype, on any device; its own weights are not changed.

        Raises:
            UserError: if the transformer already carries an adapter, or a target matches nothing.
        """
        refuse_second(transformer)
        paths = resolve_targets(transformer, self.target_modules, self.attention)
        transformer.requires_grad_(False)
        return self.wrap(transformer, paths)

    def wrap(self, transformer: nn.Module, paths: Sequence[str]) -> Adapter:
        """Put this family's weights on the modules at ``paths`` (diffusers') of a frozen transformer."""
        raise UserError("no adapter is chosen; use adapter=lora or adapter=lokr")

    def change(self, leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """Compute what the adapter adds to a weight: the family's formula.

        Args:
            leaves: baked float32 weights of one module, on the device of ``weight``.
            weight: the base model's, (out, in), or (out, in, kernel) of a Conv1d; float32.

        Returns:
            The change, in the shape of ``weight``.
        """
        raise NotImplementedError

    def sides(self, leaves: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Return the two sides of the weight, (out, in), that a module's leaves are for; None where any would do."""
        raise NotImplementedError

    def folded(self, leaves: Mapping[str, object]) -> str:
        """Name the leaf of a module that its scale is multiplied into."""
        return next(leaf for leaf in self.folded_into if leaf in leaves)

    def players(self) -> list[str]:
        """Say which programs read the saved files, one line of Markdown each."""
        raise NotImplementedError


@dataclass(kw_only=True)
class LowRankConfig(AdapterConfig):
    """Settings of the families that add a product of thin matrices."""

    rank: int
    """Inner width of the low-rank product."""
    alpha: float | None = None
    """The change to the weight is multiplied by alpha / rank; null means alpha = rank, which is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"adapter.rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"adapter.alpha={self.alpha} must be above 0, or null to be the same as adapter.rank")

    @property
    def scale(self) -> float:
        """What the change to a weight is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(kw_only=True)
class SavedAdapter:
    """An adapter read from disk, not put on a transformer."""

    path: Path
    """The file with the weights."""
    config: AdapterConfig
    """The family and the settings it was made with, as far as the file tells them."""
    modules: dict[str, dict[str, Tensor]]
    """Original path of each module -> leaf -> tensor, float32, with the scale multiplied in."""
    scales: dict[str, float]
    """Original path of each module -> the scale that was multiplied in."""
    metadata: dict[str, str]
    """The header of the weights file."""

    @property
    def family(self) -> str:
        """The option of the group ``adapter`` that trains such adapters."""
        return self.config.family

    @property
    def paths(self) -> list[str]:
        """Original paths of the modules it changes."""
        return list(self.modules)

    def require_family(self, config: AdapterConfig) -> None:
        """Refuse to start a run of another family from this adapter."""
        if self.family != config.family:
            raise UserError(
                f"{self.path} is a {self.family} adapter, and this run trains {config.family}; "
                f"type adapter={self.family}"
            )

    def settings_to_type(self, config: AdapterConfig) -> str:
        """Say how to type the settings that give a run this adapter's sizes, where ``config`` has others."""
        typed = []
        for key in config.shaped_by + config.read_with:
            wanted, has = getattr(self.config, key), getattr(config, key)
            if wanted != has:
                text = ",".join(f"{k}:{v}" for k, v in wanted.items()) if isinstance(wanted, dict) else None
                typed.append(f"'adapter.{key}={{{text}}}'" if text is not None else f"adapter.{key}={wanted}".lower())
        return f"type {' '.join(typed)}" if typed else "it belongs to another model_variant"

    def weight_in(self, transformer: nn.Module, original_path: str) -> Tensor:
        """Find the weight of a transformer that a module is for.

        Raises:
            UserError: if the transformer has none.
        """
        from torch import nn

        try:
            module = transformer.get_submodule(to_diffusers(original_path))
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear | nn.Conv1d):
            raise UserError(f"{self.path} has {original_path}, which fits nothing in this transformer")
        return module.weight

    def acts_on(self, transformer: nn.Module, original_path: str) -> bool:
        """Whether it changes a weight by more than the rounding of a row's length."""
        weight = self.weight_in(transformer, original_path)
        return bool(self.change(original_path, weight).norm() > 1e-6 * weight.detach().float().norm())

    def scaled(self, original_path: str, scale: float) -> dict[str, Tensor]:
        """Return the weights of a module with a strength multiplied in.

        Raises:
            UserError: if they are then too large for float32.
        """
        leaves = dict(self.modules[original_path])
        folded = self.config.folded(leaves)
        leaves[folded] = leaves[folded] * scale
        self._require_finite(original_path, leaves[folded], scale)
        return leaves

    def change(self, original_path: str, weight: Tensor, scale: float = 1.0) -> Tensor:
        """Compute what the adapter adds to a weight.

        Args:
            original_path: one of ``paths``.
            weight: the base model's weight, (out, in), or (out, in, kernel) of a Conv1d; any dtype and device. On the
                device "meta" only sizes are compared.
            scale: strength; 1 is the adapter as it was trained.

        Returns:
            The change in float32, in the shape and on the device of ``weight``.

        Raises:
            UserError: if the adapter was made for a weight of another size, or the change is too large for float32.
        """
        import torch

        leaves = {leaf: tensor.to(weight.device) for leaf, tensor in self.modules[original_path].items()}
        needed = (weight.shape[0], weight[0].numel())
        try:
            found = tuple(side or own for side, own in zip(self.config.sides(leaves), needed, strict=True))
            if found != needed:
                raise UserError(
                    f"{self.path} has {original_path} of size {found[0]}x{found[1]} where {needed[0]}x{needed[1]} is "
                    f"needed; it belongs to another model_variant"
                )
            change = self.config.change(leaves, weight.detach().float()) * scale
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            sizes = ", ".join(f"{leaf} {size(tensor)}" for leaf, tensor in leaves.items())
            raise UserError(f"{self.path} has tensors for {original_path} that do not fit together: {sizes}") from error
        self._require_finite(original_path, change, scale)
        return change

    def _require_finite(self, original_path: str, tensor: Tensor, scale: float) -> None:
        if not tensor.is_meta and not tensor.isfinite().all():
            raise UserError(
                f"{self.path} has weights for {original_path} so large that at strength {scale:g} they are not finite"
            )

    def merged_weight(self, original_path: str, weight: Tensor, scale: float = 1.0) -> Tensor:
        """Compute the weight that gives what the base model gives with this adapter, in float32; see ``change``."""
        return weight.detach().float() + self.change(original_path, weight, scale)


def refuse_second(transformer: nn.Module) -> None:
    """Refuse a transformer that already carries an adapter, of any family, for training or for use."""
    if any(hasattr(module, name) for module in transformer.modules() for name in CARRIERS):
        raise UserError("the transformer already carries an adapter; detach it before attaching another")


def resolve_targets(
    transformer: nn.Module, target_modules: Sequence[str], attention: Attention = Attention.both
) -> list[str]:
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
        matches = {path for path in originals if ends_with(path, target)}
        if not matches:
            raise UserError(
                f"adapter.target_modules has {target!r}, which matches no linear layer of the transformer; "
                f"did you mean {nearest(target, originals)}?"
            )
        allowed = {path for path in matches if attention is Attention.both or f".{_OTHER[attention]}_attn." not in path}
        if not allowed:
            raise UserError(
                f"adapter.target_modules has {target!r}, which adapter.attention={attention} leaves out; "
                f"remove one of them"
            )
        found |= allowed
    return [path for original, path in originals.items() if original in found]


_OTHER = {Attention.self: Attention.cross, Attention.cross: Attention.self}


def ends_with(original_path: str, ending: str) -> bool:
    """Whether a path is, or ends in, some whole names: ``layers.0.self_attn.q_proj`` in ``self_attn.q_proj``."""
    return f".{original_path}".endswith(f".{ending}")


def nearest(target: str, paths: Iterable[str]) -> str:
    """Name the ending of a path that is spelt most like ``target``."""
    parts = [path.split(".") for path in paths]
    endings = sorted({".".join(part[-n:]) for part in parts for n in range(1, len(part) + 1)})
    # the diffusers names are spelt nothing like ACE-Step's, so translate before comparing
    return difflib.get_close_matches(to_original(target), endings, n=1, cutoff=0.0)[0]


def by_kind(values: Mapping[str, T]) -> dict[str, T]:
    """Shorten a mapping of original paths: one entry for a kind of module where all of that kind have one value."""
    kinds: dict[str, set[T]] = {}
    for path, value in values.items():
        kinds.setdefault(module_kind(path), set()).add(value)
    return {(module_kind(path) if len(kinds[module_kind(path)]) == 1 else path): v for path, v in values.items()}


def module_kind(original_path: str) -> str:
    """Name what a module is without saying in which block: ``layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    return re.sub(r"^layers\.\d+\.", "", original_path)


def size(tensor: Tensor) -> str:
    """Write a shape for people: ``64x2048``."""
    return "x".join(map(str, tensor.shape)) or "a single number"
