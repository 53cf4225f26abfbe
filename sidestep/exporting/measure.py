"""What a conversion costs where it counts: in the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.acestep.keymap import to_diffusers
from sidestep.adapters.base import SavedAdapter
from sidestep.adapters.convert import Factors
from sidestep.errors import UserError

if TYPE_CHECKING:
    from diffusers import AceStepTransformer1DModel

_FRAMES, _TOKENS = 250, 64  # ten seconds of latents and a short prompt


def output_error(
    checkpoint: Checkpoint, saved: SavedAdapter, factors: Mapping[str, Factors], scale: float, device: torch.device
) -> float:
    """Compare the transformer with an adapter and with what the adapter was converted to, on one random input.

    The input has noise, time 0.5, silence as the context and a random condition.

    Args:
        checkpoint: the base model; held in float32 on ``device``.
        saved: the adapter.
        factors: original path of each module it changes -> the conversion, ``scale`` included.
        scale: strength of the adapter.
        device: where to compute.

    Returns:
        Norm of the difference between both outputs, relative to the adapter's effect on the output.

    Raises:
        UserError: if the model does not fit into memory.
    """
    try:
        transformer = checkpoint.load_transformer(device=device, dtype=torch.float32)
        layers = {path: transformer.get_submodule(to_diffusers(path)) for path in factors}
        silence, width = checkpoint.silence(), checkpoint.config.encoder_hidden_size
        base = _output(transformer, width, silence)
        for path, pair in factors.items():
            layers[path].weight += pair.product().to(device)
        converted = _output(transformer, width, silence)
        for path, pair in factors.items():
            layers[path].weight -= pair.product().to(device)
            layers[path].weight.copy_(saved.merged_weight(path, layers[path].weight, scale))
        exact = _output(transformer, width, silence)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the model does not fit into the memory of {device}; use device=cpu or measure_output=false"
        ) from error
    return ((converted - exact).norm() / (exact - base).norm()).item()


@torch.no_grad()
def _output(transformer: AceStepTransformer1DModel, width: int, silence: Tensor) -> Tensor:
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    t = torch.full((1,), 0.5, device=device)
    return transformer(
        hidden_states=torch.randn(1, _FRAMES, 64, generator=generator).to(device),
        timestep=t,
        timestep_r=t,
        encoder_hidden_states=torch.randn(1, _TOKENS, width, generator=generator).to(device),
        context_latents=context_latents(silence, _FRAMES).unsqueeze(0).to(device),
        return_dict=False,
    )[0].cpu()
