"""Measure how much each module matters on a dataset: ``python -m sidestep.analyze dataset_dir=...``."""

from __future__ import annotations

from sidestep.cli import importing, run_command
from sidestep.config.settings import AnalyzeConfig


def analyze_command(config: AnalyzeConfig) -> None:
    """Analyze, and print the path of the rank pattern."""
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.training.fisher import analyze

    print(analyze(config))


if __name__ == "__main__":
    run_command("analyze", AnalyzeConfig, analyze_command)
