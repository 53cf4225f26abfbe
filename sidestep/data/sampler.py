"""In which order songs are shown, and which part of each.

A run is one endless stream of positions 0, 1, 2, ...; step k takes the next ``songs_per_step`` of them. What lies at
a position depends on the seed and the position only, so nothing needs saving: a continued run starts further along.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sidestep.acestep.conditioning import REFERENCE_FRAMES
from sidestep.seeds import derive_seed

FRAMES_PER_SECOND = 25  # 48,000 samples per second / 1,920 samples per latent frame
PATCH_FRAMES = 2  # the transformer reads latents in patches of two frames
BUCKET_WIDTH = 1.03
"""Excerpts whose lengths differ by less than this factor count as equally long when batches are made."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Steps of this size around a circle leave the smallest gaps, wherever one stops."""


class SongOrder:
    """An endless shuffle: each pass over the songs (an epoch) has its own order.

    Batches of several songs are made of excerpts of about one length. Every epoch still holds every song, so the one
    batch in which two epochs meet may mix lengths; it gets the longest ones, of which there are most.

    Args:
        num_songs: how many songs there are.
        seed: decides every order.
        repeats: how often each song comes in an epoch; once if left out.
        lengths: of each song's excerpts, in frames; all the same if left out.
        batch_size: how many consecutive positions make a batch.
    """

    def __init__(
        self,
        num_songs: int,
        seed: int,
        *,
        repeats: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.seed, self.batch_size = seed, batch_size
        self._repeats = torch.tensor(repeats if repeats is not None else [1] * num_songs, dtype=torch.long)
        self._songs = torch.arange(num_songs).repeat_interleave(self._repeats)
        self._first = self._repeats.cumsum(0) - self._repeats  # where each song begins in self._songs
        self._buckets: Tensor | None = None
        if lengths is not None and batch_size > 1:
            buckets = torch.tensor(lengths).double().log().div(math.log(BUCKET_WIDTH)).floor()
            self._buckets = buckets[self._songs]
        self._known: tuple[int, list[int]] = (-1, [])  # an epoch and its order; one object, since threads share it

    def __len__(self) -> int:
        """Positions of one epoch."""
        return len(self._songs)

    def __getitem__(self, position: int) -> int:
        """Index of the song at a position of the stream."""
        return self.visit(position)[0]

    def visit(self, position: int) -> tuple[int, int]:
        """Index of the song at a position of the stream, and how often it came before."""
        epoch, place = divmod(position, len(self))
        known = self._known
        if known[0] != epoch:
            known = self._known = (epoch, self._shuffle(epoch).tolist())
        occurrence = known[1][place]
        song = int(self._songs[occurrence])
        return song, epoch * int(self._repeats[song]) + occurrence - int(self._first[song])

    def _shuffle(self, epoch: int) -> Tensor:
        """Order of one epoch: indices into ``self._songs``."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        order = torch.randperm(len(self), generator=generator)
        head = -epoch * len(self) % self.batch_size  # completes the batch that the epoch before began
        if self._buckets is None or head > len(self):
            return order
        tail = (len(self) - head) % self.batch_size
        order = order[self._buckets[order].argsort(descending=True, stable=True)]
        edges, batches = order[: head + tail], order[head + tail :].view(-1, self.batch_size)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return torch.cat([edges[:head], batches.flatten(), edges[head:]])


def excerpt_length(num_frames: int, max_seconds: float) -> int:
    """Length of the excerpts of a song, in frames; even, because the transformer reads patches of two.

    Raises:
        ValueError: if ``max_seconds`` or the song is shorter than one patch.
    """
    length = min(window_frames(max_seconds), num_frames - num_frames % PATCH_FRAMES)
    if length < PATCH_FRAMES:
        raise ValueError(f"an excerpt needs {PATCH_FRAMES} frames, got {num_frames} frames and {max_seconds} seconds")
    return length


def excerpt_start(num_frames: int, length: int, *, seed: int, song: int, visit: int) -> int:
    """Choose which part of a song to train on.

    The starts of successive visits are spread as evenly as any order allows, so that a few visits already cover the
    song. They are drawn from a whole excerpt before its first frame to a whole excerpt past its last, and those
    outside are moved to the edge: with starts inside only, the first and the last second would next to never be seen.
    So no frame is seen less often than those in the middle, and none more than twice as often. Of a song shorter than
    two excerpts, the middle is part of all of them; a third begin with its first frame and a third end with its last.

    Args:
        num_frames: length of the song in latent frames.
        length: of the excerpt.
        seed: of the run.
        song: index of the song.
        visit: how often the song came before.
    """
    last = num_frames - length
    if last < PATCH_FRAMES:
        return 0  # it is the whole song
    offset = derive_seed(seed, "excerpt", song) / 2**63
    margin = min(length, last)
    place = math.floor((offset + visit * GOLDEN) % 1 * (last + 1 + 2 * margin))
    return min(max(place - margin, 0), last)


def window_frames(seconds: float) -> int:
    """Give the even number of frames in so many seconds."""
    return PATCH_FRAMES * int(seconds * FRAMES_PER_SECOND / PATCH_FRAMES + 1e-6)  # 2.32 s are 58 frames, not 57.99


def window_starts(num_frames: int, window_frames: int) -> list[int]:
    """Cut a song into windows of one length that cover it evenly; a short song is one window.

    >>> window_starts(250, 100)
    [0, 75, 150]
    """
    num_windows = max(1, math.ceil(num_frames / window_frames))
    last = max(0, num_frames - window_frames)
    return [round(i * last / max(1, num_windows - 1)) for i in range(num_windows)]


def window_at(num_windows: int, *, seed: int, song: int, visit: int) -> int:
    """Choose one of a song's windows: all of them in an order of their own, then all in another."""
    turn, place = divmod(visit, num_windows)
    generator = torch.Generator().manual_seed(derive_seed(seed, "window", song, turn))
    return int(torch.randperm(num_windows, generator=generator)[place])


def reference_parts(num_frames: int) -> list[tuple[int, int]]:
    """Cut a song into the parts that may be its own reference audio: 30 seconds each, or quarters of a shorter song.

    Returns:
        First frame of each and the first after it; nothing where a quarter is no 10 seconds, the least that
        ACE-Step's inference takes from one place.
    """
    if num_frames < 4 * REFERENCE_FRAMES // 3:
        return []
    num_parts = max(4, num_frames // REFERENCE_FRAMES)
    return list(itertools.pairwise(part * num_frames // num_parts for part in range(num_parts + 1)))


def references_outside(num_frames: int, start: int, length: int) -> list[int]:
    """Number the parts of a song of which nothing lies in an excerpt; one inside would tell what is to be predicted."""
    parts = enumerate(reference_parts(num_frames))
    return [number for number, (begin, end) in parts if end <= start or begin >= start + length]


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
