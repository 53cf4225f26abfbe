"""Say where the points of a sweep stand: ``python -m sidestep.report sweep_dir=outputs/<name>``."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sidestep.cli import run_command
from sidestep.config.settings import ReportConfig, ReportFormat
from sidestep.reporting.page import write_page
from sidestep.reporting.runs import FORMATS, collect_points, write_tables


def report_command(config: ReportConfig) -> None:
    """Print the table of the points as they stand now, or write the page about them and print its path.

    The tables of a sweep are written anew, since nobody does that for the last points of jobs that were left alone.
    """
    sweep_dir = Path(config.sweep_dir)
    if config.format is ReportFormat.html:
        print(write_page(sweep_dir, config.inline_mb))
        return
    points = collect_points(sweep_dir)
    if (sweep_dir / "sweep.json").exists():
        with contextlib.suppress(OSError):  # a folder of somebody else
            write_tables(sweep_dir, points)
    print(FORMATS[config.format.value](points, sweep_dir).rstrip("\n"))


if __name__ == "__main__":
    run_command("report", ReportConfig, report_command)
