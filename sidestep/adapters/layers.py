"""Layers of the families for which neither PEFT nor LyCORIS has one that is exact in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from sidestep.acestep.quantization import FrozenProduct, stored
from sidestep.adapters.fused import LokrProduct, add_frozen, dtype_of


def row_norms(weight: Tensor) -> Tensor:
    """Length of each row of a weight (out, in, ...) as LyCORIS measures it: (out, 1, ...), never 0."""
    norms = weight.flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
    return norms.reshape(-1, *[1] * (weight.ndim - 1))


class StructuredLokr(LokrModule):
    """LoKr computed by :class:`~sidestep.adapters.fused.LokrProduct`."""

    def apply_to(self) -> None:
        super().apply_to()
        self.org_module[0].takes_gate = True

    def restore(self) -> None:
        super().restore()
        del self.org_module[0].takes_gate

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        base = self.org_module[0]
        w1 = self.lokr_w1 if self.use_w1 else self.lokr_w1_a @ self.lokr_w1_b
        w2, w2_a = (self.lokr_w2, None) if self.use_w2 else (self.lokr_w2_b, self.lokr_w2_a)
        return LokrProduct.apply(x, *stored(base), base.bias, w1, w2, w2_a, self.scale, up)


class FoldedLoha(LohaModule):
    """LoHa in the form that adds to the output of the wrapped layer, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        base = self.org_module[0]
        x = x.to(dtype_of(base))
        return add_frozen(self.bypass_forward_diff(x), x, base)


class DecomposedLokr(LokrModule):
    """LoKr with a trained length of each row, in the form that adds to the output of the wrapped layer.

    LyCORIS drops the lengths in that form, and in its other one rounds the change to the weight's dtype. As in DoRA
    (Liu et al. 2024, arXiv:2402.09353, section 4.3) no gradient goes through the measured length.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, weight_decompose=True, **kwargs)
        # measured as below, so that the start is the base model to the last bit
        self.dora_scale.data.copy_(row_norms(self._current_weight().float()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.org_forward(x, *args, **kwargs)
        change = self.bypass_forward_diff(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norms = row_norms(self._current_weight().float() + self.get_weight(self.shape))
        gain = (self.dora_scale / norms).squeeze(1)
        bias = self._current_bias()
        product = base if bias is None else base - bias
        return base + ((gain - 1) * product + gain * change).to(base.dtype)


class OftLayer(nn.Module):
    """Rotates the inputs of a linear layer, block by block, by adding W (R - 1) x to its output.

    Args:
        base: the layer; its forward pass is hooked.
        block_size: inputs that are rotated together; divides the number of inputs.
        block_share: whether all blocks turn alike.
        neumann_terms: see :func:`turns`.
    """

    def __init__(self, base: nn.Linear, block_size: int, block_share: bool, neumann_terms: int) -> None:
        super().__init__()
        blocks = 1 if block_share else base.in_features // block_size
        self.block_size, self.neumann_terms = block_size, neumann_terms
        self.weight = nn.Parameter(
            torch.zeros(blocks, block_size * (block_size - 1) // 2, device=base.weight.device, dtype=torch.float32)
        )
        self.hook = base.register_forward_hook(self.add_change)

    def add_change(self, base: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to the output what turning the inputs changes.

        The small difference is multiplied on its own: added to the inputs first, as PEFT does, most of a young
        adapter would be rounded away in bfloat16.
        """
        (x,) = inputs
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # a plan of memory has no device
            turn = turns(self.weight, self.block_size, self.neumann_terms).to(output.dtype)
            blocks = x.to(output.dtype).unflatten(-1, (-1, self.block_size))
            difference = torch.einsum("...rk,rkc->...rc", blocks, turn.expand(blocks.shape[-2], -1, -1)).flatten(-2)
            return output + FrozenProduct.apply(difference, *stored(base)).to(output.dtype)


def turns(weight: Tensor, block_size: int, neumann_terms: int) -> Tensor:
    """Make R - 1 from trained values; inputs x are turned as x R.

    Exactly, R = (1 - Q)(1 + Q)^-1, which is a rotation (Cayley). Otherwise it is what PEFT approximates (Qiu et al.
    2025, arXiv:2506.19847), which turns the other way: 1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1).

    Args:
        weight: (blocks, block_size * (block_size - 1) / 2), the upper triangles of the skew-symmetric Q, by rows.
        block_size: side of a block.
        neumann_terms: 0 for the exact rotation, or 4 or more for the series.

    Returns:
        (blocks, block_size, block_size).
    """
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=weight.device)
    skew = weight.new_zeros(len(weight), block_size, block_size).index_put(
        (torch.arange(len(weight), device=weight.device)[:, None], rows, columns), weight
    )
    skew = skew - skew.transpose(1, 2)
    if neumann_terms == 0:
        identity = torch.eye(block_size, device=weight.device, dtype=weight.dtype)
        return torch.linalg.solve(identity + skew, -2 * skew, left=False)
    power, turn = skew, 2 * skew
    for _ in range(neumann_terms - 3):
        power = power @ skew
        turn = turn + 2 * power
    return turn + power @ skew
