"""Several pieces of music from one adapter at several strengths, each model loaded once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.adapters.files import attach_saved
from sidestep.inference.music_files import write_music
from sidestep.inference.pipeline import Request, Sampling, decode_latents, encode_request, finish, sample_latents

log = logging.getLogger(__name__)

TILE_SECONDS = 30


@dataclass(frozen=True)
class Preview:
    """One rendered piece of music."""

    file: str
    """Name of the flac file in the folder; its spectrogram has the same name with .png."""
    prompt: str
    seed: int
    scale: float


def render(
    checkpoint: Checkpoint,
    adapter: Path | None,
    requests: Sequence[Request],
    *,
    seeds: Sequence[int],
    scales: Sequence[float],
    sampling: Sampling,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    between: Callable[[], None] = lambda: None,
) -> list[Preview]:
    """Render every request with every seed at every scale into ``folder``. No global random state is used.

    Args:
        checkpoint: the base model.
        adapter: folder of a saved adapter; None renders the base model, and ``scales`` must be [0].
        requests: what to render.
        seeds: of the noise.
        scales: strengths of the adapter.
        sampling: steps, warp and guidance.
        device: where to compute.
        dtype: of the encoders and the transformer.
        folder: an existing folder.
        between: called before each piece is sampled, and before each is decoded; it may raise.

    Returns:
        What was rendered; what was sampled as numbers that are not finite is left out with a warning.
    """
    tokenizer, text_encoder = checkpoint.load_text_encoder(device=device, dtype=dtype)
    condition_encoder = checkpoint.load_condition_encoder(device=device, dtype=dtype)
    models = {"tokenizer": tokenizer, "text_encoder": text_encoder, "condition_encoder": condition_encoder}
    conditions = [encode_request(request, silence=checkpoint.silence(), **models)[0].cpu() for request in requests]
    del models, text_encoder, condition_encoder
    gc.collect()
    transformer = checkpoint.load_transformer(device=device, dtype=dtype)
    WindowedAttention(transformer)
    transformer.eval()
    sampled = []
    for scale in scales:
        applied = attach_saved(transformer, adapter, scale) if adapter is not None else None
        for number, request in enumerate(requests):
            for seed in seeds:
                between()
                latents = sample_latents(
                    transformer,
                    conditions[number],
                    null_condition=checkpoint.null_condition(),
                    silence=checkpoint.silence(),
                    num_frames=request.num_frames,
                    sampling=sampling,
                    seed=seed,
                )
                if latents.isfinite().all():
                    sampled.append((number, seed, scale, latents))
                else:
                    log.warning("%r at scale %g gave latents that are not finite in %s", request.prompt, scale, dtype)
        if applied is not None:
            applied.detach()
    del transformer
    gc.collect()
    vae = checkpoint.load_vae(device=device, dtype=torch.float32)
    previews = []
    for number, seed, scale, latents in sampled:
        between()
        request = requests[number]
        audio = finish(decode_latents(vae, latents, tile_seconds=TILE_SECONDS), request.num_samples)
        preview = Preview(f"prompt{number + 1}-seed{seed}-scale{scale:g}.flac", request.prompt, seed, scale)
        about = {"model_variant": checkpoint.variant.name, "scale": scale, "seed": seed}
        write_music(folder / preview.file, audio, about | asdict(request) | asdict(sampling))
        _write_picture((folder / preview.file).with_suffix(".png"), spectrogram(audio))
        previews.append(preview)
    return previews


def spectrogram(audio: Tensor) -> Tensor:
    """Picture of music, (3, 128, width) in [0, 1]: time to the right, 0 to 12 kHz upwards, 80 dB from dark to light.

    Args:
        audio: (channels, S) at 48 kHz.
    """
    from matplotlib import colormaps

    bins, hop = 1024, max(256, audio.shape[1] // 600)
    mono = audio.mean(dim=0)
    spectrum = torch.stft(mono, bins, hop, window=torch.hann_window(bins), return_complex=True).abs()
    quarter = spectrum[: bins // 4].reshape(128, -1, spectrum.shape[1]).amax(dim=1)  # up to 12 kHz
    decibels = 20 * torch.log10(quarter / quarter.max().clamp(min=1e-9) + 1e-9)
    light = (1 + decibels / 80).clamp(0, 1).flip(0)
    return torch.from_numpy(colormaps["magma"](light.numpy())[..., :3]).permute(2, 0, 1).float()


def _write_picture(path: Path, picture: Tensor) -> None:
    from PIL import Image

    Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(path)
