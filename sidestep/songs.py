"""List, check and edit the words of a folder of songs: ``python -m sidestep.songs audio_dir=...``."""

from __future__ import annotations

import sys

from sidestep.cli import quick_imports, run_command
from sidestep.config.data import SongsConfig


def songs_command(config: SongsConfig) -> None:
    """List, and exit with 1 if a song or its words cannot be used, or there is no answer about it."""
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.data.listing import list_songs

    listing = list_songs(config)
    if listing.failed or listing.undecodable or listing.unanswered:
        sys.exit(1)


if __name__ == "__main__":
    run_command("songs", SongsConfig, songs_command)
