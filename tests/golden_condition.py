"""The tiny golden model laid out as a checkpoint, and the published variants."""

import shutil
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.acestep.variants import VariantConfig
from tests.golden import GOLDEN

VARIANTS = Path(__file__).parents[1] / "conf" / "model_variant"


def variant_named(name: str) -> VariantConfig:
    values = OmegaConf.to_container(OmegaConf.load(VARIANTS / f"{name}.yaml"))
    del values["defaults"]
    return VariantConfig(**values)


def golden_checkpoint(root: Path) -> Checkpoint:
    base = variant_named("base")
    folder = root / base.folder
    folder.mkdir()
    shutil.copy(GOLDEN / "config_tiny.json", folder / "config.json")
    shutil.copy(GOLDEN / "weights_tiny.safetensors", folder / "model.safetensors")
    silence = load_file(GOLDEN / "silence.safetensors")["silence_latent_raw"]
    torch.save(silence, folder / "silence_latent.pt")
    return find_checkpoint(root, base)
