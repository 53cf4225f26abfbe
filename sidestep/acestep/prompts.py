"""The texts ACE-Step reads, written as its own inference writes them.

The model sees two texts per song: a caption with its metas, read through the text encoder, and the lyrics, of
which only the token embeddings are used. Both must match inference to the byte, or an adapter learns to answer
prompts that no player will ever send.
"""

from __future__ import annotations

import random

INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"
"""ACE-Step's instruction for text to music."""
INSTRUMENTAL = "[Instrumental]"
"""The lyrics of a song without any."""
MAX_TEXT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048
"""Where ACE-Step's inference cuts the two texts."""


def caption_prompt(caption: str, *, bpm: int | None, timesignature: str, keyscale: str, duration: int) -> str:
    """Write the text prompt of a song.

    Args:
        caption: description or genre line, with the tag already in it.
        bpm: beats per minute, or None if unknown.
        timesignature: numerator only, such as "4"; empty if unknown.
        keyscale: such as "C major"; empty if unknown.
        duration: whole seconds.
    """
    return (
        f"# Instruction\n{INSTRUCTION}\n\n"
        f"# Caption\n{caption}\n\n"
        f"# Metas\n"
        f"- bpm: {bpm or 'N/A'}\n"
        f"- timesignature: {timesignature or 'N/A'}\n"
        f"- keyscale: {keyscale or 'N/A'}\n"
        f"- duration: {duration} seconds\n"
        f"<|endoftext|>\n"
    )


def caption_of(prompt: str) -> str:
    """Take the caption out of what :func:`caption_prompt` wrote."""
    return prompt.partition("# Caption\n")[2].rpartition("\n\n# Metas\n")[0]


def is_instrumental_mark(lyrics: str) -> bool:
    """Say whether lyrics are nothing but :data:`INSTRUMENTAL`, in any case and as models write it."""
    return lyrics.casefold().strip(" .") == INSTRUMENTAL.casefold()


def lyrics_prompt(lyrics: str, language: str) -> str:
    """Write the lyric prompt of a song; empty lyrics become :data:`INSTRUMENTAL`.

    ACE-Step's first trainers fed the bare lyrics; its inference and its later training code use this form.
    """
    return f"# Languages\n{language}\n\n# Lyric\n{lyrics.strip() or INSTRUMENTAL}<|endoftext|>"


def apply_tag(caption: str, tag: str, position: str) -> str:
    """Put a trigger word into a caption.

    Args:
        caption: the description; if empty, the tag stands alone.
        tag: the trigger word; empty leaves the caption as it is.
        position: "prepend", "append" or "replace".
    """
    if not tag:
        return caption
    if not caption or position == "replace":
        return tag
    return f"{caption}, {tag}" if position == "append" else f"{tag}, {caption}"


def choose_genre(num_songs: int, genre_ratio: int) -> set[int]:
    """Choose which songs train on their genre line instead of their caption, as ACE-Step's trainer does.

    Args:
        num_songs: how many songs there are.
        genre_ratio: per cent of them to choose, rounded down.

    Returns:
        Indices into the songs; the same for the same two numbers.
    """
    indices = list(range(num_songs))
    random.Random(42).shuffle(indices)  # 42 is ACE-Step's, so that its datasets are split the same way here
    return set(indices[: num_songs * genre_ratio // 100])
