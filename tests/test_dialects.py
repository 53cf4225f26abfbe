"""Every dialect of words, as its program writes it, from files to tensors.

``fixtures/dialects/<name>/`` holds the files as they lie beside songs, and ``expected.json``: what they say about each
song. The songs themselves are made here, two seconds each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutagen.flac import FLAC
from mutagen.id3 import ID3, TBPM, TCON, TIT2, TKEY, USLT
from mutagen.mp4 import MP4
from mutagen.oggvorbis import OggVorbis
from safetensors import safe_open
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.prompts import caption_prompt, lyrics_prompt
from sidestep.data.encode import preprocess
from sidestep.data.manifest import read_manifest
from sidestep.data.songs import read_songs
from sidestep.data.tables import read_table
from sidestep.errors import UserError
from tests.audio_files import write
from tests.factories import preprocess_config

DIALECTS = sorted(Path(__file__).parent.glob("fixtures/dialects/*"))
NOTHING = {
    "genre": "", "lyrics": "", "bpm": None, "keyscale": "", "timesignature": "", "language": "unknown",
    "repeat": 1, "weight": 1.0, "estimated": [],
}  # fmt: skip
SECONDS = 2


def noise(seed):
    return np.random.default_rng(seed).normal(0, 0.1, (SECONDS * 8_000, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    """One for all dialects, so that the sound that they share goes through the VAE once, and models are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("load_vae", "load_text_encoder", "load_condition_encoder"):
            patch.setattr(Checkpoint, part, _loading_once(getattr(Checkpoint, part)))
        yield tmp_path_factory.mktemp("dialects") / "dataset"


def _loading_once(load):
    loaded = []

    def load_once(*args, **settings):
        loaded.extend([] if loaded else [load(*args, **settings)])
        return loaded[0]

    return load_once


def check(root, expected, checkpoint_dir, dataset_folder, metadata_file=None):
    """Compare what is read, and the prompts and tensors that become of it, with what the files say."""
    listing = read_songs(root, metadata_file=metadata_file)
    assert not listing.failed
    assert {song.name: {key: getattr(song, key) for key in expected[song.name]} for song in listing.songs} == expected
    typed = [f"audio_dir={root}", f"dataset_dir={dataset_folder}", f"checkpoint_dir={checkpoint_dir}"]
    table = [] if metadata_file is None else [f"metadata_file={metadata_file}"]
    preprocess(preprocess_config(*typed, *table))
    _, records = read_manifest(dataset_folder)
    assert [record.audio for record in records] == list(expected)
    for record in records:
        words = expected[record.audio]
        metas = {key: words[key] for key in ("bpm", "timesignature", "keyscale")}
        with safe_open(dataset_folder / record.conditions, framework="pt") as conditions:
            texts = json.loads(conditions.metadata()["texts"])
            tensors = {key: conditions.get_tensor(key) for key in ("caption", "lyrics")}
        assert texts["caption"] == caption_prompt(words["caption"], **metas, duration=record.num_frames // 25)
        assert texts["lyrics"] == lyrics_prompt(words["lyrics"], words["language"])
        assert all(tensor.isfinite().all() and tensor.shape[1:] == (64,) for tensor in tensors.values())
        latents = load_file(dataset_folder / record.latents)["latents"]
        assert latents.shape == (record.num_frames, 64)
        assert record.num_frames in range(50, 55)  # what encodes m4a pads it
        assert (record.repeat, record.weight) == (words["repeat"], words["weight"])
    return listing


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda path: path.name)
def test_every_dialect_goes_from_files_to_tensors(dialect, tmp_path, checkpoint_dir, dataset_folder):
    told = json.loads((dialect / "expected.json").read_text(encoding="utf-8"))
    expected = {name: {**NOTHING, **words} for name, words in told["songs"].items()}
    root = tmp_path / "songs"
    shutil.copytree(dialect, root, ignore=shutil.ignore_patterns("expected.json"))
    for seed, name in enumerate(expected):
        write(root / name, noise(seed), 8_000)
    table = root / told["metadata_file"] if "metadata_file" in told else None
    listing = check(root, expected, checkpoint_dir, dataset_folder, table)
    assert listing.missing == told.get("missing", [])
    unused = [f"columns of {table} that are not used: {', '.join(told['unused'])}"] if "unused" in told else []
    assert [note for note in listing.notes if "marked instrumental" not in note] == unused


def test_tags_inside_files_go_to_tensors(tmp_path, checkpoint_dir, dataset_folder):
    root = tmp_path / "songs"
    for seed, name in enumerate(["flac.flac", "m4a.m4a", "mp3.mp3", "ogg.ogg", "wav.wav"]):
        write(root / name, noise(seed), 8_000)
    id3 = ID3()
    for frame in (TIT2(text="Blue train"), TCON(text="Blues"), TBPM(text="96"), TKEY(text="Em")):
        id3.add(frame)
    id3.add(USLT(lang="eng", desc="", text="Roll on"))
    id3.save(root / "mp3.mp3")
    for name, kind in (("flac.flac", FLAC), ("ogg.ogg", OggVorbis)):
        tags = kind(root / name)
        tags.update({"title": "Blue train", "genre": "Blues", "bpm": "96", "initialkey": "9A", "lyrics": "Roll on"})
        tags.save()
    mp4 = MP4(root / "m4a.m4a")
    mp4.update({"\xa9nam": "Blue train", "\xa9gen": "Blues", "tmpo": [96], "\xa9lyr": "Roll on"})
    mp4["----:com.apple.iTunes:initialkey"] = b"Em"
    mp4.save()
    words = {
        **NOTHING, "caption": "Blue train", "genre": "Blues", "bpm": 96, "keyscale": "E minor", "lyrics": "Roll on"
    }  # fmt: skip
    expected = {name: words for name in ("flac.flac", "m4a.m4a", "mp3.mp3", "ogg.ogg")}
    check(root, {**expected, "wav.wav": {**NOTHING, "caption": "wav"}}, checkpoint_dir, dataset_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<NML", "is not XML"),
        ("<DJ_PLAYLISTS/>", "begins with 'DJ_PLAYLISTS' and not with NML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><NML/>', "has a DOCTYPE"),
    ],
)
def test_what_is_no_playlist_of_traktor_is_refused(tmp_path, text, message):
    (tmp_path / "x.nml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "x.nml")


def test_a_track_of_traktor_without_a_file_or_a_known_key_is_found_by_its_title(tmp_path):
    entry = '<ENTRY TITLE="Two"><INFO KEY="Am"/><MUSICAL_KEY VALUE="99"/></ENTRY>'
    (tmp_path / "x.nml").write_text(f'<NML><COLLECTION>{entry}<ENTRY TITLE="gone"/></COLLECTION></NML>')
    for name in ("02 - Two.wav", "three.wav"):
        (tmp_path / name).touch()
    listing = read_songs(tmp_path, metadata_file=tmp_path / "x.nml", file_tags=False)
    assert [song.keyscale for song in listing.songs] == ["A minor", ""]
    assert listing.missing == ["gone"]
