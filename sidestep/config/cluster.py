"""Settings of a cluster: what is asked of Slurm for each point of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidestep.config.schema import option
from sidestep.errors import UserError


@option("cluster", "slurm")
@dataclass(kw_only=True)
class SlurmConfig:
    """One Slurm job per point, submitted as arrays; a setting left null is not mentioned to Slurm."""

    partition: str | None = None
    """Partition, or several with commas in two pairs of quotes: cluster.partition="'gpu,gpu-long'"."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, as in a100."""
    time_minutes: int = 1440
    """Time limit of one job; a run that needs longer goes on in the next one by itself."""
    nodes: int = 1
    """Nodes of one run."""
    gpus_per_node: int = 1
    """GPUs of one run on each node, with one process for each; 0 for a cluster without GPUs."""
    processes_per_node: int | None = None
    """Processes of one run on each node; null is one for each GPU."""
    cpus_per_process: int = 8
    """CPU cores for each process."""
    memory_gib: int | None = None
    """Memory on each node; null takes the partition's default."""
    array_width: int = 64
    """Points that may run at once, of each thousand that are submitted together."""
    signal_seconds: int = 120
    """How long before the time limit a run is told to save and go on in a new job."""
    max_requeues: int = 100
    """How often one point may go on in a new job."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run, as in "cluster.setup=['module load cuda']"."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, as in "cluster.sbatch=['--exclude=node7','--exclusive']"."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, as in "cluster.srun=['--cpu-bind=none']"."""
    python: str | None = None
    """Command that starts Python on a node, as in cluster.python='apptainer exec x.sif python'; null is this one."""
    wait: bool = True
    """Wait for all points and print their table; false submits and leaves."""

    @property
    def processes_on_a_node(self) -> int:
        """One for each GPU, unless set."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Of one run, on all its nodes."""
        return self.nodes * self.processes_on_a_node

    def __post_init__(self) -> None:
        counts = ("time_minutes", "nodes", "processes_per_node", "cpus_per_process", "memory_gib", "array_width")
        for key in (*counts, "signal_seconds"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"cluster.{key}={value} must be at least 1")
        for key in ("gpus_per_node", "max_requeues"):
            if getattr(self, key) < 0:
                raise UserError(f"cluster.{key}={getattr(self, key)} must be at least 0")
        if 60 * self.time_minutes <= self.signal_seconds:
            raise UserError(
                f"cluster.signal_seconds={self.signal_seconds} is no less than "
                f"cluster.time_minutes={self.time_minutes}, so every job would be told to stop as it begins"
            )
        for option_of, options in (("srun", self.srun), ("sbatch", self.sbatch)):
            for typed in options:
                if not typed.startswith("--") or "\n" in typed:
                    raise UserError(f"cluster.{option_of}: {typed!r} must be one option, as in '--exclude=node7'")
