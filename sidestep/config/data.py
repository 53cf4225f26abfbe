"""Settings of what a run makes of its dataset: which parts of songs, which of their words, and which other songs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from sidestep.captioner import CaptionerConfig
from sidestep.config.schema import root
from sidestep.errors import UserError


class Excerpts(StrEnum):
    """Names equal values, because OmegaConf matches an enum by name."""

    random = "random"
    windows = "windows"
    whole = "whole"


class ExcerptLyrics(StrEnum):
    full = "full"
    none = "none"


@dataclass(kw_only=True)
class PromptShares:
    """How often each of a song's texts is drawn; only the ratios count. All 0 leaves it to preprocessing."""

    caption: float = 0.0
    """The caption, with the custom tag in it."""
    genre: float = 0.0
    """The genre line, with the custom tag in it; a song without one is drawn with its caption."""
    tag: float = 0.0
    """The custom tag alone; a song without one is drawn with its caption."""

    def __post_init__(self) -> None:
        for key, share in self.given().items():
            if not 0 <= share < float("inf"):
                raise UserError(f"data.prompts.{key}={share:g} must be at least 0")

    def given(self) -> dict[str, float]:
        """The shares that are not 0, by text."""
        return {key: share for key, share in vars(self).items() if share}


@dataclass(kw_only=True)
class DataConfig:
    """What is drawn from each song."""

    excerpts: Excerpts | None = None
    """random, windows or whole; null takes windows if preprocessing made any (window_seconds), and else random."""
    excerpt_lyrics: ExcerptLyrics = ExcerptLyrics.full
    """Lyrics of an excerpt of a song whose lyrics carry no times: the full lyrics, or none."""
    prompts: PromptShares = field(default_factory=PromptShares)
    """How often the caption, the genre line and the tag alone are drawn."""
    lyrics_dropout: float = 0.0
    """Share of examples trained with empty lyrics."""
    prior_weight: float = 1.0
    """What the loss of songs of prior_dataset_dir is multiplied by."""
    allow_leaked_reference: bool = False
    """Train on datasets whose reference audio is the song itself, such as those of ACE-Step's preprocess_mode=lokr."""

    def __post_init__(self) -> None:
        if not 0 <= self.lyrics_dropout <= 1:
            raise UserError(f"data.lyrics_dropout={self.lyrics_dropout:g} must be from 0 to 1")
        if not 0 < self.prior_weight < float("inf"):
            raise UserError(f"data.prior_weight={self.prior_weight:g} must be above 0")


@root("songs_schema")
@dataclass(kw_only=True)
class SongsConfig:
    """The words of a folder of songs."""

    audio_dir: str = MISSING
    """Folder of songs, searched with its subfolders."""
    metadata_file: str | None = None
    """Table of songs (dataset.json, csv, tsv, jsonl, nml) to read instead of those found in audio_dir."""
    file_tags: bool = True
    """Read title, genre, tempo, key and lyrics from the tags inside the files, where nothing else gives them."""
    only: str = "*"
    """Change only songs whose path in audio_dir is like this: 'live/*'."""
    add_tag: str = ""
    """Make this the custom tag of the songs."""
    remove_tag: str = ""
    """Take this custom tag from the songs, and out of their captions, where it stands between commas."""
    captioner: CaptionerConfig = MISSING
    """Who writes captions and lyrics that are missing; nobody, unless one is chosen."""
    fill: bool = False
    """Take genre, tempo, key and lyrics that are missing from the tags inside the files."""
    estimate: bool = False
    """Estimate the tempo and key of songs that have none from their sound; takes pip install 'sidestep[analysis]'."""
    cache_dir: str = "~/.cache/sidestep"
    """Folder that remembers estimates and a captioner's answers, so that nothing is heard or asked twice."""
    write: bool = False
    """Write audio_dir/songs.jsonl; without this nothing is written."""

    def __post_init__(self) -> None:
        if not self.audio_dir.strip():
            raise UserError("audio_dir is empty; type audio_dir=...")
        for key in ("add_tag", "remove_tag"):
            if not getattr(self, key).isprintable():
                raise UserError(f"{key}={getattr(self, key)!r} must be one line of text")
