"""How much music is preprocessed in a second, and what is done again when words change.

    python benchmarks/preprocess.py              # toy model and synthesised songs, on the CPU
    python benchmarks/preprocess.py --real-vae   # also the VAE in its real size with random weights; for a GPU
    python benchmarks/preprocess.py --real-words # also the encoders of words in their real sizes; 5 GB of memory

The command's own function is timed on songs of 60 s: for the first time, once more with nothing changed, and with every
caption changed, which encodes words alone. On the CPU the time is that of the processor, not of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3Model

import sidestep.config.naming  # noqa: F401
from sidestep.acestep.checkpoint import build_vae
from sidestep.acestep.conditioning import encode_lyrics, encode_reference, encode_text
from sidestep.acestep.toy import make_toy_checkpoint, make_toy_songs
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import PreprocessConfig
from sidestep.data.audio import SAMPLE_RATE
from sidestep.data.encode import encode_latents, preprocess

SONG_SECONDS = 60.0
REAL_VAE = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 6, 10], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": SAMPLE_RATE,
}  # fmt: skip
TILE_SECONDS = 30.0
CAPTION_TOKENS = (92, 95, 96, 98, 99, 100, 101, 104)
LYRIC_TOKENS = 300


def clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def whole_command(place: Path, songs: int, device: torch.device) -> list[dict[str, Any]]:
    """Time the command for the first time, again, and with other captions."""
    overrides = [
        f"audio_dir={place}/songs", f"dataset_dir={place}/data", f"checkpoint_dir={place}/checkpoints",
        "model_variant=base", f"device={device.type}", "language=en", f"tile_seconds={TILE_SECONDS:g}",
    ]  # fmt: skip
    config = to_dataclass(compose_or_explain("preprocess", overrides), PreprocessConfig)
    make_toy_checkpoint(place / "checkpoints", config.model_variant)
    make_toy_songs(place / "songs", count=songs, seconds=SONG_SECONDS)
    rows = []
    for what in ("first time", "nothing changed", "captions changed"):
        if what == "captions changed":
            for song in (place / "songs").glob("*.caption.txt"):
                song.write_text(song.read_text(encoding="utf-8") + ", live", encoding="utf-8")
        start = clock(device)
        summary = preprocess(config)
        seconds = clock(device) - start
        rows.append(
            {
                "what": what,
                "songs_changed": len(summary.changed),
                "seconds": round(seconds, 2),
                "seconds_per_minute_of_music": round(seconds / (songs * SONG_SECONDS / 60), 2),
            }
        )
    return rows


def real_vae(device: torch.device) -> dict[str, Any]:
    """Time the VAE's encoder in its real size, and its peak memory on a CUDA device."""
    vae = build_vae(REAL_VAE, Path("the benchmark")).to_empty(device=device).requires_grad_(False).eval()
    for parameter in vae.parameters():
        parameter.data.normal_(0, 0.02)
    audio = 0.1 * torch.randn(2, int(SONG_SECONDS * SAMPLE_RATE))
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the first one warms up
        start = clock(device)
        encode_latents(vae, audio, tile_seconds=TILE_SECONDS, generator=torch.Generator().manual_seed(0))
        seconds.append(clock(device) - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds_per_minute_of_music": round(seconds[-1], 2), "peak_gib": None if peak is None else round(peak, 2)}


def real_words(device: torch.device, layers: int | None = None) -> dict[str, Any]:
    """Time each part of a condition in its real size, and captions of about one length together and one by one.

    Args:
        device: where.
        layers: fewer than the real models have, for a test.
    """
    text_config = Qwen3Config(
        vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers or 28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with torch.device(device):
        text_encoder = Qwen3Model(text_config).eval()
        condition_encoder = AceStepConditionEncoder(
            num_lyric_encoder_hidden_layers=layers or 8, num_timbre_encoder_hidden_layers=layers or 4
        ).eval()
    encoders = {"text_encoder": text_encoder, "condition_encoder": condition_encoder}
    captions = [torch.randint(1000, (1, length)) for length in CAPTION_TOKENS]
    padded = pad_sequence([ids[0] for ids in captions], batch_first=True).to(device)
    lyrics, silence = torch.randint(1000, (1, LYRIC_TOKENS)), torch.randn(750, 64)

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        work()  # warms up
        start = clock(device)
        result = work()
        return round(clock(device) - start, 3), result

    apart, one_by_one = seconds(lambda: [encode_text(ids, **encoders) for ids in captions])
    together, batch = seconds(
        lambda: condition_encoder.text_projector(text_encoder(input_ids=padded).last_hidden_state)
    )
    differences = [(both[: len(one)] - one).abs().max().item() for both, one in zip(batch, one_by_one, strict=True)]
    return {
        "captions": len(captions),
        "captions_one_by_one": apart,
        "captions_together": together,
        "largest_difference": max(differences),
        "captions_with_equal_bits": differences.count(0.0),
        "lyrics": seconds(lambda: encode_lyrics(lyrics, **encoders))[0],
        "reference": seconds(lambda: encode_reference(silence, condition_encoder))[0],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=4)
    parser.add_argument("--real-vae", action="store_true", help="also the VAE in its real size")
    parser.add_argument("--real-words", action="store_true", help="also the encoders of words in their real sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/preprocess.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)

    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        rows = whole_command(Path(place), options.songs, device)
    print("| | songs changed | s per minute of music |\n|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['songs_changed']} | {row['seconds_per_minute_of_music']} |")
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__, "load": os.getloadavg(), "rows": rows,
    }  # fmt: skip
    if options.real_vae:
        with torch.no_grad():
            result["real_vae"] = real_vae(device)
        print(f"\nthe VAE in its real size: {result['real_vae']}")
    if options.real_words:
        with torch.no_grad():
            result["real_words"] = real_words(device)
        print(f"\nseconds for the words in their real sizes: {result['real_words']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
