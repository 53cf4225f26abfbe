"""One HTML file about a run or a sweep, to look at and to listen to, from disk and without a network.

All numbers come from files of the runs: run.json, metrics.jsonl, validation.jsonl and previews/*/previews.json. They
travel in one block of JSON; the page's script shows them as text, so nothing that a file says becomes part of the page.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sidestep.files import write_text
from sidestep.records import parse_json
from sidestep.reporting.runs import Point, collect_points
from sidestep.times import now

NAME = "report.html"
_WEB = Path(__file__).parent / "web"
_CURVE = 250
"""Points of a curve; each is the mean of the steps it stands for."""


@dataclass(kw_only=True)
class PageRun:
    """One run as the page shows it."""

    name: str
    status: str
    folder: str
    """Relative to the page."""
    error: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    objective: float | None = None
    step: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    memory_gib: float = 0.0
    validation: dict[str, Any] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    """Of the training curve."""
    losses: list[float | None] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)


def write_page(folder: Path, inline_mb: float) -> Path:
    """Write ``report.html`` into the folder of a run or of a sweep.

    Args:
        folder: ``outputs/<name>`` or ``outputs/<name>/<run>``.
        inline_mb: music is put into the page itself if all of it is no larger; otherwise the page links to the files.

    Returns:
        The page.

    Raises:
        UserError: if the folder holds neither.
    """
    if (folder / "run.json").is_file():
        points = [point for point in collect_points(folder.parent) if point.name == folder.name]
        runs = [_read_run(point, folder, folder) for point in points]
    else:
        runs = [_read_run(point, folder / point.name, folder) for point in collect_points(folder)]
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


def _read_run(point: Point, folder: Path, page_dir: Path) -> PageRun:
    record = point.record
    settings = point.settings or {key: str(record.get("settings", {}).get(key, "")) for key in ("adapter", "optim.lr")}
    run = PageRun(
        name=point.name,
        status=point.status,
        folder=_relative(folder, page_dir) if point.name else "",
        error=point.error,
        settings=settings,
        objective=_finite(point.objective),
        step=point.step,
        num_steps=point.num_steps,
        seconds=_finite(record.get("train_seconds")) or 0.0,
        memory_gib=_finite(record.get("memory_gib")) or 0.0,
        validation=_plain(record.get("validation") or {}),
    )
    if not point.name:
        return run
    rows = [
        (row["step"], row["loss"])
        for row in _rows(folder / "metrics.jsonl")
        if _finite(row.get("step")) and "loss" in row
    ]
    size = max(1, math.ceil(len(rows) / _CURVE))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        known = [loss for _, loss in part if _finite(loss) is not None]
        run.steps.append(part[-1][0])
        run.losses.append(round(sum(known) / len(known), 5) if known else None)
    run.evaluations = [
        _plain(row) for row in _rows(folder / "validation.jsonl") if _finite(row.get("loss")) is not None
    ]
    run.previews = _read_previews(folder / "previews", page_dir)
    return run


def _read_previews(folder: Path, page_dir: Path) -> list[dict[str, Any]]:
    """Every preview of a run, those of the base model first and then by step."""
    previews: list[dict[str, Any]] = []
    for path in folder.glob("*/previews.json"):
        listed = _json(path.read_text(encoding="utf-8", errors="replace"))
        for file in listed.get("files", []):
            audio = path.parent / Path(str(file.get("file", ""))).name  # never a file of another folder
            if not audio.is_file():
                continue
            picture = audio.with_suffix(".png")
            previews.append(
                {
                    "audio": _relative(audio, page_dir),
                    "picture": _relative(picture, page_dir) if picture.is_file() else "",
                    "prompt": str(file.get("prompt", "")),
                    "seed": int(file.get("seed", 0)),
                    "scale": float(file.get("scale", 0)),
                    "step": int(listed.get("step", 0)),
                    "epoch": float(listed.get("epoch", 0)),
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


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [row for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if (row := _json(line))]


def _json(text: str) -> dict[str, Any]:
    """Parse an object; what a killed run left unreadable, or is something else, counts as empty."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """The same values without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
