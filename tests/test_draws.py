"""What a run makes of its dataset: parts of songs, their words, weights, and songs of a second dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.config.data import DataConfig, ExcerptLyrics, Excerpts, PromptShares
from sidestep.config.evaluation import ValidationConfig
from sidestep.data.dataset import SongDataset, collate
from sidestep.data.holdout import hold_out
from sidestep.data.loader import read_batches
from sidestep.data.manifest import DatasetInfo, SongRecord, write_manifest
from sidestep.data.sampler import reference_parts
from sidestep.errors import UserError
from tests.factories import run_training, write_dataset

PARTS = ("lyrics", "instrumental", "reference", "caption", "genre", "tag")
STORED = [
    *PARTS, *(f"window.{key}" for key in PARTS[3:]), *(f"window.{n}.lyrics" for n in range(9)),
    *(f"reference.{n}" for n in range(8)),
]  # fmt: skip


def part(name: str) -> torch.Tensor:
    """A part of a condition, one token that tells its name."""
    return torch.full((1, 8), float(sum(map(ord, name))))


def told(condition: torch.Tensor, names: list[str]) -> list[str]:
    """The names of the parts of a condition."""
    by_value = {part(name)[0, 0].item(): name for name in names}
    return [by_value[value] for value in condition[:, 0].tolist()]


@pytest.fixture
def make(tmp_path):
    """Write a dataset: a song is its length in frames, with any other field of its record."""

    def write(*songs: tuple[int, dict], name: str = "data", **settings) -> Path:
        folder = tmp_path / name
        (folder / "latents").mkdir(parents=True)
        (folder / "conditions").mkdir()
        records = []
        for i, (num_frames, fields) in enumerate(songs):
            latents = torch.arange(num_frames).view(-1, 1).expand(-1, 64) % 2048  # each frame tells its number
            save_file({"latents": latents.half().contiguous()}, folder / f"latents/{i}.safetensors")
            save_file({key: part(key) for key in STORED}, folder / f"conditions/{i}.safetensors")
            record = SongRecord(
                audio=f"{name}{i}.wav",
                latents=f"latents/{i}.safetensors",
                conditions=f"conditions/{i}.safetensors",
                prompt="caption",
                num_frames=num_frames,
                prompts=["caption", "genre", "tag"],
            )
            records.append(replace(record, **fields))
        info = DatasetInfo(
            model_variant="base", condition_width=8, fingerprints={}, settings={"custom_tags": [], **settings}
        )
        write_manifest(folder, info, records)
        return folder

    return write


def open_dataset(folder: Path, max_seconds: float = 4, prior: Path | None = None, batch_size: int = 1, **config):
    return SongDataset(
        folder,
        max_seconds=max_seconds,
        seed=0,
        config=DataConfig(**config),
        batch_size=batch_size,
        prior_folder=prior,
    )


def words(dataset, position):
    return told(dataset[position].condition, STORED)


def test_random_excerpts_are_told_the_whole_song_unless_they_are_to_have_no_lyrics(make):
    folder = make((300, {}), (80, {}))
    for config, long in (({}, "lyrics"), ({"excerpt_lyrics": ExcerptLyrics.none}, "instrumental")):
        dataset = open_dataset(folder, **config)
        for position in range(8):
            draw = dataset.draw(position)
            assert dataset[position].latents[:, 0].tolist() == list(range(draw.start, draw.start + draw.length))
            lyrics = long if draw.song == 0 else "lyrics"  # a song that is short enough is no excerpt
            assert words(dataset, position) == [lyrics, "reference", "caption"]


def test_windows_are_told_their_own_lyrics_and_duration_where_lyrics_have_times(make):
    folder = make((250, {"is_timed": True}), (250, {}), (90, {}), window_seconds=4.0)
    dataset = open_dataset(folder)
    seen = Counter()
    for position in range(3 * 6):
        draw = dataset.draw(position)
        lyrics = f"window.{draw.window}.lyrics" if draw.song == 0 else "lyrics"
        text = "caption" if draw.song == 2 else "window.caption"
        assert words(dataset, position) == [lyrics, "reference", text]
        seen[draw.song, draw.start, draw.length] += 1
    windows = {(song, start, 100): 2 for song in (0, 1) for start in (0, 75, 150)}
    assert seen == windows | {(2, 0, 90): 6}


def test_windows_without_times_can_have_no_lyrics(make):
    folder = make((250, {"is_timed": True}), (250, {}), window_seconds=4.0)
    dataset = open_dataset(folder, excerpt_lyrics=ExcerptLyrics.none)
    for position in range(6):
        timed = dataset.draw(position).song == 0
        assert words(dataset, position)[0].endswith("lyrics" if timed else "instrumental")


def test_a_dataset_with_windows_still_gives_random_excerpts(make):
    dataset = open_dataset(make((250, {"is_timed": True}), window_seconds=4.0), excerpts=Excerpts.random, max_seconds=2)
    assert len({dataset.draw(position).start for position in range(20)}) > 10
    assert words(dataset, 0) == ["lyrics", "reference", "caption"]


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({}, {"excerpts": Excerpts.windows}, "was made without window_seconds; .*again with window_seconds=4"),
        ({"window_seconds": 5.0}, {}, "are 5 s long, longer than max_seconds=4; use max_seconds=5"),
        ({}, {"excerpts": Excerpts.whole}, r"data0\.wav is 12 s long; use max_seconds=12"),
        ({}, {"prompts": PromptShares(tag=1)}, r"data\.prompts\.tag: no song .* has a custom_tag"),
        ({}, {"prompts": PromptShares(genre=1)}, r"data\.prompts\.genre: no song .* has a genre"),
    ],
)
def test_what_the_songs_do_not_have_is_refused(make, settings, config, message):
    folder = make((300, {"prompts": ["caption"]}), **settings)
    with pytest.raises(UserError, match=message):
        open_dataset(folder, **config)


def test_whole_songs_are_taken_whole(make):
    dataset = open_dataset(make((300, {}), (81, {})), max_seconds=12, excerpts=Excerpts.whole)
    assert {dataset.draw(position)[:3] for position in range(4)} == {(0, 0, 300), (1, 0, 80)}


def test_prompts_and_empty_lyrics_are_drawn_as_often_as_their_shares_say(make):
    folder = make((80, {}), (80, {"prompts": ["caption", "genre"]}), (80, {"is_instrumental": True}))
    dataset = open_dataset(folder, prompts=PromptShares(caption=5, genre=2, tag=1), lyrics_dropout=0.25)
    draws = [dataset.draw(position) for position in range(6000)]
    for song, shares in enumerate([(5, 2, 1), (6, 2, 0), (5, 2, 1)]):
        own = [draw for draw in draws if draw.song == song]
        found = Counter(draw.prompt for draw in own)
        for prompt, share in zip(("caption", "genre", "tag"), shares, strict=True):
            assert found[prompt] / 2000 == pytest.approx(share / 8, abs=0.03)
        assert sum(not draw.sings for draw in own) / 2000 == pytest.approx(0.25, abs=0.03)
    silent = next(i for i, draw in enumerate(draws) if draw.song == 0 and not draw.sings)
    assert words(dataset, silent)[0] == "instrumental"
    instrumental = next(i for i, draw in enumerate(draws) if draw.song == 2 and not draw.sings)
    assert words(dataset, instrumental)[0] == "lyrics"  # which are none


def test_a_position_holds_the_same_draw_whatever_was_asked_before(make):
    folder = make((300, {"repeat": 2}), (250, {}), (260, {"repeat": 3}), window_seconds=4.0)
    config = {"prompts": PromptShares(caption=1, tag=1), "lyrics_dropout": 0.5}
    forward = [open_dataset(folder, **config).draw(position) for position in range(30)]
    backward = open_dataset(folder, **config)
    assert [backward.draw(position) for position in reversed(range(30))] == forward[::-1]


def test_shares_change_neither_songs_nor_excerpts(make):
    folder = make((300, {}), (250, {}))
    plain, drawn = open_dataset(folder), open_dataset(folder, prompts=PromptShares(tag=1), lyrics_dropout=0.5)
    assert [plain.draw(i)[:3] for i in range(20)] == [drawn.draw(i)[:3] for i in range(20)]


def test_repeats_and_weights_reach_the_batch(make):
    dataset = open_dataset(make((80, {"repeat": 3, "weight": 0.5}), (80, {})), batch_size=4)
    assert dataset.songs_per_epoch == 4
    batch = collate([dataset[position] for position in range(4)])
    assert sorted(zip(batch.songs, batch.weights.tolist(), strict=True)) == [(0, 0.5), (0, 0.5), (0, 0.5), (1, 1.0)]
    assert collate([dataset[position] for position in range(4) if dataset.draw(position).song == 1]).weights is None


def test_every_second_batch_is_of_the_prior_dataset(make):
    own = make(*[(80, {})] * 3)
    prior = make(*[(80, {"repeat": 2})] * 5, name="prior")
    dataset = open_dataset(own, prior=prior, batch_size=2, prior_weight=0.25)
    assert dataset.songs_per_epoch == 6
    batches = list(read_batches(dataset, [[i, i + 1] for i in range(0, 60, 2)], device=torch.device("cpu")))
    for number, batch in enumerate(batches):
        names = {dataset.songs[song].audio[:-5] for song in batch.songs}
        assert names == {"prior" if number % 2 else "data"}
        assert batch.weights is None if number % 2 == 0 else (batch.weights == 0.25).all()
    assert Counter(song for batch in batches[::2] for song in batch.songs) == {0: 10, 1: 10, 2: 10}
    assert Counter(song for batch in batches[1::2] for song in batch.songs) == dict.fromkeys(range(3, 8), 6)


def test_a_run_of_two_datasets_in_batches_goes_on_as_if_it_had_not_stopped(tmp_path, checkpoint_dir):
    own = write_dataset(tmp_path / "own", checkpoint_dir, lengths=[60, 24, 38, 50, 31])
    prior = write_dataset(tmp_path / "prior", checkpoint_dir, lengths=[44, 28, 61])
    settings = (
        f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={own}", f"prior_dataset_dir={prior}", "data.prior_weight=0.5",
        "vram_profile.batch_size=2", "vram_profile.max_seconds=1.5", "max_epochs=null",
    )  # fmt: skip
    whole = run_training(tmp_path / "whole", *settings, "max_steps=5")
    run_training(tmp_path / "parts", *settings, "max_steps=3")
    assert run_training(tmp_path / "parts", *settings, "max_steps=5") == whole
    one, other = (load_file(tmp_path / run / "final/adapter_model.safetensors") for run in ("whole", "parts"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    without = run_training(tmp_path / "without", *(s for s in settings if "prior" not in s), "max_steps=5")
    assert without != whole


def test_every_text_of_every_song_is_checked_before_training(make):
    folder = make((250, {"is_timed": True}), window_seconds=4.0)
    open_dataset(folder).check_tensors()
    file = folder / "conditions/0.safetensors"
    parts = load_file(file)
    for damaged in ("tag", "window.genre", "window.2.lyrics", "instrumental"):
        save_file(parts | {damaged: torch.full((1, 8), torch.nan)}, file)
        with pytest.raises(UserError, match=r"conditions/0\.safetensors of data0\.wav holds NaN or infinity"):
            open_dataset(folder).check_tensors()


def test_a_part_to_evaluate_is_told_what_is_sung_in_its_window(make):
    folder = make((250, {"is_timed": True}), (90, {}), window_seconds=4.0)
    for excerpts in (None, Excerpts.random):  # whatever the run draws
        dataset = open_dataset(folder, excerpts=excerpts)
        seen = set()
        for place in range(300):
            example = dataset.excerpt_at(0, 2, place)
            lyrics, _, text = told(example.condition, STORED)
            start = [0, 75, 150][int(lyrics.split(".")[1])]
            frames = example.latents[:, 0].tolist()
            assert (len(frames), text) == (50, "window.caption")
            assert start <= frames[0] <= start + 50
            seen.add((start, frames[0] - start))
        assert len(seen) == 3 * 51 == len({(place % 3, place // 3 % 51) for place in range(300)})
        whole = dataset.excerpt_at(1, 12, 7)
        assert (told(whole.condition, STORED)[0], len(whole.latents)) == ("lyrics", 90)


def test_the_reference_is_another_part_of_the_song_or_silence(make, caplog):
    folder = make((6000, {"num_references": 8}), (1200, {"num_references": 4}), (80, {}), reference="song")
    dataset = open_dataset(folder, max_seconds=60)
    assert "the reference audio of 2 of 3 songs is silence, as excerpts of up to 48 s leave no part" in caplog.text
    seen = Counter()
    for position in range(60):
        draw = dataset.draw(position)
        sound = words(dataset, position)[1]
        seen[draw.song, sound] += 1
        if draw.song == 0:
            begin, end = reference_parts(6000)[int(sound.removeprefix("reference."))]
            assert end <= draw.start or begin >= draw.start + draw.length
            assert dataset.draw(position) == draw
    assert len([sound for song, sound in seen if song == 0]) == 8
    assert {sound for song, sound in seen if song != 0} == {"reference"}
    assert told(dataset.excerpt(0, 0, 1500).condition, STORED)[1] == "reference.2"


def test_a_reference_that_is_the_song_itself_is_refused_unless_it_is_wanted(make):
    folder = make((6000, {}), (80, {}), reference="song")  # as datasets were made once
    with pytest.raises(UserError, match=r"the reference audio of data0\.wav is the song itself.*preprocess again"):
        open_dataset(folder)
    assert words(open_dataset(folder, allow_leaked_reference=True), 0)[1] == "reference"


def test_a_genre_that_only_the_prior_dataset_has_is_none(make):
    own, prior = make((80, {"prompts": ["caption"]})), make((80, {}), name="prior")
    with pytest.raises(UserError, match=r"data\.prompts\.genre: no song of dataset_dir=.* has a genre"):
        open_dataset(own, prior=prior, prompts=PromptShares(genre=1))


def test_shares_that_overrule_what_preprocessing_chose_say_so(make, caplog):
    open_dataset(make((80, {"prompt": "genre"})), prompts=PromptShares(caption=1))
    assert "data.prompts decides which text is told, so genre_ratio and prompt_override" in caplog.text


def test_a_held_out_song_is_not_trained_on_as_a_prior_one(make):
    """In these datasets, songs of one number have the same sound."""
    dataset = open_dataset(make((80, {}), (80, {})), prior=make((80, {}), name="prior"))
    assert hold_out(dataset.own_songs, ValidationConfig(songs=["data1.wav"]), dataset.prior_songs) == ([0], [1])
    with pytest.raises(UserError, match=r"holds out prior0\.wav, which prior_dataset_dir also has"):
        hold_out(dataset.own_songs, ValidationConfig(songs=["data0.wav"]), dataset.prior_songs)


def test_datasets_with_other_windows_do_not_go_together(make):
    own, prior = make((300, {}), window_seconds=4.0), make((300, {}), name="prior")
    with pytest.raises(UserError, match=r"made with window_seconds 4 and null; .*data\.excerpts=random"):
        open_dataset(own, prior=prior)


def test_some_songs_alone_keep_their_numbers_in_the_part(make):
    dataset = open_dataset(make((80, {}), (82, {}), (84, {}))).only([2, 0])
    assert [song.audio for song in dataset.songs] == ["data2.wav", "data0.wav"]
    assert {(dataset[i].song, len(dataset[i].latents)) for i in range(2)} == {(0, 84), (1, 80)}


@pytest.mark.parametrize("key", ["repeat", "weight", "prompts"])
def test_another_repeat_or_weight_is_another_dataset(make, key):
    one = open_dataset(make((80, {})))
    other = open_dataset(make((80, {key: {"repeat": 2, "weight": 2.0, "prompts": ["caption"]}[key]}), name="other"))
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: DataConfig(lyrics_dropout=2), r"data\.lyrics_dropout=2 must be from 0 to 1"),
        (lambda: DataConfig(prior_weight=0), r"data\.prior_weight=0 must be above 0"),
        (lambda: PromptShares(tag=-1), r"data\.prompts\.tag=-1 must be at least 0"),
        (lambda: PromptShares(genre=float("nan")), r"data\.prompts\.genre=nan must be at least 0"),
    ],
)
def test_shares_that_are_none_are_refused(make_config, message):
    with pytest.raises(UserError, match=message):
        make_config()
