"""Preprocessed songs, read as the excerpts a run trains on.

Shapes: B batch, T latent frames, C latent channels (64), L condition tokens, D their width.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sidestep.acestep.prompts import caption_of
from sidestep.config.data import DataConfig, ExcerptLyrics, Excerpts
from sidestep.data.checks import Checkable, check_files
from sidestep.data.legacy import LegacySongs, holds_tensor_files
from sidestep.data.manifest import AGAIN, INFO, DatasetInfo, SongRecord, condition_keys, read_manifest, uncollected
from sidestep.data.sampler import (
    FRAMES_PER_SECOND,
    PATCH_FRAMES,
    SongOrder,
    excerpt_length,
    excerpt_start,
    reference_parts,
    references_outside,
    window_at,
    window_frames,
    window_starts,
)
from sidestep.errors import UserError
from sidestep.files import ensure_readable, sha256_of
from sidestep.seeds import derive_seed

log = logging.getLogger(__name__)

LATENT_CHANNELS = 64


@dataclass
class Example:
    """An excerpt of one song."""

    song: int
    latents: Tensor
    """(T, C) float32."""
    condition: Tensor
    """(L, D)."""
    weight: float = 1.0
    """What its loss is multiplied by."""


@dataclass
class Batch:
    """Excerpts padded to one length; a mask is None where nothing is padded."""

    songs: list[int]
    latents: Tensor
    """(B, T, C) float32."""
    condition: Tensor
    """(B, L, D)."""
    frame_mask: Tensor | None
    """(B, T) bool, False where a frame is padding."""
    condition_mask: Tensor | None
    """(B, L) bool, False where a token is padding."""
    weights: Tensor | None = None
    """(B,) float32, what each loss is multiplied by; None where all are 1."""

    def to(self, device: torch.device) -> Batch:
        """Move every tensor."""
        moved = (
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (self.latents, self.condition, self.frame_mask, self.condition_mask, self.weights)
        )
        return Batch(self.songs, *moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that moving to a GPU does not wait."""
        pinned = (
            None if tensor is None else tensor.pin_memory()
            for tensor in (self.latents, self.condition, self.frame_mask, self.condition_mask, self.weights)
        )
        return Batch(self.songs, *pinned)  # type: ignore[arg-type]


class SongFolder(Checkable, Protocol):
    """A folder of preprocessed songs, whoever preprocessed them."""

    info: DatasetInfo
    songs: list[SongRecord]

    def latents(self, index: int, start: int, length: int) -> Tensor:
        """Read ``length`` frames of a song: (length, C), of any float dtype."""

    def condition(
        self, index: int, prompt: str, *, window: int | None, sings: bool, reference: int | None = None
    ) -> Tensor:
        """Read a condition of a song, (L, D); the arguments are those of :func:`condition_keys`."""

    def caption(self, index: int) -> str:
        """The caption that a song was encoded with, its trigger word included."""


class StoredSongs:
    """What ``python -m sidestep.preprocess`` wrote.

    Args:
        folder: where.
        allow_leaks: take songs whose reference audio is the whole song itself.

    Raises:
        UserError: if the folder is not a dataset, a file it names is missing, or the reference is the song itself.
    """

    def __init__(self, folder: Path, *, allow_leaks: bool = False) -> None:
        self.folder = folder
        self.info, self.songs = read_manifest(folder)
        found = {f"{entry.name}/{name}" for entry in os.scandir(folder) if entry.is_dir() for name in os.listdir(entry)}
        for key in ("latents", "conditions"):
            if missing := {getattr(song, key) for song in self.songs} - found:
                song = next(song for song in self.songs if getattr(song, key) in missing)
                raise UserError(f"{folder / getattr(song, key)} of {song.audio} is missing; {AGAIN}")
        if short := [song for song in self.songs if song.num_frames < PATCH_FRAMES]:
            found_frames = f"{short[0].num_frames} frames; a song needs {PATCH_FRAMES}"
            raise UserError(f"{short[0].audio} in {folder} has {found_frames}")
        if self.info.settings.get("reference") == "song" and not allow_leaks:
            for song in self.songs:
                if song.num_references != len(reference_parts(song.num_frames)):
                    raise UserError(
                        f"dataset_dir={folder}: the reference audio of {song.audio} is the song itself, so that a run "
                        f"learns to copy it; {AGAIN}, which stores its parts one by one"
                    )

    def latents(self, index: int, start: int, length: int) -> Tensor:
        song = self.songs[index]
        (latents,) = self._read(song, song.latents, ("latents",), slice(start, start + length), LATENT_CHANNELS)
        if len(latents) != length:
            raise UserError(
                f"{self.folder / song.latents} of {song.audio} is shorter than the {song.num_frames} frames that "
                f"songs.jsonl says; {AGAIN}"
            )
        return latents

    def condition(
        self, index: int, prompt: str, *, window: int | None, sings: bool, reference: int | None = None
    ) -> Tensor:
        song = self.songs[index]
        keys = condition_keys(song, prompt, window=window, sings=sings, reference=reference)
        return torch.cat(self._parts(song, keys))

    def files(self, index: int) -> dict[str, str]:
        song = self.songs[index]
        about = (song.prompts, song.is_instrumental, song.is_timed, song.num_frames, song.num_references)
        parts = f"{about} {self.info.settings.get('window_seconds')} {self.info.condition_width} {self.info.format}"
        return {
            song.latents: f"{song.num_frames} frames{song.latents_sha256}",
            song.conditions: f"{parts}{song.conditions_sha256}",
        }

    def check(self, index: int, file: str) -> None:
        song = self.songs[index]
        if file == song.latents:
            self.latents(index, 0, song.num_frames)
            self._compare(song, file, song.latents_sha256)
        else:
            self._check_conditions(song)
            self._compare(song, file, song.conditions_sha256)

    def _compare(self, song: SongRecord, file: str, expected: str) -> None:
        """Refuse a file that was changed since preprocessing wrote it, though it can be read."""
        if expected and sha256_of(self.folder / file) != expected:
            raise UserError(
                f"{self.folder / file} of {song.audio} was changed since it was written (its hash differs); "
                f"delete it and {AGAIN}"
            )

    def _check_conditions(self, song: SongRecord) -> None:
        seconds = self.info.settings.get("window_seconds")
        windows: list[int] = []
        if seconds is not None and song.num_frames > (frames := window_frames(seconds)):
            windows = window_starts(song.num_frames, frames)
        keys = {
            key
            for window in (None, *range(len(windows)))
            for prompt in song.prompts
            for sings in (True, False)
            for key in condition_keys(song, prompt, window=window, sings=sings)
        }
        for reference in range(song.num_references):
            keys |= set(condition_keys(song, song.prompt, window=None, sings=False, reference=reference))
        self._parts(song, sorted(keys))

    def _parts(self, song: SongRecord, keys: Sequence[str]) -> list[Tensor]:
        parts = self._read(song, song.conditions, keys, slice(None), self.info.condition_width)
        if not all(len(part) for part in parts):
            raise UserError(f"{self.folder / song.conditions} of {song.audio} holds no tokens; delete it and {AGAIN}")
        return parts

    def caption(self, index: int) -> str:
        song = self.songs[index]
        try:
            with safe_open(self.folder / song.conditions, framework="pt") as tensors:
                texts = json.loads((tensors.metadata() or {}).get("texts", "{}"))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder / song.conditions} of {song.audio} cannot be read ({error})") from error
        text = texts.get("caption") if isinstance(texts, dict) else None
        return caption_of(text) if isinstance(text, str) else song.caption.strip()

    def _read(self, song: SongRecord, file: str, keys: Sequence[str], rows: slice, width: int) -> list[Tensor]:
        path = self.folder / file
        try:
            ensure_readable(path)
            with safe_open(path, framework="pt") as tensors:
                read: list[Tensor] = [tensors.get_slice(key)[rows] for key in keys]
        except FileNotFoundError as error:
            raise UserError(f"{path} of {song.audio} is missing; put it back, or {AGAIN}") from error
        except OSError as error:  # of the disk, which does not say that the file is damaged
            raise UserError(
                f"{path} of {song.audio} cannot be read ({error.strerror or error}); "
                f"mend that and type the same command again"
            ) from error
        except (SafetensorError, IndexError) as error:  # IndexError: it has no rows
            raise UserError(f"{path} of {song.audio} cannot be read ({error}); delete it and {AGAIN}") from error
        for tensor in read:
            if tensor.ndim != 2 or tensor.shape[1] != width or not tensor.is_floating_point():
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise UserError(f"{path} of {song.audio} holds {found}, not rows of {width}; delete it and {AGAIN}")
            if not is_finite(tensor):
                raise UserError(f"{path} of {song.audio} holds NaN or infinity; delete it and {AGAIN}")
        return read


class Draw(NamedTuple):
    """What lies at a position of the stream of songs, but for the tensors."""

    song: int
    start: int
    """First frame of the excerpt."""
    length: int
    prompt: str
    """Which of the song's texts is told."""
    window: int | None
    """Which of the song's windows this is, or None."""
    sings: bool
    """False where the lyrics are left out."""
    reference: int | None
    """Which part of the song is its reference audio, or None."""


class SongDataset(Dataset[Example]):
    """The excerpt at each position of a run's endless stream of songs.

    With a prior dataset, every second batch is of its songs.

    Args:
        folder: what ``python -m sidestep.preprocess`` wrote, or the tensor files of ACE-Step or Side-Step.
        max_seconds: longest excerpt.
        seed: decides the order of songs, where excerpts start, and which of their texts are told.
        config: what is drawn from each song.
        batch_size: how many consecutive positions make a batch.
        prior_folder: songs that the model should go on making as it did; another dataset.

    Raises:
        UserError: if a folder is not a dataset, a file it names is missing, or ``config`` asks for what it has not.
    """

    @uncollected()
    def __init__(
        self,
        folder: Path,
        *,
        max_seconds: float,
        seed: int,
        config: DataConfig | None = None,
        batch_size: int = 1,
        prior_folder: Path | None = None,
    ) -> None:
        self.folder, self.max_seconds, self.seed, self.batch_size = folder, max_seconds, seed, batch_size
        self.config = config or DataConfig()
        self._window_frames: int | None = None
        own = open_songs(folder, allow_leaks=self.config.allow_leaked_reference)
        self.info = own.info
        self._places: list[tuple[SongFolder, int]] = [(own, index) for index in range(len(own.songs))]
        self._num_own = len(own.songs)
        if self.config.excerpts in (None, Excerpts.windows) and own.info.settings.get("window_seconds") is not None:
            self._window_frames = window_frames(own.info.settings["window_seconds"])
        if prior_folder is not None:
            prior = open_songs(prior_folder, allow_leaks=self.config.allow_leaked_reference)
            self._places += [(prior, index) for index in range(len(prior.songs))]
        self.songs = [source.songs[index] for source, index in self._places]
        """Those of the prior dataset last."""
        self._check_config()
        self._note_missing_references()
        self._make_orders()

    def _make_orders(self) -> None:
        own, prior = (self._order(part) for part in (self.songs[: self._num_own], self.songs[self._num_own :]))
        self.order = own
        self._prior_order = prior if len(prior) else None

    def _order(self, songs: list[SongRecord]) -> SongOrder:
        lengths = [self._length(song) for song in songs] if self.batch_size > 1 else None
        repeats = [song.repeat for song in songs]
        return SongOrder(len(songs), self.seed, repeats=repeats, lengths=lengths, batch_size=self.batch_size)

    @property
    def own_songs(self) -> list[SongRecord]:
        """The songs without those of the prior dataset; their numbers are the same."""
        return self.songs[: self._num_own]

    @property
    def prior_songs(self) -> list[SongRecord]:
        """The songs of the prior dataset."""
        return self.songs[self._num_own :]

    @property
    def sources(self) -> list[SongFolder]:
        """The folders that songs come from: the run's own, and the prior dataset if there is one."""
        return list({id(source): source for source, _ in self._places}.values())

    @property
    def songs_per_epoch(self) -> int:
        """Positions in which every song comes as often as it should, with as many of the prior dataset between."""
        return len(self.order) * (1 if self._prior_order is None else 2)

    def only(self, songs: Sequence[int]) -> SongDataset:
        """Leave all but these songs out, given by their numbers; those of the prior dataset stay."""
        part = copy.copy(self)
        part._places = [self._places[number] for number in songs] + self._places[self._num_own :]
        part._num_own = len(songs)
        part.songs = [source.songs[index] for source, index in part._places]
        part._make_orders()
        return part

    def check_tensors(self, spare: Path | None = None, *, process: int = 0, num_processes: int = 1) -> None:
        """Read every file once, so that none of them stops a run days later; a few seconds per gigabyte.

        The arguments are those of :func:`check_files`.

        Raises:
            UserError: naming the first file that is damaged, of the wrong shape, or not finite.
        """
        for source in self.sources:
            songs = [index for owner, index in self._places if owner is source]
            check_files(source, songs, spare, process=process, num_processes=num_processes)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change when what is trained on changes."""
        about = [
            f"{song.latents} {song.conditions} {song.prompt} {song.prompts} {song.repeat} {song.weight}\n"
            for song in self.songs
        ]
        about += [str(source.info.settings.get("window_seconds")) for source in self.sources]
        about.append(str(self._num_own))
        return hashlib.sha256("".join(about).encode()).hexdigest()[:16]

    def __getitem__(self, position: int) -> Example:
        draw = self.draw(position)
        return self.excerpt(
            *draw[:3], prompt=draw.prompt, window=draw.window, sings=draw.sings, reference=draw.reference
        )

    def excerpt(
        self,
        number: int,
        start: int,
        length: int,
        *,
        prompt: str | None = None,
        window: int | None = None,
        sings: bool = True,
        reference: int | None = None,
    ) -> Example:
        """Read ``length`` frames of one song from frame ``start`` on.

        Args:
            number: of the song.
            start: first frame.
            length: in frames.
            prompt: which of its texts; None takes the one that preprocessing chose.
            window: one of its windows, whose words are told instead of the whole song's.
            sings: False leaves the lyrics out.
            reference: which part of the song is its reference audio; None takes the first outside of the excerpt.
        """
        source, index = self._places[number]
        song = self.songs[number]
        if reference is None:
            reference = next(iter(self._references(song, start, length)), None)
        condition = source.condition(index, prompt or song.prompt, window=window, sings=sings, reference=reference)
        latents = source.latents(index, start, length).float()
        weight = song.weight * (self.config.prior_weight if number >= self._num_own else 1)
        return Example(number, latents, condition, weight)

    def excerpt_at(self, number: int, seconds: float, place: int) -> Example:
        """Read a part of a song that depends on nothing but what is given, whatever a run draws.

        Where preprocessing made windows, it lies in one of them and is told what is sung there.

        Args:
            number: of the song.
            seconds: longest excerpt.
            place: any number of at least 0; decides where the part lies.
        """
        song = self.songs[number]
        made_with = self._places[number][0].info.settings.get("window_seconds")
        begin, available, window = 0, song.num_frames, None
        if made_with is not None and song.num_frames > window_frames(made_with):
            available = window_frames(made_with)
            starts = window_starts(song.num_frames, available)
            place, window = divmod(place, len(starts))
            begin = starts[window]
        length = excerpt_length(available, seconds)
        return self.excerpt(number, begin + place % (available - length + 1), length, window=window)

    def caption(self, number: int) -> str:
        """What a song is described by in training, with its trigger word; empty where nothing describes it."""
        source, index = self._places[number]
        return source.caption(index)

    def draw(self, position: int) -> Draw:
        """Decide what lies at a position: the song, the excerpt, and its words."""
        number, visit = self._visit(position)
        song = self.songs[number]
        length = self._length(song)
        window = None
        if (starts := self._window_starts(song)) is None:
            start = excerpt_start(song.num_frames, length, seed=self.seed, song=number, visit=visit)
        else:
            window = window_at(len(starts), seed=self.seed, song=number, visit=visit)
            start = starts[window]
        sings = self._uniform("lyrics", position) >= self.config.lyrics_dropout
        if length < song.num_frames - 1 and not (window is not None and song.is_timed):
            sings = sings and self.config.excerpt_lyrics is ExcerptLyrics.full
        parts = self._references(song, start, length)
        reference = parts[derive_seed(self.seed, "reference", position) % len(parts)] if parts else None
        return Draw(number, start, length, self._prompt(song, position), window, sings, reference)

    def _references(self, song: SongRecord, start: int, length: int) -> list[int]:
        return references_outside(song.num_frames, start, length) if song.num_references else []

    def _note_missing_references(self) -> None:
        """Say for how many songs an excerpt leaves nothing to refer to."""
        own = [
            song for source in self.sources if source.info.settings.get("reference") == "song" for song in source.songs
        ]
        if without := [song for song in own if not self._references(song, 0, self._length(song))]:
            log.warning(
                "the reference audio of %d of %d songs is silence, as excerpts of up to %g s leave no part of them",
                len(without),
                len(own),
                max(map(self._length, without)) / FRAMES_PER_SECOND,
            )

    def _visit(self, position: int) -> tuple[int, int]:
        if self._prior_order is None:
            return self.order.visit(position)
        batch, place = divmod(position, self.batch_size)
        turn, is_prior = divmod(batch, 2)
        if not is_prior:
            return self.order.visit(turn * self.batch_size + place)
        number, visit = self._prior_order.visit(turn * self.batch_size + place)
        return self._num_own + number, visit

    def _prompt(self, song: SongRecord, position: int) -> str:
        shares = self.config.prompts.given()
        if not shares:
            return song.prompt
        place = self._uniform("prompt", position) * sum(shares.values())
        ends = list(itertools.accumulate(shares.values()))
        prompt = list(shares)[min(bisect.bisect(ends, place), len(ends) - 1)]
        return prompt if prompt in song.prompts else "caption"

    def _uniform(self, purpose: str, position: int) -> float:
        return derive_seed(self.seed, purpose, position) / 2**63

    def _window_starts(self, song: SongRecord) -> list[int] | None:
        """First frame of each window of a song, or None where it is not trained on by windows."""
        frames = self._window_frames
        return None if frames is None or song.num_frames <= frames else window_starts(song.num_frames, frames)

    def _length(self, song: SongRecord) -> int:
        frames = self._window_frames
        return excerpt_length(song.num_frames, self.max_seconds if frames is None else frames / FRAMES_PER_SECOND)

    def _check_config(self) -> None:
        """Refuse what the songs do not have."""
        wanted = self.config.excerpts
        seconds = {source.info.settings.get("window_seconds") for source in self.sources}
        if wanted in (None, Excerpts.windows):
            if len(seconds) > 1:
                raise UserError(
                    f"dataset_dir and prior_dataset_dir were made with window_seconds {_either(seconds)}; "
                    f"make them with the same, or use data.excerpts=random"
                )
            if wanted is Excerpts.windows and seconds == {None}:
                raise UserError(
                    f"data.excerpts=windows, but dataset_dir={self.folder} was made without window_seconds; "
                    f"run python -m sidestep.preprocess again with window_seconds={self.max_seconds:g}"
                )
            if self._window_frames is not None and self._window_frames > self.max_seconds * FRAMES_PER_SECOND:
                raise UserError(
                    f"the windows of dataset_dir={self.folder} are {_either(seconds)} s long, longer than max_seconds="
                    f"{self.max_seconds:g}; use max_seconds={_either(seconds)}, data.excerpts=random, or preprocess "
                    f"again with a smaller window_seconds"
                )
        if wanted is Excerpts.whole:
            longest = max(self.songs, key=lambda song: song.num_frames)
            if self._length(longest) < longest.num_frames - 1:
                needed = math.ceil(longest.num_frames / FRAMES_PER_SECOND)
                raise UserError(
                    f"data.excerpts=whole, but {longest.audio} is {needed} s long; "
                    f"use max_seconds={needed}, or leave data.excerpts out"
                )
        if self.config.lyrics_dropout or self.config.excerpt_lyrics is ExcerptLyrics.none:
            for source in self.sources:
                if isinstance(source, LegacySongs):
                    raise UserError(
                        f"{source.folder} holds one condition per song, with its lyrics; leave data.lyrics_dropout and "
                        f"data.excerpt_lyrics out, or make a dataset with python -m sidestep.preprocess"
                    )
        shares = self.config.prompts.given()
        if shares and any(song.prompt != "caption" for song in self.own_songs):
            log.warning("data.prompts decides which text is told, so genre_ratio and prompt_override of songs do not")
        for prompt in shares:
            if not any(prompt in song.prompts for song in self.own_songs):
                have = "custom_tag" if prompt == "tag" else prompt
                raise UserError(f"data.prompts.{prompt}: no song of dataset_dir={self.folder} has a {have}")


def open_songs(folder: Path, *, allow_leaks: bool = False) -> SongFolder:
    """Open a folder of preprocessed songs.

    Raises:
        UserError: if it is none.
    """
    if not (folder / INFO).is_file() and holds_tensor_files(folder):
        return LegacySongs(folder, allow_leaks=allow_leaks)
    return StoredSongs(folder, allow_leaks=allow_leaks)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; the sum of most tensors tells, in a thirtieth of the time."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())  # finite values may have an infinite sum


def _either(values: set[float | None]) -> str:
    return " and ".join("null" if value is None else f"{value:g}" for value in sorted(values, key=str))


def collate(examples: list[Example]) -> Batch:
    """Pad excerpts of several songs to one length and say what is padding.

    Raises:
        ValueError: for an excerpt that does not fill whole patches, which no mask can make equal to itself alone.
    """
    if odd := [len(example.latents) for example in examples if len(example.latents) % PATCH_FRAMES]:
        raise ValueError(f"excerpts must be whole patches of {PATCH_FRAMES} frames, got {odd[0]} frames")
    latents, frame_mask = _pad([example.latents for example in examples])
    condition, condition_mask = _pad([example.condition for example in examples])
    weights = torch.tensor([example.weight for example in examples])
    return Batch(
        [example.song for example in examples],
        latents,
        condition,
        frame_mask,
        condition_mask,
        None if (weights == 1).all() else weights,
    )


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    if len(rows) == 1:
        return rows[0][None], None
    if len({len(row) for row in rows}) == 1:
        return torch.stack(rows), None
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
