"""Say where the points of a sweep stand: ``python -m sidestep.report sweep_dir=outputs/<name>``."""

from __future__ import annotations

from pathlib import Path

from sidestep.cli import run_command
from sidestep.config.settings import ReportConfig
from sidestep.reporting.runs import FORMATS, collect_points


def report_command(config: ReportConfig) -> None:
    """Print the table of the points as they stand now."""
    sweep_dir = Path(config.sweep_dir)
    print(FORMATS[config.format.value](collect_points(sweep_dir), sweep_dir).rstrip("\n"))


if __name__ == "__main__":
    run_command("report", ReportConfig, report_command)
