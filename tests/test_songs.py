from __future__ import annotations

import json

import pytest

from sidestep.data.songs import caption_from_name, read_songs
from sidestep.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder in which files are made by name; audio files may be empty, since only their words are read."""
    root = tmp_path / "songs"

    def make(files):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return root

    return make


def only_song(root, **settings):
    (song,) = read_songs(root, **settings).songs
    return song


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("01 - My_song.wav", "My song"),
        ("03. Night_drive.flac", "Night drive"),
        ("07_intro.mp3", "intro"),
        ("02 Blue.wav", "Blue"),
        ("99 Luftballons.wav", "99 Luftballons"),
        ("1999.wav", "1999"),
        ("01.wav", "01"),
    ],
)
def test_a_song_without_words_is_captioned_by_its_file_name(folder, name, caption):
    song = only_song(folder({name: ""}))
    assert (song.caption, song.source, song.is_instrumental, song.language) == (caption, "file name", True, "unknown")
    assert caption_from_name(song.path) == caption


def test_ace_steps_sidecars_are_read(folder):
    root = folder(
        {
            "a/x.wav": "",
            "a/x.caption.txt": "\ufeffa calm piano piece\r\n",
            "a/x.lyrics.txt": "[Verse]\r\nhello\tworld\r\n",
            "a/x.json": {
                "bpm": "119.6",
                "keyscale": "C major",
                "timesignature": "4/4",
                "language": "en",
                "duration": 9,
            },
        }
    )
    song = only_song(root)
    assert song.name == "a/x.wav"
    assert (song.caption, song.lyrics, song.source) == ("a calm piano piece", "[Verse]\nhello\tworld", "sidecar")
    assert (song.bpm, song.keyscale, song.timesignature, song.language) == (120, "C major", "4", "en")
    assert not song.is_instrumental


def test_a_txt_of_side_step_is_read_by_its_keys(folder):
    text = (
        "caption: a slow song:\nwith two lines\ngenre: pop, soul\nbpm: 90\nkey: A minor\nsignature: 3\n"
        "title: not a key of ours\nis_instrumental: false\nprompt_override: genre\nlyrics:\n"
        "[Verse: loud]\nHe said: go\n\nkey: to my heart\n"
    )
    song = only_song(folder({"x.wav": "", "x.txt": text}))
    assert song.caption == "a slow song:\nwith two lines"
    assert (song.genre, song.bpm, song.keyscale, song.timesignature) == ("pop, soul", 90, "A minor", "3")
    assert song.lyrics == "[Verse: loud]\nHe said: go\n\nkey: to my heart"
    assert (song.prompt, song.source) == ("genre", "sidecar")


def test_a_key_that_is_not_a_songs_is_noted_wherever_it_stands(folder):
    root = folder({"x.wav": "", "x.txt": "title: Foo\n\ncaption: x\nbpm: 90\nalbum: Bar\nlyrics: la\n"})
    listing = read_songs(root)
    (song,) = listing.songs
    assert (song.caption, song.bpm, song.lyrics) == ("x", 90, "la")
    assert listing.notes == [f"not used from {root / 'x.txt'}: title: Foo, album: Bar"]


def test_keys_of_json_that_are_not_used_are_named_once(folder):
    words = {"file_name": "x.wav", "captoin": "x", "duration": 3}
    root = folder({"x.wav": "", "y.wav": "", "x.json": words, "y.json": words, "metadata.jsonl": words})
    root = folder({"dataset.json": [{"filename": "x.wav", "tempa": 90}, {"filename": "y.wav", "tempa": 90}]})
    assert read_songs(root).notes == [
        f"not used from {root / 'dataset.json'}: tempa",
        f"not used from {root / 'metadata.jsonl'}: captoin, duration",
        "keys of JSON files beside songs that are not used: captoin",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[Verse]\nShe said: caption: me",
        "Key: to my heart\nDoor: to my soul\n\n[Chorus]\ncaption: me",
        "Language: of love\nRepeat: after me",
        "BPM: of my heart",
    ],
)
def test_a_txt_without_keys_is_lyrics_alone(folder, text):
    song = only_song(folder({"my_x.wav": "", "my_x.txt": f"{text}\n"}))
    assert (song.lyrics, song.caption, song.source) == (text, "my x", "file name")
    assert (song.keyscale, song.language, song.bpm) == ("", "unknown", None)


@pytest.mark.parametrize("above", ["# my notes", "---", "a slow song"])
def test_keys_that_stand_in_lyrics_are_noted(folder, above):
    root = folder({"x.wav": "", "x.txt": f"{above}\ncaption: slow\nbpm: 100\n"})
    assert read_songs(root).notes == [
        f"{root / 'x.txt'} does not begin with a key, so all of it is lyrics, even caption: slow, bpm: 100"
    ]


def test_files_beside_a_song_may_be_in_any_case_and_only_its_own_count(folder):
    root = folder(
        {"Song.WAV": "", "Song.TXT": "caption: upper\nbpm: 90", "Song.Lyrics.txt": "la", "song.json": {"bpm": 80}}
    )
    song = only_song(root)
    assert (song.caption, song.bpm, song.lyrics) == ("upper", 90, "la")


@pytest.mark.parametrize("mark", ["[Instrumental]", "[instrumental]", "[INSTRUMENTAL]\n"])
def test_the_mark_of_an_instrumental_is_one_in_any_case(folder, mark):
    song = only_song(folder({"x.wav": "", "x.lyrics.txt": mark}))
    assert (song.lyrics, song.is_instrumental, song.says_instrumental) == ("", True, True)


def test_a_language_that_is_no_code_is_noted(folder):
    root = folder({"x.wav": "", "y.wav": "", "x.json": {"language": "English"}, "y.json": {"language": "yue"}})
    assert read_songs(root).notes == [
        "ACE-Step knows languages by codes such as en, and these are none: English of x.wav"
    ]


@pytest.mark.parametrize(
    ("key", "spelt"),
    [
        ("C major", "C major"), ("f# minor", "F# minor"), ("Bb", "Bb major"), ("A-flat major", "Ab major"),
        ("Am", "A minor"), ("D \u266d minor", "Db minor"),
    ],
)  # fmt: skip
def test_a_txt_may_hold_nothing_but_the_key(folder, key, spelt):
    song = only_song(folder({"x.wav": "", "x.txt": f"key: {key}\n"}))
    assert (song.keyscale, song.lyrics) == (spelt, "")


def test_only_what_can_be_a_keys_value_ends_the_lyrics(folder):
    text = "caption: c\nlyrics: la\nKey: to my heart\nLanguage: of love\nbpm: 90"
    song = only_song(folder({"x.wav": "", "x.txt": text}))
    assert (song.lyrics, song.bpm, song.keyscale) == ("la\nKey: to my heart\nLanguage: of love", 90, "")


def test_a_mistake_in_a_txt_is_named_by_its_line(folder):
    root = folder({"x.wav": "", "x.txt": "\ncaption: one\ntwo\nbpm: fast\nlyrics: la\n"})
    assert f"{root / 'x.txt'} line 4: bpm must be" in read_songs(root).failed["x.wav"]


@pytest.mark.parametrize("value", [0, 0.0, "0.00", "000", "0,0", "-", "N/A", " "])
def test_a_tempo_that_nobody_measured_is_none(folder, value):
    assert only_song(folder({"x.wav": "", "x.json": {"bpm": value}})).bpm is None


def test_only_the_value_that_counts_can_fail_a_song(folder):
    root = folder(
        {
            "x.wav": "",
            "x.json": {"bpm": 120},
            "y.wav": "",
            "y.json": {"bpm": "fast"},
            "dataset.json": [{"filename": "x.wav", "bpm": "fast"}, {"filename": "y.wav", "bpm": 120}],
        }
    )
    listing = read_songs(root)
    assert [(song.name, song.bpm) for song in listing.songs] == [("x.wav", 120)]
    assert list(listing.failed) == ["y.wav"]
    (note,) = listing.notes
    assert note.startswith("cannot be used, but something nearer to the song says it right: ")
    assert "dataset.json entry 1 of x.wav: bpm must be" in note


def test_a_key_that_is_none_is_noted_in_a_table_and_a_mistake_beside_a_song(folder):
    root = folder({"x.wav": "", "y.wav": "", "y.json": {"keyscale": "Off-Key"}})
    folder({"metadata.csv": "file_name,key\nx.wav,All\n"})
    listing = read_songs(root)
    assert [(song.name, song.keyscale) for song in listing.songs] == [("x.wav", "")]
    assert listing.failed["y.wav"].endswith(
        """keyscale must be a key such as "C major" or "F# minor", it is 'Off-Key'"""
    )
    assert "metadata.csv line 2 of x.wav: keyscale must be" in listing.notes[0]


@pytest.mark.parametrize(
    ("bad", "right", "lyrics"),
    [({"sections": "x"}, {"lyrics": "la"}, "la"), ({"lyrics": 3}, {"sections": [{"start": 1, "lyrics": "li"}]}, "li")],
)
def test_lyrics_and_sections_take_the_place_of_each_other(folder, bad, right, lyrics):
    root = folder({"x.wav": "", "x.json": right, "dataset.json": [{"filename": "x.wav", **bad}]})
    listing = read_songs(root)
    assert (listing.failed, [song.lyrics for song in listing.songs]) == ({}, [lyrics])
    assert "entry 1 of x.wav" in listing.notes[0]
    folder({"x.json": {**bad, **right}})
    assert list(read_songs(root).failed) == ["x.wav"]


@pytest.mark.parametrize(
    ("value", "bpm"), [("120 bpm", 120), ("119.6BPM", 120), (90.0, 90), ("128,00", 128), ("127,6 BPM", 128)]
)
def test_the_tempo_may_name_its_unit(folder, value, bpm):
    assert only_song(folder({"x.wav": "", "x.json": {"bpm": value}})).bpm == bpm


@pytest.mark.parametrize(("value", "kept"), [(4, "4"), (4.0, "4"), ("3.0", "3"), ("4 / 4", "4"), ("6/8", "6")])
def test_the_numerator_of_a_time_signature_is_kept(folder, value, kept):
    assert only_song(folder({"x.wav": "", "x.json": {"timesignature": value}})).timesignature == kept


@pytest.mark.parametrize("value", [0, "0/4", 4.5, True, "4/", "\u0664"])
def test_a_time_signature_that_is_none_leaves_the_song_out(folder, value):
    listing = read_songs(folder({"x.wav": "", "x.json": {"timesignature": value}, "y.wav": ""}))
    assert "timesignature must be" in listing.failed["x.wav"]
    assert [song.name for song in listing.songs] == ["y.wav"]


ENTRY = {"filename": "x.wav", "caption": "from json", "lyrics": "la", "bpm": 100, "is_instrumental": False}


@pytest.mark.parametrize(
    "content",
    [
        [ENTRY],
        {"samples": [ENTRY]},
        {"metadata": {"name": "mine", "custom_tag": "", "genre_ratio": 0}, "samples": [ENTRY], "num_samples": 1},
    ],
)
def test_every_shape_of_dataset_json_is_read(folder, content):
    song = only_song(folder({"x.wav": "", "dataset.json": content}))
    assert (song.caption, song.lyrics, song.bpm, song.source) == ("from json", "la", 100, "dataset.json")


def test_entries_find_their_song_by_path_or_by_file_name(folder):
    root = folder({"a/x.wav": "", "b/x.wav": "", "c/y.wav": "", "z.wav": ""})
    entries = [
        {"audio_path": str(root / "a/x.wav"), "filename": "x.wav", "caption": "absolute"},
        {"audio_path": "./b/x.wav", "filename": "x.wav", "caption": "relative"},
        {"audio_path": "C:\\music\\y.wav", "caption": "another machine"},
        {"filename": "z.wav", "caption": "name"},
        {"audio_path": "/nowhere/gone.wav", "caption": "gone"},
    ]
    folder({"dataset.json": entries})
    listing = read_songs(root)
    assert [song.caption for song in listing.songs] == ["absolute", "relative", "another machine", "name"]
    assert list(listing.missing.values()) == ["/nowhere/gone.wav"]


def test_a_dataset_json_elsewhere_names_songs_relative_to_itself_or_to_the_songs(folder, tmp_path):
    root = folder({"x.wav": "", "y.wav": ""})
    entries = [{"audio_path": "songs/x.wav", "caption": "one"}, {"audio_path": "y.wav", "caption": "two"}]
    (tmp_path / "words.json").write_text(json.dumps(entries), encoding="utf-8")
    listing = read_songs(root, metadata_file=tmp_path / "words.json")
    assert [song.caption for song in listing.songs] == ["one", "two"]


def test_sidecars_win_over_dataset_json_value_by_value(folder):
    root = folder(
        {
            "x.wav": "",
            "dataset.json": [{"filename": "x.wav", "caption": "far", "bpm": 100, "is_instrumental": True}],
            "x.txt": "caption: nearer\nkey: C major\n",
            "x.json": {"caption": "near", "bpm": None},
            "x.lyrics.txt": "la la",
        }
    )
    song = only_song(root)
    assert (song.caption, song.bpm, song.keyscale, song.lyrics) == ("near", 100, "C major", "la la")
    assert not song.is_instrumental


def test_the_tag_of_the_settings_wins_over_an_entry_and_that_over_the_file(folder):
    root = folder({"x.wav": "", "y.wav": ""})
    metadata = {"custom_tag": "file", "tag_position": "append", "genre_ratio": 100}
    folder({"dataset.json": {"metadata": metadata, "samples": [{"filename": "x.wav", "custom_tag": "entry"}]}})
    listing = read_songs(root)
    assert [song.custom_tag for song in listing.songs] == ["entry", "file"]
    assert (listing.tag_position, listing.genre_ratio) == ("append", 100)
    listing = read_songs(root, custom_tag="mine")
    assert [song.custom_tag for song in listing.songs] == ["mine", "mine"]
    assert (listing.tag_position, listing.genre_ratio) == ("append", 100)
    listing = read_songs(root, tag_position="prepend", genre_ratio=0)
    assert (listing.tag_position, listing.genre_ratio) == ("prepend", 0)


def test_the_genre_ratio_chooses_songs_and_a_songs_own_choice_wins(folder):
    root = folder({f"{n}.wav": "" for n in range(4)})
    words = [{"filename": f"{n}.wav", "caption": "c", "genre": "g"} for n in range(3)]
    words[0]["prompt_override"] = "caption"
    folder({"dataset.json": words})
    listing = read_songs(root, genre_ratio=100)
    assert [song.prompt for song in listing.songs] == ["caption", "genre", "genre", "caption"]
    assert listing.notes == ["chosen by the genre ratio but without a genre, so on their caption: 3.wav"]


def test_words_without_effect_are_noted(folder):
    words = {"is_instrumental": True, "lyrics": "la la", "repeat": 3, "caption": "x"}
    listing = read_songs(folder({"x.wav": "", "x.json": words}))
    assert (listing.songs[0].lyrics, listing.songs[0].repeat) == ("", 3)
    assert listing.notes == [
        "marked instrumental, so their lyrics are not used: x.wav",
    ]


def test_a_tag_position_without_a_tag_is_noted(folder):
    root = folder({"x.wav": ""})
    assert read_songs(root, tag_position="append").notes == [
        "tag_position=append has no effect, because no song has a custom_tag"
    ]
    assert read_songs(root, tag_position="append", custom_tag="zyx").notes == []


def test_a_song_with_bad_words_is_left_out_with_every_mistake_by_file_and_key(folder):
    root = folder(
        {
            "a.wav": "",
            "a.json": {"bpm": "fast", "timesignature": "waltz", "caption": 3, "prompt_override": "both"},
            "b.wav": "",
            "b.lyrics.txt": "la\x1b[31m",
            "c.wav": "",
            "c.json": "{not json",
            "d.wav": "",
            "dataset.json": [{"filename": "d.wav", "bpm": True}],
            "e.wav": "",
            "e.json": {"prompt_override": "genre", "caption": "\ud800"},
            "f.wav": "",
            "g.wav": "",
            "g.json": "[" * 100_000,
        }
    )
    (root / "d.caption.txt").write_bytes(b"caf\xe9")
    listing = read_songs(root)
    assert [song.name for song in listing.songs] == ["f.wav"]
    for name, parts in {
        "a.wav": [
            "a.json: bpm must be a number of beats per minute from 0.5 to 9999, it is 'fast'",
            "a.json: timesignature must be",
            "a.json: caption must be text, it is '3'",
            "a.json: prompt_override must be one of caption, genre, it is 'both'",
        ],
        "b.wav": ["b.lyrics.txt: lyrics must be text without control characters"],
        "c.wav": ["c.json is not JSON"],
        "d.wav": ["dataset.json entry 1 of d.wav: bpm must be", "d.caption.txt cannot be read as UTF-8"],
        "e.wav": [
            "e.wav: prompt_override is genre, but the song has no genre",
            "e.json: caption must be text without control characters",
        ],
        "g.wav": ["g.json is not JSON"],
    }.items():
        assert "\n" not in listing.failed[name]
        assert all(part in listing.failed[name] for part in parts)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"audio_path": "../secret.wav"}, "../secret.wav is outside audio_dir"),
        ({"filename": "x.wav"}, "x.wav could be any of a/x.wav, b/x.wav"),
        ({"audio_path": "good.wav"}, "good.wav is named twice"),
        ({"caption": "whose?"}, "neither audio_path nor filename names a file"),
        ({"filename": "x\0.wav"}, "its file name holds control characters"),
        ("x.wav", "it must be an object"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_and_the_others_are_used(folder, tmp_path, entry, reason):
    root = folder({"a/x.wav": "", "b/x.wav": "", "good.wav": ""})
    folder({"dataset.json": [{"filename": "good.wav", "caption": "good"}, entry]})
    (tmp_path / "secret.wav").touch()
    listing = read_songs(root)
    assert [song.caption for song in listing.songs] == ["x", "x", "good"]
    assert list(listing.failed) == [f"{root / 'dataset.json'} entry 2"]
    assert reason in listing.failed[f"{root / 'dataset.json'} entry 2"]


@pytest.mark.parametrize("name", ["x.caption.txt", "x.lyrics.txt", "x.lrc"])
def test_words_on_a_disk_that_is_not_there_are_missed(folder, name):
    root = folder({"x.wav": ""})
    (root / name).symlink_to(root / "unmounted" / name)
    assert f"{name} leads to no file" in read_songs(root).failed["x.wav"]


@pytest.mark.parametrize("name", ["songs.jsonl", "dataset.json", "metadata.csv"])
def test_a_table_on_a_disk_that_is_not_there_is_missed(folder, name):
    root = folder({"x.wav": ""})
    (root / name).symlink_to(root / "unmounted" / name)
    with pytest.raises(UserError, match=f"{name} leads to no file, and words would be missing"):
        read_songs(root)


def test_names_of_any_length_are_no_fault(folder):
    longest = "x" * 251 + ".wav"
    listing = read_songs(folder({longest: "", "dataset.json": [{"filename": "y" * 5_000}, {"filename": longest}]}))
    assert [song.name for song in listing.songs] == [longest]
    assert list(listing.missing.values()) == ["y" * 200]


@pytest.mark.parametrize("content", [{"songs": []}, "words", {"samples": {}}])
def test_a_dataset_json_of_another_shape_is_refused(folder, content):
    root = folder({"x.wav": "", "dataset.json": json.dumps(content)})
    with pytest.raises(UserError, match=r"dataset\.json .*must be"):
        read_songs(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metadata": {"genre_ratio": 200}, "samples": []}, "genre_ratio must be a whole number from 0 to 100"),
        ("[" * 100_000, r"dataset\.json is not JSON"),
    ],
)
def test_what_is_wrong_for_all_songs_is_refused(folder, content, message):
    with pytest.raises(UserError, match=message):
        read_songs(folder({"x.wav": "", "dataset.json": content}))


def test_a_metadata_file_that_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"metadata_file=.*nonexist\.json is not a file: it does not exist"):
        read_songs(folder({"x.wav": ""}), metadata_file=tmp_path / "nonexist.json")


def test_a_song_named_dataset_has_a_sidecar_like_any_other(folder):
    song = only_song(folder({"dataset.wav": "", "dataset.json": {"caption": "mine", "bpm": 90}}))
    assert (song.caption, song.bpm, song.source) == ("mine", 90, "sidecar")
    folder({"dataset.json": {"samples": [{"filename": "dataset.wav", "caption": "listed"}]}})
    assert only_song(folder({})).source == "dataset.json"


def test_a_huge_caption_is_read_whole(folder):
    assert len(only_song(folder({"x.wav": "", "x.caption.txt": "word " * 20_000})).caption) == 99_999
