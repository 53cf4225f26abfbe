"""Tempo and key of a song, estimated from its sound with librosa: pip install 'sidestep[analysis]'."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from sidestep.data.audio import SAMPLE_RATE, SILENT_PEAK, read_audio
from sidestep.errors import UserError

METHOD = "beats and Krumhansl's keys, 1"
"""Goes up with every change that may change an estimate, so that none of an older method is remembered."""
RATE = 22_050
MAX_SECONDS = 120
"""Of a longer song, its middle is heard."""
MIN_SECONDS, MIN_BEATS = 8, 8
MIN_BPM = 70
"""Slower beats are taken for every second one, as DJ programs do: fewer songs are so slow than are heard so."""

Samples = npt.NDArray[np.float32]
_MAJOR = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MINOR = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
"""How well listeners found each note to fit a key, from its tonic upwards (Krumhansl and Kessler 1982)."""
MIN_LIKENESS = 0.6
"""Correlation with the nearest key below which a song is said to have none."""


def ensure_installed() -> None:
    """Refuse to go on without librosa.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("librosa") is None:
        raise UserError("estimate=true needs librosa: pip install 'sidestep[analysis]'")


def read_middle(path: Path) -> Samples:
    """Read up to :data:`MAX_SECONDS` from the middle of a song: mono, (S,), float32 at :data:`RATE`.

    Raises:
        UserError: if it cannot be decoded.
    """
    audio = read_audio(path).mean(dim=0).numpy()
    first = max(0, len(audio) - MAX_SECONDS * SAMPLE_RATE) // 2
    samples: Samples = soxr.resample(audio[first : first + MAX_SECONDS * SAMPLE_RATE], SAMPLE_RATE, RATE)
    return samples


def estimate_music(samples: Samples) -> dict[str, Any]:
    """Estimate ``bpm`` (float) and ``keyscale`` ("F# minor") of a song; what cannot be heard is left out.

    Args:
        samples: mono, (S,), float32 at :data:`RATE`.
    """
    if len(samples) < MIN_SECONDS * RATE or np.abs(samples).max() < SILENT_PEAK:
        return {}
    return {key: value for key, value in (("bpm", _tempo(samples)), ("keyscale", _key(samples))) if value is not None}


def _tempo(samples: Samples) -> float | None:
    """Beats per minute, from the distances of all beats: one distance alone is no finer than librosa's frames."""
    from librosa.beat import beat_track

    _, beats = beat_track(y=samples, sr=RATE, units="time")
    if len(beats) < MIN_BEATS:
        return None
    seconds, _ = np.polyfit(np.arange(len(beats)), beats, 1)
    bpm = 60 / float(seconds)
    while round(bpm) < MIN_BPM:
        bpm *= 2
    return round(bpm, 1)


def _key(samples: Samples) -> str | None:
    """The key whose profile is most like the loudness of the twelve notes."""
    from librosa.feature import chroma_cqt

    loudness = chroma_cqt(y=samples, sr=RATE).mean(axis=1)
    if not loudness.std():
        return None
    likeness = {
        (scale, tonic): np.corrcoef(loudness, np.roll(profile, tonic))[0, 1]
        for scale, profile in _PROFILES.items()
        for tonic in range(12)
    }
    scale, tonic = max(likeness, key=lambda key: likeness[key])
    if likeness[scale, tonic] < MIN_LIKENESS:
        return None
    return f"{(_MAJOR if scale == 'major' else _MINOR)[tonic]} {scale}"
