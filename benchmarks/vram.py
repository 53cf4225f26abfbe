"""Peak memory of a step under each VRAM profile, on a card that is made as small as the profile's.

    python benchmarks/vram.py                 # on a CUDA device; writes 5 GB of random weights to a temporary folder
    python benchmarks/vram.py --only-predict  # what is planned; needs no device

The model has the real sizes and random weights. For each profile the allocator may use no more than that profile's
card has, and two steps are trained on excerpts of the profile's length, as `python -m sidestep.doctor` does. Beside the
peak stands what the plan of memory predicts for it, on which `gradient_checkpointing=auto` decides.
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
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.model_config import ModelConfig
from sidestep.acestep.toy import make_toy_checkpoint
from sidestep.acestep.weight_files import read_json
from sidestep.checking.dry_run import measure_step
from sidestep.config.gate import compose_or_explain, read_profiles, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.training.memory import choose_checkpointing, plan_memory
from sidestep.training.run import open_run

LIMITS = {"6gb": 5.5, "8gb": 7.5, "12gb": 11.0, "16gb": 15.0, "24gb": 22.5, "80gb": 76.0}
"""GiB that each profile may peak at: what its card has, less the driver's and the desktop's share."""
SONG_SECONDS = 300
CHOICES = {
    "optim": "adamw", "schedule": "constant", "timesteps": "acestep", "objective": "velocity", "model_variant": "base",
}  # fmt: skip


def settings(place: Path, profile: str, adapter: str) -> TrainConfig:
    """The settings of a run with one profile and one adapter."""
    overrides = [
        "name=benchmark", "model_variant=base", f"adapter={adapter}", f"checkpoint_dir={place}/checkpoints",
        f"dataset_dir={place}/data", f"vram_profile={profile}",
    ]  # fmt: skip
    return to_dataclass(compose_or_explain("train", overrides), TrainConfig)


def predict(place: Path, profile: str, adapter: str) -> dict[str, Any]:
    """Plan one profile with one adapter, as a run in bf16 would on a card of the profile's size."""
    config = settings(place, profile, adapter)
    make_toy_checkpoint(place / "toy", config.model_variant)
    folder = find_checkpoint(place / "toy", config.model_variant).folder
    model = ModelConfig.from_values(read_json(folder / "config.json") | FULL, folder)
    available = config.vram_profile.memory_gib
    assert available is not None
    memory = choose_checkpointing(
        model, config.adapter, config.optim, config.vram_profile.resolve(read_profiles(), available), torch.bfloat16,
        available_gib=available, compiled=False,
    )  # fmt: skip
    plan = plan_memory(model, config.adapter, config.optim, memory, torch.bfloat16)
    layers = round(memory.recomputed_share * model.num_hidden_layers)
    return {
        "profile": profile, "adapter": adapter, "limit": LIMITS[profile], "seconds": memory.max_seconds,
        "recomputed": f"{memory.gradient_checkpointing}, {layers} layers" if layers else "nothing",
        "predicted": round(plan.total, 2),
    }  # fmt: skip


def measure(place: Path, profile: str, adapter: str, device: torch.device) -> dict[str, Any]:
    """Measure one profile with one adapter."""
    config = settings(place, profile, adapter)
    config.device = device.type
    make_toy_checkpoint(place / "checkpoints", config.model_variant, sizes=FULL)
    if not (place / "data").is_dir():
        write_dataset(place / "data", config, 4, SONG_SECONDS)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMITS[profile] / total))
    torch.cuda.reset_peak_memory_stats()
    run = open_run(config, place / f"{profile}-{adapter}", {**CHOICES, "adapter": adapter, "vram_profile": profile})
    try:
        need = measure_step(run)
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {
        "fits": True, "seconds": need.longest_seconds,
        "peak": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "seconds_per_step": round(need.seconds_per_step, 3),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--adapters", nargs="+", default=["lora", "lokr"])
    parser.add_argument("--only-predict", action="store_true", help="plan, and measure nothing")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/vram.json"))
    options = parser.parse_args(arguments)
    if not options.only_predict and not torch.cuda.is_available():
        parser.error("this needs a CUDA device, whose allocator counts; or type --only-predict")
    rows = []
    columns = (
        "profile",
        "adapter",
        "excerpt, s",
        "recomputed",
        "predicted, GiB",
        "peak, GiB",
        "limit, GiB",
        "s per step",
    )
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as place:
        for profile in options.profiles:
            for adapter in options.adapters:
                row = predict(Path(place), profile, adapter)
                if not options.only_predict:
                    row |= measure(Path(place), profile, adapter, torch.device("cuda"))
                rows.append(row)
                peak = row.get("peak", "does not fit" if "fits" in row else "")
                print(
                    f"| {profile} | {adapter} | {row['seconds']:g} | {row['recomputed']} | {row['predicted']} | {peak} "
                    f"| {row['limit']} | {row.get('seconds_per_step', '')} |",
                    flush=True,
                )
    device = None if options.only_predict else torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
