"""Tags inside audio files: ID3 (mp3, wav, aiff), Vorbis comments (flac, ogg, opus) and MP4 atoms, through mutagen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "caption": ("TIT2", "title", "\xa9nam"),
    "genre": ("TCON", "genre", "\xa9gen"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "----:com.apple.iTunes:BPM"),
    "keyscale": ("TKEY", "TXXX:initialkey", "TXXX:INITIALKEY", "initialkey", "initial_key", "key",
                 "----:com.apple.iTunes:initialkey"),
    "lyrics": ("USLT", "syncedlyrics", "lyrics", "unsyncedlyrics", "\xa9lyr"),
}  # fmt: skip
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
        found = (_texts(tags, name) for name in names)
        if texts := next((texts for texts in found if texts), []):
            values[key] = ", ".join(texts) if key == "genre" else texts[0]
    synced = [frame for frame in getattr(tags, "getall", lambda name: [])("SYLT") if frame.format == 2]  # ms
    if synced and (lines := _synced_lines(synced[0].text)):
        values["sections"] = lines
    return values


def _synced_lines(pieces: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Put lines together from pieces with times in milliseconds.

    A piece is a line, unless line breaks stand in some of them: then those begin lines, and pieces are syllables
    (ID3v2.3, section 4.10).
    """
    if any("\n" in piece.strip(" ") for piece, _ in pieces):
        lines: list[tuple[str, int]] = []
        for piece, time in pieces:
            if not lines or piece.startswith("\n") or lines[-1][0].endswith("\n"):
                lines.append((piece, time))
            else:
                lines[-1] = (lines[-1][0] + piece, lines[-1][1])
    else:
        lines = list(pieces)
    return [{"start": time / 1000, "lyrics": line.strip()} for line, time in lines if line.strip() and time >= 0]


def _texts(tags: Any, name: str) -> list[str]:
    """The values of a tag that are not empty."""
    if hasattr(tags, "getall"):  # ID3, where a name may come several times: USLT for each language
        frames = tags.getall(name) if name[:4].isupper() and name[4:5] in ("", ":") else []
        values = [value for frame in frames for value in _of_frame(frame)]
    else:
        try:
            value = tags.get(name) or []
        except (KeyError, ValueError):  # a name that this kind of tag cannot have
            return []
        values = value if isinstance(value, list) else [value]
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]
    return [text for text in (text.strip("\0 \n") for text in texts) if text]


def _of_frame(frame: Any) -> list[Any]:
    if frame.FrameID == "TCON":
        return list(frame.genres)  # old programs number genres: (17) is Rock
    return [frame.text] if isinstance(frame.text, str) else list(frame.text)
