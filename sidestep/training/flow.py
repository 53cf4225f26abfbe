"""Flow matching, in ACE-Step's direction of time.

Time runs from data to noise: t = 0 is a clean latent and t = 1 is pure noise, so

    noisy_latents = (1 - t) * latents + t * noise        velocity = noise - latents

The `flow_matching` library and Lipman et al. (arXiv:2210.02747) run it the other way. Tensors here are named for
what they hold, never x0 and x1, because those two names swap meaning between the two.

Shapes: B batch, T latent frames (25 per second), C latent channels (64), L condition tokens, D their width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from sidestep.config.schema import option
from sidestep.errors import UserError

if TYPE_CHECKING:
    from torch import Generator, Tensor

TURBO_TIMESTEPS = tuple(3 * u / (1 + 2 * u) for u in (1 - i / 8 for i in range(8)))
"""The eight times the turbo model is sampled at: 1, 7/8 .. 1/8 warped by shift 3."""


@dataclass(kw_only=True)
class TimestepConfig:
    """Where between data and noise each training example is placed."""

    def with_defaults(self, mean: float, std: float) -> Self:
        """Fill what was left null with ``timestep_mu`` and ``timestep_sigma`` of the checkpoint's config."""
        return self

    def sample(self, batch_size: int, generator: Generator) -> Tensor:
        """Draw times in [0, 1], shape (B,), float32, on the generator's device."""
        raise UserError("no timestep distribution chosen; use for example timesteps=acestep")


@option("timesteps", "logit_normal")
@dataclass(kw_only=True)
class LogitNormal(TimestepConfig):
    """t = sigmoid(mean + std * z), z standard normal (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""

    mean: float | None = None
    """Mean before the sigmoid; null takes timestep_mu of the checkpoint (-0.4 in the published ones)."""
    std: float | None = None
    """Standard deviation before the sigmoid; null takes timestep_sigma of the checkpoint (1.0)."""

    def __post_init__(self) -> None:
        if self.std is not None and not self.std > 0:
            raise UserError(f"timesteps.std={self.std} must be above 0")

    def with_defaults(self, mean: float, std: float) -> Self:
        return dataclasses.replace(
            self, mean=mean if self.mean is None else self.mean, std=std if self.std is None else self.std
        )

    def sample(self, batch_size: int, generator: Generator) -> Tensor:
        import torch

        assert self.mean is not None
        assert self.std is not None
        return torch.sigmoid(self.mean + self.std * torch.randn(batch_size, generator=generator))


@option("timesteps", "acestep")
@dataclass(kw_only=True)
class LargerOfTwo(LogitNormal):
    """The larger of two logit-normal draws: what ``sample_t_r`` in ACE-Step's own training code returns.

    With mean -0.4 it puts 57 % of examples above t = 0.5, where a single draw puts 34 %.
    """

    def sample(self, batch_size: int, generator: Generator) -> Tensor:
        import torch

        return torch.maximum(super().sample(batch_size, generator), super().sample(batch_size, generator))


@option("timesteps", "uniform")
@dataclass(kw_only=True)
class Uniform(TimestepConfig):
    """Every time equally often."""

    def sample(self, batch_size: int, generator: Generator) -> Tensor:
        import torch

        return torch.rand(batch_size, generator=generator)


@option("timesteps", "turbo")
@dataclass(kw_only=True)
class Turbo(TimestepConfig):
    """Only the eight times that the turbo model is sampled at, equally often; ACE-Step's own trainer does this."""

    def sample(self, batch_size: int, generator: Generator) -> Tensor:
        import torch

        index = torch.randint(len(TURBO_TIMESTEPS), (batch_size,), generator=generator)
        return torch.tensor(TURBO_TIMESTEPS)[index]


class Noising(NamedTuple):
    """The random draws of one micro-batch."""

    dropped: Tensor
    """(B,) bool: train this example on the null condition."""
    noise: Tensor
    """(B, T, C) standard normal."""
    t: Tensor
    """(B,) times in [0, 1]."""


def draw_noising(latents: Tensor, timesteps: TimestepConfig, condition_dropout: float, generator: Generator) -> Noising:
    """Draw dropout, noise and times, in the order in which ACE-Step's forward draws them.

    Drawing on the CPU and moving makes the same seed give the same run on every device.

    Args:
        latents: clean latents, (B, T, C); only the shape and device are used.
        timesteps: the distribution of times.
        condition_dropout: probability of training on the null condition.
        generator: a CPU generator.

    Returns:
        The draws, on the device of ``latents``.
    """
    import torch

    device = latents.device
    dropped = torch.rand(len(latents), generator=generator) < condition_dropout
    noise = torch.randn(latents.shape, generator=generator)
    t = timesteps.sample(len(latents), generator)
    draws = [dropped, noise, t]
    if device.type == "cuda":  # a copy from ordinary memory would wait for the GPU
        draws = [draw.pin_memory() for draw in draws]
    return Noising(*(draw.to(device, non_blocking=True) for draw in draws))


def noisy_latents_and_velocity(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Move each latent to time ``t`` along its straight line to noise.

    Args:
        latents: clean VAE latents, (B, T, C), float32.
        noise: standard normal, (B, T, C).
        t: times in [0, 1], (B,).

    Returns:
        The noisy latents and the velocity a model should predict there, both (B, T, C).

    Raises:
        ValueError: if the shapes do not agree.
    """
    if latents.shape != noise.shape or t.shape != latents.shape[:1]:
        raise ValueError(
            f"expected latents and noise (B, T, C) and t (B,), "
            f"got {tuple(latents.shape)}, {tuple(noise.shape)} and {tuple(t.shape)}"
        )
    t = t.view(-1, 1, 1)
    return (1 - t) * latents + t * noise, noise - latents


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What training minimises."""

    def loss(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        condition: Tensor,
        null_condition: Tensor,
        noising: Noising,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """One loss per example, (B,) float32.

        Args:
            predict: gives the velocity (B, T, C) for noisy latents (B, T, C), times (B,) and condition (B, L, D).
            latents: clean latents, (B, T, C).
            condition: (B, L, D).
            null_condition: the learned empty condition, (1, D).
            noising: the draws of this micro-batch.
            frame_mask: (B, T) bool, False where a frame is padding; None if there is none.
        """
        raise UserError("no objective chosen; use objective=velocity")


@option("objective", "velocity")
@dataclass(kw_only=True)
class VelocityLoss(ObjectiveConfig):
    """Mean squared error of the predicted velocity, unweighted, as in ACE-Step's own forward."""

    def loss(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        condition: Tensor,
        null_condition: Tensor,
        noising: Noising,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        import torch

        condition = torch.where(noising.dropped.view(-1, 1, 1), null_condition.to(condition.dtype), condition)
        noisy_latents, velocity = noisy_latents_and_velocity(latents, noising.noise, noising.t)
        predicted = predict(noisy_latents, noising.t, condition)
        error = (predicted.float() - velocity.float()).square().mean(dim=-1)  # (B, T)
        if frame_mask is None:
            return error.mean(dim=1)
        return (error * frame_mask).sum(dim=1) / frame_mask.sum(dim=1)
