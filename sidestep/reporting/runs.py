"""Where the points of a sweep stand, read from their folders; nothing here changes them or imports torch.

outputs/<name>/plan.json            every point that the last command is to do
outputs/<name>/sweep.csv, .json     the table of all points, written while the sweep runs
outputs/<name>/<run>/point.json     what the last attempt at a point came to
outputs/<name>/<run>/run.json       how far its training is (see sidestep.training.tracking)
"""

from __future__ import annotations

import calendar
import csv
import hashlib
import io
import json
import logging
import math
import re
import shutil
import socket
import subprocess
import time
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from sidestep.errors import UserError, printable
from sidestep.files import describe, read_text, write_text
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
    planned: str = ""
    """Name of the folder it will have, if it was not begun and that is known."""
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
    planned_in = {planned.folder: planned for planned in plan.points if planned.folder} if plan is not None else {}
    points: list[Point] = []
    begun: set[str | tuple[str, ...]] = set()
    for folder in folders:
        attempt, planned = read_point(folder), planned_in.get(folder.name)
        begun.add(folder.name)
        if attempt is not None:
            begun.add(same_point(attempt.overrides))
        points.append(_point(folder, attempt, planned, queued))
    for planned in plan.points if plan is not None else []:
        if (planned.folder or same_point(planned.overrides)) not in begun:
            point = Point(name="", status="waiting", where=planned.job, settings=_settings(planned.overrides))
            point.planned = planned.folder
            if planned.job:
                point.status = "submitted"
                if queued is not None and planned.job not in queued:
                    point.status = "interrupted"
                    point.error = f"job {planned.job} ended before it began; see {sweep_dir / '.slurm' / planned.job}"
            points.append(point)
    return points


def _point(
    folder: Path, attempt: PointRecord | None, planned: PlannedPoint | None, queued: dict[str, str] | None
) -> Point:
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
    job = planned.job if planned is not None else ""
    in_queue = bool(job) and queued is not None and job in queued
    if attempt is None:  # a run that was typed by itself
        chosen = record.get("settings", {})
        point.settings = {key: str(chosen[key]) for key in ("adapter", "optim.lr") if key in chosen}
        if planned is not None:  # and then in a sweep
            point.settings = _settings(planned.overrides)
        if point.status != "running" and in_queue:
            point.status, point.where = "submitted", job
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
    if point.status != "running" and in_queue and job != attempt.job:
        point.status, point.where = "submitted", job
    return point


def finished_at(folder: Path) -> str:
    """When the run in a folder was finished; empty if it was not."""
    record = _read_json(folder / RUN, parse_record)
    return str(record.get("finished", "")) if record.get("status") == "finished" else ""


def objective_of(record: dict[str, Any]) -> float | None:
    """What a finished run returns: its best validation loss, or its smoothed loss where no song is held out."""
    validation = record.get("validation") or {}
    objective: float | None = validation.get("best_loss") if validation else record.get("smoothed_loss")
    return objective


def read_plan(sweep_dir: Path) -> Plan | None:
    """Read ``plan.json``; None if there is none that can be read."""
    values = _read_json(sweep_dir / PLAN)
    try:
        plan = Plan(launched=values["launched"], points=[PlannedPoint(**point) for point in values["points"]])
        _check_kinds(plan)
        for point in plan.points:
            _check_kinds(point)
    except (KeyError, TypeError) as error:
        _pass_over(sweep_dir / PLAN, error, values)
        return None
    return plan


def read_point(folder: Path) -> PointRecord | None:
    """Read ``point.json``; None if there is none that can be read."""
    values = _read_json(folder / POINT)
    try:
        point = PointRecord(**values)
        _check_kinds(point)
    except TypeError as error:
        _pass_over(folder / POINT, error, values)
        return None
    return point


_KINDS = {record: typing.get_type_hints(record) for record in (Plan, PlannedPoint, PointRecord)}


def _check_kinds(record: Plan | PlannedPoint | PointRecord) -> None:
    """Refuse values of another type than a sweep writes.

    Raises:
        TypeError: naming the first of them.
    """
    for key, kind in _KINDS[type(record)].items():
        if not _is(value := getattr(record, key), kind):
            raise TypeError(f"{key} is {value!r:.60}")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, typing.get_args(kind)[0]) for item in value)
    return isinstance(value, int | float if kind is float else kind)


def _pass_over(path: Path, error: Exception, values: object) -> None:
    if values:  # what could not be read at all was said before, and what is not there needs no word
        log.warning("passing over %s, which cannot be understood: %s", path, error)


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
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # the last two: no number of a process
        return False
    try:
        started = calendar.timegm(time.strptime(attempt.started, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:  # a file that was damaged
        return None
    return began <= started + 1  # another process may have been given the number since


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    pairs = [override.lstrip("+").partition("=")[::2] for override in overrides]
    return {key: value for key, value in pairs if key not in _NOT_SHOWN and re.split("[./@]", key)[0] not in _WHERE}


def same_point(overrides: Sequence[str]) -> tuple[str, ...]:
    """What makes a point the same in two commands: what was typed for it, but not in which order or where it runs."""
    return tuple(sorted(o for o in overrides if re.split("[./=@]", o.lstrip("+~"))[0] not in (*_WHERE, "swept")))


def _read_json(path: Path, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
    try:
        values = plain(parse(read_text(path)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("passing over %s, which cannot be read: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


def plain(value: Any) -> Any:
    """The same values without NaN and infinity, which JSON does not have, and half characters, which no file takes."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


# the table


def write_tables(sweep_dir: Path, points: Sequence[Point]) -> None:
    """Write ``sweep.csv`` and ``sweep.json``."""
    write_text(sweep_dir / "sweep.csv", as_csv(points))
    write_text(sweep_dir / "sweep.json", as_json(points))


_EVALUATED = ("best_loss", "best_step", "base_loss", "best_train_loss", "hash")


def rows_of(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The table that CSV, JSON and the page show, in values that JSON has; every row has the same keys.

    ``objective`` is the number that a sweep minimises: the best loss on held-out songs, or without them the smoothed
    training loss. ``rank`` counts the finished points by it from 1, and is left out where their objectives are not
    comparable. ``seconds`` are those of all attempts of a sweep at a point, ``train_seconds`` those of its steps.
    """
    ranks = {id(point): place for place, point in enumerate(ranked(points), start=1)}
    return [
        {
            "point": point.name,
            "status": point.status,
            "rank": ranks.get(id(point)),
            "objective": _finite(point.objective),
            "step": point.step,
            "num_steps": point.num_steps,
            "seconds": round(_finite(point.seconds) or 0.0, 1),
            "train_seconds": round(_finite(point.record.get("train_seconds")) or 0.0, 1),
            "memory_gib": round(_finite(point.record.get("memory_gib")) or 0.0, 2),
            **{f"validation_{key}": (point.record.get("validation") or {}).get(key) for key in _EVALUATED},
            "trained_on": _trained_on(point),
            "where": point.where,
            "error": point.error,
            "settings": point.settings,
        }
        for point in points
    ]


def ranked(points: Sequence[Point]) -> list[Point]:
    """The finished points whose objectives compare, best first; none where they were measured in several ways.

    Losses on other songs, times or models say nothing about each other, and training losses nothing about either.
    """
    measured = [point for point in points if point.status == "finished" and _finite(point.objective) is not None]
    if len(ways_of_measuring(measured)) > 1:
        return []
    return sorted(measured, key=lambda point: (point.objective, point.name))


def ways_of_measuring(points: Sequence[Point]) -> set[str]:
    """What the losses of points, finished or not, were measured on, each in a word."""
    return {_measured_on(point) for point in points if _is_measured(point)}


def _is_measured(point: Point) -> bool:
    losses = point.objective, (point.record.get("validation") or {}).get("best_loss")
    return any(_finite(loss) is not None for loss in losses)


def _measured_on(point: Point) -> str:
    return str((point.record.get("validation") or {}).get("hash", "")) or _trained_on(point)


_TRAINED_ON = (
    "model_variant", "checkpoint", "checkpoint_constants", "dataset", "data", "timesteps", "objective",
    "condition_dropout", "max_seconds",
)  # fmt: skip
"""Settings, some of them groups, that make a training loss larger or smaller whatever the adapter learns."""


def _trained_on(point: Point) -> str:
    """Names what a training loss was measured on: the model, the songs, and what is drawn from them."""
    settings = point.record.get("settings") or {}
    decides = {key: value for key, value in settings.items() if key.partition(".")[0] in _TRAINED_ON}
    if not decides:
        return "training loss"
    return f"training loss {hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]}"


def as_csv(points: Sequence[Point]) -> str:
    """The table with one column per setting that was typed for any point.

    A setting that is called like another column, as ``objective`` is, becomes ``settings.objective``.
    """
    rows, keys = rows_of(points), _keys(points)
    columns = [key for key in (rows[0] if rows else {}) if key != "settings"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(_as_cell(f"settings.{key}" if key in columns else key) for key in keys)])
    for row in rows:
        cells = [*(row[key] for key in columns), *(row["settings"].get(key, "") for key in keys)]
        writer.writerow([_as_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def _as_cell(text: str) -> str:
    """Keep a spreadsheet from taking words for a formula, and a terminal from taking them for orders."""
    try:
        float(text)
    except ValueError:
        words = "\n".join(map(printable, text.split("\n")))  # a cell may hold several lines
        return f"'{words}" if words.startswith(("=", "+", "-", "@")) else words
    return text


def as_json(points: Sequence[Point]) -> str:
    """The table as a list of objects, with what was typed under "settings"."""
    return json.dumps(rows_of(points), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_table(points: Sequence[Point], sweep_dir: Path) -> str:
    """Lines for a terminal: best points first, then those that are not done, then the errors.

    Of many points only the best ten, the failed ones and the counts.
    """
    best = ranked(points)
    places = {id(point): place for place, point in enumerate(best)}
    ordered = sorted(points, key=lambda p: (p.status != "finished", places.get(id(p), len(points)), p.name))
    shown = ordered if len(points) <= MANY else ordered[:10]
    ways = ways_of_measuring(points)
    keys = [key for key in _keys(points) if len({point.settings.get(key) for point in points}) > 1]
    columns = keys if any(_CUT.search(p.name) for p in shown) else []  # where names do not say what tells points apart
    header = ["point", *columns, "status", "objective", "steps", "time", "where"]
    rows = [
        [
            p.name or " ".join(f"{key}={p.settings[key]}" for key in keys if key in p.settings) or _called(p),
            *(printable(p.settings.get(key, ""))[:40] for key in columns),
            p.status,
            "" if p.objective is None else f"{p.objective:.4f}",
            f"{p.step}/{p.num_steps}" if p.num_steps else "",
            duration(p.seconds) if p.seconds else "",
            p.where,
        ]
        for p in shown
    ]
    if len(ways) > 1:
        header.append("evaluated")
        for row, p in zip(rows, shown, strict=True):
            row.append(_measured_on(p) if _is_measured(p) else "")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    if len(shown) < len(points):
        lines.append(f"... and {len(points) - len(shown)} more in {sweep_dir / 'sweep.csv'}")
    if len(ways) > 1:
        lines.append(
            f"these points were evaluated in {len(ways)} ways, on other songs, times or models, so their losses "
            f"cannot be compared{'' if best else ' and none is called the best'}; those of one value of evaluated "
            f"belong together"
        )
    failed = [p for p in points if p.status == "failed" or (p.error and not p.name)]
    lines += [f"{_called(p)} {p.status}: {p.error}" for p in failed[:MANY]]
    counts = Counter(p.status for p in points)
    lines.append(", ".join(f"{counts[status]} {status}" for status in reversed(STATUSES) if counts[status]))
    return "\n".join(map(printable, lines))  # files may hold what would move the cursor


def _called(point: Point) -> str:
    typed = " ".join(f"{key}={value}" for key, value in point.settings.items())
    return point.name or point.planned or typed or "(not begun)"


def _keys(points: Sequence[Point]) -> list[str]:
    return sorted({key for point in points for key in point.settings})


def _finite(number: Any) -> float | None:
    return number if isinstance(number, int | float) and math.isfinite(number) else None


FORMATS: dict[str, Callable[[Sequence[Point], Path], str]] = {
    "table": as_table,
    "csv": lambda points, sweep_dir: as_csv(points),
    "json": lambda points, sweep_dir: as_json(points),
}
