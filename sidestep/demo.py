"""What ``experiment=demo`` needs and nobody has to download: a tiny random model and a few synthesised songs."""

from __future__ import annotations

import logging
from pathlib import Path

from sidestep.acestep.toy import make_toy_checkpoint, make_toy_songs
from sidestep.config.settings import PreprocessConfig, TrainConfig
from sidestep.data.encode import preprocess
from sidestep.errors import UserError
from sidestep.files import alone_in

log = logging.getLogger(__name__)


MARK = ".made-by-demo"
"""Lies in every folder that the demo made and may write to again."""


def prepare_demo(config: TrainConfig) -> None:
    """Make the toy checkpoint, songs and dataset that a config names, where they are missing.

    The songs lie beside the checkpoint, in ``songs``; they go through the same preprocessing as real ones.

    Raises:
        UserError: if one of these folders exists and was not made by the demo.
    """
    log.info("this is a demo: the model is a tiny random toy, so nothing it makes is music")
    root, dataset_dir = Path(config.checkpoint_dir), Path(config.dataset_dir)
    songs = root / "songs"
    root.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(root.parent, wait=True):  # the points of a sweep may begin together
        for folder in (root, dataset_dir):
            _claim(folder)
        make_toy_checkpoint(root, config.model_variant)
        make_toy_songs(songs)
        summary = preprocess(
            PreprocessConfig(
                model_variant=config.model_variant,
                audio_dir=str(songs),
                dataset_dir=str(dataset_dir),
                checkpoint_dir=config.checkpoint_dir,
                language="en",
                tile_seconds=30,
                device=config.device,
                precision=config.precision,
            )
        )
    for line in summary.lines():
        log.info("%s", line)


def _claim(folder: Path) -> None:
    """Make a folder the demo's own, or refuse one that is somebody's."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / MARK).touch()
    elif not (folder / MARK).exists():
        raise UserError(
            f"{folder} was not made by the demo, which writes only to folders of its own; "
            f"leave checkpoint_dir and dataset_dir to experiment=demo, or leave experiment=demo out"
        )
