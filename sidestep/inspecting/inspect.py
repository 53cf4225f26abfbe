"""Look at an adapter: one task, from settings to lines on the terminal and a picture."""

from __future__ import annotations

import logging
from pathlib import Path

from sidestep.adapters.files import read_adapter
from sidestep.config.settings import InspectConfig
from sidestep.errors import UserError
from sidestep.exporting.base_weights import base_if_there
from sidestep.inspecting.plot import check_picture, draw_heatmap
from sidestep.inspecting.summary import facts, heatmap, measure_changes

log = logging.getLogger(__name__)


def inspect_adapter(config: InspectConfig) -> Path | None:
    """Say what an adapter is and draw where it acts.

    Returns:
        The picture; None where there is nothing to draw, and a line says why.

    Raises:
        UserError: for an adapter that cannot be read or does not fit the model, or a picture that cannot be written.
    """
    if config.plot is not None and not config.plot.endswith(".png"):  # it would be written over
        raise UserError(f"plot={config.plot} must end in .png, which it is written as")
    saved = read_adapter(Path(config.adapter_dir))
    plot = Path(config.plot) if config.plot else saved.path.with_name("inspect.png")
    check_picture(plot, "plot")
    for name, text in facts(saved):
        log.info("%-16s %s", name, text)
    without = "not compared with the base model"
    base = base_if_there(saved, config.model_variant, Path(config.checkpoint_dir), without)
    changes = measure_changes(saved, base)
    if not changes:
        log.info("the change of a %s depends on the base model's weights, so no sizes are shown", saved.family)
        return None
    table = heatmap(changes)
    log.info("")
    log.info("%s", table.unit)
    for line in table.lines():
        log.info("%s", line)
    if not table.blocks:
        return None
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_heatmap(table, f"{saved.path.parent.name}/{saved.path.name}: {saved.family}", plot)
    except OSError as error:
        raise UserError(f"cannot write {plot}: {error.strerror}; type plot=<another file>") from error
    return plot
