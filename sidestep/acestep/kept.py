"""Weights of the base model, kept in memory from one point of a sweep to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class KeptWeights:
    """The tensors of the last model that was loaded.

    Only tensors are kept, and frozen ones: each point builds its own modules around them, so that no adapter, hook or
    mode of one point reaches the next.
    """

    key: Hashable = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def get(self, key: Hashable, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Give the tensors of a model, read only if they are not those that were asked for last.

        Args:
            key: everything that decides them: the checkpoint, the device and the number format.
            read: reads them.
        """
        if key != self.key:
            self.drop()  # first, since two models may not fit
            self.tensors = read()
            self.key = key
        return self.tensors

    def drop(self) -> None:
        """Give the memory back."""
        self.key, self.tensors = None, {}
