"""Write an adapter in another form: ``python -m sidestep.export adapter_dir=... format=...``."""

from __future__ import annotations

from sidestep.cli import importing, run_command
from sidestep.config.settings import ExportConfig


def export_command(config: ExportConfig) -> None:
    """Export, and print what to point a player at."""
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.exporting.export import export

    print(export(config))


if __name__ == "__main__":
    run_command("export", ExportConfig, export_command)
