"""How fast songs are read and checked, how long a large dataset takes to open, and how much room music takes on disk.

    python benchmarks/loader.py
    python benchmarks/loader.py --songs 200 --out loader.json

Songs are random, in the sizes of the real model: 64 latent channels, conditions 2,048 wide in bfloat16. Files were
just written and lie in the operating system's cache. The time of the processor counts as well as that of the clock,
since other programs may share the machine; everything is done three times, and the time with the least of it is
told. Room on disk is compared with tensor files as Side-Step writes them on a GPU: bfloat16, conditions padded to
769 tokens, context and masks beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from sidestep.data.checks import REMEMBERED
from sidestep.data.dataset import SongDataset
from sidestep.data.loader import read_batches
from sidestep.data.manifest import DatasetInfo, SongRecord, write_manifest
from sidestep.data.sampler import FRAMES_PER_SECOND, MicroBatchSampler
from sidestep.files import sha256_of

WIDTH = 2048
SONG_SECONDS = 240
TEXT_TOKENS = 85
LYRIC_TOKENS = {"instrumental": 16, "sung": 300, "densely sung": 512}


def write_songs(folder: Path, num_songs: int, lyric_tokens: int, width: int = WIDTH) -> None:
    """Write a dataset of random songs."""
    for part in ("latents", "conditions"):
        (folder / part).mkdir(parents=True)
    songs = []
    for i in range(num_songs):
        latents = torch.randn(SONG_SECONDS * FRAMES_PER_SECOND, 64).half()
        parts = {"lyrics": lyric_tokens, "reference": 1, "caption": TEXT_TOKENS}
        if lyric_tokens > LYRIC_TOKENS["instrumental"]:
            parts["instrumental"] = LYRIC_TOKENS["instrumental"]
        conditions = {key: torch.randn(length, width).bfloat16() for key, length in parts.items()}
        save_file({"latents": latents}, folder / f"latents/{i}.safetensors")
        save_file(conditions, folder / f"conditions/{i}.safetensors")
        names = f"latents/{i}.safetensors", f"conditions/{i}.safetensors"
        latents_hash, conditions_hash = (sha256_of(folder / name) for name in names)
        songs.append(replace(record(i, *names), latents_sha256=latents_hash, conditions_sha256=conditions_hash))
    write_manifest(folder, info(width), songs)


def record(number: int, latents: str, conditions: str) -> SongRecord:
    """Describe a song as preprocessing does."""
    return SongRecord(
        audio=f"album {number // 12}/{number % 12:02d} track.flac",
        latents=latents,
        conditions=conditions,
        prompt="caption",
        num_frames=SONG_SECONDS * FRAMES_PER_SECOND,
        caption="a calm piano piece with soft drums and a warm bass, recorded in a small room",
        bpm=90,
        keyscale="A minor",
        source="sidecar",
    )


def info(width: int = WIDTH) -> DatasetInfo:
    """Describe a dataset as preprocessing does."""
    return DatasetInfo(model_variant="base", condition_width=width, fingerprints={}, settings={"custom_tags": []})


def least_time(task: Callable[[], object]) -> tuple[float, float]:
    """Do something three times; seconds of the processor and of the clock, when it took the least of the processor."""
    times = []
    for _ in range(3):
        cpu, clock = time.process_time(), time.perf_counter()
        task()
        times.append((time.process_time() - cpu, time.perf_counter() - clock))
    return min(times)


def measure_reading(folder: Path, seconds: float, batch_size: int, num_batches: int) -> dict[str, Any]:
    """Read batches as the training loop does, doing nothing with them."""
    dataset = SongDataset(folder, max_seconds=seconds, seed=0, batch_size=batch_size)

    def read() -> None:
        order = MicroBatchSampler(
            first_step=0, last_step=num_batches, batch_size=batch_size, accumulation=1, process=0, num_processes=1
        )
        for _ in read_batches(dataset, order, device=torch.device("cpu")):
            pass

    cpu, clock = least_time(read)
    examples = num_batches * batch_size
    return {
        "excerpt_seconds": seconds,
        "batch_size": batch_size,
        "cpu_ms_per_example": 1000 * cpu / examples,
        "examples_per_second": examples / clock,
        "seconds_of_music_per_second": examples * seconds / clock,
    }


def measure_checking(folder: Path) -> dict[str, float]:
    """Read every file whole, as before the first run on a dataset, and then ask only whether they are the same."""
    dataset = SongDataset(folder, max_seconds=60, seed=0)
    files = [path for part in ("latents", "conditions") for path in (folder / part).iterdir()]

    def check_first() -> None:
        (folder / REMEMBERED).unlink(missing_ok=True)
        dataset.check_tensors()

    first, again = least_time(check_first)[0], least_time(dataset.check_tensors)[0]
    gb = sum(path.stat().st_size for path in files) / 1e9
    return {"gb": gb, "cpu_seconds_per_gb": first / gb, "cpu_us_per_file_again": 1e6 * again / len(files)}


def measure_opening(folder: Path, num_songs: int) -> dict[str, Any]:
    """Write the manifest of many songs, whose files are empty, and open it."""
    for part in ("latents", "conditions"):
        (folder / part).mkdir(parents=True)
    songs = []
    for i in range(num_songs):
        names = [f"{part}/{i:064x}.safetensors" for part in ("latents", "conditions")]
        for name in names:
            os.close(os.open(folder / name, os.O_CREAT))
        songs.append(record(i, *names))
    write_manifest(folder, info(), songs)
    cpu, clock = least_time(lambda: SongDataset(folder, max_seconds=60, seed=0))
    return {
        "songs": num_songs,
        "seconds": clock,
        "cpu_seconds": cpu,
        "manifest_mb": (folder / "songs.jsonl").stat().st_size / 1e6,
    }


def measure_room(folder: Path) -> dict[str, float]:
    """Count bytes per minute of music, here and in the form of Side-Step."""
    num_songs = len(list((folder / "latents").iterdir()))
    minutes = num_songs * SONG_SECONDS / 60
    ours = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / minutes
    frames = SONG_SECONDS * FRAMES_PER_SECOND
    theirs = {
        "target_latents": torch.zeros(frames, 64).bfloat16(),
        "attention_mask": torch.ones(frames).bfloat16(),
        "encoder_hidden_states": torch.zeros(769, WIDTH).bfloat16(),
        "encoder_attention_mask": torch.ones(769, dtype=torch.bool),
        "context_latents": torch.zeros(frames, 128).bfloat16(),
        "metadata": {"caption": "a calm piano piece"},
    }
    torch.save(theirs, folder / "side-step.pt")
    peer = (folder / "side-step.pt").stat().st_size * num_songs / minutes
    return {"mb_per_minute": ours / 1e6, "side_step_mb_per_minute": peer / 1e6, "times_less": peer / ours}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--songs", type=int, default=60, help="songs that are read")
    parser.add_argument("--examples", type=int, default=600, help="examples read of each kind")
    parser.add_argument("--listed", type=int, default=100_000, help="songs of the manifest that is opened")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    typed = parser.parse_args(arguments)
    torch.manual_seed(0)
    results: dict[str, Any] = {"reading": [], "room": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, tokens in LYRIC_TOKENS.items():
            folder = Path(temporary, kind)
            write_songs(folder, typed.songs, tokens)
            results["room"][kind] = measure_room(folder)
        for seconds, batch_size in ((30, 1), (60, 1), (60, 4), (240, 1)):
            reading = measure_reading(Path(temporary, "sung"), seconds, batch_size, typed.examples // batch_size)
            results["reading"].append(reading)
        results["checking"] = measure_checking(Path(temporary, "densely sung"))
        write_songs(Path(temporary, "narrow"), typed.songs, LYRIC_TOKENS["sung"], width=1)
        narrow = measure_reading(Path(temporary, "narrow"), 0.08, 1, typed.examples)
        results["work_ms"] = narrow["cpu_ms_per_example"]
        results["opening"] = measure_opening(Path(temporary, "many"), typed.listed)
    print(
        "| excerpt, s | batch | CPU ms per example | examples per s | seconds of music per s |\n|---|---|---|---|---|"
    )
    for row in results["reading"]:
        print(
            f"| {row['excerpt_seconds']:g} | {row['batch_size']} | {row['cpu_ms_per_example']:.2f} | "
            f"{row['examples_per_second']:.0f} | {row['seconds_of_music_per_second']:.0f} |"
        )
    print(f"{results['work_ms']:.2f} ms of it remain where an example holds next to nothing")
    checking, opening = results["checking"], results["opening"]
    print(
        f"{checking['gb']:.2f} GB checked at {checking['cpu_seconds_per_gb']:.2f} s of CPU per GB, and again at "
        f"{checking['cpu_us_per_file_again']:.0f} us per file"
    )
    print(f"{opening['songs']} songs opened in {opening['seconds']:.2f} s ({opening['cpu_seconds']:.2f} s of CPU)")
    for kind, room in results["room"].items():
        print(
            f"{kind}: {room['mb_per_minute']:.2f} MB per minute; "
            f"Side-Step's form {room['side_step_mb_per_minute']:.2f}, {room['times_less']:.1f} times as much"
        )
    if typed.out is not None:
        typed.out.parent.mkdir(parents=True, exist_ok=True)
        typed.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
