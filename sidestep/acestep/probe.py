"""One fixed question to a transformer, by whose answers two states of it are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidestep.acestep.conditioning import context_latents

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def probe(transformer: nn.Module, latents: Tensor, condition: Tensor, silence: Tensor) -> Tensor:
    """Predict the velocity halfway between latents and a fixed noise.

    Args:
        transformer: an ``AceStepTransformer1DModel``, in eval mode.
        latents: (T, 64), float32.
        condition: (L, D), float32.
        silence: the checkpoint's latents of silence, (S, 64).

    Returns:
        (1, T, 64), float32 on the CPU.
    """
    device = next(transformer.parameters()).device
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((1,), 0.5, device=device)
    output: Tensor = transformer(
        hidden_states=((latents + noise) / 2)[None].to(device),
        timestep=t,
        timestep_r=t,
        encoder_hidden_states=condition[None].to(device),
        context_latents=context_latents(silence, len(latents))[None].to(device),
        return_dict=False,
    )[0]
    return output.float().cpu()
