"""The settings of every command, and the one place where they are checked against each other.

Group options (adapter, optim, ...) are dataclasses beside the code they build; these are the root settings that
hold them. Nothing here imports torch, so that a mistyped setting is answered at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from omegaconf import MISSING

from sidestep.acestep.variants import VariantConfig
from sidestep.adapters import AdapterConfig
from sidestep.config.cluster import SlurmConfig
from sidestep.config.data import DataConfig
from sidestep.config.evaluation import HoldOutConfig, PreviewConfig, ValidationConfig
from sidestep.config.schema import option, root
from sidestep.errors import UserError
from sidestep.training.flow import ObjectiveConfig, TimestepConfig
from sidestep.training.optim import OptimConfig
from sidestep.training.schedules import ScheduleConfig
from sidestep.training.trackers import TrackingConfig

LEAST_SHIFT = 0.001
"""Far below any use; times at a shift near 0 are not numbers, as ``1 + (shift - 1)`` is 0 in float32."""


class Precision(StrEnum):
    """Names equal values, because OmegaConf matches an enum by name."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Resume(StrEnum):
    auto = "auto"
    never = "never"


class TagPosition(Enum):
    """Not a string itself: the name replace would hide a method of str."""

    prepend = "prepend"
    append = "append"
    replace = "replace"


class GradientCheckpointing(StrEnum):
    auto = "auto"
    none = "none"
    selective = "selective"
    full = "full"


class AttentionKernel(StrEnum):
    blocks = "blocks"
    flex = "flex"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


@dataclass(kw_only=True)
class MemorySettings:
    """What is given up to fit in memory, complete."""

    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: GradientCheckpointing
    checkpointed_share: float
    offloaded_share: float
    base_quantization: Quantization
    max_seconds: float

    @property
    def recomputed_share(self) -> float:
        """Share of the layers whose activations are computed again, wholly or in part."""
        return 0.0 if self.gradient_checkpointing is GradientCheckpointing.none else self.checkpointed_share


@option("vram_profile", "profile")
@dataclass(kw_only=True)
class VramConfig:
    """What is given up to fit in memory; a value left null is taken from the profile that fits the device."""

    memory_gib: float | None = None
    """Memory of the card this profile is for; null (vram_profile=auto) asks the device."""
    batch_size: int | None = None
    """Songs per forward pass."""
    gradient_accumulation_steps: int | None = None
    """Forward passes per optimiser step."""
    gradient_checkpointing: GradientCheckpointing | None = None
    """What the backward pass computes again: none, selective (all but products and attention), full (all), or auto."""
    checkpointed_share: float | None = None
    """Share of the transformer's layers that gradient_checkpointing is for; the first ones, and no more with auto."""
    offloaded_share: float | None = None
    """Share of the layers whose frozen weights wait in main memory; the first ones, which must be checkpointed."""
    base_quantization: Quantization | None = None
    """How the frozen layers are stored: none (as they are), int8 (half of bf16), or nf4 (about a quarter)."""
    max_seconds: float | None = None
    """Longest excerpt of a song that fits; the root setting max_seconds overrides it."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "gradient_accumulation_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"vram_profile.{key}={value} must be at least 1")
        if self.checkpointed_share is not None and not 0 < self.checkpointed_share <= 1:
            raise UserError(
                f"vram_profile.checkpointed_share={self.checkpointed_share} must be above 0 and at most 1; "
                "to recompute nothing type vram_profile.gradient_checkpointing=none"
            )
        if self.offloaded_share is not None and not 0 <= self.offloaded_share <= 1:
            raise UserError(f"vram_profile.offloaded_share={self.offloaded_share} must be from 0 to 1")
        check_excerpt("vram_profile.max_seconds", self.max_seconds)
        # words, where a profile is read without Hydra
        if self.gradient_checkpointing is not None:
            self.gradient_checkpointing = GradientCheckpointing(self.gradient_checkpointing)
        if self.base_quantization is not None:
            self.base_quantization = Quantization(self.base_quantization)

    def resolve(self, profiles: list[VramConfig], available_gib: float) -> MemorySettings:
        """Complete this profile.

        Args:
            profiles: every profile with a memory size of its own.
            available_gib: memory of the device that will train, in GiB.

        Returns:
            This profile's values, and for those left null the values of the largest profile that fits the device,
            or of the smallest one if none does.

        Raises:
            UserError: if weights would wait in main memory that the backward pass does not ask for again.
        """
        # a card sold as 8 GB reports a little less than 8 GiB
        fitting = [p for p in profiles if p.memory_gib is not None and p.memory_gib <= available_gib + 0.75]
        by_size = sorted(fitting or profiles, key=lambda p: p.memory_gib or 0.0)
        chosen = by_size[-1] if fitting else by_size[0]

        def value(key: str) -> object:
            own = getattr(self, key)
            return getattr(chosen, key) if own is None else own

        settings = MemorySettings(**{key: value(key) for key in MemorySettings.__dataclass_fields__})  # type: ignore[arg-type]
        if settings.offloaded_share > settings.recomputed_share:
            raise UserError(
                f"vram_profile.offloaded_share={settings.offloaded_share:g} needs as large a share of layers to be "
                f"computed again, and that is {settings.recomputed_share:g}; type "
                f"vram_profile.gradient_checkpointing=full vram_profile.checkpointed_share=1"
            )
        return settings


@root("train_schema")
@dataclass(kw_only=True)
class TrainConfig:
    """One training run."""

    model_variant: VariantConfig = MISSING
    """Which of the six models to train on."""
    adapter: AdapterConfig = MISSING
    """What is trained beside it."""
    optim: OptimConfig = MISSING
    """How its weights are changed."""
    schedule: ScheduleConfig = MISSING
    """How the learning rate goes."""
    timesteps: TimestepConfig = MISSING
    """How much noise examples carry."""
    objective: ObjectiveConfig = MISSING
    """What is minimised."""
    vram_profile: VramConfig = MISSING
    """What is given up to fit in memory."""
    tracking: TrackingConfig = MISSING
    """Which service receives the numbers besides TensorBoard."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is drawn from each song."""

    name: str = MISSING
    """Folder of this run or sweep: outputs/<name>/<run>."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints."""
    dataset_dir: str = MISSING
    """Folder that python -m sidestep.preprocess made, or one of tensor files of ACE-Step or Side-Step."""
    prior_dataset_dir: str | None = None
    """Dataset of other songs, trained on in every second batch so that the model does not forget them."""
    swept: list[str] = field(default_factory=list)
    """Filled in by -m: settings it gives several values that would not name a run otherwise, like dataset_dir."""
    cluster: SlurmConfig | None = None
    """What is asked of a cluster for each run (cluster=slurm); null runs here."""
    toy: bool = False
    """Make a tiny random model and a few synthesised songs first (experiment=demo)."""
    seed: int = 0
    """Decides the adapter's start, the order of songs, the excerpts, noise, times and dropout."""
    max_epochs: int | None = None
    """Passes over the songs; null leaves max_steps to decide."""
    max_steps: int | None = None
    """Optimiser steps; with max_epochs also set, whichever ends first."""
    save_every_epochs: int | None = None
    """Write checkpoints/epoch_N this often; null never."""
    save_every_steps: int | None = None
    """Write checkpoints/step_N this often; null never."""
    keep_last: int | None = None
    """Keep only this many of the newest checkpoints; null keeps all."""
    keep_every: int | None = None
    """With keep_last, also keep checkpoints whose number this divides: keep_every=50 keeps epoch_50, epoch_100, ..."""
    resume: Resume = Resume.auto
    """auto continues this run's newest checkpoint; never refuses to touch a run that has one."""
    init_from: str | None = None
    """Adapter of sidestep, ACE-Step or Side-Step whose weights a new run starts from."""
    resume_from: str | None = None
    """Checkpoint folder, or a file in it, to start from instead of this run's own newest."""
    device: Device = Device.auto
    """auto takes a CUDA GPU, then Apple's, then the CPU; or cpu, cuda, mps."""
    precision: Precision = Precision.auto
    """auto is bf16 on a GPU that has it, fp16 on an older one, and fp32 on a CPU."""
    max_seconds: float | None = None
    """Longest excerpt of a song, in seconds; null takes the VRAM profile's."""
    condition_dropout: float = MISSING
    """Share of examples trained on the null condition, which guidance needs; the variant's own by default."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: minutes at the start, less time per step on a GPU."""
    attention_kernel: AttentionKernel = AttentionKernel.blocks
    """What computes the band of layers with a window: blocks (any device), or flex (FlexAttention, a CUDA GPU)."""
    max_bad_steps: int = MISSING
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps change nothing."""
    log_every_steps: int = MISSING
    """How often the loss is logged, in steps."""
    log_dir: str | None = None
    """Folder of TensorBoard files; null is runs/ in the run's folder."""
    shift: float = MISSING
    """Inference shift written beside the adapter; the variant's own by default."""
    num_inference_steps: int = MISSING
    """Sampling steps written beside the adapter; the variant's own by default."""
    ema_decay: float | None = None
    """Keep a running mean of the adapter's weights, as with 0.999; evaluated too, and saved in final_ema/."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Songs that are held out of training, and how they are evaluated."""
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    """Music rendered while the run trains."""

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None:
            raise UserError("max_epochs and max_steps are both null, so the run would never end; set one of them")
        at_least(1, self, "max_epochs", "max_steps", "save_every_epochs", "save_every_steps", "log_every_steps")
        at_least(1, self, "num_inference_steps", "keep_last", "keep_every", "max_bad_steps")
        if self.keep_every is not None and self.keep_last is None:
            raise UserError(f"keep_every={self.keep_every} has no effect without keep_last; type keep_last=... too")
        at_least(LEAST_SHIFT, self, "shift")
        check_excerpt("max_seconds", self.max_seconds)
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"condition_dropout={self.condition_dropout} must be at least 0 and below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay:g} must be above 0 and below 1, for example ema_decay=0.999")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")
        if self.device is Device.cpu and self.precision is Precision.fp16:
            raise UserError("precision=fp16 needs a GPU; on device=cpu use precision=fp32 or precision=bf16")
        if self.compile and self.vram_profile.gradient_checkpointing is GradientCheckpointing.selective:
            raise UserError(
                "compile=true chooses by itself what to compute again, which contradicts "
                "vram_profile.gradient_checkpointing=selective; leave one of them out"
            )
        if self.resume is Resume.never and self.resume_from is not None:
            raise UserError(f"resume=never contradicts resume_from={self.resume_from}; leave one of them out")
        if self.adapter.analyzed_for not in (None, self.model_variant.name):
            raise UserError(
                f"adapter.rank_pattern_file was made for model_variant={self.adapter.analyzed_for}, not "
                f"{self.model_variant.name}; run python -m sidestep.analyze model_variant={self.model_variant.name} ..."
            )
        if self.data.prior_weight != 1 and self.prior_dataset_dir is None:
            raise UserError(f"data.prior_weight={self.data.prior_weight:g} has no effect without prior_dataset_dir=...")
        one_line(self, "name", "checkpoint_dir", "dataset_dir")
        filled(self, "name", "checkpoint_dir", "dataset_dir")
        check_name(self.name)


@root("preprocess_schema")
@dataclass(kw_only=True)
class PreprocessConfig:
    """Songs to a dataset folder."""

    model_variant: VariantConfig = MISSING
    """Which model the dataset is for."""
    cluster: SlurmConfig | None = None
    """What is asked of a cluster for each part (cluster=slurm); null runs here."""

    audio_dir: str = MISSING
    """Folder of songs, searched with its subfolders."""
    dataset_dir: str = MISSING
    """Folder to write; run again, only new and changed songs are done."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints."""
    metadata_file: str | None = None
    """Table of songs (dataset.json, csv, tsv, jsonl, nml) to read instead of those found in audio_dir."""
    file_tags: bool = True
    """Read title, genre, tempo, key and lyrics from the tags inside the files, where nothing else gives them."""
    shard: int | None = None
    """Which part of the songs to do, counted from 0; -m 'shard=range(0,8)' does all of eight."""
    num_shards: int | None = None
    """Into how many parts the songs are divided; the last one done puts the dataset together."""
    custom_tag: str = ""
    """Trigger word put into every caption."""
    tag_position: TagPosition | None = None
    """Where the tag goes: prepend, append, or replace the whole caption; null is a table's choice, or prepend."""
    genre_ratio: int | None = None
    """Per cent of songs that train on their genre line, not their caption; null is a table's choice, or 0."""
    language: str = MISSING
    """Language of lyrics whose metadata does not name one."""
    max_song_seconds: float | None = None
    """Read no more than this much of each song; null reads all of it."""
    reference: str = "silence"
    """Reference audio: silence, as where inference is given none; song, its other parts; or an audio file for all."""
    window_seconds: float | None = None
    """Cut longer songs into windows, each with its own duration and, where lyrics carry times, its own lyrics."""
    tile_seconds: float = MISSING
    """Length of audio that the VAE encodes at once; memory grows with it, the result does not change."""
    seed: int = 0
    """Decides the VAE's sampling noise."""
    device: Device = Device.auto
    """auto takes a CUDA GPU, then Apple's, then the CPU; or cpu, cuda, mps."""
    precision: Precision = Precision.auto
    """Of the text and condition encoders; auto is bf16 on a GPU and fp32 on a CPU. The VAE runs in fp32."""

    def __post_init__(self) -> None:
        at_least(1, self, "num_shards")
        if self.cluster is not None and self.cluster.processes > 1:
            raise UserError(
                f"each shard is done by one process, not by {self.cluster.processes}; use cluster.nodes=1, "
                f"cluster.gpus_per_node=1 and more shards"
            )
        if (self.shard is None) != (self.num_shards is None):
            raise UserError("shard and num_shards belong together: -m 'shard=range(0,8)' num_shards=8")
        if self.shard is not None and self.num_shards is not None and not 0 <= self.shard < self.num_shards:
            raise UserError(f"shard={self.shard} must be from 0 to {self.num_shards - 1}, below num_shards")
        if self.genre_ratio is not None and not 0 <= self.genre_ratio <= 100:
            raise UserError(f"genre_ratio={self.genre_ratio} is a percentage, from 0 to 100")
        if self.max_song_seconds is not None and self.max_song_seconds < 0.08:
            raise UserError(f"max_song_seconds={self.max_song_seconds} must be at least 0.08, two latent frames")
        if self.window_seconds is not None and not 1 <= self.window_seconds < float("inf"):
            raise UserError(f"window_seconds={self.window_seconds:g} must be at least 1")
        if self.tile_seconds < 5:
            raise UserError(f"tile_seconds={self.tile_seconds} must be at least 5, since 4 s of each tile overlap")
        if self.device is Device.cpu and self.precision is Precision.fp16:
            raise UserError("precision=fp16 needs a GPU; on device=cpu use precision=fp32 or precision=bf16")
        filled(self, "reference")
        one_line(self, "custom_tag", "language", "audio_dir", "dataset_dir", "checkpoint_dir")
        filled(self, "language", "audio_dir", "dataset_dir", "checkpoint_dir")


class AudioFormat(StrEnum):
    flac = "flac"
    wav = "wav"


@root("generate_schema")
@dataclass(kw_only=True)
class GenerateConfig:
    """Text to music, with any number of adapters."""

    model_variant: VariantConfig | None = None
    """Which model to play; the one the first adapter was trained on unless chosen."""

    prompt: str = MISSING
    """What the music should be, or @file to read it from a text file."""
    lyrics: str = ""
    """Lyrics, or @file; empty is an instrumental."""
    adapter_dir: Any = None
    """Adapter folder or file, or a list of them: [first/final,second/final]."""
    scale: Any = 1.0
    """Strength of the adapter, or one per adapter: [1.0,0.5]; 0 is exactly the base model."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints."""
    seconds: float = MISSING
    """Length of the music."""
    bpm: int | None = None
    """Beats per minute; null leaves it to the model."""
    keyscale: str = ""
    """Key, as in C major; empty leaves it to the model."""
    timesignature: str = ""
    """Beats per bar, as in 4; empty leaves it to the model."""
    language: str = MISSING
    """Language of the lyrics."""
    seeds: Any = MISSING
    """One piece of music per seed: 0, or [0,1,2]."""
    shift: float | None = None
    """Warp of time; null takes the adapter's, or the model's own."""
    num_inference_steps: int | None = None
    """Sampling steps; null takes the adapter's, or the model's own."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 is none; null takes the adapter's, or the model's own."""
    output_dir: str = MISSING
    """Folder to write the music into."""
    format: AudioFormat = AudioFormat.flac
    """flac or wav."""
    tile_seconds: float = MISSING
    """Length of music that the VAE decodes at once; memory grows with it, the result does not change."""
    offload: bool | None = None
    """Bring the transformer to the GPU layer by layer; null does so for XL models on cards below 16 GB."""
    device: Device = Device.auto
    """auto takes a CUDA GPU, then Apple's, then the CPU; or cpu, cuda, mps."""
    precision: Precision = Precision.auto
    """auto is bf16 on a GPU and fp32 on a CPU. The VAE runs in fp32."""

    def __post_init__(self) -> None:
        self.adapter_dir, self.scale = self._adapters()
        check_excerpt("seconds", self.seconds)
        at_least(LEAST_SHIFT, self, "shift")
        if self.seconds > 600:
            raise UserError(f"seconds={self.seconds:g} is more than ACE-Step makes; use seconds=600 or less")
        at_least(1, self, "num_inference_steps", "guidance_scale", "bpm")
        filled(self, "prompt", "checkpoint_dir", "output_dir", "language")
        one_line(self, "keyscale", "timesignature", "language", "checkpoint_dir", "output_dir")
        self.seeds = _as_list(self.seeds)
        if not self.seeds or not all(type(seed) is int and 0 <= seed < 2**63 for seed in self.seeds):
            raise UserError(f"seeds={self.seeds} must be whole numbers from 0 to 2**63 - 1, at least one: seeds=[0,1]")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds={self.seeds} has the same seed twice, which would make the same music twice")
        if self.tile_seconds < 5:
            raise UserError(f"tile_seconds={self.tile_seconds} must be at least 5, since 4 s of each tile overlap")
        if self.device is Device.cpu and self.precision is Precision.fp16:
            raise UserError("precision=fp16 needs a GPU; on device=cpu use precision=fp32 or precision=bf16")

    def _adapters(self) -> tuple[list[str], list[float]]:
        """Make lists of one length of ``adapter_dir`` and ``scale``."""
        folders = _as_list(self.adapter_dir)
        if not all(isinstance(folder, str) and folder.strip() for folder in folders):
            raise UserError(f"adapter_dir={self.adapter_dir} must be a folder, or a list: [first/final,other/final]")
        scales = _as_list(self.scale)
        if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in scales):
            raise UserError(f"scale={self.scale} must be a number, or a list with one per adapter: [1.0,0.5]")
        if not folders and scales != [1.0]:
            raise UserError(f"scale={self.scale} has no effect without adapter_dir; leave it out or name an adapter")
        if not isinstance(self.scale, list):
            scales = scales * len(folders)
        if len(scales) != len(folders):
            raise UserError(f"scale has {len(scales)} numbers for {len(folders)} adapters; give one for each")
        return folders, [float(scale) for scale in scales]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


class ExportFormat(StrEnum):
    lora = "lora"
    comfyui = "comfyui"
    diffusers = "diffusers"
    merged = "merged"


@root("export_schema")
@dataclass(kw_only=True)
class ExportConfig:
    """An adapter in another form."""

    model_variant: VariantConfig | None = None
    """Which base model, where one is needed; the one the adapter was trained on unless chosen."""

    adapter_dir: str = MISSING
    """Adapter folder or file."""
    format: ExportFormat = MISSING
    """lora, comfyui, diffusers, or merged: the whole base checkpoint with the adapter in it."""
    output_dir: str | None = None
    """Folder to write; null is <adapter_dir>-<format> beside the adapter."""
    scale: float = 1.0
    """Strength at which the adapter is written."""
    rank: int | None = None
    """Rank of the LoRA that another family is converted to; null takes the smallest that keeps max_error."""
    max_error: float = MISSING
    """Largest relative error per layer of a conversion to LoRA, where rank is null."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints, for format=merged and for adapters that depend on the weights."""
    device: Device = Device.auto
    """Where the arithmetic is done: auto, cpu, cuda or mps."""
    measure_output: bool = True
    """After a conversion, run the base model, if it is there, to say what is lost in its output; float32."""

    def __post_init__(self) -> None:
        filled(self, "adapter_dir", "checkpoint_dir")
        at_least(1, self, "rank")
        if not 0 < self.max_error < 1:
            raise UserError(f"max_error={self.max_error} must be above 0 and below 1")
        if self.scale == 0:
            raise UserError("scale=0 would write an adapter that does nothing; type another number")
        if self.rank is not None and self.format is ExportFormat.merged:
            raise UserError(f"rank={self.rank} has no effect on format=merged, which is exact; leave it out")


@root("inspect_schema")
@dataclass(kw_only=True)
class InspectConfig:
    """What an adapter is."""

    adapter_dir: str = MISSING
    """Adapter folder or file, of sidestep, ACE-Step or Side-Step."""
    plot: str | None = None
    """PNG file to draw the size of each layer's change into; null is inspect.png beside the adapter's weights."""
    model_variant: VariantConfig | None = None
    """Which base model to compare with; the one the adapter was trained on unless chosen."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints; used, if the checkpoint is there, for sizes relative to the base."""

    def __post_init__(self) -> None:
        filled(self, "adapter_dir", "checkpoint_dir")


class ReportFormat(StrEnum):
    table = "table"
    html = "html"
    csv = "csv"
    json = "json"


@root("report_schema")
@dataclass(kw_only=True)
class ReportConfig:
    """Where the points of a sweep stand."""

    sweep_dir: str = MISSING
    """Folder of the sweep, outputs/<name>; for format=html also that of one run."""
    format: ReportFormat = MISSING
    """table for the terminal, html for a page to look at and listen to, or csv or json with every setting."""
    inline_mb: float = MISSING
    """With format=html: up to this many MiB of music become part of the page; more is linked to."""

    def __post_init__(self) -> None:
        filled(self, "sweep_dir")
        if not self.inline_mb >= 0:
            raise UserError(f"inline_mb={self.inline_mb:g} must not be negative")


@root("analyze_schema")
@dataclass(kw_only=True)
class AnalyzeConfig:
    """How much each module matters on a dataset."""

    model_variant: VariantConfig = MISSING
    """Which model."""
    timesteps: TimestepConfig = MISSING
    """At which times it is measured."""

    dataset_dir: str = MISSING
    """Folder that python -m sidestep.preprocess made."""
    checkpoint_dir: str = MISSING
    """Folder that holds the ACE-Step checkpoints."""
    output: str = MISSING
    """File to write; a picture of the same name lies beside it."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Modules to measure, named as in adapter.target_modules."""
    rank: int = MISSING
    """Flat rank whose number of parameters is not exceeded."""
    max_rank: int = MISSING
    """No module gets more."""
    num_examples: int = MISSING
    """Excerpts to measure on, each at one time; more make the intervals narrower."""
    max_seconds: float = MISSING
    """Longest excerpt, in seconds."""
    allow_leaked_reference: bool = False
    """Measure on datasets whose reference audio is the song itself, as data.allow_leaked_reference trains on them."""
    validation: HoldOutConfig = field(default_factory=HoldOutConfig)
    """Songs to leave out: those that the run will hold out, so that they do not choose its ranks."""
    seed: int = 0
    """Decides the excerpts, noise and times."""
    device: Device = Device.auto
    """auto takes a CUDA GPU, then Apple's, then the CPU; or cpu, cuda, mps."""
    precision: Precision = Precision.auto
    """auto is bf16 on a GPU and fp32 on a CPU."""

    def __post_init__(self) -> None:
        filled(self, "dataset_dir", "checkpoint_dir", "output")
        at_least(1, self, "rank")
        at_least(2, self, "num_examples")
        check_excerpt("max_seconds", self.max_seconds)
        if self.max_rank < self.rank:
            raise UserError(f"max_rank={self.max_rank} must be at least rank={self.rank}")
        if self.precision is Precision.fp16:
            raise UserError("precision=fp16 loses small gradients; use precision=bf16 or precision=fp32")


def check_excerpt(key: str, seconds: float | None) -> None:
    """Refuse an excerpt shorter than one patch of the transformer, 0.08 s; null passes."""
    if seconds is not None and not 0.08 <= seconds < float("inf"):
        raise UserError(f"{key}={seconds} must be at least 0.08 seconds")


def at_least(least: float, config: object, *keys: str) -> None:
    """Refuse a setting below ``least``; null passes."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least}")


def check_name(name: str) -> None:
    """Refuse a name of a run or sweep that is not a folder below outputs/."""
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise UserError(f"name={name!r} must be a plain folder name, for example name=first")


def filled(config: object, *keys: str) -> None:
    """Refuse empty text."""
    for key in keys:
        if not getattr(config, key).strip():
            raise UserError(f"{key} is empty; type {key}=...")


def one_line(config: object, *keys: str) -> None:
    """Refuse text with control characters, which would break prompts, paths and logs."""
    for key in keys:
        value = getattr(config, key)
        if any(ord(char) < 32 for char in value):
            raise UserError(f"{key}={value!r} must be one line of text")
