"""Files of every kind, damaged at random: each is read, or refused in one line. Nothing else may happen."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import random
import shutil
import struct
import traceback
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import tokenize
from sidestep.adapters.files import apply_adapters, read_adapter
from sidestep.config.settings import GenerateConfig, TrainConfig
from sidestep.data.dataset import SongDataset, collate
from sidestep.data.legacy import LegacySongs
from sidestep.data.manifest import read_manifest
from sidestep.data.shards import Shard, merge_shards, shard_folder, write_shard
from sidestep.errors import UserError
from sidestep.inference.generation import choose_sampling, choose_variant, read_played
from sidestep.inspecting.summary import facts
from sidestep.training.run import open_run
from sidestep.training.state import load_checkpoint, newest_checkpoint, write_manifest
from tests.factories import CHOICES, generate_config, run_training, train_config
from tests.test_legacy import write_sample

CPU = torch.device("cpu")
IN_CI, SOAK = 12, 300
STRANGE = [
    None, True, False, 0, 1, -1, 3, 2.5, -0.0, 1e308, float("nan"), float("inf"), 2**63, -(2**70), "", " ", "x", "0",
    "../../x", "/etc/passwd", "a\nb", "\x00", "\ud800", "é", "y" * 5000, [], [1], ["x"], [[]], {}, {"x": 1}, [None],
    {"": {"": []}}, "caption", "LORA", "F32", [0, 0], [2**40, 2**41],
]  # fmt: skip


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, overwrite, cut, insert, repeat or swap some bytes, more often near the beginning, where headers are."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = int(len(content) * chance.random() ** chance.choice((1, 4, 16)))
        match chance.randrange(6):
            case 0:
                content[at : at + 1] = bytes([(content[at] if at < len(content) else 0) ^ (1 << chance.randrange(8))])
            case 1:
                content[at : at + 8] = chance.randbytes(8)
            case 2:
                del content[at:]
            case 3:
                content[at:at] = chance.choice((b"\0" * 7, b"\xff" * 9, b'"', b"{", b"\n", b"NaN", b"[" * 5000))
            case 4:
                content[at:at] = content[at : at + chance.randrange(1, 200)]
            case 5:
                content[:8] = struct.pack("<Q", chance.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)))
    return bytes(content)


def damaged_json(data: bytes, chance: random.Random) -> bytes:
    """Put strange values, and other names, into a JSON text."""
    root = [json.loads(data)]
    for _ in range(chance.choice((1, 1, 2, 5))):
        places = list(_places(root))
        parent, key = chance.choice(places)
        match chance.randrange(5):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(chance.choice(STRANGE))
            case 3 if parent is not root:
                del parent[key]
            case _ if isinstance(parent, dict):
                parent[chance.choice(("x", "", "format", "__metadata__", "y" * 300))] = parent.pop(key)
    return json.dumps(root[0]).encode()


def _places(node: Any) -> Any:
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def damaged_lines(data: bytes, chance: random.Random) -> bytes:
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = damaged_json(lines[at], chance)
    return b"\n".join(lines)


def damaged_header(data: bytes, chance: random.Random) -> bytes:
    """Put strange values into the JSON header of a safetensors file, and leave its tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damaged_metadata(data: bytes, chance: random.Random) -> bytes:
    """Put strange values into the JSON texts inside a safetensors header: lokr_config, and what sidestep wrote."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = {key: text for key, text in header["__metadata__"].items() if text.startswith("{")}
    key = chance.choice(sorted(texts))
    header["__metadata__"][key] = damaged_json(texts[key].encode(), chance).decode()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damaged_pickle(data: bytes, chance: random.Random) -> bytes:
    """Damage the pickle of a ``.pt`` file inside its archive, whose checksums are right again."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(written, "w") as damaged:
        for entry in whole.infolist():
            content = whole.read(entry)
            damaged.writestr(entry, damaged_bytes(content, chance) if entry.filename.endswith("data.pkl") else content)
    return written.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoint_dir, dataset_dir, adapters) -> Path:
    """One of everything that is read, whole."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(checkpoint_dir, root / "checkpoints")
    shutil.copytree(dataset_dir, root / "dataset")
    for name in ("lora", "lora-ranks", "lokr", "loha", "oft"):
        shutil.copytree(adapters[name], root / name)
    places = (f"checkpoint_dir={root / 'checkpoints'}", f"dataset_dir={root / 'dataset'}")
    run_training(root / "run", *places, "adapter.rank=1", "max_epochs=1")
    shutil.copytree(root / "run", root / "signed")
    write_sample(root / "tensor_files/song.pt")
    (part := shard_folder(root / "parts", 0, 1)).mkdir(parents=True)
    write_shard(part, Shard(listing="all", info=(read := read_manifest(root / "dataset"))[0], songs=read[1]))
    return root


@cache
def configs(world: Path) -> tuple[TrainConfig, GenerateConfig]:
    """Settings that read the files of ``world``; made once, because composing them takes longer than any case."""
    places = (f"checkpoint_dir={world / 'checkpoints'}", f"dataset_dir={world / 'dataset'}")
    return train_config(*places, "adapter.rank=1", "max_epochs=1"), generate_config()


def use(world: Path, name: str) -> None:
    """Read an adapter in every way in which a command reads one."""
    training, listening = configs(world)
    played = read_played(world / name, 1.0)
    choose_sampling(listening, choose_variant(training.model_variant, [played]), [played])
    checkpoint = find_checkpoint(world / "checkpoints", training.model_variant)
    apply_adapters(checkpoint.load_transformer(device=CPU, dtype=torch.float32), [(world / name, 1.0)])


def use_model(world: Path) -> None:
    checkpoint = find_checkpoint(world / "checkpoints", configs(world)[0].model_variant)
    checkpoint.load_transformer(device=CPU, dtype=torch.float32)
    checkpoint.load_condition_encoder(device=CPU, dtype=torch.float32)
    checkpoint.null_condition()
    checkpoint.fingerprint("transformer")


def use_vae(world: Path) -> None:
    find_checkpoint(world / "checkpoints", configs(world)[0].model_variant).load_vae(device=CPU, dtype=torch.float32)


def use_text_encoder(world: Path) -> None:
    checkpoint = find_checkpoint(world / "checkpoints", configs(world)[0].model_variant)
    tokenizer, _ = checkpoint.load_text_encoder(device=CPU, dtype=torch.float32)
    tokenize(tokenizer, "a word", 8)


def use_silence(world: Path) -> None:
    find_checkpoint(world / "checkpoints", configs(world)[0].model_variant).silence()


def use_dataset(world: Path) -> None:
    dataset = SongDataset(world / "dataset", max_seconds=1, seed=0)
    dataset.fingerprint()
    dataset.check_tensors()
    collate([dataset[position] for position in range(4)])


def use_tensor_files(world: Path) -> None:
    """Read the tensor file of another trainer."""
    songs = LegacySongs(world / "tensor_files")
    songs.check(0, "song.pt")
    songs.caption(0)


def use_state(world: Path) -> None:
    """Read a training state whose hash is right, as if the damage had been there when it was written."""
    folder = world / "signed/checkpoints/epoch_1"
    write_manifest(folder, 4)
    load_checkpoint(folder)


def use_manifest(world: Path) -> None:
    newest_checkpoint(world / "run")
    load_checkpoint(world / "run/checkpoints/epoch_1")


def use_shard(world: Path) -> None:
    missing = merge_shards(world / "parts", 1, [], "all")
    assert missing in ([], ["0"], ["0 (which was done with other songs or words)"])


def use_run(world: Path) -> None:
    open_run(configs(world)[0], world / "run", CHOICES)


def inspect(world: Path) -> None:
    facts(read_adapter(world / "lokr"))


BASE = "checkpoints/acestep-v15-base"
TEXT = "checkpoints/Qwen3-Embedding-0.6B"
LORA = "adapter_model.safetensors"
TARGETS: dict[str, tuple[str, Callable[[bytes, random.Random], bytes], Callable[[Path], None]]] = {
    "lora": (f"lora/{LORA}", damaged_bytes, lambda world: use(world, "lora")),
    "lora header": (f"lora/{LORA}", damaged_header, lambda world: use(world, "lora")),
    "lora metadata": (f"lora/{LORA}", damaged_metadata, lambda world: use(world, "lora")),
    "lora config": ("lora-ranks/adapter_config.json", damaged_json, lambda world: use(world, "lora-ranks")),
    "lora config bytes": ("lora/adapter_config.json", damaged_bytes, lambda world: use(world, "lora")),
    "lokr metadata": ("lokr/lokr_weights.safetensors", damaged_metadata, lambda world: use(world, "lokr")),
    "lokr header": ("lokr/lokr_weights.safetensors", damaged_header, lambda world: use(world, "lokr")),
    "loha header": ("loha/loha_weights.safetensors", damaged_header, lambda world: use(world, "loha")),
    "oft config": ("oft/adapter_config.json", damaged_json, lambda world: use(world, "oft")),
    "inspected lokr": ("lokr/lokr_weights.safetensors", damaged_metadata, inspect),
    "model": (f"{BASE}/model.safetensors", damaged_bytes, use_model),
    "model header": (f"{BASE}/model.safetensors", damaged_header, use_model),
    "model config": (f"{BASE}/config.json", damaged_json, use_model),
    "silence": (f"{BASE}/silence_latent.pt", damaged_bytes, use_silence),
    "vae config": ("checkpoints/vae/config.json", damaged_json, use_vae),
    "text config": (f"{TEXT}/config.json", damaged_json, use_text_encoder),
    "tokenizer": (f"{TEXT}/tokenizer.json", damaged_json, use_text_encoder),
    "dataset info": ("dataset/dataset_info.json", damaged_json, use_dataset),
    "dataset info bytes": ("dataset/dataset_info.json", damaged_bytes, use_dataset),
    "songs": ("dataset/songs.jsonl", damaged_lines, use_dataset),
    "songs bytes": ("dataset/songs.jsonl", damaged_bytes, use_dataset),
    "latents header": ("dataset/latents/song0.safetensors", damaged_header, use_dataset),
    "condition": ("dataset/conditions/song0.safetensors", damaged_bytes, use_dataset),
    "training state": ("signed/checkpoints/epoch_1/training_state.pt", damaged_bytes, use_state),
    "manifest": ("run/checkpoints/epoch_1/manifest.json", damaged_json, use_manifest),
    "manifest bytes": ("run/checkpoints/epoch_1/manifest.json", damaged_bytes, use_manifest),
    "tensor file": ("tensor_files/song.pt", damaged_bytes, use_tensor_files),
    "tensor file pickle": ("tensor_files/song.pt", damaged_pickle, use_tensor_files),
    "shard": ("parts/shards/0-of-1/shard.json", damaged_json, use_shard),
    "run record": ("run/run.json", damaged_json, use_run),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # of torch, before it refuses the file
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("num_cases", [IN_CI, pytest.param(SOAK, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_or_refused_in_one_line(world, name, num_cases):
    logging.getLogger("sidestep").setLevel(logging.ERROR)
    file, damage, read = TARGETS[name]
    path = world / file
    whole = path.read_bytes()
    read(world)
    found: dict[str, str] = {}
    for case in range(num_cases):
        damaged = damage(whole, random.Random(f"{name} {case}"))
        path.unlink()  # tensors that are still mapped keep the old file
        path.write_bytes(damaged)
        try:
            read(world)
        except UserError as error:
            if "\n" in str(error):
                found.setdefault("several lines", f"case {case}: {error}")
        except Exception as error:  # whatever else comes out is what is looked for
            at = traceback.extract_tb(error.__traceback__)
            own = next((frame for frame in reversed(at) if "/sidestep/" in frame.filename), at[-1])
            where = f"{Path(own.filename).name}:{own.lineno}"
            found.setdefault(f"{type(error).__name__} at {where}", f"case {case}: {str(error)[:200]}")
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    assert not found, "\n".join(f"{kind}: {example}" for kind, example in found.items())


class Attack:
    """What a pickle that runs a command looks like."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("signed/checkpoints/epoch_1/training_state.pt", use_state),
        (f"{BASE}/silence_latent.pt", use_silence),
    ],
)
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(world, tmp_path, file, read, old_format):
    path = world / file
    whole = path.read_bytes()
    state = {"format": 1, "step": Attack(f"touch {tmp_path / 'ran'}")}
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    try:
        with pytest.raises(UserError, match=path.name):
            read(world)
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "ran").exists()
