"""Stops a run on Ctrl-C or SIGTERM at a point where its state is consistent.

Sampling conversations changes nothing, so it is abandoned at once; everything else finishes first. A second signal
stops at once. Nothing here saves or prints results.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from ppg_agents.terminal.progress import say


class Stop(KeyboardInterrupt):
    """The user asked the run to stop; a KeyboardInterrupt, so that no ``except Exception`` catches it."""


class Interrupted(Exception):  # noqa: N818 (not an error: the user asked for it)
    """The user stopped the run; it is saved after ``iteration`` iterations in ``folder``."""

    def __init__(self, folder: Path, iteration: int) -> None:
        super().__init__(saved(folder, iteration))
        self.folder, self.iteration = folder, iteration


def saved(folder: Path, iteration: int) -> str:
    """Return where a stopped run was saved, and how to resume it."""
    return f"saved after iteration {iteration}; go on with: ppg-agent train --resume {folder}"


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C inside this block (in the main thread): raise KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Interrupt:
    """Turns SIGINT and SIGTERM into `Stop` at safe points, while entered in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self.alone = True  # several processes must stop at the same step: False abandons nothing
        self._abandon = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Let a signal, even an earlier one, raise `Stop` at once inside this block; only if ``alone``."""
        self._abandon = self.alone
        try:
            if self.alone:
                self.check()
            yield
        finally:
            self._abandon = False

    def check(self) -> None:
        """Raise `Stop` if a signal has arrived."""
        if self.requested:
            raise Stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._abandon:
            raise Stop
        say("stopping after this step; once more to stop at once")
