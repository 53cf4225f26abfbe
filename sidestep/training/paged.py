"""bitsandbytes' paged AdamW, going on from a checkpoint with its running means in pages again."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim
from torch import Tensor

PAGED = ("state1", "state2")
"""The running means, which bitsandbytes puts into pages if they are large; their scales stay on the GPU."""


class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
    """AdamW in 8 bits whose running means can move between the GPU's memory and the computer's.

    bitsandbytes loads a state as ordinary tensors on the GPU. They would be the same numbers, but could not make way.
    """

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device=False)  # it is all on the CPU, as it was read
        for parameter, state in self.state.items():
            for key, value in state.items():
                if key in PAGED:
                    state[key] = self.get_state_buffer(parameter, dtype=value.dtype)
                    state[key].copy_(value)
                elif isinstance(value, Tensor) and move_to_device:
                    state[key] = value.to(parameter.device)
