"""Gradient checkpointing: activations that the backward pass computes again instead of having kept them.

Full checkpointing (Chen et al. 2016, arXiv:1604.06174) keeps a layer's input only. Selective checkpointing also keeps
what is dear to compute and small to keep, the results of large matrix products and of attention, so that only what is
between them is computed again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sidestep.config.settings import GradientCheckpointing
from sidestep.training.offload import first_blocks

LARGE = 512
"""Products that sum over at least this many values are kept: those with the frozen weights, not those of an adapter."""

PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}
"""Matrix products, and which of their arguments is the left factor."""

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def enable_gradient_checkpointing(transformer: Any, kind: GradientCheckpointing, share: float) -> None:
    """Make a transformer recompute some of its activations.

    Args:
        transformer: diffusers ``AceStepTransformer1DModel``.
        kind: what is computed again.
        share: of the layers, above 0 and at most 1. The first ones are taken: their turn in the backward pass is when
            the others' activations are gone.
    """
    if kind is GradientCheckpointing.none:
        return
    chosen = set(first_blocks(transformer, share))
    kept = partial(create_selective_checkpoint_contexts, _policy) if kind is GradientCheckpointing.selective else None

    def run(layer: nn.Module, *inputs: Any) -> Any:
        if layer not in chosen:
            return layer(*inputs)
        if kept is None:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=kept)

    transformer.enable_gradient_checkpointing(run)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Say whether the result of one operation is kept."""
    if op in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in PRODUCTS:
        left: Tensor = args[PRODUCTS[op]]
        if left.shape[-1] >= LARGE:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
