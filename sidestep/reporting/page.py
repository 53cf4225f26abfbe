"""One HTML file about a run or a sweep, to look at and to listen to, from disk and without a network.

All numbers come from files of the runs: run.json, point.json, metrics.jsonl, validation.jsonl and
previews/*/previews.json. They travel in one block of JSON; the page's script shows them as text, so nothing that a file
says becomes part of the page. What cannot be read is passed over, so that one damaged file does not cost the page.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sidestep.files import read_text, write_text
from sidestep.records import parse_json
from sidestep.reporting.runs import POINT, RUN, collect_points, plain, rows_of
from sidestep.times import now

log = logging.getLogger(__name__)

NAME = "report.html"
INLINE_MB = 32.0
"""Music of the page that a sweep writes at its end; as conf/report.yaml."""
_WEB = Path(__file__).parent / "web"
_CURVE = 250
"""Most points of a curve; each is the mean of the steps it stands for."""
_CURVES = 50_000
"""Points of all training curves together; of very many runs each has fewer."""


@dataclass(kw_only=True)
class Evaluations:
    """What a run's ``validation.jsonl`` says, one number per evaluation."""

    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    train_losses: list[float | None] = field(default_factory=list)
    base_losses: list[float | None] = field(default_factory=list)
    drifts: list[float | None] = field(default_factory=list)


@dataclass(kw_only=True)
class PageRun:
    """One run as the page shows it."""

    row: dict[str, Any]
    """Its row of the table."""
    folder: str
    """Relative to the page; empty if the run was not begun."""
    steps: list[float] = field(default_factory=list)
    """Of the training curve; each the last of those that a point stands for."""
    steps_per_point: int = 1
    losses: list[float | None] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=Evaluations)
    by_time: dict[str, Any] = field(default_factory=dict)
    """times, losses and base_losses of the best evaluation."""
    previews: list[dict[str, Any]] = field(default_factory=list)


def write_page(folder: Path, inline_mb: float = INLINE_MB) -> Path:
    """Write ``report.html`` into the folder of a run or of a sweep.

    Args:
        folder: ``outputs/<name>`` or ``outputs/<name>/<run>``.
        inline_mb: MiB; music and its pictures are put into the page itself if all of them are no larger; otherwise the
            page links to the files and says so.

    Returns:
        The page.

    Raises:
        UserError: if the folder holds neither.
    """
    if (folder / RUN).is_file() or (folder / POINT).is_file():
        place = folder.resolve()
        points = [point for point in collect_points(place.parent) if point.name == place.name]
        folders = {place.name: folder}
    else:
        points = collect_points(folder)
        folders = {point.name: folder / point.name for point in points if point.name}
    curve = max(20, min(_CURVE, _CURVES // max(1, len(points))))
    runs = [_read_run(row, folders.get(row["point"]), folder, curve) for row in rows_of(points)]
    _embed(runs, folder, inline_mb)
    title = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    values = {"title": title, "made": now(), "runs": [asdict(run) for run in runs]}
    page = (_WEB / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (_WEB / "uplot.css").read_text(encoding="utf-8") + (_WEB / "page.css").read_text(encoding="utf-8"),
        "LIBRARY": (_WEB / "uplot.js").read_text(encoding="utf-8"),
        "SCRIPT": (_WEB / "page.js").read_text(encoding="utf-8"),
        "DATA": _as_script(values),
    }
    for part, text in parts.items():  # the data last, so that nothing in it is taken for a part
        page = page.replace(f"<!--{part}-->", text, 1)
    write_text(folder / NAME, page)
    return folder / NAME


def _as_script(values: Any) -> str:
    """Write JSON that cannot end the script element it stands in, whatever text it holds."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _read_run(row: dict[str, Any], folder: Path | None, page_dir: Path, curve: int) -> PageRun:
    """Gather what the page shows of a run.

    Args:
        row: of the table.
        folder: the run's; None if it was not begun.
        page_dir: where the page will lie.
        curve: most points of a curve.
    """
    if folder is None:
        return PageRun(row=row, folder="")
    run = PageRun(row=row, folder=_relative(folder, page_dir))
    steps = [line for line in _lines(folder / "metrics.jsonl") if _finite(line.get("step")) is not None]
    run.steps_per_point = size = max(1, math.ceil(len(steps) / curve))
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        known = [loss for line in part if (loss := _finite(line.get("loss"))) is not None]
        run.steps.append(part[-1]["step"])
        run.losses.append(round(sum(known) / len(known), 5) if known else None)
    evaluations = [
        line
        for line in _lines(folder / "validation.jsonl")
        if _finite(line.get("step")) is not None and _finite(line.get("loss")) is not None
    ]
    evaluated = row["validation_hash"] or (evaluations[-1].get("hash") if evaluations else None)
    evaluations = [line for line in evaluations if line.get("hash") == evaluated]  # others do not compare
    for line in _thinned(evaluations, curve):
        run.evaluations.steps.append(line["step"])
        run.evaluations.losses.append(line["loss"])
        run.evaluations.train_losses.append(_finite(line.get("train_loss")))
        run.evaluations.base_losses.append(_finite(line.get("base_loss")))
        run.evaluations.drifts.append(_finite(line.get("drift")))
    best = next((line for line in evaluations if line["step"] == row["validation_best_step"]), {})
    run.by_time = {key: best.get(key) for key in ("times", "losses", "base_losses")}
    lengths = {len(numbers) if _are_finite(numbers) else -1 for numbers in run.by_time.values()}
    if len(lengths) > 1 or -1 in lengths:
        run.by_time = {}
    run.previews = _read_previews(folder / "previews", page_dir)
    return run


def _thinned(evaluations: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Leave out evaluations where there are more than a curve shows, but not the lowest one nor the last."""
    if len(evaluations) <= most:
        return evaluations
    lowest = min(range(len(evaluations)), key=lambda number: evaluations[number]["loss"])
    kept = {*range(0, len(evaluations), math.ceil(len(evaluations) / most)), lowest, len(evaluations) - 1}
    return [evaluations[number] for number in sorted(kept)]


def _read_previews(folder: Path, page_dir: Path) -> list[dict[str, Any]]:
    """Every preview of a run, those of the base model first and then by step."""
    previews: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/previews.json")):
        listed = plain(next(iter(_lines(path, whole=True)), {}))
        files = listed.get("files")
        for file in files if isinstance(files, list) else []:
            name = file.get("file") if isinstance(file, dict) else None
            audio = path.parent / Path(name).name if isinstance(name, str) else path  # never a file of another folder
            if audio == path or not audio.is_file():
                continue
            picture = audio.with_suffix(".png")
            previews.append(
                {
                    "audio": _relative(audio, page_dir),
                    "picture": _relative(picture, page_dir) if picture.is_file() else "",
                    "prompt": str(file.get("prompt", "")),
                    "seed": _finite(file.get("seed")) or 0,
                    "scale": _finite(file.get("scale")) or 0,
                    "step": _finite(listed.get("step")) or 0,
                    "epoch": _finite(listed.get("epoch")) or 0,
                    "hash": str(listed.get("hash", "")),
                }
            )
    return sorted(previews, key=lambda preview: (preview["step"], preview["prompt"], preview["seed"], preview["scale"]))


def _embed(runs: Sequence[PageRun], folder: Path, inline_mb: float) -> None:
    """Put music and pictures into the page if they are small, so that the page can be sent to somebody."""
    previews = [preview for run in runs for preview in run.previews]
    files = {preview[key] for preview in previews for key in ("audio", "picture") if preview[key]}
    if sum((folder / file).stat().st_size for file in files) > inline_mb * 2**20:
        return
    kinds = {".flac": "audio/flac", ".wav": "audio/wav", ".png": "image/png"}
    for preview in previews:
        preview["file"] = preview["audio"]
        for key in ("audio", "picture"):
            path = folder / preview[key]
            if preview[key] and path.suffix in kinds:
                data = base64.b64encode(path.read_bytes()).decode()
                preview[key] = f"data:{kinds[path.suffix]};base64,{data}"


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _lines(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, or the one that a whole file is; without those that are damaged."""
    try:
        text = read_text(path, errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("passing over %s, which cannot be read: %s", path, error)
        return []
    lines = [text] if whole else [line for line in text.split("\n") if line]
    values = _parse_all(f"[{','.join(lines)}]")  # at once, in half the time
    if values is None or len(values) != len(lines):  # a killed run leaves half a line
        values = [value for line in lines for value in _parse_all(f"[{line}]") or []]
    return [value for value in values if isinstance(value, dict)]


def _parse_all(text: str) -> list[Any] | None:
    try:
        values: list[Any] = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return values


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _are_finite(values: Any) -> bool:
    return isinstance(values, list) and all(_finite(value) is not None for value in values)
