"""How well an adapter predicts songs that it never trained on, as a number that can be compared.

Every held-out song is evaluated on one excerpt, at fixed times and with fixed noise, all decided by the song itself and
not by the run's seed. So two runs on the same dataset give numbers that differ only by what was learnt, and the
difference to the base model is taken song by song, where the noise of the measurement cancels.

    validation.jsonl                 one line per evaluation, and all that a run that goes on needs to know of them
    validation_base.safetensors      what the base model gives, so that it is measured once
    best/                            the adapter of the best evaluation, written by the run

Shapes: N songs, K times, T latent frames, C latent channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.conditioning import context_latents
from sidestep.adapters.files import attach_saved, saved_step
from sidestep.data.dataset import Example
from sidestep.data.holdout import content_id, lowest_places
from sidestep.errors import UserError
from sidestep.files import write_tensors, write_text
from sidestep.records import parse_json
from sidestep.seeds import derive_seed
from sidestep.training.flow import Noising, VelocityLoss
from sidestep.training.forward import predict_velocity
from sidestep.training.tracking import drop_later_lines

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sidestep.training.ema import WeightMean
    from sidestep.training.run import Run

log = logging.getLogger(__name__)

FILE, BASE = "validation.jsonl", "validation_base.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """One line of ``validation.jsonl``."""

    step: int
    epoch: float
    hash: str
    """Of all that was evaluated, and in which precision. Losses with different hashes cannot be compared."""
    num_songs: int
    loss: float
    """Mean squared error of the velocity, over songs and times; nan where it was not finite."""
    base_loss: float
    """The same of the base model."""
    difference: float
    """loss - base_loss; below 0 the adapter predicts these songs better than the base model."""
    difference_error: float
    """Standard error of the difference, over songs; 0 for a single song."""
    times: list[float]
    losses: list[float]
    """Loss at each of the times."""
    base_losses: list[float]
    train_loss: float
    """Loss on as many songs of the training set, evaluated in the same way."""
    train_base_loss: float
    drift: float
    """How far the output has moved from the base model's without any words: 0 is not at all, 1 as much as its size."""
    ema_loss: float | None
    """Loss of the running mean of the adapter's weights, if ema_decay is set."""

    def scalars(self) -> dict[str, float]:
        """What TensorBoard shows."""
        values = {f"validation/{key}": getattr(self, key) for key in ("loss", "difference", "train_loss", "drift")}
        if self.ema_loss is not None:
            values["validation/ema_loss"] = self.ema_loss
        return values | {
            f"validation_by_time/{time:.3f}": loss for time, loss in zip(self.times, self.losses, strict=True)
        }


class Validation:
    """Evaluates a transformer on the held-out songs of a run.

    Making one measures the base model, unless this run did before, so the transformer must not carry an adapter yet.

    Args:
        run: whose songs are evaluated and whose folder is written to.
        accelerator: of the loop.
        transformer: the bare base model.
        attention: of the same transformer.
    """

    def __init__(
        self, run: Run, accelerator: Accelerator, transformer: nn.Module, attention: WindowedAttention
    ) -> None:
        self.run, self.accelerator, self.attention = run, accelerator, attention
        self.device = torch.device(accelerator.device.type) if run.device.type == "cpu" else accelerator.device
        settings = run.config.validation
        self.times = [(k + 0.5) / settings.num_times for k in range(settings.num_times)]
        self.held_out = run.evaluated
        self.trained = lowest_places(run.all_songs.songs, run.trained, len(self.held_out))
        self.hash = run.validation_hash()
        self.best_loss, self.best_step = math.inf, 0
        self.best_train_loss: float | None = None
        """Of the adapter in best/."""
        self.lowest_loss, self.num_worse = math.inf, 0
        """Of all evaluations, and how many there were after it; its adapter may be gone."""
        self.last_step = 0
        """That was evaluated."""
        self.last: Evaluation | None = None
        base = self._measure_base(transformer)
        self._base, self._train_base, self._base_neutral = base["losses"], base["train_losses"], base["neutral"]

    # how far a run came

    def summary(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        assert self.last is not None
        last = {key: getattr(self.last, key) for key in ("num_songs", "loss", "base_loss", "difference", "train_loss")}
        best = {"best_loss": self.best_loss if self.best_step else None, "best_train_loss": self.best_train_loss}
        return {"hash": self.hash, **best, "best_step": self.best_step, **last}

    def restore(self, first_step: int) -> None:
        """Go on from a checkpoint of step ``first_step``: read what was found up to it, and see to best/."""
        if self.accelerator.is_main_process:
            drop_later_lines(self.run.output_dir / FILE, first_step)
            before = [row for row in _read_rows(self.run.output_dir) if row.hash == self.hash]
            by_loss = sorted((row for row in before if math.isfinite(row.loss)), key=lambda row: row.loss)
            self.best_step = self.run.restore_best([row.step for row in by_loss])
            for row in by_loss:
                if row.step == self.best_step:
                    self.best_loss, self.best_train_loss = row.loss, row.train_loss
            if by_loss and self.best_step != (gone := by_loss[0]).step:
                log.warning("the adapter of step %d, with the lowest loss so far, %.4f, is gone", gone.step, gone.loss)
            self.lowest_loss = by_loss[0].loss if by_loss else math.inf
            self.num_worse = sum(not by_loss or row.step > by_loss[0].step for row in before)
            if before:
                self.last = before[-1]
                self.last_step = self.last.step
                self.run.record.validation = self.summary()
        if self.accelerator.num_processes > 1:
            known = [self.best_loss, self.lowest_loss, self.best_step, self.num_worse, self.last_step]
            from accelerate.utils import broadcast

            told = broadcast(torch.tensor(known, dtype=torch.float64, device=self.device)).tolist()
            self.best_loss, self.lowest_loss = told[:2]
            self.best_step, self.num_worse, self.last_step = map(int, told[2:])

    def catch_up(self, transformer: nn.Module, first_step: int) -> None:
        """Evaluate the adapters before a step that are still there and were only evaluated with other settings.

        So that the best is chosen among all that is left, and not only among what is evaluated from now on.

        Args:
            transformer: the bare base model.
            first_step: that the run goes on from.
        """
        rows = _read_rows(self.run.output_dir)
        wanted = {row.step for row in rows} - {row.step for row in rows if row.hash == self.hash}
        saved = sorted(self.run.saved_adapters().items())
        to_do = [(step, path) for step, path in saved if step in wanted and step < first_step]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (to_do,) = broadcast_object_list([to_do])  # files change as soon as one process goes on
        for step, path in to_do:
            try:
                applied = attach_saved(transformer, path, keep=False)
            except UserError as error:
                log.warning("%s is not evaluated: %s", path, error)
                continue
            log.info("evaluating %s again, as the settings of validation are others now", path)
            evaluation = self._evaluation(transformer, step)
            applied.detach()
            if self.accelerator.is_main_process:
                _write(self.run.output_dir, evaluation)

    def is_missing(self, step: int) -> bool:
        """Whether an evaluation of the step that the run goes on from is due and was not made."""
        return self.last_step != step and self.run.is_due(step, self.run.config.validation.every_epochs)

    @property
    def gave_up(self) -> bool:
        """Whether the loss has not improved for as long as ``validation.patience`` allows."""
        patience = self.run.config.validation.patience
        return patience is not None and self.num_worse >= patience

    # measuring

    def _measure_base(self, transformer: nn.Module) -> dict[str, Tensor]:
        """Give the losses of the base model, (N, K) each, and its output without words; read where they are known."""
        path, device = self.run.output_dir / BASE, self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        trained = [self.run.all_songs.songs[number].latents for number in self.trained]
        decides = [self.hash, trained, name, self.run.memory.batch_size, self.run.record.versions]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        known = _read_base(path, key)
        knowing = self.accelerator.reduce(torch.tensor(int(known is not None), device=self.device), "sum")
        if known is not None and knowing == self.accelerator.num_processes:
            return known
        log.info("evaluating the base model on %d held-out songs", len(self.held_out))
        measured = {
            "losses": self._losses(transformer, self.held_out),
            "train_losses": self._losses(transformer, self.trained),
            "neutral": self._neutral_output(transformer),
        }
        if self.accelerator.is_main_process:
            write_tensors(path, {name: tensor.contiguous() for name, tensor in measured.items()}, {"key": key})
        return measured

    def evaluate(
        self,
        transformer: nn.Module,
        step: int,
        mean: WeightMean | None = None,
        between_songs: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Measure the transformer with its adapter at the end of a step, and remember whether it is the best so far.

        Args:
            transformer: with its adapter.
            step: the one just done.
            mean: of the adapter's weights, measured too.
            between_songs: called before every song, equally often in every process; may raise to leave.
        """
        self.last = self._evaluation(transformer, step, mean, between_songs)
        self.last_step = step
        if self.last.loss < self.best_loss:
            self.best_loss, self.best_step, self.best_train_loss = self.last.loss, step, self.last.train_loss
        self.num_worse = 0 if self.last.loss < self.lowest_loss else self.num_worse + 1
        if self.num_worse == 0:
            self.lowest_loss = self.last.loss
        if self.accelerator.is_main_process:
            _write(self.run.output_dir, self.last)
        num_songs = self.last.num_songs
        error = f" +- {self.last.difference_error:.4f} over {num_songs} songs" if num_songs > 1 else ""
        log.info(
            "step %d: held-out loss %.4f, base model %.4f, difference %+.4f%s; training songs %.4f%s",
            step,
            self.last.loss,
            self.last.base_loss,
            self.last.difference,
            error,
            self.last.train_loss,
            "; the best so far" if self.best_step == step else "",
        )
        return self.last

    def _evaluation(
        self,
        transformer: nn.Module,
        step: int,
        mean: WeightMean | None = None,
        between_songs: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        ema_loss = None
        if mean is not None:
            with mean.in_place():
                ema_loss = self._losses(transformer, self.held_out, between_songs).mean().item()
        losses = self._losses(transformer, self.held_out, between_songs)
        trained = self._losses(transformer, self.trained, between_songs)
        difference = (losses - self._base).mean(dim=1)  # (N,)
        num_songs = len(difference)
        neutral = self._neutral_output(transformer)
        change, size = (neutral - self._base_neutral).square().sum().sqrt(), self._base_neutral.square().sum().sqrt()
        return Evaluation(
            step=step,
            epoch=round(self.run.epoch_at(step), 4),
            hash=self.hash,
            num_songs=num_songs,
            loss=losses.mean().item(),
            base_loss=self._base.mean().item(),
            difference=difference.mean().item(),
            difference_error=difference.std().item() / math.sqrt(num_songs) if num_songs > 1 else 0.0,
            times=self.times,
            losses=losses.mean(dim=0).tolist(),
            base_losses=self._base.mean(dim=0).tolist(),
            train_loss=trained.mean().item(),
            train_base_loss=self._train_base.mean().item(),
            drift=(change / size).item(),
            ema_loss=ema_loss,
        )

    def conclude(self, transformer: nn.Module) -> None:
        """Say which checkpoint and which strength look best; called by every process, when the adapter was taken off.

        Raises:
            UserError: if best/ is not what this run wrote.
        """
        best = self.run.output_dir / "best"
        scales = {}
        for scale in self.run.config.validation.scales if self.best_step else []:
            if (step := saved_step(best)) != self.best_step:
                raise UserError(
                    f"{best} should be the adapter of step {self.best_step}, and is that of {step}; something else "
                    f"wrote there while this run trained; {self.run.output_dir / 'final'} is as it should be"
                )
            # training may have left too little memory for the changes of all layers
            applied = attach_saved(transformer, best, scale, keep=False)
            scales[scale] = self._losses(transformer, self.held_out).mean().item()
            applied.detach()
        if self.accelerator.is_main_process:
            assert self.last is not None
            for line in verdict(self.last, self.best_step, self.best_loss, scales):
                log.info("%s", line)
            self.run.record.validation = self.summary() | {
                "scales": {f"{s:g}": loss if math.isfinite(loss) else None for s, loss in scales.items()}
            }
            self.run.record.write()

    @torch.no_grad()
    def _losses(
        self, transformer: nn.Module, songs: Sequence[int], between_songs: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Loss of each song at each time, (N, K) float64; every process evaluates some of the songs."""
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        losses = torch.zeros(len(songs), len(self.times), dtype=torch.float64)
        was_training = transformer.training
        transformer.eval()
        with self.accelerator.autocast():
            for first in range(0, len(songs), num_processes):
                between_songs()
                if (row := first + process) < len(songs):
                    with blaming_evaluation(self.run.config.validation.seconds):
                        losses[row] = self._song_losses(transformer, songs[row])
        transformer.train(was_training)
        if num_processes > 1:
            losses = self.accelerator.reduce(losses.to(self.device), "sum").cpu()
        return losses

    def _excerpt(self, number: int) -> tuple[str, Example]:
        """What tells a song from others, and the part of it that is evaluated."""
        name = content_id(self.run.all_songs.songs[number])
        place = derive_seed(0, f"validation excerpt {name}")
        return name, self.run.all_songs.excerpt_at(number, self.run.config.validation.seconds, place)

    def _song_losses(self, transformer: nn.Module, number: int) -> Tensor:
        """Loss of one song at each time, (K,). A batch is one excerpt at several times, so nothing is padded."""
        name, example = self._excerpt(number)
        times = torch.tensor(self.times)
        noise = torch.stack([_noise(name, k, example.latents.shape) for k in range(len(times))])  # (K, T, C)
        context = context_latents(self.run.silence.to(self.device), len(example.latents))
        predict = predict_velocity(transformer, context)
        self.attention.set_padding(None, None)
        losses = []
        for rows in torch.arange(len(times)).split(self.run.memory.batch_size):
            one = torch.ones(len(rows), 1, 1)
            losses.append(
                VelocityLoss().loss(
                    predict,
                    (one * example.latents).to(self.device),
                    (one * example.condition.float()).to(self.device),
                    self.run.null_condition.to(self.device),
                    Noising(
                        dropped=torch.zeros(len(rows), dtype=torch.bool, device=self.device),
                        noise=noise[rows].to(self.device),
                        t=times[rows].to(self.device),
                    ),
                )
            )
        return torch.cat(losses).double().cpu()

    @torch.no_grad()
    def _neutral_output(self, transformer: nn.Module) -> Tensor:
        """Velocity (1, T, C) for the first held-out song halfway to noise, told nothing about it."""
        name, example = self._excerpt(self.held_out[0])
        latents = example.latents
        noisy_latents = ((latents + _noise(name, 0, latents.shape)) / 2)[None].to(self.device)
        predict = predict_velocity(transformer, context_latents(self.run.silence.to(self.device), len(latents)))
        self.attention.set_padding(None, None)
        was_training = transformer.training
        transformer.eval()
        with self.accelerator.autocast():
            output = predict(
                noisy_latents, torch.tensor([0.5], device=self.device), self.run.null_condition[None].to(self.device)
            )
        transformer.train(was_training)
        return output.double().cpu().contiguous()  # as it is read back, so that sums over it are the same to the bit


@contextmanager
def blaming_evaluation(seconds: float) -> Iterator[None]:
    """Say of memory that runs out in the block that evaluating needed it, and not a step of training.

    Raises:
        UserError: naming ``validation.seconds``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"evaluating a held-out song did not fit in memory; use a smaller validation.seconds than {seconds:g} "
            f"or vram_profile.batch_size=1"
        ) from error


def _noise(song: str, time: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, f"validation noise {song}", time))
    return torch.randn(shape, generator=generator)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, oldest first; lines that a killed run left unreadable are passed over."""
    path = folder / FILE
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = parse_json(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_rows(folder: Path) -> list[Evaluation]:
    """Every evaluation of a run that can be understood, oldest first."""
    names = {field.name for field in fields(Evaluation)}
    rows = []
    for row in (found := read_evaluations(folder)):
        losses = {key: row.get(key) for key in ("loss", "base_loss", "difference", "train_loss", "train_base_loss")}
        if row.keys() != names or not all(isinstance(loss, float | None) for loss in losses.values()):
            continue
        if isinstance(row["step"], int) and isinstance(row["num_songs"], int):
            finite = {key: math.nan if loss is None else loss for key, loss in losses.items()}  # JSON has no NaN
            rows.append(Evaluation(**{**row, **finite}))
    if passed_over := len(found) - len(rows):
        log.warning("%d rows of %s are not as this version writes them; passing over them", passed_over, folder / FILE)
    return rows


def _write(folder: Path, evaluation: Evaluation) -> None:
    """Add a line after those of earlier steps, in place of one about the same adapter, evaluated in the same way."""
    line: dict[str, Any] = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(evaluation).items()
    }
    about = (evaluation.step, evaluation.hash)
    others = [row for row in read_evaluations(folder) if (row.get("step"), row.get("hash")) != about]
    known = [row for row in others if isinstance(row.get("step"), int)]
    lines = sorted([*known, line], key=lambda row: row["step"])
    write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in lines))


def _read_base(path: Path, key: str) -> dict[str, Tensor] | None:
    """What was measured of the base model; None if it is not there, damaged, or of something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in ("losses", "train_losses", "neutral")}
    except (SafetensorError, OSError) as error:
        log.warning("%s cannot be read (%s); the base model is evaluated again", path, error)
        return None


def verdict(evaluation: Evaluation, best_step: int, best_loss: float, scales: Mapping[float, float]) -> list[str]:
    """Say in words which checkpoint and which strength look best, and why.

    Args:
        evaluation: the last one of the run.
        best_step: where the loss was lowest.
        best_loss: what it was there.
        scales: loss of the best adapter at each strength.
    """
    if not best_step:
        return ["no evaluation gave a finite loss, so there is no best/; use a lower optim.lr"]
    lines = []
    train = f"that of training songs is {evaluation.train_loss:.4f} (base model {evaluation.train_base_loss:.4f})"
    learns = evaluation.train_loss < evaluation.train_base_loss  # not so if it is nan
    if best_loss < evaluation.base_loss:
        lines.append(f"best/ is step {best_step}: held-out loss {best_loss:.4f}, base model {evaluation.base_loss:.4f}")
    else:
        advice = "train longer, or on more songs" if learns else "use a lower optim.lr"
        lines.append(
            f"no step predicts the held-out songs better than the base model "
            f"({best_loss:.4f} at step {best_step}, base model {evaluation.base_loss:.4f}); {train}: {advice}"
        )
    if not evaluation.loss <= best_loss:
        why = "the adapter is learning its songs by heart" if learns else "training diverged; use a lower optim.lr"
        lines.append(f"since then the held-out loss rose to {evaluation.loss:.4f} while {train}: {why}")
    if finite := {scale: loss for scale, loss in scales.items() if math.isfinite(loss)}:
        scale, loss = min(finite.items(), key=lambda item: item[1])
        tried = ", ".join(f"{s:g}: {value:.4f}" for s, value in scales.items())
        lines.append(f"of the scales tried on best/, {scale:g} has the lowest held-out loss, {loss:.4f} ({tried})")
    return lines
