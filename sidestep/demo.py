"""What ``experiment=demo`` needs and nobody has to download: a tiny random model and a few synthesised songs."""

from __future__ import annotations

import logging
from pathlib import Path

from sidestep.acestep.toy import make_toy_checkpoint, make_toy_songs
from sidestep.config.settings import PreprocessConfig, TrainConfig
from sidestep.data.encode import preprocess

log = logging.getLogger(__name__)


def prepare_demo(config: TrainConfig) -> None:
    """Make the toy checkpoint, songs and dataset that a config names, where they are missing.

    The songs lie beside the dataset, in ``songs``; they go through the same preprocessing as real ones.
    """
    log.info("this is a demo: the model is a tiny random toy, so nothing it makes is music")
    root, dataset_dir = Path(config.checkpoint_dir), Path(config.dataset_dir)
    songs = dataset_dir.parent / "songs"
    if not (root / config.model_variant.folder).is_dir():
        log.info("making a random %s checkpoint in %s", config.model_variant.name, root)
        make_toy_checkpoint(root, config.model_variant)
    if not songs.is_dir():
        log.info("synthesising songs in %s", songs)
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
