"""What the tables of a sweep of many points take: time to collect and write them, and their size.

    python benchmarks/sweep.py --run outputs/demo/lokr-base-demo --points 10000

Every point is a copy of the records of a finished run, with a learning rate and a seed of its own. Times are the CPU's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir

from sidestep.config.gate import VERSION_BASE, conf_dir
from sidestep.reporting.runs import PointRecord, collect_points, write_tables
from sidestep.times import now


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gives."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--composed", type=int, default=20, help="points to compose")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        sweep_dir = Path(place)
        for number in range(options.points):
            typed = ["dataset_dir=data/songs", "adapter=lokr", f"optim.lr={1e-6 * (number + 1):g}", f"seed={number}"]
            folder = sweep_dir / f"lokr-base-lr{1e-6 * (number + 1):g}-seed{number}"
            folder.mkdir()
            shutil.copy(options.run / "run.json", folder)
            done = {"status": "finished", "started": now(), "ended": now(), "seconds": 60.0, "objective": 1.0}
            PointRecord(overrides=typed, host="node1", process=1, **done).write(folder)
        collecting, points = timed(lambda: collect_points(sweep_dir))
        writing, _ = timed(lambda: write_tables(sweep_dir, points))
        sizes = {name: (sweep_dir / name).stat().st_size / 1e6 for name in ("sweep.csv", "sweep.json")}
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        compose("train", typed)  # reads what every later one finds in memory
        composing, _ = timed(lambda: [compose("train", typed) for _ in range(options.composed)])
    print(f"{options.points} points: collected in {collecting:.2f} s, written in {writing:.2f} s")
    print(", ".join(f"{name} {megabytes:.2f} MB" for name, megabytes in sizes.items()))
    print(f"composing one takes {composing / options.composed:.3f} s")


if __name__ == "__main__":
    main()
