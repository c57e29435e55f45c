"""Progress at the terminal: a bar, or a plain line now and then.

Everything goes to stderr, so stdout stays free for results. Nothing here may change what is computed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

BLOCKS = "▁▂▃▄▅▆▇█"
TOO_FEW = "(too few to say)"


def sparkline(values: Sequence[float | None]) -> str:
    """Return one block per number in [0, 1], its height the value; a gap where there is no number."""
    return "".join(
        " " if value is None or math.isnan(value) else BLOCKS[min(max(int(value * 8), 0), 7)] for value in values
    )


def number(value: float | None) -> str:
    """Return a score with three decimals, or a dash if there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def interval(ends: Sequence[float | None], form: str = ".3f") -> str:
    """Return ``[0.478, 0.539]``, or that there are too few personas or seeds to say."""
    low, high = (math.nan if end is None else end for end in ends)
    return TOO_FEW if math.isnan(low) else f"[{low:{form}}, {high:{form}}]"


def status(metrics: Mapping[str, Any]) -> str:
    """Return an iteration's numbers as one short line."""
    if "log_likelihood" in metrics:
        return f"reward-weighted log-prob {number(metrics['weighted_token_log_prob'])} per token"
    turns = metrics.get("reward_per_turn") or []
    ends = f"{number(turns[0])}..{number(turns[-1])}" if turns else "-"
    failures = metrics.get("judge_failures") or 0
    lost = f"  {failures} not judged" if failures else ""
    faults = sum((metrics.get("partner_failures") or {}).values())
    lost += f"  {faults} lost partners" if faults else ""
    cut, entropy = metrics.get("reply_cut") or 0, metrics.get("entropy")
    lost += f"  {cut:.0%} of replies cut" if cut >= 0.005 else ""
    spread = "" if entropy is None else f"  entropy {entropy:.2f}"
    return f"consistency {number(metrics.get('consistency'))}  per turn {ends} {sparkline(turns)}{spread}{lost}"


class Progress:
    """A progress bar on a terminal; elsewhere a plain line at most every ``every`` seconds."""

    def __init__(self, what: str, total: int, *, start: int = 0, every: float = 10.0) -> None:
        """Count up to ``total`` steps under the heading ``what``; ``start`` are already done."""
        self.what, self.total, self.done, self.every = what, total, start, every
        self._began, self._start, self._said = time.monotonic(), start, -math.inf
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        """Show the bar if stderr is a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            left = TimeRemainingColumn(compact=True)
            tail = (TextColumn("{task.fields[status]}"), left, TextColumn("left"))
            self._bar = Progress(*columns, *tail, console=Console(stderr=True))
            self._bar.add_task(self.what, total=self.total, completed=self.done, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop updating the bar and leave it on screen."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, text: str = "") -> None:
        """Show that ``done`` steps are done."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, status=text)
            return
        now = time.monotonic()
        if now - self._said >= self.every or done >= self.total:
            self._said = now
            left = (now - self._began) / max(done - self._start, 1) * (self.total - done)
            say(f"{self.what} {done}/{self.total}  {text}  {left:.0f} s left".replace("    ", "  "))


def say(text: str) -> None:
    """Write one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Turn off transformers' own progress bars when stderr is not a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
