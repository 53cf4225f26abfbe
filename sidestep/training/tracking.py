"""What a run writes about itself while it trains: metrics.jsonl, TensorBoard, run.json and the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sidestep import __version__
from sidestep.files import naming, refuse_pipe, write_text
from sidestep.records import parse_json, parse_record
from sidestep.times import duration

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "peft", "lycoris-lora", "accelerate", "transformers", "safetensors", "hydra-core")


@dataclass
class StepMetrics:
    """One optimiser step."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    seconds: float


class Tracker:
    """Writes metrics of each step to ``metrics.jsonl``, TensorBoard and the service that was chosen.

    Args:
        output_dir: the run's folder.
        log_dir: folder of TensorBoard files.
        first_step: steps already done; what was written about later ones is dropped, since they are done again.
        settings: every setting, flat, for TensorBoard's table that compares runs.
        metric: what that table shows for a run: the last value of this scalar.
        service: one of Accelerate's trackers, or None.
    """

    def __init__(
        self,
        output_dir: Path,
        log_dir: Path,
        first_step: int,
        *,
        settings: Mapping[str, bool | int | float | str],
        metric: str,
        service: Any,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.path, self.log_dir = output_dir / "metrics.jsonl", log_dir
        drop_later_lines(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(log_dir), purge_step=first_step + 1)
        self._service = service
        assert self._board.file_writer is not None
        # add_hparams would make a second run beside this one
        for summary in hparams(dict(settings), {metric: math.nan}):
            self._board.file_writer.add_summary(summary)

    def record(self, metrics: StepMetrics) -> None:
        """Write one step."""
        finite = {key: value if math.isfinite(value) else None for key, value in asdict(metrics).items()}
        with naming(self.path):
            self._file.write(json.dumps(finite) + "\n")  # JSON has no NaN
        values = {f"train/{name}": getattr(metrics, name) for name in ("loss", "lr", "grad_norm")}
        self.record_scalars(values | {"train/seconds_per_step": metrics.seconds}, metrics.step)

    def record_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers to TensorBoard and the service, not to ``metrics.jsonl``."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._service is not None:
            self._service.log(dict(values), step=step)

    def record_timesteps(self, timesteps: torch.Tensor, step: int) -> None:
        """Write the histogram of times drawn since the last call."""
        self._board.add_histogram("train/timesteps", timesteps, step)

    def record_audio(self, name: str, audio: torch.Tensor, rate: int, picture: torch.Tensor, step: int) -> None:
        """Write music (1, S) and its spectrogram (3, height, width) to TensorBoard."""
        self._board.add_audio(name, audio, step, sample_rate=rate)
        self._board.add_image(name, picture, step)

    def flush(self) -> None:
        """Make what was written visible to other programs."""
        with naming(self.path):
            self._file.flush()
        with naming(self.log_dir):
            self._board.flush()

    def sync(self) -> None:
        """Make ``metrics.jsonl``, as far as it was flushed, survive a power cut."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self.path):
            self._file.close()
        with naming(self.log_dir):
            self._board.close()
        if self._service is not None:
            self._service.finish()


@dataclass
class RunRecord:
    """``run.json``: what a run is and how far it came."""

    path: Path
    status: str = ""
    """running, finished, interrupted or failed; empty until training begins."""
    step: int = 0
    num_steps: int = 0
    smoothed_loss: float | None = None
    error: str = ""
    resumed_from: str = ""
    went_back_to: str = ""
    """The checkpoint that resume_from took this run to: ``checkpoints/epoch_N`` of its own, or a whole path."""
    went_back_hash: str = ""
    """Of what that checkpoint held; it is known by it after the folder was moved."""
    run_id: str = ""
    """What a tracking service knows this run by, drawn when it began."""
    final: dict[str, str] = field(default_factory=dict)
    """Hash of each file in final/."""
    stopped_early: bool = False
    """Whether validation.patience ended the run before num_steps."""
    memory_gib: float = 0.0
    """Most memory that was used when a step was logged."""
    train_seconds: float = 0.0
    """Time spent on steps, over all the times the run was started."""
    validation: dict[str, Any] = field(default_factory=dict)
    """hash, loss, base_loss, best_loss, best_train_loss, best_step, scales and more; empty without held-out songs."""
    started: str = ""
    finished: str = ""
    host: str = ""
    process: int = 0
    job: str = ""
    """Number of the Slurm job; with host and process it tells whether a run that says it is running still is."""
    choices: dict[str, str] = field(default_factory=dict)
    """The option chosen of each group."""
    config: dict[str, Any] = field(default_factory=dict)
    """Every setting, resolved."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that decide the weights."""
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file, replacing what was there."""
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text(self.path, json.dumps(values, indent=2, default=str, ensure_ascii=False) + "\n")


_NEEDED = ("status", "step", "smoothed_loss", "settings", "config", "final")


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``run.json`` as it was written before; empty if there is none, or none that can be read."""
    if not path.is_file():
        return {}
    try:
        record = parse_record(path.read_text(encoding="utf-8"))
        if missing := [key for key in _NEEDED if key not in record]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be understood (%s); going by the checkpoints alone", path, error)
        return {}
    return record


def versions() -> dict[str, str]:
    """Versions of everything that shapes the numbers of a run."""
    return {
        "sidestep": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


class Progress:
    """A live line on a terminal; plain log lines when output goes to a file or a pipe.

    Args:
        first_step: steps already done.
        num_steps: steps of the whole run.
    """

    def __init__(self, first_step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        self.live = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=not self.live,
            dynamic_ncols=True,
            desc="training",
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n}/{total}, {rate_inv_fmt}, {remaining} left{postfix}",
        )
        # log lines above the bar instead of into it
        self._redirect: AbstractContextManager[None] = logging_redirect_tqdm() if self.live else nullcontext()
        self._redirect.__enter__()
        self._started, self._first = time.monotonic(), first_step

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def show(self, metrics: StepMetrics, memory: str) -> None:
        """Show the newest known metrics."""
        if self.live:
            self._bar.set_postfix_str(f"loss {metrics.loss:.4f}, lr {metrics.lr:.2g}, {memory}")
            return
        done = metrics.step - self._first
        per_step = (time.monotonic() - self._started) / max(1, done)
        log.info(
            "step %d of %d, loss %.4f, lr %.3g, gradient norm %.3f, %.2f s per step, %s left, %s",
            metrics.step,
            self.num_steps,
            metrics.loss,
            metrics.lr,
            metrics.grad_norm,
            per_step,
            duration(per_step * (self.num_steps - metrics.step)),
            memory,
        )

    def close(self) -> None:
        self._redirect.__exit__(None, None, None)
        self._bar.close()


def peak_memory(device: torch.device) -> str:
    """Say how much memory a run uses."""
    return f"{used_gib(device):.1f} GiB{' at peak' if device.type == 'cuda' else ''}"


def used_gib(device: torch.device) -> float:
    """Peak memory of the GPU, or memory held by the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    rss: int = psutil.Process().memory_info().rss
    return rss / 2**30


def drop_later_lines(path: Path, step: int) -> None:
    """Drop the lines about later steps from a file of JSON lines, since a run that goes on does those steps again."""
    kept = [line for line in _lines(path) if _step_of(line) <= step]
    write_text(path.resolve(), "".join(kept))  # a link stays one


def _lines(path: Path) -> list[str]:
    if not os.path.lexists(path):  # a link to what is not there is no new file
        return []
    refuse_pipe(path)
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _step_of(line: str) -> float:
    """The step that a line is about; a line that a killed run or a power cut left unreadable is about none."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
