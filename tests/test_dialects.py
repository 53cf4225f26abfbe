"""Files as other programs really write them, from tests/fixtures/dialects, to the tensors that a run trains on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutagen.flac import FLAC
from mutagen.id3 import ID3, TBPM, TCON, TIT2, TKEY, USLT
from mutagen.mp4 import MP4
from safetensors import safe_open

from sidestep.data.dataset import SongDataset
from sidestep.data.encode import preprocess
from sidestep.data.listing import write_songs
from sidestep.data.songs import SongList, read_songs
from sidestep.data.tables import read_table
from sidestep.errors import UserError
from tests.audio_files import write
from tests.factories import preprocess_config

FIXTURES = Path(__file__).parent / "fixtures/dialects"
SECONDS = 2

NACHTBUS = ["bpm: 122", "keyscale: F minor"]
SMALL_HOURS = ["bpm: 126", "keyscale: Bb minor"]
HOUSE = {
    "Øst & Lind - Nachtbus (Extended Mix).flac": [*NACHTBUS, "genre: Deep House"],
    "Small Hours.wav": [*SMALL_HOURS, "genre: Tech House"],
}
DIALECTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "acestep-builder": (
        "",
        {
            "Low Tide.wav": [
                "caption: hrbr, slow folk ballad, fingerpicked guitar, close female voice", "genre: hrbr, folk, ballad",
                "bpm: 76", "keyscale: D minor", "timesignature: 3", "language: en",
                "lyrics: [Verse 1]\nThe water left the stones\nAnd took the names\n\n[Chorus]\nLow tide, low tide",
            ],
            "Cranes.wav": [
                "caption: hrbr, wide ambient piece, bowed metal, distant machines", "bpm: N/A", "keyscale: N/A",
                "lyrics: [Instrumental]",
            ],
        },
    ),
    "acestep-sidecars": (
        "",
        {
            "Glasshouse.wav": [
                "caption: bright indie pop, jangling guitars, male voice with harmonies", "bpm: 124", "language: en",
                "keyscale: A major", "timesignature: 4",
                "lyrics: [Verse]\nEvery pane a little sun\n\n[Chorus]\nDon't throw stones",
            ],
        },
    ),
    "side-step-sidecars": (
        "",
        {
            "Kilometre.flac": [
                "caption: kmtr, driving synthwave, gated drums, arpeggios", "genre: kmtr, synthwave, electronic",
                "bpm: 108", "keyscale: F# minor", "timesignature: 4", "repeat: 2, weight: 1.0",
                "lyrics: [Verse]\nKilometre after kilometre\nNote: the light stays green",
            ],
        },
    ),
    "rekordbox": ("warm up.txt", HOUSE),
    "traktor": (
        "warm up.nml",
        {
            "01 Nachtbus.flac": [*NACHTBUS, "caption: Nachtbus", "genre: Deep House"],
            "small hours.wav": ["bpm: 126", "keyscale: A minor", "genre: Tech House"],
        },
    ),
    "serato": ("2024-03-09.csv", HOUSE),
    "mixed-in-key": ("warm up.csv", {"01 Nachtbus.flac": NACHTBUS, "small hours.wav": SMALL_HOURS}),
    "mixxx": (
        "warm up.csv",
        {
            "01 Nachtbus.flac": [*NACHTBUS, "genre: Deep House"],
            "sets/small hours.wav": [*SMALL_HOURS, "genre: Tech House"],
        },
    ),
    "key-bpm-csv": ("", {"01 Nachtbus.flac": NACHTBUS, "sets/small hours.wav": SMALL_HOURS}),
    "jsonl": (
        "",
        {
            "takes/one.wav": ["caption: solo cello, dry room", "bpm: 63", "keyscale: G minor", "timesignature: 6"],
            "takes/two.flac": ["caption: string quartet, agitated", "bpm: 148", "lyrics: [Instrumental]"],
        },
    ),
    "audiofolder-csv": (
        "",
        {
            "train/clip_0001.wav": ["caption: a choir, slow, in a church", "genre: choral", "bpm: 58"],
            "train/clip_0002.ogg": ["caption: brass band, marching", "genre: brass", "bpm: 112"],
        },
    ),
    "audiofolder-jsonl": (
        "",
        {
            "train/clip_0001.wav": ["caption: a choir, slow, in a church", "lyrics: Kyrie eleison", "language: la"],
            "train/clip_0002.ogg": ["caption: brass band, marching", "bpm: 112"],
        },
    ),
    "lrc": ("", {"Lanterns.wav": ["lyrics: Lanterns on the river\nOne for every year"]}),
    "songs-jsonl": (
        "",
        {
            "live/Ferry.wav": [
                "caption: frry, acoustic duo, crowd noise", "bpm: 84", "keyscale: C major", "timesignature: 4",
                "lyrics: Slow ferry\nSlow bell", "language: en", "repeat: 3, weight: 0.5",
            ],
        },
    ),
    "tags": (
        "",
        {
            f"{name}": [
                "caption: Nachtbus", "genre: Deep House", *NACHTBUS, "lyrics: One more stop\nOne more light",
            ]
            for name in ("id3.mp3", "vorbis.flac", "atoms.m4a")
        },
    ),
}  # fmt: skip
"""Folder -> the table to name, if it is not found by itself, and what the model is to be told about each song."""


def noise(name: str) -> np.ndarray:
    generator = np.random.default_rng(sum(name.encode()))
    return (0.1 * generator.standard_normal((round(SECONDS * 44_100), 2))).astype(np.float32)


def write_tags(root: Path) -> None:
    """Give the songs of "tags" what music programs write into files; text fixtures cannot hold it."""
    lyrics = "One more stop\nOne more light"
    id3 = ID3()
    for frame in (TIT2(text="Nachtbus"), TCON(text="Deep House"), TBPM(text="121.98"), TKEY(text="Fm")):
        id3.add(frame)
    id3.add(USLT(lang="eng", text=lyrics))
    id3.save(root / "id3.mp3")
    flac = FLAC(root / "vorbis.flac")
    flac.update({"TITLE": "Nachtbus", "GENRE": "Deep House", "BPM": "121.98", "INITIALKEY": "4A", "LYRICS": lyrics})
    flac.save()
    atoms = MP4(root / "atoms.m4a")
    atoms["\xa9nam"], atoms["\xa9gen"], atoms["\xa9lyr"], atoms["tmpo"] = "Nachtbus", "Deep House", lyrics, [122]
    atoms["----:com.apple.iTunes:initialkey"] = b"Fm"
    atoms.save()


def told_to_the_model(conditions: Path) -> set[str]:
    """What stands in the texts of a condition, as "key: value"; of the genre's text, only the genre."""
    with safe_open(conditions, framework="pt") as file:
        texts = json.loads(file.metadata()["texts"])
    told = set()
    for key in {"caption", "genre"} & texts.keys():
        words = texts[key].partition("# Caption\n")[2]
        told.add(f"{key}: {words.partition(chr(10) * 2)[0]}")
        told |= {line.removeprefix("- ") for line in words.splitlines() if line.startswith("- ")}
    language, _, lyrics = texts["lyrics"].partition("# Languages\n")[2].partition("\n\n# Lyric\n")
    return told | {f"language: {language}", f"lyrics: {lyrics.removesuffix('<|endoftext|>')}"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, checkpoint_dir) -> SongDataset:
    """All dialects, each read in a folder of its own, as one dataset: to preprocess each by itself takes minutes."""
    root = tmp_path_factory.mktemp("dialects")
    songs = []
    for dialect, (table, expected) in DIALECTS.items():
        folder = root / "songs" / dialect
        if dialect != "tags":
            shutil.copytree(FIXTURES / dialect, folder)
        for name in expected:
            write(folder / name, noise(name))
        if dialect == "tags":
            write_tags(folder)
        listing = read_songs(folder, metadata_file=folder / table if table else None)
        assert not listing.failed, listing.failed
        songs += [replace(song, name=f"{dialect}/{song.name}") for song in listing.songs]
    write_songs(root / "songs" / "songs.jsonl", SongList(songs=songs, tag_position="prepend", genre_ratio=0))
    typed = (f"audio_dir={root / 'songs'}", f"dataset_dir={root / 'dataset'}", f"checkpoint_dir={checkpoint_dir}")
    assert not preprocess(preprocess_config(*typed)).failed
    return SongDataset(root / "dataset", max_seconds=SECONDS, seed=0)


def test_every_folder_of_fixtures_is_a_dialect_that_is_tested():
    assert {path.name for path in FIXTURES.iterdir()} | {"tags"} == DIALECTS.keys()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_goes_from_its_files_to_tensors(dialect, dataset):
    expected = DIALECTS[dialect][1]
    numbers = {song.audio: number for number, song in enumerate(dataset.songs)}
    assert {name.partition("/")[2] for name in numbers if name.startswith(f"{dialect}/")} == expected.keys()
    for name, words in expected.items():
        number = numbers[f"{dialect}/{name}"]
        song = dataset.songs[number]
        told = told_to_the_model(dataset.folder / song.conditions) | {f"repeat: {song.repeat}, weight: {song.weight}"}
        assert set(words) <= told, told
        example = dataset.excerpt(number, 0, song.num_frames)
        assert example.latents.shape == (pytest.approx(SECONDS * 25, abs=4), 64)  # a lossy coder pads what it encodes
        assert len(example.condition) > 1
        assert torch.isfinite(example.latents).all()
        assert torch.isfinite(example.condition).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not XML"),
        ("<NML><COLLECTION>", "it is not XML"),
        ("<DJ_PLAYLISTS/>", "it begins with <DJ_PLAYLISTS>, not with <NML>"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><NML/>', "it declares a document type"),
    ],
)
def test_an_nml_file_that_is_no_playlist_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "x.nml").write_text(text)
    with pytest.raises(UserError, match=rf"x\.nml is not a playlist of Traktor: {reason}"):
        read_table(tmp_path / "x.nml")
