"""In which order songs are shown, and which part of each.

A run is one endless stream of positions 0, 1, 2, ...; step k takes the next ``songs_per_step`` of them. What lies at
a position depends on the seed and the position only, so nothing needs saving: a continued run starts further along.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from sidestep.seeds import derive_seed

FRAMES_PER_SECOND = 25  # 48,000 samples per second / 1,920 samples per latent frame
PATCH_FRAMES = 2  # the transformer reads latents in patches of two frames


class SongOrder:
    """An endless shuffle: each pass over the songs (an epoch) has its own order.

    Args:
        num_songs: how many songs there are.
        seed: decides every order.
    """

    def __init__(self, num_songs: int, seed: int) -> None:
        self.num_songs, self.seed = num_songs, seed
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        """Index of the song at a position of the stream."""
        epoch, index = divmod(position, self.num_songs)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.num_songs, generator=generator).tolist()
        return self._order[index]


def excerpt_at(num_frames: int, max_seconds: float, seed: int, position: int) -> tuple[int, int]:
    """Choose which part of a song to train on.

    Args:
        num_frames: length of the song in latent frames.
        max_seconds: longest excerpt, in seconds.
        seed: of the run.
        position: place in the stream of songs.

    Returns:
        First frame of the excerpt and its length in frames, which is even because the transformer reads patches of
        two; the whole song if it is short enough. Every start is equally likely.

    Raises:
        ValueError: if ``max_seconds`` or the song is shorter than one patch.
    """
    longest = PATCH_FRAMES * int(max_seconds * FRAMES_PER_SECOND / PATCH_FRAMES)
    length = min(longest, num_frames - num_frames % PATCH_FRAMES)
    if length < PATCH_FRAMES:
        raise ValueError(f"an excerpt needs {PATCH_FRAMES} frames, got {num_frames} frames and {max_seconds} seconds")
    starts = num_frames - length + 1
    generator = torch.Generator().manual_seed(derive_seed(seed, "excerpt", position))
    return int(torch.randint(starts, (1,), generator=generator)), length


class MicroBatchSampler(Sampler[list[int]]):
    """The positions of each micro-batch of one process, from ``first_step`` to ``last_step``.

    Step k of N processes with accumulation A covers A * N micro-batches; process p takes every N-th of them, so that
    the micro-batches of N processes are those of one process with N times the accumulation.
    """

    def __init__(
        self, *, first_step: int, last_step: int, batch_size: int, accumulation: int, process: int, num_processes: int
    ) -> None:
        self.first_step, self.last_step = first_step, last_step
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro_batch in range(self.accumulation):
                index = (step * self.accumulation + micro_batch) * self.num_processes + self.process
                yield list(range(index * self.batch_size, (index + 1) * self.batch_size))
