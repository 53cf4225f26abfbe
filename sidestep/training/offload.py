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

ALIGNMENT = 256
"""Bytes at which each tensor of a buffer begins; that of PyTorch's own allocator on CUDA."""


class OffloadedBlocks:
    """Keeps the frozen tensors of some blocks in main memory until it is removed.

    Results do not change. Trained parameters stay where they are.

    Args:
        blocks: in the order in which they run; none is well. The backward pass must run each again, or else it would
            read from a buffer what another block has put there since.
        device: where they run.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self._blocks = list(blocks)
        self._device = device
        self._tensors = [_frozen(block) for block in self._blocks]
        self._hosts = [_pack(tensors, pinned=device.type == "cuda") for tensors in self._tensors]
        self._at_home = [_views(host, tensors) for host, tensors in zip(self._hosts, self._tensors, strict=True)]
        self.go_home()  # before the buffers are made, to have room for them
        size = max((len(host) for host in self._hosts), default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        """The block in each buffer."""
        self._last = -1
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        for number, block in enumerate(self._blocks):
            block.forward = partial(self._run, number, block.forward)

    def go_home(self) -> None:
        """Leave nothing but two buffers on the device, also after the model was moved, which replaces its tensors."""
        self._tensors = [_frozen(block) for block in self._blocks]
        for number in range(len(self._blocks)):
            self._point(number, self._at_home[number])

    def remove(self) -> None:
        """Put all weights on the device for good."""
        if self._copying is not None:
            self._copying.synchronize()
        for number, block in enumerate(self._blocks):
            del block.forward
            self._point(number, [home.to(self._device) for home in self._at_home[number]])
        self._buffers, self._hosts, self._at_home = [], [], []

    def _run(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        backwards = 0 < number < self._last  # as in the backward pass; a forward pass begins with 0
        following = number - 1 if backwards else number + 1
        self._last = number
        buffer = self._fetch(number)
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copying)
        if 0 <= following < len(self._blocks):
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
    """Copy tensors into one buffer of bytes in main memory."""
    packed = torch.empty(sum(_room(tensor) for tensor in tensors), dtype=torch.uint8, pin_memory=pinned)
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
