"""The README and docs/ name only what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sidestep.generate import quote_words
from tests.factories import (
    analyze_config,
    export_config,
    generate_config,
    inspect_config,
    preprocess_config,
    songs_config,
    train_config,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        (page.name, match.group(1), match.group(2).split("#")[0].strip())
        for page in PAGES
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
    if "-m" in arguments.split():
        words = [word if "[" in word else word.partition(",")[0] for word in words]  # the first point of a sweep
    compose, required = {
        "train": (train_config, []),
        "preprocess": (preprocess_config, ["audio_dir=songs", "dataset_dir=data"]),
        "generate": (generate_config, []),
        "export": (export_config, ["adapter_dir=final", "format=lora"]),
        "inspect": (inspect_config, []),
        "analyze": (analyze_config, []),
        "songs": (songs_config, ["audio_dir=songs"]),
    }[command]
    compose(*required, *words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
