"""Frozen linear layers whose weights are stored in 8 or 4 bits, and made anew wherever they are multiplied.

Stored weights are a pair of tensors, so that what multiplies them can keep them for its backward pass as they are:

* int8: ``packed`` (out, in) int8 and ``scales`` (out, 1), the largest value of a row divided by 127.
* nf4: ``packed`` (out, in / 2) uint8, two values each, and ``scales`` (out * in / 64,), the largest of each 64 values;
  the 16 values a weight can have are the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314).
* none: ``packed`` (out, in) is the weight itself, and ``scales`` is None.

``scales`` have the dtype in which the layer computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sidestep.errors import UserError

BLOCK = 64
"""Values of a weight that share a scale in nf4."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with its weight stored in 8 or 4 bits.

    Args:
        linear: what is stored; not changed.
        kind: int8 or nf4.
        device: where it is stored.
    """

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)  # that of Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, scales = pack(linear.weight.detach().to(device), kind)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), a new tensor each time."""
        return dense(*stored(self))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = FrozenProduct.apply(x, *stored(self))
        return product if self.bias is None else product + self.bias


class FrozenProduct(torch.autograd.Function):
    """y = x W^T of a stored weight, keeping nothing but that for the backward pass. ``x`` is (..., in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor | None) -> Tensor:
        weight = dense(packed, scales)
        ctx.save_for_backward(packed, scales)
        ctx.dtype = x.dtype
        return x.to(weight.dtype) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy @ dense(*ctx.saved_tensors)).to(ctx.dtype), None, None


def stored(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return ``packed`` and ``scales`` of any linear layer."""
    return (linear.packed, linear.scales) if isinstance(linear, QuantizedLinear) else (linear.weight, None)  # type: ignore[return-value]


def pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Store a weight (out, in) as int8 or nf4.

    Raises:
        UserError: if bitsandbytes, which nf4 needs, is missing.
    """
    if kind == "int8":
        # the scale is rounded first, so that its rounding is not one more error of the weights
        scales = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight.float() / scales.float()).round().clamp(-127, 127).to(torch.int8), scales
    packed, state = _bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    return packed.view(len(weight), -1), state.absmax.to(weight.dtype)


def dense(packed: Tensor, scales: Tensor | None) -> Tensor:
    """Make the weight (out, in) of a stored one, in the dtype of its scales."""
    if scales is None:
        return packed
    if packed.dtype is torch.int8:
        return packed * scales
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=scales.float(),
        shape=torch.Size((packed.shape[0], 2 * packed.shape[1])),
        code=functional.get_4bit_type("nf4", device=packed.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=scales.dtype,
    )
    weight: Tensor = functional.dequantize_4bit(packed.reshape(-1, 1), state)
    return weight


def quantize_linears(model: nn.Module, kind: str, device: torch.device) -> None:
    """Replace every linear layer of a model by a stored one, layer by layer, so that the device never holds both.

    Args:
        model: frozen.
        kind: int8 or nf4.
        device: where the new layers go; everything else stays where it is.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear(child, kind, device))


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise UserError(
            f"vram_profile.base_quantization=nf4 needs bitsandbytes ({error}); pip install 'sidestep[8bit]', "
            "or use base_quantization=int8, which needs nothing"
        ) from error
    return functional
