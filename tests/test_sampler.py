"""The endless stream of songs and excerpts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sidestep.data.sampler import (
    MicroBatchSampler,
    SongOrder,
    excerpt_length,
    excerpt_start,
    reference_parts,
    references_outside,
    window_at,
    window_frames,
    window_starts,
)
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


def test_a_song_comes_as_often_in_an_epoch_as_it_should_and_its_visits_are_counted():
    order = SongOrder(3, seed=1, repeats=[1, 3, 2])
    assert len(order) == 6
    visits = [order.visit(position) for position in range(12)]
    assert Counter(song for song, _ in visits[:6]) == {0: 1, 1: 3, 2: 2}
    assert sorted(visits) == [(song, visit) for song, often in enumerate([2, 6, 4]) for visit in range(often)]


def padding(order, lengths, batch_size, batches):
    """Share of a number of batches that is padding."""
    padded = real = 0
    for batch in range(batches):
        longest = [lengths[order[batch * batch_size + i]] for i in range(batch_size)]
        padded, real = padded + max(longest) * batch_size, real + sum(longest)
    return 1 - real / padded


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_batches_of_songs_of_any_length_have_little_padding(batch_size):
    lengths = np.random.default_rng(0).lognormal(8.3, 0.4, 300).astype(int).tolist()
    order = SongOrder(300, 0, lengths=lengths, batch_size=batch_size)
    assert (
        padding(order, lengths, batch_size, 500 // batch_size * 2)
        < 0.05
        < padding(SongOrder(300, 0), lengths, batch_size, 500 // batch_size * 2)
    )


@pytest.mark.parametrize(("num_songs", "batch_size"), [(300, 8), (301, 8), (7, 4), (5, 8), (3, 8), (1, 3)])
def test_buckets_keep_every_song_in_every_epoch(num_songs, batch_size):
    lengths = np.random.default_rng(1).integers(100, 6000, num_songs).tolist()
    order = SongOrder(num_songs, 2, lengths=lengths, batch_size=batch_size)
    epochs = [[order[epoch * num_songs + i] for i in range(num_songs)] for epoch in range(9)]
    assert all(sorted(epoch) == list(range(num_songs)) for epoch in epochs)
    again = SongOrder(num_songs, 2, lengths=lengths, batch_size=batch_size)
    assert [again[i] for i in reversed(range(9 * num_songs))] == [song for epoch in epochs for song in epoch][::-1]


def test_batches_of_a_bucket_have_other_songs_in_every_epoch():
    order = SongOrder(64, 0, lengths=[1500] * 64, batch_size=4)
    batches = [{frozenset(order[e * 64 + b * 4 + i] for i in range(4)) for b in range(16)} for e in range(2)]
    assert not batches[0] & batches[1]


@pytest.mark.parametrize(("num_frames", "max_seconds"), [(1000, 4), (101, 4), (100, 4), (99, 4), (2, 4), (3, 0.08)])
def test_excerpts_are_even_inside_the_song_and_no_longer_than_allowed(num_frames, max_seconds):
    length = excerpt_length(num_frames, max_seconds)
    assert length % 2 == 0
    assert 2 <= length <= max(2, max_seconds * 25)
    for visit in range(200):
        start = excerpt_start(num_frames, length, seed=0, song=3, visit=visit)
        assert 0 <= start <= num_frames - length


@pytest.mark.parametrize(
    ("num_frames", "length"), [(6000, 1500), (1600, 1500), (2400, 1500), (5000, 250), (2999, 1500)]
)
def test_few_visits_already_see_all_of_a_song_evenly(num_frames, length):
    """Each frame as often as its share, up to twice that near the ends, and two visits more or less."""
    visits = 4 * (num_frames // length + 1)
    for song in range(20):
        seen = np.zeros(num_frames, dtype=int)
        for visit in range(visits):
            start = excerpt_start(num_frames, length, seed=0, song=song, visit=visit)
            seen[start : start + length] += 1
        margin = min(length, num_frames - length)
        share = visits * margin / (num_frames - length + 2 * margin)
        assert seen.min() >= share - 2
        assert seen.max() <= 2 * share + 2 or num_frames < 2 * length  # of a short song, the middle is always seen


@pytest.mark.parametrize("num_frames", [1600, 2400, 2900])
def test_a_third_of_the_visits_to_a_short_song_begin_at_neither_of_its_ends(num_frames):
    starts = [excerpt_start(num_frames, 1500, seed=0, song=1, visit=visit) for visit in range(900)]
    at_ends = [starts.count(0), starts.count(num_frames - 1500)]
    assert all(290 <= number <= 310 for number in at_ends)


def test_another_song_or_seed_starts_elsewhere():
    starts = {
        (seed, song): excerpt_start(9000, 500, seed=seed, song=song, visit=0) for seed in (0, 1) for song in (0, 1)
    }
    assert len(set(starts.values())) == 4


@pytest.mark.parametrize(("num_frames", "max_seconds"), [(1, 4), (100, 0.05)])
def test_an_excerpt_without_a_patch_is_refused(num_frames, max_seconds):
    with pytest.raises(ValueError, match="an excerpt needs 2 frames"):
        excerpt_length(num_frames, max_seconds)


@pytest.mark.parametrize(
    ("num_frames", "starts"), [(40, [0]), (100, [0]), (101, [0, 1]), (250, [0, 75, 150]), (300, [0, 100, 200])]
)
def test_windows_cover_a_song_to_its_end(num_frames, starts):
    assert window_starts(num_frames, 100) == starts


@pytest.mark.parametrize(
    ("num_frames", "num_parts"), [(999, 0), (1000, 4), (2999, 4), (3000, 4), (6000, 8), (6749, 8), (6750, 9)]
)
def test_a_song_has_parts_of_30_s_or_four_of_at_least_10_s_to_refer_to(num_frames, num_parts):
    parts = reference_parts(num_frames)
    assert len(parts) == num_parts
    assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert all(end - start >= 250 and (end - start >= 750 or num_frames < 3000) for start, end in parts)
    assert not parts or (parts[0][0], parts[-1][1]) == (0, num_frames)


def test_a_reference_never_lies_in_the_excerpt():
    for start in range(0, 3001, 125):
        outside = references_outside(6000, start, 3000)
        assert len(outside) >= 3
        for begin, end in (reference_parts(6000)[number] for number in outside):
            assert end <= start or begin >= start + 3000
    assert references_outside(1500, 0, 1500) == []


def test_windows_take_turns():
    visits = [window_at(5, seed=0, song=0, visit=visit) for visit in range(20)]
    turns = [visits[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


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


def test_seconds_that_are_a_whole_number_of_patches_lose_none():
    assert [window_frames(frames / 25) for frames in range(2, 15_000, 2)] == list(range(2, 15_000, 2))
