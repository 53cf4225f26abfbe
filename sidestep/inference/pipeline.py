"""Text to music in three steps that need not be in memory together: encode, sample, decode.

Sampling is that of diffusers' ``AceStepPipeline``: Euler steps along t = 1 to 0, warped by ``shift``, and for models
that are not turbo adaptive projected guidance (APG, arXiv:2410.02416). Its prompts and its decoding are replaced by
what training here uses, so that what an adapter hears in training is what it gets when it plays.

Shapes: T latent frames (25 per second), L condition tokens, D their width, S samples per channel at 48 kHz.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sidestep.acestep.conditioning import encode_condition, tokenize
from sidestep.acestep.prompts import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS, caption_prompt, lyrics_prompt
from sidestep.data.audio import SAMPLE_RATE, SAMPLES_PER_FRAME
from sidestep.data.sampler import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from diffusers import AceStepTransformer1DModel, AutoencoderOobleck

MIN_FRAMES = 128
"""ACE-Step makes no less than this; shorter music is cut from it."""
OVERLAP_FRAMES = 2 * FRAMES_PER_SECOND  # far more than the 0.4 s of latents that a decoded sample depends on
PEAK = 10 ** (-1 / 20)  # ACE-Step writes every file at a peak of -1 dBFS


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one piece of music should be."""

    prompt: str
    seconds: float
    lyrics: str = ""
    """Empty is an instrumental."""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    language: str = "unknown"

    @property
    def num_samples(self) -> int:
        """Samples per channel asked for, S."""
        return round(self.seconds * SAMPLE_RATE)

    @property
    def num_frames(self) -> int:
        """Latent frames to sample, T; they may decode to more than ``num_samples``."""
        return max(MIN_FRAMES, math.ceil(self.num_samples / SAMPLES_PER_FRAME))

    def prompts(self) -> tuple[str, str]:
        """Write the two texts that the model reads: about the music, and its lyrics."""
        text = caption_prompt(
            self.prompt,
            bpm=self.bpm,
            timesignature=self.timesignature,
            keyscale=self.keyscale,
            duration=int(self.seconds),
        )
        return text, lyrics_prompt(self.lyrics, self.language)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How noise becomes latents."""

    shift: float
    """Warp of time, t -> s*t / (1 + (s - 1)*t)."""
    num_inference_steps: int
    guidance_scale: float
    """Strength of APG; 1 is none."""


def encode_request(
    request: Request, *, tokenizer: Any, text_encoder: Any, condition_encoder: Any, silence: Tensor
) -> tuple[Tensor, dict[str, int]]:
    """Encode the words of a request.

    Args:
        request: what to encode.
        tokenizer: the text encoder's.
        text_encoder: the Qwen3 model.
        condition_encoder: diffusers' ``AceStepConditionEncoder``.
        silence: the checkpoint's latents of silence, (frames, 64).

    Returns:
        The condition, (L, D), and how many tokens of "prompt" and "lyrics" were past what ACE-Step reads.
    """
    text, lyrics = request.prompts()
    text_ids, text_cut = tokenize(tokenizer, text, MAX_TEXT_TOKENS)
    lyric_ids, lyric_cut = tokenize(tokenizer, lyrics, MAX_LYRIC_TOKENS)
    condition = encode_condition(
        text_ids, lyric_ids, text_encoder=text_encoder, condition_encoder=condition_encoder, silence=silence
    )
    return condition, {"prompt": text_cut, "lyrics": lyric_cut}


@torch.no_grad()
def sample_latents(
    transformer: AceStepTransformer1DModel,
    condition: Tensor,
    *,
    null_condition: Tensor,
    silence: Tensor,
    num_frames: int,
    sampling: Sampling,
    seed: int,
) -> Tensor:
    """Turn noise into latents of music.

    Args:
        transformer: in eval mode, on the device to compute on, with any adapters attached.
        condition: what ``encode_request`` returned, (L, D).
        null_condition: the checkpoint's empty condition, (1, D).
        silence: the checkpoint's latents of silence, (frames, 64).
        num_frames: T.
        sampling: steps, warp and guidance.
        seed: of the noise, drawn in float32 on the CPU so that every device and precision starts from the same.

    Returns:
        Latents, (T, 64), float32 on the CPU.
    """
    channels: int = transformer.config.audio_acoustic_hidden_dim
    noise = torch.randn((1, num_frames, channels), generator=torch.Generator().manual_seed(seed))
    device, dtype = transformer.device, transformer.dtype
    pipeline = _SamplingPipeline(transformer, _Encoded(condition, null_condition, silence, device, dtype))
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False, desc="sampling", unit="step")
    # autocast, because an adapter in training is float32 whatever the transformer is
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        latents: Tensor = pipeline(
            prompt="",  # what it says is in the condition already
            audio_duration=(num_frames - 0.5) / FRAMES_PER_SECOND,  # rounded up to num_frames, safe from float error
            num_inference_steps=sampling.num_inference_steps,
            shift=sampling.shift,
            guidance_scale=sampling.guidance_scale,
            latents=noise,
            output_type="latent",
            return_dict=False,
        )[0]
    return latents[0].float().cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderOobleck, latents: Tensor, *, tile_seconds: float) -> Tensor:
    """Decode music of any length in bounded memory.

    Tiles overlap by 2 seconds on each side, which are thrown away; so the result is that of decoding everything at
    once.

    Args:
        vae: the autoencoder.
        latents: (T, 64).
        tile_seconds: length of a tile with its overlap; more than 4.

    Returns:
        Audio, (2, T * 1920), float32 on the CPU.
    """
    num_frames = len(latents)
    tile_frames = int(tile_seconds * FRAMES_PER_SECOND)
    stride = num_frames if num_frames <= tile_frames else tile_frames - 2 * OVERLAP_FRAMES
    parts = []
    for start in range(0, num_frames, stride):
        end = min(start + stride, num_frames)
        left, right = max(0, start - OVERLAP_FRAMES), min(num_frames, end + OVERLAP_FRAMES)
        tile = latents[left:right].T[None].to(vae.device, vae.dtype)
        audio = vae.decode(tile).sample[0]
        parts.append(audio[:, (start - left) * SAMPLES_PER_FRAME : (end - left) * SAMPLES_PER_FRAME].float().cpu())
    return torch.cat(parts, dim=1)


def finish(audio: Tensor, num_samples: int) -> Tensor:
    """Cut audio to the length asked for and bring its peak to -1 dBFS, as ACE-Step does.

    Args:
        audio: (2, samples).
        num_samples: S, at most as many.

    Returns:
        (2, S).
    """
    audio = audio[:, :num_samples]
    return audio * (PEAK / audio.abs().max().clamp(min=1e-6))


def stream_layers(transformer: AceStepTransformer1DModel, device: torch.device) -> None:
    """Move a transformer to a device but for its layers, each of which is moved there only while it works.

    The device then holds one layer at a time, at the price of moving all of them in every step.
    """

    def bring(layer: nn.Module, args: Any) -> None:
        layer.to(device)

    def take_away(layer: nn.Module, args: Any, output: Any) -> None:
        layer.to("cpu")

    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if not name.startswith("layers."):
            tensor.data = tensor.data.to(device)
    for layer in transformer.layers:
        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(take_away)


class _Encoded:
    """Stands where the pipeline expects a condition encoder, and gives what was encoded before."""

    def __init__(
        self, condition: Tensor, null_condition: Tensor, silence: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.condition = condition[None].to(device, dtype)  # (1, L, D)
        self.null_condition_emb = null_condition[None]
        self.silence_latent = silence[None]

    def __call__(self, **texts: Any) -> tuple[Tensor, None]:
        return self.condition, None


class _SamplingPipeline(AceStepPipeline):
    """The sampling of diffusers' pipeline, without the models before and after it."""

    def __init__(self, transformer: AceStepTransformer1DModel, encoded: _Encoded) -> None:
        super().__init__(
            transformer=transformer,
            condition_encoder=encoded,
            # the pipeline makes the warped times itself, in [0, 1]
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )

    @property
    def _execution_device(self) -> torch.device:
        return self.transformer.device

    def encode_prompt(self, **words: Any) -> tuple[None, None, None, None]:
        return None, None, None, None
