"""Several processes of one run, on the CPU with gloo: what they train, and what stops them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.cli import run_command
from sidestep.config.settings import TrainConfig
from sidestep.errors import UserError
from sidestep.processes import join_processes, meet
from sidestep.train import train_command
from sidestep.training.loop import refuse_environment, train
from sidestep.training.signals import Interrupted
from sidestep.training.state import TrainingState
from tests.factories import choices_of, train_config
from tests.forked import Command, start_call

ROOT = Path(__file__).resolve().parents[1]
SONGS_PER_STEP = 4
ONE_SONG = ["vram_profile.batch_size=1", "vram_profile.gradient_accumulation_steps=1"]


@pytest.fixture
def typed(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, ...]:
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    return (
        *places,
        "adapter.rank=2",
        "max_epochs=null",
        "optim.lr=1e-3",
        "log_every_steps=5",
        "save_every_epochs=null",
    )


def start_group(folder: Path, world_size: int, call: Callable[[], object]) -> list[Command]:
    """Begin a function in several processes, with what torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder.mkdir(exist_ok=True)
    return [
        start_call(folder, call, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})
        for rank in range(world_size)
    ]


def training(world_size: int, *typed: str) -> Callable[[], object]:
    """A run into the folder run/, of four songs per step however many processes there are."""
    typed = (*typed, f"vram_profile.gradient_accumulation_steps={SONGS_PER_STEP // world_size}")
    config, choices = train_config(*typed), choices_of(*typed)

    def call() -> None:
        folder = Path("run")
        folder.mkdir(exist_ok=True)
        try:
            train(config, folder, choices)
        except UserError as error:
            sys.exit(str(error))
        except Interrupted as stop:
            sys.exit(stop.exit_code)

    return call


def sweeping(*typed: str) -> Callable[[], object]:
    """A sweep, as each process that torchrun starts runs it."""

    def call() -> None:
        sys.argv = ["sidestep.train", "-m", *typed, "model_variant=base", "device=cpu", "name=s", *ONE_SONG]
        run_command("train", TrainConfig, train_command)

    return call


def finish(group: list[Command], code: int = 0) -> None:
    for process in group:
        assert process.finish() == code, process.text


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "final").glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow  # two processes that stop and go on as another number of them are in the short form, below
def test_two_and_four_processes_train_the_adapters_that_one_would(tmp_path, typed):
    """Twenty steps of LoRA, DoRA and LoKr, one after the other in the same processes."""

    def all_three(processes: int) -> Callable[[], object]:
        adapters = ("lora", "dora", "lokr")
        calls = [(name, training(processes, *typed, f"adapter={name}", "max_steps=20")) for name in adapters]

        def call() -> None:
            for name, train_one in calls:
                Path(name).mkdir(exist_ok=True)
                os.chdir(name)
                train_one()
                os.chdir("..")

        return call

    for processes in (1, 2, 4):
        group = start_group(tmp_path / str(processes), processes, all_three(processes))
        finish(group)
        assert group[0].text.count("saved run/checkpoints") == 3
        assert not any("saved run/checkpoints" in other.text for other in group[1:])
    for adapter in ("lora", "dora", "lokr"):
        alone, two, four = (final_weights(tmp_path / str(n) / adapter / "run") for n in (1, 2, 4))
        torch.testing.assert_close(two, alone, atol=1e-6, rtol=0)
        torch.testing.assert_close(four, alone, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_a_frozen_base_spread_over_processes_trains_the_same_adapter(tmp_path, typed, adapter):
    """FSDP2 for the base, of which each process keeps a half; the adapter stays whole, and its files are the same."""
    typed = (*typed, f"adapter={adapter}", "max_steps=6", "log_every_steps=1")

    def spread() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from sidestep.training import loop, run

        share = loop.share_only_trained

        def and_spread(transformer: torch.nn.Module) -> None:
            mesh = init_device_mesh("cpu", (2,))
            for layer in transformer.layers:
                before = sum(parameter.numel() for parameter in layer.parameters())
                trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
                fully_shard(layer, mesh=mesh, ignored_params=trained)
                kept = sum(getattr(p, "_local_tensor", p).numel() for p in layer.parameters())
                assert kept < 0.6 * before + sum(p.numel() for p in trained)
            share(transformer)

        loop.share_only_trained = and_spread
        run.verify_saved = lambda *args: None  # it computes in process 0 alone, which has half of the base
        training(2, *typed)()

    for name, call in (("whole", training(2, *typed)), ("spread", spread)):
        finish(start_group(tmp_path / name, 2, call))
    whole, halves = tmp_path / "whole/run", tmp_path / "spread/run"
    torch.testing.assert_close(final_weights(halves), final_weights(whole), atol=1e-6, rtol=0)
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, halves)]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert {path.name for path in (halves / "final").iterdir()} == {path.name for path in (whole / "final").iterdir()}


def test_told_to_stop_all_processes_stop_at_one_step_and_another_number_of_them_goes_on(tmp_path, typed):
    """Only the second of two processes gets the signal; one process then ends what two began."""
    typed = (*typed, "adapter=lokr")
    group = start_group(tmp_path / "parts", 2, training(2, *typed, "max_steps=2000"))
    while "step 5 of" not in group[0].text:
        assert group[0].process.is_alive(), group[0].text
        time.sleep(0.02)
    os.kill(group[1].process.pid, signal.SIGUSR2)
    finish(group, 128 + signal.SIGUSR2)
    run = tmp_path / "parts/run"
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = json.loads((run / "run.json").read_text())["step"]
    assert checkpoint.name == f"step_{step}"

    for folder in ("parts", "whole"):
        finish(start_group(tmp_path / folder, 1, training(1, *typed, f"max_steps={step + 10}")))
    torch.testing.assert_close(final_weights(run), final_weights(tmp_path / "whole/run"), atol=1e-6, rtol=0)


def test_processes_with_different_settings_stop_before_they_train(tmp_path, typed):
    calls = [training(2, *typed, "max_steps=2", f"seed={seed}") for seed in (0, 1)]
    group = start_group(tmp_path, 2, lambda: calls[int(os.environ["RANK"])]())
    finish(group, 1)
    for process in group:
        assert "the processes of this run do not agree: seed is 0 in process 0 and 1 in process 1" in process.text
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_a_damaged_file_in_the_share_of_one_process_ends_both_with_its_name(tmp_path, typed, dataset_dir):
    data = shutil.copytree(dataset_dir, tmp_path / "data", ignore=shutil.ignore_patterns(".checked"))
    file = data / "conditions/song2.safetensors"  # every second file is the second process's
    parts = {key: part.clone() for key, part in load_file(file).items()}
    file.unlink()
    save_file(parts | {"caption": torch.full((4, 64), torch.nan)}, file)
    group = start_group(tmp_path, 2, training(2, *typed, "max_steps=2", f"dataset_dir={data}"))
    finish(group, 1)
    for process in group:
        assert "song2.safetensors of song2.wav holds NaN" in process.text
        assert "Traceback" not in process.text
    assert len((data / ".checked").read_text().split()) == 2 + 4  # of the second process until there, and of the first


@pytest.mark.slow
def test_told_to_stop_while_one_process_renders_previews_all_stop_and_render_them_later(tmp_path, typed):
    asked = ["previews.prompts=[piano]", "previews.seconds=1", "previews.num_inference_steps=1", "previews.scales=[1]"]
    train_four = training(2, *typed, *asked, "previews.every_epochs=2", "previews.seeds=[0,1]", "max_steps=4")

    def stopped() -> None:
        from sidestep.inference import previews

        sample = previews.sample_latents

        def sample_and_signal(*arguments, **options):
            print("sampling")
            signal.raise_signal(signal.SIGUSR2)
            return sample(*arguments, **options)

        previews.sample_latents = sample_and_signal
        train_four()

    group = start_group(tmp_path, 2, stopped)
    finish(group, 128 + signal.SIGUSR2)
    assert group[0].text.count("sampling") == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_2"]
    finish(start_group(tmp_path, 2, train_four))
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == ["step_2", "step_4"]


@pytest.mark.slow
def test_a_failure_of_one_process_alone_ends_a_sweep_and_one_of_all_does_not(tmp_path, typed):
    """The losses of the first point are not finite in either, and process 0 cannot write a checkpoint of the second."""

    def call() -> None:
        from sidestep.training import run

        save = run.save_checkpoint

        def save_or_fail(folder: Path, state: TrainingState, *arguments: Callable[[Path], None]) -> None:
            if state.step == 4:
                raise OSError(errno.ENOSPC, "No space left on device", "full")
            save(folder, state, *arguments)

        run.save_checkpoint = save_or_fail  # which process 0 alone calls
        sweeping(*typed, "schedule.warmup_steps=0", "max_bad_steps=2", "max_steps=4", "optim.lr=1e37,1e-3,2e-3")()

    group = start_group(tmp_path, 2, call)
    finish(group, 1)
    assert "2 failed, 1 waiting" in group[0].text
    assert "steps in a row" in group[0].text
    assert "failed: full: No space left on device" in group[0].text
    assert "another process of this run has ended" in group[1].text
    assert not any("Traceback" in process.text for process in group)


@pytest.mark.slow
def test_torchrun_starts_one_run_of_several_processes(tmp_path, typed):
    """The launch path as it is typed; the processes are new ones, not copies of this."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "sidestep.train", *typed, *ONE_SONG, "model_variant=base", "max_steps=2", "device=cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "steps 1 to 2 of 2 songs each" in done.stderr
    assert done.stderr.count("saved outputs") == 1


def meeting(*sizes: int) -> list[str]:
    """What each of several processes answers that were told different numbers of them; empty if nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def answer(number: int) -> str:
        env = {"RANK": str(number), "WORLD_SIZE": str(sizes[number]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            held.append(meet(env, patience=timedelta(seconds=1)))
        except UserError as error:
            return str(error)
        return ""

    held: list[object] = []
    with ThreadPoolExecutor(len(sizes)) as threads:
        return list(threads.map(answer, range(len(sizes))))


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_processes_that_were_told_different_numbers_of_them_say_so_at_once(sizes):
    for answer in meeting(*sizes):
        assert f"do not agree: WORLD_SIZE is {sizes[0]} in process 0 and {sizes[1]} in process 1; start all" in answer


def test_processes_meet_and_one_that_never_comes_is_not_waited_for_in_silence():
    assert meeting(2, 2) == ["", ""]
    (answer,) = meeting(2)
    assert answer.startswith("the 2 processes of this run did not find each other")
    with pytest.raises(UserError, match="RANK=1 is no process of WORLD_SIZE=1"):
        meet({"RANK": "1", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "1"),
    ],
)
def test_what_the_environment_would_change_about_a_run_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}={value} is set in the environment"):
        refuse_environment({key: value})
    launched = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    refuse_environment(launched | {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16"})


def test_the_tasks_of_a_slurm_step_become_processes_of_one_run():
    env = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1",
    }  # fmt: skip
    join_processes(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("3", "4", "1", "2")
    assert 20000 <= int(env["MASTER_PORT"]) <= 32000


def test_a_batch_script_without_srun_is_one_process():
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    join_processes(env)
    assert "WORLD_SIZE" not in env


def test_tasks_that_would_each_train_alone_are_refused():
    env = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1", "RANK": "0"}
    with pytest.raises(UserError, match="srun started 4 tasks, but WORLD_SIZE=1"):
        join_processes(env)
    alone = {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}  # torchrun --standalone in each
    with pytest.raises(UserError, match="srun started 4 tasks, but GROUP_WORLD_SIZE=1"):
        join_processes(env | alone)
    join_processes(env | alone | {"GROUP_WORLD_SIZE": "4"})
