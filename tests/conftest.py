"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models are slower on more threads, and workers share the cores

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers whichever tests its worker ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root folder of a toy base checkpoint and a toy turbo checkpoint."""
    from sidestep.acestep.toy import make_toy_checkpoint
    from tests.factories import train_config

    root = tmp_path_factory.mktemp("checkpoints")
    for variant in ("base", "turbo"):
        make_toy_checkpoint(root, train_config(f"model_variant={variant}").model_variant)
    return root


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Path:
    """A dataset of four songs of unequal length for the toy base checkpoint."""
    from tests.factories import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "songs", checkpoint_dir, lengths=[60, 80, 41, 100])


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> dict[str, Path]:
    """Folders of one adapter of each of ``ADAPTERS``, for the toy base checkpoint."""
    from tests.factories import ADAPTERS, write_adapter

    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name / "final", checkpoint_dir, *typed) for name, typed in ADAPTERS.items()}
