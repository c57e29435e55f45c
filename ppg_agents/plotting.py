"""What all pictures share: a figure that opens no window, colours, the look of a panel, and how a file is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, BLUE, GREEN, VERMILION = "#E69F00", "#0072B2", "#009E73", "#D55E00"
"""Of Okabe and Ito's palette, whose colours everybody can tell apart."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, drawn by Agg: no screen is needed, and pyplot stays out of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes, *, grid: Literal["x", "y"] | None = "y") -> None:
    """Take a panel's frame off above and on the right, and lay a pale grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a PNG, whole or not at all; the same picture gives the same bytes.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})  # else matplotlib's version is in it
    os.replace(temporary, path)
