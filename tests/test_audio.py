from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch

from sidestep.data.audio import SILENT_PEAK, _decode, find_audio, peak, probe_audio, read_audio, read_hashed
from sidestep.errors import UserError
from tests.audio_files import write, write_with_ffmpeg


def tone(seconds=1.0, rate=44_100, channels=2, hertz=440.0):
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * t)[:, None] * np.linspace(1, 0.5, channels)).astype(np.float32)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "a.m4a", "a.aac", "UPPER.WAV"])
def test_every_format_is_read_as_stereo_at_48_khz(tmp_path, name):
    rate = 48_000 if name.endswith("opus") else 44_100
    path = write(tmp_path / name, tone(2.0, rate), rate)
    audio = read_audio(path)
    assert audio.dtype is torch.float32
    assert audio.shape[0] == 2
    assert audio.shape[1] == pytest.approx(96_000, abs=3_000)  # aac adds a frame at each end
    middle = audio[:, 20_000:70_000]  # codecs overshoot where the tone begins
    assert peak(middle[0]) == pytest.approx(0.3, abs=0.02)
    assert peak(middle[1]) == pytest.approx(0.15, abs=0.02)


def test_lossless_samples_at_48_khz_are_kept_as_they_are(tmp_path):
    samples = 3 * tone(0.5, 48_000)  # louder than full scale
    audio = read_audio(write(tmp_path / "a.wav", samples, 48_000, subtype="FLOAT"))
    assert torch.equal(audio, torch.from_numpy(samples.T))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 88_200, 96_000])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_resampling_gives_the_rounded_length(tmp_path, rate, extra):
    num_samples = rate // 2 + extra
    path = write(tmp_path / "a.wav", np.zeros((num_samples, 1), np.float32), rate)
    assert read_audio(path).shape == (2, round(num_samples * 48_000 / rate))


def test_resampling_keeps_a_tone_in_tune(tmp_path):
    audio = read_audio(write(tmp_path / "a.wav", tone(1.0, channels=1), subtype="FLOAT"))
    expected = torch.from_numpy(tone(1.0, 48_000, channels=1)[:, 0])
    torch.testing.assert_close(audio[0, 2_000:-2_000], expected[2_000:-2_000], rtol=0, atol=1e-5)


def test_mono_is_doubled_and_six_channels_give_their_first_two(tmp_path):
    mono = read_audio(write(tmp_path / "mono.wav", tone(0.1, 48_000, channels=1), 48_000))
    assert torch.equal(mono[0], mono[1])
    six = tone(0.1, 48_000, channels=6)
    audio = read_audio(write(tmp_path / "six.wav", six, 48_000, subtype="FLOAT"))
    assert torch.equal(audio, torch.from_numpy(six[:, :2].T))


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_no_more_than_the_longest_wanted_part_is_read(tmp_path, name):
    path = write(tmp_path / name, tone(2.0))
    assert read_audio(path, max_seconds=0.5).shape == (2, 24_000)


def test_a_wav_written_to_a_pipe_is_not_taken_for_a_damaged_one(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0, 48_000), 48_000)
    header = bytearray(path.read_bytes())
    at = header.index(b"data") + 4
    header[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(header)
    assert read_audio(path).shape == (2, 48_000)


def noisy_tone(rate=44_100):
    noise = np.random.default_rng(0).normal(0, 0.1, (3 * rate, 2)).astype(np.float32)
    return tone(3.0, rate) + noise


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.m4a", "a.ogg", "a.opus"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_cut_short_is_refused(tmp_path, name, kept):
    rate = 48_000 if name.endswith("opus") else 44_100
    path = write(tmp_path / name, noisy_tone(rate), rate)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(len(whole) * kept)])
    with pytest.raises(UserError, match=rf"{name} (cannot be read as audio|ends early)"):
        read_audio(path)


@pytest.mark.parametrize("name", ["a.ogg", "a.opus"])
def test_the_last_bytes_of_an_ogg_file_count_only_if_they_are_wanted(tmp_path, name):
    path = write(tmp_path / name, noisy_tone(48_000), 48_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="ends early"):
        read_audio(path)
    assert read_audio(path, max_seconds=0.5).shape == (2, 24_000)


def test_an_mp3_has_the_samples_it_was_made_of_and_a_damaged_frame_does_not_end_it(tmp_path, capfd):
    path = write(tmp_path / "a.mp3", noisy_tone(48_000), 48_000)
    whole = path.read_bytes()
    audio = read_audio(path)
    assert audio.shape == (2, 144_000)
    junk = np.random.default_rng(1).integers(0, 255, 400, dtype=np.uint8).tobytes()
    path.write_bytes(whole[:5_000] + junk + whole[5_400:] + junk)
    damaged = read_audio(path)
    assert damaged.shape[1] == pytest.approx(144_000 - 3 * 1_152, abs=100)  # a frame needs bits of those before it
    assert torch.equal(damaged[:, 60_000:80_000], audio[:, 63_456:83_456])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rate", [48_000, 22_050])
@pytest.mark.parametrize("tag", [b"", b"ID3\3\0\0\0\0\2\0" + bytes(256)])
def test_what_follows_an_mp3_does_not_make_it_one_that_ends_early(tmp_path, capfd, rate, tag):
    path = write(tmp_path / "a.mp3", noisy_tone(rate), rate)
    music = path.read_bytes()
    path.write_bytes(tag + music + bytes(len(music)))  # such as a picture in an APEv2 tag
    probe_audio(path)
    assert read_audio(path).shape[1] == pytest.approx(144_000, abs=2_400)
    assert capfd.readouterr() == ("", "")
    path.write_bytes(tag + music[: len(music) // 2])
    with pytest.raises(UserError, match="ends early"):
        read_audio(path)


def test_an_mp3_of_changing_bit_rate_without_a_length_is_read_whole(tmp_path):
    samples = tone(6.0)
    samples[132_300:] += np.random.default_rng(0).normal(0, 0.2, (132_300, 2)).astype(np.float32)
    path = tmp_path / "a.mp3"
    write_with_ffmpeg(path, samples, 44_100, {"global_quality": "472", "flags": "+qscale"}, write_xing="0")
    assert read_audio(path).shape[1] == pytest.approx(288_000, abs=3_000)


def test_a_song_that_does_not_fit_in_memory_is_refused_by_name(tmp_path, monkeypatch):
    def decode(*_):
        raise MemoryError

    monkeypatch.setattr("sidestep.data.audio._decode", decode)
    with pytest.raises(UserError, match=r"a\.wav does not fit in memory; set max_song_seconds"):
        read_audio(write(tmp_path / "a.wav", tone(0.2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"these are words, not sound\n" * 50, "cannot be read as audio")],
)
def test_a_file_that_is_not_audio_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "song.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"song\.wav {message}"):
        read_audio(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav cannot be read as audio"):
        read_audio(tmp_path / "gone.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    samples = tone(0.2)
    samples[100] = value
    with pytest.raises(UserError, match="not finite"):
        read_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_a_song_shorter_than_two_latent_frames_is_refused(tmp_path):
    assert read_audio(write(tmp_path / "two.wav", np.zeros((3_840, 2)), 48_000)).shape == (2, 3_840)
    with pytest.raises(UserError, match=r"less\.wav is 0\.080 s long; a song needs at least"):
        read_audio(write(tmp_path / "less.wav", np.zeros((3_839, 2)), 48_000))


def test_the_same_sound_is_known_in_wav_and_flac_under_any_name(tmp_path):
    sound = np.random.default_rng(0).integers(-9_000, 9_000, (9_000, 2), dtype=np.int16)
    wav, flac = write(tmp_path / "a.wav", sound), write(tmp_path / "b.flac", sound)
    other, slower = write(tmp_path / "c.flac", sound[::-1]), write(tmp_path / "d.wav", sound, rate=22_050)
    assert read_hashed(wav)[1] == read_hashed(flac)[1]
    assert len({read_hashed(path)[1] for path in (wav, other, slower, write(tmp_path / "e.ogg", sound))}) == 4


def test_silence_is_told_from_quiet_music(tmp_path):
    assert peak(torch.zeros(2, 100)) < SILENT_PEAK < peak(torch.full((2, 100), 0.001))


def test_songs_are_found_in_subfolders_sorted_and_without_hidden_files(tmp_path):
    for name in ["b.wav", "a/z.MP3", "a/b/c.flac", ".hidden.wav", ".trash/x.wav", "notes.txt", "a.wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_audio(tmp_path)]
    assert names == ["a/b/c.flac", "a/z.MP3", "a.wav", "b.wav"]


def test_a_linked_folder_is_read_once_and_a_loop_ends(tmp_path):
    songs, elsewhere = tmp_path / "songs", tmp_path / "elsewhere"
    songs.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.wav").touch()
    os.symlink(elsewhere, songs / "linked")
    os.symlink(songs, elsewhere / "back")
    assert find_audio(songs) == [songs / "linked/a.wav"]


def test_a_folder_without_songs_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(UserError, match=r"holds no songs .*it holds readme\.md"):
        find_audio(tmp_path)
    with pytest.raises(UserError, match="it does not exist"):
        find_audio(tmp_path / "nosuch")


def test_a_file_that_goes_away_while_it_is_read_is_refused_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ogg", tone(0.2))

    def decode_and_lose(*wanted):
        decoded = _decode(*wanted)
        path.unlink()
        return decoded

    monkeypatch.setattr("sidestep.data.audio._decode", decode_and_lose)
    with pytest.raises(UserError, match=r"a\.ogg cannot be read as audio"):
        read_hashed(path)
