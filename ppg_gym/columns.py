"""Tables as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def align(rows: Sequence[Sequence[str]], left: Collection[int] | None = None) -> list[str]:
    """Return rows of cells as lines of aligned columns.

    Args:
        rows: All of the same length.
        left: Numbers of the columns that are flush left, the others being flush right; None for the first and the last.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, len(widths) - 1) if left is None else left
    sides = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]
