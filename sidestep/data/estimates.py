"""What is missing from the words of songs, heard in their sound: tempo and key, or captions and lyrics by a model.

Nothing that anybody wrote is replaced, and what is put in is marked as estimated. Answers are remembered by what was
heard, what was asked and who answered, so that they are asked for once.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import soundfile
import soxr
from tqdm import tqdm

from sidestep.acestep.prompts import is_instrumental_mark
from sidestep.captioner import ModelConfig, NoAnswerError
from sidestep.data import analysis
from sidestep.data.audio import SAMPLE_RATE, SILENT_PEAK, peak, read_audio
from sidestep.data.songs import caption_from_name
from sidestep.data.tags import can_read_tags, read_tags
from sidestep.data.words import SONG_KEYS, Song, convert, merge
from sidestep.errors import UserError
from sidestep.files import write_text

T = TypeVar("T")

CAPTIONER_RATE = 16_000  # what the encoders of models that hear read
_MISSING: dict[str, Callable[[Song], bool]] = {
    "bpm": lambda song: song.bpm is None,
    "keyscale": lambda song: not song.keyscale,
    "caption": lambda song: song.source in ("file name", "file tags") or _is_title(song),
    "lyrics": lambda song: not (song.lyrics or song.says_instrumental),
}


def _is_title(song: Song) -> bool:
    """Say whether the caption is only the name of the file or its title, which stand for one in songs.jsonl too."""
    if song.caption == caption_from_name(song.path):
        return True
    return can_read_tags() and song.caption == read_tags(song.path).get("caption", "").strip()


def estimate(songs: Sequence[Song], cache_dir: Path) -> list[str]:
    """Put tempo and key into songs that have none.

    Args:
        songs: get the values.
        cache_dir: where answers are remembered.

    Returns:
        What the person who asked should know.

    Raises:
        UserError: if librosa is not installed.
    """
    analysis.ensure_installed()

    def hear(name: str, samples: analysis.Samples, wanted: Sequence[str]) -> dict[str, Any]:
        heard = hashlib.sha256(samples.tobytes()).hexdigest()
        asked = ("estimate", analysis.METHOD, heard)
        answer: dict[str, Any] = _remembered(cache_dir, asked, partial(analysis.estimate_music, samples))
        return answer

    return _fill(songs, ("bpm", "keyscale"), analysis.read_middle, hear)


def ask(songs: Sequence[Song], captioner: ModelConfig, cache_dir: Path, unanswered: dict[str, str]) -> list[str]:
    """Put captions and lyrics into songs that have none, as a model hears them.

    Args:
        songs: get the values.
        captioner: whom to ask, and for what.
        cache_dir: where answers are remembered.
        unanswered: gets the songs about which there is no answer, and why.

    Returns:
        What the person who asked should know.

    Raises:
        UserError: if the model cannot be asked.
    """
    prompts = {"caption": captioner.caption_prompt, "lyrics": captioner.lyrics_prompt}

    def answer(key: str, wav: bytes) -> str:
        text = captioner.answer(prompts[key], wav)
        problems: list[str] = []
        convert(key, text, SONG_KEYS[key], {}, "the answer", problems)
        if problems:
            raise NoAnswerError(problems[0])
        return text

    def hear(name: str, wav: bytes, wanted: Sequence[str]) -> dict[str, Any]:
        heard = hashlib.sha256(wav).hexdigest()
        answers = {}
        for key in wanted:
            asked = ("captioner", captioner.identity(), prompts[key], heard)
            try:
                answers[key] = _remembered(cache_dir, asked, partial(answer, key, wav))
            except NoAnswerError as error:
                unanswered[name] = "; ".join([*filter(None, [unanswered.get(name)]), f"{key}: {error}"])
        return answers

    return _fill(songs, captioner.ask, partial(_as_wav, max_seconds=captioner.max_seconds), hear)


def _fill(
    songs: Sequence[Song],
    keys: Sequence[str],
    read: Callable[[Path], T],
    hear: Callable[[str, T, Sequence[str]], Mapping[str, Any]],
) -> list[str]:
    """Put what is heard into songs where it is missing, marked; what could not be heard is said in the notes.

    Args:
        songs: get the values.
        keys: what to look for.
        read: gives a song's sound from its path; what it refuses is left as it is.
        hear: gives values by key, from a song's name and sound, of those that are wanted.
    """
    notes: list[str] = []
    for song in tqdm([song for song in songs if any(_MISSING[key](song) for key in keys)], unit="song", disable=None):
        wanted = [key for key in keys if _MISSING[key](song)]
        try:
            sound = read(song.path)
        except UserError as error:
            notes.append(f"not heard: {error}")
            continue
        answers = hear(song.name, sound, wanted)
        given = {key: answers[key] for key in wanted if answers.get(key)}
        problems: dict[str, list[str]] = {}
        if is_instrumental_mark(str(given.get("lyrics", ""))):
            song.says_instrumental = song.is_instrumental = True
            given["lyrics"] = ""
        merge(song, given, "captioner", f"the answer about {song.name}", problems)
        song.estimated = sorted({*song.estimated, *given} - set(problems))
        notes += [message for messages in problems.values() for message in messages]
        if silent := [key for key in wanted if key in answers and key not in given]:
            notes.append(f"nothing heard of {song.name}: {', '.join(silent)}")
    return notes


def _as_wav(path: Path, max_seconds: float) -> bytes:
    """Read the beginning of a song as a WAV file, 16 kHz, mono, 16 bits.

    Raises:
        UserError: if it cannot be decoded, or is silent.
    """
    audio = read_audio(path, max_seconds)
    if peak(audio) < SILENT_PEAK:
        raise UserError(f"{path} is silent")
    samples = soxr.resample(audio.mean(dim=0).numpy(), SAMPLE_RATE, CAPTIONER_RATE)
    wav = io.BytesIO()
    soundfile.write(wav, samples.clip(-1, 1), CAPTIONER_RATE, format="WAV", subtype="PCM_16")
    return wav.getvalue()


def _remembered(cache_dir: Path, asked: Sequence[str], answer: Callable[[], Any]) -> Any:
    """Give the answer to what was asked before, or ask and remember it; an empty text is no answer to remember."""
    path = cache_dir.expanduser() / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # never asked, or the file is damaged
        found = answer()
    if found != "":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, ensure_ascii=False))
    return found
