"""Audio files to the form the VAE reads: stereo float32 at 48 kHz, neither normalised nor clamped."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from sidestep.data.sampler import PATCH_FRAMES
from sidestep.errors import UserError
from sidestep.files import describe, sha256_of

SAMPLE_RATE = 48_000
SAMPLES_PER_FRAME = 1_920  # one latent frame, 1/25 second
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
LOSSLESS = (".wav", ".flac")
MIN_SAMPLES = PATCH_FRAMES * SAMPLES_PER_FRAME
SILENT_PEAK = 1e-4  # -80 dBFS

_Samples = npt.NDArray[np.float32]


def find_audio(folder: Path) -> list[Path]:
    """List the audio files of a folder and its subfolders, sorted by their path in it.

    Hidden files and folders are passed over; linked folders are followed, each at most once.

    Raises:
        UserError: if there is no such folder, a folder in it cannot be read, a song is no regular file, or there is no
            audio.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    if not folder.is_dir():
        raise UserError(f"audio_dir={folder} is not a folder of songs: {describe(folder)}")
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()  # a link back to a folder already read
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    for path in found:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path} is not a regular file; take it out of audio_dir={folder}")
    if not found:
        raise UserError(f"audio_dir={folder} holds no songs ({', '.join(SUFFIXES)}); {describe(folder)}")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_audio(path: Path, max_seconds: float | None = None) -> Tensor:
    """Decode a song.

    Mono is doubled; of more than two channels the first two are kept, as ACE-Step does.

    Args:
        path: the audio file.
        max_seconds: read no more than this; None reads all.

    Returns:
        Samples, (2, S), float32 at 48 kHz; S is ``round(samples in the file * 48000 / rate of the file)``.

    Raises:
        UserError: if the file cannot be decoded, ends early, holds a value that is no number, or is shorter than
            two latent frames.
    """
    return _as_stereo(path, *_read(path, max_seconds)[:2])


def read_hashed(path: Path, max_seconds: float | None = None) -> tuple[Tensor, str]:
    """Decode a song once, for :func:`read_audio`'s samples and a hash of what it sounds like.

    The hash is that of the samples of wav and flac, and of the bytes of all others; 64 hex digits. So the same
    recording is found in both, under any name and with any tags. Decoders of the others may differ in the last bits
    from one machine to the next.

    Raises:
        UserError: as :func:`read_audio` does.
    """
    samples, rate, sound = _read(path, max_seconds, _hash_sound)
    return _as_stereo(path, samples, rate), sound


def probe_audio(path: Path, max_seconds: float | None = None) -> None:
    """Look at the header of a song and decode a little, which finds most files that are damaged or end early.

    Raises:
        UserError: as :func:`read_audio` does.
    """
    read_audio(path, min(0.5, max_seconds or 0.5))
    if path.suffix.lower() == ".mp3":
        return  # as in _decode
    try:
        with soundfile.SoundFile(path) as file:
            promised = _promised_frames(file)
            wanted = promised if max_seconds is None else min(promised, round(max_seconds * file.samplerate))
            _refuse_if_short(path, file.frames, wanted, file.samplerate)
            if file.format == "OGG" and wanted == promised:
                _refuse_without_last_page(path, file.frames / file.samplerate)
            if file.format == "FLAC":  # its length stands in front, whatever follows
                _refuse_without_end(path, file, wanted)
    except (OSError, soundfile.LibsndfileError):
        return  # it is for PyAV, which just read it


def peak(audio: Tensor) -> float:
    """Give the largest magnitude of a song; below :data:`SILENT_PEAK` it is silent."""
    return audio.abs().max().item()


def _read(
    path: Path, max_seconds: float | None, name: Callable[[Path, _Samples, int], str] = lambda *_: ""
) -> tuple[_Samples, int, str]:
    """Decode to finite samples (S, channels), the file's own rate, and what ``name`` makes of them."""
    try:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        samples, rate = _decode(path, max_seconds)
        named = name(path, samples, rate)
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory; set max_song_seconds=... or split it") from error
    except (OSError, ValueError, soundfile.LibsndfileError, av.FFmpegError) as error:  # ValueError: it changes form
        raise UserError(f"{path} cannot be read as audio: {error}") from error
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds samples that are not finite numbers; export it again")
    return samples, rate, named


def _hash_sound(path: Path, samples: _Samples, rate: int) -> str:
    if path.suffix.lower() not in LOSSLESS:
        return sha256_of(path)
    digest = hashlib.sha256(f"{rate} {samples.shape} ".encode())
    digest.update(np.ascontiguousarray(samples).data)
    return digest.hexdigest()


def _as_stereo(path: Path, samples: _Samples, rate: int) -> Tensor:
    """Bring samples (S, channels) to (2, S) at 48 kHz."""
    samples = samples[:, :2] if samples.shape[1] > 1 else samples.repeat(2, axis=1)
    num_samples = round(len(samples) * SAMPLE_RATE / rate)
    if num_samples < MIN_SAMPLES:
        raise UserError(f"{path} is {len(samples) / rate:.3f} s long; a song needs at least 0.08 s")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ")
        # the resampler may give one sample more or less, and the number of latent frames must not depend on that
        samples = np.pad(samples, ((0, max(0, num_samples - len(samples))), (0, 0)))[:num_samples]
    return torch.from_numpy(np.ascontiguousarray(samples.T))


def _decode(path: Path, max_seconds: float | None) -> tuple[_Samples, int]:
    """Decode to (S, channels) and the file's own rate."""
    if path.suffix.lower() == ".mp3":  # libsndfile guesses the length of some, and prints what it stumbles over
        return _decode_with_ffmpeg(path, max_seconds)
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return _decode_with_ffmpeg(path, max_seconds)  # m4a and aac, which libsndfile does not read
    with file:
        rate = file.samplerate
        promised = _promised_frames(file)
        wanted = promised if max_seconds is None else min(promised, round(max_seconds * rate))
        samples: _Samples = file.read(wanted, dtype="float32", always_2d=True)
    _refuse_if_short(path, len(samples), wanted, rate)
    if file.format == "OGG" and wanted == promised:
        _refuse_without_last_page(path, len(samples) / rate)
    return samples, rate


def _refuse_if_short(path: Path, found: int, wanted: int, rate: int) -> None:
    # headers count encoded frames, and priming and padding are cut off, so a little less is not a fault
    if wanted - found > max(0.01 * wanted, 0.25 * rate):
        raise UserError(f"{path} ends early: {found / rate:.1f} s of {wanted / rate:.1f} s; copy it again")


def _promised_frames(file: soundfile.SoundFile) -> int:
    """Give the length that the header promises; of a file cut short, libsndfile reports what is left of it."""
    frames: int = file.frames
    sizes = re.search(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if sizes is None or int(sizes[1]) >= 0x7FFFF000:  # programs that write to a pipe promise the largest size there is
        return frames
    return max(frames, round(frames * int(sizes[1]) / max(1, int(sizes[2]))))


def _refuse_without_end(path: Path, file: soundfile.SoundFile, wanted: int) -> None:
    """Refuse a file of which the last wanted sample cannot be decoded; reading it takes a few milliseconds."""
    try:
        file.seek(max(0, wanted - 1))
        is_there = len(file.read(1)) == 1
    except soundfile.LibsndfileError:
        is_there = False
    if not is_there:
        raise UserError(f"{path} ends early: it has no sound at {wanted / file.samplerate:.1f} s; copy it again")


def _refuse_without_last_page(path: Path, seconds: float) -> None:
    """Refuse an Ogg file that does not end in a whole page that is marked as the last (RFC 3533, section 6)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_307))  # the longest page there is
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if not (len(page) > 27 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])):
        raise UserError(f"{path} ends early, after {seconds:.1f} s; copy it again or export it again")


def _decode_with_ffmpeg(path: Path, max_seconds: float | None) -> tuple[_Samples, int]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise UserError(f"{path} cannot be read as audio: it holds no audio stream")
        stream = container.streams.audio[0]
        rate = stream.rate
        wanted = None if max_seconds is None else round(max_seconds * rate)
        to_float = av.AudioResampler(format="fltp")
        parts: list[_Samples] = []
        num_samples = 0
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                if path.suffix.lower() != ".mp3":  # every player skips a damaged frame of an mp3, and junk at its end
                    raise
                continue
            parts += [part.to_ndarray() for frame in frames for part in to_float.resample(frame)]
            num_samples += sum(frame.samples for frame in frames)
            if wanted is not None and num_samples >= wanted:
                break
        if not parts:
            raise UserError(f"{path} cannot be read as audio: it holds no samples")
        if container.format.name == "mp3":
            promised = _promised_by_xing(path)
        elif "mp4" in container.format.name and stream.duration is not None:
            promised = round(stream.duration * stream.time_base * rate)
        else:
            promised = 0  # other lengths are guessed from the bit rate
        _refuse_if_short(path, num_samples, promised if wanted is None else min(wanted, promised), rate)
        return np.concatenate(parts, axis=1).T[:wanted], rate


def _promised_by_xing(path: Path) -> int:
    """Give the samples per channel, priming included, that the Xing or LAME header of an mp3 counts; 0 without one.

    FFmpeg does not believe it where more than music follows, such as a picture at the end, and guesses instead.
    """
    with path.open("rb") as file:
        tag = file.read(10)
        if tag[:3] == b"ID3":  # its size has seven bits in a byte (ID3v2.3, section 3.1)
            file.seek(10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False)))
        else:
            file.seek(0)
        head = file.read(4_096)
    # a frame of layer III, its side information of 9 to 32 bytes, and what the header says it holds
    found = re.search(rb"\xff([\xe2\xe3\xf2\xf3\xfa\xfb])..(?:..)?.{9,32}?(?:Xing|Info)...(.)(.{4})", head, re.DOTALL)
    if found is None or not found[2][0] & 1:
        return 0
    samples_per_frame = 1_152 if found[1][0] & 0x18 == 0x18 else 576  # MPEG 1, or 2 and 2.5
    return samples_per_frame * int.from_bytes(found[3], "big")
