"""Hydra looks for sweepers here; the code is in sidestep.sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn


class GridSweeper(BasicSweeper):
    """Hydra's grid of all values, of which every batch is launched, whatever came of the one before."""

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Called by Hydra with what was typed."""
        from sidestep.sweep import sweep_grid  # not at the top: Hydra imports this module in every command

        return sweep_grid(self, arguments)

    def launch(self, points: Sequence[Sequence[str]], first_number: int) -> Sequence[JobReturn]:
        """Run some of the points, or submit them."""
        launcher: Any = self.launcher
        return list(launcher.launch(points, initial_job_idx=first_number))


# Every command has this in place of Hydra's own, unless another sweeper is chosen. Not in conf/train.yaml, whose choice
# would win over that of conf/sweep/optuna.yaml.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="basic",
    node={"_target_": "hydra_plugins.sidestep_sweep.GridSweeper", "max_batch_size": None, "params": None},
    provider="sidestep",
)
