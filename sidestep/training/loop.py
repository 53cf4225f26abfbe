"""The training loop. Read :func:`train` from top to bottom.

Shapes: B batch, T latent frames, L condition tokens, D their width.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.kept import KeptWeights
from sidestep.acestep.quantization import QuantizedLinear
from sidestep.adapters import Adapter
from sidestep.config.settings import AttentionKernel, TrainConfig
from sidestep.data.loader import read_batches
from sidestep.devices import place
from sidestep.errors import SharedError, UserError, shared
from sidestep.files import alone_in, remove_abandoned
from sidestep.processes import (
    Agreement,
    check_together,
    failing_together,
    finding_each_other,
    is_cut_off,
    meet,
    rank,
    share_only_trained,
)
from sidestep.seeds import derive_seed
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.diagnosis import explain_bad_step
from sidestep.training.ema import WeightMean
from sidestep.training.metrics import StepLog
from sidestep.training.offload import OffloadedBlocks, first_blocks
from sidestep.training.previews import Previews, out_of_the_way
from sidestep.training.run import Run, open_run
from sidestep.training.signals import Interrupted, StopSignals
from sidestep.training.validation import Validation

log = logging.getLogger(__name__)


def train(config: TrainConfig, output_dir: Path, choices: dict[str, str], kept: KeptWeights | None = None) -> float:
    """Train one adapter and return the number a sweep minimises: its best validation loss, or its smoothed loss.

    The same command again continues from the newest checkpoint in ``output_dir``, or returns the finished run's
    result.

    Args:
        config: every setting.
        output_dir: the run's folder.
        choices: the option chosen of each group.
        kept: weights of the base model, for the points of a sweep that follow each other in one process.

    Raises:
        UserError: for anything the user can mend.
    """
    with alone_in(output_dir) if rank() == 0 else nullcontext():
        with shared():
            run = open_run(config, output_dir, choices)
        if run.finished_loss is not None:
            return run.finished_loss
        try:
            return _train(run, kept)
        except torch.OutOfMemoryError as error:
            run.fail(error)
            raise UserError(
                f"the device ran out of memory ({' '.join(str(error).split())[:120]}); checkpoints are kept; "
                f"use a smaller max_seconds than {run.memory.max_seconds:g}, vram_profile.gradient_checkpointing=full, "
                f"vram_profile.batch_size=1, or vram_profile.base_quantization=int8, under another name=..."
            ) from error
        except BaseException as error:
            run.fail(error)
            if isinstance(error, RuntimeError) and is_cut_off(error):
                raise UserError(
                    "another process of this run has ended, and this one with it; why, is in what that one printed"
                ) from error
            if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # the CPU's
                raise UserError(
                    f"main memory ran out ({' '.join(str(error).split())[-80:]}); checkpoints are kept; "
                    f"use a smaller adapter.rank, max_seconds or vram_profile.batch_size, under another name=..."
                ) from error
            raise
        finally:
            # a sweep runs in one process: Accelerate would keep the first run's precision, and the model's patched
            # forward, which refers to itself, the first run's weights
            if config.compile:
                torch._dynamo.reset()  # what was compiled for this run's modules counts against the next one's limit
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _train(run: Run, kept: KeptWeights | None) -> float:
    config, memory = run.config, run.memory
    accelerator = make_accelerator(run.precision, run.device)
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")  # without an index
    with accelerator.main_process_first():  # it may set later checkpoints aside
        if accelerator.is_main_process:
            for folder in (run.output_dir, run.output_dir / "checkpoints", run.output_dir / "previews"):
                remove_abandoned(folder, alone=True)  # and bring back what a kill left without its name
        start = run.find_start()
    if accelerator.num_processes > 1:
        check_together(
            {
                "the number of processes": accelerator.num_processes,
                "the run's folder": str(run.output_dir.resolve()),
                "the step to start from": start.step if start is not None else 0,
                **run.record.settings,
            }
        )
    agreement = Agreement(accelerator.num_processes)
    with failing_together(accelerator.num_processes, agreement.wait):
        run.all_songs.check_tensors(
            run.output_dir, process=accelerator.process_index, num_processes=accelerator.num_processes
        )
    initial = run.read_initial() if start is None else None
    previews = Previews(run) if config.previews.every_epochs is not None else None
    if kept is not None and (previews is not None or memory.offloaded_share):
        kept.drop()  # rendering needs the memory, and what waits in main memory shall not be on the device too
        kept = None
    if previews is not None:
        if accelerator.is_main_process:
            previews.render_base()
        agreement.wait()
    transformer = run.checkpoint.load_transformer(
        device=device,
        dtype=run.dtype,
        quantization=memory.base_quantization,
        kept=kept,
        waiting_share=memory.offloaded_share,
    )
    offloaded = OffloadedBlocks(first_blocks(transformer, memory.offloaded_share), device)
    enable_gradient_checkpointing(transformer, memory.gradient_checkpointing, memory.checkpointed_share)
    attention = WindowedAttention(transformer, flex=config.attention_kernel is AttentionKernel.flex)
    validation = Validation(run, accelerator, transformer, attention) if run.held_out else None
    if validation is not None and start is not None:
        validation.catch_up(transformer, start.step)
    torch.manual_seed(derive_seed(config.seed, "adapter"))
    adapter = config.adapter.attach(transformer)
    if initial is not None:
        adapter.start_from(initial)
    describe_adapter(adapter, transformer)
    place(transformer, device, waiting=offloaded.tensors)  # an adapter begins where the weights are that it is for
    parameters = list(adapter.parameters())
    if config.compile:
        compile_blocks(transformer, device)
    if accelerator.num_processes > 1:
        share_only_trained(transformer)
    model, optimizer = accelerator.prepare(transformer, config.optim.build(parameters), device_placement=[False, True])
    if start is not None:
        adapter.load_state_dict(start.adapter)
        optimizer.load_state_dict(start.optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(start.scaler)
    first_step = start.step if start is not None else 0
    mean = None
    if config.ema_decay is not None:
        mean = WeightMean(adapter, config.ema_decay, start.ema if start is not None else {})
    if validation is not None:
        validation.restore(first_step)

    forward = run.forward(model, attention, device)
    order = run.micro_batches(first_step, run.num_steps, accelerator.process_index)
    batches = read_batches(run.dataset, order, device=device)
    steps = StepLog(run, accelerator, first_step, start.smoothed_loss if start is not None else None)

    def save(step: int) -> None:
        if accelerator.is_main_process and step > first_step and step != run.record.step:  # else it is saved already
            steps.sync()
            ema = mean.state() if mean is not None else {}
            scaler = accelerator.scaler
            run.save_checkpoint(step, steps.smoothed_loss, adapter, optimizer, scaler, ema=ema)

    def leave(step: int, number: int) -> NoReturn:
        """Save, and stop because of a signal that any process received; called by each of them."""
        save(step)
        agreement.close()
        accelerator.wait_for_everyone()  # a launcher ends all processes once one is gone
        raise Interrupted(signal.Signals(number))

    def stop_if_asked() -> None:
        """Leave what can be begun again, if any process was told to stop; called equally often by each of them."""
        if number := agreement.on_largest(stop.received or 0):
            raise Interrupted(signal.Signals(number))

    def look(step: int) -> None:
        """Evaluate the held-out songs."""
        assert validation is not None
        try:
            scalars = validation.evaluate(transformer, step, mean, stop_if_asked).scalars()
        except Interrupted as stopped:
            leave(step, stopped.received)
        steps.record_scalars(scalars | {"validation/best_loss": validation.best_loss}, step)
        if accelerator.is_main_process:
            if validation.best_step == step:
                if step == first_step:  # then best/ may be the best as other settings evaluated it
                    run.set_best_aside()
                run.save_adapter("best", step, adapter)
            run.record.validation = validation.summary()
            run.record.write()
        steps.start_clock()

    def listen(step: int) -> None:
        """Render previews on one process while the others wait; a signal ends it after the piece at hand."""
        assert previews is not None
        steps.flush()
        if accelerator.is_main_process:
            with out_of_the_way(model, optimizer, device):
                previews.render(adapter, step, steps, stop.raise_if_received)
        agreement.wait()
        if number := agreement.on_largest_now(stop.received or 0):
            leave(step, number)
        steps.start_clock()

    # fp16 finds its loss scale by overflowing, one halving per step, from 65,536
    max_bad_steps = config.max_bad_steps if accelerator.scaler is None else max(config.max_bad_steps, 20)

    model.train()
    run.begin(first_step)
    done = first_step
    with StopSignals() as stop, closing(batches), steps:
        if first_step:  # what was due there, if the run was stopped before it was done
            if validation is not None and validation.is_missing(first_step):
                look(first_step)
            if previews is not None and previews.are_missing(first_step):
                listen(first_step)
        for step in range(first_step, run.last_step):
            if validation is not None and validation.gave_up:
                break
            if accelerator.num_processes > 1 and (number := agreement.on_largest(stop.received or 0)):
                steps.flush()
                leave(step, number)
            lr = config.optim.lr * config.schedule.factor(step, run.num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            for micro_batch in range(memory.gradient_accumulation_steps):
                batch = next(batches).to(device)
                index = micro_batch * accelerator.num_processes + accelerator.process_index
                is_last = micro_batch + 1 == memory.gradient_accumulation_steps
                with nullcontext() if is_last else accelerator.no_sync(model):
                    losses, t = forward(batch, step, index)
                    micro_loss = losses.mean() / memory.gradient_accumulation_steps
                    accelerator.backward(micro_loss)
                loss += micro_loss.detach()
                steps.saw(batch, t)
                if stop.received is not None and accelerator.num_processes == 1:
                    # the unfinished step is done again when the run goes on
                    steps.flush()
                    save(step)
                    raise Interrupted(stop.received)
            loss = accelerator.reduce(loss, "mean")
            mark_bad_loss(parameters, loss)
            grad_norm = accelerator.clip_grad_norm_(parameters, config.optim.max_grad_norm)
            update_unless_bad(optimizer, grad_norm, accelerator.scaler)
            optimizer.zero_grad()
            if mean is not None:
                mean.update(step + 1, grad_norm.isfinite())
            steps.add(step + 1, loss, grad_norm, config.optim.applied_lr(optimizer.param_groups[0]))
            saves = run.checkpoint_name(step + 1) is not None
            if saves or (step + 1) % config.log_every_steps == 0:
                steps.flush()
            if steps.num_bad >= max_bad_steps:  # they changed nothing, so the state is that before the first
                save(step + 1 - steps.num_bad)
                raise SharedError(
                    f"{steps.num_bad} steps in a row, up to step {step + 1}, had a loss or gradient that is not "
                    f"finite, and changed nothing; {explain_bad_step(step, forward, run, adapter, accelerator)}; "
                    f"use a lower optim.lr than {config.optim.lr:g} or leave that song out, under another name=..."
                )
            done = step + 1
            if saves:
                save(done)
            if validation is not None and run.is_due(done, config.validation.every_epochs):
                steps.flush()
                look(done)
                if validation.gave_up:
                    save(done)
            if config.previews.every_epochs is not None and run.is_due(done, config.previews.every_epochs):
                listen(done)
        if validation is not None and validation.last_step != done:  # as where validation.patience was lowered
            look(done)
    attention.remove()
    for layer in transformer.layers:
        layer._compiled_call_impl = None  # what is compiled has the adapter in it, which finish takes off
    optimizer.state.clear()  # finish needs memory, and nothing is trained after it
    if accelerator.is_main_process:
        if mean is not None:
            with mean.in_place():
                run.save_adapter("final_ema", done, adapter)
        with accelerator.autocast():
            run.finish(adapter, transformer, done, steps.smoothed_loss)
    agreement.wait()
    if validation is not None:
        if not accelerator.is_main_process:
            adapter.detach()  # which finish did on the main process
        validation.conclude(transformer)
    agreement.close()
    if accelerator.is_main_process:
        run.announce()
    if stop.received is not None:  # while the last checkpoint was written; a sweep must not go on to its next point
        raise Interrupted(stop.received)
    return steps.smoothed_loss if validation is None else validation.best_loss


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Make the one object that knows about devices, number formats and processes.

    Raises:
        UserError: if a launcher started several processes that do not see each other, or the environment has Accelerate
            train in another way than the settings say.
    """
    refuse_environment()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    store = meet()
    with finding_each_other(world_size):
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu")
    del store
    if not accelerator.is_main_process:
        logging.getLogger("sidestep").setLevel(logging.WARNING)
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but this one sees {accelerator.num_processes}; "
            f"each would train alone"
        )
    return accelerator


NOT_FROM_ENVIRONMENT = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "; vram_profile.gradient_accumulation_steps says how many",
    "ACCELERATE_DYNAMO_BACKEND": "; compile=true compiles the model",
    "ACCELERATE_USE_DEEPSPEED": "; vram_profile.offloaded_share makes room on a card",
    "ACCELERATE_USE_FSDP": "; vram_profile.offloaded_share makes room on a card",
    "ACCELERATE_USE_MEGATRON_LM": "",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "",
}
"""What Accelerate would follow without a setting of sidestep saying so, and what does say so."""


def refuse_environment(env: Mapping[str, str] = os.environ) -> None:
    """Refuse what somebody, or ``accelerate config``, left in the environment and would make another run of this.

    Raises:
        UserError: naming the variable.
    """
    for key, instead in NOT_FROM_ENVIRONMENT.items():
        off = ("", "no", "false", "0", "1" if key.endswith("_STEPS") else "off")
        if env.get(key, "").lower() not in off:
            raise UserError(
                f"{key}={env[key]} is set in the environment and would change how this run trains; unset it, or answer "
                f"no in accelerate config{instead}"
            )


def mark_bad_loss(parameters: list[nn.Parameter], loss: Tensor) -> None:
    """Make a gradient NaN if the loss is not finite, since gradients can be finite where the loss overflowed.

    Done on the device, before clipping, so that fp16's scaler sees it too. A finite loss adds 0.

    Args:
        parameters: what is trained.
        loss: of the step, the same in all processes; a scalar.
    """
    next(parameter.grad for parameter in parameters if parameter.grad is not None).add_(0 * loss)


def update_unless_bad(optimizer: AcceleratedOptimizer, grad_norm: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    """Apply the gradient if it is finite, without waiting for the device where the optimiser can decide there.

    Args:
        optimizer: prepared by Accelerate.
        grad_norm: of all gradients, before clipping; a scalar on the device, not finite if any gradient is not.
        scaler: of fp16, which decides by itself.
    """
    inner = optimizer.optimizer
    if scaler is None and hasattr(inner, "_step_supports_amp_scaling"):  # torch's fused optimisers
        inner.grad_scale, inner.found_inf = None, (~grad_norm.isfinite()).float()
        optimizer.step()
    elif scaler is not None or grad_norm.isfinite():
        optimizer.step()


def compile_blocks(transformer: Any, device: torch.device, backend: str = "inductor") -> None:
    """Compile the blocks of a transformer, which are alike: the first two, one of each attention, serve for all.

    The first lengths that differ are compiled once more, for any length; with and without padding and gradients there
    are a few kinds of each, which is more than PyTorch's usual limit.

    Raises:
        UserError: on a CPU, where PyTorch 2.13 compiles a wrong backward pass: 3 per cent off on the bare model.
    """
    if device.type != "cuda" and backend == "inductor":
        raise UserError(f"compile=true needs a CUDA GPU, and this is {device.type}; leave it out")
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in transformer.layers:
        layer.compile(backend=backend)


def describe_adapter(adapter: Adapter, transformer: nn.Module) -> None:
    """Log what is trained, and every setting that has no effect."""
    counts = adapter.parameter_counts()
    total = sum(counts.values())
    frozen = sum(parameter.numel() for parameter in transformer.parameters()) - total
    frozen += sum(m.in_features * m.out_features for m in transformer.modules() if isinstance(m, QuantizedLinear))
    log.info("training %s parameters beside %s frozen ones:", f"{total:,}", f"{frozen:,}")
    for kind, count in counts.items():
        log.info("  %-20s %s", kind, f"{count:,}")
    for note in adapter.notes:
        log.warning("%s", note)
