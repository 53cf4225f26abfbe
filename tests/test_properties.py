"""What holds for every input, tried on many that nobody thought of."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.acestep.prompts import apply_tag, caption_prompt, choose_genre, lyrics_prompt
from sidestep.config.naming import MAX_LENGTH, run_name
from sidestep.config.settings import VramConfig
from sidestep.data.dataset import Example, collate
from sidestep.data.manifest import DatasetInfo, SongRecord, read_manifest, write_manifest
from sidestep.data.sampler import MicroBatchSampler, SongOrder, excerpt_length, excerpt_start
from sidestep.data.songs import caption_from_name, read_songs
from sidestep.errors import UserError
from sidestep.inference.music_files import music_name, slug
from sidestep.seeds import derive_seed
from sidestep.training.metrics import smooth
from sidestep.training.schedules import Constant, Cosine, Linear
from sidestep.training.tracking import duration

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("steady")

SEEDS = st.integers(0, 2**63 - 1)
SMALL = st.integers(1, 40)
NUMBERS = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False))
OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from(["optim.lr", "adapter.rank", "seed", "schedule", "adapter.alpha", "objective", "precision"]),
        st.one_of(NUMBERS.map(str), st.sampled_from(["cosine", "true", "null", "bf16", "[a,b]", "'x y'"])),
    ),
    unique_by=lambda pair: pair[0],
    max_size=7,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=12,
)
SONG_KEYS = [
    "caption", "genre", "lyrics", "bpm", "keyscale", "timesignature", "language", "is_instrumental", "custom_tag",
    "prompt_override", "repeat", "key", "filename", "audio_path", "duration",
]  # fmt: skip
ENTRIES = st.dictionaries(st.sampled_from(SONG_KEYS), st.one_of(JSON, st.sampled_from(["song.wav", "4/4", "120"])))


# names


@given(OVERRIDES, st.randoms(use_true_random=False))
def test_a_runs_name_does_not_depend_on_the_order_of_settings(overrides, chance):
    typed = [f"{key}={value}" for key, value in overrides]
    name = run_name("lora", "base", typed, "x")
    chance.shuffle(typed)
    assert run_name("lora", "base", typed, "x") == name


@given(OVERRIDES, st.text(max_size=80))
def test_a_runs_name_is_a_short_plain_folder_name(overrides, odd):
    name = run_name("lora", "base", [*(f"{key}={value}" for key, value in overrides), f"adapter.note={odd}"], "x")
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name, re.ASCII)
    assert len(name) <= MAX_LENGTH
    assert name.startswith("lora-base")


@given(st.integers(0, 2**63), st.integers(0, 2**63), OVERRIDES)
@example(1, 10, [])
@example(2**60, 2**60 + 1, [])
def test_other_seeds_give_other_runs(one, other, overrides):
    assume(one != other)
    rest = [f"{key}={value}" for key, value in overrides if key != "seed"]
    assert run_name("lora", "base", [*rest, f"seed={one}"], "x") != run_name(
        "lora", "base", [*rest, f"seed={other}"], "x"
    )


@given(st.text("ab/- ,[].ü", max_size=6), st.text("ab/- ,[].ü", max_size=6))
@example("data/a-b", "data/a/b")
@example("日本", "中国")
def test_other_values_give_other_runs_though_a_name_has_few_characters(one, other):
    assume(_read(one) != _read(other))
    assert run_name("lora", "base", [f"adapter.note={one}"], "x") != run_name(
        "lora", "base", [f"adapter.note={other}"], "x"
    )


def _read(value: str) -> object:
    """What Hydra reads, for which a space before or after it, or in a list, means nothing."""
    try:
        return OverridesParser.create().parse_override(f"adapter.note={value}").value()
    except HydraException:
        return value


@given(st.floats(1e-12, 1e12))
def test_the_spelling_of_a_number_does_not_make_another_run(lr):
    names = {run_name("lora", "base", [f"optim.lr={text}"], "x") for text in (repr(lr), f"{lr:.17e}", f"{lr:.17E}")}
    assert len(names) == 1


@given(st.text())
def test_a_music_files_name_is_plain(text):
    assert re.fullmatch(r"[\w.+-]{1,80}", slug(text))
    assert "/" not in music_name(text, {"seed": 1, "prompt": text})


@given(st.text(alphabet=st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
@example("01 - .wav")
@example("...wav")
def test_every_file_name_gives_a_caption_that_is_not_empty(name):
    assume(name not in (".", ".."))
    assert caption_from_name(Path(name)).strip() or not name.strip()


# order and excerpts


@given(SMALL, SEEDS, st.integers(0, 50))
def test_every_epoch_shows_every_song_once(num_songs, seed, epoch):
    order = SongOrder(num_songs, seed)
    start = epoch * num_songs
    assert sorted(order[position] for position in range(start, start + num_songs)) == list(range(num_songs))


@given(SMALL, SEEDS, st.lists(st.integers(0, 500), max_size=20))
def test_what_lies_at_a_position_does_not_depend_on_what_was_asked_before(num_songs, seed, positions):
    order = SongOrder(num_songs, seed)
    assert [order[position] for position in positions] == [SongOrder(num_songs, seed)[at] for at in positions]


@given(st.integers(2, 20_000), st.floats(0.08, 700), SEEDS, st.integers(0, 10**9))
def test_an_excerpt_lies_inside_its_song_and_fills_whole_patches(num_frames, max_seconds, seed, position):
    length = excerpt_length(num_frames, max_seconds)
    start = excerpt_start(num_frames, length, seed=seed, song=3, visit=position)
    assert start >= 0
    assert start + length <= num_frames
    assert length % 2 == 0
    assert 2 <= length <= max_seconds * 25
    assert length >= min(num_frames, int(max_seconds * 25)) - 1


@given(st.integers(0, 5), st.integers(1, 4), SMALL, st.integers(1, 4), st.integers(1, 4))
def test_processes_together_draw_every_position_once_and_in_steps(first, steps, batch_size, accumulation, processes):
    def positions(process: int, processes: int, accumulation: int) -> list[list[int]]:
        sampler = MicroBatchSampler(
            first_step=first,
            last_step=first + steps,
            batch_size=batch_size,
            accumulation=accumulation,
            process=process,
            num_processes=processes,
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    of_each = [positions(process, processes, accumulation) for process in range(processes)]
    drawn = sorted(at for batches in of_each for batch in batches for at in batch)
    per_step = batch_size * accumulation * processes
    assert drawn == list(range(first * per_step, (first + steps) * per_step))
    alone = positions(0, 1, accumulation * processes)
    together = [batch for batches in zip(*of_each, strict=True) for batch in batches]
    assert together == alone


@given(
    st.lists(st.tuples(SEEDS, st.sampled_from(["noise", "order", "excerpt"]), SEEDS, SEEDS), unique=True, max_size=30)
)
def test_seeds_for_other_purposes_and_positions_differ_and_fit_a_generator(purposes):
    seeds = [derive_seed(seed, purpose, *position) for seed, purpose, *position in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in islice(seeds, 2):
        torch.Generator().manual_seed(seed)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6))
def test_a_batch_gives_back_every_song_and_masks_the_rest(lengths):
    examples = [
        Example(song, torch.full((2 * frames, 64), song + 1.0), torch.full((tokens, 8), song + 1.0))
        for song, (frames, tokens) in enumerate(lengths)
    ]
    batch = collate(examples)
    for values, mask, sizes in (
        (batch.latents, batch.frame_mask, [2 * frames for frames, _ in lengths]),
        (batch.condition, batch.condition_mask, [tokens for _, tokens in lengths]),
    ):
        assert values.shape[1] == max(sizes)
        assert (mask is None) == (len(set(sizes)) == 1)
        real = torch.ones(values.shape[:2], dtype=torch.bool) if mask is None else mask
        assert real.sum(dim=1).tolist() == sizes
        for song, size in enumerate(sizes):
            assert (values[song, :size] == song + 1).all()
            assert (values[song, size:] == 0).all()


# schedules and metrics


@given(
    st.integers(0, 500),
    st.integers(1, 1000),
    st.floats(0, 1),
    st.sampled_from([Constant, Linear, Cosine]),
    st.integers(0, 10**6),
)
def test_a_schedule_stays_between_0_and_1_and_begins_above_0(warmup_steps, num_steps, final_factor, schedule, step):
    final = {} if schedule is Constant else {"final_factor": final_factor}
    config = schedule(warmup_steps=warmup_steps, **final)
    step %= num_steps
    assert 0 <= config.factor(step, num_steps) <= 1 + 1e-12
    assert config.factor(0, num_steps) > 0
    if step > warmup_steps:
        assert config.factor(step, num_steps) <= config.factor(step - 1, num_steps) + 1e-12


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_smoothed_loss_lies_between_the_losses(losses):
    smoothed = None
    for step, loss in enumerate(losses, start=1):
        smoothed = smooth(smoothed, loss, step)
        assert min(losses[:step]) - 1e-6 <= smoothed <= max(losses[:step]) + 1e-6


@given(st.floats(0, 1e6))
def test_the_first_losses_weigh_the_same(loss):
    assert smooth(smooth(None, 0.0, 1), loss, 2) == pytest.approx(loss / 1.98 * 1.0, rel=1e-6)


@given(st.floats(0, 1e9))
def test_a_duration_is_said_in_few_words(seconds):
    assert re.fullmatch(r"\d+ (s|min|h \d\d min)", duration(seconds))


@given(st.lists(st.floats(4, 200), min_size=1, max_size=6, unique=True), st.floats(0, 300))
def test_a_profile_that_fits_is_chosen_where_there_is_one(sizes, available):
    profiles = [
        VramConfig(memory_gib=gib, batch_size=number + 1, gradient_accumulation_steps=1, gradient_checkpointing="none",
                   checkpointed_share=1.0, offloaded_share=0.0, base_quantization="none", max_seconds=10.0)
        for number, gib in enumerate(sizes)
    ]  # fmt: skip
    chosen = sizes[VramConfig().resolve(profiles, available).batch_size - 1]
    fitting = [gib for gib in sizes if gib <= available + 0.75]
    assert chosen == (max(fitting) if fitting else min(sizes))


# names of weights and texts

PROJECTIONS = st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"])
PATHS = st.one_of(
    st.builds("layers.{}.{}.{}".format, st.integers(0, 99), st.sampled_from(["self_attn", "cross_attn"]), PROJECTIONS),
    st.builds("layers.{}.mlp.{}".format, st.integers(0, 99), st.sampled_from(["gate_proj", "up_proj", "down_proj"])),
    st.sampled_from(["proj_in.1", "proj_out.1", "condition_embedder", "time_embed.linear_1", "norm_out"]),
)


@given(PATHS, st.sampled_from(["", ".weight", ".bias"]))
def test_a_weights_name_comes_back_from_diffusers(path, leaf):
    assert to_original(to_diffusers(path + leaf)) == path + leaf


@given(st.text())
def test_renaming_takes_any_text(text):
    assert isinstance(to_diffusers(text), str)
    assert isinstance(to_original(text), str)


@given(st.text(), st.text(), st.text(), st.one_of(st.none(), st.integers(1, 300)), st.integers(0, 600))
def test_prompts_end_as_the_model_expects_whatever_is_in_them(caption, lyrics, keyscale, bpm, seconds):
    prompt = caption_prompt(caption, bpm=bpm, timesignature="", keyscale=keyscale, duration=seconds)
    assert prompt.startswith("# Instruction\n")
    assert prompt.endswith(f"- duration: {seconds} seconds\n<|endoftext|>\n")
    assert f"# Caption\n{caption}\n\n# Metas\n- bpm: {bpm or 'N/A'}\n" in prompt
    assert lyrics_prompt(lyrics, "en").endswith("<|endoftext|>")
    assert lyrics.strip() in lyrics_prompt(lyrics, "en")


@given(st.text(), st.text(), st.sampled_from(["prepend", "append", "replace"]))
def test_a_tag_is_in_the_caption_wherever_it_goes(caption, tag, position):
    tagged = apply_tag(caption, tag, position)
    assert tag in tagged
    assert caption in tagged or (position == "replace" and tag)


@given(st.integers(0, 500), st.integers(0, 100))
def test_the_genre_ratio_chooses_as_many_songs_as_it_says(num_songs, genre_ratio):
    chosen = choose_genre(num_songs, genre_ratio)
    assert len(chosen) == num_songs * genre_ratio // 100
    assert chosen <= set(range(num_songs))
    assert choose_genre(num_songs, min(100, genre_ratio + 7)) >= chosen


# files that people write


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("album")
    (folder / "song.wav").touch()
    (folder / "02 other.wav").touch()
    return folder


def read_and_check(album: Path) -> None:
    """Read the songs; whatever their words are, there are songs that a prompt can be made of, or one line."""
    try:
        listing = read_songs(album)
    except UserError as error:
        listing = str(error)
    if isinstance(listing, str):
        assert "\n" not in listing
        return
    assert {song.name for song in listing.songs} | listing.failed.keys() >= {"song.wav", "02 other.wav"}
    for song in listing.songs:
        assert song.caption.strip()
        assert song.bpm is None or 0 < song.bpm < 10_000
        assert re.fullmatch(r"\d{0,2}", song.timesignature)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", song.caption + song.lyrics + song.keyscale)
        assert "\n" not in song.keyscale + song.language + song.genre + song.custom_tag
        assert song.prompt in ("caption", "genre")
        assert song.is_instrumental == (not song.lyrics)
        json.dumps(vars(song), default=str).encode()


@given(st.one_of(st.text(), st.lists(st.sampled_from(SONG_KEYS).flatmap(
    lambda key: st.text(max_size=20).map(lambda value: f"{key}: {value}"))).map("\n".join)))  # fmt: skip
@example("lyrics:\n\n\ncaption: a\ncaption: b")
@example("\ufeffbpm: 120\r\nlyrics: [Verse]\r\n: :\r\n")
def test_any_text_beside_a_song_is_read_or_named(album, text):
    (album / "song.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_and_check(album)
    finally:
        (album / "song.txt").unlink()


@given(st.one_of(ENTRIES, JSON))
def test_any_json_beside_a_song_is_read_or_named(album, content):
    (album / "song.json").write_text(json.dumps(content))
    try:
        read_and_check(album)
    finally:
        (album / "song.json").unlink()


@given(
    st.one_of(
        JSON,
        st.lists(ENTRIES, max_size=4),
        st.fixed_dictionaries(
            {"samples": st.lists(st.one_of(ENTRIES, JSON), max_size=4)},
            optional={
                "metadata": st.dictionaries(st.sampled_from(["custom_tag", "tag_position", "genre_ratio"]), JSON),
            },
        ),
    )
)
@example({"a\nb": 1})
def test_any_dataset_json_is_read_or_named(album, content):
    (album / "dataset.json").write_text(json.dumps(content))
    try:
        read_and_check(album)
    finally:
        (album / "dataset.json").unlink()


@given(st.binary())
def test_any_bytes_in_the_place_of_words_are_read_or_named(album, content):
    names = ["song.caption.txt", "song.lyrics.txt", "song.json", "dataset.json"]
    for name in names:
        (album / name).write_bytes(content)
    try:
        read_and_check(album)
    finally:
        for name in names:
            (album / name).unlink()


RECORDS = st.builds(
    SongRecord,
    audio=st.text(min_size=1),
    latents=st.just("latents/a.safetensors"),
    conditions=st.just("conditions/a.safetensors"),
    prompt=st.sampled_from(["caption", "genre"]),
    prompts=st.just(["caption", "genre"]),
    num_frames=st.integers(2, 10**6),
    caption=st.text(st.characters(exclude_categories=["Cs"])),
    repeat=st.integers(1, 9),
    bpm=st.one_of(st.none(), st.integers(1, 999)),
)


@given(st.lists(RECORDS.filter(lambda song: song.audio.isprintable()), min_size=1, max_size=4))
def test_a_dataset_reads_back_as_it_was_written(tmp_path_factory, songs):
    folder = tmp_path_factory.getbasetemp()
    info = DatasetInfo(
        model_variant="base", condition_width=64, fingerprints={"condition_encoder": "x"}, settings={"custom_tags": []}
    )
    write_manifest(folder, info, songs)
    assert read_manifest(folder) == (info, songs)
