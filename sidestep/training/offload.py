"""Frozen weights of some blocks that stay in main memory, and are on the device only while their block needs them.

Two buffers on the device take turns: while one block computes, the weights of the block that comes next are copied
into the other. With gradient checkpointing the backward pass runs each block again, last one first, so that one buffer
is free again whenever a block begins: everything that came before it is computed, or is waiting in the same queue.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.errors import UserError

ALIGNMENT = 256
"""Bytes at which each tensor of a buffer begins; that of PyTorch's own allocator on CUDA."""


class OffloadedBlocks:
    """Keeps the frozen tensors of some blocks in main memory, for as long as the blocks are there.

    Results do not change. Trained parameters stay where they are, and so does what is added to the blocks later.

    Args:
        blocks: in the order in which they run, their weights in main memory or on the device; none is well. A backward
            pass must run each again, or else it would read from a buffer what another block has put there since.
        device: where they run.

    Raises:
        UserError: if main memory has no room for them.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self._device = device
        self._tensors: list[list[Tensor]] = []
        self._hosts: list[Tensor] = []
        self._at_home: list[list[Tensor]] = []
        for number, block in enumerate(blocks):  # one by one, so that none but one is held twice
            self._tensors.append(_frozen(block))
            self._hosts.append(_pack(self._tensors[number], pinned=device.type == "cuda"))
            self._at_home.append(_views(self._hosts[number], self._tensors[number]))
            self._point(number, self._at_home[number])
            block.forward = partial(self._run, number, block.forward)
        size = max((len(host) for host in self._hosts), default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in self._hosts[:2]]
        self._held: list[int | None] = [None, None]
        """The block in each buffer."""
        self._last = -1
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that waits."""
        return [tensor for of_block in self._tensors for tensor in of_block]

    def _run(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        backwards = 0 < number < self._last  # as in the backward pass; a forward pass begins with 0
        following = number - 1 if backwards else number + 1
        self._last = number
        buffer = self._fetch(number)
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copying)
        if 0 <= following < len(self._hosts):
            self._fetch(following, into=1 - buffer)
        self._point(number, _views(self._buffers[buffer], self._tensors[number]))
        try:
            return forward(*args, **kwargs)
        finally:  # running a block again stops in its middle, by an exception, once everything is there
            self._point(number, self._at_home[number])

    def _fetch(self, number: int, into: int = 0) -> int:
        """Begin to copy a block's weights, unless they are there, and return the buffer they will be in."""
        if number in self._held:
            return self._held.index(number)
        self._held[into] = number
        host = self._hosts[number]
        buffer = self._buffers[into].detach()[: len(host)]  # detached, since autograd watches over what it has kept
        if self._copying is None:
            buffer.copy_(host)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))  # what the buffer held was needed there
            with torch.cuda.stream(self._copying):
                buffer.copy_(host, non_blocking=True)
        return into

    def _point(self, number: int, views: list[Tensor]) -> None:
        for tensor, view in zip(self._tensors[number], views, strict=True):
            tensor.data = view


def first_blocks(transformer: Any, share: float) -> list[nn.Module]:
    """The first blocks of a transformer, as many as a share of them is."""
    return list(transformer.layers)[: round(share * len(transformer.layers))]


def _frozen(block: nn.Module) -> list[Tensor]:
    """Every tensor of a block that is not trained."""
    return [p for p in block.parameters() if not p.requires_grad] + list(block.buffers())


def _pack(tensors: list[Tensor], pinned: bool) -> Tensor:
    """Copy tensors into one buffer of bytes in main memory.

    Raises:
        UserError: if there is no room for it.
    """
    size = sum(_room(tensor) for tensor in tensors)
    try:
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:  # of the computer's memory, though CUDA says of this one too that it is its own
        kind = "page-locked main" if pinned else "main"
        raise UserError(
            f"there are no {size / 2**20:.0f} MiB of {kind} memory for the frozen weights of one more layer "
            f"({' '.join(str(error).split())[:120]}); use a smaller vram_profile.offloaded_share, or free memory"
        ) from error
    for view, tensor in zip(_views(packed, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed


def _views(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cut a buffer of bytes into tensors of the given sizes and dtypes."""
    views, begin = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        views.append(packed[begin : begin + size].view(tensor.dtype).view(tensor.shape))
        begin += _room(tensor)
    return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
