"""Tempo and key heard in songs, and captions and lyrics asked of a server: a real one, on this machine."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
from mutagen.flac import FLAC

from sidestep import captioner
from sidestep.data import analysis
from sidestep.data.listing import list_songs
from sidestep.data.songs import read_songs
from sidestep.errors import UserError
from sidestep.songs import songs_command
from tests.audio_files import write
from tests.factories import songs_config

RATE = analysis.RATE
TONICS = {note: number for number, note in enumerate(["C", ".", "D", "Eb", "E", "F", "F#", "G", ".", "A", "Bb", "B"])}


def play(bpm, key, seconds=16):
    """A click on each beat over the chords I, IV, V, I of a key, mono at the analysis's rate."""
    tonic, scale = key.split()
    third = 4 if scale == "major" else 3
    chords = [(0, third, 7), (5, 5 + third, 12), (7, 11, 14), (0, third, 7)]
    rng = np.random.default_rng(0)
    samples = np.zeros(int(seconds * RATE))
    click = 0.8 * rng.normal(size=RATE // 20) * np.exp(-np.arange(RATE // 20) / (0.01 * RATE))
    beat = 60 / bpm
    for number in range(int(seconds / beat)):
        part = samples[int(number * beat * RATE) : int((number + 1) * beat * RATE)]
        times = np.arange(len(part)) / RATE
        for note in chords[number // 4 % 4]:
            pitch = 440 * 2 ** ((60 + TONICS[tonic] + note - 69) / 12)
            part += 0.15 * np.exp(-2 * times) * sum(np.sin(2 * np.pi * pitch * k * times) / k for k in (1, 2, 3))
        part[: len(click)] += click[: len(part)]
    return samples.astype(np.float32)


@pytest.mark.slow  # librosa compiles for half a minute when it is used for the first time
@pytest.mark.parametrize(
    ("bpm", "key"),
    [(72, "Eb minor"), (90, "C major"), (100, "D minor"), (120, "A minor"), (140, "F# major"), (174, "Bb major")],
)
def test_tempo_and_key_of_a_song_are_heard(bpm, key):
    heard = analysis.estimate_music(play(bpm, key))
    assert heard["keyscale"] == key
    assert heard["bpm"] == pytest.approx(bpm, abs=0.5)


@pytest.mark.slow
def test_no_tempo_is_slower_than_a_dj_would_call_it():
    assert analysis.estimate_music(play(60, "C major"))["bpm"] == pytest.approx(120, abs=0.5)


@pytest.mark.slow
def test_what_is_missing_is_estimated_from_the_files_and_marked(tmp_path, capsys):
    write(tmp_path / "songs/loop.wav", play(140, "A minor"), RATE)
    list_songs(
        songs_config(f"audio_dir={tmp_path / 'songs'}", f"cache_dir={tmp_path}/c", "estimate=true", "write=true")
    )
    (song,) = read_songs(tmp_path / "songs").songs
    assert (song.bpm, song.keyscale, song.estimated) == (140, "A minor", ["bpm", "keyscale"])


def test_a_list_names_songs_that_are_no_audio_and_entries_without_any(tmp_path, capsys):
    write(tmp_path / "song.wav", np.zeros((4800, 2)), 48_000)
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "dataset.json").write_text('[{"filename": "song.wav", "bpm": 90}, {"filename": "gone.wav"}]')
    listing = list_songs(songs_config(f"audio_dir={tmp_path}"))
    assert [song.name for song in listing.songs] == ["song.wav", "text.wav"]
    assert list(listing.undecodable) == ["text.wav"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'text.wav'} cannot be read as audio" in said
    assert f"{tmp_path / 'dataset.json'} entry 2: there is no audio file gone.wav" in said
    assert "2 songs, 2 captioned by their file name, 2 faults" in said
    with pytest.raises(SystemExit):
        songs_command(songs_config(f"audio_dir={tmp_path}"))


def test_silence_and_a_moment_have_neither_tempo_nor_key():
    assert analysis.estimate_music(np.zeros(20 * RATE, np.float32)) == {}
    assert analysis.estimate_music(np.ones(RATE, np.float32)) == {}


def test_of_a_long_song_the_middle_is_heard_at_the_rate_of_the_analysis(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "MAX_SECONDS", 1)
    samples = np.zeros(3 * 8_000, np.float32)
    samples[8_000:16_000] = 0.5
    middle = analysis.read_middle(write(tmp_path / "x.wav", samples, 8_000))
    assert len(middle) == RATE
    assert middle[100:-100] == pytest.approx(0.5, abs=0.02)


def test_without_librosa_one_line_says_what_to_install(songs, monkeypatch):
    monkeypatch.setattr(analysis.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"estimate=true needs librosa: pip install 'sidestep\[analysis\]'"):
        list_songs(songs_config(f"audio_dir={songs}", "estimate=true"))


@pytest.fixture
def songs(tmp_path):
    """Two songs of which one has all words but a tempo, and one has none."""
    root = tmp_path / "songs"
    for number, name in enumerate(["mine.wav", "plain.wav"]):
        write(root / name, 0.1 * np.random.default_rng(number).normal(size=(16_000, 2)).astype(np.float32), 16_000)
    words = {"caption": "what I wrote", "lyrics": "my own words", "keyscale": "C major", "bpm": None}
    (root / "mine.json").write_text(json.dumps(words))
    return root


@pytest.fixture
def typed(songs, tmp_path):
    return [f"audio_dir={songs}", f"cache_dir={tmp_path / 'cache'}"]


def lines(root):
    of_all, *lines = (root / "songs.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(of_all).keys() == {"tag_position", "genre_ratio"}
    return [json.loads(line) for line in lines]


def test_estimates_fill_only_what_is_missing_are_marked_and_are_made_once(songs, typed, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(
        analysis, "estimate_music", lambda samples: heard.append(len(samples)) or {"bpm": 119.6, "keyscale": "F# minor"}
    )
    list_songs(songs_config(*typed, "estimate=true"))
    assert "2 songs would change" in capsys.readouterr().out
    assert not (songs / "songs.jsonl").exists()
    list_songs(songs_config(*typed, "estimate=true", "write=true"))
    assert len(heard) == 2
    mine, plain = lines(songs)
    assert (mine["bpm"], mine["keyscale"], mine["estimated"]) == (120, "C major", ["bpm"])
    assert (plain["bpm"], plain["keyscale"], plain["estimated"]) == (120, "F# minor", ["bpm", "keyscale"])


def test_a_value_that_somebody_writes_is_no_estimate_any_more(songs):
    (songs / "dataset.json").write_text(json.dumps([{"filename": "plain.wav", "bpm": 90, "estimated": ["bpm"]}]))
    assert [song.estimated for song in read_songs(songs).songs] == [[], ["bpm"]]
    (songs / "plain.json").write_text('{"bpm": 120}')
    assert [song.estimated for song in read_songs(songs).songs] == [[], []]


def test_only_what_can_be_estimated_is_marked(songs):
    (songs / "plain.json").write_text('{"estimated": ["weight"]}')
    assert "estimated must be some of caption, lyrics, bpm, keyscale" in read_songs(songs).failed["plain.wav"]


class Server(ThreadingHTTPServer):
    """Answers like a server of OpenAI's chat completions; ``states`` are the HTTP states of its first answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.states = []
        self.answers = {"Describe": "a slow waltz\n", "Write": "[Verse]\nla la"}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        state = self.server.states.pop(0) if self.server.states else 200
        text = body["messages"][0]["content"][0]["text"].partition(" ")[0]
        reply = {"choices": [{"message": {"role": "assistant", "content": self.server.answers[text]}}]}
        if state != 200:
            reply = {"error": {"message": f"no, {self.headers.get('Authorization')}"}}
        data = json.dumps(reply).encode()
        self.send_response(state)
        self.send_header("Content-Length", str(len(data)))
        if state == 429:
            self.send_header("Retry-After", "7")
        if state == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("SIDESTEP_CAPTIONER_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr(captioner.time, "sleep", waited.append)
    return waited


@pytest.fixture
def asking(typed, server):
    return [*typed, "captioner=openai", f"captioner.url={server.url}", "captioner.model=hears-music"]


def test_captions_and_lyrics_are_asked_for_where_there_are_none(songs, asking, server):
    list_songs(songs_config(*asking, "write=true"))
    mine, plain = lines(songs)
    assert (mine["caption"], mine["lyrics"], "estimated" in mine) == ("what I wrote", "my own words", False)
    assert (plain["caption"], plain["lyrics"]) == ("a slow waltz", "[Verse]\nla la")
    assert plain["estimated"] == ["caption", "lyrics"]
    assert [path for path, _, _ in server.asked] == ["/v1/chat/completions"] * 2


def test_the_song_is_sent_as_a_short_mono_wav(asking, server):
    list_songs(songs_config(*asking, "captioner.max_seconds=1", "captioner.ask=[caption]"))
    ((_, key, body),) = server.asked
    assert (body["model"], key) == ("hears-music", None)
    text, audio = body["messages"][0]["content"]
    assert text["text"].startswith("Describe this music")
    assert (audio["type"], audio["input_audio"]["format"]) == ("input_audio", "wav")
    with soundfile.SoundFile(io.BytesIO(base64.b64decode(audio["input_audio"]["data"]))) as wav:
        assert (wav.samplerate, wav.channels, wav.subtype, wav.frames) == (16_000, 1, "PCM_16", 16_000)


def test_nothing_is_asked_twice_and_nothing_written_until_typed(songs, asking, server, capsys):
    list_songs(songs_config(*asking))
    assert '  caption: null -> "a slow waltz"' in capsys.readouterr().out
    assert not (songs / "songs.jsonl").exists()
    list_songs(songs_config(*asking, "write=true"))
    list_songs(songs_config(*asking, "write=true"))
    assert len(server.asked) == 2
    (songs / "songs.jsonl").unlink()
    list_songs(songs_config(*asking, "captioner.model=another"))
    assert len(server.asked) == 4


def test_a_title_written_to_songs_jsonl_is_no_caption(songs, asking, typed, server):
    for name in ("mine", "plain"):
        write(songs / f"{name}.flac", soundfile.read(songs / f"{name}.wav")[0], 16_000)
        (songs / f"{name}.wav").unlink()
    (songs / "mine.json").unlink()
    tagged = FLAC(songs / "mine.flac")
    tagged["title"] = "My Title"
    tagged.save()
    list_songs(songs_config(*typed, "write=true"))
    assert lines(songs) == [{"audio": "mine.flac", "caption": "My Title"}, {"audio": "plain.flac"}]
    list_songs(songs_config(*asking, "captioner.ask=[caption]", "write=true"))
    assert [line["caption"] for line in lines(songs)] == ["a slow waltz"] * 2


def test_nobody_is_asked_unless_a_captioner_is_chosen(typed, server):
    list_songs(songs_config(*typed, "write=true"))
    assert server.asked == []


def test_a_song_in_which_nobody_sings_is_an_instrumental(songs, asking, server):
    server.answers["Write"] = "[instrumental]."
    list_songs(songs_config(*asking, "write=true"))
    plain = lines(songs)[1]
    assert (plain["is_instrumental"], "lyrics" in plain, plain["estimated"]) == (True, False, ["caption", "lyrics"])
    list_songs(songs_config(*asking, "write=true"))
    assert len(server.asked) == 2


def test_an_answer_that_cannot_be_used_is_named_and_asked_for_again(songs, asking, server, capsys):
    server.answers |= {"Describe": "a bell\x07", "Write": " "}
    list_songs(songs_config(*asking, "write=true"))
    said = capsys.readouterr().out
    assert "no answer about plain.wav: caption: the answer: caption must be text without control characters" in said
    assert "nothing heard of plain.wav: lyrics" in said
    assert "estimated" not in lines(songs)[1]
    server.answers["Write"] = "la"
    list_songs(songs_config(*asking))
    assert len(server.asked) == 4


@pytest.mark.parametrize("state", [400, 413, 422])
def test_a_song_that_the_server_does_not_take_is_named_and_the_others_go_on(songs, asking, server, state, capsys):
    (songs / "mine.json").unlink()
    server.states = [state]
    with pytest.raises(SystemExit):
        songs_command(songs_config(*asking, "captioner.ask=[caption]", "write=true"))
    assert f"no answer about mine.wav: caption: {server.url}/chat/completions: HTTP {state}" in capsys.readouterr().out
    assert ["caption" in line for line in lines(songs)] == [False, True]


def test_an_answer_that_is_cut_off_is_named_and_asked_for_again(songs, asking, monkeypatch, capsys):
    asked = []
    reply = {"choices": [{"message": {"content": "a slow"}, "finish_reason": "length"}]}
    monkeypatch.setattr(
        captioner.OpenAIConfig, "_send", lambda *args: asked.append(1) or (200, json.dumps(reply).encode(), 0.0)
    )
    for _ in range(2):
        list_songs(songs_config(*asking, "captioner.ask=[caption]"))
    assert len(asked) == 2
    assert "no answer about plain.wav: caption: " in capsys.readouterr().out


def test_a_server_on_this_machine_is_asked_without_a_proxy(asking, server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    list_songs(songs_config(*asking, "captioner.ask=[caption]", "captioner.retries=0"))
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again_after_growing_waits_or_as_long_as_it_says(asking, server, pauses):
    server.states = [503, 500, 429]
    list_songs(songs_config(*asking, "captioner.ask=[caption]"))
    assert (len(server.asked), pauses) == (4, [1, 2, 7])


def test_a_server_that_stays_busy_ends_in_one_line(asking, server, pauses):
    server.states = [503] * 9
    with pytest.raises(UserError, match=r"/v1/chat/completions gave no answer, asked 3 times: HTTP 503"):
        list_songs(songs_config(*asking, "captioner.retries=2"))
    assert (len(server.asked), pauses) == (3, [1, 2])


def test_a_server_that_is_not_there_or_does_not_answer_is_named(asking, server, pauses, monkeypatch):
    with pytest.raises(UserError, match=r"127.0.0.1:1/v1/chat/completions gave no answer, asked 1 times: .*refused"):
        list_songs(songs_config(*asking, "captioner.url=http://127.0.0.1:1/v1", "captioner.retries=0"))
    monkeypatch.setattr(Handler, "do_POST", lambda self: threading.Event().wait(0.3))
    with pytest.raises(UserError, match="asked 2 times: timed out"):
        list_songs(songs_config(*asking, "captioner.retries=1", "captioner.timeout_seconds=0.05"))


def test_the_key_comes_from_the_environment_and_is_never_shown(songs, asking, server, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SIDESTEP_CAPTIONER_KEY", "very-secret")
    list_songs(songs_config(*asking, "write=true"))
    assert [key for _, key, _ in server.asked] == ["Bearer very-secret"] * 2
    server.states = [401]
    (songs / "songs.jsonl").unlink()
    with pytest.raises(UserError, match=r"HTTP 401 .*Bearer <SIDESTEP_CAPTIONER_KEY>") as refusal:
        list_songs(songs_config(*asking, "captioner.model=another"))
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert "very-secret" not in str(refusal.value) + capsys.readouterr().out
    assert not any(b"very-secret" in content for content in written)
    monkeypatch.setenv("SIDESTEP_CAPTIONER_KEY", "very\nsecret")
    with pytest.raises(UserError, match="SIDESTEP_CAPTIONER_KEY holds more than one line"):
        list_songs(songs_config(*asking, "captioner.model=another"))


def test_a_server_that_wants_a_key_is_answered_with_where_it_goes(asking, server):
    server.states = [401]
    with pytest.raises(UserError, match="a key goes into the environment variable SIDESTEP_CAPTIONER_KEY"):
        list_songs(songs_config(*asking))


def test_songs_are_not_sent_on_to_another_server(asking, server):
    server.states = [302]
    with pytest.raises(UserError, match="HTTP 302"):
        list_songs(songs_config(*asking))


@pytest.mark.parametrize("content", [[1], {"choices": []}, "[" * 3])
def test_a_server_of_another_kind_is_refused(asking, content, monkeypatch):
    monkeypatch.setattr(captioner.OpenAIConfig, "_send", lambda *args: (200, json.dumps(content).encode(), 0.0))
    with pytest.raises(UserError, match="does not answer as OpenAI's chat completions do"):
        list_songs(songs_config(*asking))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("captioner.url=localhost:8000", "captioner.url=localhost:8000 must be an address such as"),
        ("captioner.url='http://me:pw@host/v1'", "captioner.url must not hold a password or a key"),
        ("captioner.url='http://me:pw@host:many/v1'", "^captioner.url must not hold a password or a key"),
        (
            "captioner.key_variable=sk-123",
            "^captioner.key_variable must be the name of an environment variable, and not",
        ),
        ("captioner.url='http://host:many/v1'", "must be an address such as"),
        ("captioner.url='http://a..b/v1'", "must be an address such as"),
        (f"captioner.url=http://{'x' * 64}.org/v1", "must be an address such as"),
        ("captioner.ask=[title]", "captioner.ask=title must be one of caption, lyrics"),
        ("captioner.retries=-1", "captioner.retries=-1 must be from 0 to 100"),
        ("captioner.timeout_seconds=0", "captioner.timeout_seconds=0 must be above 0"),
        ("captioner.max_seconds=0", "captioner.max_seconds=0 must be at least 1"),
        ("captioner.model=", "captioner.model is empty"),
        ("captioner.modell=x", r"captioner\.modell is not a setting; did you mean captioner\.model"),
    ],
)
def test_a_captioner_that_cannot_be_asked_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        songs_config("audio_dir=songs", "captioner=openai", "captioner.url=http://h/v1", "captioner.model=m", words)
