"""What a conversion costs where it counts: in the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.keymap import to_diffusers
from sidestep.acestep.probe import probe
from sidestep.acestep.weight_files import one_line
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

    The input is random latents halfway to noise, silence as the context and a random condition.

    Args:
        checkpoint: the base model; held in float32 on ``device``.
        saved: the adapter.
        factors: original path of each module it changes -> the conversion, ``scale`` included.
        scale: strength of the adapter.
        device: where to compute.

    Returns:
        Norm of the difference between both outputs, relative to the adapter's effect on the output.

    Raises:
        UserError: if the model cannot be run, as where it does not fit into memory.
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
    except RuntimeError as error:  # torch has one of its own for the memory of a GPU, and this for that of a CPU
        raise UserError(f"the model cannot be run on {device}: {one_line(error)}") from error
    return ((converted - exact).norm() / (exact - base).norm()).item()


def _output(transformer: AceStepTransformer1DModel, width: int, silence: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, condition = (torch.randn(size, generator=generator) for size in ((_FRAMES, 64), (_TOKENS, width)))
    return probe(transformer, latents, condition, silence)
