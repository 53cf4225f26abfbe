"""Sweeps: one folder per point, a table that is always there, and what the same command does the second time."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import socket
import time
import weakref
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.core.utils import JobReturn, JobStatus
from safetensors.torch import load_file

import sidestep.sweep
from sidestep import cli
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.config.gate import check_swept, compose_hydra, compose_or_explain, parse_overrides, with_params
from sidestep.config.settings import TrainConfig
from sidestep.errors import PointFailed, SharedError, UserError
from sidestep.report import report_command
from sidestep.reporting.runs import (
    Plan,
    PlannedPoint,
    PointRecord,
    as_table,
    collect_points,
    ranked,
    read_plan,
    read_point,
)
from sidestep.sweep import check_launch, launch_points, record_point
from sidestep.times import now
from tests.factories import report_config
from tests.forked import run, start

QUICK = [
    "model_variant=base", "device=cpu", "optim.lr=0.01", "max_epochs=null", "log_every_steps=1", "name=s",
    "vram_profile.batch_size=1", "vram_profile.gradient_accumulation_steps=1",
    "vram_profile.gradient_checkpointing=none", "vram_profile.max_seconds=2",
]  # fmt: skip


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> list[str]:
    return [f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", *QUICK]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (run_dir / "final").glob("*.safetensors")
    return load_file(path)


def status_by(sweep_dir: Path, *keys: str) -> dict[str, str]:
    return {" ".join(point.settings[key] for key in keys): point.status for point in collect_points(sweep_dir)}


def test_a_sweep_ends_with_a_table_and_exit_code_1_if_a_point_failed(tmp_path, places):
    """Two points have a bad setting, one goes to infinity; the fourth finishes, and every error is in its own log."""
    code, text = run(tmp_path, "-m", *places, "max_steps=8", "adapter.rank=2,0", "optim.lr=0.01,1e37")
    assert code == 1
    sweep = tmp_path / "outputs/s"
    status = {"2 0.01": "finished", "2 1e+37": "failed", "0 0.01": "failed", "0 1e+37": "failed"}
    assert status_by(sweep, "adapter.rank", "optim.lr") == status
    assert "1 finished, 3 failed" in text
    assert text.count("failed: adapter.rank=0 must be at least 1") == 2
    assert "failed: 5 steps in a row" in text
    assert "Traceback" not in text

    points = {(point.settings["adapter.rank"], point.settings["optim.lr"]): point for point in collect_points(sweep)}
    best, broken = points["2", "0.01"], points["2", "1e+37"]
    assert "5 steps in a row" in (sweep / broken.name / "train.log").read_text()
    assert "5 steps in a row" not in (sweep / best.name / "train.log").read_text()
    assert best.objective == json.loads((sweep / best.name / "run.json").read_text())["smoothed_loss"]
    assert (best.step, best.num_steps) == (8, 8)
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    assert {f"{row['adapter.rank']} {row['optim.lr']}": row["status"] for row in rows} == status
    assert [row["point"] for row in json.loads((sweep / "sweep.json").read_text())] == [row["point"] for row in rows]


def test_killed_in_the_middle_and_typed_again_a_sweep_finishes_the_rest_only(tmp_path, places):
    """SIGKILL while the second of two points trains; a third is added the second time."""
    typed = ["-m", *places, "save_every_steps=5", "max_steps=12"]
    killed = start(tmp_path, *typed, "adapter=lora,lokr", "adapter.rank=2")
    sweep = tmp_path / "outputs/s"
    while not list(sweep.glob("lokr*/checkpoints/step_5")):
        assert killed.process.is_alive(), killed.text
        time.sleep(0.02)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.finish()
    assert status_by(sweep, "adapter") == {"lora": "finished", "lokr": "interrupted"}
    (finished,) = sweep.glob("lora*/run.json")
    before = finished.read_text()

    code, text = run(tmp_path, *typed, "adapter=loha,lokr,lora", "adapter.rank=2")
    assert code == 0, text
    assert "is finished at step 12; raise max_steps to train on" in text
    assert "/checkpoints/step_5 at step 5" in text
    assert finished.read_text() == before
    assert status_by(sweep, "adapter") == dict.fromkeys(("lora", "lokr", "loha"), "finished")


def test_points_in_one_process_end_as_if_each_had_one_of_its_own(tmp_path, places, monkeypatch):
    """LyCORIS, PEFT and Accelerate keep things from one run to the next; none of it may reach the next point.

    The base model is read once for each precision that follows another.
    """
    read = Checkpoint._read

    def and_say_so(self, part, *arguments):
        print("reading the", part)
        return read(self, part, *arguments)

    monkeypatch.setattr(Checkpoint, "_read", and_say_so)
    typed = [*places, "max_steps=3", "save_every_epochs=null"]
    code, text = run(tmp_path, "-m", *typed, "precision=bf16,fp32", "adapter=lokr,dora")
    assert code == 0, text
    assert text.count("reading the transformer") == 2
    points = [point for point in collect_points(tmp_path / "outputs/s") if point.settings["precision"] == "fp32"]
    assert len(points) == 2
    for point in points:  # which came after two others
        overrides = read_point(tmp_path / "outputs/s" / point.name).overrides
        (tmp_path / "alone").mkdir(exist_ok=True)
        code, text = run(tmp_path / "alone", *overrides)
        assert code == 0, text
        expected = final_weights(tmp_path / "alone/outputs/s" / point.name)
        torch.testing.assert_close(final_weights(tmp_path / "outputs/s" / point.name), expected, rtol=0, atol=0)


def test_a_point_that_another_process_is_training_is_left_alone(tmp_path, places):
    sweep = tmp_path / "outputs/s"
    code, _ = run(tmp_path, "-m", *places, "max_steps=-1,-2")
    assert code == 1
    folder, _ = (path.parent for path in sweep.glob("*/point.json"))
    busy = PointRecord(overrides=["max_steps=1"], started=now(), host=socket.gethostname(), process=os.getpid())
    busy.write(folder)
    code, text = run(tmp_path, "-m", *places, "max_steps=-1,-2")
    assert code == 1
    assert f"is being trained by process {os.getpid()} on {socket.gethostname()}" in text
    assert read_point(folder) == busy


@pytest.fixture
def point_dir(tmp_path, monkeypatch) -> Path:
    """The folder of the point that ``record_point`` is called for."""
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path / "s/a")), overrides=SimpleNamespace(task=[])
    )
    monkeypatch.setattr(sidestep.sweep, "HydraConfig", SimpleNamespace(get=lambda: hydra))
    (tmp_path / "s/a").mkdir(parents=True)
    return tmp_path / "s/a"


def test_a_failed_point_does_not_keep_its_model_alive(point_dir):
    """Hydra keeps what a point raised until the sweep ends."""
    seen = []

    def fail() -> None:
        model = torch.nn.Linear(2, 2)
        model.forward_before = model.forward  # refers to itself, as a patched model does
        seen.append(weakref.ref(model))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise UserError("the device ran out of memory") from error

    with pytest.raises(PointFailed, match="the device ran out of memory") as raised:
        record_point(fail)
    assert seen[0]() is None
    assert raised.value.__cause__ is None
    assert read_point(point_dir).error == "the device ran out of memory"


def test_what_one_of_several_processes_may_fail_of_alone_ends_the_sweep(point_dir, monkeypatch):
    """The others would wait for it in the middle of a step; a setting is refused by all of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(PointFailed):
        record_point(lambda: fail(SharedError("of a setting")))
    for alone in (UserError("too much"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(SystemExit):
            record_point(lambda alone=alone: fail(alone))
        assert str(alone) in read_point(point_dir).error


def test_a_point_that_another_process_is_training_ends_a_sweep_of_several_processes(point_dir, monkeypatch, caplog):
    """Only process 0 sees that it is; the others would begin it."""
    busy = PointRecord(overrides=[], started=now(), host=socket.gethostname(), process=os.getppid())
    busy.write(point_dir)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        record_point(lambda: 1.0)
    assert f"is being trained by process {os.getppid()}" in caplog.text
    assert read_point(point_dir) == busy


def test_a_record_that_cannot_be_written_ends_a_sweep_of_several_processes(point_dir, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PointRecord, "write", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        record_point(lambda: 1.0)
    assert "No space left on device" in caplog.text


def test_the_other_processes_of_a_failed_sweep_end_after_process_0_and_with_an_error(monkeypatch):
    """With exit code 0, torchrun would leave process 0 waiting for what only they were refused."""

    def main(**options):
        def job(task):
            def fail() -> None:
                waited.append(0)
                raise PointFailed("of a setting", in_all=True)

            return fail

        return job

    monkeypatch.setattr(cli, "_check", lambda *arguments: None)
    monkeypatch.setattr(cli.hydra, "main", main)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waited.append(seconds))
    monkeypatch.setattr("sys.argv", ["sidestep.train", "-m"])
    for number, expected in (("0", [0]), ("1", [0, cli.TABLE_SECONDS])):
        waited: list[float] = []
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as ended:
            cli._run("train", TrainConfig, lambda config: None, cli.read_arguments()[0])
        assert (ended.value.code, waited) == (1, expected)


def test_several_values_for_a_command_that_only_looks_leave_no_records(tmp_path):
    """What lies in the current folder is somebody's own, whatever it is called."""
    for name in "ab":
        (tmp_path / name / "x").mkdir(parents=True)
        PointRecord(overrides=["seed=1"], status="finished", objective=0.5).write(tmp_path / name / "x")
    own = [tmp_path / "sweep.csv", tmp_path / "0/point.json"]
    own[1].parent.mkdir()
    for path in own:
        path.write_text("mine")
    code, text = run(tmp_path, "-m", "sweep_dir=a,no,b", command="report")
    assert code == 1
    assert "sweep_dir=no holds no sweep" in text
    assert text.count("1 finished") == 2
    assert [path.read_text() for path in own] == ["mine", "mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "a", "b", "sweep.csv", "out-0.txt"}


def test_while_a_point_is_done_the_tables_say_so(point_dir):
    table = point_dir.parent / "sweep.json"
    table.write_text("[]")  # a moment ago, as at the end of the point before

    def status() -> list[str]:
        return [row["status"] for row in json.loads(table.read_text())]

    during: list[str] = []
    record_point(lambda: during.extend(status()))
    assert (during, status()) == (["running"], ["finished"])


def test_a_finished_point_that_is_typed_again_keeps_its_time(point_dir):
    def train() -> float:
        (point_dir / "run.json").write_text(json.dumps({"status": "finished", "finished": "2026-11-22T10:00:00Z"}))
        time.sleep(0.2)
        return 1.5

    record_point(train)
    first = read_point(point_dir)
    record_point(train)
    assert read_point(point_dir) == first
    assert first.seconds >= 0.2


def test_an_experiment_among_the_values_may_bring_what_is_missing():
    given = parse_overrides(["experiment=demo,null", "seed=0,1"])
    check_swept("train", compose_or_explain("train", ["name=s"]), ["name=s"], given)
    with pytest.raises(UserError, match="dataset_dir must be set"):
        check_swept("train", compose_or_explain("train", ["name=s"]), ["name=s"], given[1:])


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("cluster.partition=gpu,gpu-long", """if this is one value: cluster.partition="'gpu,gpu-long'\""""),
        ("cluster.nodes=range(1,3)", "all points of a sweep have one cluster.nodes; type one command for each"),
        ("cluster=slurm,null", "all points of a sweep have one cluster;"),
        ("local=a,b", "all points of a sweep have one local;"),
        ("sweep=lr,rank", "all points of a sweep have one sweep;"),
    ],
)
def test_what_is_read_once_for_all_points_has_one_value(typed, answer):
    with pytest.raises(UserError) as raised:
        check_swept("train", compose_or_explain("train", []), [], parse_overrides([typed]))
    assert answer in str(raised.value)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 must be at least 1"),
        (["cluster=slurm", "hydra/launcher=joblib"], "cluster=slurm submits the points, and hydra/launcher=joblib"),
        (["sweep=optuna", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0 must be at least 1"),
        (["sweep=optuna", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 must be at least 1"),
        (["sweep=optuna", "adapter=glob(zz*)"], "adapter=glob(zz*): this sweep takes no glob(...)"),
        (["sweep=optuna", "optim.lr=interval(1e-3,1e-5)"], "an interval begins below its end"),
        (["sweep=optuna", "hydra.sweeper.storage=sqlite:////nodir/x.db"], "there is no folder /nodir"),
        (["sweep=optuna", "adapter=oft"], "adapter.rank is a setting of"),
        (["optim.lr=interval(1e-5,1e-3)"], "only sweep=optuna chooses from an interval"),
    ],
)
def test_what_a_sweeper_or_launcher_would_break_down_at_is_refused(typed, answer):
    with pytest.raises(UserError) as raised:
        look_before_launch(*typed)
    assert answer in str(raised.value)


def test_a_sweep_that_can_begin_is_not_refused():
    look_before_launch("sweep=optuna", "dataset_dir=d")
    look_before_launch("cluster=slurm", "seed=0,1")


def look_before_launch(*typed: str) -> None:
    hydra, given = compose_hydra("train", typed), parse_overrides(with_params("train", typed))
    last = {override.key_or_group: override for override in given}.values()
    swept = [override for override in last if override.is_sweep_override()]
    check_launch("train", hydra, [o.input_line for o in last if o not in swept], swept)


class Killing:
    """A launcher of two processes, of which the one that does ``too_much`` is killed, and the other with it."""

    def __init__(self, too_much: Sequence[str]) -> None:
        self.too_much, self.launched = too_much, []

    def __call__(self, points: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
        self.launched.append([name for (name,) in points])
        under_way: list[str] = []
        for (name,) in points:
            here = {"started": now(), "host": socket.gethostname(), "process": 2**22 + 1}
            PointRecord(overrides=[name], **here).write(Path(name))
            under_way.append(name)
            if name in self.too_much:
                raise BrokenProcessPool
            if len(under_way) == 2:
                done = under_way.pop(0)
                PointRecord(overrides=[done], status="finished", ended=now(), objective=1.0).write(Path(done))
        for done in under_way:
            PointRecord(overrides=[done], status="finished", ended=now(), objective=1.0).write(Path(done))
        return [JobReturn(overrides=point, status=JobStatus.COMPLETED, _return_value=1.0) for point in points]


def test_of_a_process_that_is_killed_only_its_own_point_is_lost(tmp_path, monkeypatch):
    """Its neighbour goes on by itself, what was finished is not done again, and what was not begun is done."""
    monkeypatch.chdir(tmp_path)
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        Path(name).mkdir()
    launcher = Killing(too_much=["c"])
    returned = launch_points(launcher, [[name] for name in names], [tmp_path / name for name in names], 0)
    assert launcher.launched == [names, ["b"], ["c"], ["d", "e"]]
    assert [done.status is JobStatus.COMPLETED for done in returned] == [True, True, False, True, True]
    assert read_point(tmp_path / "c").error == "its process was killed, perhaps because memory ran out"


def test_processes_that_are_killed_before_they_begin_end_the_sweep(tmp_path):
    def launch(points: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
        raise BrokenProcessPool

    with pytest.raises(UserError, match="were killed before they began a point"):
        launch_points(launch, [["a"], ["b"]], [tmp_path / "a", tmp_path / "b"], 0)


def test_batches_after_one_with_a_failed_point_are_run_too(tmp_path, places):
    code, text = run(tmp_path, "-m", *places, "hydra.sweeper.max_batch_size=1", "max_steps=1", "adapter.rank=0,-1")
    assert code == 1
    assert "2 failed" in text
    assert "waiting" not in text


def test_what_a_sweep_file_of_ones_own_varies_names_the_points(tmp_path, places):
    (tmp_path / "mine/sweep").mkdir(parents=True)
    params = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"max_steps": "-1,-2"}}}}
    (tmp_path / "mine/sweep/mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(params)}")
    code, text = run(tmp_path, "--config-dir", str(tmp_path / "mine"), *places, "sweep=mine")
    assert (code, "2 failed" in text) == (1, True), text
    assert len(list(tmp_path.glob("outputs/s/*max_steps-*/point.json"))) == 2


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["optim.lr=1e-4,0.0001"], "which is there twice, would share the folder outputs/s/lora-base-lr0.0001"),
        (["name=na,nb"], "a sweep has one folder, outputs/s, and outputs/na would be another"),
        (["adapter.rank=2,abc"], "adapter.rank=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["local=mycluter", "seed=0,1"], "local=mycluter: no "),
        (["local=foo,bar"], "local=foo: no "),
        (["local=null"], "local=null: no "),
        (["hydra.sweeper.max_batch_size=0", "seed=0,1"], "hydra.sweeper.max_batch_size=0 must be a whole number"),
        (["experiment=demo,null"], "experiment=null chooses nothing; the options are demo"),
        (["adapter=glob(zz*)"], "adapter=glob(zz*) gives adapter no value, so there are no points"),
        (["seed=range(0,0)"], "seed=range(0,0) gives seed no value"),
        (["adapter=glob(*),lora"], "adapter=glob(*),lora: glob(...) or range(...) stands alone"),
        (["dataset_dir=???", "seed=0,1", "adapter=lora,lokr"], "dataset_dir must be set, for example dataset_dir="),
        (["adapter.rank=0"], "adapter.rank=0 must be at least 1"),
        (["name=../x", "seed=0,1"], "name='../x' must be a plain folder name"),
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing_behind(tmp_path, typed, answer):
    code, text = run(tmp_path, "-m", "dataset_dir=data", "model_variant=base", "name=s", *typed)
    assert code == 1
    assert answer in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("outputs/*/*"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("hydra/job_logging=disabled", "sweep_dir=nowhere holds no sweep"),
        ("hydra/job_logging=none", "sweep_dir=nowhere holds no sweep"),
        ("hydra.job_logging.root.level=FOO", "Unable to configure root logger (Unknown level: 'FOO')"),
    ],
)
def test_why_a_command_ends_is_said_however_logging_is_set(tmp_path, typed, answer):
    code, text = run(tmp_path, "sweep_dir=nowhere", typed, command="report")
    assert (code, text.count(answer)) == (1, 1), text
    assert "Traceback" not in text


def test_parts_are_all_that_several_values_make_of_a_dataset(tmp_path):
    code, text = run(tmp_path, "-m", "audio_dir=songs", "dataset_dir=d", "genre_ratio=1,2", command="preprocess")
    assert code == 1
    assert "genre_ratio=1 and genre_ratio=2 would share the folder d/logs/shard-None-of-None" in text
    code, text = run(tmp_path, "-m", "audio_dir=songs", "dataset_dir=a,b", command="preprocess")
    assert code == 1
    assert text.startswith("dataset_dir decides where a sweep lies")


def test_jobs_of_an_earlier_command_stay_in_the_plan_while_they_are_in_the_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(sidestep.sweep, "queued_jobs", lambda: {"7": "PENDING"})
    points = [PlannedPoint(overrides=[f"seed={n}"], job=job, folder=f"seed{n}") for n, job in ((1, "7"), (2, "8"))]
    Plan(launched=now(), points=points).write(tmp_path)
    sidestep.sweep.start_plan(tmp_path, [["seed=3"], ["+seed=1"]])
    sidestep.sweep.add_to_plan(tmp_path, [PlannedPoint(overrides=["+seed=1"], folder="seed1")])
    planned = {point.folder or point.overrides[0]: point.job for point in read_plan(tmp_path).points}
    assert planned == {"seed1": "7", "seed=3": ""}
    sidestep.sweep._launched.clear()


def test_a_run_by_itself_whose_process_is_gone_is_not_called_running(tmp_path):
    for name, process in (("gone", 2**22 + 1), ("here", os.getpid())):
        (tmp_path / name).mkdir()
        began = {"status": "running", "started": now(), "host": socket.gethostname(), "process": process}
        (tmp_path / name / "run.json").write_text(json.dumps(began))
    assert {point.name: point.status for point in collect_points(tmp_path)} == {
        "gone": "interrupted",
        "here": "running",
    }


def test_points_whose_names_were_cut_are_told_apart_by_columns(tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"lora-base-dataset_dirdata-0123456{number}"
        folder.mkdir()
        overrides = [f"dataset_dir=data/日本{number}", "optim.lr=0.1"]
        PointRecord(overrides=overrides, status="finished", objective=1.0).write(folder)
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert lines[0].split()[:3] == ["point", "dataset_dir", "status"]
    assert [line.split()[1] for line in lines[1:3]] == ["data/日本1", "data/日本2"]


def test_points_that_were_not_begun_are_in_the_table_too(tmp_path):
    (tmp_path / "a").mkdir()
    PointRecord(overrides=["seed=1"], status="finished", objective=0.5, seconds=90).write(tmp_path / "a")
    points = [PlannedPoint(overrides=["seed=1"]), PlannedPoint(overrides=["seed=2"])]
    Plan(launched="2026-11-22T10:00:00Z", points=points).write(tmp_path)
    rows = collect_points(tmp_path)
    assert [(row.name, row.status) for row in rows] == [("a", "finished"), ("", "waiting")]
    table = as_table(rows, tmp_path).splitlines()
    assert table[1].split() == ["a", "finished", "0.5000", "2", "min"]
    assert table[2].split() == ["seed=2", "waiting"]
    assert table[-1] == "1 finished, 1 waiting"


def test_a_run_that_was_typed_by_itself_and_then_in_a_sweep_is_one_row(tmp_path):
    """On a cluster nobody begins what is finished, so it never gets a record of the sweep."""
    for name, status in (("a", "finished"), ("b", "interrupted")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": status, "smoothed_loss": 0.5}))
    planned = [PlannedPoint(overrides=[f"adapter={name}", "seed=1"], folder=name) for name in ("a", "b", "c")]
    Plan(launched="2026-11-22T10:00:00Z", points=planned).write(tmp_path)
    rows = collect_points(tmp_path)
    assert [(row.name, row.status) for row in rows] == [("a", "finished"), ("b", "interrupted"), ("", "waiting")]
    assert all(row.settings["seed"] == "1" for row in rows)


def test_a_single_point_that_was_not_begun_is_called_by_its_folder(tmp_path):
    Plan(launched=now(), points=[PlannedPoint(overrides=["adapter=lora"], folder="a")]).write(tmp_path)
    assert as_table(collect_points(tmp_path), tmp_path).splitlines()[1].split() == ["a", "waiting"]


def test_a_job_that_ended_before_python_began_says_where_its_words_are(tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.reporting.runs.queued_jobs", dict)
    Plan(launched=now(), points=[PlannedPoint(overrides=["seed=1"], folder="a", job="7_0")]).write(tmp_path)
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert lines[1].split() == ["a", "interrupted", "7_0"]
    assert lines[2] == f"a interrupted: job 7_0 ended before it began; see {tmp_path}/.slurm/7_0"


def test_training_losses_on_other_songs_or_models_are_not_ranked(tmp_path):
    for name, settings in (("a", {"dataset": "1"}), ("b", {"dataset": "2"}), ("c", {"dataset": "1", "seed": 3})):
        folder = tmp_path / name
        folder.mkdir()
        PointRecord(overrides=[f"seed={name}"], status="finished", objective=1.0).write(folder)
        (folder / "run.json").write_text(json.dumps({"status": "finished", "smoothed_loss": 1.0, "settings": settings}))
    points = collect_points(tmp_path)
    assert "evaluated in 2 ways" in as_table(points, tmp_path)
    assert ranked(points) == []
    assert len(ranked([points[0], points[2]])) == 2


def test_of_many_points_the_terminal_shows_the_best_and_counts_the_rest(tmp_path):
    for number in range(60):
        folder = tmp_path / f"seed{number}"
        folder.mkdir()
        PointRecord(overrides=[f"seed={number}"], status="finished", objective=100.0 - number).write(folder)
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["seed59", "seed58", "seed57"]
    assert "50 more" in lines[-2]
    assert lines[-1] == "60 finished"


def test_a_report_writes_the_tables_of_a_sweep_anew(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    PointRecord(overrides=["seed=1"], status="finished", objective=0.5).write(tmp_path / "a")
    (tmp_path / "sweep.json").write_text("[]")
    report_command(report_config(f"sweep_dir={tmp_path}", "format=table"))
    assert "1 finished" in capsys.readouterr().out
    assert [row["status"] for row in json.loads((tmp_path / "sweep.json").read_text())] == ["finished"]


def test_points_that_were_evaluated_differently_are_not_ranked(tmp_path):
    for name, objective, evaluated in (("a", 2.0, "one"), ("b", 1.0, "other")):
        folder = tmp_path / name
        folder.mkdir()
        PointRecord(overrides=[f"seed={objective}"], status="finished", objective=objective).write(folder)
        measured = {"hash": evaluated, "best_loss": objective}
        (folder / "run.json").write_text(json.dumps({"status": "finished", "validation": measured}))
    lines = as_table(collect_points(tmp_path), tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a", "b"]
    assert "evaluated in 2 ways" in lines[-2]


def test_a_folder_that_is_no_sweep_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no sweep \(it is empty\)"):
        collect_points(tmp_path)
