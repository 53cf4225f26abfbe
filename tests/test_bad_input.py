"""What can be wrong with files, tried one by one on every command.

Each is answered in one line that names the file or the key, leaves every file as it was, and writes no result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep.data.encode import preprocess
from sidestep.errors import UserError
from sidestep.exporting.export import export
from sidestep.inference.generation import generate
from sidestep.inspecting.inspect import inspect_adapter
from sidestep.training.loop import train
from tests.audio_files import write
from tests.factories import (
    CHOICES,
    export_config,
    generate_config,
    inspect_config,
    preprocess_config,
    run_training,
    train_config,
)
from tests.processes import Command

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4787\n"
BOMB = struct.pack("<Q", 2**40) + b"{"
PLACES = ("checkpoint_dir=checkpoints",)
BASE, TEXT, VAE = "checkpoints/acestep-v15-base", "checkpoints/Qwen3-Embedding-0.6B", "checkpoints/vae"
LORA, LOKR = "adapters/lora/adapter_model.safetensors", "adapters/lokr/lokr_weights.safetensors"
LORA_CONFIG = "adapters/lora/adapter_config.json"
LATENTS, CONDITION = "dataset/latents/song0.safetensors", "dataset/conditions/song0.safetensors"
STATE = "outputs/done/checkpoints/epoch_1/training_state.pt"

SCALE = {"scale": 1.0}  # the config has made a list of it, one for each adapter

Damage = Callable[[Path], object]


# what can happen to a file


def write_file(path: str, content: bytes | str) -> Damage:
    def damage(world: Path) -> None:
        target = world / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut_short(path: str, share: float = 0.5) -> Damage:
    def damage(world: Path) -> None:
        whole = (world / path).read_bytes()
        (world / path).write_bytes(whole[: int(len(whole) * share)])

    return damage


def remove(path: str) -> Damage:
    return lambda world: shutil.rmtree(world / path) if (world / path).is_dir() else (world / path).unlink()


def change_json(path: str, **values: Any) -> Damage:
    """Set keys of a JSON object; Ellipsis takes a key away."""

    def damage(world: Path) -> None:
        content = json.loads((world / path).read_text()) | values
        content = {key: value for key, value in content.items() if value is not ...}
        (world / path).write_text(json.dumps(content))

    return damage


def change_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(world: Path) -> None:
        with safe_open(world / path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(world / path)
        change(tensors)
        (world / path).unlink()  # it is still mapped
        save_file(tensors, world / path, metadata)

    return damage


def change_header(path: str, **metadata: str) -> Damage:
    def damage(world: Path) -> None:
        with safe_open(world / path, "pt") as file:
            known = file.metadata()
        tensors = load_file(world / path)
        (world / path).unlink()
        save_file(tensors, world / path, {k: v for k, v in (known | metadata).items() if v != ""})

    return damage


def change_song(**values: Any) -> Damage:
    """Set keys of the first line of songs.jsonl."""

    def damage(world: Path) -> None:
        path = world / "dataset/songs.jsonl"
        first, *others = path.read_text().splitlines()
        song = {key: value for key, value in (json.loads(first) | values).items() if value is not ...}
        path.write_text("\n".join([json.dumps(song), *others]) + "\n")

    return damage


def save_tensor(path: str, content: object) -> Damage:
    return lambda world: torch.save(content, world / path)


def sing(name: str, samples: np.ndarray | None = None, rate: int = 48_000, **options: Any) -> Damage:
    """Put one song into the folder ``album``: noise of half a second, or these samples."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (rate // 2, 2)) if samples is None else samples
    return lambda world: write(world / "album" / name, samples.astype(np.float32), rate, **options)


def words(name: str, content: bytes | str) -> Damage:
    """One good song in the folder ``album``, and something beside it."""
    return all_of(sing("song.wav"), write_file(f"album/{name}", content))


def entries(*samples: Any, **metadata: Any) -> Damage:
    return words("dataset.json", json.dumps({"metadata": metadata, "samples": list(samples)}))


def all_of(*damages: Damage) -> Damage:
    return lambda world: [damage(world) for damage in damages]


def move(source: str, target: str) -> Damage:
    return lambda world: (world / source).rename(world / target)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if "lora_A" in key or "q_proj" in key or "lokr" in key)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)].view(-1)[0] = float("nan")


def nan_latents(tensors: dict[str, torch.Tensor]) -> None:
    tensors["latents"][3, 3] = float("nan")


SILENT_HEADER = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36, b"WAVEfmt ", 16, 1, 2, 48_000, 192_000, 4, 16, b"data", 0)
NOISE = np.random.default_rng(0).uniform(-1, 1, (144_000, 2))
NAN = np.where(np.arange(9600)[:, None] == 5000, np.nan, 0.1).repeat(2, axis=1)


# command, what is wrong, what is typed, what the answer says

CHECKPOINTS: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "no checkpoint folder": ("train", None, {"checkpoint_dir": "nowhere"}, ["nowhere", "download_checkpoint.py base"]),
    "an empty checkpoint folder": (
        "train", lambda world: (world / "empty").mkdir(), {"checkpoint_dir": "empty"}, ["empty", "it is empty"]),
    "a file for a checkpoint folder": (
        "train", None, {"checkpoint_dir": LORA}, [LORA, "is a file, not a folder"]),
    "a folder of songs for a checkpoint folder": ("generate", None, {"checkpoint_dir": "dataset"}, ["dataset"]),
    "a turbo model under the name of base": (
        "train", change_json(f"{BASE}/config.json", is_turbo=True), {}, [BASE, "a turbo model", "model_variant=turbo"]),
    "an XL model under the name of base": (
        "train", change_json(f"{BASE}/config.json", encoder_hidden_size=32), {}, [BASE, "an XL"]),
    "no config": ("train", remove(f"{BASE}/config.json"), {}, [BASE, "no config.json with model.safetensors"]),
    "a web page for a config": ("train", write_file(f"{BASE}/config.json", HTML), {}, [f"{BASE}/config.json", "JSON"]),
    "a list for a config": ("train", write_file(f"{BASE}/config.json", "[]"), {}, [f"{BASE}/config.json", "list"]),
    "a config without sizes": (
        "train", change_json(f"{BASE}/config.json", num_hidden_layers=...), {}, ["config.json", "num_hidden_layers"]),
    "a config with text for a size": (
        "train", change_json(f"{BASE}/config.json", head_dim="big"), {}, ["config.json", "head_dim", "'big'"]),
    "a config with a huge size": (
        "train", change_json(f"{BASE}/config.json", intermediate_size=10**30), {},
        ["config.json", "intermediate_size"]),
    "a config with a size of 0": (
        "train", change_json(f"{BASE}/config.json", head_dim=0), {}, ["config.json", "head_dim", "from 1 to"]),
    "a config with a million layers": (
        "train", change_json(f"{BASE}/config.json", num_hidden_layers=10**6), {}, ["num_hidden_layers", "1000"]),
    "a config with a huge number": (
        "train", change_json(f"{BASE}/config.json", rope_theta=1e308), {}, ["config.json", "rope_theta"]),
    "a config with other sizes": (
        "train", change_json(f"{BASE}/config.json", intermediate_size=96), {}, ["model.safetensors", "has shape"]),
    "a config that is nested too deeply": (
        "train", write_file(f"{BASE}/config.json", "[" * 100_000), {}, ["config.json", "JSON"]),
    "half a model": ("train", cut_short(f"{BASE}/model.safetensors"), {}, ["model.safetensors", "is damaged"]),
    "a web page for a model": ("train", write_file(f"{BASE}/model.safetensors", HTML), {}, ["model.safetensors"]),
    "a pointer for a model": ("train", write_file(f"{BASE}/model.safetensors", POINTER), {}, ["model.safetensors"]),
    "an empty model": ("train", write_file(f"{BASE}/model.safetensors", b""), {}, ["model.safetensors", "is damaged"]),
    "a model with a huge header": ("train", write_file(f"{BASE}/model.safetensors", BOMB), {}, ["model.safetensors"]),
    "a folder for a model": (
        "train", all_of(remove(f"{BASE}/model.safetensors"), lambda w: (w / BASE / "model.safetensors").mkdir()), {},
        ["model.safetensors"]),
    "a model without a layer": (
        "train", change_tensors(f"{BASE}/model.safetensors", lambda t: t.pop("decoder.layers.0.mlp.up_proj.weight")),
        {}, [BASE, "lacks the weight decoder.layers.0.mlp.up_proj.weight"]),
    "a model with a strange layer": (
        "train", change_tensors(f"{BASE}/model.safetensors", lambda t: t.update({"unet.x": torch.ones(2)})), {},
        ["model.safetensors", "unet.x"]),
    "a model without the null condition": (
        "generate", change_tensors(f"{BASE}/model.safetensors", lambda t: t.pop("null_condition_emb")), {},
        [BASE, "null_condition_emb"]),
    "no silence": ("train", remove(f"{BASE}/silence_latent.pt"), {}, ["silence_latent.pt is missing"]),
    "a web page for silence": ("train", write_file(f"{BASE}/silence_latent.pt", HTML), {}, ["silence_latent.pt"]),
    "half a silence": ("train", cut_short(f"{BASE}/silence_latent.pt"), {}, ["silence_latent.pt is damaged"]),
    "silence with other channels": (
        "train", save_tensor(f"{BASE}/silence_latent.pt", torch.zeros(1, 8, 800)), {}, ["silence_latent.pt", "shape"]),
    "silence that is too short": (
        "train", save_tensor(f"{BASE}/silence_latent.pt", torch.zeros(1, 64, 10)), {},
        ["silence_latent.pt", "10 frames"]),
    "silence that is no tensor": (
        "train", save_tensor(f"{BASE}/silence_latent.pt", {"a": 1}), {}, ["silence_latent.pt", "no tensor"]),
    "a missing shard": (
        "train",
        all_of(
            remove(f"{BASE}/model.safetensors"),
            write_file(f"{BASE}/model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
        ),
        {}, ["model-2.safetensors is missing"]),
    "an index without a map": (
        "train",
        all_of(remove(f"{BASE}/model.safetensors"), write_file(f"{BASE}/model.safetensors.index.json", "{}")),
        {}, ["model.safetensors.index.json", "weight_map"]),
    "no VAE": ("generate", remove(VAE), {}, ["vae/ is missing"]),
    "half a VAE": ("generate", cut_short(f"{VAE}/diffusion_pytorch_model.safetensors"), {}, [VAE]),
    "a VAE of another rate": ("generate", change_json(f"{VAE}/config.json", sampling_rate=44_100), {}, [VAE, "44100"]),
    "no text encoder": ("generate", remove(TEXT), {}, ["Qwen3-Embedding-0.6B/ is missing"]),
    "a web page for a tokenizer": ("generate", write_file(f"{TEXT}/tokenizer.json", HTML), {}, ["tokenizer.json"]),
    "a tokenizer of nothing": ("generate", write_file(f"{TEXT}/tokenizer.json", "{}"), {}, ["tokenizer.json"]),
    "a text encoder with a million layers": (
        "generate", change_json(f"{TEXT}/config.json", num_hidden_layers=10**6), {}, [TEXT, "num_hidden_layers"]),
    "a text encoder of another width": (
        "generate", change_json(f"{TEXT}/config.json", hidden_size=128), {}, [TEXT, "has shape"]),
    "half a VAE for preprocessing": (
        "preprocess", cut_short(f"{VAE}/diffusion_pytorch_model.safetensors"), {}, ["diffusion_pytorch_model"]),
}  # fmt: skip

ALBUM = {"audio_dir": "album"}
AUDIO: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "no folder of songs": ("preprocess", None, {"audio_dir": "nowhere"}, ["audio_dir=nowhere", "does not exist"]),
    "a song for a folder of songs": (
        "preprocess", None, {"audio_dir": "songs/0.wav"}, ["audio_dir=songs/0.wav", "is a file"]),
    "a folder without songs": ("preprocess", None, {"audio_dir": "dataset"}, ["audio_dir=dataset", "holds no songs"]),
    "an empty song": ("preprocess", write_file("album/a.wav", b""), ALBUM, ["album/a.wav is empty"]),
    **{
        f"text named {name}": (
            "preprocess", write_file(f"album/{name}", "only words\n" * 99), ALBUM, [f"{name} cannot be read as audio"])
        for name in ("a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "a.m4a", "a.aac")
    },
    **{
        f"{name} cut short": (
            "preprocess", all_of(sing(name, NOISE), cut_short(f"album/{name}")), ALBUM, [f"album/{name}"])
        for name in ("a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "a.m4a")
    },
    "a song of 0.01 s": ("preprocess", sing("a.wav", np.zeros((480, 2))), ALBUM, ["a.wav is 0.010 s long"]),
    "a song without samples": ("preprocess", write_file("album/a.wav", SILENT_HEADER), ALBUM, ["album/a.wav"]),
    "a header alone": ("preprocess", write_file("album/a.wav", SILENT_HEADER[:20]), ALBUM, ["album/a.wav"]),
    "samples that are NaN": (
        "preprocess", sing("a.wav", NAN, subtype="FLOAT"), ALBUM, ["a.wav holds samples that are not"]),
    "a link to nowhere": (
        "preprocess", all_of(sing("b.wav"), lambda w: (w / "album/a.wav").symlink_to("gone.wav")), ALBUM,
        ["album/a.wav"]),
    "a name with a line break, and bad words": (
        "preprocess", all_of(sing("a\nb.wav"), write_file("album/a\nb.json", "{")), ALBUM, ["a\\nb.json is not JSON"]),
    "a name that is not UTF-8": (
        "preprocess", all_of(sing("a.wav"), move("album/a.wav", os.fsdecode(b"album/caf\xe9.wav"))), ALBUM,
        ["caf\\udce9.wav", "rename it"]),
}  # fmt: skip

WORDS: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "a broken dataset.json": (
        "preprocess", words("dataset.json", '{"samples": ['), ALBUM, ["dataset.json is not JSON"]),
    "a web page for a dataset.json": ("preprocess", words("dataset.json", HTML), ALBUM, ["dataset.json is not JSON"]),
    "a number for a dataset.json": ("preprocess", words("dataset.json", "5"), ALBUM, ["dataset.json must be"]),
    "a dataset.json of other keys": (
        "preprocess", words("dataset.json", '{"tra\\ncks": []}'), ALBUM, ["dataset.json must be", "cks"]),
    "a dataset.json with an object of songs": (
        "preprocess", words("dataset.json", '{"samples": {"a": 1}}'), ALBUM, ["dataset.json must be"]),
    "a dataset.json nested too deeply": (
        "preprocess", words("dataset.json", "[" * 100_000), ALBUM, ["dataset.json is not JSON"]),
    "a metadata_file that is not there": (
        "preprocess", sing("a.wav"), {**ALBUM, "metadata_file": "gone.json"}, ["gone.json", "does not exist"]),
    "a folder for a metadata_file": ("preprocess", sing("a.wav"), {**ALBUM, "metadata_file": "songs"}, ["songs"]),
    "an entry that is no object": ("preprocess", entries("song.wav"), ALBUM, ["dataset.json entry 1", "an object"]),
    "an entry of no file": ("preprocess", entries({"caption": "x"}), ALBUM, ["dataset.json entry 1", "audio_path"]),
    "an entry outside of the folder": (
        "preprocess", entries({"audio_path": "../songs/0.wav"}), ALBUM, ["entry 1", "../songs/0.wav is outside"]),
    "an entry named twice": (
        "preprocess", entries({"filename": "song.wav"}, {"filename": "song.wav"}), ALBUM, ["entry 2", "named twice"]),
    "an entry with a zero byte": ("preprocess", entries({"filename": "song\0.wav"}), ALBUM, ["dataset.json entry 1"]),
    "an entry with half a character": (
        "preprocess", entries({"filename": "\ud800.wav"}), ALBUM, ["dataset.json entry 1"]),
    "a genre ratio of 500": ("preprocess", entries(genre_ratio=500), ALBUM, ["dataset.json metadata", "genre_ratio"]),
    "a genre ratio in words": ("preprocess", entries(genre_ratio="half"), ALBUM, ["dataset.json metadata", "'half'"]),
    "a tag position of nowhere": ("preprocess", entries(tag_position="nowhere"), ALBUM, ["tag_position", "'nowhere'"]),
    "a tag of two lines": ("preprocess", entries(custom_tag="a\nb"), ALBUM, ["dataset.json metadata", "custom_tag"]),
    **{
        f"{key} of an entry as {value!r:.20}": (
            "preprocess", entries({"filename": "song.wav", key: value}), ALBUM, ["song.wav", key])
        for key, value in [
            ("bpm", "fast"), ("bpm", -3), ("bpm", [120]), ("bpm", True), ("bpm", 1e300), ("bpm", 10**400),
            ("weight", 10**400), ("weight", 1e300), ("repeat", 10**20),
            ("caption", 5), ("caption", ["a"]), ("caption", "a\x07b"), ("caption", "\ud800"),
            ("lyrics", "la\x1b[31m"), ("lyrics", {}), ("lyrics", "la\0la"), ("genre", "a\nb"), ("language", "e\nn"),
            ("keyscale", ["C"]), ("timesignature", "waltz"), ("timesignature", {}), ("is_instrumental", "maybe"),
            ("prompt_override", "both"), ("prompt_override", "genre"), ("repeat", "often"), ("repeat", 1.5),
            ("custom_tag", 7),
        ]
    },
    "a broken song.json": ("preprocess", words("song.json", "{caption: x}"), ALBUM, ["song.json is not JSON"]),
    "a list for a song.json": ("preprocess", words("song.json", "[]"), ALBUM, ["song.json must be an object"]),
    "a song.json nested too deeply": ("preprocess", words("song.json", '{"a":' * 50_000), ALBUM, ["song.json"]),
    "a caption that is not UTF-8": ("preprocess", words("song.caption.txt", b"caf\xe9"), ALBUM, ["song.caption.txt"]),
    "lyrics in UTF-16": (
        "preprocess", words("song.lyrics.txt", "la la".encode("utf-16")), ALBUM, ["song.lyrics.txt", "UTF-8"]),
    "lyrics with a control character": (
        "preprocess", words("song.lyrics.txt", "la\x1b[2J"), ALBUM, ["song.lyrics.txt: lyrics", "control characters"]),
    "a dataset_dir that is a file": ("preprocess", None, {"dataset_dir": LORA}, [f"dataset_dir={LORA}"]),
}  # fmt: skip

DATASETS: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "no dataset": ("train", None, {"dataset_dir": "nowhere"}, ["dataset_dir=nowhere", "sidestep.preprocess"]),
    "a folder of songs for a dataset": ("train", None, {"dataset_dir": "songs"}, ["dataset_dir=songs", "0.wav"]),
    "a file for a dataset": ("train", None, {"dataset_dir": LORA}, [f"dataset_dir={LORA}", "is a file"]),
    "a dataset without songs.jsonl": ("train", remove("dataset/songs.jsonl"), {}, ["dataset/songs.jsonl is missing"]),
    "an empty songs.jsonl": ("train", write_file("dataset/songs.jsonl", ""), {}, ["songs.jsonl names no songs"]),
    "a broken line": ("train", write_file("dataset/songs.jsonl", '{"audio": '), {}, ["songs.jsonl line 1"]),
    "a line of another kind": ("train", write_file("dataset/songs.jsonl", "[1, 2]"), {}, ["songs.jsonl line 1"]),
    "a song without latents": ("train", change_song(latents=...), {}, ["songs.jsonl line 1", "latents"]),
    "half a character in songs.jsonl": (
        "train", change_song(audio="a\ud800.wav"), {}, ["songs.jsonl line 1", "audio", "no character"]),
    "frames in words": ("train", change_song(num_frames="many"), {}, ["songs.jsonl line 1", "num_frames", "'many'"]),
    "a huge number of frames": ("train", change_song(num_frames=10**30), {}, ["songs.jsonl line 1", "num_frames"]),
    "a huge number of repeats": ("train", change_song(repeat=10**20), {}, ["songs.jsonl line 1", "repeat"]),
    "a huge weight": ("train", change_song(weight=1e300), {}, ["songs.jsonl line 1", "weight"]),
    "trigger words with half a character": (
        "train", change_json("dataset/dataset_info.json", settings={"custom_tags": ["\ud800"]}), {},
        ["dataset_info.json", "custom_tags"]),
    "trigger words that are numbers": (
        "train", change_json("dataset/dataset_info.json", settings={"custom_tags": [5]}), {},
        ["dataset_info.json", "custom_tags"]),
    "windows of a huge length": (
        "train", change_json("dataset/dataset_info.json", settings={"custom_tags": [], "window_seconds": 1e308}), {},
        ["dataset_info.json", "window_seconds"]),
    "fewer frames than a patch": ("train", change_song(num_frames=1), {}, ["song0.wav", "1 frames"]),
    "more frames than there are": ("train", change_song(num_frames=10**6), {}, ["song0.safetensors", "shorter"]),
    "a path that leaves the dataset": (
        "train", change_song(latents="../adapters/lora/adapter_model.safetensors"), {}, ["songs.jsonl", "no file of"]),
    "a path from the root": ("train", change_song(latents="/etc/passwd"), {}, ["songs.jsonl", "'/etc/passwd'"]),
    "a path with a line break": ("train", change_song(latents="latents/a\nb"), {}, ["songs.jsonl", "a\\nb"]),
    "a prompt that is not stored": ("train", change_song(prompt="genre"), {}, ["songs.jsonl line 1", "prompt"]),
    "a web page for a description": ("train", write_file("dataset/dataset_info.json", HTML), {}, ["dataset_info.json"]),
    "a description of another format": (
        "train", change_json("dataset/dataset_info.json", format=99), {}, ["dataset_info.json has format 99"]),
    "a description without fingerprints": (
        "train", change_json("dataset/dataset_info.json", fingerprints={}), {}, ["dataset_dir=dataset"]),
    "a description without settings": (
        "train", change_json("dataset/dataset_info.json", settings={}), {}, ["dataset_info.json", "custom_tags"]),
    "a description with a strange key": (
        "train", change_json("dataset/dataset_info.json", extra=1), {}, ["dataset_info.json", "extra"]),
    "a dataset for another model": (
        "train", change_json("dataset/dataset_info.json", fingerprints={"condition_encoder": "0"}), {},
        ["dataset_dir=dataset", "another checkpoint"]),
    "missing latents": ("train", remove(LATENTS), {}, [f"{LATENTS} of song0.wav is missing"]),
    "half the latents": ("train", cut_short(LATENTS), {}, [LATENTS, "song0.wav"]),
    "a web page for latents": ("train", write_file(LATENTS, HTML), {}, [LATENTS, "song0.wav"]),
    "latents with a huge header": ("train", write_file(LATENTS, BOMB), {}, [LATENTS, "song0.wav"]),
    "latents with NaN": ("train", change_tensors(LATENTS, nan_latents), {}, [LATENTS, "song0.wav"]),
    "latents with other channels": (
        "train", change_tensors(LATENTS, lambda t: t.update(latents=torch.zeros(60, 63))), {}, [LATENTS, "song0.wav"]),
    "latents without channels": (
        "train", change_tensors(LATENTS, lambda t: t.update(latents=torch.zeros(60))), {}, [LATENTS, "song0.wav"]),
    "latents in whole numbers": (
        "train", change_tensors(LATENTS, lambda t: t.update(latents=torch.zeros(60, 64, dtype=torch.int64))), {},
        [LATENTS, "song0.wav"]),
    "latents of nothing": (
        "train", change_tensors(LATENTS, lambda t: t.update(latents=torch.tensor(1.0))), {}, [LATENTS, "song0.wav"]),
    "a condition of another width": (
        "train", change_tensors(CONDITION, lambda t: t.update(caption=torch.zeros(5, 63))), {},
        [CONDITION, "song0.wav"]),
    "a condition with NaN": (
        "train", change_tensors(CONDITION, lambda t: t["caption"].fill_(float("nan"))), {}, [CONDITION, "song0.wav"]),
    "a condition without tokens": (
        "train", change_tensors(CONDITION, lambda t: t.update(caption=torch.zeros(0, 64))), {},
        [CONDITION, "song0.wav"]),
}  # fmt: skip

FINAL = {"adapter_dir": ["adapters/lora"]}
ADAPTERS: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "no adapter": ("generate", None, {"adapter_dir": ["gone/final"]}, ["gone/final does not exist"]),
    "a folder without an adapter": ("generate", None, {"adapter_dir": ["dataset"]}, ["dataset holds no adapter"]),
    "a web page for an adapter": ("generate", write_file(LORA, HTML), FINAL, [LORA, "not a whole safetensors"]),
    "half an adapter": ("generate", cut_short(LORA), FINAL, [LORA, "not a whole safetensors file"]),
    "an empty adapter": ("generate", write_file(LORA, b""), FINAL, [LORA, "(0 bytes)"]),
    "an adapter with a huge header": ("generate", write_file(LORA, BOMB), FINAL, [LORA]),
    "an adapter with NaN": ("generate", change_tensors(LORA, set_nan), FINAL, [LORA, "NaN or infinity"]),
    "an adapter without its config": ("generate", remove(LORA_CONFIG), FINAL, [LORA, "adapter_config.json"]),
    "a broken config": ("generate", write_file(LORA_CONFIG, "{"), FINAL, [LORA_CONFIG, "not JSON"]),
    "a config that is a list": ("generate", write_file(LORA_CONFIG, "[]"), FINAL, [LORA_CONFIG, "not a JSON object"]),
    "a config nested too deeply": ("generate", write_file(LORA_CONFIG, "[" * 100_000), FINAL, [LORA_CONFIG]),
    "a config of another kind": ("generate", change_json(LORA_CONFIG, peft_type="IA3"), FINAL, [LORA_CONFIG, "'IA3'"]),
    "a config whose kind is a list": ("generate", change_json(LORA_CONFIG, peft_type=["LORA"]), FINAL, [LORA_CONFIG]),
    "a config of rank 0": ("generate", change_json(LORA_CONFIG, r=0), FINAL, [LORA_CONFIG, "r 0"]),
    "a config of rank NaN": ("generate", change_json(LORA_CONFIG, r=float("nan")), FINAL, [LORA_CONFIG, "r", "nan"]),
    "a config of rank infinity": ("generate", change_json(LORA_CONFIG, r=float("inf")), FINAL, [LORA_CONFIG]),
    "a config of huge rank": ("generate", change_json(LORA_CONFIG, r=2**63), FINAL, [LORA_CONFIG]),
    "a config of an alpha past any use": (
        "generate", change_json(LORA_CONFIG, lora_alpha=1e308), FINAL, [LORA_CONFIG, "lora_alpha"]),
    "a config of another rank": ("generate", change_json(LORA_CONFIG, r=7), FINAL, [LORA_CONFIG, "rank 7"]),
    "a config without alpha": (
        "generate", change_json(LORA_CONFIG, lora_alpha=...), FINAL, [LORA_CONFIG, "lora_alpha"]),
    "a config whose patterns are a list": (
        "generate", change_json(LORA_CONFIG, rank_pattern=["q_proj"]), FINAL, [LORA_CONFIG, "rank_pattern"]),
    "a config whose pattern is broken": (
        "generate", change_json(LORA_CONFIG, rank_pattern={"(": 2}), FINAL, [LORA_CONFIG, "rank_pattern"]),
    **{
        f"a config whose {key} would take for ever": (
            "generate", change_json(LORA_CONFIG, **{key: value}), FINAL, [LORA_CONFIG, key, "repeats too much"])
        for key, value in [
            ("rank_pattern", {"(.|.)*X": 2}), ("alpha_pattern", {".*" * 12 + "X": 2}), ("target_modules", "(.*)*X"),
        ]
    },
    "a config with modules_to_save": (
        "generate", change_json(LORA_CONFIG, modules_to_save=["x"]), FINAL, [LORA_CONFIG, "modules_to_save"]),
    "an adapter of another model": (
        "generate", change_tensors(LORA, lambda t: t.update({first(t): torch.ones(4, 8)})), FINAL, [LORA, "32x8"]),
    "an adapter with another program's names": (
        "generate", change_tensors(LORA, lambda t: t.update({"lora_unet_x": torch.ones(2)})), FINAL,
        [LORA, "lora_unet_x"]),
    "half a pair": (
        "generate", change_tensors(LORA, lambda t: t.pop(first(t))), FINAL, [LORA, "no whole lora adapter"]),
    "an adapter of a model nobody knows": (
        "generate", change_header(LORA, sidestep='{"model_variant": "huge"}'), FINAL | {"model_variant": None},
        ["adapters/lora", "'huge'"]),
    "an adapter of a model elsewhere": (
        "generate", change_header(LORA, sidestep='{"model_variant": "../adapter/lora"}'),
        FINAL | {"model_variant": None},
        ["adapters/lora", "'../adapter/lora'"]),
    "an adapter of a model with a long name": (
        "generate", change_header(LORA, sidestep=json.dumps({"model_variant": "x" * 5000})),
        FINAL | {"model_variant": None}, ["adapters/lora"]),
    "an adapter whose header is broken": ("generate", change_header(LORA, sidestep="{"), FINAL, [LORA, "header"]),
    "a header with half a step": (
        "generate", change_header(LORA, sidestep='{"model_variant": "base", "num_inference_steps": 2.5}'),
        FINAL | {"num_inference_steps": None},
        ["adapters/lora", "num_inference_steps=2.5"]),
    **{
        f"a header with {key}={value}": (
            "generate", change_header(LORA, sidestep=json.dumps({"model_variant": "base", key: value})),
            FINAL | {"num_inference_steps": None}, ["adapters/lora", key])
        for key, value in [
            ("num_inference_steps", 10**30), ("num_inference_steps", 10**9), ("shift", 1e308), ("shift", float("inf")),
            ("guidance_scale", 1e308), ("guidance_scale", 10**400),
        ]
    },
    "a strength of export past any use, to look at": (
        "inspect", change_header(LORA, sidestep_export=json.dumps({"family": "lora", "scale": [1]})), {},
        [LORA, "sidestep_export"]),
    "a header with a number for trigger words": (
        "generate", change_header(LORA, sidestep='{"custom_tags": 5}'), FINAL, ["adapters/lora", "custom_tags"]),
    "a LoKr without its config": (
        "generate", change_header(LOKR, lokr_config=""), {"adapter_dir": ["adapters/lokr"]},
        [LOKR, "neither lokr_config"]),
    "a LoKr with a broken config": (
        "generate", change_header(LOKR, lokr_config="{"), {"adapter_dir": ["adapters/lokr"]}, ["lokr_config in", LOKR]),
    "a LoKr without a part": (
        "generate", change_tensors(LOKR, lambda t: t.pop(first(t))), {"adapter_dir": ["adapters/lokr"]}, [LOKR]),
    "two adapters in one folder": (
        "generate", write_file("adapters/lora/lokr_weights.safetensors", b""), FINAL, ["adapters/lora holds two"]),
    "a model for an adapter": (
        "generate", None, {"adapter_dir": [f"{BASE}/model.safetensors"]}, ["model.safetensors is no adapter"]),
    "a training state for an adapter": ("generate", None, {"adapter_dir": [STATE]}, [STATE, "not a whole safetensors"]),
    "a web page for an export": (
        "export", write_file(LORA, HTML), {"adapter_dir": "adapters/lora"}, [LORA, "not a whole safetensors file"]),
    "an export of nothing": ("export", None, {"adapter_dir": "gone"}, ["gone does not exist"]),
    "an export into a folder of other things": ("export", None, {"output_dir": "songs"}, ["output_dir=songs", "0.wav"]),
    "an export over the adapter": ("export", None, {"output_dir": "adapters/lora"}, ["output_dir=adapters/lora"]),
    "an export below a file": ("export", None, {"output_dir": "songs/0.wav/x"}, ["songs/0.wav"]),
    "a web page to look at": (
        "inspect", write_file(LOKR, HTML), {"adapter_dir": "adapters/lokr"}, [LOKR, "not a whole safetensors file"]),
    "nothing to look at": ("inspect", None, {"adapter_dir": "gone"}, ["gone does not exist"]),
    "a picture below a file": ("inspect", None, {"plot": "songs/0.wav/x.png"}, ["songs/0.wav/x.png"]),
    "a picture over a folder": ("inspect", None, {"plot": "songs"}, ["songs"]),
    "versions that are a list, to look at": (
        "inspect", change_header(LORA, sidestep='{"versions": [1]}'), {}, [LORA, "versions"]),
    "trigger words that are a number, to look at": (
        "inspect", change_header(LORA, sidestep='{"custom_tags": 1}'), {}, [LORA, "custom_tags"]),
    "a broken word about an export, to look at": (
        "inspect", change_header(LORA, sidestep_export="{"), {}, [LORA, "sidestep_export"]),
    "a start from nothing": ("train", None, {"init_from": "gone"}, ["gone does not exist"]),
    "a start from a web page": ("train", write_file(LORA, HTML), {"init_from": "adapters/lora"}, [LORA]),
    "a start from another family": ("train", None, {"init_from": "adapters/lokr"}, [LOKR, "adapter=lokr"]),
}  # fmt: skip

OTHER: dict[str, tuple[str, Damage | None, dict[str, Any], list[str]]] = {
    "a resume from nowhere": ("train", None, {"resume_from": "gone"}, ["resume_from=gone", "does not exist"]),
    "a resume from a dataset": (
        "train", None, {"resume_from": "dataset"}, ["resume_from=dataset", "training_state.pt"]),
    "a resume from an adapter": ("train", None, {"resume_from": LORA}, [f"resume_from={LORA}", "training_state.pt"]),
    "a resume from half a state": ("train", cut_short(STATE), {"resume_from": STATE}, [STATE, "cut short"]),
    "a resume from a web page": ("train", write_file(STATE, HTML), {"resume_from": STATE}, [STATE, "was changed"]),
    "a resume without a manifest": (
        "train", remove("outputs/done/checkpoints/epoch_1/manifest.json"), {"resume_from": STATE}, ["manifest.json"]),
    "a resume with a broken manifest": (
        "train", write_file("outputs/done/checkpoints/epoch_1/manifest.json", HTML), {"resume_from": STATE},
        ["manifest.json"]),
    "a resume with other settings": (
        "train", None, {"resume_from": STATE, "seed": 5}, ["checkpoints/epoch_1", "seed=0 (now 5)"]),
    "lyrics that are not there": ("generate", None, {"lyrics": "@gone.txt"}, ["lyrics=@gone.txt"]),
    "lyrics that are no text": ("generate", None, {"lyrics": f"@{LORA}"}, [f"lyrics=@{LORA}"]),
    "lyrics with an escape": ("generate", None, {"lyrics": "la\x1b[2J"}, ["lyrics=", "control character"]),
    "an empty prompt": (
        "generate", write_file("words.txt", "  \n"), {"prompt": "@words.txt"}, ["prompt=@words.txt is empty"]),
    "a folder of music that is a file": ("generate", None, {"output_dir": "songs/0.wav"}, ["output_dir=songs/0.wav"]),
}  # fmt: skip

CASES = {**CHECKPOINTS, **AUDIO, **WORDS, **DATASETS, **ADAPTERS, **OTHER}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint_dir, dataset_dir, adapters) -> Path:
    """A folder with one of everything, in which every command works."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(checkpoint_dir / "acestep-v15-base", root / BASE)
    for folder in (TEXT, VAE):
        shutil.copytree(checkpoint_dir / Path(folder).name, root / folder)
    shutil.copytree(dataset_dir, root / "dataset")
    for name in ("lora", "lokr"):
        shutil.copytree(adapters[name], root / "adapters" / name)
    write(root / "songs/0.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (24_000, 2)), 48_000)
    places = (f"checkpoint_dir={root / 'checkpoints'}", f"dataset_dir={root / 'dataset'}")
    run_training(root / "outputs/done", *places, "max_epochs=1")
    return root


@pytest.fixture
def world(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it to damage, as the working directory."""
    shutil.copytree(whole, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    """Settings of each command that work in that folder."""
    return {
        "train": train_config(*PLACES, "dataset_dir=dataset", "max_epochs=1"),
        "preprocess": preprocess_config(*PLACES, "audio_dir=songs", "dataset_dir=new"),
        "generate": generate_config(*PLACES, "model_variant=base", "output_dir=music"),
        "export": export_config(*PLACES, "adapter_dir=adapters/lora", "format=comfyui"),
        "inspect": inspect_config(*PLACES, "adapter_dir=adapters/lora"),
    }


def run(command: str, config: Any) -> None:
    """What the command does, with the songs that it left out as its mistake."""
    if command == "train":
        Path("outputs/run").mkdir(parents=True)
        train(config, Path("outputs/run"), CHOICES)
    elif command == "preprocess":
        summary = preprocess(config)
        if summary.failed:  # the command prints these lines and exits with 1
            raise UserError("; ".join(line for line in summary.lines() if line.startswith("skipped")))
    else:
        {"generate": generate, "export": export, "inspect": inspect_adapter}[command](config)


def contents(world: Path) -> dict[str, bytes]:
    return {str(p.relative_to(world)): p.read_bytes() for p in world.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    "name",
    [name if number % 3 == 1 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(CASES)],
)
def test_it_is_answered_in_one_line_and_nothing_is_lost_or_written(world, configs, name):
    command, damage, typed, answer = CASES[name]
    if damage is not None:
        damage(world)
    before = contents(world)

    with pytest.raises(UserError) as raised:
        run(command, dataclasses.replace(configs[command], **(SCALE if command == "generate" else {}), **typed))

    message = str(raised.value)
    assert [part for part in answer if part not in message] == [], message
    assert "\n" not in message
    assert len(message) < 1000
    after = contents(world)
    assert {path: after.get(path) for path in before} == before
    of_good_songs = "new/" if command == "preprocess" and "none of the" not in message else None
    for path in after.keys() - before.keys():  # a run may say in its own words that it failed
        words = Path(path).name in ("run.json", "metrics.jsonl") or "tfevents" in path
        assert words or (of_good_songs and path.startswith(of_good_songs)), path


@pytest.mark.parametrize("command", ["train", "preprocess", "generate", "export", "inspect"])
def test_without_damage_every_command_works(world, configs, command):
    run(command, dataclasses.replace(configs[command], **(SCALE if command == "generate" else {})))


def test_what_only_looks_bad_is_taken(world, configs):
    """Odd but sound audio and words: each becomes a song, and what deserves a word gets one."""
    rng = np.random.default_rng(0)
    album = world / "album"
    write(album / "telephone.wav", rng.uniform(-0.5, 0.5, 4000), 8_000, subtype="PCM_U8")
    write(album / "cinema.wav", rng.uniform(-0.5, 0.5, (24_000, 6)), 48_000)
    write(album / "quiet.wav", np.zeros((24_000, 2)), 48_000)
    write(album / "two\nlines.wav", rng.uniform(-0.5, 0.5, (24_000, 2)), 48_000)
    write(album / "with spaces, and = signs.wav", rng.uniform(-0.5, 0.5, (24_000, 2)), 48_000)
    write(album / "\U0001f3b5 caf\xe9.flac", rng.uniform(-0.5, 0.5, (24_000, 2)), 48_000)
    write(album / "loud.wav", 3 * rng.uniform(-0.5, 0.5, (24_000, 2)), 48_000, subtype="FLOAT")
    (album / "cinema.caption.txt").write_text("very " * 20_000)
    (album / "loud.lyrics.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\tthree\r\n")

    summary = preprocess(dataclasses.replace(configs["preprocess"], audio_dir="album"))

    assert summary.failed == {}
    assert len(summary.changed) == 7
    assert summary.silent == ["quiet.wav"]
    assert list(summary.truncated) == ["cinema.wav"]
    songs = {song["audio"]: song for song in map(json.loads, (world / "new/songs.jsonl").read_text().splitlines())}
    with safe_open(world / "new" / songs["loud.wav"]["conditions"], framework="pt") as conditions:
        assert "one\\ntwo\\tthree" in conditions.metadata()["texts"]
    assert all("\n" not in line for line in summary.lines())
    train(dataclasses.replace(configs["train"], dataset_dir="new"), Path("outputs"), CHOICES)


COMMANDS = {
    "a model that is a web page": (
        write_file(f"{BASE}/model.safetensors", HTML), "train", "name=x dataset_dir=dataset", "model.safetensors"),
    "a broken line of songs": (
        write_file("dataset/songs.jsonl", "{"), "train", "name=x dataset_dir=dataset", "songs.jsonl line 1"),
    "a dataset.json that is broken": (
        words("dataset.json", "{"), "preprocess", "audio_dir=album dataset_dir=new", "dataset.json is not JSON"),
    "an adapter that is a web page": (
        write_file(LORA, HTML), "generate", "adapter_dir=adapters/lora prompt=x", "adapter_model.safetensors"),
    "an adapter that is cut short": (
        cut_short(LOKR), "export", "adapter_dir=adapters/lokr format=lora", "lokr_weights.safetensors"),
    "no adapter": (None, "inspect", "adapter_dir=gone", "gone does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_prints_one_line_and_exits_with_1(world, name):
    damage, command, typed, answer = COMMANDS[name]
    if damage is not None:
        damage(world)
    before = contents(world)
    process = Command(world, command, *typed.split(), "model_variant=base", "checkpoint_dir=checkpoints")
    assert process.wait() == 1, process.said
    assert len(process.said.splitlines()) == 1, process.said
    assert answer in process.said
    after = contents(world)
    assert {path: after.get(path) for path in before} == before
    kept = {Path(path).name for path in after.keys() - before.keys()}
    assert kept <= {f"{command}.log", "config.yaml", "hydra.yaml", "overrides.yaml"}


def test_there_are_enough_of_them():
    assert len(CASES) >= 60
