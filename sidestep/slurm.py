"""The points of a sweep as jobs of a Slurm cluster.

Submitit writes the batch scripts, pickles what is to run and submits arrays. What the jobs come to is read from
the folders of the points and from ``squeue``, so no result is lost with a job, and nothing depends on accounting.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sidestep.config.cluster import SlurmConfig
from sidestep.config.gate import to_dataclass
from sidestep.errors import PointFailed, UserError
from sidestep.files import hashes_of
from sidestep.processes import rank, slurm_job
from sidestep.records import parse_record
from sidestep.reporting.runs import PlannedPoint, PointRecord, objective_of, queued_jobs, read_plan, read_point
from sidestep.sweep import add_to_plan, is_grid, update_tables
from sidestep.times import at, now
from sidestep.training.signals import Interrupted

log = logging.getLogger(__name__)

ARRAY_SIZE = 1000
"""Points of one array; Slurm's default limit is 1,001."""
SLOWEST_POLL = 10.0
"""Seconds between two looks at the queue, once a sweep has run for a while."""


@dataclass
class SlurmJob:
    """What a job runs: one point. It is pickled by the launching process and called on the node."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    @property
    def cluster(self) -> SlurmConfig:
        """The typed settings.

        Raises:
            UserError: if they contradict each other.
        """
        try:
            settings = OmegaConf.to_object(self.config.cluster)
        except OmegaConfBaseException as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        assert isinstance(settings, SlurmConfig)
        return settings

    def point_config(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the config of one point."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        assert isinstance(config, DictConfig)
        return config

    def __call__(self, overrides: list[str], number: int, state: Any) -> None:
        """Run the point on the node.

        Slurm sends SIGUSR2 to every process of the job when its time runs out or it is preempted. By default it kills,
        so it is ignored until here (see ``_python``), and again once the point is over, since Python gives signals
        their defaults back while it shuts down.

        Raises:
            PointFailed: so that the job fails in Slurm, too.
        """
        most = self.cluster.max_requeues
        # before a run has begun to train, nothing is to save; the other processes leave that to process 0, which may be
        # training already, and then needs them until all have agreed to stop
        signal.signal(signal.SIGUSR2, signal.SIG_IGN if rank() else lambda *_: requeue(most))
        Singleton.set_state(state)
        setup_globals()
        config = self.point_config(overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = slurm_job(), number
        try:
            done = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Interrupted as stop:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            if stop.received == signal.SIGUSR2:
                try:
                    requeue(most)
                except UserError as error:
                    _write_failure(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir, str(error))
                    raise PointFailed(str(error)) from None
            else:  # a preempted job is requeued by Slurm only if it is still there, and a cancelled one is ended
                time.sleep(600)
            raise
        finally:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if done.status is JobStatus.FAILED:
            raise done._return_value


def requeue(max_requeues: int) -> None:
    """Ask Slurm to start this job again, which it does in the same folder; the process ends.

    Raises:
        UserError: in process 0, if that was done too often or Slurm does not do it.
    """
    if rank() == 0:
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= max_requeues:
            raise UserError(
                f"this job was begun again cluster.max_requeues={max_requeues} times and is not done; "
                f"what it saved is kept, and the same command goes on from it"
            )
        log.info("going on in a new job")
        if refused := _ask_slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"]):
            raise UserError(
                f"Slurm does not begin this job again: {refused}; "
                f"what it saved is kept, and the same command goes on from it"
            )
    # not with an error: srun would then end rank 0 before it has asked
    logging.shutdown()
    os._exit(0)


def _ask_slurm(*command: str) -> str:
    """Run one of Slurm's commands; give what it says if it fails, on one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # as in a container that has none of them
        return f"{command[0]}: {error.strerror}"
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"{command[0]} ended with {done.returncode}"


def _write_failure(folder: Path, error: str) -> None:
    attempt = read_point(folder)
    if rank() == 0 and attempt is not None:
        attempt.status, attempt.error = "failed", error
        attempt.write(folder)
        update_tables(folder.parent)


def launch(job: SlurmJob, points: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
    """Submit the points that are not finished, and wait for all of them if asked to.

    Raises:
        UserError: if there is no Slurm here, or it refuses the job.
    """
    cluster = job.cluster
    setup_globals()
    configure_log(job.config.hydra.hydra_logging, job.config.hydra.verbose)
    logging.getLogger("sidestep").setLevel(logging.INFO)
    if shutil.which("sbatch") is None:
        raise UserError("cluster=slurm needs sbatch, which is not here; type this on a login node of the cluster")
    if not cluster.wait and not is_grid(job.config.hydra.sweeper):
        raise UserError(
            "cluster.wait=false leaves before there is a result, and this sweep chooses each point by those before it; "
            "leave cluster.wait out, in tmux or the like, or name the points as in optim.lr=1e-4,3e-4"
        )
    sweep_dir = Path(job.config.hydra.sweep.dir)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    if "%" in str(sweep_dir.absolute()):
        where = "name" if "swept" in job.config else "dataset_dir"
        raise UserError(
            f"{sweep_dir.absolute()} has a % in it, which Slurm reads as a pattern; use another {where}=..."
        )
    folders = [sweep_dir / str(job.point_config(overrides).hydra.sweep.subdir) for overrides in points]
    jobs = _known_jobs(sweep_dir, folders)
    finished = {
        number
        for number, (point, folder) in enumerate(zip(points, folders, strict=True))
        if is_finished(job, point, folder)
    }
    todo = []
    for number, folder in enumerate(folders):
        if number in finished:
            jobs[number] = ""
            log.info("%s is finished", folder)
        elif jobs[number]:
            log.info("%s is in the queue already, as job %s", folder, jobs[number])
        else:
            todo.append(number)
    if len(todo) == len(points):
        _refuse_unless_one_can_begin(job, points)
    with _cancelling_on_ctrl_c(jobs):  # of which more and more are known
        for start in range(0, len(todo), ARRAY_SIZE):
            numbers = todo[start : start + ARRAY_SIZE]
            submitted = submit(job, cluster, sweep_dir, [(list(points[n]), first_number + n) for n in numbers])
            for number, name in zip(numbers, submitted, strict=True):
                jobs[number] = name
                log.info("%s is job %s", folders[number], name)
            planned = [PlannedPoint(overrides=list(points[n]), job=jobs[n], folder=folders[n].name) for n in numbers]
            add_to_plan(sweep_dir, planned)  # at once, so that none is submitted twice
        if cluster.wait:
            wait_for(sweep_dir, {name for name in jobs if name})
    if not cluster.wait:
        log.info("look at them with python -m sidestep.report sweep_dir=%s", sweep_dir)
        return [JobReturn(overrides=list(point), status=JobStatus.COMPLETED, _return_value=None) for point in points]
    return [
        _finished(points[number], folders[number])
        if number in finished
        else _result(points[number], folders[number], jobs[number])
        for number in range(len(points))
    ]


def _refuse_unless_one_can_begin(job: SlurmJob, points: Sequence[Sequence[str]]) -> None:
    """Refuse points of which each would fail at its settings, before they wait in the queue for it.

    Raises:
        UserError: with what is wrong with the first.
    """
    refused = []
    for overrides in points:
        config = job.point_config(overrides)
        with open_dict(config):
            del config["hydra"]
        try:
            to_dataclass(config, cast(type[Any], OmegaConf.get_type(config)))
            return
        except UserError as error:
            refused.append(str(error))
    if refused:
        others = f"; none of the {len(refused)} points can begin, and this is the first"
        raise UserError(refused[0] + (others if len(set(refused)) > 1 else ""))


def submit(job: SlurmJob, cluster: SlurmConfig, sweep_dir: Path, points: Sequence[tuple[list[str], int]]) -> list[str]:
    """Submit points as one array; give the number of each one's job.

    Raises:
        UserError: with Slurm's own words, if it refuses them.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("cluster=slurm needs submitit: pip install -c constraints.txt -e '.[slurm]'") from error

    executor = submitit.SlurmExecutor(folder=sweep_dir / ".slurm" / "%j", python=_python(cluster))
    wanted = {
        "job_name": f"sidestep-{sweep_dir.name}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time_minutes,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_on_a_node,
        "cpus_per_task": cluster.cpus_per_process,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.memory_gib}G" if cluster.memory_gib is not None else None,
        "array_parallelism": cluster.array_width,
        "signal_delay_s": cluster.signal_seconds,
        # newer Slurms do not hand --cpus-per-task on to srun
        "setup": ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *cluster.setup],
        "srun_args": ["--kill-on-bad-exit=1", *cluster.srun],
        "additional_parameters": {"requeue": True, **dict(map(_sbatch_option, cluster.sbatch))},
    }
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    state = Singleton.get_state()
    try:
        jobs = executor.map_array(job, *zip(*((overrides, number, state) for overrides, number in points), strict=True))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or [str(error)]
        raise UserError(f"Slurm refused the job: {' '.join(said)}") from error
    return [submitted.job_id for submitted in jobs]


def _sbatch_option(typed: str) -> tuple[str, str | bool]:
    """Split --exclude=node7 or --exclusive as submitit wants it."""
    key, _, value = typed.removeprefix("--").partition("=")
    return key, value or True


def _python(cluster: SlurmConfig) -> str:
    """The command that starts Python on a node, deaf to SIGUSR2 until there is somebody to take it."""
    return f'bash -c \'trap "" USR2; exec "$@"\' sidestep {cluster.python or shlex.quote(sys.executable)}'


def is_finished(job: SlurmJob, overrides: Sequence[str], folder: Path) -> bool:
    """Whether a point was finished before with exactly these settings, so that no job is needed to find out.

    A part of a dataset never is: only its job reads the songs, and can tell whether they are the same. Nor is a point
    whose dataset was written since, or whose files are not as they were written.
    """
    try:
        record = parse_record((folder / "run.json").read_text(encoding="utf-8"))
        if record["status"] != "finished" or not record["final"]:
            return False
        config = job.point_config(overrides)
        with open_dict(config):
            del config["hydra"]
        settings = json.loads(json.dumps(asdict(cast(Any, OmegaConf.to_object(config))), default=str))
        if _without_cluster(record["config"]) != _without_cluster(settings):
            return False
        datasets = [Path(settings[key]) for key in ("dataset_dir", "prior_dataset_dir") if settings[key] is not None]
        if not settings["toy"] and any(_changed_after(record["finished"], dataset) for dataset in datasets):
            return False
        hashes = hashes_of(folder / "final")  # other files may lie there too
        return all(hashes.get(name) == written for name, written in record["final"].items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OmegaConfBaseException):
        return False  # the job will say what is wrong


def _changed_after(finished: str, dataset: Path) -> bool:
    """Whether a dataset was written after a point was finished; others' tensor files have no list of songs."""
    listing = dataset / "songs.jsonl"  # as data.manifest calls it, which imports torch
    return at((listing if listing.exists() else dataset).stat().st_mtime) > finished


def _without_cluster(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "cluster"}


def _known_jobs(sweep_dir: Path, folders: Sequence[Path]) -> list[str]:
    """Number of the job of each point that an earlier command submitted and that is still in the queue.

    Raises:
        UserError: if there were jobs and the queue cannot be asked, since a point must not be done by two.
    """
    plan = read_plan(sweep_dir)
    known = {point.folder: point.job for point in plan.points if point.job} if plan is not None else {}
    queued = queued_jobs()
    if queued is None and known:
        raise UserError(f"squeue does not say which jobs of {sweep_dir} are still in the queue; type the command again")
    jobs = [known.get(folder.name, "") for folder in folders]
    return [name if queued is not None and name in queued else "" for name in jobs]


def wait_for(sweep_dir: Path, jobs: set[str]) -> None:
    """Wait until no job is in the queue any more, with the table of the sweep kept up to date."""
    pause, left = 0.5, len(jobs)
    while True:
        queued = queued_jobs()
        if queued is not None:  # the controller may be away for a while
            still = jobs & queued.keys()
            if len(still) < left:
                log.info("%d of %d jobs are over", len(jobs) - len(still), len(jobs))
                left = len(still)
                update_tables(sweep_dir)
            if not still:
                return
        time.sleep(pause)
        pause = min(1.05 * pause, SLOWEST_POLL)  # a twentieth of the time that was waited already


@contextlib.contextmanager
def _cancelling_on_ctrl_c(jobs: Sequence[str]) -> Iterator[None]:
    """On Ctrl-C, ask whether the jobs are to be cancelled; where nobody can be asked, cancel them.

    Args:
        jobs: those known when it is pressed; empty names are none.
    """
    try:
        yield
    except KeyboardInterrupt:
        left = [name for name in jobs if name in (queued_jobs() or {})]
        if left and _wants_to_cancel(len(left)):
            if refused := _ask_slurm("scancel", *left):  # which says so of a job that has just ended, too
                log.warning("not all of the %d jobs were cancelled: %s; look at them with squeue", len(left), refused)
            else:
                log.info("cancelled %d jobs; what they saved is kept, and the same command goes on from it", len(left))
        elif left:
            log.info("%d jobs go on; the same command waits for them again", len(left))
        raise


def _wants_to_cancel(count: int) -> bool:
    if not sys.stdin.isatty():
        return True
    try:
        return input(f"\ncancel the {count} jobs that are not over? [y/N] ").strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError):
        return False


def _finished(overrides: Sequence[str], folder: Path) -> JobReturn:
    """What a point returns that was finished before, by a sweep or by itself."""
    objective = objective_of(parse_record((folder / "run.json").read_text(encoding="utf-8")))
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=objective)


def _result(overrides: Sequence[str], folder: Path, name: str) -> JobReturn:
    """Read what the job of a point came to, and write it down for a job that died without a word."""
    attempt = read_point(folder)
    for _ in range(20):  # a network file system may show the file a moment later
        if attempt is not None and attempt.job == name and attempt.status != "running":
            break
        time.sleep(0.1)
        attempt = read_point(folder)
    if attempt is None or attempt.job != name or attempt.status not in ("finished", "failed"):
        attempt = attempt or PointRecord(overrides=list(overrides), started=now())
        attempt.job, attempt.status, attempt.ended = name, "failed", now()
        attempt.error = f"job {name} ended without a result, {_state(name)}; see {folder.parent / '.slurm' / name}"
        folder.mkdir(parents=True, exist_ok=True)
        attempt.write(folder)
    if attempt.status == "failed":
        return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=PointFailed(attempt.error))
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=attempt.objective)


def _state(job: str) -> str:
    """Slurm's word for how a job ended, as long as the controller remembers it."""
    asked = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False)
    words = dict(word.partition("=")[::2] for word in asked.stdout.split())
    if "JobState" not in words:
        return "and Slurm has forgotten it"
    return f"Slurm calls it {words['JobState']}, exit code {words.get('ExitCode', '?')}"
