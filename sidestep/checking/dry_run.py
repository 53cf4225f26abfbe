"""One step at the longest excerpt, to say what a run will need before it is begun; nothing of it is kept."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from sidestep.acestep.attention import WindowedAttention
from sidestep.data.dataset import collate
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.forward import Forward
from sidestep.training.loop import make_accelerator, update_unless_bad
from sidestep.training.run import Run
from sidestep.training.tracking import used_gib


@dataclass(frozen=True)
class Need:
    """What one step takes. Sizes are in GiB."""

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
    """Kept for the backward pass by one micro-batch."""
    peak: float
    """Measured on the device; on a CPU, memory that the whole process holds afterwards."""


def measure_step(run: Run) -> Need:
    """Train two steps on the longest excerpts, on the device the run would use.

    Args:
        run: opened, not begun.

    Raises:
        torch.OutOfMemoryError: if the device is too small.
    """
    try:
        return _measure(run)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(run: Run) -> Need:
    config, memory = run.config, run.memory
    accelerator = make_accelerator(run.precision, run.device)
    device = run.device
    transformer = run.checkpoint.load_transformer(device=device, dtype=run.dtype, quantization=memory.base_quantization)
    enable_gradient_checkpointing(transformer, memory.gradient_checkpointing, memory.checkpointed_share)
    weights = _gib(transformer.parameters())
    adapter = config.adapter.attach(transformer)
    parameters = list(adapter.parameters())
    attention = WindowedAttention(transformer)
    model, optimizer = accelerator.prepare(transformer, config.optim.build(parameters))
    forward = Forward(
        model,
        attention,
        objective=config.objective,
        timesteps=run.timesteps,
        condition_dropout=config.condition_dropout,
        silence=run.silence.to(device),
        null_condition=run.null_condition.to(device),
        seed=config.seed,
    )
    numbers = sorted(run.trained, key=lambda number: -run.all_songs.songs[number].num_frames)
    longest = (numbers * memory.batch_size)[: memory.batch_size]
    frames = 2 * int(memory.max_seconds * 25 / 2)
    examples = [
        run.all_songs.excerpt(number, 0, min(frames, run.all_songs.songs[number].num_frames // 2 * 2))
        for number in longest
    ]
    batch = collate(examples).to(device)
    model.train()
    kept = 0.0
    seconds = 0.0
    for step in range(2):
        began = time.monotonic()
        for index in range(memory.gradient_accumulation_steps):
            counting = _Kept(transformer) if step == 0 and index == 0 else nullcontext()
            with counting:
                losses = forward(batch, step, index).losses.mean() / memory.gradient_accumulation_steps
            if isinstance(counting, _Kept):
                kept = counting.gib
            accelerator.backward(losses)
        grad_norm = accelerator.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        gradients = _gib(p.grad for p in parameters if p.grad is not None)
        update_unless_bad(optimizer, grad_norm, accelerator.scaler)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return Need(
        seconds_per_step=seconds,
        longest_seconds=batch.latents.shape[1] / 25,
        weights=weights,
        adapter=_gib(parameters),
        gradients=gradients,
        optimizer=_gib(moments),
        activations=kept,
        peak=used_gib(device),
    )


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """While open, counts what is kept for the backward pass; parameters and buffers are there anyway."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        own = {t.untyped_storage().data_ptr() for t in [*transformer.parameters(), *transformer.buffers()]}
        self._sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def gib(self) -> float:
        return sum(self._sizes.values()) / 2**30


def _gib(tensors: object) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30  # type: ignore[attr-defined]
