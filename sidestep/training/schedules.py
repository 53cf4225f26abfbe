"""Learning-rate schedules: a factor on the learning rate that depends on the step and nothing else.

A pure function of the step needs no state, so a continued run cannot disagree with an unbroken one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sidestep.config.schema import option
from sidestep.errors import UserError


@dataclass(kw_only=True)
class ScheduleConfig:
    """A linear warm-up, then a shape of its own."""

    warmup_steps: int = 10
    """Steps over which the learning rate rises in a straight line to its full value."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps} must not be negative")

    @property
    def depends_on_length(self) -> bool:
        """Whether a longer run would have had another learning rate at the same step."""
        return False

    def factor(self, step: int, num_steps: int) -> float:
        """Factor on the learning rate of step ``step`` (counted from 0) of ``num_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup((step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps))

    def after_warmup(self, progress: float) -> float:
        """Factor at ``progress``, which goes from 0 at the first step after the warm-up to 1 at the last step."""
        raise UserError("no schedule chosen; use for example schedule=constant")


@option("schedule", "constant")
@dataclass(kw_only=True)
class Constant(ScheduleConfig):
    """The full learning rate after the warm-up, so that a run can be continued for as long as it improves."""

    def after_warmup(self, progress: float) -> float:
        return 1.0


@dataclass(kw_only=True)
class DecayingSchedule(ScheduleConfig):
    """A schedule that falls from 1 to ``final_factor`` over the run."""

    final_factor: float = 0.01
    """Factor on the learning rate at the last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.final_factor <= 1:
            raise UserError(f"schedule.final_factor={self.final_factor} must be from 0 to 1")

    @property
    def depends_on_length(self) -> bool:
        return True


@option("schedule", "linear")
@dataclass(kw_only=True)
class Linear(DecayingSchedule):
    """Falls in a straight line."""

    def after_warmup(self, progress: float) -> float:
        return 1 + (self.final_factor - 1) * progress


@option("schedule", "cosine")
@dataclass(kw_only=True)
class Cosine(DecayingSchedule):
    """Falls along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""

    def after_warmup(self, progress: float) -> float:
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2
