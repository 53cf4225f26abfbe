"""Settings of what is measured and rendered while a run trains; none of them changes a step of training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from sidestep.errors import UserError


@dataclass(kw_only=True)
class HoldOutConfig:
    """Songs that are held out of training."""

    fraction: float = 0.0
    """Share of the songs to hold out, at least one of them; 0 holds out none."""
    songs: list[str] = field(default_factory=list)
    """Hold out these audio files instead, named as in songs.jsonl; * stands for any letters: [live/*,first.wav]."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise UserError(f"validation.fraction={self.fraction:g} must be at least 0 and below 1")
        if self.songs and self.fraction:
            raise UserError(
                f"validation.songs already says what is held out; leave validation.fraction={self.fraction:g} out"
            )

    @property
    def is_on(self) -> bool:
        """Whether any song is to be held out."""
        return bool(self.songs) or self.fraction > 0


@dataclass(kw_only=True)
class ValidationConfig(HoldOutConfig):
    """Songs that are held out of training, and how they are evaluated."""

    every_epochs: int = 5
    """How often the held-out songs are evaluated; the last step always is."""
    seconds: float = 30.0
    """Length of the excerpt of each song, the same whatever the run trains on, so that runs can be compared."""
    num_times: int = 8
    """Each song is evaluated at this many times, in the middle of equal parts of [0, 1]; no more than 100."""
    max_songs: int | None = 50
    """Evaluate no more than this many of the held-out songs, always the same ones; null evaluates all."""
    patience: int | None = None
    """End the run after this many evaluations in a row without a new best loss; null trains to the end."""
    scales: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.25])
    """Strengths at which the best adapter is evaluated at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, "validation", every_epochs=self.every_epochs, num_times=self.num_times, patience=self.patience)
        if self.num_times > 100:
            raise UserError(f"validation.num_times={self.num_times} must be no more than 100")
        _at_least(1, "validation", max_songs=self.max_songs)
        if not all(map(math.isfinite, self.scales)):
            raise UserError(f"validation.scales={self.scales} must be numbers, for example validation.scales=[0.5,1]")
        _refuse_twice("validation", self.scales)
        if not 0.08 <= self.seconds < math.inf:
            raise UserError(f"validation.seconds={self.seconds:g} must be at least 0.08 seconds")
        if self.patience is not None and not self.is_on:
            raise UserError(
                f"validation.patience={self.patience} has no effect without held-out songs; "
                f"type validation.fraction=0.1"
            )

    def without_effect(self) -> list[str]:
        """One sentence for each setting that was changed and has no effect."""
        if self.is_on:
            return []
        return [
            f"validation.{key} has no effect without held-out songs; type validation.fraction=0.1"
            for key in _changed(self)
        ]


@dataclass(kw_only=True)
class PreviewConfig:
    """Music rendered while a run trains, to listen to what it has learnt."""

    every_epochs: int | None = None
    """How often music is rendered; the last step is too. null renders none."""
    prompts: list[str] = field(default_factory=list)
    """What to render; by default the captions of two songs, held out ones first."""
    lyrics: str = ""
    """Sung in each of them; empty is an instrumental."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each prompt is rendered once per seed."""
    scales: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Strengths of the adapter; 0 is the base model, which is rendered once per run."""
    seconds: float = 20.0
    """Length of the music."""
    num_inference_steps: int | None = None
    """Sampling steps; null takes the run's own num_inference_steps."""

    def __post_init__(self) -> None:
        _at_least(1, "previews", every_epochs=self.every_epochs, num_inference_steps=self.num_inference_steps)
        if not 0.08 <= self.seconds <= 600:
            raise UserError(f"previews.seconds={self.seconds:g} must be at least 0.08 and no more than 600")
        if any(not 0 <= seed < 2**63 for seed in self.seeds) or not self.seeds:
            raise UserError(f"previews.seeds={self.seeds} must be whole numbers from 0 to 2**63 - 1, at least one")
        if not all(map(math.isfinite, self.scales)) or not any(self.scales):
            raise UserError(f"previews.scales={self.scales} must be numbers, one of them not 0: previews.scales=[0,1]")
        _refuse_twice("previews", self.scales)
        if any(not prompt.strip() for prompt in self.prompts):
            raise UserError("previews.prompts has an empty prompt; say what the music should be")

    def without_effect(self) -> list[str]:
        """One sentence for each setting that was changed and has no effect."""
        if self.every_epochs is not None:
            return []
        return [f"previews.{key} has no effect without previews.every_epochs=10" for key in _changed(self)]


def _changed(settings: ValidationConfig | PreviewConfig) -> list[str]:
    default = type(settings)()
    return [field.name for field in fields(settings) if getattr(settings, field.name) != getattr(default, field.name)]


def _refuse_twice(group: str, scales: list[float]) -> None:
    """Refuse scales that would be written as the same number, in names of files and of results."""
    if len({f"{scale:g}" for scale in scales}) < len(scales):
        raise UserError(f"{group}.scales={scales} names the same scale twice, to six digits")


def _at_least(least: int, group: str, **values: int | None) -> None:
    for key, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{group}.{key}={value} must be at least {least}")
