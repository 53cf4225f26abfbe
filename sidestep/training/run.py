"""A run and its folder: what it was set up with, where it starts, what it leaves behind.

outputs/<name>/<run>/
    final/                        only the adapter: point players here
    best/                         the same files, of the lowest held-out loss
    checkpoints/epoch_N, step_N/  the same files and training_state.pt
    runs/                         TensorBoard
    run.json  metrics.jsonl  train.log  .hydra/
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import Checkpoint, find_checkpoint
from sidestep.adapters import Adapter, SavedAdapter
from sidestep.adapters.files import fingerprint_adapter, read_adapter, saved_step
from sidestep.config.gate import read_profiles
from sidestep.config.settings import AttentionKernel, GradientCheckpointing, MemorySettings, Resume, TrainConfig
from sidestep.data.dataset import SongDataset
from sidestep.data.holdout import content_id, hold_out, lowest_places
from sidestep.data.legacy import LegacySongs
from sidestep.data.sampler import FRAMES_PER_SECOND, MicroBatchSampler
from sidestep.devices import check_compiler, memory_gib, resolve_device, resolve_dtype, resolve_precision
from sidestep.errors import UserError
from sidestep.files import hashes_of, keep_others, replacing_folder
from sidestep.processes import slurm_job
from sidestep.times import now
from sidestep.training.final import verify_saved, write_card
from sidestep.training.flow import TimestepConfig
from sidestep.training.forward import Forward
from sidestep.training.memory import choose_checkpointing
from sidestep.training.signals import Interrupted
from sidestep.training.state import (
    MANIFEST,
    STATE,
    TrainingState,
    check_same_settings,
    checkpoint_folder,
    checkpoint_folders,
    checkpoints_by_step,
    fingerprint_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from sidestep.training.tracking import RunRecord, read_record, versions

log = logging.getLogger(__name__)

PATHS = ("checkpoint_dir", "dataset_dir", "prior_dataset_dir", "log_dir", "init_from", "resume_from", "cluster")
"""Settings that say where things lie and run; not written into adapters."""

_ASIDE = "set_aside"

_PREVIEW = re.compile(r"step_(\d+)")


@dataclass
class Run:
    """One training run, resolved: nothing is left to decide."""

    config: TrainConfig
    output_dir: Path
    device: torch.device
    precision: str
    dtype: torch.dtype
    """Of the frozen base model."""
    memory: MemorySettings
    checkpoint: Checkpoint
    silence: Tensor
    """The checkpoint's latents of silence, (S, 64)."""
    null_condition: Tensor
    """The checkpoint's learned empty condition, (1, D)."""
    dataset: SongDataset
    """The songs to train on."""
    all_songs: SongDataset
    trained: list[int]
    """Numbers, within ``all_songs``, of those to train on."""
    held_out: list[int]
    """Numbers of those that are not trained on."""
    evaluated: list[int]
    """Numbers of those, among the held-out ones, that are evaluated."""
    process: int
    num_processes: int
    record: RunRecord
    saved_step: int = 0
    """Of the newest checkpoint that run.json knows of, whether or not it is still there."""
    init_fingerprint: str | None = None
    """Hash of the adapter that init_from names."""
    finished_loss: float | None = None
    """The result, if the run was finished before."""
    finished_step: int | None = None
    """Where it ended, if it was finished before and is only evaluated or written again."""

    @property
    def log_dir(self) -> Path:
        """Folder of TensorBoard files."""
        if self.config.log_dir is None:
            return self.output_dir / "runs"
        return Path(self.config.log_dir) / self.config.name / self.output_dir.name

    @property
    def songs_per_step(self) -> int:
        """Songs of one optimiser step, over all micro-batches and processes."""
        return self.memory.batch_size * self.memory.gradient_accumulation_steps * self.num_processes

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        by_epochs = math.inf if self.config.max_epochs is None else self.step_at_epoch(self.config.max_epochs)
        by_steps = math.inf if self.config.max_steps is None else self.config.max_steps
        return int(min(by_epochs, by_steps))

    @property
    def last_step(self) -> int:
        """Where training ends at the latest; before ``num_steps`` if the run ended earlier and stays so."""
        return self.num_steps if self.finished_step is None else self.finished_step

    @property
    def timesteps(self) -> TimestepConfig:
        """The distribution of times, with what was left null taken from the checkpoint."""
        model = self.checkpoint.config
        return self.config.timesteps.with_defaults(model.timestep_mu, model.timestep_sigma)

    def micro_batches(self, first_step: int, last_step: int, process: int) -> MicroBatchSampler:
        """The positions of each micro-batch of one process."""
        return MicroBatchSampler(
            first_step=first_step,
            last_step=last_step,
            batch_size=self.memory.batch_size,
            accumulation=self.memory.gradient_accumulation_steps,
            process=process,
            num_processes=self.num_processes,
        )

    def forward(self, model: nn.Module, attention: WindowedAttention, device: torch.device) -> Forward:
        """What gives the losses of this run's micro-batches.

        Args:
            model: the transformer, perhaps wrapped by Accelerate.
            attention: of the same transformer.
            device: where it is.
        """
        return Forward(
            model,
            attention,
            objective=self.config.objective,
            timesteps=self.timesteps,
            condition_dropout=self.config.condition_dropout,
            silence=self.silence.to(device),
            null_condition=self.null_condition.to(device),
            seed=self.config.seed,
        )

    def step_at_epoch(self, epoch: int) -> int:
        """The first step at whose end every song was seen ``epoch`` times."""
        return math.ceil(epoch * self.dataset.songs_per_epoch / self.songs_per_step)

    def epoch_at(self, step: int) -> float:
        """How often every song was seen, on average, at the end of a step."""
        return step * self.songs_per_step / self.dataset.songs_per_epoch

    def checkpoint_name(self, step: int) -> str | None:
        """Name of the checkpoint to write at the end of a step, or None.

        A step larger than the dataset ends several epochs at once; it is named after the last of them that is due.
        """
        before, after = int(self.epoch_at(step - 1)), int(self.epoch_at(step))
        every_epochs, every_steps = self.config.save_every_epochs, self.config.save_every_steps
        if after > before and step == self.num_steps:
            return f"epoch_{after}"
        if every_epochs is not None and after // every_epochs > before // every_epochs:
            return f"epoch_{after // every_epochs * every_epochs}"
        if step == self.num_steps or (every_steps is not None and step % every_steps == 0):
            return f"step_{step}"
        return None

    def is_due(self, step: int, every_epochs: int) -> bool:
        """Whether what is done every so many epochs is done at the end of a step; it is at the last one."""
        before, after = int(self.epoch_at(step - 1)), int(self.epoch_at(step))
        return after // every_epochs > before // every_epochs or step == self.num_steps

    def training_settings(self) -> dict[str, Any]:
        """Every setting that decides the weights, flat and in plain values. A run with others is another run."""
        config = asdict(self.config)
        groups = {key: config[key] for key in ("adapter", "optim", "schedule", "timesteps", "objective")}
        flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
        flat.pop("adapter.default_lr")  # only a default of optim.lr
        data = {key: value for key, value in config["data"].items() if key != "allow_leaked_reference"}
        settings = {
            **{group: self.record.choices[group] for group in groups},
            **flat,
            **{f"data.{key}": value for key, value in data.items()},
            "model_variant": self.config.model_variant.name,
            "seed": self.config.seed,
            "condition_dropout": self.config.condition_dropout,
            "precision": self.precision,
            "max_seconds": self.memory.max_seconds,
            "vram_profile.batch_size": self.memory.batch_size,
            "vram_profile.base_quantization": self.memory.base_quantization,
            "micro_batches_per_step": self.memory.gradient_accumulation_steps * self.num_processes,
            "dataset": self.record.dataset["fingerprint"],
            "checkpoint": self.record.model["fingerprint"],
            "checkpoint_constants": self.record.model["constants"],
            "init_from": self.init_fingerprint,
        }
        return json.loads(json.dumps(settings))  # enums become plain values

    def validation_hash(self) -> str:
        """Sixteen hex digits of everything that decides the held-out losses besides the adapter.

        Losses with different ones cannot be compared; empty where no song is held out.
        """
        if not self.evaluated:
            return ""
        songs = [self.all_songs.songs[number] for number in self.evaluated]
        decides = {
            "format": 2,
            "transformer": self.record.model["fingerprint"],
            "constants": self.record.model["constants"],
            "null_condition": _hash({}, self.null_condition.numpy().tobytes()),
            "precision": self.precision,
            "base_quantization": self.memory.base_quantization,
            "seconds": self.config.validation.seconds,
            "num_times": self.config.validation.num_times,
            "songs": sorted(f"{song.latents} {song.conditions} {song.prompt}" for song in songs),
        }
        return _hash(decides, b"")

    def find_start(self) -> TrainingState | None:
        """Read the checkpoint to continue from, or None to start at step 0.

        Raises:
            UserError: if that checkpoint cannot be continued with these settings, or those of the run are gone.
        """
        config = self.config
        newest = newest_checkpoint(self.output_dir)
        folder, state = newest if newest is not None else (None, None)
        goes_back = False
        if folder is not None and config.resume_from is not None and self.went_back_to(config.resume_from):
            log.info("resume_from=%s was done before; going on from the newest checkpoint", config.resume_from)
        elif config.resume_from is not None:
            goes_back = folder is not None
            folder = checkpoint_folder(Path(config.resume_from))
            state = load_checkpoint(folder)
        if newest is None and (config.resume_from is None or self.went_back_to(config.resume_from)):
            self._check_is_new(0 if state is None else state.step)
        if not goes_back and state is not None and self.saved_step > state.step:
            log.warning(
                "by run.json the run was saved at step %d, and no checkpoint of that is whole; the steps after %d are "
                "trained again",
                self.saved_step,
                state.step,
            )
        if folder is None or state is None:
            return None
        check_same_settings(state.settings, self.record.settings, folder)
        if state.step > self.num_steps:
            lengths = {"max_epochs": config.max_epochs, "max_steps": config.max_steps}
            typed = " and ".join(f"{key}={value}" for key, value in lengths.items() if value is not None)
            raise UserError(
                f"{folder} is at step {state.step}, past the {self.num_steps} steps of {typed}; "
                f"type more, or go back with resume_from=<an earlier checkpoint>"
            )
        if config.schedule.depends_on_length and state.num_steps != self.num_steps:
            log.warning(
                "schedule=%s is stretched from %d steps to %d, so the learning rate goes on from %.3g, not %.3g",
                self.record.choices["schedule"],
                state.num_steps,
                self.num_steps,
                config.optim.lr * config.schedule.factor(state.step, self.num_steps),
                config.optim.lr * config.schedule.factor(state.step, state.num_steps),
            )
        log.info("continuing from %s at step %d", folder, state.step)
        self.record.resumed_from = str(folder)
        is_own = folder.resolve().parent == (self.output_dir / "checkpoints").resolve()
        if config.resume_from is not None and not self.went_back_to(config.resume_from):
            self.record.went_back_to = str(Path("checkpoints", folder.name) if is_own else folder.resolve())
            self.record.went_back_hash = fingerprint_checkpoint(folder)
        if self.process == 0:
            # not before the checkpoint was found to fit; what is refused later costs nothing that was moved
            self._set_aside_after(state.step if is_own else 0, goes_back=goes_back)
            if goes_back:
                self.record.run_id = _new_id()  # a service that was told of later steps takes no earlier ones
                self.record.write()
        return state

    def _check_is_new(self, step: int) -> None:
        """Refuse to train again from ``step`` what was trained before, where its checkpoints are gone.

        Raises:
            UserError: naming their folder.
        """
        if self.saved_step > step:
            raise UserError(
                f"{self.output_dir / 'checkpoints'} holds no checkpoint, and by run.json the run was saved at step "
                f"{self.saved_step}; bring them back, or move {self.output_dir} away to begin anew, or give this run "
                f"another name=..."
            )

    def went_back_to(self, path: str) -> bool:
        """Whether a resume_from was what this run was taken to before.

        By what the checkpoint holds, since the project may have been moved; and by its place, since rotation may have
        removed it.
        """
        record, typed = self.record, Path(path).resolve()
        if record.went_back_hash and record.went_back_hash == fingerprint_checkpoint(typed):
            return True
        place = (self.output_dir / record.went_back_to).resolve()
        return record.went_back_to != "" and place in (typed, typed.parent)  # a folder, or a file in it

    def read_initial(self) -> SavedAdapter | None:
        """Read the adapter that a new run starts from, if one is named.

        Raises:
            UserError: if it cannot be read, or is of another family than the run.
        """
        if self.config.init_from is None:
            return None
        saved = read_adapter(Path(self.config.init_from))
        saved.require_family(self.config.adapter)
        log.info("starting from the weights of %s", saved.path)
        return saved

    def begin(self, first_step: int) -> None:
        """Write down that training starts."""
        if self.process != 0:
            return
        if first_step == self.last_step:
            log.info("all %d steps are done; writing %s again", first_step, self.output_dir / "final")
        if self.config.schedule.warmup_steps >= self.num_steps:
            log.warning(
                "schedule.warmup_steps=%d is no shorter than the run of %d steps, so the full learning rate is never "
                "reached",
                self.config.schedule.warmup_steps,
                self.num_steps,
            )
        for note in [*self.config.validation.without_effect(), *self.config.previews.without_effect()]:
            log.warning("%s", note)
        if len(self.evaluated) < len(self.held_out):
            log.info(
                "%d of the %d held-out songs are evaluated; validation.max_songs=null evaluates all",
                len(self.evaluated),
                len(self.held_out),
            )
        seconds = sum(song.num_frames for song in self.dataset.own_songs) / FRAMES_PER_SECOND
        prior = len(self.dataset.prior_songs)
        log.info(
            "%d songs%s, %.1f minutes; steps %d to %d of %d songs each, %g epochs; %s on %s",
            len(self.dataset.own_songs),
            f" besides {prior} of prior_dataset_dir" if prior else "",
            seconds / 60,
            first_step + 1,
            self.num_steps,
            self.songs_per_step,
            round(self.epoch_at(self.num_steps), 2),
            self.precision,
            self.device,
        )
        record = self.record
        record.status, record.started = "running", now()
        record.host, record.process, record.job = socket.gethostname(), os.getpid(), slurm_job()
        record.step, record.num_steps = first_step, self.num_steps
        record.write()

    def save_checkpoint(
        self,
        step: int,
        smoothed_loss: float,
        adapter: Adapter,
        optimizer: Any,
        scaler: Any,
        *,
        ema: dict[str, Tensor],
    ) -> None:
        """Write the checkpoint of a step.

        Raises:
            UserError: if the weights are not finite: a checkpoint of them would rotate good ones away.
        """
        state = TrainingState(
            step=step,
            num_steps=self.num_steps,
            smoothed_loss=smoothed_loss,
            adapter=adapter.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else {},
            settings=self.record.settings,
            ema=ema,
        )
        if bad := [name for name, tensor in state.adapter.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"the adapter's weights are not finite at step {step} (first {bad[0]}), so they are not saved; "
                f"checkpoints before it are kept; use a lower optim.lr than {self.config.optim.lr:g} or "
                f"optim.weight_decay, under another name=..."
            )
        folder = self.output_dir / "checkpoints" / (self.checkpoint_name(step) or f"step_{step}")
        save_checkpoint(folder, state, lambda partial: adapter.save(partial, self.metadata(step)))
        self.record.step, self.record.smoothed_loss = step, smoothed_loss
        self.record.write()
        log.info("saved %s", folder)
        if self.config.keep_last is not None:
            remove_old_checkpoints(
                self.output_dir, step, keep_last=self.config.keep_last, keep_every=self.config.keep_every
            )

    def save_adapter(self, folder: str, step: int, adapter: Adapter) -> None:
        """Write best/, the adapter with the lowest validation loss so far, or final_ema/, the mean of its weights."""
        with replacing_folder(self.output_dir / folder) as partial:
            adapter.save(partial, self.metadata(step))
            write_card(partial, self.config, self.dataset, step, self.epoch_at(step))

    def saved_adapters(self) -> dict[int, Path]:
        """Where the adapter of each step lies: best/, else a checkpoint, else a best/ that made way for another."""
        folders = [*(self.output_dir / _ASIDE).glob("best_step_*"), self.output_dir / "best"]
        steps = [saved_step(folder) for folder in folders]
        *aside, best = [(step, folder) for step, folder in zip(steps, folders, strict=True)]
        found = [*aside, *checkpoints_by_step(self.output_dir), best]
        return {step: folder for step, folder in found if step is not None}

    def set_best_aside(self) -> None:
        """Move best/ out of the way of another, to where it is found again."""
        best = self.output_dir / "best"
        aside = self.output_dir / _ASIDE / f"best_step_{saved_step(best)}"
        if aside.exists():
            self._set_aside([best])
        elif best.exists():
            aside.parent.mkdir(exist_ok=True)
            os.replace(best, aside)
            log.info("moved %s to %s", best, aside)

    def restore_best(self, steps: Sequence[int]) -> int:
        """Let best/ hold the adapter of the first of some steps that is still there; see :meth:`saved_adapters`.

        A best/ of another step is moved to set_aside/best_step_N, also where the run goes on from before it and will
        get there again: it may be told to end earlier.

        Args:
            steps: the one with the lowest held-out loss first.

        Returns:
            The step; 0 if the adapter of none of them is there.
        """
        best = self.output_dir / "best"
        there = saved_step(best)
        adapters = self.saved_adapters()
        chosen = next((step for step in steps if step in adapters), 0)
        if chosen and chosen == there:
            return chosen
        if there is not None:
            self.set_best_aside()
        if chosen:
            source = self.saved_adapters()[chosen]
            with replacing_folder(best) as partial:
                for path in source.iterdir():
                    if path.name not in (STATE, MANIFEST):
                        shutil.copy2(path, partial)
                write_card(partial, self.config, self.dataset, chosen, self.epoch_at(chosen))
        return chosen

    def finish(self, adapter: Adapter, transformer: nn.Module, step: int, smoothed_loss: float) -> None:
        """Write final/, after checking that the files in it give what was trained; the adapter stays off.

        Raises:
            UserError: if they do not.
        """
        final = self.output_dir / "final"
        with replacing_folder(final) as partial:
            adapter.save(partial, self.metadata(step))
            write_card(partial, self.config, self.dataset, step, self.epoch_at(step))
            example = self.dataset[0]
            verify_saved(partial, adapter, transformer, example, self.silence)
            hashes = hashes_of(partial)
            keep_others(final, partial)
        record = self.record
        record.final = hashes
        record.status, record.finished = "finished", now()
        record.step, record.smoothed_loss, record.error = step, smoothed_loss, ""
        record.stopped_early = step < self.num_steps
        record.write()
        log.info("finished at step %d, smoothed loss %.4f", step, smoothed_loss)

    def announce(self) -> None:
        """Say where the adapter is."""
        final = self.output_dir / "final"
        log.info("the adapter is in %s; next: see %s for where to load it", final, final / "README.md")

    def fail(self, error: BaseException) -> None:
        """Write down why the run stopped, if it had begun; a refused command leaves the folder as it was."""
        if self.record.status == "running" and self.process == 0:
            self.record.status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            self.record.error = f"{type(error).__name__}: {error}"
            try:
                self.record.write()
            except OSError as second:  # the same full disk; the first error says more
                log.warning("%s is not up to date: %s", self.record.path, second.strerror)

    def metadata(self, step: int) -> dict[str, str]:
        """What is written into the header of the adapter's files: enough to play it right and to make it again."""
        config, variant = self.config, self.config.model_variant
        about = {
            "model_variant": variant.name,
            "shift": config.shift,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": variant.guidance_scale,
            "custom_tags": self.dataset.info.settings["custom_tags"],
            "checkpoint": self.record.model["fingerprint"],
            "dataset": self.record.dataset["fingerprint"],
            "init_from": self.init_fingerprint,
            "step": step,
            "epoch": round(self.epoch_at(step), 4),
            "config": {key: value for key, value in asdict(config).items() if key not in PATHS},
            "choices": {group: option for group, option in self.record.choices.items() if "hydra" not in group},
            "versions": self.record.versions,
        }
        return {"sidestep": json.dumps(about, sort_keys=True)}

    def _set_aside_after(self, step: int, *, goes_back: bool) -> None:
        """Move checkpoints past a step, and those without a readable manifest, out of the way.

        They were passed over or gone back from: the run must not end at one of them again, nor rotation count them. All
        are moved, as after step 0, where the run goes on from a checkpoint that is not among them.
        Going back, best/, final_ema/ and previews of later steps go with them; final/, which players point at, stays
        until the new one takes its place.
        """
        steps = {folder: number for number, folder in checkpoints_by_step(self.output_dir)}
        later = [folder for folder in checkpoint_folders(self.output_dir) if steps.get(folder, math.inf) > step]
        if goes_back:
            adapters = [self.output_dir / name for name in ("best", "final_ema")]
            adapters += (self.output_dir / _ASIDE).glob("best_step_*")
            later += [folder for folder in adapters if (saved_step(folder) or 0) > step]
            previews = (self.output_dir / "previews").glob("step_*")
            later += [path for path in previews if (number := _PREVIEW.fullmatch(path.name)) and int(number[1]) > step]
        self._set_aside(later)

    def _set_aside(self, folders: Sequence[Path]) -> None:
        """Move folders of this run out of the way; where theirs is a link to another disk, to a place on that disk."""
        when = now().replace(":", "")
        for folder in folders:
            target = self.output_dir / _ASIDE / when
            target = target / "previews" if folder.parent.name == "previews" else target
            try:
                _move(folder, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                target = folder.parent / _ASIDE / when  # no copy: they may lie there because there is no room here
                _move(folder, target)
            log.info("moved %s to %s", folder, target)


def _move(folder: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    os.replace(folder, into / folder.name)


def open_run(config: TrainConfig, output_dir: Path, choices: dict[str, str]) -> Run:
    """Resolve everything a run needs and check it, without loading any weights.

    Raises:
        UserError: for anything that would make the run fail later.
    """
    config.tracking.check()
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    memory = config.vram_profile.resolve(read_profiles(), memory_gib(device))
    if config.max_seconds is not None:
        memory.max_seconds = config.max_seconds
    if config.compile and memory.offloaded_share:
        raise UserError(
            "compile=true cannot follow weights that wait in main memory; "
            "leave it out, or type vram_profile.offloaded_share=0"
        )
    uses_flex = config.attention_kernel is AttentionKernel.flex
    for setting, is_chosen in (("attention_kernel=flex", uses_flex), ("compile=true", config.compile)):
        if is_chosen and device.type != "cuda":
            raise UserError(f"{setting} needs a CUDA GPU, and this is {device.type}; leave it out")
        if is_chosen:
            check_compiler(setting)
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), config.model_variant)
    if memory.gradient_checkpointing is GradientCheckpointing.auto:
        memory = choose_checkpointing(
            checkpoint.config,
            config.adapter,
            config.optim,
            memory,
            resolve_dtype(precision, device),
            available_gib=min(memory_gib(device), config.vram_profile.memory_gib or math.inf),
            compiled=config.compile,
        )
    dataset = SongDataset(
        Path(config.dataset_dir),
        max_seconds=memory.max_seconds,
        seed=config.seed,
        config=config.data,
        batch_size=memory.batch_size,
        prior_folder=None if config.prior_dataset_dir is None else Path(config.prior_dataset_dir),
    )
    check_dataset_fits(dataset, checkpoint)
    trained, held_out = hold_out(dataset.own_songs, config.validation, dataset.prior_songs)
    silence = checkpoint.silence()
    previous = read_record(output_dir / "run.json")
    record = RunRecord(
        output_dir / "run.json",
        choices={group: option for group, option in choices.items() if not group.startswith("hydra/")},
        config=asdict(config),
        model={
            "folder": str(checkpoint.folder),
            "fingerprint": checkpoint.fingerprint("transformer"),
            "constants": _hash(asdict(checkpoint.config), silence.numpy().tobytes()),
        },
        dataset={
            "folder": str(dataset.folder),
            "fingerprint": dataset.only(trained).fingerprint(),
            "num_songs": len(trained),
            "held_out": [dataset.songs[number].audio for number in held_out],
        },
        versions=versions(),
        memory_gib=float(previous.get("memory_gib", 0.0)),
        train_seconds=float(previous.get("train_seconds", 0.0)),
        went_back_to=str(previous.get("went_back_to", "")),
        went_back_hash=str(previous.get("went_back_hash", "")),
        run_id=str(previous.get("run_id") or _new_id()),
    )
    run = Run(
        config=config,
        output_dir=output_dir,
        device=device,
        precision=precision,
        dtype=resolve_dtype(precision, device),
        memory=memory,
        checkpoint=checkpoint,
        silence=silence,
        null_condition=checkpoint.null_condition(),
        dataset=dataset.only(trained),
        all_songs=dataset,
        trained=trained,
        held_out=held_out,
        evaluated=lowest_places(dataset.songs, held_out, config.validation.max_songs),
        process=int(os.environ.get("RANK", "0")),
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        record=record,
        saved_step=previous["step"] if type(previous.get("step")) is int else 0,
        init_fingerprint=_init_fingerprint(config, previous),
    )
    record.settings = run.training_settings()
    if config.resume is Resume.never and (before := checkpoint_folders(output_dir)):
        raise UserError(f"resume=never, but {before[-1]} exists; give this run another name=..., or leave resume out")
    _check_same_split(run, previous)
    _note_ranks_of_held_out_songs(run)
    if not previous and os.path.lexists(record.path) and not checkpoint_folders(output_dir):
        raise UserError(
            f"{record.path} cannot be read, and {output_dir / 'checkpoints'} holds no checkpoint to go by; bring them "
            f"back, or move {output_dir} away to begin anew, or give this run another name=..."
        )
    run.finished_loss = _finished_loss(run, previous)
    return run


def check_dataset_fits(dataset: SongDataset, checkpoint: Checkpoint) -> None:
    """Refuse a dataset whose conditions come from another model.

    Raises:
        UserError: saying how to make the dataset anew.
    """
    name = checkpoint.variant.name
    again = f"make one with python -m sidestep.preprocess model_variant={name} dataset_dir=<another folder> ..."
    for key, source in zip(("dataset_dir", "prior_dataset_dir"), dataset.sources, strict=False):
        if isinstance(source, LegacySongs):
            _check_legacy_fits(source, checkpoint, key)
        elif source.info.fingerprints.get("condition_encoder") != checkpoint.fingerprint("condition_encoder"):
            raise UserError(
                f"{key}={source.folder} was made with the condition encoder of another checkpoint "
                f"({source.info.model_variant}) than model_variant={name} in {checkpoint.folder}; {again}"
            )


def _check_legacy_fits(songs: LegacySongs, checkpoint: Checkpoint, key: str) -> None:
    """Refuse tensor files of another model, as far as they say; only Side-Step's do."""
    name, made_for = checkpoint.variant.name, songs.info.model_variant
    width = checkpoint.null_condition().shape[1]
    if songs.info.condition_width != width:
        raise UserError(
            f"{key}={songs.folder} has conditions of {songs.info.condition_width} channels, and model_variant={name} "
            f"reads {width}; the files are for another model"
        )
    if made_for == "unknown":
        log.warning("%s=%s does not say which model it was made for; taking it to be %s", key, songs.folder, name)
    elif made_for != name:
        raise UserError(f"{key}={songs.folder} was made for model_variant={made_for}, not {name}; type that instead")


def _init_fingerprint(config: TrainConfig, previous: dict[str, Any]) -> str | None:
    """The hash of the adapter to start from; if it is gone, as the run that was started from it remembers it."""
    if config.init_from is None:
        return None
    remembered = previous.get("settings", {}).get("init_from")
    if remembered is None or Path(config.init_from).exists():
        return fingerprint_adapter(Path(config.init_from))
    return str(remembered)


def _finished_loss(run: Run, previous: dict[str, Any]) -> float | None:
    """The result of a run that was finished before, if nothing about it would be different now."""
    config, final = run.config, run.output_dir / "final"
    patience = config.validation.patience
    before = previous.get("config", {}).get("validation")
    gave_up = previous.get("stopped_early") and isinstance(before, dict) and before.get("patience") == patience
    if previous.get("status") != "finished" or not (previous.get("step") == run.num_steps or gave_up):
        return None
    if run.config.resume_from is not None and not run.went_back_to(run.config.resume_from):
        return None
    check_same_settings(previous["settings"], run.record.settings, run.output_dir)
    run.finished_step = int(previous["step"])
    if previous["smoothed_loss"] is None or (run.held_out and previous.get("validation", {}).get("best_loss") is None):
        return None
    if run.held_out and not _is_evaluated(run, previous["validation"]):
        log.info("%s was not evaluated as these settings of validation say; it is evaluated again", run.output_dir)
        return None
    for key in ("shift", "num_inference_steps"):
        if (was := previous["config"].get(key)) != (now_set := getattr(run.config, key)):
            log.info("%s=%s was %s; %s is written again", key, now_set, was, final)
            return None
    hashes = hashes_of(final) if final.is_dir() else {}  # other files may lie there too
    if not previous["final"] or any(hashes.get(name) != written for name, written in previous["final"].items()):
        log.warning("%s is not as it was written; it is made again from the last checkpoint", final)
        return None
    limit = "max_epochs" if run.config.max_steps is None else "max_steps"
    limit = "validation.patience" if gave_up else limit
    log.info("%s is finished at step %d; raise %s to train on", run.output_dir, previous["step"], limit)
    run.announce()
    missing = {
        "previews": config.previews.every_epochs
        and not (run.output_dir / f"previews/step_{previous['step']}").exists(),
        "final_ema/": config.ema_decay is not None and not (run.output_dir / "final_ema").exists(),
    }
    if names := [name for name, is_missing in missing.items() if is_missing]:
        log.warning("%s not made for a finished run; raise %s to train on", " and ".join(names), limit)
    if run.held_out:
        return float(previous["validation"]["best_loss"])
    return float(previous["smoothed_loss"])


def _is_evaluated(run: Run, found: dict[str, Any]) -> bool:
    """Whether the validation of a finished run is what it would be now."""
    scales, tried = {f"{scale:g}" for scale in run.config.validation.scales}, found.get("scales")
    return found.get("hash") == run.validation_hash() and isinstance(tried, dict) and scales == tried.keys()


def _check_same_split(run: Run, previous: dict[str, Any]) -> None:
    """Refuse to hold out other songs than before: the run may have learnt them.

    Raises:
        UserError: naming the setting.
    """
    before = previous.get("config", {}).get("validation")
    if not isinstance(before, dict) or not (previous.get("status") == "finished" or checkpoint_folders(run.output_dir)):
        return
    for key in ("fraction", "songs"):
        was, value = before.get(key), getattr(run.config.validation, key)
        if was != value and previous.get("dataset", {}).get("held_out") != run.record.dataset["held_out"]:
            raise UserError(
                f"{run.output_dir} was trained with validation.{key}={_typed(was)}, and {_typed(value)} would train "
                f"on other songs and hold out others; type the former again, or give this run another name=..."
            )


def _note_ranks_of_held_out_songs(run: Run) -> None:
    """Say where python -m sidestep.analyze chose the ranks on songs that are held out now."""
    measured = set(run.config.adapter.analyzed_songs)
    songs = [run.all_songs.songs[number] for number in run.held_out]
    if seen := [song.audio for song in songs if content_id(song) in measured]:
        log.warning(
            "the ranks of adapter.rank_pattern_file were chosen on %d of the %d held-out songs (first %s), which makes "
            "validation look better than it is; type the same validation.fraction or validation.songs for "
            "python -m sidestep.analyze",
            len(seen),
            len(songs),
            seen[0],
        )


def _typed(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else f"{value}"


def _new_id() -> str:
    return secrets.token_hex(6)


def _hash(values: dict[str, Any], data: bytes) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + data).hexdigest()[:16]
