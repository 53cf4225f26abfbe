"""What is wrong with a run, and what it will cost, before it is begun."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import torch

from sidestep.checking.dry_run import Need, measure_step
from sidestep.checking.songs import check_songs
from sidestep.config.settings import TrainConfig
from sidestep.data.sampler import FRAMES_PER_SECOND
from sidestep.devices import memory_gib
from sidestep.training.run import Run, open_run
from sidestep.training.tracking import duration, versions

log = logging.getLogger(__name__)


def examine(config: TrainConfig, output_dir: Path, choices: dict[str, str]) -> float | None:
    """Print what would be wrong, what the memory is needed for, and what the run will take.

    Nothing is written, and the run's folder is not made.

    Args:
        config: of the run.
        output_dir: the folder that the run would have.
        choices: the option chosen of each group.

    Returns:
        The most hours of devices that the run can take; None if it cannot be begun.

    Raises:
        UserError: for what training itself would refuse.
    """
    run = open_run(config, output_dir, choices)
    device = run.device
    available = memory_gib(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    _say("versions", ", ".join(f"{library} {version}" for library, version in versions().items()))
    _say("device", f"{name}, {available:.1f} GiB, {run.precision}")
    _say("model", f"{config.model_variant.name} in {run.checkpoint.folder}")
    songs = run.all_songs.songs
    minutes = sum(song.num_frames for song in songs) / FRAMES_PER_SECOND / 60
    held_out = f", {len(run.held_out)} of them held out" if run.held_out else ", none held out: no validation"
    _say("songs", f"{len(songs)}, {minutes:.1f} minutes{held_out}")
    for note in check_songs(run.dataset.folder, songs, run.held_out):
        _say("  note", note)
    try:
        need = measure_step(run)
    except torch.OutOfMemoryError:
        _say("memory", f"a step at {run.memory.max_seconds:g} s does not fit in {available:.1f} GiB; {_advice(run)}")
        return None
    _say_need(need, device)
    return _say_cost(run, need)


def _say(what: str, text: str) -> None:
    log.info("%-9s %s", what, text)


def _say_need(need: Need, device: torch.device) -> None:
    parts = {
        "weights": need.weights,
        "adapter": need.adapter,
        "gradients": need.gradients,
        "optimiser": need.optimizer,
        "activations": need.activations,
    }
    listed = " + ".join(f"{what} {size:.3g}" for what, size in parts.items())
    measured = "peak of the device" if device.type == "cuda" else "held by the process"
    total = f"{sum(parts.values()):.3g} GiB at {need.longest_seconds:g} s"
    _say("memory", f"{listed} = {total}; {measured} {need.peak:.3g} GiB")


def _say_cost(run: Run, need: Need) -> float | None:
    seconds = need.seconds_per_step * run.num_steps
    per_epoch = need.seconds_per_step * run.num_steps / max(run.epoch_at(run.num_steps), 1e-9)
    hours = seconds * run.num_processes / 3600
    _say(
        "time",
        f"{need.seconds_per_step:.2f} s per step of the longest excerpts; at most {duration(per_epoch)} per epoch and "
        f"{duration(seconds)} for {run.num_steps} steps: {hours:.2f} hours of {run.device.type}"
        + (", and evaluations and previews besides" if run.held_out or run.config.previews.every_epochs else ""),
    )
    size = 2 * need.adapter + need.optimizer
    kept = run.config.keep_last or num_checkpoints(run)
    wanted = size * kept + need.adapter
    there = next(path for path in run.output_dir.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    _say("disk", f"{kept} checkpoints of {size:.3g} GiB and final/, {wanted:.3g} GiB; {free / 2**30:.1f} GiB are free")
    if wanted * 2**30 > free:
        _say("  note", "that does not fit; use keep_last=3, or a larger save_every_epochs")
        return None
    return hours


def num_checkpoints(run: Run) -> int:
    """How many checkpoints a whole run writes, if none is removed."""
    config, last = run.config, run.num_steps
    by_epochs = run.epoch_at(last) / config.save_every_epochs if config.save_every_epochs is not None else 0
    by_steps = last / config.save_every_steps if config.save_every_steps is not None else 0
    return max(1, math.ceil(by_epochs) + math.floor(by_steps))


def _advice(run: Run) -> str:
    memory = run.memory
    if memory.batch_size > 1:
        return "use vram_profile.batch_size=1 and more vram_profile.gradient_accumulation_steps"
    if memory.gradient_checkpointing.value != "full":
        return "use vram_profile.gradient_checkpointing=full"
    return f"use max_seconds={memory.max_seconds / 2:g}"
