"""docs/settings.md is what the settings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "settings_reference.py"


def test_the_settings_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("settings_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.reference(), "run python scripts/settings_reference.py"


def test_every_setting_in_the_reference_is_explained():
    rows = [
        line for line in (SCRIPT.parents[1] / "docs/settings.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []
