"""Turn a folder of songs into a dataset: ``python -m sidestep.preprocess audio_dir=... dataset_dir=...``."""

from __future__ import annotations

import logging
import os
import sys

from sidestep.cli import quick_imports, run_command
from sidestep.config.settings import PreprocessConfig
from sidestep.errors import UserError

log = logging.getLogger("sidestep.preprocess")  # __main__ would not be a child of the sidestep logger


def preprocess_command(config: PreprocessConfig) -> None:
    """Preprocess, say what was done, and exit with 1 if a song failed.

    Raises:
        UserError: for anything the user can mend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # before they find each other in the dataset's folder
        raise UserError(
            "a dataset, or a shard of it, is made by one process, and this is one of several; leave out torchrun; "
            "for two, start shard=0 num_shards=2 beside shard=1 num_shards=2"
        )
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.data.encode import preprocess

    summary = preprocess(config)
    for line in summary.lines():
        log.info("%s", line)
    if summary.failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command("preprocess", PreprocessConfig, preprocess_command)
