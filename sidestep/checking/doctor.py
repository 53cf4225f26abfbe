"""What is wrong with a run, and what it will cost, before it is begun."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.kept import KeptWeights
from sidestep.checking.dry_run import Need, measure_step
from sidestep.checking.songs import check_songs
from sidestep.config.settings import GradientCheckpointing, MemorySettings, Quantization, TrainConfig
from sidestep.data.audio import SAMPLE_RATE
from sidestep.data.sampler import FRAMES_PER_SECOND
from sidestep.devices import memory_gib
from sidestep.times import duration
from sidestep.training.memory import plan_memory
from sidestep.training.run import Run, open_run
from sidestep.training.tracking import versions

log = logging.getLogger(__name__)

STEP_LOG = 512
"""Bytes that a step leaves in metrics.jsonl and TensorBoard."""
LESS_DISK = "use keep_last=3, a larger save_every_epochs, or fewer previews"


@dataclass(frozen=True)
class Cost:
    """What a run can take."""

    hours: float
    """Of devices: those of all processes together; no run takes more."""
    gib: float
    """Of disk."""
    music_gib: float
    """Of these, previews that a report page can hold once more."""


@dataclass
class Examined:
    """What was found of earlier points of a sweep, so that what is the same is measured and said once."""

    needs: dict[str, Need | None] = field(default_factory=dict)
    """By what decides them; None where memory was too small."""
    said: set[str] = field(default_factory=set)
    kept: KeptWeights = field(default_factory=KeptWeights)


def examine(
    config: TrainConfig, output_dir: Path, choices: dict[str, str], examined: Examined | None = None
) -> Cost | None:
    """Print what would be wrong, what the memory is needed for, and what the run will take.

    Nothing is written but which files of the dataset are whole, so training need not read them again; the run's folder
    is not made.

    Args:
        config: of the run.
        output_dir: the folder that the run would have.
        choices: the option chosen of each group.
        examined: what is known from other points of a sweep; this run is added.

    Returns:
        The most that the run can take; None if it cannot be begun.

    Raises:
        UserError: for what training itself would refuse.
    """
    examined = examined or Examined()
    run = open_run(config, output_dir, choices)
    if config.cluster is not None:
        run.num_processes = config.cluster.processes
    available = memory_gib(run.device)
    _say_once(examined, _about_run(run, available))
    _say_once(examined, _about_songs(run))
    run.all_songs.check_tensors()
    key = what_decides_cost(run)
    measured_before = key in examined.needs
    if not measured_before:
        try:
            examined.needs[key] = measure_step(run, examined.kept)
        except torch.OutOfMemoryError:
            examined.needs[key] = None
    need = examined.needs[key]
    if need is None:
        advice = what_would_fit(run, available)
        _say("memory", f"a step at {run.memory.max_seconds:g} s does not fit in {available:.1f} GiB; {advice}")
        return None
    if not measured_before:
        _say_need(need, run.device)
    return _say_cost(run, need)


def what_decides_cost(run: Run) -> str:
    """Everything that the time of a step and its memory depend on; points that agree in it are measured once."""
    config = run.config
    adapter = {key: value for key, value in asdict(config.adapter).items() if key != "alpha"}
    if "dropout" in adapter:
        adapter["dropout"] = adapter["dropout"] > 0  # what is dropped is kept for the backward pass, however little
    optim = {key: value for key, value in asdict(config.optim).items() if key == "paged"}
    about = [run.device, run.precision, run.memory, run.record.model, run.record.dataset, adapter, optim]
    about += [run.record.choices["optim"], run.num_processes, config.prior_dataset_dir, config.data]
    about += [
        config.compile,
        config.attention_kernel,
        config.validation.seconds,
        config.validation.num_times,
        config.previews,
    ]
    return repr(about)


def _say(what: str, text: str) -> None:
    log.info("%-9s %s", what, text)


def _say_once(examined: Examined, lines: Sequence[tuple[str, str]]) -> None:
    if (key := repr(lines)) not in examined.said:
        examined.said.add(key)
        for what, text in lines:
            _say(what, text)


def _about_run(run: Run, available: float) -> list[tuple[str, str]]:
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    return [
        ("versions", ", ".join(f"{library} {version}" for library, version in versions().items())),
        ("device", f"{name}, {available:.1f} GiB, {run.precision}"),
        ("model", f"{run.config.model_variant.name} in {run.checkpoint.folder}"),
    ]


def _about_songs(run: Run) -> list[tuple[str, str]]:
    own = run.all_songs.own_songs
    held_out = f", {len(run.held_out)} of them held out" if run.held_out else ", none held out: no validation"
    lines = [("songs", f"{len(own)}, {_minutes(own)}{held_out}")]
    if prior := run.all_songs.songs[len(own) :]:
        lines.append(("", f"{len(prior)} of {run.config.prior_dataset_dir}, {_minutes(prior)}, in every second batch"))
    return lines + [("  note", note) for note in check_songs(run.all_songs, run.held_out)]


def _minutes(songs: Sequence) -> str:
    return f"{sum(song.num_frames for song in songs) / FRAMES_PER_SECOND / 60:.1f} minutes"


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
    a_minute = need.activations / need.longest_seconds * 60
    _say("memory", f"{listed} = {total}; a longer excerpt takes about {a_minute:.3g} GiB a minute more")
    _say("", f"{measured} {need.peak:.3g} GiB")


def _say_cost(run: Run, need: Need) -> Cost | None:
    steps = need.seconds_per_step * run.num_steps
    per_epoch = steps / max(run.epoch_at(run.num_steps), 1e-9)
    parts = [
        f"steps {duration(steps)} ({run.num_steps} of {need.seconds_per_step:.2f} s; {duration(per_epoch)} an epoch)"
    ]
    evaluating = evaluated_songs(run) * need.seconds_per_song
    if run.held_out:
        num_evaluations = times_done(run, run.config.validation.every_epochs)
        parts.append(f"validation {duration(evaluating)} ({num_evaluations} times)")
    rendering = 0.0
    if need.previews is not None:
        previews = run.config.previews
        pieces = rendered_pieces(run)
        num_inference_steps = previews.num_inference_steps or run.config.num_inference_steps
        rendering = sum(need.previews.of(num_pieces, num_inference_steps) for num_pieces in pieces)
        parts.append(f"previews {duration(rendering)} ({sum(pieces)} of {previews.seconds:g} s)")
    seconds = steps + evaluating + rendering
    hours = seconds * run.num_processes / 3600
    of_devices = f"{hours:.2f} hours of {run.device.type}"
    _say("time", f"at most {duration(seconds)}: {', '.join(parts)}; {of_devices}")
    return _say_disk(run, need, hours)


def _say_disk(run: Run, need: Need, hours: float) -> Cost | None:
    ema = need.adapter if run.config.ema_decay is not None else 0.0
    checkpoint = 2 * need.adapter + need.optimizer + ema
    num_kept = num_checkpoints(run)
    adapters = {"final/": need.adapter, "final_ema/": ema, "best/": need.adapter if run.held_out else 0.0}
    num_pieces = sum(rendered_pieces(run))
    samples = run.config.previews.seconds * SAMPLE_RATE
    picture = 3 * 128 * min(600, samples / 256)  # a spectrogram
    music = num_pieces * (4 * samples + picture) / 2**30  # as if nothing could be compressed
    board = (num_pieces * (2 * samples + picture) + run.num_steps * STEP_LOG) / 2**30  # with one channel
    gib = checkpoint * num_kept + sum(adapters.values()) + music + board
    parts = [f"{num_kept} checkpoints of {checkpoint:.3g} GiB", *(name for name, size in adapters.items() if size)]
    if num_pieces:
        parts.append(f"{num_pieces} previews, here and in TensorBoard")
    free = free_gib(run.output_dir)
    _say("disk", f"about {gib:.3g} GiB: {', '.join(parts)}; {free:.1f} GiB are free")
    if gib > free:
        _say("  note", f"that does not fit; {LESS_DISK}")
        return None
    return Cost(hours, gib, music)


def free_gib(folder: Path) -> float:
    """Room on the disk that a folder, which need not exist yet, will lie on."""
    there = next(path for path in folder.absolute().parents if path.exists())
    return shutil.disk_usage(there).free / 2**30


def times_done(run: Run, every_epochs: int) -> int:
    """How often a whole run does what it does every so many epochs and at its last step."""
    before = run.num_steps - 1
    return min(before, int(run.epoch_at(before)) // every_epochs) + 1


def evaluated_songs(run: Run) -> float:
    """How many songs one process evaluates in a whole run, all times of a song counted once."""
    if not run.held_out:
        return 0.0
    validation, num_songs = run.config.validation, len(run.evaluated)
    at_once = num_songs + min(num_songs, len(run.trained))
    of_mean = num_songs if run.config.ema_decay is not None else 0
    during = times_done(run, validation.every_epochs) * (at_once + of_mean)
    return (at_once + during + num_songs * len(validation.scales)) / run.num_processes  # the base model comes first


def rendered_pieces(run: Run) -> list[int]:
    """How many pieces of music each rendering of a whole run makes; the base model's come first."""
    previews = run.config.previews
    if previews.every_epochs is None:
        return []
    at_each_scale = (len(previews.prompts) or 2) * len(previews.seeds)
    num_scales = sum(scale != 0 for scale in previews.scales)
    at_start = [at_each_scale] if 0 in previews.scales else []
    return at_start + [at_each_scale * num_scales] * times_done(run, previews.every_epochs)


def num_checkpoints(run: Run) -> int:
    """How many checkpoints a whole run leaves, at most."""
    config, last = run.config, run.num_steps
    epochs = run.epoch_at(last)

    def saved(divided_by: int) -> int:
        """Those whose number it divides, the last one always counted."""
        by_epochs = epochs / math.lcm(config.save_every_epochs, divided_by) if config.save_every_epochs else 0
        by_steps = last / math.lcm(config.save_every_steps, divided_by) if config.save_every_steps else 0
        return max(1, math.ceil(by_epochs) + math.floor(by_steps))

    if config.keep_last is None:
        return saved(1)
    others = saved(config.keep_every) if config.keep_every is not None else 0
    return min(saved(1), config.keep_last + others)


CHANGES: list[dict[str, Any]] = [
    {"batch_size": 1},
    {"gradient_checkpointing": GradientCheckpointing.selective},
    {"gradient_checkpointing": GradientCheckpointing.full},
    {"max_seconds": 120.0},
    {"base_quantization": Quantization.int8},
    {"base_quantization": Quantization.nf4},
    {"max_seconds": 60.0},
    {"max_seconds": 30.0},
]
"""What to give up for memory, in the order of docs/vram.md."""


def what_would_fit(run: Run, available: float) -> str:
    """The settings to type for a run that did not fit, no more of them than a plan says are needed.

    Args:
        run: that was tried.
        available: memory of the device, in GiB.
    """
    config, memory = run.config, run.memory

    def planned(memory: MemorySettings) -> float:
        return plan_memory(run.checkpoint.config, config.adapter, config.optim, memory, run.dtype).total

    size = planned(memory)
    limit = 0.8 * min(available, size)  # it did not fit, whatever the plan said
    given_up: dict[str, Any] = {}
    for change in CHANGES:
        changed = replace(memory, **change)
        if (smaller := planned(changed)) >= size:
            continue  # as much or more of it is given up already
        memory, size = changed, smaller
        given_up |= change
        if size <= limit:
            break
    else:
        return "nothing that can be given up would make it fit; use a larger device or a smaller model_variant"
    if "batch_size" in given_up:  # as many songs per step as before
        given_up["gradient_accumulation_steps"] = memory.gradient_accumulation_steps * run.memory.batch_size
    words = [
        f"max_seconds={value:g}" if key == "max_seconds" else f"vram_profile.{key}={value}"
        for key, value in given_up.items()
    ]
    return f"use {' '.join(words)}"
