"""Tensor files of ACE-Step's and Side-Step's preprocessing, read as they are.

    <name>.pt                 target_latents (T, 64), attention_mask (T,), encoder_hidden_states (L, D),
                              encoder_attention_mask (L,), context_latents (T, 128) and metadata
    manifest.json             of ACE-Step: {"samples": ["<name>.pt", ...]}; without it, every .pt counts
    preprocess_meta.json      of Side-Step: which model it was made for

Their padding is cropped by their masks. Their context is not read: it is silence, as at inference, or a leak.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.acestep.prompts import apply_tag
from sidestep.acestep.weight_files import UNPICKLING_ERRORS, holds_its_values, one_line
from sidestep.config.typed import as_typed
from sidestep.data.manifest import HALF_CHARACTER, DatasetInfo, SongRecord
from sidestep.errors import UserError
from sidestep.files import ensure_readable, read_text

log = logging.getLogger(__name__)

LATENT_CHANNELS = 64
TENSORS = {"target_latents": 2, "attention_mask": 1, "encoder_hidden_states": 2, "encoder_attention_mask": 1}
"""What a file must hold, and how many dimensions each tensor has."""

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""What the values of a file may be."""


def holds_tensor_files(folder: Path) -> bool:
    """Whether a folder looks like the output of ACE-Step's or Side-Step's preprocessing."""
    if not folder.is_dir():
        return False
    try:
        return any(name.endswith(".pt") for name in _sample_names(folder))
    except UserError:  # what calls itself manifest.json may be anything, where no tensor files lie beside it
        return any(_is_sample(path) for path in folder.glob("*.pt"))


class LegacySongs:
    """A folder of tensor files.

    Args:
        folder: where they are.
        allow_leaks: take files whose reference audio is the song itself.

    Raises:
        UserError: naming every file that cannot be used, or if the reference is the song itself.
    """

    def __init__(self, folder: Path, *, allow_leaks: bool = False) -> None:
        self.folder = folder
        self._open = functools.lru_cache(maxsize=16)(_load)  # latents and condition of an example are read one by one
        variant = _variant(folder)
        names = _sample_names(folder)
        problems: list[str] = []
        self.songs: list[SongRecord] = []
        widths: dict[int, str] = {}
        tags, leaking, audio = set(), [], []
        for name in names:
            try:
                sample = _load(folder / name)
                metadata = sample["metadata"] if isinstance(sample.get("metadata"), dict) else {}
                self.songs.append(_record(name, sample, metadata, folder))
            except UserError as error:
                problems.append(str(error))
                continue
            except (zipfile.BadZipFile, NotImplementedError) as error:  # of what torch does not read of the archive
                problems.append(f"{folder / name} is damaged: {one_line(error)}")
                continue
            widths.setdefault(sample["encoder_hidden_states"].shape[1], name)
            tags.add(str(metadata.get("custom_tag") or ""))
            audio.append(str(metadata.get("audio_path") or ""))
            if metadata.get("preprocess_mode") == "lokr" or _holds_itself(sample):
                leaking.append(name)
        if len(widths) > 1:
            both = " and ".join(f"{name} of {width}" for width, name in widths.items())
            problems.append(f"{folder} mixes models: conditions of {both} channels")
        if problems:
            raise UserError("; ".join(problems))
        again = _again(folder, audio, variant, sorted(tags - {""}))
        if leaking and not allow_leaks:
            raise UserError(
                f"{len(leaking)} files of dataset_dir={folder}, {leaking[0]} the first, were made as by ACE-Step's "
                f"preprocess_mode=lokr, where the reference audio is the song itself, so that a run learns to copy it; "
                f"make them anew with {again}, or type data.allow_leaked_reference=true "
                "(allow_leaked_reference=true for python -m sidestep.analyze)"
            )
        log.warning(
            "dataset_dir=%s holds tensor files of another trainer: their lyrics lack the form that inference gives "
            "them, and their reference audio is %s; %s makes them right",
            folder,
            "the song itself" if leaking else "zeros, where inference has silence",
            again,
        )
        self.info = DatasetInfo(
            model_variant=variant or "unknown",
            condition_width=next(iter(widths)),
            fingerprints={},
            settings={"custom_tags": sorted(tags - {""})},
            num_songs=len(self.songs),
        )

    def latents(self, index: int, start: int, length: int) -> Tensor:
        """Read ``length`` frames of a song: (length, 64)."""
        path = self.folder / self.songs[index].latents
        sample = self._open(path)
        return _finite(_unpadded(sample["target_latents"], sample["attention_mask"])[start : start + length], path)

    def condition(
        self, index: int, prompt: str, *, window: int | None, sings: bool, reference: int | None = None
    ) -> Tensor:
        """Read the one condition that a song has, (L, D)."""
        path = self.folder / self.songs[index].latents
        sample = self._open(path)
        return _finite(_unpadded(sample["encoder_hidden_states"], sample["encoder_attention_mask"]), path)

    def files(self, index: int) -> dict[str, str]:
        """The one file of a song."""
        song = self.songs[index]
        return {song.latents: f"{song.num_frames} frames"}

    def check(self, index: int, file: str) -> None:
        """Read it once, whole."""
        song = self.songs[index]
        self.latents(index, 0, song.num_frames)
        self.condition(index, song.prompt, window=None, sings=True)

    def caption(self, index: int) -> str:
        """The caption of a song with its trigger word in front, where both trainers put it unless told otherwise."""
        metadata = _load(self.folder / self.songs[index].latents).get("metadata")
        tag = str(metadata.get("custom_tag") or "") if isinstance(metadata, dict) else ""
        return apply_tag(self.songs[index].caption.strip(), tag, "prepend")


def _load(path: Path) -> dict[str, Any]:
    """Open a file without reading more of it than is asked for.

    Raises:
        UserError: if it is not what these trainers write.
    """
    try:
        ensure_readable(path)
        sample = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except UNPICKLING_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {reason:.160}") from error
    if not isinstance(sample, dict):
        raise UserError(f"{path} holds a {type(sample).__name__}, not the tensors of a song")
    for name, ndim in TENSORS.items():
        tensor = sample.get(name)
        if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{path}: {name} must be a tensor of {ndim} dimensions, it is {found}")
        sample[name] = tensor.detach()
    for name, tensor in sample.items():
        if isinstance(tensor, Tensor) and (tensor.dtype not in DTYPES or not holds_its_values(tensor, path)):
            kind = f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise UserError(f"{path}: {name} must be plain numbers that the file itself holds, it is {kind}")
    metadata = sample.get("metadata")
    for name, value in metadata.items() if isinstance(metadata, dict) else ():
        if isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r:.60} of its metadata is a tensor")
    for tensor, mask in (("target_latents", "attention_mask"), ("encoder_hidden_states", "encoder_attention_mask")):
        if len(sample[tensor]) != len(sample[mask]) or not sample[tensor].is_floating_point():
            raise UserError(f"{path}: {mask} has {len(sample[mask])} values for the {len(sample[tensor])} of {tensor}")
    if sample["target_latents"].shape[1] != LATENT_CHANNELS:
        raise UserError(f"{path}: target_latents must have 64 channels, it has {sample['target_latents'].shape[1]}")
    return sample


def _unpadded(tensor: Tensor, mask: Tensor) -> Tensor:
    """Take the rows that are no padding; those of a mask without gaps cost no copy."""
    mask = mask.bool()
    num_rows = int(mask.sum())
    return tensor[:num_rows] if mask[:num_rows].all() else tensor[mask]


def _holds_itself(sample: dict[str, Any]) -> bool:
    """Whether the context of a song is the song, as where the reference is: others have silence or zeros there."""
    latents, context = sample["target_latents"], sample.get("context_latents")
    if not isinstance(context, Tensor) or context.ndim != 2 or context.shape != (len(latents), 2 * LATENT_CHANNELS):
        return False
    frames = slice(0, 50)  # two seconds tell
    return torch.equal(context[frames, :LATENT_CHANNELS].to(latents), latents[frames]) and bool(latents[frames].any())


def _record(name: str, sample: dict[str, Any], metadata: dict[str, Any], folder: Path) -> SongRecord:
    num_frames, num_tokens = (int(sample[key].bool().sum()) for key in ("attention_mask", "encoder_attention_mask"))
    if num_frames < 2 or not num_tokens:
        raise UserError(f"{folder / name} has {num_frames} frames and {num_tokens} tokens that are not padding")
    repeat = metadata.get("repeat")
    for key in ("filename", "caption", "custom_tag"):
        if HALF_CHARACTER.search(str(metadata.get(key) or "")):
            raise UserError(f"{folder / name}: {key} holds half a character, {metadata[key]!r:.60}")
    with zipfile.ZipFile(folder / name) as archive:  # which is what a .pt is; it holds a checksum of each tensor
        entries = archive.infolist()
    contents = repr([(entry.filename.partition("/")[2], entry.CRC) for entry in entries])
    size = sample["target_latents"].untyped_storage().nbytes()  # names in the archive do not say whose they are
    checksums = "-".join(f"{entry.CRC:08x}" for entry in entries if entry.file_size == size)
    return SongRecord(
        audio=str(metadata.get("filename") or name),
        latents=name,
        conditions=hashlib.sha256(contents.encode()).hexdigest(),
        prompt="caption",
        num_frames=num_frames,
        sound=f"{size}-{checksums}",
        caption=str(metadata.get("caption") or ""),
        repeat=repeat if type(repeat) is int and 1 <= repeat < 10**6 else 1,
        source="tensor file",
    )


def _sample_names(folder: Path) -> list[str]:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return sorted(path.name for path in folder.glob("*.pt") if _is_sample(path))
    content = _read_json(manifest)
    samples = content.get("samples")
    if (
        not isinstance(samples, list)
        or not samples
        or not all(isinstance(name, str) and "\0" not in name for name in samples)
    ):
        raise UserError(f'{manifest} must name its files as {{"samples": ["<name>.pt", ...]}}')
    inside = folder.resolve()
    names = []
    for name in samples:
        path = (folder / name).resolve()
        if not path.is_relative_to(inside) or not path.exists():
            path = inside / Path(name.replace("\\", "/")).name  # as it was named on another machine
        names.append(path.relative_to(inside).as_posix())
    return names


def _is_sample(path: Path) -> bool:
    return not path.name.endswith(".tmp.pt") and "__writing__" not in path.name and not path.name.startswith(".")


def _variant(folder: Path) -> str | None:
    """Which model Side-Step says the files are for; ACE-Step does not say."""
    path = folder / "preprocess_meta.json"
    if not path.is_file():
        return None
    variant = _read_json(path).get("model_variant")
    return variant.removeprefix("acestep-v15-").replace("-", "_") if isinstance(variant, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be an object, it is a {type(content).__name__}")
    return content


def _again(folder: Path, audio: list[str], variant: str | None, tags: list[str]) -> str:
    """Write the command that makes the dataset anew."""
    folders = {path.replace("\\", "/").rpartition("/")[0] for path in audio} - {""}
    try:
        songs = os.path.commonpath(folders) if folders else "<songs>"
    except ValueError:  # on several drives
        songs = "<songs>"
    typed = [
        "audio_dir=<songs>" if songs == "<songs>" else as_typed("audio_dir", songs),
        as_typed("dataset_dir", f"{folder}-sidestep"),
        f"model_variant={variant or '<variant>'}",
        *(as_typed("custom_tag", tag) for tag in tags if len(tags) == 1),
    ]
    return f"python -m sidestep.preprocess {' '.join(typed)}"


def _finite(tensor: Tensor, path: Path) -> Tensor:
    if not tensor.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity; preprocess it again")
    return tensor
