"""Traktor's playlists and collections (.nml): XML with one ENTRY for each track."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from sidestep.errors import UserError

_NOTES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
KEYS = [f"{note} major" for note in _NOTES] + [f"{note} minor" for note in _NOTES]
"""What the numbers of MUSICAL_KEY mean."""


def read_nml(text: str, where: str) -> list[dict[str, Any]]:
    """Give the tracks of a collection with sidestep's names for their values.

    Args:
        text: of the file.
        where: its name, for messages.

    Raises:
        UserError: if it is no such file.
    """
    if "<!DOCTYPE" in text:  # may name other files, or grow without end
        raise UserError(f"{where} has a DOCTYPE, which Traktor never writes; export the playlist again")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{where} is not XML: {error}") from error
    if root.tag != "NML":
        raise UserError(f"{where} is not of Traktor: it begins with {root.tag[:80]!r} and not with NML")
    return [_track(entry) for entry in root.iterfind("COLLECTION/ENTRY")]


def _track(entry: ElementTree.Element) -> dict[str, Any]:
    parts = {part.tag: part.attrib for part in entry}
    location, about = parts.get("LOCATION", {}), parts.get("INFO", {})
    number = parts.get("MUSICAL_KEY", {}).get("VALUE", "")
    values = {
        "title": entry.get("TITLE", ""),
        "artist": entry.get("ARTIST", ""),
        "genre": about.get("GENRE", ""),
        "bpm": parts.get("TEMPO", {}).get("BPM", ""),
        "keyscale": KEYS[int(number)] if number.isdecimal() and int(number) < len(KEYS) else about.get("KEY", ""),
    }
    if file := location.get("FILE", ""):
        values["file"] = [f"{location.get('DIR', '').replace('/:', '/')}{file}"]
    return values
