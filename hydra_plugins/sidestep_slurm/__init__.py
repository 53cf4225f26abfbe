"""Hydra looks for launchers here; the code is in sidestep.slurm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Runs every point of a sweep as a Slurm job."""

    def __init__(self) -> None:
        self.job: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before anything is launched."""
        from sidestep.slurm import SlurmJob  # not at the top: Hydra imports this module in every command

        self.job = SlurmJob(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the points of a sweep, or of one round of it."""
        from sidestep.slurm import launch

        return launch(self.job, job_overrides, initial_job_idx)
