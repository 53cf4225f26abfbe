"""What happens around the points of a sweep: its plan, a record of each attempt, and the table.

Every point writes ``point.json`` into its own folder, whichever process and machine it runs on; the table is made
from those files, so it can be looked at any time and nothing is lost with the process that launched the sweep.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sidestep.errors import PointFailed, UserError
from sidestep.processes import rank
from sidestep.reporting.page import write_page
from sidestep.reporting.runs import (
    Plan,
    PlannedPoint,
    PointRecord,
    as_table,
    collect_points,
    is_alive,
    queued_jobs,
    read_plan,
    read_point,
    same_point,
    write_tables,
)
from sidestep.times import now
from sidestep.training.signals import Interrupted

log = logging.getLogger(__name__)

_launched: list[Path] = []
"""Folder of the sweep that this process launched, if it did."""


class SweepPlan(Callback):
    """Writes down which points a sweep is to do, before the first of them begins."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, in the process that launches the sweep."""
        if rank() != 0:
            return
        sweep_dir = Path(config.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        points = points_of(config.hydra.sweeper, config.hydra.overrides.task)
        before = read_plan(sweep_dir)
        jobs = {same_point(point.overrides): point.job for point in before.points} if before is not None else {}
        planned = [PlannedPoint(overrides=point, job=jobs.get(same_point(point), "")) for point in points]
        Plan(launched=now(), points=planned).write(sweep_dir)
        _launched[:] = [sweep_dir]


def points_of(sweeper: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """What is typed for each point of a sweep; empty for a sweeper that chooses points as it goes.

    Args:
        sweeper: Hydra's settings of it, ``hydra.sweeper``.
        overrides: what was typed for the sweep.
    """
    if not sweeper._target_.endswith(".BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *overrides])
    return [point for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]


def record_point(run: Callable[[], Any]) -> Any:
    """Run one point of a sweep and write down what came of it.

    Args:
        run: does the point; what it returns is what the sweep minimises, if it is a number.

    Raises:
        PointFailed: if the point failed, after writing down why; so that the others go on.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    before = read_point(folder)
    attempt = PointRecord(
        overrides=list(hydra.overrides.task),
        started=now(),
        seconds=before.seconds if before is not None else 0.0,
        host=socket.gethostname(),
        process=os.getpid(),
        job=slurm_job(),
    )
    if rank() != 0:
        return run()
    if before is not None:
        _refuse_if_busy(before, attempt, folder)
    attempt.write(folder)
    began = time.monotonic()
    try:
        result = run()
    except Interrupted as stop:
        _end(attempt, folder, "interrupted", began, str(stop))
        raise
    except KeyboardInterrupt:
        _end(attempt, folder, "interrupted", began, "stopped by Ctrl-C")
        raise
    except SystemExit as stop:
        if stop.code:
            _end(attempt, folder, "failed", began, f"ended with exit code {stop.code}; see {folder}")
            raise PointFailed(attempt.error) from stop
        result = None
    except Exception as error:
        _end(attempt, folder, "failed", began, _line(error))
        raise PointFailed(attempt.error) from error
    attempt.objective = float(result) if isinstance(result, int | float) and math.isfinite(result) else None
    _end(attempt, folder, "finished", began)
    return result


def _refuse_if_busy(before: PointRecord, attempt: PointRecord, folder: Path) -> None:
    """Leave a point alone that another process is doing; its record must stay that process's."""
    if before.status != "running" or (before.host, before.process) == (attempt.host, attempt.process):
        return
    if before.job and before.job == attempt.job:  # the same job, begun again
        return
    if is_alive(before, queued_jobs() if before.job else None):
        who = f"job {before.job}" if before.job else f"process {before.process} on {before.host}"
        log.error("%s is being trained by %s; wait for it or stop it", folder, who)
        raise PointFailed(f"{folder} is being trained by {who}")


def _end(attempt: PointRecord, folder: Path, status: str, began: float, error: str = "") -> None:
    attempt.status, attempt.error, attempt.ended = status, error, now()
    attempt.seconds = round(attempt.seconds + time.monotonic() - began, 1)
    attempt.write(folder)
    update_tables(folder.parent)


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def update_tables(sweep_dir: Path) -> None:
    """Write the table of a sweep anew, unless that was done a moment ago and there are many points to read."""
    table = sweep_dir / "sweep.json"
    if table.exists():
        num_points = len(os.listdir(sweep_dir))
        if time.time() - table.stat().st_mtime < num_points / 50:  # one per cent of the time, at 0.2 ms for a point
            return
    write_tables(sweep_dir, collect_points(sweep_dir))


def end_sweep() -> int:
    """Write and print the table of the sweep that this process launched, if it did.

    Returns:
        How many of its points failed.
    """
    if not _launched:
        return 0
    sweep_dir = _launched.pop()
    plan = read_plan(sweep_dir)
    points = collect_points(sweep_dir)
    if {point.status for point in points} == {"waiting"}:
        return 0  # refused before anything began; why, is said elsewhere
    print(as_table(points, sweep_dir))
    try:
        write_tables(sweep_dir, points)
        log.info("the page about it is %s", write_page(sweep_dir, inline_mb=8))
    except OSError as error:  # a full disk does not change what the points came to
        log.warning("the table and the page are not up to date: %s", error)
    failed = 0
    for point in points:
        attempt = read_point(sweep_dir / point.name) if point.name else None
        if point.status == "failed" and attempt is not None and plan is not None:
            failed += attempt.ended >= plan.launched  # a failure that an earlier command left is not this one's
    return failed


def slurm_job() -> str:
    """Number of the Slurm job that this process belongs to, as ``squeue`` shows it; empty outside of one."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")
