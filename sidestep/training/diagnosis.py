"""Why a step had a loss or gradient that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sidestep.acestep.keymap import to_original
from sidestep.adapters import Adapter
from sidestep.data.dataset import collate
from sidestep.training.forward import Forward
from sidestep.training.run import Run


def explain_bad_step(step: int, forward: Forward, run: Run, adapter: Adapter, accelerator: Accelerator) -> str:
    """Do a step again, which its seeds make exact, and name the songs, times and layers that go wrong.

    Args:
        step: counted from 0; the adapter must be as it was then, which it is if the update was not applied.
        forward: of the loop.
        run: the run.
        adapter: what is trained.
        accelerator: of the loop.
    """
    layers: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(_note_first(name, layers))
        for name, module in accelerator.unwrap_model(forward.model).named_modules()
    ]
    songs = []
    try:
        for i, positions in enumerate(run.micro_batches(step, step + 1, accelerator.process_index)):
            batch = collate([run.dataset[position] for position in positions]).to(accelerator.device)
            index = i * accelerator.num_processes + accelerator.process_index
            losses, t = forward(batch, step, index)
            accelerator.backward(losses.mean())
            names = [run.dataset.songs[song].audio for song in batch.songs]
            songs += [f"{name} at t={time:.3f}" for name, time in zip(names, t.tolist(), strict=True)]
    finally:
        for hook in hooks:
            hook.remove()
    gradients = [
        f"{path}.{leaf}"
        for path, leaves in adapter.weights().items()
        for leaf, parameter in leaves.items()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    if layers:
        where = f"first in the output of {next(iter(layers))}"
    else:
        where = f"in the gradient of {_some(gradients)}" if gradients else "in the loss"
    return f"the songs were {', '.join(songs)}; it arises {where}"


def _note_first(name: str, layers: dict[str, None]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            layers[to_original(name) or "the transformer"] = None

    return hook


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
