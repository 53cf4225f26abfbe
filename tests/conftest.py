"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models are slower on more threads, and workers share the cores

import pytest

gc.disable()  # until all tests are imported: it would look through all of PyTorch again and again


def keep_what_is_imported() -> None:
    """Let the garbage collector pass over what is there now; each run ends with a collection, a third of its time."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    collected = yield
    keep_what_is_imported()
    return collected


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers whichever tests its worker ran before."""
    import torch  # not by the process that only hands out the tests

    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo at the end what a command sets for its whole process."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root folder of a toy base checkpoint and a toy turbo checkpoint."""
    from sidestep.acestep.toy import make_toy_checkpoint
    from sidestep.config.gate import read_variant

    root = tmp_path_factory.mktemp("checkpoints")
    for variant in ("base", "turbo"):
        make_toy_checkpoint(root, read_variant(variant))
    keep_what_is_imported()  # the libraries of the model, which no test module imports
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
