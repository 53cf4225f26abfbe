"""Two steps at the longest excerpts, to say what a run will need before it is begun; nothing of it is kept."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.conditioning import context_latents
from sidestep.acestep.kept import KeptWeights
from sidestep.config.settings import AttentionKernel
from sidestep.data.dataset import Batch, collate
from sidestep.data.sampler import FRAMES_PER_SECOND, PATCH_FRAMES, window_frames
from sidestep.devices import place, tensors_of
from sidestep.errors import UserError
from sidestep.inference.pipeline import Request
from sidestep.inference.previews import render
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.forward import predict_velocity
from sidestep.training.loop import compile_blocks, make_accelerator, update_unless_bad
from sidestep.training.memory import plan_memory
from sidestep.training.offload import OffloadedBlocks, first_blocks
from sidestep.training.previews import Previews, blaming_previews
from sidestep.training.run import Run
from sidestep.training.tracking import used_gib
from sidestep.training.validation import blaming_evaluation

MOST_LOOKED_AT = 20_000
"""Micro-batches among which the longest one is looked for; enough for any dataset, and a second of work."""


@dataclass(frozen=True)
class Need:
    """What a run takes, as measured. Sizes are in GiB."""

    seconds_per_step: float
    """Of the second step, since the first one also warms up."""
    longest_seconds: float
    """Length of the excerpts."""
    weights: float
    """Of the frozen transformer."""
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass by one micro-batch, as planned: PyTorch does not say what a device holds for what."""
    peak: float
    """Measured on the device; on a CPU, memory that the whole process holds afterwards."""
    seconds_per_song: float = 0.0
    """Of evaluating one held-out song at all times; 0 if none is held out."""
    previews: PreviewTimes | None = None


@dataclass(frozen=True)
class PreviewTimes:
    """Seconds of rendering."""

    models: float
    """Reading the models and encoding the words, once per rendering."""
    sampling_step: float
    """One sampling step of one piece."""
    piece: float
    """Decoding and writing one piece."""

    def of(self, num_pieces: int, num_inference_steps: int) -> float:
        """Seconds of one rendering."""
        return self.models + num_pieces * (num_inference_steps * self.sampling_step + self.piece)


def measure_step(run: Run, kept: KeptWeights | None = None) -> Need:
    """Train two steps on the longest excerpts, and evaluate and render as the run will, on the device it would use.

    Args:
        run: opened, not begun.
        kept: weights of the base model, for runs that are measured one after the other.

    Raises:
        torch.OutOfMemoryError: if the device is too small.
        UserError: if previews cannot be rendered.
    """
    try:
        rendering = None
        if run.config.previews.every_epochs is not None:
            if kept is not None:
                kept.drop()  # rendering needs the memory
            with blaming_previews(run.config.previews.seconds):
                rendering = _time_rendering(run)
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        return _measure(run, kept, rendering)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def longest_micro_batch(run: Run) -> Batch:
    """The micro-batch of the first epoch with the most frames, as the run itself will make it."""
    steps = min(run.num_steps, max(1, run.step_at_epoch(1)))
    all_processes = (run.micro_batches(0, steps, process) for process in range(run.num_processes))

    def num_frames(positions: list[int]) -> int:
        return len(positions) * max(run.dataset.draw(position).length for position in positions)

    positions = max(itertools.islice(itertools.chain(*all_processes), MOST_LOOKED_AT), key=num_frames)
    return collate([run.dataset[position] for position in positions])


def _measure(run: Run, kept: KeptWeights | None, rendering: PreviewTimes | None) -> Need:
    config, memory = run.config, run.memory
    accelerator = make_accelerator(run.precision, run.device)
    device = run.device
    if kept is not None and memory.offloaded_share:
        kept.drop()  # as the run will
        kept = None
    transformer = run.checkpoint.load_transformer(
        device=device,
        dtype=run.dtype,
        quantization=memory.base_quantization,
        kept=kept,
        waiting_share=memory.offloaded_share,
    )
    offloaded = OffloadedBlocks(first_blocks(transformer, memory.offloaded_share), device)
    enable_gradient_checkpointing(transformer, memory.gradient_checkpointing, memory.checkpointed_share)
    weights = _gib(tensors_of(transformer)) - _gib(offloaded.tensors)
    adapter = config.adapter.attach(transformer)
    place(transformer, device, waiting=offloaded.tensors)
    parameters = list(adapter.parameters())
    attention = WindowedAttention(transformer, flex=config.attention_kernel is AttentionKernel.flex)
    if config.compile:
        compile_blocks(transformer, device)
    model, optimizer = accelerator.prepare(transformer, config.optim.build(parameters), device_placement=[False, True])
    forward = run.forward(model, attention, device)
    batch = longest_micro_batch(run).to(device)
    model.train()
    seconds = 0.0
    for step in range(2):
        began = time.monotonic()
        for index in range(memory.gradient_accumulation_steps):
            losses = forward(batch, step, index).losses.mean() / memory.gradient_accumulation_steps
            accelerator.backward(losses)
        grad_norm = accelerator.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        gradients = _gib(p.grad for p in parameters if p.grad is not None)
        update_unless_bad(optimizer, grad_norm, accelerator.scaler)
        optimizer.zero_grad()
        seconds = _seconds_since(began, device)
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    peak = used_gib(device)
    attention.set_padding(None, None)
    transformer.eval()
    with torch.no_grad(), accelerator.autocast():
        with blaming_evaluation(config.validation.seconds):
            per_song = _time_evaluation(run, transformer) if run.held_out else 0.0
        if rendering is not None:
            with blaming_previews(run.config.previews.seconds):
                rendering = _with_sampling(rendering, run, transformer)
    longest_seconds = batch.latents.shape[1] / FRAMES_PER_SECOND
    planned = replace(memory, batch_size=len(batch.latents), max_seconds=longest_seconds)
    plan = plan_memory(run.checkpoint.config, config.adapter, config.optim, planned, run.dtype)
    return Need(
        seconds_per_step=seconds,
        longest_seconds=longest_seconds,
        weights=weights,
        adapter=_gib(parameters),
        gradients=gradients,
        optimizer=_gib(moments),
        activations=plan.activations + plan.recomputed,
        peak=peak,
        seconds_per_song=per_song,
        previews=rendering,
    )


def _time_evaluation(run: Run, transformer: nn.Module) -> float:
    """Seconds that the longest held-out song takes, at all of its times."""
    settings = run.config.validation
    longest = max(run.all_songs.songs[number].num_frames for number in run.evaluated)
    num_frames = min(window_frames(settings.seconds), longest - longest % PATCH_FRAMES)
    sizes = [len(part) for part in torch.arange(settings.num_times).split(run.memory.batch_size)]
    return sum(_time_forward(run, transformer, size, num_frames) for size in sizes)


def _time_forward(run: Run, transformer: nn.Module, batch_size: int, num_frames: int) -> float:
    """Seconds of a forward pass alone."""
    device = run.device
    latents = torch.zeros(batch_size, num_frames, run.silence.shape[1], device=device)
    t = torch.full((batch_size,), 0.5, device=device)
    condition = run.all_songs.excerpt(0, 0, PATCH_FRAMES).condition.float().expand(batch_size, -1, -1).to(device)
    predict = predict_velocity(transformer, context_latents(run.silence.to(device), num_frames))
    began = time.monotonic()
    predict(latents, t, condition)
    return _seconds_since(began, device)


def _time_rendering(run: Run) -> PreviewTimes:
    """Render two pieces of one request with one sampling step each; the second file is one decoding after the first."""
    previews = Previews(run)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        files = render(
            run.checkpoint,
            None,
            previews.requests[:1],
            seeds=[0, 1],
            scales=[0.0],
            sampling=replace(previews.sampling, num_inference_steps=1),
            device=run.device,
            dtype=run.dtype,
            folder=Path(folder),
        )
        whole = time.monotonic() - began
        if len(files) != 2:
            raise UserError(f"previews of the base model are numbers that are not finite in {run.dtype}")
        first, second = (os.stat(Path(folder) / file.file).st_mtime_ns for file in files)
    gc.collect()
    piece = (second - first) / 1e9
    return PreviewTimes(models=max(0.0, whole - 2 * piece), sampling_step=0.0, piece=piece)


def _with_sampling(times: PreviewTimes, run: Run, transformer: nn.Module) -> PreviewTimes:
    """Add how long a sampling step takes; with guidance it is a batch of two."""
    request = Request(prompt="", seconds=run.config.previews.seconds)
    num_frames = request.num_frames + request.num_frames % PATCH_FRAMES
    batch_size = 2 if run.config.model_variant.guidance_scale > 1 else 1
    return replace(times, sampling_step=_time_forward(run, transformer, batch_size, num_frames))


def _seconds_since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


def _gib(tensors: object) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30  # type: ignore[attr-defined]
