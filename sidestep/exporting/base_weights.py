"""The base model beside an adapter: finding the one it was trained on, and reading its weights one at a time."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.acestep.keymap import to_diffusers
from sidestep.acestep.variants import VariantConfig
from sidestep.acestep.weight_files import open_safetensors
from sidestep.adapters.base import SavedAdapter
from sidestep.adapters.convert import depends_on_weights, stand_in
from sidestep.adapters.files import trained_on, warn_of_another_model
from sidestep.config.gate import read_variant
from sidestep.errors import UserError

log = logging.getLogger(__name__)


class BaseWeights:
    """Weights of the transformer in a checkpoint, read when asked for.

    Args:
        checkpoint: where they lie, in either layout.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = checkpoint.locate_weights("transformer")

    def locate(self, path: str) -> tuple[Path, str]:
        """Name the file and the key there of the weight of the module at an original path.

        Raises:
            UserError: if the model has no such module.
        """
        name = f"{to_diffusers(path)}.weight"
        if name not in self._files:
            raise UserError(f"{self.checkpoint.folder} has no {path}, which the adapter changes; wrong model_variant?")
        return self._files[name]

    def shape(self, path: str) -> list[int]:
        """Read the shape of the weight of the module at an original path.

        Raises:
            UserError: as ``locate``, or if the file is damaged.
        """
        file, key = self.locate(path)
        with open_safetensors(file) as weights:
            return list(weights.get_slice(key).get_shape())

    def read(self, path: str) -> Tensor:
        """Read the weight of the module at an original path, in float32.

        Raises:
            UserError: as ``locate``, or if the file is damaged.
        """
        file, key = self.locate(path)
        with open_safetensors(file) as weights:
            return weights.get_tensor(key).float()


def base_of(saved: SavedAdapter, variant: VariantConfig | None, checkpoint_dir: Path) -> BaseWeights:
    """Find the model that an adapter was trained on, or the one that was typed.

    Raises:
        UserError: if neither is known, or the model is not there.
    """
    if variant is None:
        about = trained_on(saved)
        if "model_variant" not in about:
            raise UserError(f"{saved.path} does not say which model it was trained on; type model_variant=...")
        variant = read_variant(about["model_variant"])
    checkpoint = find_checkpoint(checkpoint_dir, variant)
    warn_of_another_model(saved, checkpoint)
    return BaseWeights(checkpoint)


def base_if_there(
    saved: SavedAdapter, variant: VariantConfig | None, checkpoint_dir: Path, without: str
) -> BaseWeights | None:
    """Find the base model, or log that it is not there, after ``without``, and what that means."""
    try:
        return base_of(saved, variant, checkpoint_dir)
    except UserError as error:
        log.info("%s: %s", without, error)
        return None


def weight_for(saved: SavedAdapter, path: str, base: BaseWeights | None) -> Tensor:
    """Give the weight from which a change is computed: the base model's, or zeros where it does not depend on that.

    Raises:
        UserError: as ``BaseWeights.read``.
    """
    if base is None:
        return stand_in(saved, path)
    return base.read(path) if depends_on_weights(saved) else torch.zeros(base.shape(path))
