"""What all pictures share: a figure without a window, colours, the look of a panel, and saving to a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, BLUE, GREEN, VERMILION = "#E69F00", "#0072B2", "#009E73", "#D55E00"
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sized in inches and drawn by Agg: it needs neither a screen nor pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes, *, grid: Literal["x", "y"] | None = "y") -> None:
    """Remove a panel's top and right frame lines, and put a pale grid behind the drawing."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a PNG, whole or not at all; the same picture gives the same bytes.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})  # leaves out matplotlib's version
    os.replace(temporary, path)
