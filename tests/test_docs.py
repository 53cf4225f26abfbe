"""The README and docs/ name only what exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sidestep.generate import quote_words
from tests.factories import (
    analyze_config,
    export_config,
    generate_config,
    inspect_config,
    preprocess_config,
    report_config,
    songs_config,
    train_config,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        (page.name, match.group(1), match.group(2).split("#")[0].strip())
        for page in PAGES
        if page.name != "settings.md"  # it quotes descriptions, not commands
        for match in re.finditer(
            r"python -m sidestep\.(\w+) ((?:(?!`| name a)[^\n`])*)", page.read_text(encoding="utf-8")
        )
    }
)


def test_commands_were_found():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "command", "arguments"), COMMANDS)
def test_every_command_in_the_docs_is_accepted(page, command, arguments, tmp_path, monkeypatch):
    (tmp_path / "data/songs").mkdir(parents=True)
    (tmp_path / "data/songs/rank_pattern.json").write_text('{"rank_pattern": {}}')  # the one file that is read so early
    monkeypatch.chdir(tmp_path)
    words = [
        word for word in quote_words(shlex.split(arguments)) if word not in ("-m", "...", "--help", "--cfg", "job")
    ]
    parsed = OverridesParser.create().parse_overrides(words)
    # the first point of a sweep
    words = [
        f"{o.key_or_group}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else word
        for o, word in zip(parsed, words, strict=True)
    ]
    compose, required = {
        "train": (train_config, []),
        "doctor": (train_config, []),
        "preprocess": (preprocess_config, ["audio_dir=songs", "dataset_dir=data"]),
        "generate": (generate_config, []),
        "export": (export_config, ["adapter_dir=final", "format=lora"]),
        "inspect": (inspect_config, []),
        "report": (report_config, []),
        "analyze": (analyze_config, []),
        "songs": (songs_config, ["audio_dir=songs"]),
    }[command]
    compose(*required, *words)


@pytest.mark.parametrize(("page", "expected"), [("training.md", (5, None)), ("scaling.md", (10, "gpu"))])
def test_a_file_of_ones_own_in_the_docs_is_read_as_it_stands(page, expected, tmp_path):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^    .*\n)*^    # @package _global_\n(?:^    .*\n)+", text, re.MULTILINE)
    (tmp_path / "local").mkdir()
    (tmp_path / "local/mine.yaml").write_text(textwrap.dedent(block), encoding="utf-8")
    config = train_config(f"hydra.searchpath=[file://{tmp_path}]", "local=mine")
    assert (config.save_every_epochs, config.cluster and config.cluster.partition) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_tutorial_goes_from_songs_to_a_page_and_to_music(tmp_path):
    """Every command of docs/tutorial.md in order, in an empty folder; ``make demo`` by what it runs."""
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    typed = re.findall(r"^    python -m (sidestep\..*)$", text, re.MULTILINE)
    assert len(typed) >= 6
    for line in ["sidestep.train experiment=demo", *typed]:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(line)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "outputs/tutorial/report.html").is_file()
    assert len(list((tmp_path / "outputs/generated").glob("*.flac"))) == 1
