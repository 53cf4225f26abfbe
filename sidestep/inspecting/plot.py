"""A picture of where an adapter acts."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sidestep.errors import UserError
from sidestep.files import replacing
from sidestep.inspecting.summary import Heatmap, short_kind


def check_picture(path: Path, setting: str) -> None:
    """Refuse to draw over what is not a picture that :func:`draw_heatmap` made.

    Raises:
        UserError: naming the setting that chooses another.
    """
    if not os.path.lexists(path):
        return
    if path.is_file():
        with path.open("rb") as file:
            if b"tEXtSoftware\0sidestep" in file.read(1024):
                return
    raise UserError(f"{path} would be written over and is no picture of sidestep's; type {setting}=<another file>")


def draw_heatmap(heatmap: Heatmap, title: str, path: Path) -> None:
    """Draw blocks down and kinds of module across, each cell with its number, as a PNG.

    Args:
        heatmap: what to draw; has at least one block.
        title: line above the picture.
        path: file to write.
    """
    rows, columns = len(heatmap.blocks), len(heatmap.kinds)
    figure = Figure(figsize=(max(5.0, 2.2 + 0.72 * columns), 1.8 + 0.27 * rows), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    shown = [[float("nan") if v is None else heatmap.shown(v) for v in row] for row in heatmap.values]
    image = axes.imshow(shown, cmap="YlGnBu", aspect="auto", vmin=0, vmax=heatmap.largest or 1)
    for row in range(rows):
        for column in range(columns):
            axes.text(
                column,
                row,
                heatmap.text(heatmap.values[row][column]),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shown[row][column] > 0.55 * heatmap.largest else "black",
            )
    axes.set_xticks(range(columns), [short_kind(kind) for kind in heatmap.kinds], rotation=40, ha="left", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(rows), [str(block) for block in heatmap.blocks], fontsize=8)
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.06, aspect=30)
    figure.suptitle(f"{title}\n{heatmap.unit}", fontsize=10)
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": "sidestep"})
