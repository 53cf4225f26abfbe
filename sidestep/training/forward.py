"""From a micro-batch of songs to its losses: what the loop, its diagnosis of a bad step and every test share.

Shapes: B batch, T latent frames, L condition tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.conditioning import context_latents
from sidestep.data.dataset import Batch
from sidestep.seeds import derive_seed
from sidestep.training.flow import ObjectiveConfig, TimestepConfig, draw_noising


class Losses(NamedTuple):
    """What one micro-batch gives."""

    losses: Tensor
    """(B,) float32, each multiplied by the weight of its song."""
    t: Tensor
    """(B,) the times drawn."""


class Forward:
    """Losses of a micro-batch, with every draw decided by (seed, step, index).

    A continued run then repeats what an unbroken one would have drawn, and two GPUs draw what one GPU with twice the
    accumulation would.

    Args:
        model: the transformer, perhaps wrapped by Accelerate.
        attention: of the same transformer.
        objective: what is minimised.
        timesteps: the distribution of times, complete.
        condition_dropout: share of examples trained on the null condition.
        silence: the checkpoint's latents of silence, (S, 64), on the model's device.
        null_condition: (1, D), on the model's device.
        seed: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: WindowedAttention,
        *,
        objective: ObjectiveConfig,
        timesteps: TimestepConfig,
        condition_dropout: float,
        silence: Tensor,
        null_condition: Tensor,
        seed: int,
    ) -> None:
        self.model, self.attention = model, attention
        self.objective, self.timesteps, self.condition_dropout = objective, timesteps, condition_dropout
        self.silence, self.null_condition, self.seed = silence, null_condition, seed

    def __call__(self, batch: Batch, step: int, index: int) -> Losses:
        """Draw noise and times and compare the predicted velocity.

        Args:
            batch: on the model's device.
            step: optimiser step, counted from 0.
            index: of this micro-batch within the step, over all processes.
        """
        torch.manual_seed(derive_seed(self.seed, "dropout", step, index))  # the adapter's dropout draws from this one
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", step, index))
        noising = draw_noising(batch.latents, self.timesteps, self.condition_dropout, generator)
        self.attention.set_padding(batch.frame_mask, batch.condition_mask)
        losses = self.objective.loss(
            predict_velocity(self.model, context_latents(self.silence, batch.latents.shape[1])),
            batch.latents,
            batch.condition.float(),
            self.null_condition,
            noising,
            batch.frame_mask,
        )
        return Losses(losses if batch.weights is None else losses * batch.weights, noising.t)


def predict_velocity(model: nn.Module, context: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Give the transformer the form that an objective calls.

    Args:
        model: the transformer.
        context: (T, 128), the same for every example of a batch.

    Returns:
        A function of noisy latents (B, T, C), times (B,) and condition (B, L, D) that gives the velocity (B, T, C).
    """

    def predict(noisy_latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        velocity: Tensor = model(
            hidden_states=noisy_latents,
            timestep=t,
            timestep_r=t,  # the mean-flow input, which ACE-Step sets equal to t in training and sampling
            encoder_hidden_states=condition,
            context_latents=context.expand(len(noisy_latents), -1, -1),
            return_dict=False,
        )[0]
        return velocity

    return predict
