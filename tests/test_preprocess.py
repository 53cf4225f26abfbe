from __future__ import annotations

import io
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mutagen.flac import FLAC
from safetensors import safe_open
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.acestep.conditioning import encode_condition, tokenize
from sidestep.acestep.prompts import caption_prompt, lyrics_prompt
from sidestep.config.settings import PreprocessConfig, TagPosition
from sidestep.data import encode, sampler
from sidestep.data.audio import read_hashed
from sidestep.data.dataset import SongDataset
from sidestep.data.encode import PreprocessSummary, encode_latents, preprocess, reference_frames
from sidestep.data.manifest import condition_keys, read_manifest
from sidestep.errors import UserError
from sidestep.files import _HOST, alone_in, sha256_of
from tests.audio_files import write
from tests.factories import train_config

GOLDEN = json.loads((Path(__file__).parent / "data/golden/text_and_tensors.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")
VARIANT = train_config("model_variant=base").model_variant


@pytest.fixture(scope="session")
def checkpoint(checkpoint_dir):
    return find_checkpoint(checkpoint_dir, VARIANT)


@pytest.fixture(scope="session")
def vae(checkpoint):
    return checkpoint.load_vae(device=CPU, dtype=torch.float32)


@pytest.fixture
def config(checkpoint, tmp_path):
    return PreprocessConfig(
        model_variant=VARIANT,
        audio_dir=str(tmp_path / "songs"),
        dataset_dir=str(tmp_path / "dataset"),
        checkpoint_dir=str(checkpoint.root),
        language="unknown",
        tile_seconds=15,
        device="cpu",
    )


@pytest.fixture
def songs(tmp_path):
    """Three short songs with words in three dialects."""
    root = tmp_path / "songs"
    for index, name in enumerate(["a/one.wav", "b/two.flac", "03 - three.wav"]):
        write(root / name, noise(0.5 + 0.1 * index, seed=index), 48_000)
        os.utime(root / name, (1e9, 1e9))  # not just now
    words(root / "a/one.caption.txt", "a calm piano piece")
    words(root / "a/one.lyrics.txt", "[Verse]\nhello world")
    words(root / "a/one.json", json.dumps({"bpm": 120, "keyscale": "C major", "timesignature": "4", "language": "en"}))
    words(root / "b/two.txt", "caption: a loud song\ngenre: rock\nlyrics:\nla la")
    return root


@pytest.fixture
def loads(monkeypatch):
    """Names of the models that get loaded."""
    loaded = []
    for part in ("vae", "text_encoder", "condition_encoder"):
        load = getattr(Checkpoint, f"load_{part}")
        monkeypatch.setattr(
            Checkpoint,
            f"load_{part}",
            lambda *args, part=part, load=load, **kw: loaded.append(part) or load(*args, **kw),
        )
    return loaded


def noise(seconds, seed=0, rate=48_000):
    return np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), 2)).astype(np.float32)


def words(path, text):
    path.write_text(text, encoding="utf-8")


def read(config):
    folder = Path(config.dataset_dir)
    info, records = read_manifest(folder)
    return info, {record.audio: record for record in records}, folder


# latents


@pytest.mark.parametrize("num_samples", [int(key) for key in GOLDEN["tiling_15s_chunks"]] + [1_920, 719_999])
def test_tiles_give_the_latents_of_the_whole_song_and_lose_no_frame(vae, num_samples):
    audio = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(0)) * 0.1
    latents = encode_latents(vae, audio, tile_seconds=15, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        whole = vae.encode(audio[None]).latent_dist.sample(torch.Generator().manual_seed(7))[0].T
    assert latents.shape == (num_samples // 1_920, 64)
    torch.testing.assert_close(latents, whole, rtol=0, atol=1e-4)


def test_the_length_of_tiles_does_not_change_the_latents(vae):
    audio = torch.randn(2, 960_000, generator=torch.Generator().manual_seed(0)) * 0.1
    short, long = (
        encode_latents(vae, audio, tile_seconds=seconds, generator=torch.Generator().manual_seed(7))
        for seconds in (5, 30)
    )
    torch.testing.assert_close(short, long, rtol=0, atol=1e-4)


# the dataset


def test_a_folder_of_songs_becomes_a_dataset(config, songs):
    summary = preprocess(config)
    info, records, folder = read(config)
    assert list(records) == ["03 - three.wav", "a/one.wav", "b/two.flac"]
    assert [record.caption for record in records.values()] == ["three", "a calm piano piece", "a loud song"]
    assert [record.source for record in records.values()] == ["file name", "sidecar", "sidecar"]
    assert [record.num_frames for record in records.values()] == [17, 12, 15]
    assert (info.model_variant, info.num_songs, info.condition_width) == ("base", 3, 64)
    assert info.total_seconds == pytest.approx(44 / 25)
    for record in records.values():
        latents = load_file(folder / record.latents)["latents"]
        assert latents.shape == (record.num_frames, 64)
        assert latents.dtype is torch.float16
        assert record.sound == read_hashed(Path(config.audio_dir) / record.audio)[1]
    parts = {"lyrics", "instrumental", "reference", "caption", "genre"}
    assert set(load_file(folder / records["b/two.flac"].conditions)) == parts
    lines = summary.lines()
    assert lines[0] == f"3 songs in {folder}: 3 encoded now, 0 unchanged"
    assert lines[1].endswith("44 latent frames; captions: 2 from sidecar, 1 from file name")
    places = f"dataset_dir={folder} model_variant=base adapter=lokr checkpoint_dir={config.checkpoint_dir}"
    assert lines[-1] == f"next: python -m sidestep.train {places}"


@pytest.mark.parametrize(
    "name", ["my data=1, x", 'the "best" [of]', "it's", "caf\u00e9", "back\\slash\\", "1e3", "plain"]
)
def test_the_next_command_can_be_pasted(name):
    summary = PreprocessSummary(dataset_dir=Path(name), model_variant="base", checkpoint_dir=name)
    *_, command = summary.lines()
    overrides = shlex.split(command.removeprefix("next: python -m sidestep.train "))
    config = train_config(*overrides)
    assert (config.dataset_dir, config.checkpoint_dir) == (name, name)


def test_the_next_command_leaves_out_what_is_the_default():
    summary = PreprocessSummary(dataset_dir=Path("data"), model_variant="base", checkpoint_dir="checkpoints")
    assert summary.lines()[-1] == "next: python -m sidestep.train dataset_dir=data model_variant=base adapter=lokr"


def test_every_format_in_nested_folders_is_encoded(config, tmp_path):
    for index, suffix in enumerate(["wav", "flac", "mp3", "ogg", "opus", "m4a"]):
        write(tmp_path / "songs" / ("x" * (index + 1)) / f"song.{suffix}", noise(0.5, index), 48_000)
    summary = preprocess(config)
    assert len(summary.changed) == 6
    assert not summary.failed


def test_stored_conditions_are_those_of_a_direct_encoding(config, songs, checkpoint):
    preprocess(config)
    _, records, folder = read(config)
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=CPU, dtype=torch.float32)
    text = caption_prompt("a calm piano piece", bpm=120, timesignature="4", keyscale="C major", duration=0)
    lyrics = lyrics_prompt("[Verse]\nhello world", "en")
    expected = encode_condition(
        tokenize(tokenizer, text, 256)[0],
        tokenize(tokenizer, lyrics, 2048)[0],
        text_encoder=text_encoder,
        condition_encoder=checkpoint.load_condition_encoder(device=CPU, dtype=torch.float32),
        silence=checkpoint.silence(),
    )
    parts = load_file(folder / records["a/one.wav"].conditions)
    assert torch.equal(torch.cat([parts["lyrics"], parts["reference"], parts["caption"]]), expected)


def test_each_window_is_told_its_own_lyrics_and_duration(config, songs, checkpoint):
    write(songs / "c.wav", noise(2.5), 48_000)
    words(songs / "c.lrc", "[Verse]\n[00:00.20]early\n[00:01.90]late")
    words(songs / "c.json", '{"repeat": 2, "weight": 0.5, "custom_tag": "zyx"}')
    preprocess(replace(config, window_seconds=1.0))
    info, records, folder = read(config)
    record = records["c.wav"]
    assert info.settings["window_seconds"] == 1
    assert (record.is_timed, record.repeat, record.weight, record.prompts) == (True, 2, 0.5, ["caption", "tag"])
    parts = load_file(folder / record.conditions)
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=CPU, dtype=torch.float32)
    for window, sung in enumerate(["[Verse]\nearly", "", "[Verse]\nlate"]):
        expected = encode_condition(
            tokenize(tokenizer, caption_prompt("zyx", bpm=None, timesignature="", keyscale="", duration=1), 256)[0],
            tokenize(tokenizer, lyrics_prompt(sung, "unknown"), 2048)[0],
            text_encoder=text_encoder,
            condition_encoder=checkpoint.load_condition_encoder(device=CPU, dtype=torch.float32),
            silence=checkpoint.silence(),
        )
        keys = condition_keys(record, "tag", window=window, sings=True)
        assert torch.equal(torch.cat([parts[key] for key in keys]), expected)
    assert not any(key.startswith("window") for key in load_file(folder / records["a/one.wav"].conditions))


def test_a_reference_replaces_silence_and_costs_no_new_latents(config, songs, checkpoint, loads, tmp_path):
    preprocess(config)
    before = read(config)[1]
    loads.clear()
    reference = str(write(tmp_path / "voice.wav", noise(1.2, seed=5), 48_000))
    summary = preprocess(replace(config, reference=reference))
    assert loads == ["vae", "text_encoder", "condition_encoder"]
    assert summary.changed == set(before)
    _, records, folder = read(config)
    references = []
    for name, record in records.items():
        assert record.latents == before[name].latents
        old, new = load_file(folder / before[name].conditions), load_file(folder / record.conditions)
        assert torch.equal(old["lyrics"], new["lyrics"])
        assert torch.equal(old["caption"], new["caption"])
        assert not torch.allclose(old["reference"], new["reference"])
        references.append(new["reference"])
    assert torch.equal(references[0], references[1])
    assert not preprocess(replace(config, reference=reference)).changed


def test_a_song_is_its_own_reference_in_parts(config, songs, checkpoint, monkeypatch):
    """Parts of 0.24 s instead of 10, so that a song of half a second has four."""
    monkeypatch.setattr(sampler, "REFERENCE_FRAMES", 9)
    preprocess(replace(config, reference="song"))
    _, records, folder = read(config)
    record = records["b/two.flac"]
    parts = sampler.reference_parts(record.num_frames)
    assert (record.num_frames, parts, record.num_references) == (15, [(0, 3), (3, 7), (7, 11), (11, 15)], 4)
    latents, stored = load_file(folder / record.latents)["latents"], load_file(folder / record.conditions)
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=CPU, dtype=torch.float32)
    for number, sound in [(None, checkpoint.silence()), *((n, latents[slice(*part)]) for n, part in enumerate(parts))]:
        keys = condition_keys(record, "caption", window=None, sings=True, reference=number)
        expected = encode_condition(
            tokenize(
                tokenizer, caption_prompt("a loud song", bpm=None, timesignature="", keyscale="", duration=0), 256
            )[0],
            tokenize(tokenizer, lyrics_prompt("la la", "unknown"), 2048)[0],
            text_encoder=text_encoder,
            condition_encoder=checkpoint.load_condition_encoder(device=CPU, dtype=torch.float32),
            silence=sound if number is None else reference_frames(sound),
        )
        torch.testing.assert_close(torch.cat([stored[key] for key in keys]), expected, rtol=0, atol=1e-6)


def test_a_song_too_short_for_parts_refers_to_silence(config, songs):
    preprocess(replace(config, reference="song"))
    info, records, _ = read(config)
    assert info.settings["reference"] == "song"
    assert {record.num_references for record in records.values()} == {0}


def test_a_reference_is_ten_seconds_of_each_third():
    latents = torch.arange(6000.0).view(-1, 1).expand(-1, 64)
    frames = reference_frames(latents)[:, 0].tolist()
    assert frames == [*range(875, 1125), *range(2875, 3125), *range(4875, 5125)]
    assert reference_frames(latents[:100]).shape == (750, 64)


def test_a_reference_that_is_no_audio_is_refused(config, songs, tmp_path):
    with pytest.raises(UserError, match=r"reference=gone\.wav must be silence, song, or an audio file: it does not"):
        preprocess(replace(config, reference="gone.wav"))
    words(tmp_path / "text.wav", "no sound")
    with pytest.raises(UserError, match=r"reference=.*text\.wav cannot be used: .* cannot be read as audio"):
        preprocess(replace(config, reference=str(tmp_path / "text.wav")))


def test_every_dialect_reaches_the_text_that_the_model_reads(config, tmp_path):
    root = tmp_path / "songs"
    names = ["acestep", "csv", "jsonl", "folder/hf", "lrc", "side", "tagged", "dataset"]
    for index, name in enumerate(names):
        write(root / f"{name}.flac", noise(0.2, seed=index), 48_000)
    words(root / "acestep.caption.txt", "from acestep")
    words(root / "key_bpm.csv", "File,BPM,Key\ncsv.flac,101,8A\n")
    words(root / "metadata.jsonl", '{"file_name": "jsonl.flac", "text": "from jsonl", "bpm": 102}\n')
    words(root / "folder/metadata.csv", "file_name,text,bpm\nhf.flac,from hf,103\n")
    words(root / "lrc.lrc", "[00:00.01]sung line")
    words(root / "side.txt", "caption: from side\nbpm: 104\nlyrics: side lyrics")
    tags = FLAC(root / "tagged.flac")
    tags.update({"title": "from tags", "bpm": "105"})
    tags.save()
    words(root / "dataset.json", json.dumps([{"filename": "dataset.flac", "caption": "from builder", "bpm": 106}]))
    words(root / "songs.jsonl", '{"audio": "csv.flac", "caption": "from songs", "bpm": 107}\n')
    assert not preprocess(config).failed
    _, records, folder = read(config)
    for name, parts in {
        "acestep": ["# Caption\nfrom acestep\n"],
        "csv": ["# Caption\nfrom songs\n", "- bpm: 107\n", "- keyscale: N/A\n"],
        "jsonl": ["# Caption\nfrom jsonl\n", "- bpm: 102\n"],
        "folder/hf": ["# Caption\nfrom hf\n", "- bpm: 103\n"],
        "lrc": ["# Lyric\nsung line<|endoftext|>"],
        "side": ["# Caption\nfrom side\n", "- bpm: 104\n", "# Lyric\nside lyrics<|endoftext|>"],
        "tagged": ["# Caption\nfrom tags\n", "- bpm: 105\n"],
        "dataset": ["# Caption\nfrom builder\n", "- bpm: 106\n"],
    }.items():
        with safe_open(folder / records[f"{name}.flac"].conditions, framework="pt") as conditions:
            read_by_the_model = "".join(json.loads(conditions.metadata()["texts"]).values())
        for part in parts:
            assert part in read_by_the_model, name


def test_another_tag_costs_only_the_text_encoders(config, songs, loads):
    preprocess(config)
    loads.clear()
    preprocess(replace(config, custom_tag="zyx"))
    assert loads == ["text_encoder", "condition_encoder"]


def test_stored_latents_are_the_same_whatever_the_order_of_songs(config, songs, tmp_path):
    preprocess(config)
    _, records, folder = read(config)
    for name in ("a/one.wav", "b/two.flac"):
        (songs / name).unlink()
    alone = replace(config, dataset_dir=str(tmp_path / "alone"))
    preprocess(alone)
    _, records_alone, folder_alone = read(alone)
    file = records["03 - three.wav"].latents
    assert records_alone["03 - three.wav"].latents == file
    assert torch.equal(load_file(folder / file)["latents"], load_file(folder_alone / file)["latents"])


@pytest.mark.parametrize(("position", "caption"), [("prepend", "zyx, cap"), ("append", "cap, zyx"), ("replace", "zyx")])
def test_the_tag_goes_into_what_the_model_reads_but_not_into_the_record(
    config, tmp_path, position, caption, monkeypatch
):
    write(tmp_path / "songs/x.wav", noise(0.2), 48_000)
    words(tmp_path / "songs/x.caption.txt", "cap")
    seen = []
    monkeypatch.setattr(encode, "tokenize", lambda *args: seen.append(args[1]) or tokenize(*args))
    preprocess(replace(config, custom_tag="zyx", tag_position=TagPosition(position)))
    assert f"\n# Caption\n{caption}\n\n" in seen[0]
    assert read(config)[1]["x.wav"].caption == "cap"


def test_the_genre_ratio_decides_what_a_song_trains_on(config, songs):
    preprocess(replace(config, genre_ratio=100))
    prompts = {name: record.prompt for name, record in read(config)[1].items()}
    assert prompts == {"03 - three.wav": "caption", "a/one.wav": "caption", "b/two.flac": "genre"}
    words(songs / "b/two.json", '{"prompt_override": "caption"}')
    summary = preprocess(replace(config, genre_ratio=100))
    assert read(config)[1]["b/two.flac"].prompt == "caption"
    assert not summary.changed


# running again


def test_a_second_run_loads_no_model_and_changes_no_file(config, songs, loads):
    preprocess(config)
    assert loads == ["vae", "text_encoder", "condition_encoder"]
    before = {path: path.read_bytes() for path in Path(config.dataset_dir).rglob("*") if path.is_file()}
    summary = preprocess(config)
    assert len(loads) == 3
    assert (summary.changed, len(summary.unchanged)) == (set(), 3)
    assert before == {path: path.read_bytes() for path in Path(config.dataset_dir).rglob("*") if path.is_file()}


def test_a_changed_caption_encodes_only_that_songs_words(config, songs, loads):
    preprocess(config)
    before = read(config)[1]
    loads.clear()
    words(songs / "a/one.caption.txt", "a stormy piano piece")
    summary = preprocess(config)
    after = read(config)[1]
    assert loads == ["text_encoder", "condition_encoder"]
    assert summary.changed == {"a/one.wav"}
    assert summary.num_unused_files == 1
    assert after["a/one.wav"].latents == before["a/one.wav"].latents
    assert after["a/one.wav"].conditions != before["a/one.wav"].conditions
    assert after["b/two.flac"] == before["b/two.flac"]


def test_audio_that_did_not_change_is_not_read_again(config, songs, monkeypatch):
    hashed = []

    def noted(path):
        if path.suffix != ".safetensors":  # what it writes is hashed too
            hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(encode, "sha256_of", noted)
    preprocess(config)
    assert sorted(hashed) == ["03 - three.wav", "one.wav", "two.flac"]
    hashed.clear()
    write(songs / "a/one.wav", noise(0.5, seed=9), 48_000)  # just now, so that another change might look the same
    assert preprocess(config).changed == {"a/one.wav"}
    assert not preprocess(config).changed
    assert hashed == ["one.wav", "one.wav"]
    words(Path(config.dataset_dir) / encode.HASHES, '{"x": [1]')
    assert not preprocess(config).changed


def test_prompts_that_are_the_same_are_encoded_once(config, tmp_path, monkeypatch):
    write(tmp_path / "songs/x.wav", noise(3.2), 48_000)
    words(tmp_path / "songs/x.lrc", "[00:00.10]only line")
    seen = []
    monkeypatch.setattr(encode, "tokenize", lambda *args: seen.append(args[1]) or tokenize(*args))
    preprocess(replace(config, window_seconds=1.0))
    assert len(seen) == len(set(seen)) == 4  # of both durations, the line, and none for the other windows
    _, records, folder = read(config)
    parts = load_file(folder / records["x.wav"].conditions)
    assert torch.equal(parts["window.1.lyrics"], parts["instrumental"])
    assert not torch.equal(parts["window.0.lyrics"], parts["window.1.lyrics"])


def test_changed_audio_encodes_only_that_song(config, songs, loads):
    preprocess(config)
    before = read(config)[1]
    loads.clear()
    write(songs / "a/one.wav", noise(0.5, seed=9), 48_000)
    summary = preprocess(config)
    after = read(config)[1]
    assert loads == ["vae"]  # as long as before, so that its words are the same
    assert summary.changed == {"a/one.wav"}
    assert after["a/one.wav"].latents != before["a/one.wav"].latents


def test_the_silence_that_all_songs_refer_to_is_encoded_once(config, songs, monkeypatch):
    encoded = []
    encode_reference = encode.encode_reference
    monkeypatch.setattr(encode, "encode_reference", lambda *args: encoded.append(args) or encode_reference(*args))
    assert len(preprocess(config).changed) == 3
    assert len(encoded) == 1


def test_a_run_stopped_between_the_passes_goes_on_where_it_was(config, songs, loads, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(encode, "encode_text", fail)
        with pytest.raises(KeyboardInterrupt):
            preprocess(config)
    files = {path.name for path in Path(config.dataset_dir).rglob("*") if path.is_file()} - {".lock", encode.HASHES}
    assert len(files) == 3
    assert all(name.endswith(".safetensors") and not name.startswith(".") for name in files)
    loads.clear()
    assert len(preprocess(config).changed) == 3
    assert loads == ["text_encoder", "condition_encoder"]


def test_what_a_killed_process_left_is_cleared_and_that_of_one_at_work_on_a_part_is_not(config, songs):
    folder = Path(config.dataset_dir)
    for part in ("latents", "shards"):
        (folder / part).mkdir(parents=True)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    for name in ("latents/.x.safetensors", ".songs.jsonl", ".dataset_info.json"):
        for process in (finished.pid, os.getppid()):
            (folder / f"{name}.partial-{_HOST}-{process}").touch()
    preprocess(config)
    assert {path.rpartition("-")[2] for path in map(str, folder.rglob(".*partial*"))} == {str(os.getppid())}
    assert len(list(folder.rglob(".*partial*"))) == 3
    (folder / "shards").rmdir()  # so nobody else can be at work
    preprocess(config)
    assert list(folder.rglob(".*partial*")) == []


def test_a_damaged_file_is_made_again_with_a_line_that_names_it(config, songs, loads, caplog):
    preprocess(config)
    _, records, folder = read(config)
    record = records["a/one.wav"]
    before = {file: (folder / file).read_bytes() for file in (record.latents, record.conditions)}
    (folder / record.latents).write_bytes(before[record.latents][:-10])
    (folder / record.conditions).write_bytes(b"")
    words(folder / "dataset_info.json", "{}")
    loads.clear()
    summary = preprocess(config)
    assert summary.changed == {"a/one.wav"}
    assert loads == ["vae", "text_encoder", "condition_encoder"]
    assert {file: (folder / file).read_bytes() for file in before} == before
    for file in before:
        assert f"{folder / file} is damaged" in caplog.text


@pytest.mark.parametrize("part", ["latents", "conditions"])
def test_a_file_that_can_be_read_but_is_not_what_was_written_is_named_before_training(config, songs, part):
    preprocess(config)
    preprocess(config)  # which notes no other hashes
    folder = Path(config.dataset_dir)
    dataset = SongDataset(folder, max_seconds=4, seed=0)
    file = folder / getattr(dataset.songs[0], part)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # one bit of a number
    file.write_bytes(content)
    preprocess(config)  # which does not take the damage for what was encoded
    with pytest.raises(UserError, match=rf"{file.name} of .* was changed since it was written \(its hash differs\)"):
        dataset.check_tensors()
    file.unlink()
    preprocess(config)
    SongDataset(folder, max_seconds=4, seed=0).check_tensors()


def test_a_song_that_changes_between_hashing_and_decoding_is_refused(config, songs, monkeypatch):
    path = Path(config.audio_dir) / "a/one.wav"
    read = encode.read_hashed

    def change_meanwhile(song, *arguments):
        if song == path:
            os.utime(path, ns=(0, 0))
        return read(song, *arguments)

    monkeypatch.setattr(encode, "read_hashed", change_meanwhile)
    summary = preprocess(config)
    assert summary.failed["a/one.wav"] == f"{path} changed while it was read; type the same command again"
    assert len(read_manifest(Path(config.dataset_dir))[1]) == len(summary.changed)


def test_a_song_is_not_its_own_reference(config, songs):
    path = Path(config.audio_dir) / "a/one.wav"
    with pytest.raises(UserError, match=r"reference=.*one\.wav is the song a/one\.wav itself"):
        preprocess(replace(config, reference=str(path)))


def test_the_next_song_is_read_while_one_is_encoded(config, songs, monkeypatch):
    began, read, encoded = threading.Event(), encode.read_hashed, encode.encode_latents
    seen = []

    def reading(path, *arguments):
        seen.append(path)
        if len(seen) == 2:
            began.set()
        return read(path, *arguments)

    def encoding(*arguments, **named):
        assert began.wait(10)  # of the first song, the second one's reading
        return encoded(*arguments, **named)

    monkeypatch.setattr(encode, "read_hashed", reading)
    monkeypatch.setattr(encode, "encode_latents", encoding)
    assert len(preprocess(config).changed) == len(seen) >= 2


def test_a_song_that_cannot_be_encoded_fails_with_its_copies(config, songs, monkeypatch):
    path = Path(config.audio_dir) / "a/one.wav"
    shutil.copyfile(path, path.with_name("copy.wav"))

    def fail(song, *arguments):
        raise UserError(f"{song} cannot be read")

    monkeypatch.setattr(encode, "read_hashed", fail)
    monkeypatch.setattr(encode, "_refuse_at_once", lambda *arguments: [])
    with pytest.raises(UserError, match="cannot be read"):
        preprocess(config)


def test_a_named_pipe_among_the_songs_is_refused_instead_of_waited_for(config, songs):
    os.mkfifo(Path(config.audio_dir) / "pipe.wav")
    with pytest.raises(UserError, match=r"pipe\.wav is not a regular file"):
        preprocess(config)


def test_a_dataset_is_not_written_over_a_persons_own_songs_jsonl(config, songs, loads):
    own = songs / "songs.jsonl"
    words(own, json.dumps({"audio": "03 - three.wav", "caption": "mine"}) + "\n")
    before = own.read_bytes()
    elsewhere = songs.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "songs.jsonl").symlink_to(own)
    for changed, message in [
        ({"dataset_dir": str(songs)}, "is audio_dir, the folder of the songs"),
        ({"dataset_dir": str(songs), "audio_dir": str(songs / "a")}, r"holds a songs\.jsonl that preprocessing did"),
        ({"dataset_dir": str(elsewhere), "metadata_file": str(own)}, "would be written over metadata_file="),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(replace(config, **changed))
    assert own.read_bytes() == before
    assert loads == []
    assert not (songs / "latents").exists()


@pytest.mark.parametrize("content", ['{"my_ds": {"file_name": "x.json"}}', "[]", "{", None])
def test_a_dataset_is_not_written_over_another_programs_dataset_info(config, songs, loads, content):
    info = Path(config.dataset_dir) / "dataset_info.json"
    info.parent.mkdir()
    if content is None:
        info.symlink_to("gone")
    else:
        words(info, content)
    with pytest.raises(UserError, match=r"holds a dataset_info\.json that preprocessing did not write"):
        preprocess(config)
    assert loads == []
    assert [path.name for path in info.parent.iterdir()] == [info.name]


def test_a_dataset_whose_description_is_damaged_is_described_again(config, songs):
    preprocess(config)
    info = Path(config.dataset_dir) / "dataset_info.json"
    before = info.read_bytes()
    info.write_bytes(before[:-20])
    (info.parent / ".songs.jsonl.partial-othernode-7").touch()
    preprocess(config)
    assert info.read_bytes() == before
    assert list(info.parent.glob(".*.partial-*")) == []


def test_a_dataset_whose_description_a_kill_kept_from_being_written_is_completed(config, songs):
    preprocess(config)
    info = Path(config.dataset_dir) / "dataset_info.json"
    before = info.read_bytes()
    info.unlink()
    preprocess(config)
    assert info.read_bytes() == before


def test_a_second_process_in_the_same_folder_is_refused(config, songs):
    folder = Path(config.dataset_dir)
    folder.mkdir()
    with alone_in(folder), pytest.raises(UserError, match=r"dataset is in use by process \d+ on"):
        preprocess(config)


# what is wrong


def test_a_bad_song_is_named_and_the_rest_go_on(config, songs):
    (songs / "a/noise.wav").write_text("not sound", encoding="utf-8")
    summary = preprocess(config)
    assert list(summary.failed) == ["a/noise.wav"]
    assert len(read(config)[1]) == 3
    assert any(line.startswith("skipped a/noise.wav: ") for line in summary.lines())


def test_audio_that_cannot_be_decoded_is_named_before_any_model_is_loaded(config, songs, loads, caplog, monkeypatch):
    """All of it at once: what is no audio, empty, too short, or cut short."""
    words(songs / "noise.wav", "not sound")
    words(songs / "noise.mp3", "not sound")
    (songs / "empty.flac").touch()
    write(songs / "short.wav", noise(0.05), 48_000)
    for name in ("cut.wav", "cut.ogg", "cut.flac"):
        whole = write(songs / name, noise(2), 48_000).read_bytes()
        (songs / name).write_bytes(whole[: len(whole) // 2])
    bad = {"noise.wav", "noise.mp3", "empty.flac", "short.wav", "cut.wav", "cut.ogg", "cut.flac"}
    named = []
    load = Checkpoint.load_vae
    monkeypatch.setattr(Checkpoint, "load_vae", lambda *args, **kw: named.append(caplog.text) or load(*args, **kw))
    assert preprocess(config).failed.keys() == bad
    assert all(f"{name} is left out: " in named[0] for name in bad)


def test_a_song_with_bad_words_and_a_bad_entry_are_named_and_the_rest_go_on(config, songs, caplog):
    words(songs / "a/one.json", '{"bpm": "fast"}')
    words(songs / "dataset.json", '[{"caption": "whose?"}]')
    summary = preprocess(config)
    assert list(summary.failed) == [f"{songs / 'dataset.json'} entry 1", "a/one.wav"]
    assert len(read(config)[1]) == 2
    assert any(line.startswith("skipped a/one.wav: ") for line in summary.lines())
    assert "a/one.wav is left out: " in caplog.text


def test_nothing_is_encoded_while_lines_of_songs_jsonl_cannot_be_read(config, songs, loads):
    words(songs / "songs.jsonl", '{"audio": "a/one.wav", "caption": "new",}\n{"audio": "03 - three.wav"}\n[]\n')
    with pytest.raises(UserError, match=r"songs\.jsonl line 1: is not JSON.*songs\.jsonl line 3: it must be an object"):
        preprocess(config)
    assert not loads


def test_nothing_is_encoded_while_a_name_in_songs_jsonl_is_mistyped(config, songs, loads):
    words(songs / "songs.jsonl", '{"audio": "a/one.wav", "captoin": "new"}\n{"audio": "tree.wav", "caption": "x"}\n')
    with pytest.raises(UserError) as error:
        preprocess(config)
    assert "songs.jsonl line 1: captoin: there is no such key; there are caption, genre" in str(error.value)
    assert "songs.jsonl line 2: there is no audio file tree.wav" in str(error.value)
    assert not loads


def test_a_song_whose_condition_is_not_finite_is_named_and_the_rest_go_on(config, songs, monkeypatch):
    texts = iter([torch.full((3, 64), torch.nan)])
    monkeypatch.setattr(encode, "encode_text", lambda *args, **kw: next(texts, torch.ones(3, 64)))
    summary = preprocess(config)
    assert list(summary.failed) == ["03 - three.wav"]
    assert list(read(config)[1]) == ["a/one.wav", "b/two.flac"]
    assert (len(summary.changed), len(summary.unchanged)) == (2, 0)


def test_a_full_disk_is_not_taken_for_a_bad_song(config, songs, monkeypatch):
    def fail(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "write_tensors", fail)
    with pytest.raises(UserError, match=r"safetensors cannot be written: .*No space left"):
        preprocess(config)


def test_a_file_name_that_would_break_the_terminal_is_shown_escaped(config, songs):
    write(songs / "a/x\x1b[31m.wav", noise(0.2), 48_000)
    (line,) = [line for line in preprocess(config).lines() if line.startswith("skipped")]
    assert line.startswith(r"skipped a/x\x1b[31m.wav: ")
    assert line.isprintable()


def test_log_lines_do_not_stick_to_the_progress_bar(config, songs, monkeypatch, capsys):
    """The line about a damaged file comes while a bar is on the terminal."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    log = logging.getLogger("sidestep.test")
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        for _ in encode._with_progress(["a", "b"], "encoding"):
            log.warning("a line of its own")
    finally:
        logging.getLogger().removeHandler(handler)
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert lines.count("a line of its own") == 2


def test_a_folder_of_bad_songs_only_is_refused(config, tmp_path):
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs/x.wav").touch()
    with pytest.raises(UserError, match=r"none of the 1 songs can be used: .*x\.wav is empty"):
        preprocess(config)


def test_silent_songs_long_texts_and_missing_files_are_reported_on_every_run(config, tmp_path, caplog):
    root = tmp_path / "songs"
    root.mkdir()
    soundfile.write(root / "quiet.wav", np.zeros((9_600, 2)), 48_000)
    words(root / "quiet.caption.txt", "word " * 500)
    words(root / "dataset.json", json.dumps([{"audio_path": "gone.wav", "caption": "x"}]))
    caplog.set_level("INFO")
    first, second = preprocess(config), preprocess(config)
    for summary in (first, second):
        assert summary.silent == ["quiet.wav"]
        assert summary.truncated["quiet.wav"]["caption"] > 200
        assert f"{root / 'dataset.json'} entry 1: there is no audio file gone.wav" in summary.lines()
    said = [record.getMessage() for record in caplog.records]
    at = said.index(f"{root / 'dataset.json'} entry 1: there is no audio file gone.wav")
    assert at < next(number for number, line in enumerate(said) if line.startswith("encoding audio"))


def test_no_more_of_a_song_is_read_than_asked_for(config, songs):
    preprocess(replace(config, max_song_seconds=0.2))
    assert {record.num_frames for record in read(config)[1].values()} == {5}


def test_a_dataset_folder_that_is_a_file_is_refused(config, songs):
    Path(config.dataset_dir).write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset_dir=.* cannot be written"):
        preprocess(config)
