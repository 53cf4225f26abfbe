"""Say where the points of a sweep stand: ``python -m sidestep.report sweep_dir=outputs/<name>``."""

from __future__ import annotations

from pathlib import Path

from sidestep.cli import run_command
from sidestep.config.settings import ReportConfig, ReportFormat
from sidestep.reporting.page import write_page
from sidestep.reporting.runs import FORMATS, collect_points


def report_command(config: ReportConfig) -> None:
    """Print the table of the points as they stand now, or write the page about them and print its path."""
    sweep_dir = Path(config.sweep_dir)
    if config.format is ReportFormat.html:
        print(write_page(sweep_dir, config.inline_mb))
        return
    print(FORMATS[config.format.value](collect_points(sweep_dir), sweep_dir).rstrip("\n"))


if __name__ == "__main__":
    run_command("report", ReportConfig, report_command)
