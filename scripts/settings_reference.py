"""Write docs/settings.md from the settings themselves: python scripts/settings_reference.py."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import sidestep.config.naming  # noqa: F401 - the resolver that conf/ uses
from sidestep.config import settings
from sidestep.config.data import SongsConfig
from sidestep.config.gate import VERSION_BASE, conf_dir
from sidestep.config.help import field_docs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
COMMANDS = {
    "train": settings.TrainConfig,
    "preprocess": settings.PreprocessConfig,
    "generate": settings.GenerateConfig,
    "export": settings.ExportConfig,
    "inspect": settings.InspectConfig,
    "songs": SongsConfig,
    "analyze": settings.AnalyzeConfig,
    "report": settings.ReportConfig,
}


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


def reference() -> str:
    """The page as text."""
    lines = [
        "# Settings",
        "",
        "Written by `python scripts/settings_reference.py` from the settings' own descriptions. A default of `...`",
        "must be typed; one that begins with `$` is taken from another setting. `python -m sidestep.doctor` takes the",
        "settings of `train`.",
    ]
    for command, root in COMMANDS.items():
        with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
            config = compose(command)
        groups = {name for name in config if (conf_dir() / str(name)).is_dir()}
        lines += ["", f"## {command}", "", *_table(root, config, skip=groups)]
        if groups:
            lines += ["", f"Groups: {', '.join(f'`{group}`' for group in sorted(map(str, groups)))}."]
    lines += ["", "# Groups"]
    store = ConfigStore.instance()
    for group in sorted(path.name for path in conf_dir().iterdir() if path.is_dir()):
        if group not in store.list("schema"):
            continue
        for path in sorted((conf_dir() / group).glob("*.yaml"), key=_by_size):
            with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
                config = compose(f"{group}/{path.stem}")
            node = config[group]
            schema = OmegaConf.get_type(node)
            if schema is None or not is_dataclass(schema):
                continue
            lines += ["", f"## {group}={path.stem}"]
            if table := _table(cast(type[Any], schema), node):
                lines += ["", *table]
    return "\n".join(lines) + "\n"


def _by_size(path: Path) -> tuple[int, str]:
    """In the order of the alphabet, but 8gb before 12gb."""
    return (len(path.stem) if path.stem[0].isdigit() else 99), path.stem


def _table(cls: type[Any], config: DictConfig, skip: set[Any] | None = None, prefix: str = "") -> list[str]:
    rows = list(_rows(cls, config, skip or set(), prefix))
    return ["| setting | default | what it does |", "|---|---|---|", *rows] if rows else []


def _rows(cls: type[Any], config: DictConfig, skip: set[Any], prefix: str) -> list[str]:
    docs, hints = field_docs(cls), get_type_hints(cls)
    rows = []
    for field in fields(cls):
        if field.name in skip:
            continue
        if is_dataclass(hints[field.name]):
            rows += _rows(cast(type[Any], hints[field.name]), config[field.name], set(), f"{prefix}{field.name}.")
            continue
        rows.append(f"| `{prefix}{field.name}` | {_default(config, field.name)} | {_cell(docs.get(field.name, ''))} |")
    return rows


def _default(config: DictConfig, key: str) -> str:
    value = OmegaConf.to_container(config, resolve=False)[key]  # type: ignore[call-overload,index]
    if value == "???":
        return "`...`"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        value = str(value).replace("'", "").replace(" ", "")
    return f"`{_cell(str(getattr(value, 'value', value)))}`" if str(value) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


if __name__ == "__main__":
    main()
