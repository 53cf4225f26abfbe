"""Optimisers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

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

    state_bytes: ClassVar[float] = 8.0
    """What the optimiser keeps for each trained value, for plans of memory; two float32 unless it says otherwise."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"optim.lr={self.lr} must be above 0, for example optim.lr=1e-4")
        if not self.weight_decay >= 0:
            raise UserError(f"optim.weight_decay={self.weight_decay} must not be negative")
        if not self.max_grad_norm > 0:
            raise UserError(f"optim.max_grad_norm={self.max_grad_norm} must be above 0")

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Make the optimiser of these parameters.

        Raises:
            UserError: if the optimiser's package is missing, or does not support the parameters' device.
        """
        raise UserError("no optimiser chosen; use optim=adamw")

    def applied_lr(self, group: dict[str, Any]) -> float:
        """The learning rate that the last step of a parameter group really had."""
        return float(group["lr"])


@dataclass(kw_only=True)
class AdamConfig(OptimConfig):
    """Settings of the optimisers that keep a running mean and a running mean square of each gradient."""

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


@option("optim", "adamw")
@dataclass(kw_only=True)
class AdamWConfig(AdamConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

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


@option("optim", "adamw8bit")
@dataclass(kw_only=True)
class AdamW8bitConfig(AdamConfig):
    """AdamW with its running means in 8 bits, block by block (Dettmers et al. 2022, arXiv:2110.02861).

    Tensors of fewer than 4,096 values keep 32 bits.
    """

    paged: bool = False
    """Let the running means move to the computer's memory when the GPU's is full; CUDA only."""
    state_bytes: ClassVar[float] = 2.0

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self.paged and any(parameter.device.type != "cuda" for parameter in parameters):
            raise UserError(f"optim.paged=true needs a CUDA GPU, and this is {parameters[0].device}; leave it out")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(f"optim=adamw8bit needs bitsandbytes ({error}); pip install 'sidestep[8bit]'") from error
        kind: Any = AdamW8bit
        if self.paged:
            from sidestep.training.paged import PagedAdamW8bit

            kind = PagedAdamW8bit
        optimizer: Optimizer = kind(
            parameters, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer


@option("optim", "adafactor")
@dataclass(kw_only=True)
class AdafactorConfig(OptimConfig):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), with a learning rate that means what AdamW's means.

    Keeps a row and a column of running mean squares for each matrix. Its steps relative to the size of the weights are
    left out: an adapter's second factor starts at 0 and would hardly move.
    """

    decay_rate: float = 0.8
    """The mean square of step n decays by 1 - n ** -decay_rate."""
    clip_threshold: float = 1.0
    """Longest root mean square of an update, before the learning rate."""
    state_bytes: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("decay_rate", "clip_threshold"):
            if not getattr(self, key) > 0:
                raise UserError(f"optim.{key}={getattr(self, key)} must be above 0")

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        from transformers.optimization import Adafactor

        optimizer: Optimizer = Adafactor(
            parameters,
            lr=self.lr,
            weight_decay=self.weight_decay,
            decay_rate=-self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=False,
            relative_step=False,
        )
        return optimizer


@option("optim", "prodigy")
@dataclass(kw_only=True)
class ProdigyConfig(AdamConfig):
    """Prodigy (Mishchenko and Defazio 2024, arXiv:2306.06101), which finds the learning rate by itself.

    Here ``lr`` is a factor of what it finds, 1 unless there is a reason.
    """

    d_coef: float = 1.0
    """Factor of the estimate; 0.5 for a more cautious and 2 for a bolder one."""
    state_bytes: ClassVar[float] = 8 + 8 / 11

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.d_coef > 0:
            raise UserError(f"optim.d_coef={self.d_coef} must be above 0")
        if self.lr < 0.01:
            raise UserError(
                f"optim.lr={self.lr:g} is a factor of the learning rate that prodigy finds by itself; leave it at 1, "
                "or use optim=adamw"
            )

    def build(self, parameters: list[nn.Parameter]) -> Optimizer:
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise UserError(f"optim=prodigy needs prodigyopt ({error}); pip install 'sidestep[prodigy]'") from error
        optimizer: Optimizer = Prodigy(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            d_coef=self.d_coef,
            use_bias_correction=True,
            safeguard_warmup=True,  # a warm-up would otherwise make the estimate too large
            slice_p=11,  # estimated from every 11th value, as its authors advise to save memory
        )
        return optimizer

    def applied_lr(self, group: dict[str, Any]) -> float:
        return float(group["lr"] * group["d"])
