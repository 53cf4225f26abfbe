"""The built wheel works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds nothing but the contents of the wheel."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache", "data", "checkpoints")
    shutil.copytree(ROOT, source, ignore=ignore)
    shutil.copytree(ROOT / "sidestep/data", source / "sidestep/data", dirs_exist_ok=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    site = work / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return site


def run_installed(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the wheel's sidestep; the editable install of the checkout must not be found instead."""
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); import sidestep;"
        "assert sidestep.__file__.startswith(sys.path[0]), sidestep.__file__;"
        "runpy.run_module('sidestep.train', run_name='__main__', alter_sys=True)"
    )
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(site), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_works_from_another_folder(installed, tmp_path):
    done = run_installed(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "xl_turbo" in done.stdout
    assert (installed / "hydra_plugins/sidestep_slurm/__init__.py").is_file()


def test_the_demo_trains_its_first_steps_from_another_folder(installed, tmp_path):
    done = run_installed(installed, tmp_path, "experiment=demo", "max_epochs=null", "max_steps=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/demo/lokr-base/final/lokr_weights.safetensors").is_file()
