"""The running mean of an adapter's weights over steps, which is often steadier than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sidestep.adapters import Adapter


class WeightMean:
    """Keeps the mean beside the weights; training does not see it.

    Args:
        adapter: whose weights are averaged, as they are when training starts or goes on.
        decay: weight of the mean in each update; smaller in the first steps, so that they do not hold it back.
        saved: what :meth:`state` gave at a checkpoint; empty starts from the adapter's weights.
    """

    def __init__(self, adapter: Adapter, decay: float, saved: Mapping[str, Tensor]) -> None:
        self.adapter, self.decay = adapter, decay
        self.mean = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
        for key, tensor in saved.items():
            self.mean[key].copy_(tensor)

    @torch.no_grad()
    def update(self, step: int, was_applied: Tensor) -> None:
        """Take in the weights at the end of a step.

        Args:
            step: counted from 1.
            was_applied: False for a step that changed nothing, the mean neither; a scalar on the device of the weights.
        """
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * was_applied.float()
        weights = list(self.adapter.state_dict().values())
        torch._foreach_lerp_(list(self.mean.values()), weights, [share] * len(weights))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return self.mean

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the adapter the mean while the block runs, and its own weights back afterwards, bit by bit."""
        own = {key: tensor.clone() for key, tensor in self.adapter.state_dict().items()}
        self.adapter.load_state_dict(self.mean, "the mean of the weights")
        try:
            yield
        finally:
            self.adapter.load_state_dict(own, "the weights")
