"""Turn a folder of songs into a dataset: ``python -m sidestep.preprocess audio_dir=... dataset_dir=...``."""

from __future__ import annotations

import logging
import sys

from sidestep.cli import importing, run_command
from sidestep.config.settings import PreprocessConfig

log = logging.getLogger("sidestep.preprocess")  # __main__ would not be a child of the sidestep logger


def preprocess_command(config: PreprocessConfig) -> None:
    """Preprocess, say what was done, and exit with 1 if a song failed."""
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.data.encode import preprocess

    summary = preprocess(config)
    for line in summary.lines():
        log.info("%s", line)
    if summary.failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command("preprocess", PreprocessConfig, preprocess_command)
