"""From what was typed to plain dataclasses, or one line that says what to type instead.

Nothing past :func:`to_dataclass` sees OmegaConf.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverrideParseException, OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sidestep.acestep.variants import VariantConfig
from sidestep.adapters.oft import MOST_TERMS
from sidestep.config.settings import VramConfig
from sidestep.errors import UserError

T = TypeVar("T")

UNREADABLE = (yaml.YAMLError, UnicodeDecodeError, RecursionError)
"""What reading a YAML file raises that holds a mistake; Hydra passes it on as it is."""

COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, ValueError, AssertionError, *UNREADABLE)
"""What composing raises for what was mistyped, or for a file that holds a mistake."""

VERSION_BASE = "1.3"
"""Hydra's own defaults that conf/ was written for."""

WHOLE_GROUPS = ("local", "experiment", "sweep", "cluster")
"""Groups whose files hold settings of the whole command."""

PACKAGE_LINE = re.compile(r"\s*#\s*@package\s+\S")
"""What such a file begins with, in Hydra's words; a comment above it would hide it."""

EXAMPLES = {
    "dataset_dir": "dataset_dir=data/songs (the folder that python -m sidestep.preprocess wrote)",
    "audio_dir": "audio_dir=songs",
    "adapter_dir": "adapter_dir=outputs/first/lokr-base/final",
    "format": "format=comfyui",
    "sweep_dir": "sweep_dir=outputs/first",
}


def conf_dir() -> Path:
    """Folder of the YAML groups: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).resolve().parents[1] / "conf"
    return inside if (inside / "train.yaml").is_file() else Path(__file__).resolve().parents[2] / "conf"


def compose_or_explain(command: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a command's config from what was typed, without running anything.

    Raises:
        UserError: one line for anything Hydra, OmegaConf or YAML refuses.
    """
    check_own_files(command, overrides)
    for typed in overrides:
        if typed.startswith("~") and not typed.startswith("~hydra"):  # Hydra's own may be left out
            key = typed[1:].partition("=")[0]
            raise UserError(f"{typed} deletes {key}, and no setting can be left out; type {key}=... to choose another")
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        try:
            return compose(command, list(overrides))
        except (HydraException, OmegaConfBaseException, *UNREADABLE, ValueError, AssertionError) as error:
            raise UserError(_explain(error, command, overrides)) from error


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Read what was typed, so that ``glob(...)`` knows the options of its group."""
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(list(overrides))


def check_swept(command: str, config: DictConfig, fixed: Sequence[str], swept: Sequence[Override]) -> None:
    """Refuse a setting that every point of a sweep lacks, and several values of what is read once for all of them.

    Args:
        command: name of the YAML in conf/.
        config: composed of what was typed with one value.
        fixed: what was typed with one value.
        swept: what was given several.

    Raises:
        UserError: naming it.
    """
    for override in swept:
        _refuse_of_whole_sweep(override)
    missing = OmegaConf.missing_keys(config) - {o.key_or_group for o in swept}
    for override in swept:
        if missing and override.is_discrete_sweep():
            for value in override.sweep_string_iterator():  # an experiment may bring what is missing
                typed = f"{override.key_or_group}={value}"
                with contextlib.suppress(UserError):  # of one point only
                    missing &= OmegaConf.missing_keys(compose_or_explain(command, [*fixed, typed]))
    _refuse_missing(missing)


def _refuse_of_whole_sweep(swept: Override) -> None:
    """Refuse several values of what decides where or what a sweep is, which no point would follow."""
    key, value = swept.key_or_group, str(swept.input_line).partition("=")[2]
    if key in ("cluster", "local", "sweep") or key.startswith("cluster."):
        words = re.fullmatch(r"[\w.-]*[a-z][\w.,-]*", value)  # and not numbers, or range(...)
        one = f"""; if this is one value: {key}="'{value}'\"""" if words and key.startswith("cluster.") else ""
        raise UserError(f"{key}={value}: all points of a sweep have one {key}; type one command for each{one}")


def _refuse_missing(keys: Iterable[str]) -> None:
    if missing := sorted(keys):
        example = EXAMPLES.get(missing[0], f"{missing[0]}=...")
        raise UserError(f"{', '.join(missing)} must be set, for example {example}")


def check_own_files(command: str, overrides: Sequence[str]) -> None:
    """Refuse a file of one's own for which Hydra has no words.

    It would pass over one that is not there, and a run meant for a cluster begin here; and it takes the settings of one
    without a package line for settings of a group.

    Raises:
        UserError: naming the file.
    """
    chosen = {"local": "train" if command == "doctor" else command}  # the doctor takes what train takes
    chosen |= {key: values for key, _, values in (typed.partition("=") for typed in overrides) if key in WHOLE_GROUPS}
    for group, values in chosen.items():
        for value in values.split(","):
            path = _file_of(f"{group}/{value}", overrides)
            if path is not None and not PACKAGE_LINE.match(_words_of(path)):
                raise UserError(f"{path} must begin with the line # @package _global_")
            if path is None and f"local={values}" in overrides:
                folders = [folder / "local" for folder in _conf_folders(overrides)]
                known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
                there = f"there are {', '.join(known)}" if known else "there is none"
                raise UserError(f"local={value}: no {folders[-1] / value}.yaml{_meant(value, known)}; {there}")


def _words_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _file_of(config: str, overrides: Sequence[str]) -> Path | None:
    """The YAML file of what Hydra calls ``group/option``; None if there is none, as for one that is in the code."""
    paths = (folder / f"{config}.yaml" for folder in _conf_folders(overrides))
    return next((path for path in paths if os.path.isfile(path)), None)  # Path raises for a name that is too long


def _conf_folders(overrides: Sequence[str]) -> list[Path]:
    """Where YAML files are looked for: conf/, and what --config-dir names, which is typed as hydra.searchpath here."""
    paths = [path for typed in overrides for path in re.findall(r"file://([^,\]]+)", typed)]
    return [conf_dir(), *map(Path, paths)]


def launches_sweep(command: str, overrides: Sequence[str]) -> bool:
    """Whether what was typed chooses a sweep or a cluster, which need no ``-m``.

    Anything that cannot be composed is left to whoever composes it next.
    """
    hydra = compose_hydra(command, overrides)
    return hydra is not None and hydra.mode is RunMode.MULTIRUN


def with_params(command: str, overrides: Sequence[str]) -> list[str]:
    """What a chosen sweep's file gives several values, as if it was typed, and then what was typed."""
    hydra = compose_hydra(command, overrides)
    params = (hydra.sweeper.get("params") or {}) if hydra is not None else {}
    return [*(f"{key}={value}" for key, value in params.items()), *overrides]


def compose_hydra(command: str, overrides: Sequence[str]) -> DictConfig | None:
    """Hydra's own settings for what was typed, without the swept values; None if it cannot be composed."""
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            single = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
            return cast(DictConfig, compose(command, single, return_hydra_config=True).hydra)
        except COMPOSING_ERRORS:
            return None


def explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """Say in one line what Hydra refused and what was probably meant."""
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        return _explain(error, command, overrides)


def _explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    text = str(error)
    if isinstance(error, UNREADABLE):
        return _explain_file(error, overrides)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return explain_null(error, overrides)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, wanted = str(error.missing_cfg_file).rpartition("/")
        if group.startswith("hydra/") and wanted in ("joblib", "optuna"):
            return f"{group}={wanted} is not installed; type pip install -c constraints.txt -e '.[{wanted}]'"
        options = ", ".join(error.options)
        return f"{group}={wanted} is not an option{_meant(wanted, error.options)}; the options are {options}"
    if several := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = several.group(1).partition("=")
        return f"{key}={value} is several values; add -m to sweep over them, or quote it as one: '{key}=\"{value}\"'"
    if isinstance(error, OverrideParseException):
        typed = error.override
        key, _, value = typed.partition("=")
        if re.fullmatch(r"\[[^]['\"]+\]", value):  # a list of words without quotes
            quoted = ",".join(f"'{word.strip()}'" for word in value[1:-1].split(","))
            return f'cannot read {typed}; words with = or a space in them have quotes of their own: "{key}=[{quoted}]"'
        return f"cannot read {typed}; a value with = or , or a space in it is typed as '{key}=\"{value}\"'"
    if (several := re.search(r"Missing mandatory value: (\w+)", text)) and "hydra.sweep.dir" in text:
        return f"{several.group(1)} decides where a sweep lies, and a sweep has one folder; type one command for each"
    if unknown := re.search(r"In '(.+)': Could not override '([^'@]+)", text):
        return _unknown_group(unknown.group(1), unknown.group(2), overrides)
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(unknown.group(1).lstrip("+~"), command, overrides)
    if bad_value := re.search(r"Error merging override (\S+)", text):
        reason = str(error.__cause__ or error).partition("\n")[0]
        if re.search(r"Key '[^']+' (?:is )?not in", reason):
            return _unknown_key(bad_value.group(1).partition("=")[0].lstrip("+~"), command, overrides)
        return f"{bad_value.group(1)}: {reason}"
    if not text.strip():  # as for a key of YAML that is null
        cause = error.__cause__ or error.__context__ or error
        text = f"a key or a value in a YAML file, or one that was typed, cannot be read ({type(cause).__name__})"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def explain_null(error: Exception, overrides: Sequence[str]) -> str:
    """Name a group that was set to null, or say that a setting is below one that is.

    Args:
        error: a ValueError or AssertionError of composing.
        overrides: what was composed.

    Raises:
        Exception: ``error`` itself, if it is of something else.
    """
    if isinstance(error, AssertionError):  # OmegaConf's answer to a setting below one that is null
        return "a setting was typed below one that is null; choose that first, as in model_variant=base"
    groups = [typed.partition("=")[0] for typed in overrides if typed.endswith("=null")]
    named = next((group for group in groups if (conf_dir() / group).is_dir()), None)
    if named is None:  # or a number in a file is too long to be read
        return _explain_file(error, overrides)
    options = ", ".join(sorted(path.stem for path in (conf_dir() / named).glob("*.yaml")))
    return f"{named}=null chooses nothing; the options are {options}"


def _explain_file(error: Exception, overrides: Sequence[str]) -> str:
    """Name the YAML file that raised one of ``UNREADABLE``, or a ValueError, and the line where that is known.

    Raises:
        Exception: ``error`` itself, if no such file is found.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name} line {error.problem_mark.line + 1}: {error.problem}"
    naming_others = []
    for path in (path for folder in _conf_folders(overrides) for path in sorted(folder.rglob("*.yaml"))):
        try:
            values = OmegaConf.load(path)
        except RecursionError:
            return f"{path}: it is nested too deeply, or holds itself"
        except UnicodeDecodeError as found:
            line = path.read_bytes()[: found.start].count(b"\n") + 1
            return f"{path} line {line}: it is not UTF-8; save it as UTF-8"
        except yaml.YAMLError as found:
            return f"{path}: {' '.join(str(found).split())}"
        except (OSError, OmegaConfBaseException):
            continue  # not what was raised
        except ValueError as found:
            return f"{path}: {found}"
        if not isinstance(values, DictConfig) or "defaults" not in values:
            continue
        defaults = cast(dict[Any, Any], OmegaConf.to_container(values, resolve=False))["defaults"]
        if not isinstance(defaults, list) or not all(_is_default(item) for item in defaults):
            return f"{path}: defaults must be a list of lines such as - override /adapter: lokr"
        if path.parent.parent in _conf_folders(overrides) and any(_names_another(item) for item in defaults):
            naming_others.append(str(path))
    if isinstance(error, RecursionError) and naming_others:
        return f"{' or '.join(naming_others)}: defaults names the file itself, perhaps by way of another"
    raise error


def _is_default(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, dict) and len(item) == 1)


def _names_another(item: str | dict[Any, Any]) -> bool:
    """Whether an item of a defaults list is another file to be read first, and no schema."""
    first = item if isinstance(item, str) else str(next(iter(item)))
    return first != "_self_" and not first.startswith(("/schema/", "override "))


def to_dataclass(config: DictConfig, root: type[T]) -> T:
    """Check a composed config and turn it into plain dataclasses.

    Raises:
        UserError: for a setting that does not exist, is missing, or contradicts another.
    """
    try:
        check_keys(config, root)
        _refuse_missing(OmegaConf.missing_keys(config))
        for key, value in _numbers(config):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} must be a finite number")
            if abs(value) > (most := largest(key, value)):
                raise UserError(f"{key}={value} is too large; it may be {most:g} at most")
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(" ".join(str(error).split())) from error


def check_keys(config: DictConfig, root: type[Any]) -> None:
    """Refuse settings that do not exist but were added with ``+key=value``.

    Raises:
        UserError: naming the nearest one that does.
    """
    for parent, leaf, known in _unknown_keys(config, root):
        raise UserError(not_a_setting(leaf, known, parent))


def read_profiles() -> list[VramConfig]:
    """Every VRAM profile of conf/ that names a memory size, for ``vram_profile=auto`` to choose from."""
    profiles = []
    for path in sorted((conf_dir() / "vram_profile").glob("*.yaml")):
        profile = VramConfig(**_values(path))
        if profile.memory_gib is not None:
            profiles.append(profile)
    return profiles


def read_variant(name: str) -> VariantConfig:
    """Read the model variant that an adapter's metadata names.

    Raises:
        UserError: if there is no such variant.
    """
    options = {path.stem: path for path in sorted((conf_dir() / "model_variant").glob("*.yaml"))}
    if name not in options:  # it may be anything, a path too
        raise UserError(f"model_variant {name!r:.60} is not known; choose one: {', '.join(options)}")
    return VariantConfig(**_values(options[name]))


def _values(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("defaults", None)
    return cast(dict[str, Any], values)


def _groups() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "local"))


def _unknown_group(config: str, group: str, overrides: Sequence[str]) -> str:
    """Say which line of a file's defaults list overrides a group that its command does not have.

    Args:
        config: the file in Hydra's words, ``local/train``.
        group: what is overridden; it lies beside the file where no slash was written in front.
        overrides: what was typed.
    """
    path = _file_of(config, overrides) or config
    beside = f"{config.rpartition('/')[0]}/"
    if group.startswith(beside):
        return f"{path}: a slash is missing; write override /{group.removeprefix(beside)}"
    known = _groups()
    meant = "" if group in known else _meant(group, known)  # it may be another command's
    return f"{path}: override /{group} names no group of this command{meant}"


def _unknown_key(key: str, command: str, overrides: Sequence[str]) -> str:
    """Name the nearest setting to a key that does not exist."""
    groups = _groups()
    read = [*groups, "hydra.searchpath"]
    chosen = [o for o in overrides if o.lstrip("+").partition("=")[0] in read and not re.search(r"[,(]", o)]
    try:
        config = compose(command, chosen)
    except COMPOSING_ERRORS:  # what was chosen is a mistake too
        config = compose(command, ["~local"] if (conf_dir() / "local").is_dir() else [])
    parent, _, leaf = key.rpartition(".")
    if parent and parent not in config:
        parent, leaf = "", key.partition(".")[0]  # the mistake is in the first word
    known = [str(name) for name in ((config[parent] or {}) if parent else config)]  # a group may be null
    if parent:
        return not_a_setting(leaf, known, parent)
    return not_a_setting(leaf, sorted({*known, *groups}), parent, key.removeprefix(leaf))


def not_a_setting(leaf: str, known: Sequence[str], parent: str = "", rest: str = "") -> str:
    """Say that ``parent.leaf`` does not exist, and which setting or option was probably meant."""
    key = f"{parent}.{leaf}" if parent else leaf
    owners = [
        name.removesuffix(".yaml")
        for name in (_schemas(parent) if parent else [])
        if leaf in _field_names(ConfigStore.instance().load(f"schema/{parent}/{name}").node)
    ]
    if owners:
        return f"{key} is a setting of {' and '.join(f'{parent}={owner}' for owner in owners)} only"
    if meant := _meant(leaf, known, parent, rest):
        return f"{key}{rest} is not a setting{meant}"
    if parent:
        return f"{key} is not a setting; {parent} has {', '.join(known) or 'no settings'}"
    return f"{key}{rest} is not a setting; --cfg job in its place shows all of them"


def _schemas(group: str) -> list[str]:
    try:
        return ConfigStore.instance().list(f"schema/{group}")
    except OSError:  # not a group
        return []


def _field_names(node: Any) -> list[str]:
    return [field.name for field in fields(cast(Any, OmegaConf.get_type(node)))]


def _numbers(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, float]]:
    keys: Sequence[Any] = [str(key) for key in node] if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        value = node[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
        elif isinstance(value, DictConfig | ListConfig):
            yield from _numbers(value, f"{prefix}{key}.")


def largest(key: str, value: float) -> float:
    """What a setting may be, far past what has a use, so that none overflows in the middle of a run.

    Args:
        key: its name, typed or in the header of an adapter.
        value: a whole number, or one with a fraction.
    """
    name = next((part for part in reversed(key.split(".")) if not part.isdecimal()), key)  # not a place in a list
    if name.endswith("seconds"):
        return 1e6
    if name in ("shift", "scale", "scales", "alpha", "guidance_scale"):
        return 1e4
    if name in ("num_inference_steps", "rank", "max_rank", "batch_size") or ".rank_pattern." in key:
        return 1e5
    if name == "neumann_terms":
        return MOST_TERMS
    return 2**31 if isinstance(value, int) and "seed" not in key else math.inf


def _unknown_keys(node: DictConfig, root: type[Any], parent: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Keys that ``+key=value`` added to a typed node. Hydra allows them, and they would be ignored."""
    known = [field.name for field in fields(root)]
    for key in map(str, node):
        if key not in known:
            yield parent, key, known
        elif not OmegaConf.is_missing(node, key) and is_dataclass(child := OmegaConf.get_type(node, key)):
            yield from _unknown_keys(node[key], cast(type[Any], child), f"{parent}.{key}" if parent else key)


def _meant(word: str, known: Sequence[str], parent: str = "", rest: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {f'{parent}.' if parent else ''}{close[0]}{rest}?" if close else ""
