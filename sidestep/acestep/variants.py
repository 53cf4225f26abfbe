"""The six published ACE-Step 1.5 models and the settings each was made for."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from sidestep.config.schema import option
from sidestep.errors import UserError


@option("model_variant", "variant")
@dataclass(kw_only=True)
class VariantConfig:
    """One ACE-Step 1.5 model: where it lies and how it is sampled."""

    name: str = MISSING
    """What adapters and datasets call this variant."""
    folder: str = MISSING
    """Its folder inside ``checkpoint_dir``."""
    repo: str = MISSING
    """Its repository on the Hugging Face hub, for the downloader and for messages."""
    is_turbo: bool = MISSING
    """Distilled to few steps without guidance; checked against the checkpoint's own config."""
    is_xl: bool = MISSING
    """The 4 B decoder, whose width differs from the condition encoder's."""
    shift: float = MISSING
    """Inference warp of time, t -> s*t / (1 + (s - 1)*t); written beside the adapter for players."""
    num_inference_steps: int = MISSING
    """Sampling steps at inference; written beside the adapter for players."""
    guidance_scale: float = MISSING
    """Classifier-free guidance at inference; 1 is none."""
    condition_dropout: float = MISSING
    """Share of training examples whose condition is replaced by the learned null condition."""

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"model_variant.condition_dropout={self.condition_dropout} must be at least 0 and below 1")
