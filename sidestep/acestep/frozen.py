"""A frozen decoder that keeps less for the backward pass than diffusers' own, takes less time, and gives the same.

Diffusers' RMSNorm keeps its input twice, once in float32, and its MLP keeps the activated gate beside what it is made
of. Here both are made again where the backward pass needs them, which costs little beside the matrix products.

The decoder's first layer is a convolution, which leaves the numbers of a token far apart in memory, and every sum with
what it gave keeps them so: to the last layer norms read memory in strides, and products with three-dimensional inputs
expand the weights for every token. Here they are laid side by side once, and so are their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.ace_step_transformer import AceStepMLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def streamline(transformer: nn.Module) -> None:
    """Lay tokens side by side, and replace the norms and MLPs by those below; the names of the weights stay.

    Args:
        transformer: diffusers' ``AceStepTransformer1DModel``, whose weights are frozen.
    """
    lay_side_by_side(transformer)
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is RMSNorm:
                setattr(module, name, FrozenNorm(child))
            elif type(child) is AceStepMLP:
                setattr(module, name, FrozenMLP(child))


def lay_side_by_side(transformer: nn.Module) -> None:
    """Lay the numbers of each token side by side in memory, and those of its gradient, in all layers."""

    def convert(x: Tensor) -> Tensor:  # (B, D, S)
        y: Tensor = _Contiguous.apply(x.transpose(1, 2))
        return y.transpose(1, 2)

    first, last = transformer.get_submodule("proj_in_conv"), transformer.get_submodule("proj_out_conv")
    first.register_forward_hook(lambda conv, inputs, output: convert(output))
    last.register_forward_pre_hook(lambda conv, inputs: convert(*inputs))


class FrozenNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) with a frozen weight.

    Args:
        norm: what is replaced; its weight (D,) is shared.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Norm.apply(x, self.weight, self.eps)
        return y


class FrozenMLP(nn.Module):
    """The decoder's SwiGLU MLP (Shazeer 2020, arXiv:2002.05202).

    Args:
        mlp: what is replaced; its layers are shared.
    """

    def __init__(self, mlp: AceStepMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.requires_grad and getattr(self.down_proj, "takes_gate", False):
            # it has an adapter, and makes its inputs again from what is kept anyway
            y: Tensor = self.down_proj(gate, up)
        else:
            y = self.down_proj(Gated.apply(gate, up))
        return y


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.contiguous()


class _Norm(torch.autograd.Function):
    """Keeps its input (..., D) as it is, and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, inverse, weight)
        y = x * inverse
        return (y if weight.dtype is torch.float32 else y.to(weight.dtype)) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        normed, dy = x.float() * inverse, (dy * weight).float()
        dx = inverse * (dy - normed * (dy * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), None, None


class Gated(torch.autograd.Function):
    """silu(gate) * up, both (..., D)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        return gated_gradients(dy, gate, up, *ctx.needs_input_grad)


def gated_gradients(
    dy: Tensor, gate: Tensor, up: Tensor, of_gate: bool, of_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of silu(gate) * up that are wanted; all (..., D)."""
    d_gate = torch.ops.aten.silu_backward(dy * up, gate) if of_gate else None
    return d_gate, dy * functional.silu(gate) if of_up else None
