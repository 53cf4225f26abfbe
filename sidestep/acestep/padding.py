"""Batches of songs of unequal length that equal their single songs.

ACE-Step's decoder ignores padding masks: its own forward overwrites them, and the diffusers class does not take any.
Padded tokens are then attended like real ones. Hooks on the attention layers put the masks back, so that a padded
batch gives what each song alone would give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class PaddingMasks:
    """Key masks for the attention layers of a transformer, set anew for each batch.

    Args:
        transformer: diffusers ``AceStepTransformer1DModel``.
    """

    def __init__(self, transformer: Any) -> None:
        self.patch_size: int = transformer.patch_size
        self._patch_mask: Tensor | None = None
        self._condition_mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for layer in transformer.layers:
            for attention, add in (
                (layer.self_attn, self._add_patch_mask),
                (layer.cross_attn, self._add_condition_mask),
            ):
                self._handles.append(attention.register_forward_pre_hook(add, with_kwargs=True))

    def set(self, frame_mask: Tensor | None, condition_mask: Tensor | None) -> None:
        """Say what is padding in the next batch.

        Args:
            frame_mask: (B, T) bool, False where a latent frame is padding; a patch with one real frame is kept.
            condition_mask: (B, L) bool, False where a condition token is padding.
        """
        self._condition_mask = condition_mask
        self._patch_mask = None
        if frame_mask is not None:
            frame_mask = nn.functional.pad(frame_mask, (0, -frame_mask.shape[1] % self.patch_size))
            self._patch_mask = frame_mask.unflatten(1, (-1, self.patch_size)).any(dim=2)

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _add_patch_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return _with_key_mask(self._patch_mask, args, kwargs)

    def _add_condition_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return _with_key_mask(self._condition_mask, args, kwargs)


def _with_key_mask(mask: Tensor | None, args: Any, kwargs: dict[str, Any]) -> Any:
    if mask is None:
        return None
    dtype = kwargs["hidden_states"].dtype
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    additive = additive.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]  # (B, 1, 1, keys)
    layer_mask = kwargs.get("attention_mask")
    if layer_mask is not None:  # the band of a sliding-window layer; the minimum, since adding two would overflow
        additive = torch.minimum(additive, layer_mask)
    return args, {**kwargs, "attention_mask": additive}
