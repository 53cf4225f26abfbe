"""Settings of sweeps and clusters, checked where there is neither."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from sidestep import slurm
from sidestep.config.cluster import SlurmConfig
from sidestep.config.gate import VERSION_BASE, compose_or_explain, conf_dir, launches_sweep, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.errors import UserError
from sidestep.files import hashes_of
from sidestep.preprocess import preprocess_command
from sidestep.reporting.runs import Plan, PlannedPoint, Point, as_csv, same_point
from sidestep.times import now
from tests.factories import preprocess_config, train_config
from tests.forked import run

SWEEPS = sorted(path for path in (conf_dir() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_ready_sweep_is_a_setting_that_exists(path):
    assert launches_sweep("train", [f"sweep={path.stem}", "dataset_dir=data"])
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
        assert override.is_sweep_override()
        if override.is_discrete_sweep():
            for value in override.sweep_string_iterator():
                train_config(f"{override.key_or_group}={value}")


def test_a_cluster_is_never_forgotten_for_want_of_m():
    assert launches_sweep("train", ["cluster=slurm"])
    assert launches_sweep("preprocess", ["cluster=slurm", "shard=range(0,2)", "num_shards=2"])
    assert not launches_sweep("train", ["adapter=lokr"])


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["cluster.partion=gpu"], "cluster.partion is not a setting; did you mean cluster.partition?"),
        (["cluster.time_minutes=1"], "cluster.signal_seconds=120 is no less than cluster.time_minutes=1"),
        (["cluster.nodes=0"], "cluster.nodes=0 must be at least 1"),
        (["cluster.signal_seconds=0"], "cluster.signal_seconds=0 must be at least 1"),
        (["cluster.sbatch=[--nodes=3, --exclusive]"], """: "cluster.sbatch=['--nodes=3','--exclusive']\""""),
        (["cluster.gpus_per_node=-1"], "cluster.gpus_per_node=-1 must be at least 0"),
        (["cluster.gpus_per_node=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (["cluster.sbatch=[exclude]"], "cluster.sbatch: 'exclude' must be one option, as in '--exclude=node7'"),
    ],
)
def test_a_mistake_in_the_settings_of_a_cluster_is_named(typed, answer):
    with pytest.raises(UserError) as raised:
        train_config("cluster=slurm", *typed)
    assert answer in str(raised.value)


def test_a_cluster_of_ones_own_defaults_can_be_taken_back(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /cluster: slurm\n")
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "local=mine"]
    assert launches_sweep("train", mine)
    assert not launches_sweep("train", [*mine, "cluster=none"])
    assert compose_or_explain("train", [*mine, "cluster=none"]).cluster is None


def test_several_processes_do_not_make_one_dataset(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is made by one process, and this is one of several"):
        preprocess_command(preprocess_config("audio_dir=a", "dataset_dir=b"))


def test_a_part_of_a_dataset_is_done_by_one_process():
    with pytest.raises(UserError, match="each shard is done by one process, not by 8"):
        preprocess_config("audio_dir=a", "dataset_dir=b", "cluster=slurm", "cluster.gpus_per_node=8")


def test_where_there_is_no_slurm_nothing_runs_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, text = run(tmp_path, "dataset_dir=data", "name=s", "cluster=slurm")
    assert code == 1
    assert text.splitlines() == [
        "cluster=slurm needs sbatch, which is not here; type this on a login node of the cluster"
    ]
    assert not list(tmp_path.glob("outputs/s/*/"))


@pytest.mark.parametrize(
    ("command", "typed", "answer"),
    [
        ("train", ["dataset_dir=d", "sweep=optuna", "cluster.wait=false"], "cluster.wait=false leaves before there is"),
        ("train", ["name=k", "seed=0,1"], "dataset_dir must be set"),
        ("train", ["dataset_dir=d", "seed=0,1", "adapter.rank=0"], "adapter.rank=0 must be at least 1"),
        (
            "preprocess",
            ["audio_dir=a", "dataset_dir=d", "num_shards=2", "shard=0,1", "cluster.gpus_per_node=8"],
            "each shard is done by one process, not by 8",
        ),
        ("preprocess", ["audio_dir=a", "dataset_dir=d", "num_shards=2"], "shard and num_shards belong together"),
        ("preprocess", ["audio_dir=a", "dataset_dir=d%", "num_shards=1", "shard=0"], "use another dataset_dir=..."),
    ],
)
def test_what_no_job_could_do_is_not_submitted(tmp_path, monkeypatch, command, typed, answer):
    (tmp_path / "sbatch").write_text("#!/bin/sh\ntouch submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = run(tmp_path, *typed, "cluster=slurm", command=command)
    assert code == 1
    assert answer in text
    assert "Traceback" not in text
    assert not (tmp_path / "submitted").exists()


def test_a_point_is_finished_only_while_its_files_and_songs_are_as_they_were(tmp_path, dataset_dir):
    typed = ["model_variant=base", f"dataset_dir={dataset_dir}", "name=s"]
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        composed = compose("train", typed, return_hydra_config=True)
    job = SimpleNamespace(point_config=lambda overrides: composed.copy())
    adapter = tmp_path / "final/adapter.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"weights")
    config = asdict(to_dataclass(compose_or_explain("train", typed), TrainConfig))
    record = {"status": "finished", "config": config, "final": hashes_of(adapter.parent), "finished": now()}

    def is_finished(**changes: object) -> bool:
        (tmp_path / "run.json").write_text(json.dumps(record | changes, default=str))
        return slurm.is_finished(job, typed, tmp_path)

    assert is_finished()
    assert not is_finished(finished="2020-01-01T00:00:00Z")  # before the songs were preprocessed
    assert not is_finished(config=config | {"seed": 5})
    adapter.write_bytes(b"weight")
    assert not is_finished()


def test_jobs_are_not_submitted_again_while_the_queue_cannot_be_asked(tmp_path, monkeypatch):
    Plan(launched=now(), points=[PlannedPoint(overrides=["seed=1"], job="7", folder="seed1")]).write(tmp_path)
    monkeypatch.setattr(slurm, "queued_jobs", lambda: {"7": "PENDING"})
    assert slurm._known_jobs(tmp_path, [tmp_path / "seed1", tmp_path / "seed2"]) == ["7", ""]
    monkeypatch.setattr(slurm, "queued_jobs", lambda: None)
    with pytest.raises(UserError, match="squeue does not say which jobs of"):
        slurm._known_jobs(tmp_path, [tmp_path / "seed1"])


def test_a_job_is_begun_again_only_as_often_as_allowed(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(UserError, match=r"begun again cluster.max_requeues=2 times"):
        slurm.requeue(2)


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, script: str) -> None:
    """Put a command of Slurm on the path that does what a shell script says."""
    (folder / command).write_text(f"#!/bin/sh\n{script}\n")
    (folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_that_slurm_does_not_begin_again_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    pretend(tmp_path, monkeypatch, "scontrol", "echo 'slurm_requeue error: Invalid job id' >&2; exit 1")
    with pytest.raises(UserError, match="does not begin this job again: slurm_requeue error: Invalid job id; what it"):
        slurm.requeue(2)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="scontrol: No such file or directory"):
        slurm.requeue(2)


def test_only_process_0_of_a_job_answers_a_signal_before_the_run_begins(monkeypatch):
    """The others may be needed by it until all have saved."""
    job = slurm.SlurmJob(None, None, OmegaConf.create({"cluster": OmegaConf.structured(SlurmConfig)}))
    monkeypatch.delenv("RANK", raising=False)
    seen = []

    def compose(*arguments):
        seen.append(signal.getsignal(signal.SIGUSR2))
        raise ZeroDivisionError

    monkeypatch.setattr(slurm.SlurmJob, "point_config", compose)
    monkeypatch.setattr(slurm, "setup_globals", lambda: None)
    before = signal.getsignal(signal.SIGUSR2)
    try:
        for number in ("0", "1"):
            monkeypatch.setenv("SLURM_PROCID", number)
            with pytest.raises(ZeroDivisionError):
                job([], 0, Singleton.get_state())
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert callable(seen[0])
    assert seen[1] is signal.SIG_IGN


def test_ctrl_c_cancels_what_is_in_the_queue_by_then_and_names_what_could_not_be(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = tmp_path / "asked"
    pretend(tmp_path, monkeypatch, "scancel", f"echo $* >> {asked}; test $1 != 9 || {{ echo gone >&2; exit 1; }}")
    monkeypatch.setattr(slurm, "queued_jobs", lambda: dict.fromkeys("789", "RUNNING"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for name, answer in (("8", "cancelled 1 jobs"), ("9", "not all of the 1 jobs were cancelled: gone")):
        jobs = ["", ""]

        def submit(jobs: list[str] = jobs, name: str = name) -> None:
            with slurm._cancelling_on_ctrl_c(jobs):
                jobs[0] = name
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            submit()
        assert answer in caplog.text
    assert asked.read_text().split() == ["8", "9"]


@pytest.mark.parametrize("name", ["optuna", "timesteps"])
def test_sweeps_whose_training_losses_do_not_compare_hold_songs_out(name):
    assert train_config(f"sweep={name}").validation.is_on


def test_a_point_is_the_same_wherever_it_runs():
    typed = ["optim.lr=0.1", "adapter=lokr"]
    assert same_point([*reversed(typed), "cluster=slurm", "cluster.wait=false", "local=mine"]) == same_point(typed)
    assert same_point(["optim.lr=0.2", "adapter=lokr"]) != same_point(typed)


def test_a_table_holds_any_text(tmp_path: Path):
    point = Point(name="a", status="failed", error='x,"y"\nz', settings={"name.with,comma": "ü"})
    assert as_csv([point]).splitlines()[0].endswith(',"name.with,comma"')
    assert '"x,""y""\nz"' in as_csv([point])
