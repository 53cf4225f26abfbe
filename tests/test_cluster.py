"""Settings of sweeps and clusters, checked where there is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from sidestep.config.gate import conf_dir, launches_sweep
from sidestep.errors import UserError
from sidestep.reporting.runs import Point, as_csv, same_point
from tests.factories import train_config
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
        (["cluster.gpus_per_node=-1"], "cluster.gpus_per_node=-1 must be at least 0"),
        (["cluster.gpus_per_node=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (["cluster.sbatch=[exclude]"], "cluster.sbatch: 'exclude' must be one option, as in '--exclude=node7'"),
    ],
)
def test_a_mistake_in_the_settings_of_a_cluster_is_named(typed, answer):
    with pytest.raises(UserError) as raised:
        train_config("cluster=slurm", *typed)
    assert answer in str(raised.value)


def test_where_there_is_no_slurm_nothing_runs_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, text = run(tmp_path, "dataset_dir=data", "name=s", "cluster=slurm")
    assert code == 1
    assert text.splitlines() == [
        "cluster=slurm needs sbatch, which is not here; type this on a login node of the cluster"
    ]
    assert not list(tmp_path.glob("outputs/s/*/"))


def test_a_point_is_the_same_wherever_it_runs():
    typed = ["optim.lr=0.1", "adapter=lokr"]
    assert same_point([*reversed(typed), "cluster=slurm", "cluster.wait=false", "local=mine"]) == same_point(typed)
    assert same_point(["optim.lr=0.2", "adapter=lokr"]) != same_point(typed)


def test_a_table_holds_any_text(tmp_path: Path):
    point = Point(name="a", status="failed", error='x,"y"\nz', settings={"name.with,comma": "ü"})
    assert as_csv([point]).splitlines()[0].endswith(',"name.with,comma"')
    assert '"x,""y""\nz"' in as_csv([point])
