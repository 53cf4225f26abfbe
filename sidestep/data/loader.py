"""Batches read ahead of the loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from sidestep.data.dataset import Batch, SongDataset, collate

READ_AHEAD = 4


def read_batches(dataset: SongDataset, micro_batches: Iterable[list[int]], *, pin_memory: bool) -> Generator[Batch]:
    """Read micro-batches in order, a few ahead of the one that is asked for.

    One thread is enough, since a song is a slice of a memory-mapped file. Worker processes would each receive the
    signals that a scheduler sends to the run, draw from the global random state when they start, and hide an error's
    own message.

    Args:
        dataset: the excerpt at each position.
        micro_batches: the positions of each batch.
        pin_memory: make the copy to a GPU asynchronous.
    """

    def read(positions: list[int]) -> Batch:
        batch = collate([dataset[position] for position in positions])
        return batch.pin_memory() if pin_memory else batch

    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-songs")
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
