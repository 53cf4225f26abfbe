"""What the source must not do, and what the commands do not do while they run."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from sidestep.cli import run_command
from sidestep.config.settings import InspectConfig

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "sidestep").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))

RUNS_CODE = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "runpy", "code", "imp"}
"""Modules that run code found in files. ``pickle.UnpicklingError`` alone is needed, to catch it."""
TALKS = {
    "subprocess", "multiprocessing", "socketserver", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib",
    "smtplib", "ssl", "xmlrpc", "webbrowser", "huggingface_hub", "wandb", "posthog", "sentry_sdk", "boto3",
}  # fmt: skip
NEEDED = {
    "processes.py": {"subprocess"},
    "reporting/runs.py": {"subprocess"},
    "slurm.py": {"subprocess", "input"},
    "captioner.py": {"urllib", "http"},
}
"""What single modules may do of this: call Slurm's own programs, without a shell, ask before cancelling jobs, and send
songs to the one server that the user types."""
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
METHODS = {
    "os.system", "os.popen", "os.spawnl", "os.execv", "os.fork", "os.chmod", "os.umask", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load", "pickle.load", "pickle.loads",
    "socket.socket", "socket.create_connection", "tempfile.mktemp", "importlib.import_module",
}  # fmt: skip
WRITES = {
    "unlink", "rmtree", "rmdir", "mkdir", "makedirs", "rename", "replace", "remove", "write_text", "write_bytes",
    "copyfile", "copytree", "move", "symlink_to", "link", "touch", "chmod", "save", "save_file", "savefig",
}  # fmt: skip
MAY_WRITE = {
    "files.py", "demo.py", "acestep/toy.py", "adapters/convert.py", "adapters/lora.py", "adapters/lycoris.py",
    "data/encode.py", "data/manifest.py", "exporting/export.py", "exporting/merged.py", "inference/generation.py",
    "inference/music_files.py", "inspecting/inspect.py", "inspecting/plot.py", "training/final.py", "training/run.py",
    "training/state.py", "training/tracking.py", "training/previews.py", "training/validation.py",
    "inference/previews.py", "reporting/page.py", "reporting/runs.py", "data/checks.py", "data/listing.py",
    "data/shards.py", "slurm.py", "sweep.py", "training/fisher.py", "data/estimates.py",
}  # fmt: skip
"""Modules that make, change or delete files. Each takes the folder from the settings and from nowhere else."""


def dotted(node: ast.AST) -> str:
    """``os.path.join`` of such an expression; empty for others."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives for a keyword; None where it gives none."""
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def faults(source: str, allowed: Collection[str] = ()) -> list[str]:
    """Everything in a source that could run what lies in a file or talk to another machine."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                first = name.partition(".")[0]
                if first in (RUNS_CODE | TALKS) - {"pickle", *allowed} and name != "urllib.parse":
                    found.append(f"line {node.lineno}: import {name}")
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found.append(f"line {node.lineno}: from pickle import")
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("pickle.") and node.attr != "UnpicklingError":
            found.append(f"line {node.lineno}: {dotted(node)}")
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2] or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
            if name in (CALLS | METHODS) - set(allowed):
                found.append(f"line {node.lineno}: {name}()")
            if name == "torch.load" and keyword(node, "weights_only") is not True:
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if last == "from_pretrained" and keyword(node, "local_files_only") is not True:
                found.append(f"line {node.lineno}: from_pretrained without local_files_only=True")
            for option in ("shell", "trust_remote_code", "allow_pickle"):
                if any(k.arg == option for k in node.keywords):
                    found.append(f"line {node.lineno}: {option}=")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_no_code_from_files_and_talks_to_nobody(path):
    name = path.relative_to(ROOT / "sidestep").as_posix()
    assert faults(path.read_text(encoding="utf-8"), NEEDED.get(name, ())) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_may_download_and_nothing_else(path):
    assert faults(path.read_text(encoding="utf-8"), {"huggingface_hub", "urllib", "http"}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "eval(text)",
        "import os\nos.system('ls')",
        "import subprocess",
        "from urllib.request import urlopen",
        "run(command, shell=True)",
        "AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder)",
        "import yaml\nyaml.load(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import socket\nsocket.create_connection(('example.com', 80))",
    ],
)
def test_the_scan_sees_what_it_looks_for(source):
    assert faults(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_known_modules_write_files(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    writing = [
        f"line {node.lineno}: {ast.unparse(node.func)}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (_is_write(node) or _opens_to_write(node))
    ]
    name = path.relative_to(ROOT / "sidestep").as_posix()
    assert name in MAY_WRITE or writing == []
    assert name not in MAY_WRITE or writing, "it no longer writes; take it off the list"


def _is_write(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in {
            "replacing",
            "replacing_folder",
            "discarding",
            "write_text",
            "write_tensors",
            "save_file",
        }
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in WRITES:
        return False
    return call.func.attr not in ("replace", "remove") or dotted(call.func) in ("os.replace", "os.remove")


def _opens_to_write(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return name == "open" and any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) < 4 for mode in modes)


# what happens while the commands run

WATCH = """
import json, os, runpy, socket, sys

def refuse(*arguments, **options):
    with open(os.environ["TALKED"], "a") as file:
        file.write(repr(arguments) + "\\n")
    raise OSError("this test has no network")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from sidestep.cli import QUIET, quick_imports
os.environ.update(QUIET)
with quick_imports():
    import sidestep.inference.generation, sidestep.training.loop  # once for all commands, which takes longest
for words in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        sys.argv = words
        runpy.run_module("sidestep." + words[0], run_name="__main__", alter_sys=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(" ".join(words))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Every command, run without a network in folders of its own: the working folder, the home, and what was sent."""
    work, home, watch = (tmp_path_factory.mktemp(name) for name in ("work", "home", "watch"))
    (watch / "watch.py").write_text(WATCH)
    (watch / "tmp").mkdir()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(watch / "tmp"), "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TALKED": str(watch / "talked"),
    }  # fmt: skip
    final = "adapter_dir=outputs/x/lora-turbo-rank2-demo/final"
    model = ["checkpoint_dir=outputs/demo-model", "device=cpu"]
    commands = [
        ["train", "experiment=demo", "adapter=lora", "model_variant=turbo", "adapter.rank=2", "max_epochs=1", "name=x"],
        ["generate", final, *model, "prompt=piano", "seconds=1", "num_inference_steps=1", "output_dir=outputs/music"],
        ["export", final, *model, "format=comfyui", "output_dir=outputs/exported"],
        ["inspect", final, model[0], "plot=outputs/plot.png"],
    ]
    done = subprocess.run(
        [sys.executable, str(watch / "watch.py"), json.dumps(commands)],
        cwd=work, env=environment, capture_output=True, text=True, check=False, umask=0o027,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return work, home, watch


def test_nothing_is_sent_or_asked_of_another_machine(watched):
    assert not (watched[2] / "talked").exists()


def test_nothing_is_written_outside_of_the_output_folder(watched):
    work, home, watch = watched
    assert [path.name for path in work.iterdir()] == ["outputs"]
    kept = [path for path in home.rglob("*") if path.is_file() and path.parent != home / ".cache/matplotlib"]
    assert kept == []  # matplotlib remembers which fonts there are
    assert [path for path in (watch / "tmp").rglob("*") if path.is_file()] == []


def test_the_umask_decides_who_may_read_and_nobody_else_may_change_or_run_a_file(watched):
    for path in (watched[0] / "outputs").rglob("*"):
        mode, own = stat.S_IMODE(path.stat().st_mode), path.name.startswith(".")  # locks and marks
        assert not mode & 0o027, f"{path} {mode:o}"
        assert path.is_dir() or own or path.is_relative_to(watched[0] / "outputs/demo-model") or mode == 0o640, (
            f"{path} {mode:o}"
        )


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"])
@pytest.mark.usefixtures("own_process")
def test_libraries_stay_offline_unless_the_user_says_otherwise(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["inspect", "nonsense=1"])
    for given, found in ((None, "1"), ("0", "0")):
        os.environ.pop(name, None)
        if given is not None:
            os.environ[name] = given
        with pytest.raises(SystemExit):
            run_command("inspect", InspectConfig, print)
        assert os.environ[name] == found


def test_an_adapter_does_not_tell_who_trained_it_where(watched):
    for path in (watched[0] / "outputs/x/lora-turbo-rank2-demo/final").iterdir():
        content = path.read_bytes()
        for secret in (str(watched[0]), str(watched[1])):
            assert secret.encode() not in content, path.name
        # a short name of a machine may occur in numbers and in words
        text = content if path.suffix != ".safetensors" else content[: 8 + int.from_bytes(content[:8], "little")]
        assert not re.search(rb"\b" + re.escape(os.uname().nodename.encode()) + rb"\b", text), path.name
    assert json.loads((watched[0] / "outputs/x/lora-turbo-rank2-demo/run.json").read_text())["status"] == "finished"
