"""Playlists that Traktor exports (.nml): XML with the path, tempo and key of each track. It has no export as CSV."""

from __future__ import annotations

from xml.etree import ElementTree

NOTES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


def read_tracks(text: str) -> list[dict[str, str]]:
    """Give what a playlist, or a whole collection, says about each track, by names that :mod:`tables` knows.

    Raises:
        ValueError: saying why the text is no playlist of Traktor.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can fill the memory, and Traktor writes none
        raise ValueError("it declares a document type, as no file of Traktor does")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is not XML: {error}") from error
    if root.tag != "NML":
        raise ValueError(f"it begins with <{root.tag[:40]}>, not with <NML>")
    tracks = []
    for entry in root.iterfind("COLLECTION/ENTRY"):
        location, info = _attributes(entry, "LOCATION"), _attributes(entry, "INFO")
        folder, file = location.get("DIR", "").replace("/:", "/"), location.get("FILE", "")
        number = _attributes(entry, "MUSICAL_KEY").get("VALUE", "")
        tracks.append(
            {
                "path": folder + file if file else "",
                "title": entry.get("TITLE", ""),
                "artist": entry.get("ARTIST", ""),
                "genre": info.get("GENRE", ""),
                "bpm": _attributes(entry, "TEMPO").get("BPM", ""),
                "key": _key(int(number)) if number.isdecimal() and int(number) < 24 else info.get("KEY", ""),
            }
        )
    return tracks


def _attributes(entry: ElementTree.Element, name: str) -> dict[str, str]:
    found = entry.find(name)
    return {} if found is None else dict(found.attrib)


def _key(number: int) -> str:
    """Name one of Traktor's keys: 0 to 11 are C major to B major in semitones, 12 to 23 the minor keys."""
    return f"{NOTES[number % 12]} {'minor' if number >= 12 else 'major'}"
