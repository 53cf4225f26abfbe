"""Peak memory of a step under each VRAM profile, on a card that is made as small as the profile's.

    python benchmarks/vram.py        # needs a CUDA device; writes 5 GB of random weights to a temporary folder

The model has the real sizes and random weights. For each profile the allocator may use no more than that profile's
card has, and two steps are trained on excerpts of the profile's length, as `python -m sidestep.doctor` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.trainer import FULL, write_dataset
from sidestep.acestep.toy import make_toy_checkpoint
from sidestep.checking.dry_run import measure_step
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.training.run import open_run

LIMITS = {"6gb": 5.5, "8gb": 7.5, "12gb": 11.0, "16gb": 15.0, "24gb": 22.5, "80gb": 76.0}
"""GiB that each profile may peak at: what its card has, less the driver's and the desktop's share."""
SONG_SECONDS = 300
CHOICES = {
    "optim": "adamw", "schedule": "constant", "timesteps": "acestep", "objective": "velocity", "model_variant": "base",
}  # fmt: skip


def measure(place: Path, profile: str, adapter: str, device: torch.device) -> dict[str, Any]:
    """Measure one profile with one adapter."""
    overrides = [
        "name=benchmark", "model_variant=base", f"adapter={adapter}", f"device={device.type}",
        f"checkpoint_dir={place}/checkpoints", f"dataset_dir={place}/data", f"vram_profile={profile}",
    ]  # fmt: skip
    config = to_dataclass(compose_or_explain("train", overrides), TrainConfig)
    make_toy_checkpoint(place / "checkpoints", config.model_variant, sizes=FULL)
    if not (place / "data").is_dir():
        write_dataset(place / "data", config, 4, SONG_SECONDS)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMITS[profile] / total))
    torch.cuda.reset_peak_memory_stats()
    run = open_run(config, place / f"{profile}-{adapter}", {**CHOICES, "adapter": adapter, "vram_profile": profile})
    row: dict[str, Any] = {"profile": profile, "adapter": adapter, "limit": LIMITS[profile]}
    try:
        need = measure_step(run)
    except torch.OutOfMemoryError:
        return {**row, "fits": False, "seconds": run.memory.max_seconds}
    counted = need.weights + need.adapter + need.gradients + need.optimizer + need.activations
    return {
        **row, "fits": True, "seconds": need.longest_seconds, "counted": round(counted, 2),
        "peak": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "seconds_per_step": round(need.seconds_per_step, 3),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--adapters", nargs="+", default=["lora", "lokr"])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/vram.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, whose allocator counts")
    device = torch.device("cuda")
    rows = []
    print(
        "| profile | adapter | excerpt, s | counted, GiB | peak, GiB | limit, GiB | s per step |\n" + "|---" * 7 + "|"
    )
    with tempfile.TemporaryDirectory() as place:
        for profile in options.profiles:
            for adapter in options.adapters:
                row = measure(Path(place), profile, adapter, device)
                rows.append(row)
                took = f"{row['counted']} | {row['peak']}" if row["fits"] else "| does not fit"
                print(
                    f"| {profile} | {adapter} | {row['seconds']:g} | {took} | {row['limit']} "
                    f"| {row.get('seconds_per_step', '')} |",
                    flush=True,
                )
    result = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
