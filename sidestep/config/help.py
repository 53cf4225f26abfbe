"""The ``--help`` page, made from conf/ and the settings' own docstrings so that it cannot go stale."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from sidestep.config.gate import compose_or_explain, conf_dir

ABOUT = {
    "train": "Train one adapter for ACE-Step 1.5, or with -m a sweep of them.",
    "preprocess": "Turn a folder of songs into a dataset to train on.",
    "songs": "List, check and edit the words of a folder of songs, and write them as songs.jsonl.",
    "analyze": "Measure how much each module matters on a dataset, and write ranks for adapter=lora.",
    "export": "Write an adapter in another form: for another player, as a LoRA, or merged into the model.",
    "inspect": "Say what an adapter is and what it was trained on, and draw where it acts.",
    "generate": "Text to music, with any number of adapters at any strength.",
    "doctor": "Say what is wrong with a run and what it will cost, before it is begun. Takes what train takes.",
    "report": "Say where the points of a sweep stand, at any time.",
}
IMPORTANT = {
    "train": [
        "dataset_dir",
        "checkpoint_dir",
        "name",
        "max_epochs",
        "optim.lr",
        "adapter.rank",
        "adapter.target_modules",
        "max_seconds",
        "save_every_epochs",
        "validation.fraction",
    ],
    "preprocess": [
        "audio_dir",
        "dataset_dir",
        "checkpoint_dir",
        "metadata_file",
        "file_tags",
        "custom_tag",
        "genre_ratio",
        "language",
        "window_seconds",
        "tile_seconds",
    ],
    "analyze": [
        "dataset_dir",
        "checkpoint_dir",
        "output",
        "target_modules",
        "rank",
        "max_rank",
        "num_examples",
        "validation.fraction",
    ],
    "songs": ["audio_dir", "metadata_file", "file_tags", "only", "add_tag", "remove_tag", "fill", "estimate", "write"],
    "export": [
        "adapter_dir",
        "format",
        "output_dir",
        "scale",
        "rank",
        "max_error",
        "checkpoint_dir",
        "measure_output",
    ],
    "inspect": ["adapter_dir", "plot", "checkpoint_dir"],
    "report": ["sweep_dir", "format", "inline_mb"],
    "generate": [
        "prompt",
        "lyrics",
        "adapter_dir",
        "scale",
        "checkpoint_dir",
        "seconds",
        "seeds",
        "language",
        "num_inference_steps",
        "guidance_scale",
        "shift",
        "format",
        "output_dir",
    ],
}
EXAMPLES = {
    "train": (
        "python -m sidestep.train experiment=demo",
        "python -m sidestep.train dataset_dir=data/songs adapter=lokr model_variant=base name=first",
        "python -m sidestep.train -m dataset_dir=data/songs adapter=lora,lokr optim.lr=1e-4,3e-4 name=sweep",
    ),
    "doctor": (
        "python -m sidestep.doctor dataset_dir=data/songs adapter=lokr model_variant=base name=first",
        "python -m sidestep.doctor dataset_dir=data/songs vram_profile=8gb max_seconds=240",
        "python -m sidestep.doctor -m dataset_dir=data/songs adapter=lora,lokr optim.lr=1e-4,3e-4 name=sweep",
    ),
    "preprocess": (
        "python -m sidestep.preprocess audio_dir=songs dataset_dir=data/songs model_variant=base",
        "python -m sidestep.preprocess audio_dir=songs dataset_dir=data/songs custom_tag=mystyle",
        "python -m sidestep.preprocess audio_dir=songs dataset_dir=data/songs metadata_file=songs/dataset.json",
    ),
    "analyze": (
        "python -m sidestep.analyze dataset_dir=data/songs model_variant=base",
        "python -m sidestep.analyze dataset_dir=data/songs model_variant=base num_examples=256 output=ranks.json",
    ),
    "songs": (
        "python -m sidestep.songs audio_dir=songs",
        "python -m sidestep.songs audio_dir=songs add_tag=mystyle only='live/*'",
        "python -m sidestep.songs audio_dir=songs fill=true estimate=true write=true",
        "python -m sidestep.songs audio_dir=songs captioner=openai captioner.url=http://localhost:8000/v1 "
        "captioner.model=mine",
    ),
    "generate": (
        'python -m sidestep.generate adapter_dir=outputs/first/lokr-base/final prompt="warm jazz, soft drums"',
        "python -m sidestep.generate adapter_dir=outputs/first/lokr-base/final prompt=@prompt.txt lyrics=@song.txt",
        "python -m sidestep.generate adapter_dir=[first/final,other/final] scale=[1.0,0.5] prompt=piano seeds=[0,1,2]",
    ),
    "export": (
        "python -m sidestep.export adapter_dir=outputs/first/lokr-base/final format=comfyui",
        "python -m sidestep.export adapter_dir=outputs/first/lokr-base/final format=lora max_error=0.05",
        "python -m sidestep.export adapter_dir=outputs/first/lokr-base/final format=merged scale=0.8",
    ),
    "report": (
        "python -m sidestep.report sweep_dir=outputs/sweep",
        "python -m sidestep.report sweep_dir=outputs/sweep format=html",
        "python -m sidestep.report sweep_dir=outputs/sweep format=csv",
    ),
    "inspect": (
        "python -m sidestep.inspect adapter_dir=outputs/first/lokr-base/final",
        "python -m sidestep.inspect adapter_dir=outputs/first/lokr-base/final checkpoint_dir=checkpoints",
        "python -m sidestep.inspect adapter_dir=other/lokr_weights.safetensors model_variant=base plot=other.png",
    ),
}


def help_page(command: str, root: type[Any]) -> str:
    """Write the page a newcomer reads first: groups with their options, the settings that matter, examples."""
    conf = conf_dir()
    base = "train" if command == "doctor" else command
    defaults = yaml.safe_load((conf / f"{base}.yaml").read_text(encoding="utf-8"))
    chosen = {k: v for entry in defaults["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    lines = [ABOUT[command], "", f"  python -m sidestep.{command} [-m] [group=option] [setting=value]", ""]
    lines += ["Groups (the default is marked *)"]
    for group in chosen:
        if (conf / group).is_dir():
            lines += ["", f"  {group}"]
            lines += [_option_line(path, path.stem == chosen[group]) for path in _by_size(conf / group)]
    lines += ["", "Settings that matter"]
    config = compose_or_explain(command, [])
    for key in IMPORTANT[base]:
        doc = field_docs(_owner(key, root, chosen))[key.rpartition(".")[2]]
        lines += ["", f"  {key}{_default(key, config)}", f"      {doc}"]
    lines += ["", "Examples", "", *(f"  {example}" for example in EXAMPLES[command]), ""]
    lines += [f"All settings with their values: python -m sidestep.{command} --cfg job ..."]
    return "\n".join(lines)


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Map each field of a dataclass and its bases to the string written under it."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if is_doc:
                    docs[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return docs


def _option_line(path: Path, is_default: bool) -> str:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    about = next((line.lstrip("# ") for line in comments if "@package" not in line), "")
    return f"    {'*' if is_default else ' '} {path.stem:<14}{about}"


def _by_size(folder: Path) -> list[Path]:
    """Options in alphabetical order, numbers in theirs: 8gb before 12gb."""
    paths = folder.glob("*.yaml")
    return sorted(
        paths, key=lambda path: (not path.stem[0].isdigit(), path.stem.zfill(8 if path.stem[0].isdigit() else 0))
    )


def _owner(key: str, root: type[Any], chosen: dict[str, str]) -> type[Any]:
    """The dataclass that declares a setting; for a setting of a group, that of the group's default option."""
    group, _, _ = key.rpartition(".")
    if not group:
        return root
    if group not in chosen:  # settings of one kind that are no options to choose from
        return cast(type[Any], typing.get_type_hints(root)[group])
    schema = ConfigStore.instance().load(f"schema/{group}/{chosen[group]}.yaml").node
    return cast(type[Any], OmegaConf.get_type(schema))


def _default(key: str, config: DictConfig) -> str:
    """The value a setting has when nothing is typed, or nothing where it must be typed or is null."""
    try:
        value = None if OmegaConf.is_missing(config, key) else OmegaConf.select(config, key)
    except InterpolationToMissingValueError:  # it is made of another setting, which must be typed
        as_written = OmegaConf.to_container(config, resolve=False)
        value = functools.reduce(dict.__getitem__, key.split("."), cast(dict[str, Any], as_written))
    if isinstance(value, ListConfig):
        value = f"[{','.join(map(str, value))}]"
    return "" if value in (None, "") else f" = {value}"
