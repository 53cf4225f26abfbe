"""Imports go only downward."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sidestep"

# from the ground up; a module may import from its own line and those above it
LAYERS = [
    [
        "",
        "errors",
        "times",
        "files",
        "records",
        "processes",
        "seeds",
        "devices",
        "config.schema",
        "captioner",
        "config.cluster",
        "config.data",
        "config",
    ],
    [
        "acestep.frozen",
        "acestep.keymap",
        "acestep.quantization",
        "acestep.kept",
        "acestep.variants",
        "training.flow",
        "training.optim",
        "training.paged",
        "training.schedules",
        "training.trackers",
        "acestep",
        "training",
    ],
    ["adapters"],
    ["config.evaluation"],
    ["config.settings"],
    ["config.naming", "config.gate", "config.help"],
    ["acestep.*", "data.*", "data"],
    ["training.state", "training.tracking", "training.signals"],
    ["inference.*", "inference"],
    ["exporting.*", "exporting"],
    ["inspecting.*", "inspecting"],
    ["data.encode", "training.final", "training.*"],
    ["checking.*", "checking"],
    ["reporting.*", "reporting", "sweep"],
    ["slurm"],
    ["demo", "cli"],
    ["train", "preprocess", "generate", "export", "inspect", "report", "doctor", "songs", "analyze"],
]


def layer_of(module: str) -> int:
    for pattern in (module, *[f"{module.rpartition('.')[0]}.*"], module.partition(".")[0]):
        for level, names in enumerate(LAYERS):
            if pattern in names:
                return level
    raise AssertionError(f"sidestep.{module} is in no layer of {__file__}")


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # a module, or else a name in one
    return {name.removeprefix("sidestep").lstrip(".") for name in found if name.partition(".")[0] == "sidestep"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_layer_and_below(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for imported in imports_of(path):
        if (
            not (PACKAGE / imported.replace(".", "/")).is_dir()
            and not (PACKAGE / f"{imported.replace('.', '/')}.py").is_file()
        ):
            continue  # a name, not a module
        assert layer_of(imported) <= layer_of(module), f"sidestep.{module} must not import sidestep.{imported}"


def test_no_module_is_imported_in_a_circle():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): imports_of(path)
        for path in MODULES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for imported in graph.get(module, set()) - {module}:  # a package imports its own modules
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
