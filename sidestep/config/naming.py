"""Folder names for runs: short, and the same for the same settings."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

NAMED_BY_CHOICE = ("adapter", "model_variant")
NOT_NAMED = (
    "hydra",
    "cluster",
    "local",
    "sweep",
    "swept",
    "name",
    "checkpoint_dir",
    "dataset_dir",
    "prior_dataset_dir",
    "toy",
    "device",
    "log_dir",
    "log_every_steps",
    "save_every_epochs",
    "save_every_steps",
    "keep_last",
    "keep_every",
    "max_bad_steps",
    "max_epochs",
    "max_steps",
    "resume",
    "resume_from",
    "shift",
    "num_inference_steps",
    "ema_decay",
    "validation",
    "previews",
    "tracking",
)
"""Settings that do not make another run: where things lie, how much is logged, how long to go on."""
MAX_LENGTH = 64
_WORD = "[A-Za-z0-9._]*[A-Za-z0-9_]"
_KEPT = re.compile(rf"(/?{_WORD}(/{_WORD})*|\[{_WORD}(,{_WORD})*\])?")
"""Values that a name shows so that no two look the same: words, paths and lists of words."""


def run_name(adapter: str, model_variant: str, overrides: Sequence[str], sweep_name: str) -> str:
    """Name a run after its adapter, its model variant and the settings typed for it.

    The order and spelling of overrides do not matter. Only letters, digits, ``.``, ``_`` and ``-`` are used: a path
    with ``=`` or ``,`` in it cannot be passed to another Hydra command without quoting. A name that is too long or
    loses characters so ends in a hash of all of it, since other settings may be shortened to the same.

    Args:
        adapter: the chosen option of that group.
        model_variant: likewise.
        overrides: what was typed, as ``key=value``.
        sweep_name: the setting ``name``; an experiment of the same name is not repeated.

    >>> run_name("lokr", "base", ["optim.lr=0.0001", "adapter=lokr"], "first")
    'lokr-base-lr0.0001'
    """
    last = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)  # typed twice, it is the one used
    pairs = list(last.items())
    swept = [key for name, value in pairs if name == "swept" for key in value.strip("[]").split(",")]
    pairs = [(key, value) for key, value in pairs if key in swept or _first_word(key) not in NOT_NAMED]
    pairs = sorted((key, _plain(value)) for key, value in pairs if key not in NAMED_BY_CHOICE)
    pairs = [(key, posixpath.normpath(value) if key.endswith("_dir") else value) for key, value in pairs]
    pairs = [pair for pair in pairs if pair != ("experiment", sweep_name)]
    settings = [value if "." not in key and _is_word(value) else key.rpartition(".")[2] + value for key, value in pairs]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([adapter, model_variant, *settings])).strip("-.")
    if len(name) > MAX_LENGTH or not all(_is_number(value) or _KEPT.fullmatch(value) for _, value in pairs):
        digest = hashlib.sha256(repr([adapter, model_variant, *pairs]).encode()).hexdigest()[:8]
        name = f"{name[: MAX_LENGTH - 9].rstrip('-.')}-{digest}"
    return name


def _is_word(value: str) -> bool:
    """Whether a value speaks for itself, like the option of a group, and its key can be left out."""
    return re.fullmatch(r"[a-z0-9_]*[a-z][a-z0-9_]*", value) is not None and value not in ("true", "false", "null")


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _plain(value: str) -> str:
    """The same text for every spelling of a value, also Hydra's own in a sweep: 1e-4 and 0.0001, [a, b] and ['a',b]."""
    if re.fullmatch("[A-Za-z0-9._+/-]*", value):  # nothing for Hydra to read, which takes time
        return _plain_word(value)
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:  # it is refused elsewhere
        return _plain_word(value.strip("'\""))
    if isinstance(parsed, list | dict):
        return _spelled(parsed)
    return _plain_word(parsed if isinstance(parsed, str) else value.strip())


def _spelled(value: Any) -> str:
    """A list or mapping without spaces, where only those words have quotes that could be read as something else."""
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(sorted(f'{_spelled(key)}:{_spelled(item)}' for key, item in value.items()))}}}"
    if isinstance(value, str) and not re.fullmatch("[A-Za-z0-9._+/-]+", value):
        return json.dumps(value)
    return _plain_word("null" if value is None else str(value))


def _plain_word(value: str) -> str:
    if re.fullmatch(r"[+-]?[0-9]+", value):
        return str(int(value))  # not through a float, which tells no large seeds apart
    if not _is_number(value):
        return value.lower() if value.lower() in ("true", "false", "null") else value
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number).replace("e+", "e")


def swept_keys(swept: Sequence[Override]) -> list[str]:
    """Settings that a sweep gives several values and that would not name a run by themselves.

    Points that differ in nothing else would share a folder, so ``run_name`` names them when told by ``swept=[...]``.

    Args:
        swept: what was given several values.
    """
    return [override.key_or_group for override in swept if _first_word(override.key_or_group) in NOT_NAMED]


def _first_word(key: str) -> str:
    return re.split("[./@]", key)[0]


OmegaConf.register_new_resolver(
    "run_name",
    lambda adapter, variant, overrides, name: run_name(adapter, variant, list(overrides), name),
    replace=True,
)
