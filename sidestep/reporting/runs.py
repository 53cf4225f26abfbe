"""Where the points of a sweep stand, read from their folders; nothing here changes them or imports torch.

outputs/<name>/plan.json            every point that the last command is to do
outputs/<name>/sweep.csv, .json     the table of all points, written while the sweep runs
outputs/<name>/<run>/point.json     what the last attempt at a point came to
outputs/<name>/<run>/run.json       how far its training is (see sidestep.training.tracking)
"""

from __future__ import annotations

import calendar
import csv
import io
import json
import logging
import math
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.files import describe, write_text
from sidestep.records import parse_json, parse_record
from sidestep.times import duration

log = logging.getLogger(__name__)

PLAN, POINT, RUN = "plan.json", "point.json", "run.json"
STATUSES = ("running", "submitted", "waiting", "interrupted", "failed", "finished")
_NOT_SHOWN = ("swept", "name")
_WHERE = ("cluster", "hydra", "local")
_CUT = re.compile("-[0-9a-f]{8}$")
_BEGAN = ("started", "host", "process", "job")
_HOST = socket.gethostname()
MANY = 40
"""Points that a terminal shows one by one."""


@dataclass(kw_only=True)
class PointRecord:
    """``point.json``: what the last attempt at a point of a sweep came to."""

    overrides: list[str]
    status: str = "running"
    """running, finished, interrupted or failed."""
    started: str = ""
    ended: str = ""
    seconds: float = 0.0
    """Of all attempts that came to an end."""
    objective: float | None = None
    """What a sweep minimises."""
    error: str = ""
    host: str = ""
    process: int = 0
    job: str = ""
    """Number of the Slurm job; empty on a machine of one's own."""

    def write(self, folder: Path) -> None:
        """Write ``point.json`` into the point's folder."""
        write_text(folder / POINT, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


@dataclass(kw_only=True)
class PlannedPoint:
    """A point that a command is to do."""

    overrides: list[str]
    job: str = ""
    """Number of the Slurm job that was submitted for it."""
    folder: str = ""
    """Name of its folder; empty until the point is launched."""


@dataclass(kw_only=True)
class Plan:
    """``plan.json``: what the last command on a sweep's folder is to do."""

    launched: str
    points: list[PlannedPoint]

    def write(self, sweep_dir: Path) -> None:
        """Write ``plan.json`` into the sweep's folder."""
        write_text(sweep_dir / PLAN, json.dumps(asdict(self), ensure_ascii=False) + "\n")


@dataclass(kw_only=True)
class Point:
    """One row of a sweep's table."""

    name: str
    """Of its folder; empty if the point was not begun yet."""
    status: str
    """waiting, submitted, running, finished, interrupted or failed."""
    objective: float | None = None
    step: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    """Time it took, over all its attempts."""
    where: str = ""
    """Host, or Slurm job."""
    error: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    """What was typed for it."""
    record: dict[str, Any] = field(default_factory=dict)
    """Its run.json; empty if training never began."""


def collect_points(sweep_dir: Path) -> list[Point]:
    """Read every point of a sweep, those that were not begun last.

    Raises:
        UserError: if the folder holds no sweep and no run.
    """
    folders = sorted({path.parent for name in (POINT, RUN) for path in sweep_dir.glob(f"*/{name}")})
    plan = read_plan(sweep_dir)
    if not folders and plan is None:
        raise UserError(
            f"sweep_dir={sweep_dir} holds no sweep ({describe(sweep_dir)}); it is the folder outputs/<name> of "
            f"python -m sidestep.train -m name=<name> ..."
        )
    queued = queued_jobs()
    jobs = {planned.folder: planned.job for planned in plan.points} if plan is not None else {}
    points, begun = [], set()
    for folder in folders:
        attempt = read_point(folder)
        if attempt is not None:
            begun |= {folder.name, same_point(attempt.overrides)}
        points.append(_point(folder, attempt, jobs.get(folder.name, ""), queued))
    for planned in plan.points if plan is not None else []:
        if (planned.folder or same_point(planned.overrides)) not in begun:
            status = "waiting"
            if planned.job:
                status = "submitted" if queued is None or planned.job in queued else "interrupted"
            points.append(Point(name="", status=status, where=planned.job, settings=_settings(planned.overrides)))
    return points


def _point(folder: Path, attempt: PointRecord | None, job: str, queued: dict[str, str] | None) -> Point:
    record = _read_json(folder / RUN, parse_record)
    trained = record.get("status") == "finished"
    point = Point(
        name=folder.name,
        status=str(record.get("status") or "interrupted"),
        objective=objective_of(record) if trained else None,
        step=record.get("step", 0),
        num_steps=record.get("num_steps", 0),
        error="" if trained else str(record.get("error", "")),
        record=record,
    )
    if point.status == "running":
        began = PointRecord(overrides=[], **{key: record[key] for key in _BEGAN if key in record})
        if is_alive(began, queued) is False:
            point.status, point.error = "interrupted", point.error or "its process ended without a word"
    if attempt is None:  # a run that was typed by itself
        return point
    point.settings, point.seconds = _settings(attempt.overrides), attempt.seconds
    point.where = attempt.job or attempt.host
    if trained and record.get("finished", "") >= attempt.ended and attempt.status != "running":
        return point  # finished by itself after the sweep
    point.status, point.error = attempt.status, attempt.error
    if attempt.objective is not None:
        point.objective = attempt.objective
    if attempt.status == "running" and is_alive(attempt, queued) is False:
        point.status = "interrupted"
        point.error = point.error or "its process ended without a word"
    if point.status != "running" and job and job != attempt.job and queued is not None and job in queued:
        point.status, point.where = "submitted", job
    return point


def finished_at(folder: Path) -> str:
    """When the run in a folder was finished; empty if it was not."""
    record = _read_json(folder / RUN, parse_record)
    return str(record.get("finished", "")) if record.get("status") == "finished" else ""


def objective_of(record: dict[str, Any]) -> float | None:
    """What a finished run returns: its best validation loss, or its smoothed loss where no song is held out."""
    best: float | None = (record.get("validation") or {}).get("best_loss")
    return record.get("smoothed_loss") if best is None else best


def read_plan(sweep_dir: Path) -> Plan | None:
    """Read ``plan.json``; None if there is none that can be read."""
    values = _read_json(sweep_dir / PLAN)
    try:
        return Plan(launched=values["launched"], points=[PlannedPoint(**point) for point in values["points"]])
    except (KeyError, TypeError):
        return None


def read_point(folder: Path) -> PointRecord | None:
    """Read ``point.json``; None if there is none that can be read."""
    values = _read_json(folder / POINT)
    try:
        return PointRecord(**values)
    except TypeError:
        return None


def queued_jobs() -> dict[str, str] | None:
    """This user's jobs in Slurm's queue and their states; None where there is no Slurm to ask."""
    if shutil.which("squeue") is None:
        return None
    asked = subprocess.run(
        ["squeue", "--me", "--noheader", "--array", "--format=%i %T"], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        return None
    return dict(line.split(maxsplit=1) for line in asked.stdout.splitlines())


def is_alive(attempt: PointRecord, queued: dict[str, str] | None) -> bool | None:
    """Whether the process of an attempt still exists; None where nobody can be asked.

    Args:
        attempt: one that has not said that it ended.
        queued: Slurm's queue, from :func:`queued_jobs`.
    """
    import psutil

    if attempt.job:
        return None if queued is None else attempt.job in queued
    if attempt.host != _HOST:
        return None
    try:
        began = psutil.Process(attempt.process).create_time()
    except psutil.NoSuchProcess:
        return False
    # another process may have been given the number since
    return began <= calendar.timegm(time.strptime(attempt.started, "%Y-%m-%dT%H:%M:%SZ")) + 1


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    pairs = [override.lstrip("+").partition("=")[::2] for override in overrides]
    return {key: value for key, value in pairs if key not in _NOT_SHOWN and re.split("[./@]", key)[0] not in _WHERE}


def same_point(overrides: Sequence[str]) -> tuple[str, ...]:
    """What makes a point the same in two commands: what was typed for it, but not in which order or where it runs."""
    return tuple(sorted(o for o in overrides if re.split("[./=@]", o.lstrip("+~"))[0] not in (*_WHERE, "swept")))


def _read_json(path: Path, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("passing over %s, which cannot be read: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


# the table


def write_tables(sweep_dir: Path, points: Sequence[Point]) -> None:
    """Write ``sweep.csv`` and ``sweep.json``."""
    write_text(sweep_dir / "sweep.csv", as_csv(points))
    write_text(sweep_dir / "sweep.json", as_json(points))


def as_csv(points: Sequence[Point]) -> str:
    """The table with one column per setting that was typed for any point."""
    columns, rows = _columns(points)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(keys := _keys(points))])
    writer.writerows(
        [*row, *(point.settings.get(key, "") for key in keys)] for row, point in zip(rows, points, strict=True)
    )
    return text.getvalue()


def as_json(points: Sequence[Point]) -> str:
    """The table as a list of objects, with what was typed under "settings"."""
    columns, rows = _columns(points)
    objects = [
        {**dict(zip(columns, row, strict=True)), "settings": point.settings}
        for row, point in zip(rows, points, strict=True)
    ]
    return json.dumps(objects, indent=1, ensure_ascii=False) + "\n"


def _columns(points: Sequence[Point]) -> tuple[list[str], list[list[Any]]]:
    columns = ["point", "status", "objective", "step", "num_steps", "seconds", "where", "error"]
    measured = ["best_loss", "best_step", "base_loss", "train_loss", "hash"]
    columns += [*(f"validation_{key}" for key in measured), "memory_gib"]
    return columns, [
        [
            *(p.name, p.status, _finite(p.objective), p.step, p.num_steps, round(p.seconds, 1), p.where, p.error),
            *((p.record.get("validation") or {}).get(key) for key in measured),
            round(p.record.get("memory_gib", 0.0), 2),
        ]
        for p in points
    ]


def as_table(points: Sequence[Point], sweep_dir: Path) -> str:
    """Lines for a terminal: best points first, then those that are not done, then the errors.

    Of many points only the best ten, the failed ones and the counts.
    """
    evaluated = {_evaluated(p) for p in points if p.objective is not None}
    comparable = len(evaluated) < 2
    ranked = sorted(points, key=lambda p: (p.status != "finished", _rank(p.objective) if comparable else 0.0, p.name))
    shown = ranked if len(points) <= MANY else ranked[:10]
    keys = [key for key in _keys(points) if len({point.settings.get(key) for point in points}) > 1]
    columns = keys if any(_CUT.search(p.name) for p in shown) else []  # where names do not say what tells points apart
    header = ["point", *columns, "status", "objective", "steps", "time", "where"]
    rows = [
        [
            p.name or " ".join(f"{key}={p.settings[key]}" for key in keys if key in p.settings) or "(not begun)",
            *(p.settings.get(key, "")[:40] for key in columns),
            p.status,
            "" if p.objective is None else f"{p.objective:.4f}",
            f"{p.step}/{p.num_steps}" if p.num_steps else "",
            duration(p.seconds) if p.seconds else "",
            p.where,
        ]
        for p in shown
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    if len(shown) < len(points):
        lines.append(f"... and {len(points) - len(shown)} more in {sweep_dir / 'sweep.csv'}")
    if not comparable:
        lines.append(
            f"these points were evaluated in {len(evaluated)} ways, on other songs, times or models, so their "
            f"objectives cannot be compared; {sweep_dir / 'sweep.csv'} says which belong together (validation_hash)"
        )
    failed = [p for p in points if p.status == "failed"]
    lines += [f"{_called(p)} failed: {p.error}" for p in failed[:MANY]]
    counts = Counter(p.status for p in points)
    return "\n".join(
        [*lines, ", ".join(f"{counts[status]} {status}" for status in reversed(STATUSES) if counts[status])]
    )


def _called(point: Point) -> str:
    return point.name or " ".join(f"{key}={value}" for key, value in point.settings.items())


def _keys(points: Sequence[Point]) -> list[str]:
    return sorted({key for point in points for key in point.settings})


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None  # JSON has no NaN


def _evaluated(point: Point) -> str:
    """On what a point was evaluated: the hash of it, or empty where its objective is a training loss."""
    return str((point.record.get("validation") or {}).get("hash", ""))


def _rank(objective: float | None) -> float:
    finite = _finite(objective)
    return math.inf if finite is None else finite


FORMATS: dict[str, Callable[[Sequence[Point], Path], str]] = {
    "table": as_table,
    "csv": lambda points, sweep_dir: as_csv(points),
    "json": lambda points, sweep_dir: as_json(points),
}
