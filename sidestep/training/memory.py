"""How much memory a run needs, from its settings and the sizes of the model; nothing is loaded and no device is asked.

The model is built without values (PyTorch's meta device), with the adapter and the checkpointing that the run would
have, and goes forward once: what is alive afterwards is what the backward pass needs. That is done for two and for
four layers, and the others cost as much as those.
"""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.conditioning import context_latents
from sidestep.acestep.frozen import streamline
from sidestep.acestep.model_config import ModelConfig
from sidestep.adapters import AdapterConfig
from sidestep.config.settings import GradientCheckpointing, MemorySettings, Quantization
from sidestep.data.sampler import window_frames
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.forward import predict_velocity
from sidestep.training.optim import OptimConfig

log = logging.getLogger(__name__)

OVERHEAD_GIB = 0.5
"""Of CUDA itself."""
FRAGMENTATION = 0.06
"""Share of a device's memory that is lost between tensors, or comes and goes within a layer."""
NEGLIGIBLE = 0.05
"""Share of a device's memory below which activations need no plan."""
CONDITION_TOKENS = 600
"""Of a song with lyrics; fewer than the music's own."""
STORED = {Quantization.int8: 1.0, Quantization.nf4: 0.5 + 2 / 64}
"""Bytes of a weight in a block's linear layers; those of nf4 share a scale between 64."""


@dataclass(frozen=True)
class MemoryPlan:
    """What the memory goes to, in GiB."""

    weights: float
    """Of the frozen transformer."""
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass by one micro-batch."""
    recomputed: float
    """What the backward pass computes again of one layer, with gradient checkpointing."""

    @property
    def total(self) -> float:
        """All of it; CUDA itself takes half a GiB more, and what comes and goes within a layer a few per cent."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.recomputed


def plan_memory(
    model: ModelConfig, adapter: AdapterConfig, optim: OptimConfig, memory: MemorySettings, dtype: torch.dtype
) -> MemoryPlan:
    """Say what training takes at excerpts of ``memory.max_seconds``; about a second of work.

    Args:
        model: sizes of the model, ``checkpoint.config``.
        adapter: what is trained.
        optim: how.
        memory: the settings that memory depends on, complete.
        dtype: of the frozen weights and of what is computed.
    """
    none = replace(memory, gradient_checkpointing=GradientCheckpointing.none)
    everywhere = replace(memory, checkpointed_share=1.0)
    with_none, per_layer = _extrapolate(model, adapter, none, dtype)
    recomputes = memory.gradient_checkpointing is not GradientCheckpointing.none
    kept = with_none
    if recomputes:
        with_all, _ = _extrapolate(model, adapter, everywhere, dtype)
        share = round(memory.checkpointed_share * model.num_hidden_layers) / model.num_hidden_layers
        kept = {key: share * with_all[key] + (1 - share) * with_none[key] for key in with_none}
    offloaded = round(memory.offloaded_share * model.num_hidden_layers)
    if offloaded:  # two buffers of a block's size take turns
        kept["weights"] -= max(0, offloaded - 2) * per_layer["weights"]
    return MemoryPlan(
        weights=kept["weights"] / 2**30,
        adapter=kept["adapter"] / 2**30,
        gradients=kept["adapter"] / 2**30,
        optimizer=kept["adapter"] / 4 * optim.state_bytes / 2**30,
        activations=kept["activations"] / 2**30,
        recomputed=per_layer["activations"] / 2**30 if recomputes else 0.0,
    )


def choose_checkpointing(
    model: ModelConfig,
    adapter: AdapterConfig,
    optim: OptimConfig,
    memory: MemorySettings,
    dtype: torch.dtype,
    *,
    available_gib: float,
    compiled: bool,
) -> MemorySettings:
    """Decide what ``gradient_checkpointing=auto`` computes again: as little as the memory allows.

    Nothing, or else all but the products of as few layers as will do, or else everything of as few. The trained
    weights are the same whatever is chosen.

    Args:
        model: sizes of the model, ``checkpoint.config``.
        adapter: what is trained.
        optim: how.
        memory: the settings that memory depends on, complete but for auto.
        dtype: of the frozen weights and of what is computed.
        available_gib: memory of the device.
        compiled: whether the blocks are compiled, which chooses within a layer by itself.

    Returns:
        ``memory`` without auto. If nothing suffices, everything is computed again.
    """
    usable = (1 - FRAGMENTATION) * available_gib - OVERHEAD_GIB
    needed = round(memory.offloaded_share * model.num_hidden_layers)
    # no family keeps more than 300 values of four bytes for each token, layer and eighth of the width
    rows = memory.batch_size * (window_frames(memory.max_seconds) / model.patch_size + CONDITION_TOKENS)
    at_most = rows * model.num_hidden_layers * model.hidden_size * 150 * 4 / 2**30
    if at_most < NEGLIGIBLE * available_gib and not needed:
        return replace(memory, gradient_checkpointing=GradientCheckpointing.none)

    def planned(kind: GradientCheckpointing) -> MemoryPlan:
        whole = replace(memory, gradient_checkpointing=kind, checkpointed_share=1.0)
        return plan_memory(model, adapter, optim, whole, dtype)

    without = planned(GradientCheckpointing.none).total
    if without <= usable and not needed:
        return replace(memory, gradient_checkpointing=GradientCheckpointing.none)
    most = round(memory.checkpointed_share * model.num_hidden_layers)
    for kind in (GradientCheckpointing.selective, GradientCheckpointing.full):
        if kind is GradientCheckpointing.selective and compiled:
            continue
        plan = planned(kind)
        saved = (without + plan.recomputed - plan.total) / model.num_hidden_layers  # by each layer
        num_layers = max(needed, math.ceil((without + plan.recomputed - usable) / saved), 1)
        if num_layers <= most:
            break
    else:
        num_layers = most
    total = without + plan.recomputed - num_layers * saved
    if total > usable:
        log.warning(
            "about %.1f GiB are planned, and this device has %.1f; if memory runs out, type max_seconds=%g, "
            "vram_profile.base_quantization=int8 or vram_profile.offloaded_share=1 (docs/vram.md)",
            total + OVERHEAD_GIB, available_gib, memory.max_seconds / 2,
        )  # fmt: skip
    log.info(
        "gradient checkpointing: %s for %d of %d layers; about %.1f of %.1f GiB are planned",
        kind, num_layers, model.num_hidden_layers, total + OVERHEAD_GIB, available_gib,
    )  # fmt: skip
    return replace(memory, gradient_checkpointing=kind, checkpointed_share=num_layers / model.num_hidden_layers)


def _extrapolate(
    model: ModelConfig, adapter: AdapterConfig, memory: MemorySettings, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of the whole model, and of one layer, from models of two and of four layers."""
    few, more = (
        _measure(replace(model, num_hidden_layers=n, layer_types=None), adapter, memory, dtype) for n in (2, 4)
    )
    per_layer = {key: (more[key] - few[key]) / 2 for key in few}
    return {key: few[key] + (model.num_hidden_layers - 2) * per_layer[key] for key in few}, per_layer


def _measure(
    model: ModelConfig, adapter: AdapterConfig, memory: MemorySettings, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of a model's weights, of an adapter's, and of what a forward pass keeps."""
    from diffusers import AceStepTransformer1DModel

    meta = torch.device("meta")
    with meta:
        transformer = AceStepTransformer1DModel(**model.transformer_arguments())
        streamline(transformer)
        values = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in transformer.state_dict().items()}
    transformer.load_state_dict(values, assign=True)
    transformer.requires_grad_(False)
    weights = float(sum(tensor.nbytes for tensor in values.values()))
    if memory.base_quantization is not Quantization.none:
        linear = sum(m.weight.numel() for m in transformer.layers.modules() if isinstance(m, nn.Linear))
        weights -= linear * (dtype.itemsize - STORED[memory.base_quantization])
    parameters = list(adapter.attach(transformer).parameters())
    enable_gradient_checkpointing(transformer, memory.gradient_checkpointing, memory.checkpointed_share)
    WindowedAttention(transformer)
    transformer.train()
    num_frames, batch_size = window_frames(memory.max_seconds), memory.batch_size
    with meta:
        silence = torch.empty(num_frames, model.audio_acoustic_hidden_dim, dtype=dtype)
        latents = torch.empty(batch_size, num_frames, model.audio_acoustic_hidden_dim, dtype=dtype)
        condition = torch.empty(batch_size, CONDITION_TOKENS, model.encoder_hidden_size, dtype=dtype)
        t = torch.empty(batch_size)
    alive = _Alive([*transformer.parameters(), *transformer.buffers()])
    predict = predict_velocity(transformer, context_latents(silence, num_frames))
    with alive, _FusedAttention():
        velocity = predict(latents, t, condition)  # as long as it is there, so is what its gradient needs
        activations = alive.num_bytes
    del velocity
    return {
        "weights": weights,
        "adapter": float(sum(parameter.nbytes for parameter in parameters)),
        "activations": float(activations),
    }


class _Alive(TorchDispatchMode):
    """While open, counts the bytes of all tensors that operations make, for as long as each lives.

    Args:
        known: tensors that are there anyway.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.num_bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.num_bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, storage: int, num_bytes: int) -> None:
        self._seen.discard(storage)
        self.num_bytes -= num_bytes


class _FusedAttention(TorchFunctionMode):
    """While open, attention keeps what the flash kernel keeps; without a device, PyTorch would keep all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))
