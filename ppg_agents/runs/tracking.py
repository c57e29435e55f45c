"""Sends a run's numbers to trackers: TensorBoard, Weights & Biases, trackio.

``metrics.jsonl`` is complete without any of this. A tracker's library is imported only if the tracker is named. Each
tracker has its own thread, so a slow, unreachable or broken one can neither delay a run nor end it: it is dropped, with
one line on stderr. Nothing here may change what is computed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig, to_dict
from ppg_agents.nearest import not_one_of
from ppg_agents.runs.files import RunError, json_object, replace
from ppg_agents.terminal.progress import say

START, FINISH = 60.0, 60.0  # seconds a tracker gets to connect, and to send the rest at the end
WAITING = 10_000  # steps that may queue for a tracker before it counts as hanging

_Item = tuple[dict[str, float], int] | None


class Tracker(Protocol):
    """Receives numbers; made from a `Place`; imports ``module``; may block, and may raise anything."""

    module: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Send what is left."""


@dataclass(frozen=True)
class Place:
    """What a tracker is told about a run.

    Attributes:
        folder: The run folder.
        id: Identifies the run; stays the same however often it is resumed.
        config: The resolved settings as plain tables.
        step: Iterations done; later ones that a killed process already logged are logged again.
    """

    folder: Path
    id: str
    config: dict[str, Any]
    step: int


class TensorBoard:
    """Event files in ``<run>/tensorboard``; a resumed run hides what was logged after its checkpoint."""

    module = "torch.utils.tensorboard"

    def __init__(self, place: Place) -> None:
        writer = importlib.import_module(self.module).SummaryWriter
        self._writer = writer(str(place.folder / "tensorboard"), purge_step=place.step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one scalar per number."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run, in the project ``WANDB_PROJECT`` or ``ppg-gym``; resumed by its id.

    Numbers are plotted against ``iteration``: wandb's own step counter refuses to repeat a step, and a resumed run
    logs some again.
    """

    module = "wandb"

    def __init__(self, place: Place) -> None:
        self._run = importlib.import_module(self.module).init(
            project=os.environ.get("WANDB_PROJECT") or "ppg-gym",
            name=place.folder.name,
            id=place.id,
            resume="allow",
            dir=str(place.folder),
            config=place.config,
            settings={"console": "off", "init_timeout": START},
        )
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row."""
        self._run.log({"iteration": step, **metrics})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A trackio run, in the project ``TRACKIO_PROJECT`` or ``ppg-gym``; resumed by its name, which ends with its id."""

    module = "trackio"

    def __init__(self, place: Place) -> None:
        self._run = importlib.import_module(self.module).init(
            project=os.environ.get("TRACKIO_PROJECT") or "ppg-gym",
            name=f"{place.folder.name}-{place.id}",
            resume="allow",
            config=place.config,
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class Background:
    """One tracker in its own thread; silent after its first failure."""

    def __init__(self, name: str, make: Callable[[Place], Tracker], place: Place) -> None:
        self.name = name
        self.lost = False
        self._items: queue.Queue[_Item] = queue.Queue(WAITING)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, place), name=name, daemon=True)
        self._thread.start()

    def started(self, seconds: float) -> None:
        """Wait until it is connected; drop it if that takes too long."""
        if not self._ready.wait(seconds):
            self._give_up(f"no answer within {seconds:.0f} s")

    def put(self, item: _Item) -> None:
        """Queue numbers, without waiting."""
        if self.lost:
            return
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._give_up(f"it has not taken the last {WAITING} steps")

    def finish(self, seconds: float) -> None:
        """Let it send what is left; drop it if that takes too long."""
        self.put(None)
        if not self.lost:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._give_up(f"it has not finished within {seconds:.0f} s")

    def _work(self, make: Callable[[Place], Tracker], place: Place) -> None:
        try:
            tracker = make(place)
            self._ready.set()
            while not self.lost and (item := self._items.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except (Exception, SystemExit) as error:  # the run goes on whatever a library does
            self._give_up(f"{type(error).__name__}: {error}")
        self._ready.set()

    def _give_up(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            line = " ".join(why.split())[:300]
            say(f"{self.name} is left out from here on ({line}); metrics.jsonl has every number")


class Trackers:
    """All trackers of a run; closed at the end of a ``with`` block."""

    def __init__(self, trackers: Iterable[Background] = ()) -> None:
        self._trackers = list(trackers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send an iteration's metrics (see `flat`) to every tracker, and return at once; never raises."""
        if self._trackers:
            numbers = flat(metrics)
            for tracker in self._trackers:
                tracker.put((numbers, step))

    def close(self) -> None:
        """Send what is left, waiting up to `FINISH` seconds per tracker; never raises."""
        if not self._trackers:
            return
        with contextlib.redirect_stdout(sys.stderr):
            for tracker in self._trackers:
                tracker.finish(FINISH)
        self._trackers = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def require(names: Iterable[str]) -> None:
    """Import what the named trackers need, to notice a missing package before anything starts.

    Raises:
        ConfigError: No tracker has that name; the message offers the nearest.
        ModuleNotFoundError: A package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(not_one_of("report_to", name, TRACKERS))
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(TRACKERS[name].module)
        except ModuleNotFoundError:
            raise
        except Exception:  # installed but broken: its thread will report it
            continue


def make_trackers(names: Iterable[str], run_folder: Path, config: TrainConfig, *, step: int = 0) -> Trackers:
    """Connect the named trackers, in the first process of a distributed run only.

    Args:
        names: Keys of `TRACKERS`.
        run_folder: Holds the id (``tracking.json``) by which a resumed run continues the same tracker run.
        config: The run's settings, for trackers that show them.
        step: Iterations done.

    Raises:
        ConfigError: No tracker has that name.
        ModuleNotFoundError: A package is not installed.
    """
    names = tuple(dict.fromkeys(names)) if os.environ.get("RANK", "0") == "0" else ()
    if not names:
        return Trackers()
    require(names)
    place = Place(Path(run_folder), _id(Path(run_folder) / "tracking.json"), to_dict(config), step)
    with contextlib.redirect_stdout(sys.stderr):
        trackers = [Background(name, TRACKERS[name], place) for name in names]
        for tracker in trackers:
            tracker.started(START)
    return Trackers(trackers)


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers in metrics by name, and nothing else.

    A table gives ``name/key``, a list ``name/1``, ``name/2``, …
    """
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{name}/")
        elif isinstance(value, list | tuple):
            numbers |= flat({str(i): item for i, item in enumerate(value, start=1)}, f"{name}/")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            numbers[name] = float(value)
    return numbers


def _id(path: Path) -> str:
    """Return the run's id, a new one if there is none."""
    try:
        if path.exists():
            return str(json_object(path)["id"])
    except (OSError, RunError, KeyError) as error:
        say(f"{path} cannot be read ({error}); trackers start a new run")
    identifier = uuid.uuid4().hex[:12]
    with contextlib.suppress(OSError):  # without it, a resumed run is a new one to its trackers
        replace(path, json.dumps({"id": identifier}) + "\n")
    return identifier
