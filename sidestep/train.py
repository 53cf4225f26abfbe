"""Train one adapter, or a sweep of them: ``python -m sidestep.train [-m] [group=option] [setting=value]``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sidestep.acestep.kept import KeptWeights
from sidestep.cli import importing, run_command
from sidestep.config.settings import TrainConfig

KEPT = KeptWeights()
"""Of the base model, from one point of a sweep in this process to the next."""


def train_command(config: TrainConfig) -> float:
    """Train, and return the number that a sweep minimises."""
    runtime = HydraConfig.get().runtime
    output_dir = Path(runtime.output_dir)
    if output_dir.is_relative_to(Path.cwd()):
        output_dir = output_dir.relative_to(Path.cwd())  # shorter to read, and to type
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.training.loop import train

    if config.toy:
        from sidestep.demo import prepare_demo

        prepare_demo(config)
    kept = KEPT if HydraConfig.get().mode is RunMode.MULTIRUN else None
    return train(config, output_dir, dict(runtime.choices), kept)


if __name__ == "__main__":
    run_command("train", TrainConfig, train_command)
