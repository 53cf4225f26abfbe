"""The training loop. Read :func:`train` from top to bottom.

Shapes: B batch, T latent frames, L condition tokens, D their width.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from sidestep.acestep.conditioning import context_latents
from sidestep.acestep.padding import PaddingMasks
from sidestep.adapters import Adapter
from sidestep.config.settings import TrainConfig
from sidestep.data.loader import read_batches
from sidestep.data.sampler import MicroBatchSampler
from sidestep.errors import UserError
from sidestep.seeds import derive_seed
from sidestep.training.flow import draw_noising
from sidestep.training.metrics import StepLog
from sidestep.training.run import Run, open_run

log = logging.getLogger(__name__)


def train(config: TrainConfig, output_dir: Path, choices: dict[str, str]) -> float:
    """Train one adapter and return its smoothed loss, the number a sweep minimises.

    The same command again continues from the newest checkpoint in ``output_dir``, or returns the finished run's
    result.

    Args:
        config: every setting.
        output_dir: the run's folder.
        choices: the option chosen of each group.

    Raises:
        UserError: for anything the user can mend.
    """
    run = open_run(config, output_dir, choices)
    if run.finished_loss is not None:
        return run.finished_loss
    try:
        return _train(run)
    except BaseException as error:
        run.fail(error)
        raise
    finally:  # a sweep runs in one process, and Accelerate keeps the first run's precision otherwise
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _train(run: Run) -> float:
    config, memory = run.config, run.memory
    accelerator = make_accelerator(run.precision, run.device)
    start = run.find_start()
    transformer = run.checkpoint.load_transformer(device=accelerator.device, dtype=run.dtype)
    if memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(derive_seed(config.seed, "adapter"))
    adapter = config.adapter.attach(transformer)
    describe_adapter(adapter, transformer)
    parameters = list(adapter.parameters())
    masks = PaddingMasks(transformer)
    model, optimizer = accelerator.prepare(transformer, config.optim.build(parameters))
    if start is not None:
        adapter.load_state_dict(start.adapter)
        optimizer.load_state_dict(start.optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(start.scaler)
    first_step = start.step if start is not None else 0

    silence = run.checkpoint.silence().to(accelerator.device)
    null_condition = run.checkpoint.null_condition().to(accelerator.device)
    timesteps = config.timesteps.with_defaults(run.checkpoint.config.timestep_mu, run.checkpoint.config.timestep_sigma)
    order = MicroBatchSampler(
        first_step=first_step,
        last_step=run.num_steps,
        batch_size=memory.batch_size,
        accumulation=memory.gradient_accumulation_steps,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    batches = read_batches(run.dataset, order, pin_memory=accelerator.device.type == "cuda")
    smoothed_loss = start.smoothed_loss if start is not None else None

    model.train()
    run.begin(first_step)
    with closing(batches), StepLog(run, accelerator, first_step, smoothed_loss) as steps:
        for step in range(first_step, run.num_steps):
            lr = config.optim.lr * config.schedule.factor(step, run.num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=accelerator.device)
            for micro_batch in range(memory.gradient_accumulation_steps):
                batch = next(batches).to(accelerator.device)
                index = micro_batch * accelerator.num_processes + accelerator.process_index
                generator = seed_micro_batch(config.seed, step, index)
                noising = draw_noising(batch.latents, timesteps, config.condition_dropout, generator)
                masks.set(batch.frame_mask, batch.condition_mask)
                context = context_latents(silence, batch.latents.shape[1])
                is_last = micro_batch + 1 == memory.gradient_accumulation_steps
                with nullcontext() if is_last else accelerator.no_sync(model):
                    losses = config.objective.loss(
                        predict_velocity(model, context),
                        batch.latents,
                        batch.condition.float(),
                        null_condition,
                        noising,
                        batch.frame_mask,
                    )
                    micro_loss = losses.mean() / memory.gradient_accumulation_steps
                    accelerator.backward(micro_loss)
                loss += micro_loss.detach()
                steps.saw_times(noising.t)
            grad_norm = accelerator.clip_grad_norm_(parameters, config.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps.add(step + 1, loss, grad_norm, lr)
            if run.checkpoint_name(step + 1) or (step + 1) % config.log_every_steps == 0:
                steps.flush()
            if accelerator.is_main_process and run.checkpoint_name(step + 1):
                run.save_checkpoint(step + 1, steps.smoothed_loss, adapter, optimizer, accelerator.scaler)
    masks.remove()
    if accelerator.is_main_process:
        with accelerator.autocast():
            run.finish(adapter, transformer, steps.smoothed_loss)
    return steps.smoothed_loss


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Make the one object that knows about devices, number formats and processes.

    Raises:
        UserError: if a launcher started several processes that do not see each other.
    """
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but this one sees {accelerator.num_processes}; "
            f"each would train alone"
        )
    return accelerator


def seed_micro_batch(seed: int, step: int, index: int) -> torch.Generator:
    """Make every draw of a micro-batch depend on nothing but these three numbers.

    A continued run then repeats what an unbroken one would have drawn, and two GPUs draw what one GPU with twice the
    accumulation would.

    Returns:
        A CPU generator for noise, times and condition dropout; the adapter's dropout draws from the global one.
    """
    torch.manual_seed(derive_seed(seed, "dropout", step, index))
    return torch.Generator().manual_seed(derive_seed(seed, "noise", step, index))


def predict_velocity(model: nn.Module, context: Tensor) -> Any:
    """Give the transformer the form that an objective calls.

    Args:
        model: the transformer.
        context: (T, 128), the same for every example of a batch.

    Returns:
        A function of noisy latents (B, T, C), times (B,) and condition (B, L, D) that gives the velocity (B, T, C).
    """

    def predict(noisy_latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return model(
            hidden_states=noisy_latents,
            timestep=t,
            timestep_r=t,  # the mean-flow input, which ACE-Step sets equal to t in training and sampling
            encoder_hidden_states=condition,
            context_latents=context.expand(len(noisy_latents), -1, -1),
            return_dict=False,
        )[0]

    return predict


def describe_adapter(adapter: Adapter, transformer: nn.Module) -> None:
    """Log what is trained, and every setting that has no effect."""
    counts = adapter.parameter_counts()
    total = sum(counts.values())
    frozen = sum(parameter.numel() for parameter in transformer.parameters()) - total
    log.info("training %s parameters beside %s frozen ones:", f"{total:,}", f"{frozen:,}")
    for kind, count in counts.items():
        log.info("  %-20s %s", kind, f"{count:,}")
    for note in adapter.notes:
        log.warning("%s", note)
