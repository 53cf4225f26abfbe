"""Songs to a dataset: audio through the VAE first, then the words through the text and condition encoders.

Only one of the two stages is in memory at a time. Every file is named by a hash of all that went into it and
appears only when complete, so a run that was stopped goes on where it was, and a run without news loads no model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import sidestep
from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.acestep.conditioning import REFERENCE_FRAMES, encode_lyrics, encode_reference, encode_text, tokenize
from sidestep.acestep.prompts import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS, apply_tag, caption_prompt, lyrics_prompt
from sidestep.config.typed import as_typed
from sidestep.data.audio import SAMPLES_PER_FRAME, SILENT_PEAK, peak, probe_audio, read_hashed
from sidestep.data.lyrics import sung_between
from sidestep.data.manifest import (
    INFO,
    PROMPTS,
    SONGS,
    DatasetInfo,
    SongRecord,
    describes_dataset,
    names_stored_songs,
    parse_cuts,
    read_manifest,
    write_manifest,
)
from sidestep.data.sampler import FRAMES_PER_SECOND, reference_parts, window_frames, window_starts
from sidestep.data.shards import SHARDS, Shard, hash_listing, merge_shards, shard_folder, songs_of, write_shard
from sidestep.data.songs import SongList, read_songs
from sidestep.data.words import Song
from sidestep.devices import resolve_device, resolve_dtype
from sidestep.errors import UserError, printable
from sidestep.files import (
    alone_in,
    describe,
    ensure_readable,
    remove_abandoned,
    sha256_of,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from sidestep.config.settings import PreprocessConfig

log = logging.getLogger(__name__)

LATENTS, CONDITIONS = "latents", "conditions"
HASHES = ".audio_hashes.json"
"""What the audio files hashed to, so that the same command again need not read them: path -> size, time, hash."""
_REFERENCE = "<reference>"
_SETTLED_NS = 3_000_000_000  # some file systems count in steps of 2 s; a file changed since is read again
OVERLAP_FRAMES = 2 * FRAMES_PER_SECOND  # far more than the 0.3 s that one latent frame of the VAE hears on each side


@dataclass(kw_only=True)
class PreprocessSummary:
    """What a run of preprocessing did, for the person who started it."""

    dataset_dir: Path
    model_variant: str
    checkpoint_dir: str
    written: set[Path] = field(default_factory=set)
    """Encoded files that are new."""
    changed: set[str] = field(default_factory=set)
    """Songs of which something was encoded now."""
    unchanged: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """Songs and entries of dataset.json left out, and why."""
    num_frames: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    """How many captions came from "dataset.json", "sidecar" and "file name"."""
    truncated: dict[str, dict[str, int]] = field(default_factory=dict)
    """Songs with a text longer than ACE-Step reads: tokens cut from each text."""
    silent: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Entries of tables without an audio file, by file and line."""
    notes: list[str] = field(default_factory=list)
    num_unused_files: int = 0
    """Encoded files that no song of this dataset uses any more."""
    is_complete: bool = True
    """Whether there is a dataset to train on; not before the last of its parts is done."""

    def lines(self) -> list[str]:
        """Say it in lines of text, the next command last."""
        songs = len(self.changed) + len(self.unchanged)
        seconds = self.num_frames / FRAMES_PER_SECOND
        sources = ", ".join(f"{count} from {source}" for source, count in self.sources.most_common())
        lines = [
            f"{songs} songs in {self.dataset_dir}: {len(self.changed)} encoded now, {len(self.unchanged)} unchanged",
            f"{seconds / 60:.1f} minutes of music, {self.num_frames} latent frames; captions: {sources}",
        ]
        lines += [f"skipped {printable(name)}: {printable(reason)}" for name, reason in self.failed.items()]
        for name, cuts in self.truncated.items():
            cut = " and ".join(f"{tokens} tokens of the {text}" for text, tokens in cuts.items())
            lines.append(f"cut {name}: {cut} are past what ACE-Step reads")
        lines += [f"silent {name}: no sample is louder than -80 dBFS" for name in self.silent]
        lines += [printable(f"{where}: there is no audio file {name}") for where, name in self.missing.items()]
        lines += map(printable, self.notes)
        if self.num_unused_files:
            lines.append(f"{self.num_unused_files} encoded files are of no song any more and were left in place")
        if not self.is_complete:
            return lines
        settings = {"dataset_dir": self.dataset_dir, "model_variant": self.model_variant, "adapter": "lokr"}
        if self.checkpoint_dir != "checkpoints":
            settings["checkpoint_dir"] = self.checkpoint_dir
        typed = " ".join(as_typed(key, str(value)) for key, value in settings.items())
        return [*lines, f"next: python -m sidestep.train {typed}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(kw_only=True)
class _Prompts:
    """What the model reads about one song."""

    texts: dict[str, str]
    """Prompts of "caption" and, if the song has them, "genre" and "tag"; those of windows are "window.caption", ..."""
    lyrics: dict[str, str]
    """Lyrics prompts under "lyrics" and, if there are any, "instrumental" for none and "window.<n>.lyrics"."""


def _names(file: Path | None) -> list[str]:
    return [] if file is None else [file.name]


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Write or bring up to date the dataset of a folder of songs.

    A song that cannot be used is left out and named in the summary.

    Raises:
        UserError: if a setting, the checkpoint or a dataset.json is wrong, another process works in the same folder,
            or no song can be used.
    """
    folder = Path(config.dataset_dir)
    _check_is_no_folder_of_songs(folder, config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), config.model_variant)
    listing = read_songs(
        Path(config.audio_dir),
        metadata_file=None if config.metadata_file is None else Path(config.metadata_file),
        custom_tag=config.custom_tag,
        tag_position=None if config.tag_position is None else config.tag_position.value,
        genre_ratio=config.genre_ratio,
        language=config.language,
        file_tags=config.file_tags,
    )
    if listing.lost:
        told = "; ".join(f"{printable(where)}: {printable(reason)}" for where, reason in listing.lost.items())
        raise UserError(f"{told}; mend it first, since some songs would be told other words in the place of these")
    _make_folders(folder)
    if config.shard is not None and config.num_shards is not None:
        return _preprocess_shard(config, checkpoint, listing, device, dtype, config.shard, config.num_shards)
    with alone_in(folder):
        return _update(config, checkpoint, listing, device, dtype, lambda *written: write_manifest(folder, *written))


def _preprocess_shard(
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    listing: SongList,
    device: torch.device,
    dtype: torch.dtype,
    shard: int,
    num_shards: int,
) -> PreprocessSummary:
    """Encode one part of the songs, and put the dataset together if it was the last."""
    dataset_dir = Path(config.dataset_dir)
    folder = shard_folder(dataset_dir, shard, num_shards)
    songs, all_songs = songs_of(listing.songs, shard, num_shards), listing.songs
    listing_hash = hash_listing(all_songs)
    # an entry of dataset.json that cannot be used belongs to no part; one of them speaks of it
    own = dataclasses.replace(
        listing,
        songs=songs,
        failed=listing.failed if shard == 0 else {},
        missing=listing.missing if shard == 0 else {},
    )
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        (folder / "shard.json").unlink(missing_ok=True)
        written: list[tuple[DatasetInfo, list[SongRecord]]] = []
        summary = _update(config, checkpoint, own, device, dtype, lambda info, records: written.append((info, records)))
        ((info, records),) = written
        info.settings["custom_tags"] = sorted({song.custom_tag for song in all_songs if song.custom_tag})
        write_shard(folder, Shard(listing=listing_hash, info=info, songs=records, failed=summary.failed))
    with alone_in(dataset_dir, wait=True):  # others may be done at the same time
        missing = merge_shards(dataset_dir, num_shards, all_songs, listing_hash)
    summary.is_complete = not missing
    if missing:
        shown = ", ".join(missing[:20])
        summary.notes.append(f"the dataset is put together when all {num_shards} shards are done; still to do: {shown}")
    else:
        summary.notes.append(f"all {num_shards} shards are done, and the dataset is put together")
    return summary


def _update(
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    listing: SongList,
    device: torch.device,
    dtype: torch.dtype,
    write: Callable[[DatasetInfo, list[SongRecord]], None],
) -> PreprocessSummary:
    """Encode what is new of the songs, and write down what there is.

    Args:
        config: every setting.
        checkpoint: of the model the dataset is for.
        listing: the songs.
        device: of the models.
        dtype: of the text and condition encoders.
        write: writes the description of the dataset and its songs.
    """
    folder = Path(config.dataset_dir)
    for part in (folder, folder / LATENTS, folder / CONDITIONS):
        remove_abandoned(part, alone=not (folder / SHARDS).exists())  # other parts may be at work
    before = _read_before(folder)
    was_for = before[0].model_variant if before is not None else None
    summary = PreprocessSummary(
        dataset_dir=folder,
        model_variant=config.model_variant.name,
        checkpoint_dir=config.checkpoint_dir,
        failed=dict(listing.failed),
    )
    for name, reason in listing.failed.items():  # at once, because encoding may take hours
        log.warning("%s is left out: %s", printable(name), printable(reason))
    for where, name in listing.missing.items():
        log.warning("%s: there is no audio file %s", printable(where), printable(name))
    fingerprints = {part: checkpoint.fingerprint(part) for part in ("vae", "text_encoder", "condition_encoder")}

    to_encode = listing.songs + _reference_song(config.reference, listing.songs)
    latents = _encode_songs(config, checkpoint, to_encode, fingerprints["vae"], device, summary)
    summary.changed.discard(_REFERENCE)
    if _REFERENCE in summary.failed:
        raise UserError(f"reference={config.reference} cannot be used: {summary.failed[_REFERENCE]}")
    reference = latents.pop(_REFERENCE, None)
    imitated = latents if config.reference == "song" else {}
    about_latents = {name: _about_latents(file) for name, file in latents.items()}
    num_frames = {name: frames for name, (frames, _) in about_latents.items()}

    songs = [song for song in listing.songs if song.name in latents]
    prompts = _write_prompts(songs, num_frames, listing.tag_position, config.window_seconds)
    silence = checkpoint.silence()[:REFERENCE_FRAMES]
    encoders = [fingerprints["text_encoder"], fingerprints["condition_encoder"], _hash_of(silence), str(dtype)]
    sources = {name: [imitated[name].name, "in parts"] if name in imitated else _names(reference) for name in prompts}
    conditions = {
        name: folder / CONDITIONS / f"{_key(prompt.texts, prompt.lyrics, encoders, *sources[name])}.safetensors"
        for name, prompt in prompts.items()
    }
    sound = silence if reference is None else reference_frames(load_file(reference)["latents"])
    _encode_prompts(checkpoint, prompts, conditions, sound, imitated, device, dtype, summary)
    about_conditions = {name: _about_conditions(file) for name, file in conditions.items()}

    songs = [song for song in songs if song.name in conditions]
    if not songs and config.shard is None:
        num_songs = len({song.name for song in listing.songs} | listing.failed.keys())
        reasons = printable("; ".join(summary.failed.values()))
        raise UserError(f"none of the {num_songs} songs can be used: {reasons}")
    summary.num_frames = sum(num_frames[song.name] for song in songs)
    info = DatasetInfo(
        model_variant=config.model_variant.name,
        condition_width=about_conditions[songs[0].name][0] if songs else 0,
        fingerprints=fingerprints,
        settings=_settings(config, listing, dtype),
        num_songs=len(songs),
        total_seconds=summary.num_frames / FRAMES_PER_SECOND,
        sidestep_version=sidestep.__version__,
    )
    records = [
        _record(song, prompts[song.name], latents[song.name], conditions[song.name], num_frames[song.name])
        for song in songs
    ]
    for record in records if imitated else ():
        record.num_references = len(reference_parts(record.num_frames))
    _add_hashes(records, folder, summary.written, before[1] if before is not None else [])
    write(info, records)

    summary.unchanged = {song.name for song in songs} - summary.changed
    summary.sources = Counter(song.source for song in songs)
    summary.truncated = {name: cuts for name, (_, cuts) in about_conditions.items() if cuts}
    summary.silent = [song.name for song in songs if about_latents[song.name][1] < SILENT_PEAK]
    summary.missing, summary.notes = listing.missing, listing.notes
    if config.window_seconds is None and (timed := sum(bool(song.timed_lyrics) for song in songs)):
        summary.notes.append(f"{timed} songs have lyrics with times, which window_seconds=60 would tell with each part")
    if was_for not in (None, config.model_variant.name):
        summary.notes.append(f"the dataset was for model_variant={was_for} and is now for {config.model_variant.name}")
    if config.shard is None:  # the others' files are not unused
        summary.num_unused_files = _unused_files(folder, {*latents.values(), *conditions.values()})
    return summary


@torch.no_grad()
def encode_latents(vae: Any, audio: Tensor, *, tile_seconds: float, generator: torch.Generator) -> Tensor:
    """Encode a song, of any length in bounded memory, into latents sampled once over the whole song.

    Tiles begin and end on latent frames and overlap by 2 seconds on each side, which are thrown away; so the
    result is that of encoding everything at once, and no frame is lost where two tiles meet.

    Args:
        vae: diffusers' ``AutoencoderOobleck``, in float32.
        audio: (2, S) at 48 kHz.
        tile_seconds: length of a tile with its overlap; more than 4.
        generator: on the CPU; decides the noise.

    Returns:
        Latents, (T, 64), float32 on the CPU, with T = S // 1920.
    """
    num_frames = audio.shape[1] // SAMPLES_PER_FRAME
    tile_frames = int(tile_seconds * FRAMES_PER_SECOND)
    stride = num_frames if num_frames <= tile_frames else tile_frames - 2 * OVERLAP_FRAMES
    means, stds = [], []
    for start in range(0, num_frames, stride):
        end = min(start + stride, num_frames)
        left, right = max(0, start - OVERLAP_FRAMES), end + OVERLAP_FRAMES
        tile = audio[:, left * SAMPLES_PER_FRAME : right * SAMPLES_PER_FRAME if right < num_frames else None]
        posterior = vae.encode(tile[None].to(vae.device)).latent_dist
        kept = slice(start - left, end - left)
        means.append(posterior.mean[0, :, kept].float().cpu())
        stds.append(posterior.std[0, :, kept].float().cpu())
    mean, std = torch.cat(means, dim=1), torch.cat(stds, dim=1)
    return (mean + std * torch.randn(mean.shape, generator=generator)).T.contiguous()


def reference_frames(latents: Tensor) -> Tensor:
    """Take the reference audio from a song's latents: ten seconds from the middle of each third, as 30 seconds.

    ACE-Step's inference takes ten seconds from a random place of each third; a shorter song is repeated first.

    Args:
        latents: (T, 64).

    Returns:
        (750, 64).
    """
    length = REFERENCE_FRAMES // 3
    latents = latents.repeat(math.ceil(REFERENCE_FRAMES / len(latents)), 1)
    third = len(latents) // 3
    starts = [part * third + (third - length) // 2 for part in range(3)]
    return torch.cat([latents[start : start + length] for start in starts])


# first pass: audio


def _reference_song(reference: str, songs: list[Song]) -> list[Song]:
    """The audio file that all songs take for their reference, as a song without words; none for the other choices.

    Raises:
        UserError: if there is no such file, or it is one of the songs, which would be told its own sound.
    """
    if reference in ("silence", "song"):
        return []
    if not Path(reference).is_file():
        found = (
            "it is no plain file"
            if Path(reference).exists() and not Path(reference).is_dir()
            else describe(Path(reference))
        )
        raise UserError(f"reference={reference} must be silence, song, or an audio file: {found}")
    size, digest = Path(reference).stat().st_size, sha256_of(Path(reference))
    for song in songs:
        with contextlib.suppress(OSError):  # what cannot be read is said where it is encoded
            if song.path.stat().st_size == size and sha256_of(song.path) == digest:
                raise UserError(
                    f"reference={reference} is the song {song.name} itself, which would be told its own sound; "
                    f"use another file, or reference=song, which tells each song of its other parts"
                )
    return [Song(path=Path(reference), name=_REFERENCE)]


def _encode_songs(
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    songs: list[Song],
    vae_fingerprint: str,
    device: torch.device,
    summary: PreprocessSummary,
) -> dict[str, Path]:
    """Encode the audio that was not encoded before; return the latents file of every song that has one."""
    hashes, hashed = _hash_audio(songs, summary)
    files: dict[str, Path] = {}
    for name, digest in hashes.items():
        key = _key(digest, config.max_song_seconds, vae_fingerprint, config.seed)
        files[name] = summary.dataset_dir / LATENTS / f"{key}.safetensors"
    paths = {song.name: song.path for song in songs}
    todo = {name: paths[name] for name, file in files.items() if not _is_usable(file, _about_latents)}
    for name in _refuse_at_once(todo, config.max_song_seconds, summary):
        del files[name], todo[name]
    if todo:
        vae = checkpoint.load_vae(device=device, dtype=torch.float32)
        broken: dict[Path, str] = {}
        first = {files[name]: name for name in reversed(todo)}  # of songs with the same audio, one is encoded
        ahead = _read_ahead([todo[name] for name in todo if first[files[name]] == name], config.max_song_seconds)
        try:
            for name in _with_progress(list(todo), "encoding audio"):
                if first[files[name]] == name:
                    try:
                        audio, sound = next(ahead).result()
                        latents = _encode_song(vae, todo[name], audio, files[name].stem, config)
                        if _version(todo[name]) != hashed[name]:  # it would be kept under the hash of the old audio
                            raise UserError(f"{todo[name]} changed while it was read; type the same command again")
                    except (UserError, FileNotFoundError) as error:
                        broken[files[name]] = str(error)
                    else:
                        _save(files[name], {"latents": latents}, {"peak": f"{peak(audio):.3g}", "sound": sound})
                        summary.written.add(files[name])
                if files[name] in broken:
                    summary.failed[name] = broken[files[name]]
                    del files[name]
                else:
                    summary.changed.add(name)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the VAE ran out of memory at tile_seconds={config.tile_seconds:g}; "
                f"use tile_seconds={max(5, int(config.tile_seconds / 2))} or device=cpu"
            ) from error
        finally:
            ahead.close()
        del vae
        _free_memory(device)
    return files


def _read_ahead(paths: list[Path], max_seconds: float | None) -> Generator[Future[tuple[Tensor, str]]]:
    """Read songs in order, each while the one before is encoded; their errors come with their results.

    Yields:
        The samples (2, S) and the hash of the sound.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-audio") as reader:
        following: Future[tuple[Tensor, str]] | None = None
        for path in paths:
            current, following = following, reader.submit(read_hashed, path, max_seconds)
            if current is not None:
                yield current
        if following is not None:
            yield following


def _hash_audio(songs: list[Song], summary: PreprocessSummary) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Hash the audio files, by name of the song, and say which version of each was hashed; unread if unchanged."""
    file = summary.dataset_dir / HASHES
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    known = known if isinstance(known, dict) else {}
    kept, hashes, versions = dict(known), {}, {}
    for song in songs:
        where = os.path.abspath(song.path)
        try:
            version = _version(song.path)
            before = known.get(where)
            if isinstance(before, list) and before[:2] == [*version] and len(before) == 3:
                digest = str(before[2])
            else:
                digest = sha256_of(song.path)
        except OSError as error:
            summary.failed[song.name] = f"{song.path} cannot be read: {error}"
            continue
        hashes[song.name], versions[song.name] = digest, version
        if time.time_ns() - version[1] > _SETTLED_NS:
            kept[where] = [*version, digest]
    if kept != known:
        with contextlib.suppress(OSError):  # it only saves time; what cannot be written is said where it matters
            write_text(file, json.dumps(kept) + "\n")
    return hashes, versions


def _refuse_at_once(songs: Mapping[str, Path], max_seconds: float | None, summary: PreprocessSummary) -> list[str]:
    """Find songs that cannot be decoded before any is encoded, which may take hours; return their names."""
    refused = []
    for name, path in songs.items():
        try:
            probe_audio(path, max_seconds)
        except UserError as error:
            summary.failed[name] = str(error)
            refused.append(name)
            if name != _REFERENCE:
                log.warning("%s is left out: %s", printable(name), printable(str(error)))
    return refused


def _version(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds, which tell whether a file was written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _encode_song(vae: Any, path: Path, audio: Tensor, key: str, config: PreprocessConfig) -> Tensor:
    """Give the latents of a song's samples (2, S): (T, 64) in float16."""
    generator = torch.Generator().manual_seed(int(key[:15], 16))  # the same in any order of songs
    latents = encode_latents(vae, audio, tile_seconds=config.tile_seconds, generator=generator).half()
    if not latents.isfinite().all():
        raise UserError(f"{path} is so loud that its latents are not finite numbers; export it again")
    return latents


# second pass: words


def _write_prompts(
    songs: list[Song], num_frames: dict[str, int], tag_position: str, window_seconds: float | None
) -> dict[str, _Prompts]:
    """Write what the model reads about each song."""
    prompts = {}
    for song in songs:
        captions = {
            "caption": apply_tag(song.caption, song.custom_tag, tag_position),
            "genre": song.genre and apply_tag(song.genre, song.custom_tag, tag_position),
            "tag": song.custom_tag,
        }
        durations = {"": num_frames[song.name] // FRAMES_PER_SECOND}
        lyrics = {"lyrics": song.lyrics} | ({"instrumental": ""} if song.lyrics else {})
        if window_seconds is not None and num_frames[song.name] > (length := window_frames(window_seconds)):
            durations["window."] = int(window_seconds)
            if song.timed_lyrics:
                for n, start in enumerate(window_starts(num_frames[song.name], length)):
                    begin, end = start / FRAMES_PER_SECOND, (start + length) / FRAMES_PER_SECOND
                    lyrics[f"window.{n}.lyrics"] = sung_between(song.timed_lyrics, begin, end)
        prompts[song.name] = _Prompts(
            texts={
                window + key: caption_prompt(
                    caption,
                    bpm=song.bpm,
                    timesignature=song.timesignature,
                    keyscale=song.keyscale,
                    duration=duration,
                )
                for window, duration in durations.items()
                for key, caption in captions.items()
                if caption
            },
            lyrics={key: lyrics_prompt(words, song.language) for key, words in lyrics.items()},
        )
    return prompts


def _encode_prompts(
    checkpoint: Checkpoint,
    prompts: dict[str, _Prompts],
    files: dict[str, Path],
    reference: Tensor,
    imitated: Mapping[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    summary: PreprocessSummary,
) -> None:
    """Encode the words that were not encoded before; take songs whose condition is of no use out of ``files``.

    Args:
        checkpoint: of the encoders.
        prompts: of each song.
        files: where its condition belongs.
        reference: latents of the reference audio of all songs, (750, 64).
        imitated: latents of songs whose parts are reference audio besides.
        device: of the encoders.
        dtype: of the encoders.
        summary: gets what was encoded and what failed.
    """
    todo = [name for name, file in files.items() if not _is_usable(file, _about_conditions)]
    if not todo:
        return
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=device, dtype=dtype)
    condition_encoder = checkpoint.load_condition_encoder(device=device, dtype=dtype)
    reference_token = encode_reference(reference, condition_encoder)
    for name in _with_progress(todo, "encoding words"):
        cuts: dict[str, int] = {}

        def ids(key: str, prompt: str, limit: int, cuts: dict[str, int] = cuts) -> Tensor:
            tokens, cut = tokenize(tokenizer, prompt, limit)
            cuts |= {key: cut} if cut else {}
            return tokens

        same = _first_keys(prompts[name].texts) | _first_keys(prompts[name].lyrics)
        texts = {key: ids(key, text, MAX_TEXT_TOKENS) for key, text in prompts[name].texts.items() if same[key] == key}
        lyrics = {
            key: ids(key, text, MAX_LYRIC_TOKENS) for key, text in prompts[name].lyrics.items() if same[key] == key
        }
        encoders = {"text_encoder": text_encoder, "condition_encoder": condition_encoder}
        parts = {key: encode_text(tokens, **encoders) for key, tokens in texts.items()}
        parts |= {key: encode_lyrics(tokens, **encoders) for key, tokens in lyrics.items()}
        parts["reference"] = reference_token
        parts |= {key: parts[first].clone() for key, first in same.items() if key != first}
        if name in imitated:
            latents = load_file(imitated[name])["latents"]
            for number, (begin, end) in enumerate(reference_parts(len(latents))):
                own = reference_frames(latents[begin:end])
                parts[f"reference.{number}"] = encode_reference(own, condition_encoder)
        parts = {key: part.cpu().contiguous() for key, part in parts.items()}
        if not all(part.isfinite().all() for part in parts.values()):
            summary.failed[name] = f"the condition of {name} is not finite in {dtype}; use precision=fp32"
            summary.changed.discard(name)
            del files[name]
            continue
        read = json.dumps(prompts[name].texts | prompts[name].lyrics)
        _save(files[name], parts, {"cut": json.dumps(cuts), "texts": read})
        summary.written.add(files[name])
        summary.changed.add(name)
    del text_encoder, condition_encoder
    _free_memory(device)


def _first_keys(prompts: Mapping[str, str]) -> dict[str, str]:
    """Key -> the first key that has the same prompt, which need not be encoded twice."""
    first: dict[str, str] = {}
    return {key: first.setdefault(prompt, key) for key, prompt in prompts.items()}


# the dataset


def _record(song: Song, prompts: _Prompts, latents: Path, conditions: Path, num_frames: int) -> SongRecord:
    return SongRecord(
        audio=song.name,
        sound=_sound_of(latents),
        latents=f"{LATENTS}/{latents.name}",
        conditions=f"{CONDITIONS}/{conditions.name}",
        prompt=song.prompt,
        num_frames=num_frames,
        caption=song.caption,
        genre=song.genre,
        language=song.language,
        bpm=song.bpm,
        keyscale=song.keyscale,
        timesignature=song.timesignature,
        is_instrumental=song.is_instrumental,
        source=song.source,
        repeat=song.repeat,
        weight=song.weight,
        prompts=[key for key in PROMPTS if key in prompts.texts],
        is_timed="window.0.lyrics" in prompts.lyrics,
    )


def _add_hashes(records: list[SongRecord], folder: Path, written: set[Path], before: list[SongRecord]) -> None:
    """Note the hash of each file; of those that were not written now, as the dataset had it before.

    Hashing them again would take long, and would call good what was damaged since.
    """
    known: dict[str, str] = {}
    for song in before:
        known |= {song.latents: song.latents_sha256, song.conditions: song.conditions_sha256}
    known = {file: digest for file, digest in known.items() if digest and folder / file not in written}
    for record in records:
        for file in (record.latents, record.conditions):
            if file not in known:
                known[file] = sha256_of(folder / file)
        record.latents_sha256, record.conditions_sha256 = known[record.latents], known[record.conditions]


def _settings(config: PreprocessConfig, listing: SongList, dtype: torch.dtype) -> dict[str, Any]:
    """Collect what shaped the data, as it was in the end, for the dataset's description."""
    return {
        "audio_dir": config.audio_dir,
        "custom_tags": sorted({song.custom_tag for song in listing.songs if song.custom_tag}),
        "tag_position": listing.tag_position,
        "genre_ratio": listing.genre_ratio,
        "language": config.language,
        "max_song_seconds": config.max_song_seconds,
        "window_seconds": config.window_seconds,
        "reference": config.reference,
        "seed": config.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _unused_files(folder: Path, used: set[Path]) -> int:
    return sum(file not in used for part in (LATENTS, CONDITIONS) for file in (folder / part).glob("*.safetensors"))


# files


def _check_is_no_folder_of_songs(folder: Path, config: PreprocessConfig) -> None:
    """Refuse to write a dataset where people or other programs keep files of the same names.

    Raises:
        UserError: naming the folder.
    """
    another = "type another dataset_dir=..."
    if folder.resolve() == Path(config.audio_dir).resolve():
        raise UserError(f"dataset_dir={folder} is audio_dir, the folder of the songs; {another}")
    table = folder / SONGS
    if config.metadata_file is not None and table.resolve() == Path(config.metadata_file).resolve():
        raise UserError(f"dataset_dir={folder} would be written over metadata_file={config.metadata_file}; {another}")
    others = [name for name in (INFO, SONGS) if os.path.lexists(folder / name)]
    # one of the two is enough: a kill may have kept the other from being written, and a disk damaged it
    if others and not describes_dataset(folder / INFO) and not names_stored_songs(table):
        found = " and a ".join(others)
        raise UserError(f"dataset_dir={folder} holds a {found} that preprocessing did not write; {another}, or move it")


def _make_folders(folder: Path) -> None:
    for part in (LATENTS, CONDITIONS):
        try:
            (folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"dataset_dir={folder} cannot be written: {error}") from error


def _read_before(folder: Path) -> tuple[DatasetInfo, list[SongRecord]] | None:
    """Read the dataset that is to be written anew; None if there was none, or what describes it is damaged."""
    try:
        return read_manifest(folder)
    except UserError:
        return None


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        write_tensors(file, tensors, metadata)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def _about_latents(file: Path) -> tuple[int, float]:
    """Read the number of frames of a song, and its peak."""
    shape, peak_of_song = _read_header(file, "latents", "peak", float)
    return shape[0], peak_of_song


def _sound_of(file: Path) -> str:
    """Read the hash of the sound that was encoded; empty in files that have none."""
    with safe_open(file, framework="pt") as tensors:
        return (tensors.metadata() or {}).get("sound", "")


def _about_conditions(file: Path) -> tuple[int, dict[str, int]]:
    """Read the width of a song's conditions, and how many tokens were cut from which of its texts."""
    shape, cuts = _read_header(file, "caption", "cut", parse_cuts)
    return shape[1], cuts


def _read_header(file: Path, key: str, note: str, parse: Callable[[str], Any]) -> tuple[list[int], Any]:
    """Read the shape of one tensor and one entry of the metadata of its file."""
    try:
        ensure_readable(file)
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_slice(key).get_shape(), parse((tensors.metadata() or {})[note])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error})") from error


def _is_usable(file: Path, read: Callable[[Path], object]) -> bool:
    """Say whether a file was encoded before and can still be read."""
    if not file.exists():
        return False
    try:
        read(file)
    except UserError as error:
        log.warning("%s; it is made again", error)
        return False
    return True


def _key(*parts: object) -> str:
    """Hash what a file is made from; 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _with_progress(names: list[str], what: str) -> Iterator[str]:
    """Go through songs with a progress bar on a terminal, and with a line in the log per song elsewhere."""
    if not sys.stderr.isatty():
        for number, name in enumerate(names, start=1):
            log.info("%s, song %d of %d: %s", what, number, len(names), name)
            yield name
        return
    with logging_redirect_tqdm(), tqdm(names, desc=what, unit="song", dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            yield name
