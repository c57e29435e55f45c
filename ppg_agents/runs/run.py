"""The folder of one training run: settings, metrics, conversations, checkpoints.

    runs/<name>/
      config.toml            the resolved settings
      metrics.jsonl          one line per iteration, flushed
      trajectories.jsonl     every conversation that was learned from
      evaluation.json        held-out results before and after
      held_out/<step>.jsonl  the conversations of each evaluation, the same seeds in all of them
      checkpoints/<step>/    adapter, tokenizer, optimizer, state.json, config.toml (see `checkpoints`)

Knows files, not learning: what a checkpoint contains is the agent's affair. Resuming cuts the two JSONL files that grow
back to the length they had when the checkpoint was written, and drops evaluations that came after it. Whoever trains
holds `lock`; reading a run needs none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppg_agents.config import settings as configs
from ppg_agents.config.settings import TrainConfig
from ppg_agents.nearest import nearest
from ppg_agents.runs import checkpoints
from ppg_agents.runs.files import LOCK, RunError, finite, json_object, lock, read_jsonl, replace, size, writing
from ppg_agents.terminal.progress import say

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory

__all__ = [
    "Run",
    "RunError",
    "check_new",
    "default_folder",
    "finite",
    "is_run",
    "lock",
    "newest_run",
    "read_jsonl",
]

LINES = ("metrics.jsonl", "trajectories.jsonl")
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    folder: Path
    config: TrainConfig

    @property
    def metrics_file(self) -> Path:
        """One JSON object per iteration."""
        return self.folder / "metrics.jsonl"

    @property
    def trajectories_file(self) -> Path:
        """One JSON object per conversation (schema ``ppg-trajectory``)."""
        return self.folder / "trajectories.jsonl"

    @classmethod
    def create(cls, folder: Path, config: TrainConfig) -> Run:
        """Make the folder of a new run and write its settings.

        Raises:
            RunError: The folder holds something already, or cannot be written.
        """
        folder = Path(folder)
        check_new(folder)
        run = cls(folder, config)
        with writing(folder, "change --out, or {todo}"):
            folder.mkdir(parents=True, exist_ok=True)
            run._write_config()
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open the folder of an existing run; changes nothing in it.

        Raises:
            RunError: There is no run in it.
            ConfigError: Its settings are damaged.
        """
        folder = Path(folder)
        if not is_run(folder):
            what = "" if folder.is_dir() else ", which is a file" if folder.exists() else ", which is not there"
            raise RunError(
                f"expected a run folder with config.toml and checkpoints/, got {folder}{what}{_near(folder)}"
            )
        return cls(folder, configs.load(folder / "config.toml"))

    def write_config(self) -> None:
        """Write the resolved settings.

        Raises:
            RunError: They cannot be written.
        """
        with self._writing("config.toml"):
            self._write_config()

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite are written as null.

        Raises:
            RunError: It cannot be written.
        """
        with self._writing("metrics.jsonl"), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def append_trajectories(self, trajectories: Iterable[Trajectory]) -> None:
        """Append one line per conversation.

        Raises:
            RunError: They cannot be written.
        """
        from ppg_agents.trajectory import append

        with self._writing("trajectories.jsonl"):
            append(self.trajectories_file, trajectories)

    def write_held_out(self, iteration: int, conversations: Iterable[Trajectory]) -> None:
        """Store the conversations of the evaluation after so many iterations, whole or not at all.

        Raises:
            RunError: They cannot be written.
        """
        from ppg_agents.trajectory import to_json

        path = self.folder / HELD_OUT / f"{iteration}.jsonl"
        with self._writing(f"{HELD_OUT}/{path.name}"):
            path.parent.mkdir(exist_ok=True)
            replace(path, "".join(f"{to_json(one)}\n" for one in conversations))

    def held_out(self) -> dict[int, Path]:
        """Return the files that `write_held_out` stored, iterations done -> file, in this order."""
        return dict(sorted((int(p.stem), p) for p in (self.folder / HELD_OUT).glob("*.jsonl") if p.stem.isdigit()))

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines so far; a torn last line is left out.

        Raises:
            RunError: Another line is damaged; the message has its number.
        """
        return read_jsonl(self.metrics_file)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file of the folder whole; numbers that are not finite are written as null.

        Raises:
            RunError: It cannot be written.
        """
        with self._writing(name):
            text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
            replace(self.folder / name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object that `write_json` stored, None when there is no such file.

        Raises:
            RunError: The file is damaged.
        """
        path = self.folder / name
        return json_object(path) if path.exists() else None

    def write_evaluation(self, when: str, result: Mapping[str, Any]) -> None:
        """Store a held-out result under ``before`` or ``after``."""
        self.write_json("evaluation.json", {**self.evaluations(), when: result})

    def evaluations(self) -> dict[str, Any]:
        """Return the stored held-out results, empty before the first one.

        Raises:
            RunError: ``evaluation.json`` is damaged.
        """
        try:
            return self.read_json("evaluation.json") or {}
        except RunError as error:
            todo = "put a whole copy back, or delete it: what can still be measured is measured again"
            raise RunError(f"{error}; {todo}") from error

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of every whole checkpoint, oldest first."""
        return checkpoints.whole(self.folder / "checkpoints")

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Return the newest whole checkpoint as (step, folder), None before the first one.

        A newer one that is damaged is named on stderr.
        """
        whole = self.checkpoints()
        for step, path, why in checkpoints.damaged(self.folder / "checkpoints"):
            if whole and step > whole[-1][0]:
                say(f"{path}: {why}; taking the checkpoint before it, {whole[-1][0]}")
        return whole[-1] if whole else None

    def save_checkpoint(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write a checkpoint whole or not at all, then remove all but the newest.

        Args:
            step: Iterations done.
            save: Writes the agent into the folder it is given.

        Raises:
            RunError: It cannot be written; the checkpoints before it are as they were.
        """

        def fill(folder: Path) -> None:
            save(folder)
            (folder / "config.toml").write_text(_toml(self.config), encoding="utf-8")

        folder, lines = self.folder / "checkpoints", [self.folder / name for name in LINES]
        with self._writing(f"checkpoints/{step}"):
            return checkpoints.write(folder, step, fill, lines, keep=self.config.keep_checkpoints)

    def load_checkpoint(self, folder: Path, load: Callable[[Path], None]) -> None:
        """Read a checkpoint back; see `checkpoints.read`."""
        checkpoints.read(folder, load)

    def rewind(self) -> tuple[int, Path | None]:
        """Go back to the newest whole checkpoint: for whoever holds `lock`.

        Removes what a killed process left half-written, sets damaged checkpoints aside as ``<step>.damaged`` and says
        so on stderr, and cuts metrics, trajectories and evaluations back to the checkpoint.

        Returns:
            Its step and folder; 0 and None before the first one.

        Raises:
            RunError: All checkpoints are damaged, or a file lacks lines that the checkpoint was written after.
        """
        root = self.folder / "checkpoints"
        with self._writing("checkpoints"):
            checkpoints.tidy(root)
            for path in (*self.folder.glob(".*.tmp"), *self.folder.glob(f"{HELD_OUT}/.*.tmp")):
                path.unlink()
        whole, damaged = self.checkpoints(), checkpoints.damaged(root)
        if damaged and not whole:
            why = "; ".join(f"{path}: {why}" for _, path, why in damaged)
            raise RunError(f"expected a whole checkpoint, got {why}; put the files back, or move it away to begin anew")
        step, folder = whole[-1] if whole else (0, None)
        lengths = checkpoints.lengths(folder) if folder else {}
        for name in LINES:
            expected, got = lengths.get(name, 0), size(self.folder / name)
            if got < expected:
                raise RunError(
                    f"{self.folder / name}: expected at least {expected} bytes, as when checkpoint {step} was written, "
                    f"got {got}; put the file back, or move {folder} away to go on from the checkpoint before it"
                )
        with self._writing("checkpoints"):
            for _, path, why in damaged:
                aside = checkpoints.set_aside(path)
                say(f"{path}: {why}; set aside as {aside.name}, going on from checkpoint {step}")
            for name in LINES:
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, lengths.get(name, 0))
            stored = self.evaluations()
            kept = {when: found for when, found in stored.items() if found.get("iteration", 0) <= step}
            if kept != stored:
                self.write_json("evaluation.json", kept)
            for iteration, path in self.held_out().items():
                if iteration > step:
                    path.unlink()
        return step, folder

    def _write_config(self) -> None:
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        replace(self.folder / "config.toml", _toml(self.config))

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return writing(self.folder / name, f"{{todo}}, then go on with: ppg-agent train --resume {self.folder}")


def is_run(folder: Path) -> bool:
    """Return whether the folder is that of a run."""
    return (Path(folder) / "config.toml").is_file() and (Path(folder) / "checkpoints").is_dir()


def check_new(folder: Path) -> None:
    """Refuse a folder that a new run cannot have.

    Raises:
        RunError: It holds something already, or is no folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"expected a new or empty folder, got {folder}, which is a file; change --out")
    if folder.exists() and not _unused(folder):
        todo = f"go on with --resume {folder}" if is_run(folder) else "empty it"
        raise RunError(f"expected a new or empty folder, got {folder} with files; {todo}, or change --out")


def check_file(path: Path) -> None:
    """Refuse a file that cannot be made, before the work that goes into it.

    Raises:
        RunError: Its folder is not there, or it is a folder itself.
    """
    if path.is_dir():
        raise RunError(f"expected a file to write, got the folder {path}; change --out")
    if not path.parent.is_dir():
        raise RunError(f"expected a file in a folder that is there, got {path}; make {path.parent} first")


def _near(folder: Path) -> str:
    """Return which run was probably meant: one of that name, beside it or under ``runs/``."""
    places = [place for place in (folder.parent, Path("runs")) if place.is_dir()]
    known = {path.name: path for place in places for path in sorted(place.iterdir()) if is_run(path)}
    meant = nearest(folder.name, known)
    return f"; did you mean {known[meant]}?" if meant else ""


def default_folder(config: TrainConfig, root: Path = Path("runs")) -> Path:
    """Return a folder under ``root`` that does not exist yet, named by what is trained."""
    name = re.sub(r"[^a-zA-Z0-9+]+", "-", f"{config.subject} {config.label} seed {config.seed}")  # +: of reinforce++
    return checkpoints.free(root / name)


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run folder under ``root`` whose metrics changed last.

    Raises:
        RunError: There is none.
    """
    found = [path for path in root.iterdir() if is_run(path)] if root.is_dir() else []
    if not found:
        raise RunError(f"expected a run under {root}/ to resume, got none; give its folder: --resume FOLDER")
    return max(found, key=lambda path: max(f.stat().st_mtime for f in (path, *path.glob("*.jsonl"))))


def _unused(folder: Path) -> bool:
    """Return whether nothing is in the folder but what a process that was killed while making a run left."""
    ours = (LOCK, ".config.toml.tmp")
    if not folder.is_dir():
        return False
    return all(p.name in ours or (p.name == "checkpoints" and not any(p.iterdir())) for p in folder.iterdir())


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(configs.to_dict(config))
