"""Say what an adapter is, and draw where it acts: ``python -m sidestep.inspect adapter_dir=...``."""

from __future__ import annotations

from sidestep.cli import importing, run_command
from sidestep.config.settings import InspectConfig


def inspect_command(config: InspectConfig) -> None:
    """Inspect, and print the path of the picture."""
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.inspecting.inspect import inspect_adapter

    plot = inspect_adapter(config)
    if plot is not None:
        print(plot)


if __name__ == "__main__":
    run_command("inspect", InspectConfig, inspect_command)
