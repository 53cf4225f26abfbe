"""What the transformer is told besides the noisy latents: a condition from the texts, and context latents.

Both take the form that ACE-Step's inference uses for text to music: the reference audio and the source latents
are silence, masks are boolean, and nothing is padded.

Shapes: B batch, N tokens of a prompt, L condition tokens, D their width, T latent frames (25 per second).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REFERENCE_FRAMES = 750
"""Frames of silence that stand for the missing reference audio: 30 seconds."""


def context_latents(silence: Tensor, num_frames: int) -> Tensor:
    """Make the source latents and chunk mask of text to music.

    Args:
        silence: the checkpoint's latents of silence, (S, 64).
        num_frames: T.

    Returns:
        ``silence`` beside ones, (T, 128); past its end, silence begins again at frame 0.
    """
    frames = torch.arange(num_frames, device=silence.device) % len(silence)
    source = silence[frames]
    return torch.cat([source, torch.ones_like(source)], dim=1)


def tokenize(tokenizer: Any, prompt: str, max_tokens: int) -> tuple[Tensor, int]:
    """Turn a prompt into token ids, with the special tokens that the tokenizer adds by itself.

    Returns:
        The ids, (1, N) with N at most ``max_tokens``, and how many tokens did not fit.
    """
    ids = tokenizer(prompt, truncation=True, max_length=max_tokens).input_ids
    num_tokens = len(tokenizer(prompt, verbose=False).input_ids)
    return torch.tensor([ids]), num_tokens - len(ids)


@torch.no_grad()
def encode_condition(
    text_ids: Tensor, lyric_ids: Tensor, *, text_encoder: Any, condition_encoder: Any, silence: Tensor
) -> Tensor:
    """Encode one song's texts into the condition that the transformer attends to.

    Args:
        text_ids: tokens of the caption prompt, (1, N).
        lyric_ids: tokens of the lyrics prompt, (1, N).
        text_encoder: the Qwen3 model. Captions go through it without a mask; lyrics only through its embeddings.
        condition_encoder: diffusers' ``AceStepConditionEncoder``.
        silence: latents whose first 30 seconds are the reference audio, (S, 64); of silence, unless a song is to be
            imitated.

    Returns:
        The condition, (L, D), in the condition encoder's dtype and on its device.
    """
    lyrics = encode_lyrics(lyric_ids, text_encoder=text_encoder, condition_encoder=condition_encoder)
    reference = encode_reference(silence, condition_encoder)
    text = encode_text(text_ids, text_encoder=text_encoder, condition_encoder=condition_encoder)
    return torch.cat([lyrics, reference, text])


@torch.no_grad()
def encode_text(ids: Tensor, *, text_encoder: Any, condition_encoder: Any) -> Tensor:
    """Encode the caption's part of a condition, which depends on nothing else; (1, N) to (N, D)."""
    hidden = text_encoder(input_ids=ids.to(text_encoder.device)).last_hidden_state
    text: Tensor = condition_encoder.text_projector(hidden.to(condition_encoder.text_projector.weight))
    return text[0]


@torch.no_grad()
def encode_lyrics(ids: Tensor, *, text_encoder: Any, condition_encoder: Any) -> Tensor:
    """Encode the lyrics' part of a condition, which depends on nothing else; (1, N) to (N, D)."""
    weight = condition_encoder.text_projector.weight
    embedded = text_encoder.get_input_embeddings()(ids.to(text_encoder.device)).to(weight)
    lyrics: Tensor = condition_encoder.lyric_encoder(inputs_embeds=embedded, attention_mask=_all_valid(ids, weight))
    return lyrics[0]


@torch.no_grad()
def encode_reference(latents: Tensor, condition_encoder: Any) -> Tensor:
    """Encode the reference audio's part of a condition, which depends on nothing else.

    Args:
        latents: whose first 30 seconds are the reference audio, (S, 64).
        condition_encoder: diffusers' ``AceStepConditionEncoder``.

    Returns:
        Its token, (1, D).
    """
    weight = condition_encoder.text_projector.weight
    of_first_song = torch.zeros(1, dtype=torch.long, device=weight.device)
    tokens, _ = condition_encoder.timbre_encoder(latents[None, :REFERENCE_FRAMES].to(weight), of_first_song)
    token: Tensor = tokens[0]
    return token


def _all_valid(ids: Tensor, like: Tensor) -> Tensor:
    # bool, because masks in bf16 are summed in bf16 and lose tokens past 256
    return torch.ones(ids.shape, dtype=torch.bool, device=like.device)
