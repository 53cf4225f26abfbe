"""Say what an adapter is, and draw where it acts: ``python -m sidestep.inspect adapter_dir=...``."""

from __future__ import annotations

from sidestep.cli import quick_imports, run_command
from sidestep.config.settings import InspectConfig


def inspect_command(config: InspectConfig) -> None:
    """Inspect, and print the path of the picture."""
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.inspecting.inspect import inspect_adapter

    plot = inspect_adapter(config)
    if plot is not None:
        print(plot)


if __name__ == "__main__":
    run_command("inspect", InspectConfig, inspect_command)
