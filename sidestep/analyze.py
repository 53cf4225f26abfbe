"""Measure how much each module matters on a dataset: ``python -m sidestep.analyze dataset_dir=...``."""

from __future__ import annotations

from sidestep.cli import quick_imports, run_command
from sidestep.config.settings import AnalyzeConfig


def analyze_command(config: AnalyzeConfig) -> None:
    """Analyze, and print the path of the rank pattern."""
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.training.fisher import analyze

    print(analyze(config))


if __name__ == "__main__":
    run_command("analyze", AnalyzeConfig, analyze_command)
