"""What the whole trainer costs over the bare loop: data, logging, checks and checkpoints against nothing but steps.

    python benchmarks/trainer.py                  # on the CPU: a model of 4 layers, 512 wide, 30 s excerpts
    python benchmarks/trainer.py --full           # the real sizes; needs a CUDA device

The trainer is `sidestep.training.loop.train` itself, as a command runs it, from dataset files, logging every 10 steps
and saving. Runs of few and of many steps are made in turn with the bare loop, and what the additional steps took, with
one checkpoint among them, is compared, so that starting and ending do not count. On the CPU the time is that of the
processor, not of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import sidestep.config.naming  # noqa: F401
from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.acestep.toy import make_toy_checkpoint
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.data.manifest import DatasetInfo, SongRecord, write_manifest
from sidestep.training.forward import predict_velocity
from sidestep.training.loop import train

SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "sliding_window": 128, "num_hidden_layers": 4,
}  # fmt: skip
FULL = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "sliding_window": 128, "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
ADAPTERS = ("lora", "lokr")
CONDITION_TOKENS = 300


def write_dataset(folder: Path, config: TrainConfig, songs: int, seconds: float) -> None:
    """Random latents and conditions, in the layout that preprocessing writes."""
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), config.model_variant)
    width = checkpoint.null_condition().shape[-1]
    generator = torch.Generator().manual_seed(0)
    frames = int(seconds * 25)
    records = []
    for name in ("latents", "conditions"):
        (folder / name).mkdir(parents=True)
    for i in range(songs):
        latents, conditions = f"latents/{i}.safetensors", f"conditions/{i}.safetensors"
        save_file({"latents": torch.randn(frames, 64, generator=generator).half()}, folder / latents)
        parts = {"lyrics": CONDITION_TOKENS - 100, "reference": 1, "caption": 99}
        condition = {key: torch.randn(rows, width, generator=generator).half() for key, rows in parts.items()}
        save_file(condition, folder / conditions)
        records.append(
            SongRecord(
                audio=f"{i}.wav",
                latents=latents,
                conditions=conditions,
                prompt="caption",
                num_frames=frames,
                is_instrumental=True,
            )
        )
    info = DatasetInfo(
        model_variant="base",
        condition_width=width,
        fingerprints={"condition_encoder": checkpoint.fingerprint("condition_encoder")},
        settings={"custom_tags": []},
        num_songs=songs,
    )
    write_manifest(folder, info, records)


def clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def whole(config: TrainConfig, adapter: str, folder: Path, steps: int, device: torch.device) -> float:
    """Seconds of a run of the trainer."""
    config.max_steps = steps
    folder.mkdir()
    start = clock(device)
    train(config, folder, {"adapter": adapter, "optim": "adamw", "schedule": "constant", "timesteps": "acestep",
                           "objective": "velocity", "model_variant": "base", "vram_profile": "auto"})  # fmt: skip
    return clock(device) - start


def bare(config: TrainConfig, seconds: float, steps: int, device: torch.device) -> float:
    """Seconds of nothing but steps: the same model, the same sizes, one batch again and again."""
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), config.model_variant)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = checkpoint.load_transformer(device=device, dtype=dtype)
    parameters = list(config.adapter.attach(transformer).parameters())
    WindowedAttention(transformer)
    transformer.train()
    optimizer = config.optim.build(parameters)
    frames = int(seconds * 25)
    latents = torch.randn(1, frames, 64, device=device)
    condition = torch.randn(1, CONDITION_TOKENS, checkpoint.null_condition().shape[-1], device=device)
    predict = predict_velocity(transformer, context_latents(checkpoint.silence(), frames).to(device))
    start = clock(device)
    for _ in range(steps):
        noise, t = torch.randn_like(latents), torch.rand(1, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            velocity = predict((1 - t) * latents + t * noise, t, condition)
        (velocity.float() - (noise - latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock(device) - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the real sizes, on a CUDA device")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the excerpts")
    parser.add_argument("--steps", type=int, nargs=2, default=[5, 35], help="of a short and of a long run")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/trainer.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.full and device.type != "cuda":
        parser.error("--full needs a CUDA device; without one it would take hours")
    torch.set_num_threads(options.threads)

    few, many = options.steps
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)",
        "torch": torch.__version__, "seconds": options.seconds, "load": os.getloadavg(), "rows": [],
    }  # fmt: skip
    print("| adapter | bare loop, s per step | whole trainer / bare loop |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for adapter in ADAPTERS:
            overrides = [
                "name=benchmark", "model_variant=base", f"adapter={adapter}", f"device={options.device}",
                f"checkpoint_dir={place}/checkpoints", f"dataset_dir={place}/data", f"max_seconds={options.seconds}",
                "max_epochs=null", "max_steps=1", "save_every_epochs=null", f"save_every_steps={many - few}",
                "vram_profile=80gb",
                "vram_profile.batch_size=1", "vram_profile.gradient_accumulation_steps=1",
            ]  # fmt: skip
            config = to_dataclass(compose_or_explain("train", overrides), TrainConfig)
            make_toy_checkpoint(Path(place, "checkpoints"), config.model_variant, sizes=FULL if options.full else SMALL)
            if not Path(place, "data").is_dir():
                write_dataset(Path(place, "data"), config, 8, options.seconds)
            times: list[tuple[float, float]] = []
            for repeat in range(options.repeats):
                pair = []
                for kind in ("bare", "whole"):
                    took = {}
                    for steps in (few, many):
                        if kind == "bare":
                            took[steps] = bare(config, options.seconds, steps, device)
                        else:
                            run = Path(place, f"{adapter}-{repeat}-{steps}")
                            took[steps] = whole(config, adapter, run, steps, device)
                    pair.append((took[many] - took[few]) / (many - few))
                times.append((pair[0], pair[1]))
            row = {
                "adapter": adapter,
                "bare_seconds": round(statistics.median(bare for bare, _ in times), 4),
                "ratio": round(statistics.median(whole / bare for bare, whole in times), 3),
                "ratios": [round(whole / bare, 3) for bare, whole in times],
            }
            result["rows"].append(row)
            print(f"| {adapter} | {row['bare_seconds']:.3f} | {row['ratio']:.3f} |", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
