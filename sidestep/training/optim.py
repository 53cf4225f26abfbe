"""Optimisers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from sidestep.config.schema import option
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(kw_only=True)
class OptimConfig:
    """Settings every optimiser understands."""

    lr: float = MISSING
    """Learning rate; the adapter's own default unless set."""
    weight_decay: float = 0.0
    """Decoupled pull of the adapter's weights towards 0."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"optim.lr={self.lr} must be above 0, for example optim.lr=1e-4")
        if not self.weight_decay >= 0:
            raise UserError(f"optim.weight_decay={self.weight_decay} must not be negative")
        if not self.max_grad_norm > 0:
            raise UserError(f"optim.max_grad_norm={self.max_grad_norm} must be above 0")

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Make the optimiser of these parameters."""
        raise UserError("no optimiser chosen; use optim=adamw")


@option("optim", "adamw")
@dataclass(kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the running mean and of the running mean square of the gradient."""
    eps: float = 1e-8
    """Added to the root of the mean square, so that small gradients do not make large steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas} must be two numbers from 0 to below 1, as in [0.9,0.999]")
        if not self.eps > 0:
            raise UserError(f"optim.eps={self.eps} must be above 0")

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        from torch.optim import AdamW

        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return AdamW(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused,
        )
