"""What happens around the points of a sweep: its plan, a record of each attempt, and the table.

Every point writes ``point.json`` into its own folder, whichever process and machine it runs on; the table is made
from those files, so it can be looked at any time and nothing is lost with the process that launched the sweep.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, Sweep
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from sidestep.config.gate import UNREADABLE, compose_or_explain, explain_null, parse_overrides
from sidestep.errors import PointFailed, SharedError, UserError
from sidestep.processes import rank, slurm_job
from sidestep.reporting.page import write_page
from sidestep.reporting.runs import (
    Plan,
    PlannedPoint,
    PointRecord,
    as_table,
    collect_points,
    finished_at,
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

MANY_POINTS = 100
"""More make the table of a sweep be written now and then, and not whenever a point begins or ends."""

_launched: list[Path] = []
"""Folder of the sweep that this process launched, if it did."""


class SweepPlan(Callback):
    """Begins the plan of a sweep whose points are not known yet; ``sweep_grid`` does so where they are."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, in the process that launches the sweep."""
        if rank() == 0 and not is_grid(config.hydra.sweeper):
            start_plan(Path(config.hydra.sweep.dir), [])


def start_plan(sweep_dir: Path, points: Sequence[Sequence[str]]) -> None:
    """Begin a new plan, which keeps points of earlier commands whose jobs are in Slurm's queue.

    Args:
        sweep_dir: the sweep's folder.
        points: what is typed for each.
    """
    sweep_dir.mkdir(parents=True, exist_ok=True)
    before, queued = read_plan(sweep_dir), queued_jobs()
    kept = [
        planned
        for planned in (before.points if before is not None else [])
        if planned.job and (queued is None or planned.job in queued)
    ]
    Plan(launched=now(), points=kept).write(sweep_dir)
    add_to_plan(sweep_dir, [PlannedPoint(overrides=list(point)) for point in points])
    _launched[:] = [sweep_dir]


def add_to_plan(sweep_dir: Path, points: Sequence[PlannedPoint]) -> None:
    """Write down points, or what is known now of points in the plan: their folders, and then their jobs."""
    plan = read_plan(sweep_dir) or Plan(launched=now(), points=[])
    jobs = {planned.folder: planned.job for planned in plan.points if planned.folder}
    folders = {point.folder for point in points if point.folder}
    typed = {same_point(point.overrides) for point in points}
    others = [p for p in plan.points if (p.folder not in folders if p.folder else same_point(p.overrides) not in typed)]
    added = [dataclasses.replace(point, job=point.job or jobs.get(point.folder, "")) for point in points]
    Plan(launched=plan.launched, points=[*others, *added]).write(sweep_dir)


def sweep_grid(sweeper: Any, typed: Sequence[str]) -> list[Sequence[JobReturn]]:
    """Launch every point of a grid; of a batch that has a point which cannot be told from another, nothing.

    Args:
        sweeper: ``hydra_plugins.sidestep_sweep.GridSweeper``, set up.
        typed: what was typed for the sweep.

    Raises:
        UserError: if there are no points, two would share a folder, or one would lie in the folder of another sweep.
        PointFailed: if a point failed, after all of them.
    """
    config = sweeper.config
    sweep_dir = Path(config.hydra.sweep.dir)
    size = sweeper.max_batch_size
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"hydra.sweeper.max_batch_size={size} must be a whole number from 1 on")
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    parsed = parser.parse_overrides([*_params(sweeper.params), *typed])
    _refuse_no_values(parsed)
    batches = sweeper.split_arguments(parsed, size)
    folders: dict[str, Sequence[str]] = {}
    returned: list[Sequence[JobReturn]] = []
    has_folders = "sweep" in config.hydra.callbacks  # not where a command only looks or converts
    keeps_plan = rank() == 0 and has_folders
    for batch in batches:
        planned = []
        for number, point in enumerate(batch, start=len(folders)):
            folder = _folder_of(sweeper.hydra_context, config, point, number)
            if (other := folders.setdefault(folder if has_folders else str(number), point)) is not point:
                raise UserError(_are_one_point(other, point, sweep_dir / folder))
            planned.append(PlannedPoint(overrides=list(point), folder=folder))
        if keeps_plan and not returned:
            start_plan(sweep_dir, [point for each in batches for point in each])
        if keeps_plan:
            add_to_plan(sweep_dir, planned)
        places = [sweep_dir / point.folder for point in planned]
        returned.append(launch_points(sweeper.launch, batch, places, len(folders) - len(batch)))
    for done in returned:
        for point_return in done:
            if point_return.status is JobStatus.FAILED:
                raise point_return._return_value  # not return_value, which prints all that was typed for the point
    return returned


def _params(params: Mapping[str, Any] | None) -> list[str]:
    """What a sweep's file has, as if it was typed."""
    return [f"{key}={value}" for key, value in (params or {}).items()]


def _refuse_no_values(parsed: Sequence[Override]) -> None:
    """Refuse several values that are none, or among which Hydra would take glob(...) for one.

    Raises:
        UserError: naming what was typed.
    """
    for override in {override.get_key_element(): override for override in parsed}.values():
        values = override.value()
        if isinstance(values, ChoiceSweep) and any(isinstance(value, Glob | Sweep) for value in values.list):
            raise UserError(f"{override.input_line}: glob(...) or range(...) stands alone, and not among other values")
        if override.is_discrete_sweep() and not any(True for _ in override.sweep_string_iterator()):
            raise UserError(f"{override.input_line} gives {override.key_or_group} no value, so there are no points")


def launch_points(
    launch: Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]],
    points: Sequence[Sequence[str]],
    folders: Sequence[Path],
    first_number: int,
) -> list[JobReturn]:
    """Launch points; if one of several processes is killed, do what is left.

    All processes of a launcher end with one that is killed, and it is not known which point was too much for it. So
    those that were under way go on one at a time, where there is more memory for each; what is killed then, has failed.

    Args:
        launch: starts points, given the number of the first.
        points: what is typed for each.
        folders: of the points.
        first_number: of the first point.

    Raises:
        UserError: if processes are killed before they begin a point.
    """
    returned: dict[int, JobReturn] = {}
    rounds = [list(range(len(points)))]
    while rounds:
        together, began = rounds.pop(0), now()
        try:
            done = launch([points[number] for number in together], first_number + together[0])
            returned.update(zip(together, done, strict=True))
            continue
        except BrokenExecutor:
            _wait_until_gone([folders[number] for number in together])
        cut_off, left = [], []
        for number in together:
            attempt = read_point(folders[number])
            if attempt is not None and attempt.status in ("finished", "failed") and attempt.ended >= began:
                returned[number] = _came_to(attempt)
            elif attempt is not None and attempt.status == "running" and attempt.started >= began:
                cut_off.append(number)
            else:
                left.append(number)
        if len(left) == len(together):
            raise UserError("the processes of this sweep were killed before they began a point; look at the memory")
        if cut_off == together and len(together) == 1:
            returned[together[0]] = _killed(folders[together[0]])
            continue
        log.warning(
            "a process of this sweep was killed, perhaps because memory ran out; %d points that were under way go on "
            "one at a time, then %d others together; fewer at once need less memory",
            len(cut_off),
            len(left),
        )
        rounds = [*([number] for number in cut_off), *([left] if left else []), *rounds]
    return [returned[number] for number in range(len(points))]


def _wait_until_gone(folders: Sequence[Path]) -> None:
    """Wait a little for processes that are being ended, so that their points are not taken to be busy."""
    for _ in range(100):
        attempts = [attempt for folder in folders if (attempt := read_point(folder)) is not None]
        if not any(attempt.status == "running" and is_alive(attempt, None) for attempt in attempts):
            return
        time.sleep(0.1)


def _killed(folder: Path) -> JobReturn:
    """Write down that the process of a point was killed."""
    attempt = read_point(folder)
    assert attempt is not None
    attempt.status, attempt.ended = "failed", now()
    attempt.error = "its process was killed, perhaps because memory ran out"
    log.error("%s: %s", folder, attempt.error)
    attempt.write(folder)
    update_tables(folder.parent)
    return _came_to(attempt)


def _came_to(attempt: PointRecord) -> JobReturn:
    """What a point returns whose process could not say so itself."""
    if attempt.status == "failed":
        failure = PointFailed(attempt.error)
        return JobReturn(overrides=attempt.overrides, status=JobStatus.FAILED, _return_value=failure)
    return JobReturn(overrides=attempt.overrides, status=JobStatus.COMPLETED, _return_value=attempt.objective)


def _folder_of(context: HydraContext, config: DictConfig, point: Sequence[str], number: int) -> str:
    """Compose a point and give the name of its folder."""
    try:
        composed = context.config_loader.load_sweep_config(config, list(point))
    except (HydraException, OmegaConfBaseException, *UNREADABLE):
        raise  # and explained where it ends
    except (ValueError, AssertionError) as error:
        raise UserError(explain_null(error, point)) from error
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    if composed.hydra.sweep.dir != config.hydra.sweep.dir:
        raise UserError(
            f"a sweep has one folder, {config.hydra.sweep.dir}, and {composed.hydra.sweep.dir} would be another; "
            f"type one command for each"
        )
    return str(composed.hydra.sweep.subdir)


def _are_one_point(one: Sequence[str], other: Sequence[str], folder: Path) -> str:
    differ = [" ".join(o for o in point if o not in against) for point, against in ((one, other), (other, one))]
    what = " and ".join(differ) if any(differ) else f"{' '.join(one)}, which is there twice,"
    return f"{what} would share the folder {folder}; leave one of them out, or type another command for it"


def is_grid(sweeper: DictConfig) -> bool:
    """Whether all points of a sweep are known before any is launched."""
    return str(sweeper._target_).endswith((".GridSweeper", ".BasicSweeper"))


def check_launch(command: str, hydra: DictConfig | None, fixed: Sequence[str], swept: Sequence[Override]) -> None:
    """Refuse what the sweeper or the launcher would break down at.

    Args:
        command: name of the YAML in conf/.
        hydra: Hydra's settings.
        fixed: what was typed with one value.
        swept: what was given several.

    Raises:
        UserError: naming it.
    """
    if hydra is None:
        return
    cluster, launcher = hydra.runtime.choices.get("cluster"), hydra.runtime.choices.get("hydra/launcher")
    if cluster not in (None, "null", "none") and not str(hydra.launcher._target_).endswith(".SlurmLauncher"):
        raise UserError(
            f"cluster={cluster} submits the points, and hydra/launcher={launcher} would run them here; leave one out"
        )
    for part, key in (("launcher", "n_jobs"), ("sweeper", "n_jobs"), ("sweeper", "n_trials")):
        number = hydra[part].get(key)
        if isinstance(number, int) and (number == 0 or (number < 0 and part == "sweeper")):  # joblib's -1 is all cores
            raise UserError(f"hydra.{part}.{key}={number} must be at least 1")
    if is_grid(hydra.sweeper):
        for override in swept:
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: only sweep=optuna chooses from an interval; name the values")
        return
    folder = Path(str(hydra.sweeper.get("storage")).removeprefix("sqlite:///")).parent
    if str(hydra.sweeper.get("storage")).startswith("sqlite:///") and not folder.is_dir():
        raise UserError(f"hydra.sweeper.storage={hydra.sweeper.storage}: there is no folder {folder}")
    point = []
    for override in swept:
        values = override.value()
        if isinstance(values, Glob):
            raise UserError(f"{override.input_line}: this sweep takes no glob(...); name the values")
        if isinstance(values, IntervalSweep):
            low, high = cast(float, values.start), cast(float, values.end)
            if low > high:
                raise UserError(f"{override.input_line}: an interval begins below its end")
            point.append(f"{override.key_or_group}={low}")
        else:
            point.append(f"{override.key_or_group}={next(override.sweep_string_iterator(), 'null')}")
    compose_or_explain(command, [*fixed, *point])  # since it chooses its points too late


def points_of(sweeper: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """What is typed for each point of a sweep; empty for a sweeper that chooses points as it goes.

    Args:
        sweeper: Hydra's settings of it, ``hydra.sweeper``.
        overrides: what was typed for the sweep.

    Raises:
        UserError: if there are none.
    """
    if not is_grid(sweeper):
        return []
    parsed = parse_overrides([*_params(sweeper.params), *overrides])
    _refuse_no_values(parsed)
    return [point for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]


def record_point(run: Callable[[], Any]) -> Any:
    """Run one point of a sweep and write down what came of it.

    Args:
        run: does the point; what it returns is what the sweep minimises, if it is a number.

    Raises:
        PointFailed: if the point failed, after writing down why; so that the others go on.
        SystemExit: if it failed in this process, and perhaps not in the other ones of the same run: they would wait for
            it in the middle of a step, and the launcher ends them once it is gone.
    """
    try:
        return _attempt(run)
    except Exception as error:
        is_alone = not (isinstance(error, PointFailed) and error.in_all)
        if is_alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not isinstance(error, PointFailed):  # which is said already
                log.error("%s", _line(error))
            sys.exit(1)
        raise


def _attempt(run: Callable[[], Any]) -> Any:
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    before, trained_before = read_point(folder), finished_at(folder)
    attempt = PointRecord(
        overrides=list(hydra.overrides.task),
        started=now(),
        seconds=before.seconds if before is not None else 0.0,
        host=socket.gethostname(),
        process=os.getpid(),
        job=slurm_job(),
    )
    if rank() == 0:
        if before is not None:
            _refuse_if_busy(before, attempt, folder)
        attempt.write(folder)
        update_tables(folder.parent)
    began = time.monotonic()
    result, in_all = None, False
    try:
        result = run()
        attempt.status = "finished"
    except Interrupted as stop:
        attempt.status, attempt.error = "interrupted", str(stop)
        raise
    except KeyboardInterrupt:
        attempt.status, attempt.error = "interrupted", "stopped by Ctrl-C"
        raise
    except SystemExit as stop:
        attempt.status = "failed" if stop.code else "finished"
        attempt.error = f"ended with exit code {stop.code}; see {folder}" if stop.code else ""
    except Exception as error:
        attempt.status, attempt.error = "failed", _line(error)
        in_all = isinstance(error, SharedError)
    finally:
        attempt.objective = float(result) if isinstance(result, int | float) and math.isfinite(result) else None
        attempt.ended, attempt.seconds = now(), round(attempt.seconds + time.monotonic() - began, 1)
        idle = attempt.status == "finished" and trained_before != "" and trained_before == finished_at(folder)
        if before is not None and before.status == "finished" and idle:  # there was nothing to do
            attempt.started, attempt.ended, attempt.seconds = before.started, before.ended, before.seconds
        if rank() == 0:
            attempt.write(folder)
            update_tables(folder.parent)
    if attempt.status == "failed":
        # not where it was caught: the error holds on to the model it came from, and Hydra to the one that is raised
        _free_memory()
        raise PointFailed(attempt.error, in_all=in_all)
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


def _free_memory() -> None:
    """Give back what a failed point held, so that it does not make the next one fail too."""
    gc.collect()
    torch = sys.modules.get("torch")  # a point may fail before it is imported
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def update_tables(sweep_dir: Path) -> None:
    """Write the table of a sweep anew, unless that was done a moment ago and there are many points to read."""
    table = sweep_dir / "sweep.json"
    if table.exists():
        num_points = len(os.listdir(sweep_dir))
        pause = num_points / 25  # one per cent of the time, at 0.4 ms for a point
        if num_points > MANY_POINTS and time.time() - table.stat().st_mtime < pause:
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
        log.info("the page about it is %s", write_page(sweep_dir))
    except OSError as error:  # a full disk does not change what the points came to
        log.warning("the table and the page are not up to date: %s", error)
    failed = 0
    for point in points:
        attempt = read_point(sweep_dir / point.name) if point.name else None
        if point.status == "failed" and attempt is not None and plan is not None:
            failed += attempt.ended >= plan.launched  # a failure that an earlier command left is not this one's
    return failed
