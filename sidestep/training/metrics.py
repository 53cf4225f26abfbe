"""Losses and gradient norms, kept on the device until they are logged so that no step waits for the GPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sidestep.data.sampler import PATCH_FRAMES
from sidestep.training.trackers import flat
from sidestep.training.tracking import Progress, StepMetrics, Tracker, peak_memory, used_gib

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sidestep.data.dataset import Batch
    from sidestep.training.run import Run

log = logging.getLogger(__name__)

SMOOTHING = 0.98


class StepLog:
    """Collects what each step gives and writes it when asked.

    Args:
        run: whose folder is written to.
        accelerator: knows the processes and the device.
        first_step: steps already done.
        smoothed_loss: the running mean of the loss that a continued run starts from; None at the beginning.
    """

    def __init__(self, run: Run, accelerator: Accelerator, first_step: int, smoothed_loss: float | None) -> None:
        self.run, self.accelerator = run, accelerator
        self.is_main = accelerator.is_main_process
        self.num_bad = 0
        """Steps in a row, up to the last flushed one, that were not finite and changed nothing."""
        self._smoothed = smoothed_loss
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []
        self._times: list[Tensor] = []
        self._num_tokens = 0  # patches of latents, with padding
        if self.is_main:
            settings = flat(run.record.settings)
            self._tracker = Tracker(
                run.output_dir,
                run.log_dir,
                first_step,
                settings=settings,
                metric="validation/best_loss" if run.held_out else "train/smoothed_loss",
                service=run.config.tracking.open(run.output_dir, run.record.run_id, settings),
            )
            self._progress = Progress(first_step, run.num_steps)
        self._last_flush = time.monotonic()

    @property
    def smoothed_loss(self) -> float:
        """Running mean of the loss of all flushed steps."""
        return math.nan if self._smoothed is None else self._smoothed

    def saw(self, batch: Batch, t: Tensor) -> None:
        """Remember a micro-batch: its times for the histogram, its size for the speed."""
        self._times.append(t)
        self._num_tokens += batch.latents.shape[0] * batch.latents.shape[1] // PATCH_FRAMES

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Remember one optimiser step; ``loss`` (the mean over processes) and ``grad_norm`` are on the device."""
        self._pending.append((step, loss, grad_norm, lr))
        if self.is_main:
            self._progress.advance()

    def start_clock(self) -> None:
        """Leave out of the time of steps what was done since the last flush."""
        self._last_flush = time.monotonic()

    def record_audio(self, name: str, audio: Tensor, rate: int, picture: Tensor, step: int) -> None:
        """Show music (1, S) and its spectrogram (3, height, width) in TensorBoard."""
        if self.is_main:
            self._tracker.record_audio(name, audio, rate, picture, step)

    def record_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers about a step in TensorBoard."""
        if self.is_main:
            self._tracker.record_scalars(values, step)

    def sync(self) -> None:
        """Make what was written survive a power cut, before a checkpoint that will not write it again does."""
        if self.is_main:
            self._tracker.sync()

    def flush(self) -> None:
        """Fetch what is pending from the device and write it; afterwards ``num_bad`` is up to date."""
        if not self._pending:
            return
        steps, losses, grad_norms, lrs = zip(*self._pending, strict=True)
        numbers = torch.stack([torch.stack(losses), torch.stack(grad_norms).float()])  # (2, steps)
        seconds = (time.monotonic() - self._last_flush) / len(steps)
        for step, loss, grad_norm, lr in zip(steps, *numbers.tolist(), lrs, strict=True):
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._smoothed = smooth(self._smoothed, loss, step)
                self.num_bad = 0
            else:
                self.num_bad += 1
                log.warning("step %d: loss %s, gradient norm %s; it changed nothing", step, loss, grad_norm)
            metrics = StepMetrics(step, round(self.run.epoch_at(step), 4), loss, grad_norm, lr, seconds)
            if self.is_main:
                self._tracker.record(metrics)
        if self.is_main:
            device, elapsed = self.accelerator.device, seconds * len(steps)
            record = self.run.record
            record.memory_gib = max(record.memory_gib, used_gib(device))
            record.train_seconds += elapsed
            speed = self._num_tokens * self.accelerator.num_processes / max(elapsed, 1e-9)
            self._tracker.record_scalars(
                {
                    "train/smoothed_loss": self.smoothed_loss,
                    "train/tokens_per_second": speed,
                    "train/memory_gib": used_gib(device),
                },
                metrics.step,
            )
            self._tracker.record_timesteps(torch.cat(self._times), metrics.step)
            self._tracker.flush()
            self._progress.show(metrics, peak_memory(self.accelerator.device))
        self._pending, self._times, self._num_tokens = [], [], 0
        self._last_flush = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Write what is left, unless the loop failed, and close the files."""
        try:
            if kind is None:
                self.flush()
        finally:
            if self.is_main:
                self._progress.close()
                with nullcontext() if kind is None else suppress(OSError):  # the loop's own error says more
                    self._tracker.close()


def smooth(previous: float | None, loss: float, step: int) -> float:
    """Running mean of the loss in which each step weighs 0.98 of the next, the first steps no more than their share.

    Args:
        previous: the mean after the step before; None at step 1.
        loss: of this step.
        step: counted from 1.
    """
    if previous is None:
        return loss
    return previous + (1 - SMOOTHING) / (1 - SMOOTHING**step) * (loss - previous)
