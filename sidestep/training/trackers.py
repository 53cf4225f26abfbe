"""Where a run's numbers are shown besides ``metrics.jsonl`` and TensorBoard, which are always written."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.config.schema import option
from sidestep.errors import UserError


@dataclass(kw_only=True)
class TrackingConfig:
    """A service that receives what TensorBoard shows; nothing leaves this machine unless one is chosen."""

    def check(self) -> None:
        """Refuse a service whose package is missing, before anything is loaded."""

    def open(self, output_dir: Path, run_id: str, config: dict[str, Any]) -> Any:
        """Start one of Accelerate's trackers, or return None for no service.

        Args:
            output_dir: the run's folder, ``outputs/<name>/<run>``.
            run_id: the same whenever the run goes on, and no other run's.
            config: every setting, flat.
        """
        return None


@option("tracking", "tensorboard")
@dataclass(kw_only=True)
class TensorBoardOnly(TrackingConfig):
    """No service."""


@option("tracking", "wandb")
@dataclass(kw_only=True)
class WandbConfig(TrackingConfig):
    """Weights & Biases, where a run that goes on goes on too, and one that goes back begins anew."""

    project: str = "sidestep"
    """Project that the runs appear in."""
    entity: str | None = None
    """Team or user; null is the one you are logged in as."""

    def check(self) -> None:
        _require("wandb")

    def open(self, output_dir: Path, run_id: str, config: dict[str, Any]) -> Any:
        from accelerate.tracking import WandBTracker

        name = f"{output_dir.parent.name}-{output_dir.name}"
        tracker = WandBTracker(
            self.project, name=name, id=run_id, resume="allow", entity=self.entity, dir=str(output_dir)
        )
        tracker.start()
        tracker.store_init_configuration(config)
        return tracker


@option("tracking", "mlflow")
@dataclass(kw_only=True)
class MlflowConfig(TrackingConfig):
    """MLflow, at the server that MLFLOW_TRACKING_URI names. A run that goes on is a new run there."""

    experiment: str = "sidestep"
    """Experiment that the runs appear in."""

    def check(self) -> None:
        _require("mlflow")

    def open(self, output_dir: Path, run_id: str, config: dict[str, Any]) -> Any:
        from accelerate.tracking import MLflowTracker

        tracker = MLflowTracker(self.experiment, run_name=f"{output_dir.parent.name}-{output_dir.name}")
        tracker.start()
        tracker.store_init_configuration(config)
        return tracker


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Write nested settings as ``optim.lr``; what is no plain number or text becomes text."""
    plain: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain.update(flat(value, f"{prefix}{key}."))
        else:
            plain[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return plain


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"tracking={package} needs the package {package}: pip install 'sidestep[{package}]'")
