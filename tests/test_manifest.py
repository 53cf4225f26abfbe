from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.data.dataset import SongDataset
from sidestep.data.manifest import DatasetInfo, SongRecord, parse_cuts, read_manifest, write_manifest
from sidestep.errors import UserError


@pytest.fixture
def dataset_copy(dataset_dir, tmp_path):
    """A dataset that a test may damage."""
    return shutil.copytree(dataset_dir, tmp_path / "data")


def edit_song(folder, **values):
    path = folder / "songs.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | values), *rest]) + "\n", encoding="utf-8")


def edit_info(folder, **values):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": "x"}, "num_frames must be int, found 'x'"),
        ({"num_frames": True}, "num_frames must be int, found True"),
        ({"bpm": 1.5}, "bpm must be int or null, found 1.5"),
        ({"repeat": 0}, "line 1: repeat must be at least 1"),
        ({"weight": -1.0}, "line 1: .*weight a number above 0"),
        ({"prompt": "genre"}, "line 1: .*prompt one of prompts"),
        ({"prompts": ["caption", "mood"]}, "line 1: prompts must be of caption, genre, tag"),
        ({"prompts": ["caption", ["x"]]}, "line 1: prompts must be of caption, genre, tag"),
        ({"num_references": 10**9}, r"line 1: num_references is 1e\+09, and a song of \d+ frames has 0 or 0"),
        ({"audio": None}, "audio must be str, found None"),
        ({"tempo": 3}, "cannot be understood: .*unexpected keyword argument 'tempo'"),
        ({"latents": "/etc/passwd"}, "'/etc/passwd' is no file of the dataset folder"),
        ({"latents": "latents/../../x"}, "is no file of the dataset folder"),
        ({"conditions": "x" * 5_000}, "'x{60}' is no file of the dataset folder"),
        ({"conditions": "a\0b"}, "is no file of the dataset folder"),
    ],
)
def test_a_song_with_a_value_of_the_wrong_kind_is_refused_by_line_and_key(dataset_copy, values, message):
    edit_song(dataset_copy, **values)
    with pytest.raises(UserError, match=rf"songs\.jsonl.*{message}.*again") as error:
        SongDataset(dataset_copy, max_seconds=2, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": {}}, "settings has no list custom_tags"),
        ({"settings": {"custom_tags": 3}}, "settings has no list custom_tags"),
        ({"settings": {"custom_tags": [], "window_seconds": "x"}}, "settings has window_seconds 'x'"),
        ({"settings": []}, r"settings must be dict, found \[\]"),
        ({"fingerprints": None}, "fingerprints must be dict, found None"),
        ({"condition_width": "64"}, "condition_width must be int, found '64'"),
        ({"format": 1}, "has format 1; this sidestep reads format 2"),
    ],
)
def test_a_description_with_a_value_of_the_wrong_kind_is_refused_by_key(dataset_copy, values, message):
    edit_info(dataset_copy, **values)
    with pytest.raises(UserError, match=rf"dataset_info\.json:? {message}"):
        read_manifest(dataset_copy)


@pytest.mark.parametrize("name", ["songs.jsonl", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff\xfe", b"{"])
def test_a_file_that_is_no_description_is_refused_by_name(dataset_copy, name, content):
    (dataset_copy / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*again"):
        read_manifest(dataset_copy)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("latents", torch.zeros(60, 63), r"holds \(50, 63\) torch.float32, not rows of 64"),
        ("latents", torch.zeros(60), r"holds \(\d+,\) torch.float32"),
        ("latents", torch.tensor(1.0), "cannot be read"),
        ("latents", torch.zeros(60, 64, dtype=torch.int64), r"holds \(50, 64\) torch.int64, not rows of 64"),
        ("latents", torch.full((60, 64), torch.inf), "holds NaN or infinity"),
        ("latents", torch.zeros(0, 64), "is shorter than the 60 frames"),
        ("caption", torch.zeros(5, 63), r"holds \(5, 63\) torch.float32, not rows of 64"),
        ("caption", torch.full((5, 64), torch.nan), "holds NaN or infinity"),
        ("caption", torch.zeros(0, 64), "holds no tokens"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_by_name(dataset_copy, part, tensor, message):
    file = {"latents": "latents", "caption": "conditions"}[part] + "/song0.safetensors"
    whole = load_file(dataset_copy / file)
    save_file(whole | {part: tensor}, dataset_copy / file)
    dataset = SongDataset(dataset_copy, max_seconds=2, seed=0)
    position = next(position for position in range(4) if dataset.order[position] == 0)
    with pytest.raises(UserError, match=rf"{file} of song0\.wav {message}.*again"):
        dataset[position]


@pytest.mark.parametrize("text", ["[]", '{"lyrics": "many"}', "{", '{"a": true}', "null"])
def test_what_is_no_count_of_cut_words_is_refused(text):
    with pytest.raises(ValueError, match=r"found|Expecting"):
        parse_cuts(text)
    assert parse_cuts('{"lyrics": 7}') == {"lyrics": 7}


def test_a_whole_number_of_seconds_is_a_number_of_seconds(dataset_copy):
    edit_info(dataset_copy, total_seconds=3)
    assert read_manifest(dataset_copy)[0].total_seconds == 3


def test_a_hundred_thousand_songs_would_be_read_in_a_second(tmp_path):
    """20,000 in a fifth of it, in CPU time; line by line it would be three times that."""
    songs = [
        SongRecord(
            audio=f"album/{i}.flac", latents=f"latents/{i:064x}.safetensors", caption="calm piano, soft drums", bpm=90,
            conditions=f"conditions/{i:064x}.safetensors", prompt="caption", num_frames=3000 + i % 4000,
        )
        for i in range(20_000)
    ]  # fmt: skip
    info = DatasetInfo(model_variant="base", condition_width=64, fingerprints={}, settings={"custom_tags": []})
    write_manifest(tmp_path, info, songs)
    started = time.process_time()
    _, read = read_manifest(tmp_path)
    assert time.process_time() - started < 0.3
    assert read == songs
