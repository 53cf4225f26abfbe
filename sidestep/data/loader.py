"""Batches read ahead of the loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sidestep.data.dataset import Batch, SongDataset, collate

READERS = 4
READ_AHEAD = 2 * READERS


def read_batches(dataset: SongDataset, micro_batches: Iterable[list[int]], *, device: torch.device) -> Generator[Batch]:
    """Read micro-batches in order, a few ahead of the one that is asked for.

    Threads are enough, since a song is a slice of a memory-mapped file. Worker processes would each receive the
    signals that a scheduler sends to the run, draw from the global random state when they start, and hide an error's
    own message.

    Args:
        dataset: the excerpt at each position.
        micro_batches: the positions of each batch.
        device: where batches will go; for a GPU they are made ready for an asynchronous copy.
    """

    def read(positions: list[int]) -> Batch:
        batch = collate([dataset[position] for position in positions])
        return batch.pin_memory() if device.type == "cuda" else batch

    def begin() -> None:
        if device.type == "cuda":  # a thread begins on GPU 0, whichever this process uses
            torch.cuda.set_device(device)

    reader = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="read-songs", initializer=begin)
    ahead: deque[Future[Batch]] = deque()
    try:
        for positions in micro_batches:
            ahead.append(reader.submit(read, positions))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
