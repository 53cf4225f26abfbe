"""The endless stream of songs and excerpts."""

from __future__ import annotations

from collections import Counter

import pytest

from sidestep.data.sampler import MicroBatchSampler, SongOrder, excerpt_at
from sidestep.seeds import derive_seed


def test_every_epoch_shows_every_song_once_in_its_own_order():
    order = SongOrder(7, seed=3)
    epochs = [[order[epoch * 7 + i] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_position_holds_the_same_song_whatever_was_asked_before():
    one, other = SongOrder(5, seed=0), SongOrder(5, seed=0)
    forward = [one[i] for i in range(20)]
    backward = [other[i] for i in reversed(range(20))]
    assert forward == backward[::-1]


def test_another_seed_gives_another_order():
    assert [SongOrder(20, seed=0)[i] for i in range(20)] != [SongOrder(20, seed=1)[i] for i in range(20)]


@pytest.mark.parametrize(("num_frames", "max_seconds"), [(1000, 4), (101, 4), (100, 4), (99, 4), (2, 4), (3, 0.08)])
def test_excerpts_are_even_inside_the_song_and_no_longer_than_allowed(num_frames, max_seconds):
    for position in range(200):
        start, length = excerpt_at(num_frames, max_seconds, 0, position)
        assert length % 2 == 0
        assert 2 <= length <= max(2, max_seconds * 25)
        assert 0 <= start <= num_frames - length


def test_excerpts_start_everywhere_equally_often():
    starts = Counter(excerpt_at(104, 4, 0, position)[0] for position in range(5000))
    assert set(starts) == {0, 1, 2, 3, 4}
    assert all(abs(count - 1000) < 150 for count in starts.values())


@pytest.mark.parametrize(("num_frames", "max_seconds"), [(1, 4), (100, 0.05)])
def test_an_excerpt_without_a_patch_is_refused(num_frames, max_seconds):
    with pytest.raises(ValueError, match="an excerpt needs 2 frames"):
        excerpt_at(num_frames, max_seconds, 0, 0)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_take_the_micro_batches_that_one_would(processes):
    def sampler(process, num_processes, accumulation):
        return list(
            MicroBatchSampler(
                first_step=2,
                last_step=5,
                batch_size=3,
                accumulation=accumulation,
                process=process,
                num_processes=num_processes,
            )
        )

    alone = sampler(0, 1, 4)
    together = [sampler(p, processes, 4 // processes) for p in range(processes)]
    woven = [micro_batch for row in zip(*together, strict=True) for micro_batch in row]
    assert woven == alone
    assert alone[0] == [2 * 4 * 3, 2 * 4 * 3 + 1, 2 * 4 * 3 + 2]


def test_seeds_differ_by_purpose_and_position_and_fit_a_generator():
    seeds = {derive_seed(0, purpose, a, b) for purpose in ("noise", "dropout") for a in range(30) for b in range(30)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds)
