"""Preprocessed songs, read as the excerpts a run trains on.

Shapes: B batch, T latent frames, C latent channels (64), L condition tokens, D their width.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sidestep.data.manifest import AGAIN, SongRecord, read_manifest
from sidestep.data.sampler import PATCH_FRAMES, SongOrder, excerpt_at
from sidestep.errors import UserError
from sidestep.files import ensure_readable

LATENT_CHANNELS = 64


@dataclass
class Example:
    """An excerpt of one song."""

    song: int
    latents: Tensor
    """(T, C) float32."""
    condition: Tensor
    """(L, D)."""


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

    def to(self, device: torch.device) -> Batch:
        """Move every tensor."""
        moved = (
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (self.latents, self.condition, self.frame_mask, self.condition_mask)
        )
        return Batch(self.songs, *moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that moving to a GPU does not wait."""
        pinned = (
            None if tensor is None else tensor.pin_memory()
            for tensor in (self.latents, self.condition, self.frame_mask, self.condition_mask)
        )
        return Batch(self.songs, *pinned)  # type: ignore[arg-type]


class SongDataset(Dataset[Example]):
    """The excerpt at each position of a run's endless stream of songs.

    Args:
        folder: what ``python -m sidestep.preprocess`` wrote.
        max_seconds: longest excerpt.
        seed: decides the order of songs and where excerpts start.

    Raises:
        UserError: if the folder is not a dataset, or a file it names is missing.
    """

    def __init__(self, folder: Path, *, max_seconds: float, seed: int) -> None:
        self.folder, self.max_seconds, self.seed = folder, max_seconds, seed
        self.info, self.songs = read_manifest(folder)
        self.order = SongOrder(len(self.songs), seed)
        for song in self.songs:
            for file in (song.latents, song.conditions):
                if not (folder / file).is_file():
                    raise UserError(f"{folder / file} of {song.audio} is missing; {AGAIN}")
            if song.num_frames < PATCH_FRAMES:
                raise UserError(f"{song.audio} in {folder} has {song.num_frames} frames; a song needs {PATCH_FRAMES}")

    def check_tensors(self) -> None:
        """Read every file once, so that none of them stops a run days later.

        Raises:
            UserError: naming the first file that is damaged, of another shape than it should have, or holds NaN.
        """
        for song in self.songs:
            self._tensors(song, 0, song.num_frames)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change when what is trained on changes."""
        names = [f"{song.latents} {song.conditions} {song.prompt}\n" for song in self.songs]
        return hashlib.sha256("".join(names).encode()).hexdigest()[:16]

    def only(self, songs: list[int]) -> SongDataset:
        """The same dataset with none but these songs, given by their numbers."""
        part = copy.copy(self)
        part.songs = [self.songs[number] for number in songs]
        part.order = SongOrder(len(part.songs), self.seed)
        return part

    def __getitem__(self, position: int) -> Example:
        index = self.order[position]
        return self.excerpt(index, *excerpt_at(self.songs[index].num_frames, self.max_seconds, self.seed, position))

    def excerpt(self, index: int, start: int, length: int) -> Example:
        """Read ``length`` frames of one song from frame ``start`` on."""
        latents, condition = self._tensors(self.songs[index], start, length)
        return Example(index, latents.float(), condition)

    def _tensors(self, song: SongRecord, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Read some frames of a song's latents, (length, C), and its condition, (L, D)."""
        latents = self._read(song, song.latents, "latents", slice(start, start + length), LATENT_CHANNELS)
        condition = self._read(song, song.conditions, song.prompt, slice(None), self.info.condition_width)
        if len(latents) != length:
            raise UserError(
                f"{self.folder / song.latents} of {song.audio} is shorter than the {song.num_frames} frames that "
                f"songs.jsonl says; {AGAIN}"
            )
        if not len(condition):
            raise UserError(f"{self.folder / song.conditions} of {song.audio} holds no tokens; delete it and {AGAIN}")
        return latents, condition

    def _read(self, song: SongRecord, file: str, key: str, rows: slice, width: int) -> Tensor:
        path = self.folder / file
        try:
            ensure_readable(path)
            with safe_open(path, framework="pt") as tensors:
                tensor: Tensor = tensors.get_slice(key)[rows]
        except (SafetensorError, OSError, IndexError) as error:  # IndexError: it has no rows
            raise UserError(f"{path} of {song.audio} cannot be read ({error}); delete it and {AGAIN}") from error
        if tensor.ndim != 2 or tensor.shape[1] != width or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"{path} of {song.audio} holds {found}, not rows of {width}; delete it and {AGAIN}")
        if not tensor.isfinite().all():
            raise UserError(f"{path} of {song.audio} holds NaN or infinity; delete it and {AGAIN}")
        return tensor


def collate(examples: list[Example]) -> Batch:
    """Pad excerpts of several songs to one length and say what is padding.

    Raises:
        ValueError: for an excerpt that does not fill whole patches, which no mask can make equal to itself alone.
    """
    if odd := [len(example.latents) for example in examples if len(example.latents) % PATCH_FRAMES]:
        raise ValueError(f"excerpts must be whole patches of {PATCH_FRAMES} frames, got {odd[0]} frames")
    latents, frame_mask = _pad([example.latents for example in examples])
    condition, condition_mask = _pad([example.condition for example in examples])
    return Batch([example.song for example in examples], latents, condition, frame_mask, condition_mask)


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    if (lengths == lengths[0]).all():
        return padded, None
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
