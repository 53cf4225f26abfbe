"""Several processes of one run: which of them this is, and how they find each other.

torchrun and ``accelerate launch`` tell their processes by RANK, WORLD_SIZE and so on, which is what torch and
Accelerate read. Slurm has names of its own; they are translated here, once, so that everything else has one way.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sidestep.errors import SharedError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


TO_BEGIN = timedelta(minutes=5)
"""How long the processes of a run wait for the last of them to begin; one may import PyTorch from a slow disk."""


def join_processes(env: MutableMapping[str, str] = os.environ) -> None:
    """In a Slurm step of several tasks, make each task one process of one run.

    Only ``srun`` makes steps of several tasks: SLURM_NTASKS and SLURM_PROCID are there in a batch script too, where
    nobody has started the other tasks.

    Raises:
        UserError: if a launcher made a smaller group than there are tasks, which would train beside each other.
    """
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_STEP_ID" in env else 1
    if tasks == 1:
        return
    if "WORLD_SIZE" in env:  # torchrun inside srun, which starts a group of processes in each task; or this function
        size = "GROUP_WORLD_SIZE" if "GROUP_WORLD_SIZE" in env else "WORLD_SIZE"
        if int(env[size]) < tasks:
            raise UserError(
                f"srun started {tasks} tasks, but {size}={env[size]}, so several runs would train beside each other; "
                f"unset WORLD_SIZE and RANK, start one task, or tell torchrun of all nodes instead of --standalone"
            )
        return
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        asked = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
        env["MASTER_ADDR"] = asked.stdout.split()[0]
    step = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}"
    env.setdefault("MASTER_PORT", str(random.Random(step).randint(20000, 32000)))  # below the ports Linux gives out
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], str(tasks), env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(tasks // int(env.get("SLURM_STEP_NUM_NODES", "1")))


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))  # the latter until they were joined


def slurm_job() -> str:
    """Number of the Slurm job that this process belongs to, as ``squeue`` shows it; empty outside of one."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def meet(env: Mapping[str, str] = os.environ, patience: timedelta = TO_BEGIN) -> Any:
    """Wait until all processes of a run are there, and compare how many each of them was told there are.

    torch would let those that were told different numbers wait for each other, without a word, for up to half an hour.

    Args:
        env: what the launcher told this process.
        patience: how long to wait.

    Returns:
        What process 0 must hold until the processes are connected; None for a process by itself.

    Raises:
        UserError: in every process, if they were told different numbers or do not find each other.
    """
    told = {key: env.get(key, "") for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    number, size = int(told["RANK"] or 0), int(told["WORLD_SIZE"] or 1)
    if number >= size:
        raise UserError(f"RANK={number} is no process of WORLD_SIZE={size}; {_TOLD_ALIKE}")
    if size == 1 or not all(told.values()):
        return None
    with finding_each_other(size):
        from torch.distributed import TCPStore, is_initialized

        if is_initialized():  # for an earlier point of a sweep
            return None
        serves = number == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # which torchrun does by itself
        address = told["MASTER_ADDR"], int(told["MASTER_PORT"])
        store = TCPStore(*address, is_master=serves, timeout=patience, wait_for_workers=False, multi_tenant=True)
        prefix = f"sidestep/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store.set(f"{prefix}/{number}", str(size))
        if number == 0:
            others = ((other, int(store.get(f"{prefix}/{other}"))) for other in range(size))
            differ = next((f"{theirs} in process {other}" for other, theirs in others if theirs != size), "")
            store.set(f"{prefix}/differ", differ and f"{size} in process 0 and {differ}")
        if found := store.get(f"{prefix}/differ").decode():
            time.sleep(1 if serves else 0)  # until the others have read it
            raise UserError(f"the processes of this run do not agree: WORLD_SIZE is {found}; {_TOLD_ALIKE}")
    return store


_TOLD_ALIKE = "start all of them with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and each with a RANK of its own"


@contextmanager
def finding_each_other(num_processes: int) -> Iterator[None]:
    """Around what connects the processes of a run.

    Raises:
        UserError: in place of torch's errors, where one of them is gone or never came.
    """
    if num_processes == 1:
        yield
        return
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        said = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the {num_processes} processes of this run did not find each other ({said:.200}); {_TOLD_ALIKE}"
        ) from error


def check_together(facts: Mapping[str, Any]) -> None:
    """Compare what the processes of a run know, before any of them trains.

    Args:
        facts: what must be the same in all of them; called by each with its own.

    Raises:
        UserError: in every process, naming the first that differs from process 0 and in what.
    """
    from accelerate.utils import gather_object

    everybody = gather_object([dict(facts)])
    for number, theirs in enumerate(everybody):
        for key, value in everybody[0].items():
            if theirs[key] != value:
                raise UserError(
                    f"the processes of this run do not agree: {key} is {value} in process 0 and {theirs[key]} in "
                    f"process {number}; start them all with the same command, on the same files"
                )


@contextmanager
def failing_together(num_processes: int, wait: Callable[[], None]) -> Iterator[None]:
    """Raise what one process cannot go on with in every process, so that none waits for one that is gone.

    Args:
        num_processes: of this run; each must come here, with work of its own in the block.
        wait: for all processes, however long one of them is at work, as an :class:`Agreement` does.

    Raises:
        SharedError: in the others, with the words of the first error of the block of any process.
        Exception: what was raised in the block of this process, if that is no UserError.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    if num_processes > 1:
        from accelerate.utils import gather_object

        wait()  # the gathering itself, by way of GPUs, has no patience
        text = None if mine is None else str(mine) if isinstance(mine, UserError) else f"{type(mine).__name__}: {mine}"
        theirs = [text for text in gather_object([text]) if text is not None]
        if theirs and (mine is None or isinstance(mine, UserError)):
            raise SharedError(theirs[0]) from mine
    if mine is not None:
        raise mine


_CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""In the words of gloo and NCCL."""


def is_cut_off(error: Exception) -> bool:
    """Whether an error says no more than that another process of the run has ended."""
    return any(words in str(error) for words in _CUT_OFF)


def share_only_trained(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave alone what is the same in every process: frozen weights and buffers.

    It would send all of the base model over the network when it begins, and every buffer in each step.
    """
    from torch.nn.parallel import DistributedDataParallel

    same = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    same += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, same)


PATIENCE = timedelta(hours=2)
"""How long processes wait for one that renders or writes; one whose process ended is noticed at once."""


class Agreement:
    """One number that all processes of a run come to know in the same step, for example a signal that one received.

    It goes over the processors' own network (gloo), so that no step waits for a GPU, and while the next step is
    computed: what is told in one step is known in the next.

    Args:
        num_processes: one process agrees with itself at once.
    """

    def __init__(self, num_processes: int) -> None:
        self._group: Any = None
        self._asked: tuple[Tensor, Any] | None = None
        if num_processes > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def on_largest(self, number: int) -> int:
        """Tell a number; give the largest that any process told in the call before.

        Every process must call it equally often.
        """
        if self._group is None:
            return number
        import torch

        known = self._answer()
        told = torch.tensor([number])
        maximum = torch.distributed.ReduceOp.MAX
        self._asked = told, torch.distributed.all_reduce(told, maximum, group=self._group, async_op=True)
        return known

    def on_largest_now(self, number: int) -> int:
        """Tell a number, wait for all processes, and give the largest; each of them must call it here."""
        self.on_largest(number)  # whose answer is to an earlier call
        return self.on_largest(number)

    def wait(self) -> None:
        """Wait for all processes, however long one of them is at work; waiting by way of GPUs ends in an error."""
        if self._group is not None:
            import torch.distributed

            torch.distributed.barrier(self._group)

    def close(self) -> None:
        """Wait for the last answer; not after an error, since the others may never give one."""
        self._answer()
        if self._group is not None:
            import torch.distributed

            torch.distributed.destroy_process_group(self._group)

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        told, work = self._asked
        work.wait()
        self._asked = None
        return int(told)
