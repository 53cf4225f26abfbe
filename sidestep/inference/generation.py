"""Listening to adapters: what ``python -m sidestep.generate`` does.

The encoders, the transformer and the VAE are loaded one after the other, each once for all seeds, and freed before
the next, so that the largest of them decides how much memory is needed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.acestep.variants import VariantConfig
from sidestep.adapters import SavedAdapter
from sidestep.adapters.files import apply_adapters, read_adapter, trained_on, warn_of_another_model
from sidestep.config.gate import largest, read_variant
from sidestep.config.settings import LEAST_SHIFT
from sidestep.data.audio import SILENT_PEAK
from sidestep.devices import memory_gib, resolve_device, resolve_dtype
from sidestep.errors import UserError
from sidestep.files import read_text, remove_abandoned, sha256_of
from sidestep.inference.music_files import adapter_name, music_name, write_music
from sidestep.inference.pipeline import (
    Request,
    Sampling,
    decode_latents,
    encode_request,
    finish,
    sample_latents,
    stream_layers,
)

if TYPE_CHECKING:
    from sidestep.config.settings import GenerateConfig

log = logging.getLogger(__name__)

STREAM_BELOW_GIB = 15  # what a card sold as 16 GB has at least


@dataclass(frozen=True, kw_only=True)
class PlayedAdapter:
    """An adapter and how strongly it plays."""

    path: Path
    name: str
    scale: float
    saved: SavedAdapter
    about: dict[str, Any]
    """What sidestep wrote into its header when it trained it; empty for an adapter of another program."""
    sha256: list[str]
    """Of the files that decide what it does."""


def generate(config: GenerateConfig) -> list[Path]:
    """Make one music file per seed.

    Returns:
        The files, in the order of ``config.seeds``.

    Raises:
        UserError: if a setting, a text file, an adapter or the checkpoint is wrong.
    """
    request = read_request(config)
    adapters = [read_played(Path(at), scale) for at, scale in zip(config.adapter_dir, config.scale, strict=True)]
    variant = choose_variant(config.model_variant, adapters)
    sampling = choose_sampling(config, variant, adapters)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), variant)
    for adapter in adapters:
        if adapter.about.get("model_variant") == variant.name:  # else choose_variant has said so
            warn_of_another_model(adapter.saved, checkpoint)
    output_dir = Path(config.output_dir)
    _prepare(output_dir)
    _announce(variant, sampling, adapters, request)

    title = "+".join(_label(adapter) for adapter in adapters) or variant.name
    about = describe(request, sampling, variant, adapters) | {
        "checkpoint": checkpoint.fingerprint("transformer"),
        "precision": str(dtype).removeprefix("torch."),
    }
    condition = _encode(checkpoint, request, device, dtype)
    latents = _sample(config, checkpoint, adapters, condition, request.num_frames, sampling, device, dtype)
    gc.collect()
    vae = checkpoint.load_vae(device=device, dtype=torch.float32)
    files = []
    for seed, of_seed in zip(config.seeds, latents, strict=True):
        settings = about | {"seed": seed}
        file = output_dir / f"{music_name(title, settings)}.{config.format.value}"
        write_music(file, _decode(vae, of_seed, request, config.tile_seconds), settings)
        log.info("seed %d: %g s of music in %s", seed, request.seconds, file)
        files.append(file)
    return files


# what to play


def read_request(config: GenerateConfig) -> Request:
    """Take the words from the settings, or from the files that they name with @.

    Raises:
        UserError: if a file cannot be read, or a text is empty or holds control characters.
    """
    prompt = _read_words("prompt", config.prompt)
    if not prompt:
        raise UserError(f"prompt={config.prompt} is empty; say what the music should be")
    return Request(
        prompt=prompt,
        lyrics=_read_words("lyrics", config.lyrics),
        seconds=config.seconds,
        bpm=config.bpm,
        keyscale=config.keyscale,
        timesignature=config.timesignature,
        language=config.language,
    )


def _read_words(key: str, typed: str) -> str:
    text = typed
    if typed.startswith("@"):
        try:
            text = read_text(Path(typed[1:]), "utf-8-sig")  # Windows editors put a byte order mark in front
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}={typed} cannot be read as UTF-8 text: {error}") from error
    for char in text:
        if (ord(char) < 32 and char not in "\n\r\t") or ord(char) == 127:
            raise UserError(f"{key}={typed!r} holds the control character {char!r}; remove it")
    return text.strip()


def read_played(path: Path, scale: float) -> PlayedAdapter:
    """Read what an adapter says about itself.

    Raises:
        UserError: if there is no adapter, or it is damaged.
    """
    saved = read_adapter(path)
    files = (saved.path, saved.path.with_name("adapter_config.json"))
    return PlayedAdapter(
        path=path,
        name=adapter_name(path),
        scale=scale,
        saved=saved,
        about=trained_on(saved),
        sha256=[sha256_of(file) for file in files if file.is_file()],
    )


def choose_variant(typed: VariantConfig | None, adapters: Sequence[PlayedAdapter]) -> VariantConfig:
    """Take the model that was typed, or the one the first adapter was trained on.

    Raises:
        UserError: if neither is known, or an adapter is for a model of another size.
    """
    own_variants = [_own_variant(adapter) for adapter in adapters]
    variant = typed or (own_variants[0] if adapters else None)
    if variant is None:
        why = f"{adapters[0].path} does not say what it was trained on" if adapters else "no adapter names the model"
        raise UserError(f"{why}; type model_variant=turbo, base or sft, or the same with xl_ in front")
    for adapter, own in zip(adapters, own_variants, strict=True):
        if own is not None and own.is_xl != variant.is_xl:
            raise UserError(
                f"{adapter.path} was trained on {own.name}, which has another size than {variant.name}; "
                f"use model_variant={own.name}"
            )
        if own is not None and own.name != variant.name:
            log.warning("%s was trained on %s and now plays on %s", adapter.path, own.name, variant.name)
    return variant


def _own_variant(adapter: PlayedAdapter) -> VariantConfig | None:
    name = adapter.about.get("model_variant")
    if name is None:
        return None
    try:
        return read_variant(str(name))
    except UserError as error:
        raise UserError(f"{adapter.path} was trained on a model that is not known here: {error}") from error


def choose_sampling(config: GenerateConfig, variant: VariantConfig, adapters: Sequence[PlayedAdapter]) -> Sampling:
    """Take each value from what was typed, else from the first adapter, else from the model.

    What an adapter says counts only on the model it was trained on: turbo's eight steps are few for base.

    Raises:
        UserError: if a value cannot be, or guidance is asked of a turbo model.
    """
    about = adapters[0].about if adapters and adapters[0].about.get("model_variant") == variant.name else {}
    values = {}
    for key in ("shift", "num_inference_steps", "guidance_scale"):
        values[key] = getattr(config, key)
        if values[key] is None:
            values[key] = about.get(key, getattr(variant, key))
            kind = int if key == "num_inference_steps" else int | float
            least = LEAST_SHIFT if key == "shift" else 1
            if not isinstance(values[key], kind) or not least <= values[key] <= largest(key, values[key]):
                raise UserError(f"the header of {adapters[0].path} has {key}={values[key]!r}; type {key}=... yourself")
    sampling = Sampling(**values)
    if variant.is_turbo and sampling.guidance_scale > 1:
        raise UserError(
            f"guidance_scale={sampling.guidance_scale:g} has no effect on {variant.name}, which has its guidance in "
            f"its weights; leave it out, or use model_variant={'xl_' if variant.is_xl else ''}base"
        )
    return sampling


def describe(
    request: Request, sampling: Sampling, variant: VariantConfig, adapters: Sequence[PlayedAdapter]
) -> dict[str, Any]:
    """Collect what decides the music, to be written into its file; nothing in it depends on where files lie."""
    played = [{"name": a.name, "scale": a.scale, "sha256": a.sha256} for a in adapters]
    return {"model_variant": variant.name, "adapters": played, **asdict(request), **asdict(sampling)}


def _announce(variant: VariantConfig, sampling: Sampling, adapters: Sequence[PlayedAdapter], request: Request) -> None:
    played = ", ".join(f"{adapter.path} at {adapter.scale:g}" for adapter in adapters) or "no adapter"
    log.info(
        "%s with %s: shift %g, %d steps, guidance %g",
        variant.name,
        played,
        sampling.shift,
        sampling.num_inference_steps,
        sampling.guidance_scale,
    )
    for adapter in adapters:
        tags = adapter.about.get("custom_tags") or []
        if tags and not any(str(tag).lower() in request.prompt.lower() for tag in tags):
            words = " or ".join(map(str, tags))
            log.info("%s was trained with the trigger word %s, which is not in the prompt", adapter.path, words)


def _label(adapter: PlayedAdapter) -> str:
    return adapter.name if adapter.scale == 1 else f"{adapter.name}-at-{adapter.scale:g}"


# the three steps


def _encode(checkpoint: Checkpoint, request: Request, device: torch.device, dtype: torch.dtype) -> Tensor:
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=device, dtype=dtype)
    condition_encoder = checkpoint.load_condition_encoder(device=device, dtype=dtype)
    condition, cuts = encode_request(
        request,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        condition_encoder=condition_encoder,
        silence=checkpoint.silence(),
    )
    for key, cut in cuts.items():
        if cut:
            log.warning("the last %d tokens of the %s are past what ACE-Step reads", cut, key)
    return condition.cpu()


def _sample(
    config: GenerateConfig,
    checkpoint: Checkpoint,
    adapters: Sequence[PlayedAdapter],
    condition: Tensor,
    num_frames: int,
    sampling: Sampling,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Sample the latents of every seed, each (T, 64) on the CPU."""
    gc.collect()  # hooks keep the models before alive in circles
    stream = _streams(config.offload, checkpoint.variant, device)
    latents = []
    try:
        transformer = checkpoint.load_transformer(device=torch.device("cpu") if stream else device, dtype=dtype)
        WindowedAttention(transformer)
        apply_adapters(transformer, [(adapter.saved, adapter.scale) for adapter in adapters])
        if stream:
            stream_layers(transformer, device)
        for number, seed in enumerate(config.seeds, start=1):
            log.info("sampling seed %d (%d of %d)", seed, number, len(config.seeds))
            sampled = sample_latents(
                transformer,
                condition,
                null_condition=checkpoint.null_condition(),
                silence=checkpoint.silence(),
                num_frames=num_frames,
                sampling=sampling,
                seed=seed,
            )
            if not sampled.isfinite().all():
                advice = "play the adapters at a lower scale" if dtype == torch.float32 else "use precision=fp32"
                raise UserError(f"seed {seed} gave latents that are not finite in {dtype}; {advice}")
            latents.append(sampled)
    except torch.OutOfMemoryError as error:
        advice = f"use seconds={config.seconds / 2:g}" + ("" if stream else " or offload=true")
        raise UserError(f"the transformer ran out of memory at seconds={config.seconds:g}; {advice}") from error
    return latents


def _streams(offload: bool | None, variant: VariantConfig, device: torch.device) -> bool:
    if device.type != "cuda" or offload is not None:
        return bool(offload) and device.type != "cpu"
    return variant.is_xl and memory_gib(device) < STREAM_BELOW_GIB


def _decode(vae: Any, latents: Tensor, request: Request, tile_seconds: float) -> Tensor:
    """Decode one piece of music, (2, S)."""
    try:
        audio = decode_latents(vae, latents, tile_seconds=tile_seconds)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the VAE ran out of memory at tile_seconds={tile_seconds:g}; "
            f"use tile_seconds={max(5, int(tile_seconds / 2))} or device=cpu"
        ) from error
    if audio.abs().max() < SILENT_PEAK:
        log.warning("the music is silent: no sample was louder than -80 dBFS")
    return finish(audio, request.num_samples)


def _prepare(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={output_dir} cannot be written: {error}") from error
    remove_abandoned(output_dir)
