"""Small real things for tests: configs, a dataset, a run."""

from __future__ import annotations

import copy
import functools
import json
import logging
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

import sidestep.config.naming  # noqa: F401
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.adapters import AdapterConfig
from sidestep.config.data import SongsConfig
from sidestep.config.gate import compose_or_explain, conf_dir, read_variant, to_dataclass
from sidestep.config.settings import (
    AnalyzeConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    PreprocessConfig,
    ReportConfig,
    TrainConfig,
)
from sidestep.data.manifest import DatasetInfo, SongRecord, write_manifest

CHOICES = {
    "adapter": "lora", "optim": "adamw", "schedule": "constant", "timesteps": "acestep", "objective": "velocity",
    "model_variant": "base", "vram_profile": "auto",
}  # fmt: skip

ADAPTERS = {
    "lora": ("adapter=lora", "adapter.rank=4", "adapter.alpha=8"),
    "lora-ranks": ("adapter=lora", "adapter.rank=4", "adapter.alpha=8", "+adapter.rank_pattern={k_proj:2}"),
    "dora": ("adapter=dora", "adapter.rank=4", "adapter.alpha=8"),
    "lokr": ("adapter=lokr", "adapter.rank=3", "adapter.alpha=6", "adapter.factor=4"),
    "lokr-full": ("adapter=lokr",),
    "lokr-both": ("adapter=lokr", "adapter.rank=1", "adapter.alpha=2", "adapter.decompose_both=true"),
    "lokr-decomposed": ("adapter=lokr", "adapter.rank=3", "adapter.weight_decompose=true"),
    "loha": ("adapter=loha", "adapter.rank=4", "adapter.alpha=8"),
    "oft": ("adapter=oft", "adapter.block_size=16"),
}
"""Adapters of every family, as they are typed."""


def train_config(*overrides: str) -> TrainConfig:
    """The config that ``python -m sidestep.train`` would run with, quick enough for a test."""
    quick = [
        "name=test",
        "dataset_dir=data",
        "model_variant=base",
        "device=cpu",
        *([] if "adapter=oft" in overrides else ["adapter.rank=4"]),
        "optim.lr=0.01",
        "schedule.warmup_steps=2",
        "log_every_steps=1",
        "vram_profile.batch_size=1",
        "vram_profile.gradient_accumulation_steps=1",
        "vram_profile.gradient_checkpointing=none",
        "vram_profile.max_seconds=2",
    ]
    return copy.deepcopy(_composed(*quick, *overrides))


@functools.cache  # composing takes a tenth of a second, and many tests train again with the same settings
def _composed(*overrides: str) -> TrainConfig:
    return to_dataclass(compose_or_explain("train", overrides), TrainConfig)


def preprocess_config(*overrides: str) -> PreprocessConfig:
    return to_dataclass(
        compose_or_explain("preprocess", ["device=cpu", "model_variant=base", *overrides]), PreprocessConfig
    )


def generate_config(*overrides: str) -> GenerateConfig:
    """The config of ``python -m sidestep.generate``: the shortest music there is, in few steps."""
    quick = ["device=cpu", "prompt=quiet piano", "seconds=1", "num_inference_steps=2"]
    return to_dataclass(compose_or_explain("generate", [*quick, *overrides]), GenerateConfig)


def choices_of(*overrides: str) -> dict[str, str]:
    """The group options that a list of overrides chooses."""
    groups = ("model_variant=base", *(o for o in overrides if (conf_dir() / o.partition("=")[0]).is_dir()))
    return dict(_choices(*groups))


@functools.cache
def _choices(*groups: str) -> dict[str, str]:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose("train", ["name=test", "dataset_dir=data", *groups], return_hydra_config=True)
    return dict(config.hydra.runtime.choices)


def write_dataset(
    folder: Path, checkpoint_dir: Path, *, lengths: list[int], width: int = 64, variant: str = "base"
) -> Path:
    """A dataset of random latents and conditions in the layout that preprocessing writes.

    Args:
        folder: where to write it.
        checkpoint_dir: root of the toy checkpoint that it claims to be made with.
        lengths: latent frames of each song.
        width: of the conditions.
        variant: model variant.
    """
    checkpoint = find_checkpoint(checkpoint_dir, read_variant(variant))
    generator = torch.Generator().manual_seed(3)
    (folder / "latents").mkdir(parents=True)
    (folder / "conditions").mkdir()
    songs = []
    for i, length in enumerate(lengths):
        latents, conditions = f"latents/song{i}.safetensors", f"conditions/song{i}.safetensors"
        base = torch.randn(
            1, 64, generator=generator
        )  # each song has a colour of its own, so that there is something to learn
        save_file({"latents": (base + 0.3 * torch.randn(length, 64, generator=generator)).half()}, folder / latents)
        tokens = torch.randn(5 + i, width, generator=generator)
        parts = {"lyrics": tokens[:2], "reference": tokens[2:3], "caption": tokens[3:]}
        save_file({key: part.contiguous() for key, part in parts.items()}, folder / conditions)
        songs.append(
            SongRecord(
                audio=f"song{i}.wav",
                latents=latents,
                conditions=conditions,
                prompt="caption",
                num_frames=length,
                is_instrumental=True,
            )
        )
    info = DatasetInfo(
        model_variant=variant,
        condition_width=width,
        fingerprints={"condition_encoder": checkpoint.fingerprint("condition_encoder")},
        settings={"custom_tags": []},
        num_songs=len(songs),
    )
    write_manifest(folder, info, songs)
    return folder


def run_training(output_dir: Path, *overrides: str) -> float:
    """Train as the command would, into ``output_dir``."""
    from sidestep.training.loop import train

    logging.getLogger("sidestep").setLevel(logging.INFO)
    output_dir.mkdir(parents=True, exist_ok=True)
    return train(train_config(*overrides), output_dir, choices_of(*overrides))


def export_config(*overrides: str) -> ExportConfig:
    """The config of ``python -m sidestep.export``."""
    return to_dataclass(compose_or_explain("export", ["device=cpu", *overrides]), ExportConfig)


def inspect_config(*overrides: str) -> InspectConfig:
    """The config of ``python -m sidestep.inspect``."""
    return to_dataclass(compose_or_explain("inspect", [*overrides]), InspectConfig)


def report_config(*overrides: str) -> ReportConfig:
    """The config of ``python -m sidestep.report``."""
    return to_dataclass(compose_or_explain("report", [*overrides]), ReportConfig)


def analyze_config(*overrides: str) -> AnalyzeConfig:
    """The config of ``python -m sidestep.analyze``."""
    typed = ["device=cpu", "model_variant=base", "dataset_dir=data", *overrides]
    return to_dataclass(compose_or_explain("analyze", typed), AnalyzeConfig)


def songs_config(*overrides: str) -> SongsConfig:
    """The config of ``python -m sidestep.songs``."""
    return to_dataclass(compose_or_explain("songs", [*overrides]), SongsConfig)


def write_adapter(folder: Path, checkpoint_dir: Path, *overrides: str, variant: str = "base") -> Path:
    """An adapter with random weights that change the output a lot, saved as a run saves it.

    Args:
        folder: where to write it.
        checkpoint_dir: root of the toy checkpoint that it is for.
        overrides: of the group ``adapter``, as they are typed.
        variant: model variant.
    """
    model_variant = read_variant(variant)
    checkpoint = find_checkpoint(checkpoint_dir, model_variant)
    transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # what attach draws decides how much the adapter changes
        adapter = adapter_config(*overrides).attach(transformer)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True)
    about = {
        "model_variant": variant,
        "shift": model_variant.shift,
        "num_inference_steps": model_variant.num_inference_steps,
        "guidance_scale": model_variant.guidance_scale,
        "custom_tags": ["mystyle"],
        "checkpoint": checkpoint.fingerprint("transformer"),
        "dataset": "0123456789abcdef",
        "step": 12,
        "epoch": 3.0,
        "versions": {"sidestep": "0.1.0"},
    }
    adapter.save(folder, {"sidestep": json.dumps(about)})
    return folder


def adapter_config(*overrides: str) -> AdapterConfig:
    """The settings of ``adapter=...``, with values as they are typed."""
    return copy.deepcopy(_composed("name=test", "dataset_dir=data", "model_variant=base", *overrides).adapter)
