"""Tables of songs in every dialect, tags inside files, lyrics with times, and the one form they all become."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mutagen.flac import FLAC
from mutagen.id3 import ID3, SYLT, TBPM, TCON, TIT2, TKEY, TXXX, USLT
from mutagen.mp4 import MP4

from sidestep.data import songs as songs_module
from sidestep.data.listing import list_songs
from sidestep.data.lyrics import parse_lrc, parse_sections, sung_between, untimed
from sidestep.data.songs import read_songs
from sidestep.data.words import spell_key
from sidestep.errors import UserError
from tests.audio_files import write
from tests.factories import songs_config

AUDIO = ("One Love.wav", "live/02 - Two_hearts.flac", "live/three.mp3")
LRC = (
    "[ar:Someone]\n[offset:0]\n[Verse]\n[00:01.00]first <00:01.50>line\n[00:03.50][00:09.5]again\n[Chorus]\n[00:06]high"
)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "songs"

    def make(files=(), audio=AUDIO):
        for name in audio:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        for name, content in dict(files).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make


def words(root, **settings):
    listing = read_songs(root, **settings)
    assert not listing.failed, listing.failed
    return {song.name: song for song in listing.songs}


REKORDBOX = "#\tArtwork\tTrack Title\tArtist\tAlbum\tGenre\tBPM\tRating\tTime\tKey\tDate Added\r\n" \
    "1\t\tOne Love\tBand\tFirst\tHouse\t127.98\t*****\t05:12\tF#m\t2024-01-01\r\n" \
    "2\t\tTwo hearts\tBand\tFirst\tDeep House\t120.00\t\t04:00\t8A\t2024-01-01\r\n"  # fmt: skip
DIALECTS = {
    "key_bpm.csv": "File,Artist,Title,BPM,Key,Camelot\nOne Love.wav,Band,One Love,128,F# minor,11A\n"
    "02 - Two_hearts.flac,Band,Two hearts,120,,8A\n",
    "rekordbox.txt": REKORDBOX.encode("utf-16"),
    "serato.csv": '"name","artist","bpm","key","genre"\n"One Love","Band","128.0","F#m","House"\n'
    '"Two hearts","Band","120","Am","Deep House"\n',
    "mixed_in_key.csv": "File name;Key result;BPM;Energy\nOne Love.wav;11A;127.9;7\n02 - Two_hearts.flac;8A;120;5\n",
    "mixxx.csv": "Artist,Title,BPM,Key,Location\nBand,One Love,128,F♯m,/home/dj/Music/One Love.wav\n"
    "Band,Two hearts,120,Am,file:///home/dj/live/02%20-%20Two_hearts.flac\n",
    "audiofolder.csv": "file_name,text,bpm,key\nOne Love.wav,a love song,128,F# minor\n"
    'live/02 - Two_hearts.flac,"two, hearts",120,A minor\n',
    "words.jsonl": '{"file_name": "One Love.wav", "bpm": 128, "keyscale": "F# minor"}\n\n'
    '{"audio_path": "C:\\\\music\\\\02 - Two_hearts.flac", "tempo": "120 bpm", "key": "Am"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_of_tables_gives_tempo_and_key(folder, tmp_path, name):
    root = folder()
    (tmp_path / name).write_bytes(DIALECTS[name] if isinstance(DIALECTS[name], bytes) else DIALECTS[name].encode())
    songs = words(root, metadata_file=tmp_path / name)
    one, two, three = (songs[name] for name in ("One Love.wav", "live/02 - Two_hearts.flac", "live/three.mp3"))
    assert (one.bpm, one.keyscale) == (128, "F# minor")
    assert (two.bpm, two.keyscale) == (120, "A minor")
    assert (three.bpm, three.keyscale, three.source) == (None, "", "file name")
    if name == "audiofolder.csv":
        assert (one.caption, two.caption, one.source) == ("a love song", "two, hearts", name)
    if name == "rekordbox.txt":
        assert (one.genre, two.genre) == ("House", "Deep House")


def test_the_line_that_tells_excel_the_separator_is_no_head(folder, tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\nFile name;BPM;Key\nOne Love.wav;128,00;8A\nOne Love.wav;90;\n")
    listing = read_songs(folder(), metadata_file=tmp_path / "t.csv")
    (song,) = [song for song in listing.songs if song.name == "One Love.wav"]
    assert (song.bpm, song.keyscale) == (128, "A minor")
    assert list(listing.failed) == [f"{tmp_path / 't.csv'} line 4"]


def test_a_title_finds_its_song_although_no_file_can_be_called_so(folder, tmp_path):
    (tmp_path / "t.csv").write_text('Title,Artist,BPM\n"""Heroes""?",,90\nT.N.T.,AC/DC,91\n!!!,,92\n')
    songs = words(
        folder(audio=("01 - Heroes.wav", "AC_DC - TNT.wav", "AC_DC - T.N.T..wav", "!!!.wav", "+.wav")),
        metadata_file=tmp_path / "t.csv",
    )
    assert [song.bpm for song in songs.values()] == [92, None, 90, 91, None]


@pytest.mark.parametrize("closing", ["", 'Blue 12"', '"Heroes'])
def test_a_title_that_begins_with_a_quote_is_one_line_of_a_dj_table(folder, tmp_path, closing):
    lines = [
        '1\t"Weird Al\tX\t90\t8A',
        "2\tOne Love\tBand\t91\t9A",
        f"3\t{closing}\tY\t92\t10A",
        "4\tthree\tY\t93\t10B",
    ]
    text = "\r\n".join(["#\tTrack Title\tArtist\tBPM\tKey", *lines, ""])
    (tmp_path / "t.txt").write_bytes(text.encode("utf-16"))
    listing = read_songs(folder(audio=('"Weird Al.wav', "One Love.wav", "three.wav")), metadata_file=tmp_path / "t.txt")
    assert {song.name: song.bpm for song in listing.songs} == {'"Weird Al.wav': 90, "One Love.wav": 91, "three.wav": 93}


def test_values_in_quotes_between_tabs_may_take_several_lines(folder, tmp_path):
    (tmp_path / "t.tsv").write_text('file_name\ttext\nOne Love.wav\t"say ""hey""\ntwice"\nlive/three.mp3\tx\n')
    songs = words(folder(), metadata_file=tmp_path / "t.tsv")
    assert [songs[name].caption for name in ("One Love.wav", "live/three.mp3")] == ['say "hey"\ntwice', "x"]


def test_a_quote_that_nothing_ends_swallows_no_songs(folder):
    root = folder({"metadata.csv": 'file_name,text\nOne Love.wav,x\nlive/three.mp3,"warm jazz\nfour.wav,techno\n'})
    with pytest.raises(UserError, match=r'metadata\.csv line 3 has a " that nothing ends'):
        read_songs(root)


def test_a_second_column_of_one_name_erases_nothing(folder, tmp_path):
    (tmp_path / "t.csv").write_text("File,Key,Key\nOne Love.wav,8A,\nlive/three.mp3,,9A\n")
    songs = words(folder(), metadata_file=tmp_path / "t.csv")
    assert (songs["One Love.wav"].keyscale, songs["live/three.mp3"].keyscale) == ("A minor", "E minor")


def test_whole_numbers_that_pandas_wrote_with_a_point_are_read(folder):
    root = folder(
        {"metadata.csv": "file_name,repeat,is_instrumental,bpm\nOne Love.wav,2.0,1.0,90.0\nlive/three.mp3,,,\n"}
    )
    song = words(root)["One Love.wav"]
    assert (song.repeat, song.is_instrumental, song.bpm) == (2, True, 90)


def test_tables_that_a_named_one_replaces_are_noted(folder, tmp_path):
    (tmp_path / "t.csv").write_text("File,BPM\nOne Love.wav,128\n")
    root = folder({"songs.jsonl": '{"audio": "One Love.wav", "bpm": 90}\n'})
    assert read_songs(root, metadata_file=tmp_path / "t.csv").notes == [
        f"metadata_file={tmp_path / 't.csv'} is read in the place of {root / 'songs.jsonl'}"
    ]


def test_columns_that_say_nothing_about_a_song_are_noted(folder, tmp_path):
    (tmp_path / "mik.csv").write_text(DIALECTS["mixed_in_key.csv"])
    assert read_songs(folder(), metadata_file=tmp_path / "mik.csv").notes == [
        f"not used from {tmp_path / 'mik.csv'}: energy"
    ]


def test_tables_are_found_by_name_and_the_nearer_one_wins(folder):
    root = folder(
        {
            "dataset.json": json.dumps([{"filename": "One Love.wav", "caption": "json", "bpm": 100, "genre": "pop"}]),
            "key_bpm.csv": DIALECTS["key_bpm.csv"],
            "metadata.csv": "file_name,text\nOne Love.wav,from csv\nlive/three.mp3,far\n",
            "live/metadata.jsonl": '{"file_name": "three.mp3", "text": "near"}\n',
            "One Love.json": '{"genre": "rock"}',
        }
    )
    songs = words(root)
    one = songs["One Love.wav"]
    assert (one.caption, one.source, one.bpm, one.genre) == ("from csv", "metadata.csv", 128, "rock")
    assert songs["live/three.mp3"].caption == "near"


def test_a_table_of_audiofolder_is_found_in_every_folder_above_its_songs(folder):
    root = folder({"train/metadata.csv": "file_name,text\nwavs/1.wav,deep\n"}, audio=("train/wavs/1.wav",))
    listing = read_songs(root)
    assert [song.caption for song in listing.songs] == ["deep"]
    assert not listing.missing


ALBUMS = ("Album A/01 Intro.wav", "Album B/01 Intro.wav")


@pytest.mark.parametrize("order", [1, -1])
def test_a_path_from_another_machine_finds_the_song_that_shares_most_of_its_end(folder, tmp_path, order):
    lines = [f"/Volumes/Music/{name},{bpm}\n" for name, bpm in zip(ALBUMS, (80, 90), strict=True)]
    (tmp_path / "t.csv").write_text("Location,BPM\n" + "".join(lines[::order]))
    listing = read_songs(folder(audio=ALBUMS), metadata_file=tmp_path / "t.csv")
    assert [song.bpm for song in listing.songs] == [80, 90]
    assert not listing.failed
    assert not listing.missing
    assert not listing.notes


@pytest.mark.parametrize("order", [1, -1])
def test_the_words_of_one_album_are_not_given_to_another_that_has_its_own(folder, tmp_path, order):
    lines = [f"/Volumes/Music/{name},{bpm}\n" for name, bpm in zip(ALBUMS, (80, 90), strict=True)]
    (tmp_path / "t.csv").write_text("Location,BPM\n" + "".join(lines[::order]))
    listing = read_songs(folder(audio=ALBUMS[:1]), metadata_file=tmp_path / "t.csv")
    assert [song.bpm for song in listing.songs] == [80]
    assert list(listing.missing.values()) == [f"/Volumes/Music/{ALBUMS[1]}"]
    assert not listing.failed


def test_words_from_another_folder_are_given_with_a_note(folder, tmp_path):
    (tmp_path / "t.csv").write_text("Location,BPM\n/Music/Album B/01 Intro.wav,90\n/Music/Album B/02.wav,91\n")
    root = folder(audio=("Album A/01 Intro.wav", "02.wav"))
    listing = read_songs(root, metadata_file=tmp_path / "t.csv")
    assert [song.bpm for song in listing.songs] == [91, 90]
    assert listing.notes == [
        f"{tmp_path / 't.csv'} has these in other folders, and their names alone fit: "
        "/Music/Album B/01 Intro.wav as Album A/01 Intro.wav"
    ]


def test_accents_are_the_same_however_a_file_system_writes_them(folder, tmp_path):
    root = folder(audio=("Cafe\u0301 Noir.wav", "a/Ole\u0301.wav"))
    (tmp_path / "t.csv").write_text("File,BPM\nCaf\xe9 Noir.wav,90\n", encoding="utf-8")
    assert words(root, metadata_file=tmp_path / "t.csv")["Cafe\u0301 Noir.wav"].bpm == 90
    (tmp_path / "t.csv").write_text("Title,BPM\nOL\xc9,91\n", encoding="utf-8")
    assert words(root, metadata_file=tmp_path / "t.csv")["a/Ole\u0301.wav"].bpm == 91


def test_all_bad_entries_are_named_at_once_by_file_and_line(folder):
    root = folder(
        {
            "metadata.csv": 'file_name,text,bpm,repeat\nOne Love.wav,"two\nlines",fast,1\ngone.wav,x,,\n'
            "live/three.mp3,a,b,c,d\nlive/three.mp3,ok,90,0\n",
            "live/metadata.jsonl": '{"file_name": "02 - Two_hearts.flac", "weight": -1}\n{"file_name": \n[]\n',
        }
    )
    listing = read_songs(root)
    assert not listing.songs
    assert listing.missing == {f"{root / 'metadata.csv'} line 4": "gone.wav"}
    csv, jsonl = root / "metadata.csv", root / "live/metadata.jsonl"
    for key, reason in {
        "One Love.wav": f"{csv} line 2 of One Love.wav: bpm must be a number of beats per minute from 0.5",
        "live/three.mp3": f"{csv} line 6 of live/three.mp3: repeat must be a whole number of at least 1, it is '0'",
        "live/02 - Two_hearts.flac": "weight must be a number above 0, up to 10,000, it is '-1'",
        f"{csv} line 5": "it has 5 values for 4 columns; a value with ',' in it is written in quotes",
        f"{jsonl} line 2": "is not JSON",
        f"{jsonl} line 3": "it must be an object",
    }.items():
        assert reason in listing.failed.pop(key)
    assert not listing.failed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"artist,bpm\nx,90\n", r"must begin with a line of column names, .* it begins with 'artist,bpm'"),
        (b"", "must begin with a line of column names"),
        (b"file_name,text\ncaf\xe9.wav,x\n", "cannot be read as UTF-8"),
        (b"file_name,text\n" + b"x" * 200_000 + b",y\n", r"line \d cannot be read as CSV"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(folder, content, message):
    root = folder({"metadata.csv": content})
    with pytest.raises(UserError, match=rf"metadata\.csv.*{message}"):
        read_songs(root)


@pytest.mark.parametrize(
    ("written", "spelt"),
    [
        ("Am", "A minor"), ("F#", "F# major"), ("Bbm", "Bb minor"), ("Cmaj", "C major"), ("d min", "D minor"),
        ("E♭", "Eb major"), ("8A", "A minor"), ("08B", "C major"), ("1A", "Ab minor"), ("12B", "E major"),
        ("1m", "A minor"), ("6d", "B major"), ("C major", "C major"), ("A Minor", "A minor"),
        ("D-Flat MAJOR", "Db major"), ("atonal", "atonal"), ("8A (Am)", "A minor"), ("8A (C)", "8A (C)"),
    ],
)  # fmt: skip
def test_keys_of_dj_programs_are_spelt_as_ace_step_does(written, spelt):
    assert spell_key(written) == spelt


# tags inside files


def tone(seconds=0.3):
    return (0.1 * np.sin(np.arange(round(seconds * 44_100)) / 20)).astype(np.float32).reshape(-1, 1).repeat(2, axis=1)


@pytest.fixture
def tagged(tmp_path):
    """Files with tags of each kind, as music programs write them."""
    root = tmp_path / "songs"
    for name in ("id3.mp3", "wave.wav", "vorbis.flac", "atoms.m4a", "plain.ogg"):
        write(root / name, tone())
    frames = [TIT2(text="A title"), TCON(text="House"), TBPM(text="127.6"), TKEY(text="Am")]
    id3 = ID3()
    for frame in [*frames, USLT(lang="eng", text="[00:01.00]la\n[00:02.00]li")]:
        id3.add(frame)
    id3.save(root / "id3.mp3")
    from mutagen.wave import WAVE

    wave = WAVE(root / "wave.wav")
    wave.add_tags()
    for frame in [*frames, SYLT(lang="eng", format=2, type=1, text=[("la", 1000), ("li", 2000)])]:
        wave.tags.add(frame)
    wave.save()
    flac = FLAC(root / "vorbis.flac")
    flac.update({"title": "A title", "genre": "House", "bpm": "127.6", "initialkey": "Am"})
    flac["lyrics"] = "[00:01.00]la\n[00:02.00]li"
    flac.save()
    atoms = MP4(root / "atoms.m4a")
    atoms["\xa9nam"], atoms["\xa9gen"], atoms["tmpo"] = "A title", "House", [128]
    atoms["----:com.apple.iTunes:initialkey"] = b"Am"
    atoms["\xa9lyr"] = "[00:01.00]la\n[00:02.00]li"
    atoms.save()
    return root


def test_tags_of_every_kind_are_read(tagged):
    songs = words(tagged)
    for name in ("id3.mp3", "wave.wav", "vorbis.flac", "atoms.m4a"):
        song = songs[name]
        assert (song.caption, song.source) == ("A title", "file tags")
        assert (song.genre, song.bpm, song.keyscale, song.lyrics) == ("House", 128, "A minor", "la\nli")
        assert song.timed_lyrics == [(1.0, "la"), (2.0, "li")]
    assert (songs["plain.ogg"].caption, songs["plain.ogg"].source) == ("plain", "file name")


def test_everything_else_wins_over_tags_and_they_can_be_left_out(tagged):
    (tagged / "id3.caption.txt").write_text("mine")
    (tagged / "metadata.csv").write_text("file_name,bpm\nid3.mp3,90\n")
    song = words(tagged)["id3.mp3"]
    assert (song.caption, song.bpm, song.keyscale) == ("mine", 90, "A minor")
    song = words(tagged, file_tags=False)["id3.mp3"]
    assert (song.caption, song.bpm, song.keyscale) == ("mine", 90, "")


@pytest.mark.parametrize(
    "frame", [TBPM(text="0.00"), TBPM(text="fast"), TIT2(text="a\x01b"), SYLT(lang="eng", format=2, type=1, text=[])]
)
def test_what_programs_left_in_tags_never_fails_a_song(tmp_path, frame):
    write(tmp_path / "x.mp3", tone())
    tags = ID3()
    tags.add(frame)
    tags.save(tmp_path / "x.mp3")
    listing = read_songs(tmp_path)
    (song,) = listing.songs
    assert (song.caption, song.bpm, song.lyrics, listing.failed) == ("x", None, "", {})
    noted = "tags inside the files that cannot be used, and are not: x.mp3: "
    assert all(note.startswith(noted) for note in listing.notes)
    assert bool(listing.notes) == (str(frame) in ("fast", "a\x01b"))


def test_a_numbered_genre_is_a_name_and_syllables_are_put_together_to_lines(tmp_path):
    write(tmp_path / "x.mp3", tone())
    tags = ID3()
    tags.add(TCON(text="(17)"))
    syllables = [("\nHel", 0), ("lo ", 100), ("world", 200), ("\nNext", 900)]
    tags.add(SYLT(lang="eng", format=2, type=1, text=syllables))
    tags.save(tmp_path / "x.mp3")
    song = words(tmp_path)["x.mp3"]
    assert (song.genre, song.timed_lyrics) == ("Rock", [(0.0, "Hello world"), (0.9, "Next")])


def test_all_genres_of_a_file_are_read_and_the_key_that_dj_programs_write_into_a_free_frame(tmp_path):
    write(tmp_path / "a.mp3", tone())
    write(tmp_path / "b.flac", tone())
    id3 = ID3()
    for frame in (TCON(text=["House", "Dub"]), TXXX(desc="initialkey", text="8A")):
        id3.add(frame)
    id3.save(tmp_path / "a.mp3")
    flac = FLAC(tmp_path / "b.flac")
    flac["genre"] = ["House", "Dub"]
    flac.save()
    songs = words(tmp_path)
    assert [song.genre for song in songs.values()] == ["House, Dub"] * 2
    assert songs["a.mp3"].keyscale == "A minor"


def test_without_mutagen_one_note_says_that_tags_are_not_read(tagged, monkeypatch):
    monkeypatch.setattr(songs_module, "can_read_tags", lambda: False)
    listing = read_songs(tagged)
    assert {song.source for song in listing.songs} == {"file name"}
    assert listing.notes == ["tags inside the files are not read; that takes pip install 'sidestep[tags]'"]


# lyrics with times


def test_lrc_gives_lines_by_time_with_sections_and_repeats():
    assert parse_lrc(LRC) == [
        (1.0, "[Verse]"), (1.0, "first line"), (3.5, "again"), (6.0, "[Chorus]"), (6.0, "high"), (9.5, "again"),
    ]  # fmt: skip
    assert parse_lrc("[offset:500]\n[00:01.00]a") == [(0.5, "a")]
    assert parse_lrc("[Verse]\nno times") is None
    assert parse_lrc("[00:12,34]a\n[01:02:03]b") == [(12.34, "a"), (62.03, "b")]


def test_a_time_in_a_line_or_two_makes_no_lyrics_with_times():
    assert parse_lrc("[Verse]\nFirst line\nSecond line\n[1:30] guitar solo\n[Chorus]\nla la") is None
    assert parse_lrc("[Verse]\n[00:01]one\n[00:02]two\nthree") is not None


def test_tags_of_lrc_files_are_not_sung(folder):
    tags = "[id:abc]\n[tool:LRC Maker]\n[lr:Someone]\n[encoder:x]\n"
    assert parse_lrc(f"{tags}[Chorus: Anna]\n[00:01]one\n[by:me]\n[00:02]two") == [
        (1.0, "[Chorus: Anna]"), (1.0, "one"), (2.0, "two"),
    ]  # fmt: skip
    root = folder({"One Love.lrc": "[ti:x]\n[ar:y]\n\n[encoder:x]\n", "live/three.lrc": "[ar:y]\nla\nli\n"})
    songs = words(root)
    assert (songs["One Love.wav"].lyrics, songs["One Love.wav"].is_instrumental) == ("", True)
    assert songs["live/three.mp3"].lyrics == "la\nli"
    (root / "One Love.txt").write_text("[Verse]\nhey")
    assert words(root)["One Love.wav"].lyrics == "[Verse]\nhey"


def test_sections_in_metadata_give_lines_by_time():
    sections = [
        {"start": 9, "label": "Chorus", "lyrics": "high\nhigher"},
        {"start": 0.5, "label": "[Verse]", "text": "low"},
    ]
    lines = parse_sections(sections)
    assert lines == [(0.5, "[Verse]"), (0.5, "low"), (9.0, "[Chorus]"), (9.0, "high"), (9.0, "higher")]
    assert untimed(lines) == "[Verse]\nlow\n[Chorus]\nhigh\nhigher"


@pytest.mark.parametrize("value", [[], "x", [{"lyrics": "x"}], [{"start": -1}], [{"start": 1}], [{"start": "1"}], [3]])
def test_sections_that_are_none_leave_the_song_out(folder, value):
    listing = read_songs(folder({"One Love.json": json.dumps({"sections": value})}))
    assert "One Love.json: sections must be " in listing.failed["One Love.wav"]


@pytest.mark.parametrize(
    ("start", "end", "sung"),
    [
        (0, 5, "[Verse]\nfirst line\nagain"),
        (3, 6, "[Verse]\nagain"),
        (6, 12, "[Chorus]\nhigh\nagain"),
        (9, 12, "[Chorus]\nagain"),
        (10, 20, ""),
    ],
)
def test_a_part_of_a_song_has_the_lines_that_begin_in_it(start, end, sung):
    assert sung_between(parse_lrc(LRC), start, end) == sung


def test_an_lrc_file_beside_a_song_is_read_and_untimed_lyrics_replace_its_times(folder):
    root = folder({"One Love.lrc": LRC})
    song = words(root)["One Love.wav"]
    assert song.lyrics.startswith("[Verse]\nfirst line\nagain\n[Chorus]")
    assert len(song.timed_lyrics) == 6
    (root / "One Love.lyrics.txt").write_text("other words")
    song = words(root)["One Love.wav"]
    assert (song.lyrics, song.timed_lyrics) == ("other words", [])


# the one form


def test_songs_jsonl_says_what_every_source_said(folder, capsys):
    root = folder(
        {
            "One Love.lrc": LRC,
            "metadata.csv": "file_name,text,bpm,key,repeat,weight\nOne Love.wav,a love song,128,8A,2,0.5\n",
            "live/three.txt": "caption: caf\xe9\ngenre: pop\nlyrics: la",
        }
    )
    before = words(root)
    list_songs(songs_config(f"audio_dir={root}", "write=true"))
    of_all, *lines = [json.loads(line) for line in (root / "songs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert of_all == {"tag_position": "prepend", "genre_ratio": 0}
    assert lines[0]["lyrics"].splitlines()[:2] == ["[00:01.000][Verse]", "[00:01.000]first line"]
    assert lines[1:] == [
        {"audio": "live/02 - Two_hearts.flac"},
        {"audio": "live/three.mp3", "caption": "café", "genre": "pop", "lyrics": "la"},
    ]
    after = words(root)
    for name, song in before.items():
        assert {**vars(after[name]), "source": ""} == {**vars(song), "source": ""}
    (root / "One Love.caption.txt").write_text("edited later")
    assert words(root)["One Love.wav"].caption == "a love song"  # songs.jsonl is the whole truth on a song in it


def test_ends_of_lines_within_a_value_are_kept(folder):
    """U+2028 and U+0085 end a line for Python, but not for JSON, CSV or the people who pasted them."""
    odd = "one\u2028two\x85three"
    root = folder({"One Love.lyrics.txt": odd, "metadata.csv": f"file_name,text\nlive/three.mp3,{odd}\n"})
    before = words(root)
    assert before["live/three.mp3"].caption.split() == ["one", "two", "three"]
    list_songs(songs_config(f"audio_dir={root}", "write=true"))
    after = words(root)
    assert {name: (song.caption, song.lyrics) for name, song in after.items()} == {
        name: (song.caption, song.lyrics) for name, song in before.items()
    }


def test_songs_jsonl_keeps_where_the_tag_goes_and_how_many_songs_train_on_their_genre(folder, tmp_path, capsys):
    metadata = {"custom_tag": "zz", "tag_position": "append", "genre_ratio": 100}
    samples = [{"filename": "One Love.wav", "caption": "a love song", "genre": "house"}]
    (tmp_path / "my_lora.json").write_text(json.dumps({"metadata": metadata, "samples": samples}))
    root = folder()
    before = read_songs(root, metadata_file=tmp_path / "my_lora.json")
    list_songs(songs_config(f"audio_dir={root}", f"metadata_file={tmp_path / 'my_lora.json'}", "write=true"))
    after = read_songs(root)
    assert (after.tag_position, after.genre_ratio) == (before.tag_position, before.genre_ratio) == ("append", 100)
    assert [song.prompt for song in after.songs] == [song.prompt for song in before.songs]
    assert after.songs[0].prompt == "genre"
    assert read_songs(root, genre_ratio=0).genre_ratio == 0


def test_what_songs_jsonl_says_of_all_songs_wins_over_a_table_that_was_passed_over(folder, tmp_path, capsys):
    metadata = {"custom_tag": "zz", "tag_position": "append", "genre_ratio": 100}
    root = folder({"dataset.json": json.dumps({"metadata": metadata, "samples": []})})
    (tmp_path / "t.csv").write_text("File,custom_tag\nOne Love.wav,yy\n")
    list_songs(songs_config(f"audio_dir={root}", f"metadata_file={tmp_path / 't.csv'}", "write=true"))
    listing = read_songs(root)
    assert (listing.tag_position, listing.genre_ratio) == ("prepend", 0)
    (root / "songs.jsonl").write_text('{"tag_position": "first", "genre_ratio": 30}\n{"tag_pos": 3}\n')
    assert read_songs(root).lost == {
        f"{root / 'songs.jsonl'} line 1": "tag_position must be one of prepend, append, replace, it is 'first'",
        f"{root / 'songs.jsonl'} line 2": "neither audio_path nor filename names a file",
    }


def test_edits_are_shown_and_not_written_until_asked(folder, capsys):
    root = folder({"live/three.caption.txt": "soft, oldtag, slow"})
    typed = [f"audio_dir={root}", "only='live/*'", "remove_tag=oldtag", "add_tag=mystyle"]
    list_songs(songs_config(*typed))
    out = capsys.readouterr().out
    assert 'caption: "soft, oldtag, slow" -> "soft, slow"' in out
    assert out.count('custom_tag: null -> "mystyle"') == 2
    assert "2 songs would change; nothing is written without write=true" in out
    assert not (root / "songs.jsonl").exists()
    list_songs(songs_config(*typed, "write=true"))
    assert [song.custom_tag for song in words(root).values()] == ["", "mystyle", "mystyle"]
    list_songs(songs_config(f"audio_dir={root}", "remove_tag=mystyle", "write=true"))
    assert not any(song.custom_tag for song in words(root).values())
    assert "mystyle" in (root / "songs.jsonl.bak").read_text()
    list_songs(songs_config(f"audio_dir={root}", "write=true"))
    assert "mystyle" in (root / "songs.jsonl.bak").read_text()
    assert "mystyle" not in (root / "songs.jsonl.bak2").read_text()


def test_the_tag_of_a_whole_dataset_json_can_be_removed(folder, capsys):
    content = {"metadata": {"custom_tag": "foo"}, "samples": [{"filename": "One Love.wav", "caption": "c"}]}
    root = folder({"dataset.json": json.dumps(content)})
    list_songs(songs_config(f"audio_dir={root}", "remove_tag=foo", "write=true"))
    assert not any(song.custom_tag for song in words(root).values())


def test_the_list_shows_whatever_a_song_has(folder, capsys):
    values = {"caption": "c", "lyrics": "la", "language": "en", "custom_tag": "zyx", "repeat": 3, "weight": 0.5}
    list_songs(songs_config(f"audio_dir={folder({'One Love.json': json.dumps(values)})}"))
    assert "One Love.wav: c (sidecar) | 1 lines | en | tag zyx | repeat 3 | weight 0.5\n" in capsys.readouterr().out


def test_missing_values_are_filled_from_file_tags(tagged):
    list_songs(songs_config(f"audio_dir={tagged}", "file_tags=false", "write=true"))
    assert words(tagged)["id3.mp3"].bpm is None
    list_songs(songs_config(f"audio_dir={tagged}", "fill=true", "write=true"))
    song = words(tagged)["id3.mp3"]
    assert (song.caption, song.bpm, song.keyscale, len(song.timed_lyrics)) == ("id3", 128, "A minor", 2)


def test_an_instrumental_stays_one_when_values_are_filled(tagged):
    (tagged / "id3.json").write_text('{"is_instrumental": true}')
    list_songs(songs_config(f"audio_dir={tagged}", "write=true"))
    list_songs(songs_config(f"audio_dir={tagged}", "fill=true", "write=true"))
    songs = words(tagged)
    assert (songs["id3.mp3"].lyrics, songs["vorbis.flac"].lyrics) == ("", "la\nli")
    lines = [json.loads(line) for line in (tagged / "songs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("audio") for line in lines if "is_instrumental" in line] == ["id3.mp3"]


def test_nothing_is_written_over_words_that_cannot_be_read(folder, capsys):
    root = folder({"songs.jsonl": '{"audio": "One Love.wav", "bpm": "fast"}\n'})
    with pytest.raises(UserError, match=r"songs\.jsonl is not written while 1 songs or entries cannot be used"):
        list_songs(songs_config(f"audio_dir={root}", "write=true"))
    assert (
        f"cannot be used: One Love.wav: {root / 'songs.jsonl'} line 1 of One Love.wav: bpm must be"
        in capsys.readouterr().out
    )


def test_the_songs_of_a_dataset_folder_are_not_taken_for_words(folder):
    line = {"audio": "One Love.wav", "latents": "latents/x.safetensors", "caption": "of the dataset"}
    root = folder({"songs.jsonl": json.dumps(line) + "\n"})
    assert {song.source for song in words(root).values()} == {"file name"}
