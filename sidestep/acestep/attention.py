"""Attention of ACE-Step's decoder that computes only what each token may see, with padding left out.

Half of the decoder's self-attention layers see a window of tokens to either side. Diffusers computes them in full and
masks what lies outside; here they compute only the band. And ACE-Step's decoder ignores padding: its own forward
overwrites the masks, and the diffusers class does not take any, so that padded tokens would be attended like real ones.

The band is computed in blocks of one window, by PyTorch's ordinary kernels, or by FlexAttention (Dong et al. 2024,
arXiv:2412.05496), which is compiled for the band and copies no keys.

Shapes: B batch, S tokens (latent patches, or condition tokens as keys of cross attention), H heads, D width of a head,
w window, n blocks of w tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class WindowedAttention:
    """Computes the attention of all layers of a transformer, until it is removed.

    Every real token gets what diffusers' processors would give it in a batch without padding.

    Args:
        transformer: diffusers ``AceStepTransformer1DModel``.
        flex: compute the band of long sequences by FlexAttention.
    """

    # the decoder asks its first layer for this name, and leaves out its (S, S) mask where it reads "flash"
    _attention_backend = "flash"
    _parallel_config = None

    def __init__(self, transformer: Any, flex: bool = False) -> None:
        self._transformer = transformer
        self._uses_flex = flex
        self._replaced = transformer.attn_processors
        self._patch_mask: Tensor | None = None
        self._condition_mask: Tensor | None = None
        self._masks: dict[Any, Tensor | None] = {}
        self._padded_band: BlockMask | None = None
        transformer.set_attn_processor(self)

    def set_padding(self, frame_mask: Tensor | None, condition_mask: Tensor | None) -> None:
        """Say what is padding in the next batch; without this nothing is.

        Args:
            frame_mask: (B, T) bool, False where a latent frame is padding. The real frames of a song must fill whole
                patches; the decoder completes a song's last patch with zeros, which a longer batch does not have there.
            condition_mask: (B, L) bool, False where a condition token is padding.
        """
        self._patch_mask = None if frame_mask is None else frame_mask[:, :: self._transformer.patch_size]
        self._condition_mask = condition_mask
        self._masks, self._padded_band = {}, None

    def remove(self) -> None:
        """Give the layers back to diffusers' processors."""
        self._transformer.set_attn_processor(self._replaced)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute one layer, as diffusers calls it.

        Args:
            attn: the layer, ``AceStepAttention``.
            hidden_states: (B, S, width).
            encoder_hidden_states: (B, L, width), the keys and values of cross attention.
            attention_mask: none; what is masked is known here.
            image_rotary_emb: cosines and sines of the positions, each (S, D), in self-attention.

        Returns:
            (B, S, width).
        """
        if attention_mask is not None:
            raise ValueError("masks are given to WindowedAttention.set_padding")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (-1, attn.head_dim)))  # (B, S, H, D)
        key = attn.norm_k(attn.to_k(source).unflatten(-1, (-1, attn.head_dim)))
        value = attn.to_v(source).unflatten(-1, (-1, attn.head_dim))
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb(heads, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
                for heads in (query, key)
            )
        length, window = key.shape[1], attn.sliding_window
        in_blocks = _in_blocks(length, window)
        if in_blocks and self._uses_flex:
            return _through(attn.to_out, self._flex(attn, query, key, value))
        mask = self._mask(attn.is_cross_attention, key, window)
        if in_blocks:
            query = _blocks(query, window)
            key, value = _neighbours(key, window), _neighbours(value, window)
        groups = attn.heads // attn.kv_heads
        if mask is not None and query.is_cuda:  # of the kernels there, the fast one that takes masks wants equal heads
            key, value = (heads.repeat_interleave(groups, dim=2) for heads in (key, value))
            groups = 1
        output = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            dropout_p=attn.dropout if attn.training else 0.0,
            scale=attn.scaling,
            enable_gqa=groups != 1,
        ).transpose(1, 2)
        if in_blocks:
            output = output.reshape(len(hidden_states), -1, *output.shape[2:])[:, :length]
        return _through(attn.to_out, output)

    def _flex(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the band by FlexAttention; from (B, S, H, D) to the same."""
        batch_size, length, window, real = *key.shape[:2], attn.sliding_window, self._patch_mask
        if torch.compiler.is_compiling():
            band = _band(batch_size, length, window, key.device, real)
        elif real is None:
            band = _plain_band(length, window, key.device)
        else:  # the same for all layers, since a model has one window
            if self._padded_band is None:
                self._padded_band = _band(batch_size, length, window, key.device, real)
            band = self._padded_band
        output: Tensor = _compiled_flex_attention(key.device.type)(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=band,
            scale=attn.scaling,
            enable_gqa=attn.heads != attn.kv_heads,
        ).transpose(1, 2)
        return output

    def _mask(self, of_condition: bool, key: Tensor, window: int | None) -> Tensor | None:
        """Give what is added to a layer's scores; made once per batch, since every layer of a kind has the same."""
        if torch.compiler.is_compiling():  # a dict of sizes would be compiled anew for each
            return self._make_mask(of_condition, key, window)
        kind = (of_condition, window, *key.shape[:2], key.dtype, key.device)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(of_condition, key, window)
        return self._masks[kind]

    def _make_mask(self, of_condition: bool, key: Tensor, window: int | None) -> Tensor | None:
        seen = _seen(key, window, self._condition_mask if of_condition else self._patch_mask)
        if seen is None:
            return None
        # not minus infinity, because a padded token may see nothing at all, and must not become nan
        hidden = torch.full(seen.shape, torch.finfo(key.dtype).min, dtype=key.dtype, device=key.device)
        return hidden.masked_fill_(seen, 0.0)[:, None]


def _through(layers: Any, output: Tensor) -> Tensor:
    """Put heads (B, S, H, D) together and through a layer's last projection: (B, S, width)."""
    output = output.flatten(2)
    for layer in layers:
        output = layer(output)
    return output


@cache
def _compiled_flex_attention(device_type: str) -> Callable[..., Any]:
    """FlexAttention is fast only when compiled; on a CPU, where only tests call it, it is taken as it is."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention  # type: ignore[return-value]


@lru_cache(maxsize=64)  # of lengths; a band of 3,000 tokens takes some KB
def _plain_band(length: int, window: int, device: torch.device) -> BlockMask:
    """Describe a batch without padding to FlexAttention; the same for every batch of that length."""
    return _band(1, length, window, device, None)


def _band(batch_size: int, length: int, window: int, device: torch.device, real: Tensor | None) -> BlockMask:
    """Describe to FlexAttention which keys (B, S, H, D) each query sees; ``real`` as of :func:`_seen`."""

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() <= window

    if real is None:
        return create_block_mask(near, None, None, length, length, device=device)

    def near_and_real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return near(b, h, q, k) & real[b, k]

    return create_block_mask(near_and_real, batch_size, None, length, length, device=device)


def _seen(key: Tensor, window: int | None, real: Tensor | None) -> Tensor | None:
    """Say which keys each query sees.

    Args:
        key: (B, S, H, D).
        window: farthest token that is seen, to either side; None for all.
        real: (B, S) bool, False where a key is padding.

    Returns:
        None if each sees all, or bool: (B, 1, S) or (1 or B, S, S); in blocks (B * n, w, 3 w).
    """
    batch_size, length = key.shape[:2]
    if window is None or length <= window + 1:
        return None if real is None else real[:, None]
    if _in_blocks(length, window):
        real = torch.ones(batch_size, length, dtype=torch.bool, device=key.device) if real is None else real
        near = torch.ones(window, 3 * window, dtype=torch.bool, device=key.device).triu().tril(2 * window)
        return near & _neighbours(real, window)[:, None]
    near = torch.ones(1, length, length, dtype=torch.bool, device=key.device).triu(-window).tril(window)
    return near if real is None else near & real[:, None]


def _in_blocks(length: int, window: int | None) -> bool:
    """Whether 3 w keys for each token, copied together, cost less than all keys; measured on a CPU."""
    return window is not None and length > 4 * window


def _blocks(x: Tensor, window: int) -> Tensor:
    """Cut (B, S, ...) into blocks, the last one filled up with zeros: (B * n, w, ...)."""
    missing = -x.shape[1] % window
    return functional.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).unflatten(1, (-1, window)).flatten(0, 1)


def _neighbours(x: Tensor, window: int) -> Tensor:
    """Put the block before and the one after beside each block of (B, S, ...), zeros at the ends: (B * n, 3 w, ...)."""
    missing = -x.shape[1] % window
    blocks = functional.pad(x, (0, 0) * (x.ndim - 2) + (window, missing + window)).unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2).flatten(0, 1)
