"""How a step, a checkpoint and the start of a run grow with what they are asked for.

    python benchmarks/scaling.py             # a model of 4 layers, 512 wide, on the CPU
    python benchmarks/scaling.py --full      # the real sizes; needs a CUDA device

Steps are those of benchmarks/step.py: forward and backward of a LoRA on attention and MLP, of which one thing is varied
at a time, taking turns. A checkpoint is what a run writes: the adapter, AdamW's state and their hashes. The start is
that of the command `python -m sidestep.train` on toy songs, up to its first step. Loading is that of some layers of the
real width on the CPU, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AceStepTransformer1DModel

from benchmarks.step import LORA, TARGETS, Case, MicroStep, random_weights, windowed
from benchmarks.trainer import FULL, SMALL
from sidestep.acestep.toy import make_toy_checkpoint
from sidestep.adapters.lora import LoraConfig
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.training.state import TrainingState, save_checkpoint

SECONDS = (30, 60, 120, 240)
BATCH_SIZES = (1, 2, 4)
RANKS = (16, 64, 256)
LOADED = FULL | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
"""What is loaded: layers of the real width, but fewer."""
USUAL = {"seconds": 60, "batch size": 1, "rank": 64}


def steps(sizes: dict[str, Any], dtype: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Measure steps of which one thing differs from the usual."""
    base = Case(name="scaling", dtype=dtype, num_tokens=0, sizes=sizes)
    weights = random_weights(base, device)
    rows = []
    for thing, values in (("seconds", SECONDS), ("batch size", BATCH_SIZES), ("rank", RANKS)):
        made = {}
        for value in values:
            chosen = USUAL | {thing: value}
            case = replace(base, num_tokens=int(chosen["seconds"] * 12.5), batch_size=chosen["batch size"])
            adapter = LoraConfig(rank=chosen["rank"], alpha=chosen["rank"], target_modules=TARGETS)
            made[value] = MicroStep(case, windowed(adapter), False, weights, device)
        memory = {value: (step.kept_mib(), step.peak_mib()) for value, step in made.items()}  # also warms up
        times: dict[int, list[float]] = {value: [] for value in made}
        order = random.Random(0)
        for _ in range(repeats):
            for value in order.sample(list(made), len(made)):
                times[value].append(made[value]())
        for value, took in times.items():
            kept, peak = memory[value]
            rows.append(
                {
                    "thing": thing,
                    "value": value,
                    "seconds_per_step": round(statistics.median(took), 4),
                    "kept_mib": round(kept, 1),
                    "peak_mib": None if peak is None else round(peak, 1),
                }
            )
    return rows


def checkpoint(sizes: dict[str, Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure writing a checkpoint as the trainer does, and what it takes on the disk."""
    transformer = AceStepTransformer1DModel(**sizes).requires_grad_(False).to(device)
    adapter = LORA.attach(transformer)
    optimizer = torch.optim.AdamW(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainingState(
        step=1,
        num_steps=1,
        smoothed_loss=1.0,
        adapter=adapter.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler={},
        settings={},
    )
    took = []
    with tempfile.TemporaryDirectory() as place:
        for repeat in range(repeats):
            folder = Path(place, f"step_{repeat}")
            start = time.perf_counter()
            save_checkpoint(folder, state, lambda partial: adapter.save(partial, {}))
            took.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in folder.iterdir())
    return {"mib": round(size / 2**20, 1), "seconds": round(statistics.median(took), 3)}


def start_up(repeats: int) -> dict[str, Any]:
    """Measure a command from its start to its first step, on toy songs that are there already."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "sidestep.train", "experiment=demo", "max_epochs=null", "max_steps=1",
                   "log_every_steps=1", "device=cpu"]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(root)}

        def run(name: str) -> tuple[float, float]:
            began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*command, f"name={name}"], cwd=place, env=environment, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            (metrics,) = Path(place, "outputs", name).glob("*/metrics.jsonl")
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return metrics.stat().st_mtime - began, cpu

        run("first")  # makes the toy songs
        clock, cpu = zip(*(run(f"run{i}") for i in range(repeats)), strict=True)
        return {"seconds": round(statistics.median(clock), 2), "cpu_seconds": round(statistics.median(cpu), 2)}


LOADING = """
import resource, sys, threading
import psutil, torch
from pathlib import Path
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.training.offload import OffloadedBlocks
from diffusers import AceStepTransformer1DModel

place, dtype, quantization, waiting = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3], float(sys.argv[4])
typed = [f"checkpoint_dir={place}", "dataset_dir=none", "model_variant=base", "name=loading"]
config = to_dataclass(compose_or_explain("train", typed), TrainConfig)
checkpoint = find_checkpoint(Path(place), config.model_variant)
size = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
process = psutil.Process()
own = lambda: (memory := process.memory_info()).rss - memory.shared
before, peak, done = own(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, own())
watcher = threading.Thread(target=watch)
watcher.start()
transformer = checkpoint.load_transformer(
    device=torch.device("cpu"), dtype=dtype, quantization=quantization, waiting_share=waiting
)
OffloadedBlocks(transformer.layers if waiting else [], torch.device("cpu"))
done.set()
watcher.join()
weights = sum(t.nbytes for t in [*transformer.parameters(), *transformer.buffers()])
print((max(peak, own()) - before) / weights)
"""


def loading(sizes: dict[str, Any]) -> dict[str, float]:
    """Measure the memory of its own that a process needs at most while it loads a model, as a share of the weights.

    Pages of the file that are mapped are not counted: the system takes them back where it needs them.
    """
    root = Path(__file__).resolve().parents[1]
    kinds = {
        "bfloat16, as in the file": ("bfloat16", "none", "0"),
        "bfloat16, waiting in main memory": ("bfloat16", "none", "1"),
        "float32": ("float32", "none", "0"),
        "int8": ("bfloat16", "int8", "0"),
    }
    with tempfile.TemporaryDirectory() as place:
        typed = [f"checkpoint_dir={place}", "dataset_dir=none", "model_variant=base", "name=loading"]
        variant = to_dataclass(compose_or_explain("train", typed), TrainConfig).model_variant
        make_toy_checkpoint(Path(place), variant, sizes=sizes)
        shares = {}
        for kind, words in kinds.items():
            command = [sys.executable, "-c", LOADING, place, *words]
            environment = os.environ | {"PYTHONPATH": str(root)}
            told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            shares[kind] = round(float(told.stdout), 2)
    return shares


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the real sizes, on a CUDA device")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scaling.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.full and device.type != "cuda":
        parser.error("--full needs a CUDA device; without one it would take hours")
    torch.set_num_threads(1)
    sizes, dtype = ({}, "bfloat16") if options.full else (SMALL, "float32")

    rows = steps(sizes, dtype, device, options.repeats)
    print("| varied | value | s per step | kept for backward, MiB | peak, MiB |\n|---|---|---|---|---|")
    for row in rows:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"| {row['thing']} | {row['value']} | {row['seconds_per_step']:.3f} | {row['kept_mib']:.0f} | {peak} |")
    saved = checkpoint(sizes, device, options.repeats)
    print(f"\na checkpoint of {saved['mib']} MiB is written in {saved['seconds']} s")
    started = start_up(options.repeats)
    print(
        f"from the command to the first step at toy size: {started['seconds']} s; "
        f"the whole run of one step takes {started['cpu_seconds']} s of the processor"
    )
    loads = loading(LOADED)
    print("most memory while loading, as a share of the weights: " + "; ".join(f"{k} {v}" for k, v in loads.items()))
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread",
        "torch": torch.__version__, "load": os.getloadavg(), "steps": rows, "checkpoint": saved, "start": started,
        "loading": loads,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
