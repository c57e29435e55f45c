"""Tables as lines of text: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return a line for each row, with every cell padded to the width of its column.

    Args:
        rows: Cells, the same number in each row.
        right: Columns, from 0, to align on the right; the others are aligned on the left.
    """
    columns = list(zip(*rows, strict=True))
    sides = [str.rjust if i in right else str.ljust for i in range(len(columns))]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(lambda side, cell, w: side(cell, w), sides, row, widths)).rstrip() for row in rows]


def in_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, a line for each row; the cells must already be Markdown."""
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]
