"""Frozen linear layers with an adapter beside them, as one node of the graph each.

What an adapter adds is multiplied in the dtype of the frozen weight, and the frozen product is accumulated onto it and
rounded once. Added afterwards, to a product that is rounded already, most of a young adapter would be lost in
bfloat16: changes of the output below half of its last digit. For the backward pass only the inputs are kept, which
neighbouring layers share; casts and small products are made again.

The last layer of an MLP takes silu(gate) * up, and makes it again from the two, which are kept anyway; so a ninth less
is kept in all.

Shapes: S tokens (batch and length together), ``weight`` (out, in), stored as ``packed`` and ``scales`` (see
:mod:`sidestep.acestep.quantization`), ``x`` (..., in); where ``up`` (..., in) is given, ``x`` is the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sidestep.acestep.frozen import Gated, gated_gradients
from sidestep.acestep.quantization import dense, stored


class FusedLora(Linear):
    """PEFT's LoRA layer, computed by :class:`LoraProduct`; with dropout, as PEFT computes it but rounded once."""

    takes_gate = True

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        base = self.base_layer
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        scale, dropout = self.scaling["default"], self.lora_dropout["default"]
        if not self.training or isinstance(dropout, nn.Identity):
            return LoraProduct.apply(x, *stored(base), base.bias, a, b, scale, None, up)
        x = x if up is None else Gated.apply(x, up)
        x, a, b = (tensor.to(dtype_of(base)) for tensor in (x, a, scale * b))
        return add_frozen(dropout(x) @ a.T @ b.T, x, base)


class FusedDora(Linear):
    """PEFT's DoRA layer, computed by :class:`LoraProduct`; with dropout, as PEFT computes it.

    In bfloat16 PEFT's outputs are float32, which all layers behind it keep. Here they are rounded, so lengths that
    have changed by less than 0.2 % do not show in the output yet; their gradient does not depend on that.
    """

    takes_gate = True

    def measure(self) -> None:
        """Measure the rows of the frozen weight, and begin with their lengths, so that the start is the base model.

        PEFT measures them in the weight's dtype, and in bfloat16 the start would be another.
        """
        lengths = dense(*stored(self.base_layer)).detach().float().norm(dim=1)
        self.register_buffer("lengths", lengths, persistent=False)
        self.lora_magnitude_vector["default"].weight.data.copy_(lengths)

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        base, dropout = self.base_layer, self.lora_dropout["default"]
        if self.training and not isinstance(dropout, nn.Identity):
            output: Tensor = super().forward(x if up is None else Gated.apply(x, up))
            return output
        a, b, scale = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
        gain = self.lora_magnitude_vector["default"].weight / self._lengths(a, b, scale)
        return LoraProduct.apply(x, *stored(base), base.bias, a, b, scale, gain, up)

    @torch.no_grad()
    def _lengths(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Measure the rows of W + scale * B A without making it, by |w|^2 + 2 scale (W A^T) b + scale^2 b (A A^T) b."""
        weight = dense(*stored(self.base_layer))
        with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):  # a plan of memory has no device
            across = (weight @ a.to(weight.dtype).T).to(b.dtype)  # (out, rank)
            squares = (b * (2 * scale * across + scale**2 * (b @ (a @ a.T)))).sum(1)
        return (self.lengths.square() + squares).sqrt()


def dtype_of(base: nn.Linear) -> torch.dtype:
    """In which dtype a frozen layer computes."""
    packed, scales = stored(base)
    return packed.dtype if scales is None else scales.dtype


def add_frozen(change: Tensor, x: Tensor, base: nn.Linear) -> Tensor:
    """Give ``base(x) + change``, rounded once; for changes that are not one of the products below.

    Args:
        change: (..., out).
        x: (..., in), of the same dtype.
        base: the frozen layer.
    """
    output: Tensor = FrozenSum.apply(change.flatten(0, -2), x.flatten(0, -2), *stored(base)).view(change.shape)
    return output if base.bias is None else output + base.bias


class FrozenSum(torch.autograd.Function):
    """y = change + x W^T, rounded once. ``change`` is (S, out), ``x`` (S, in); nothing but the weight is kept."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, x: Tensor, packed: Tensor, scales: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return torch.addmm(change, x, dense(packed, scales).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, dy @ dense(*ctx.saved_tensors) if ctx.needs_input_grad[1] else None, None, None


class LoraProduct(torch.autograd.Function):
    """y = gain * (x W^T + scale * (x A^T) B^T) + bias (Hu et al. 2021, arXiv:2106.09685).

    ``a`` is (rank, in), ``b`` (out, rank), both of any float dtype, and so are their gradients. ``gain`` (out,) is
    DoRA's (Liu et al. 2024, arXiv:2402.09353), or None for 1. Also keeps x A^T, (S, rank), and with a gain the output,
    which the layer behind mostly keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        gain: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        weight = dense(packed, scales)
        inputs = _inputs(x, up, weight.dtype)  # (S, in)
        kept = (inputs, None) if up is None else (x, up)
        inner = inputs @ a.to(weight.dtype).T  # (S, rank)
        y = inner @ (scale * b).to(weight.dtype).T  # (S, out)
        if gain is None:
            y = _add_frozen(y, inputs, weight, bias)
            ctx.save_for_backward(*kept, packed, scales, a, b, inner)
        else:
            y = (_add_frozen(y, inputs, weight, None) * gain).to(weight.dtype)
            ctx.save_for_backward(*kept, packed, scales, a, b, inner, y, gain)
            y = y if bias is None else y + bias
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, packed, scales, a, b, inner, *decomposed = ctx.saved_tensors
        inputs = x if up is None else _inputs(x, up, inner.dtype)
        dy = dy.reshape(-1, dy.shape[-1])
        d_gain = None
        if decomposed:
            y, gain = decomposed
            d_gain = (dy * y).sum(0, dtype=gain.dtype) / gain
            dy = (dy * gain).to(dy.dtype)
        d_inner = dy @ (ctx.scale * b).to(dy.dtype)  # (S, rank)
        da = (d_inner.T @ inputs).to(a.dtype)
        db = ctx.scale * (dy.T @ inner).to(b.dtype)
        dx = d_up = None
        if ctx.needs_input_grad[0]:
            dx = (d_inner @ a.to(dy.dtype)).addmm_(dy, dense(packed, scales)).view(ctx.shape).to(ctx.dtype)
            if up is not None:
                dx, d_up = gated_gradients(dx, x, up, True, ctx.needs_input_grad[-1])
        return dx, None, None, None, da, db, None, d_gain, d_up


class LokrProduct(torch.autograd.Function):
    """y = x W^T + bias + scale * x (W1 kron W2)^T (Yeh et al. 2023, arXiv:2309.14859), without the Kronecker product.

    With the inputs of a token written as X (q, v), W1 (p, q) and W2 (u, v), its change is the matrix W1 X W2^T (p, u).
    W2 is ``w2`` (u, v), or ``w2_a @ w2`` of (u, r) and (r, v), which are never multiplied out either. Otherwise as
    :class:`LoraProduct`, but nothing besides the inputs is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        w2_a: Tensor | None,
        scale: float,
        up: Tensor | None,
    ) -> Tensor:
        weight = dense(packed, scales)
        inputs = _inputs(x, up, weight.dtype)  # (S, q * v)
        right = inputs.view(-1, w1.shape[1], w2.shape[1]) @ w2.to(weight.dtype).T  # (S, q, r)
        y = (scale * w1).to(weight.dtype) @ right  # (S, p, r)
        if w2_a is not None:
            y = y @ w2_a.to(weight.dtype).T  # (S, p, u)
        ctx.save_for_backward(*((inputs, None) if up is None else (x, up)), packed, scales, w1, w2, w2_a)
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        return _add_frozen(y.reshape(len(inputs), -1), inputs, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, packed, scales, w1, w2, w2_a = ctx.saved_tensors
        inputs = x if up is None else _inputs(x, up, dy.dtype)
        left, inner = (ctx.scale * w1).to(dy.dtype), w2.to(dy.dtype)  # (p, q), (r, v)
        dy = dy.reshape(-1, dy.shape[-1])
        blocks = inputs.view(-1, w1.shape[1], w2.shape[1])  # (S, q, v)
        right = blocks @ inner.T  # (S, q, r)
        d_left = dy.view(len(dy), w1.shape[0], -1)  # (S, p, u)
        dw2_a = None
        if w2_a is not None:
            dw2_a = torch.tensordot(d_left, left @ right, ([0, 1], [0, 1])).to(w2_a.dtype)
            d_left = d_left @ w2_a.to(dy.dtype)  # (S, p, r)
        dw1 = ctx.scale * torch.tensordot(d_left, right, ([0, 2], [0, 2])).to(w1.dtype)
        d_right = left.T @ d_left  # (S, q, r)
        dw2 = torch.tensordot(d_right, blocks, ([0, 1], [0, 1])).to(w2.dtype)
        dx = d_up = None
        if ctx.needs_input_grad[0]:
            dx = (d_right @ inner).reshape(inputs.shape).addmm_(dy, dense(packed, scales)).view(ctx.shape).to(ctx.dtype)
            if up is not None:
                dx, d_up = gated_gradients(dx, x, up, True, ctx.needs_input_grad[-1])
        return dx, None, None, None, dw1, dw2, dw2_a, None, d_up


def _inputs(x: Tensor, up: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a layer multiplies, (S, in): ``x``, or silu(x) * up."""
    inputs = x if up is None else functional.silu(x) * up
    return inputs.to(dtype).reshape(-1, inputs.shape[-1])


def _add_frozen(y: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Accumulate ``inputs`` (S, in) times the frozen weight onto ``y`` (S, out)."""
    if not torch.compiler.is_compiling() and _get_current_dispatch_mode() is not None:
        # selective checkpointing, which can keep only what is not written over
        y = torch.addmm(y, inputs, weight.T)
        return y if bias is None else y + bias
    y.addmm_(inputs, weight.T)
    return y if bias is None else y.add_(bias)
