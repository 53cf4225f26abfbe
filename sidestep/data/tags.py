"""Tags inside audio files: ID3 (mp3, wav, aiff), Vorbis comments (flac, ogg, opus) and MP4 atoms, through mutagen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "caption": ("TIT2", "title", "\xa9nam"),
    "genre": ("TCON", "genre", "\xa9gen"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "----:com.apple.iTunes:BPM"),
    "keyscale": ("TKEY", "initialkey", "initial_key", "key", "----:com.apple.iTunes:initialkey"),
    "lyrics": ("USLT", "syncedlyrics", "lyrics", "unsyncedlyrics", "\xa9lyr"),
}
"""Key of a song -> what the kinds of tags call it, the first that is there counts. A title stands for a caption."""


def can_read_tags() -> bool:
    """Whether mutagen is installed."""
    try:
        import mutagen  # noqa: F401
    except ImportError:
        return False
    return True


def read_tags(path: Path) -> dict[str, Any]:
    """Read what the tags of a file say about its song; nothing, if it has none or they are damaged.

    Damaged tags are no fault of the song: decoding decides whether that can be used.
    """
    import mutagen

    try:
        file = mutagen.File(path)
    except (mutagen.MutagenError, OSError, ValueError):
        return {}
    if file is None or not file.tags:
        return {}
    tags = file.tags
    values: dict[str, Any] = {}
    for key, names in NAMES.items():
        found = (_first(tags, name) for name in names)
        if text := next((text for text in found if text), ""):
            values[key] = text
    if synced := [frame for frame in getattr(tags, "getall", lambda name: [])("SYLT") if frame.format == 2]:  # ms
        values["sections"] = [
            {"start": time / 1000, "lyrics": line} for line, time in synced[0].text if line.strip() and time >= 0
        ]
    if values.get("bpm") in ("0", "0.0"):
        del values["bpm"]  # what programs write that did not measure it
    return values


def _first(tags: Any, name: str) -> str:
    """The first value of a tag as text."""
    if hasattr(tags, "getall"):  # ID3, where a name may come several times: USLT for each language
        frames = tags.getall(name) if len(name) == 4 and name.isupper() else []
        texts = [text for frame in frames for text in ([frame.text] if isinstance(frame.text, str) else frame.text)]
    else:
        try:
            value = tags.get(name) or []
        except (KeyError, ValueError):  # a name that this kind of tag cannot have
            return ""
        texts = value if isinstance(value, list) else [value]
    if not texts:
        return ""
    first = texts[0]
    return (first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)).strip("\0 \n")
