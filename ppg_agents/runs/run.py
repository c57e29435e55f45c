"""The folder of one training run: settings, metrics, conversations, checkpoints.

    runs/<name>/
      config.toml            the resolved settings
      metrics.jsonl          one line per iteration, flushed
      trajectories.jsonl     every conversation that was learned from
      evaluation.json        held-out results before and after training
      held_out/<step>.jsonl  each evaluation's conversations, with the same seeds every time
      checkpoints/<step>/    adapter, tokenizer, optimizer, state.json, config.toml (see `checkpoints`)

Knows files, not learning: the agent decides what goes into a checkpoint. Resuming cuts the two growing JSONL files back
to their length at the checkpoint, and drops later evaluations. Training needs `lock`; reading a run does not.
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

__all__ = ["Run", "RunError", "check_new", "default_folder", "finite", "is_run", "lock", "newest_run", "read_jsonl"]

LINES = ("metrics.jsonl", "trajectories.jsonl")
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Methods that write raise `RunError` if the file cannot be written; methods that read, if it is damaged.
    """

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
        """Make a new run's folder and write its settings.

        Raises:
            RunError: The folder is not empty, or cannot be written.
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
        """Open an existing run's folder, changing nothing in it.

        Raises:
            RunError: It holds no run.
            ConfigError: Its settings are damaged.
        """
        folder = Path(folder)
        if not is_run(folder):
            problem = "" if folder.is_dir() else ", which is a file" if folder.exists() else ", which does not exist"
            raise RunError(
                f"expected a run folder with config.toml and checkpoints/, got {folder}{problem}{_near(folder)}"
            )
        return cls(folder, configs.load(folder / "config.toml"))

    def write_config(self) -> None:
        """Write the resolved settings."""
        with self._writing("config.toml"):
            self._write_config()

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinity become null."""
        with self._writing("metrics.jsonl"), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def append_trajectories(self, trajectories: Iterable[Trajectory]) -> None:
        """Append one line per conversation."""
        from ppg_agents.trajectory import append

        with self._writing("trajectories.jsonl"):
            append(self.trajectories_file, trajectories)

    def write_held_out(self, iteration: int, conversations: Iterable[Trajectory]) -> None:
        """Store an evaluation's conversations, whole or not at all, under the number of iterations done."""
        from ppg_agents.trajectory import to_json

        path = self.folder / HELD_OUT / f"{iteration}.jsonl"
        with self._writing(f"{HELD_OUT}/{path.name}"):
            path.parent.mkdir(exist_ok=True)
            replace(path, "".join(f"{to_json(conversation)}\n" for conversation in conversations))

    def held_out(self) -> dict[int, Path]:
        """Return the files that `write_held_out` stored, iterations done -> file, in order of iterations."""
        return dict(sorted((int(p.stem), p) for p in (self.folder / HELD_OUT).glob("*.jsonl") if p.stem.isdigit()))

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines so far, leaving out a torn last line."""
        return read_jsonl(self.metrics_file)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file in the folder atomically; NaN and infinity become null."""
        with self._writing(name):
            text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
            replace(self.folder / name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object that `write_json` stored, None if the file does not exist."""
        path = self.folder / name
        return json_object(path) if path.exists() else None

    def write_evaluation(self, when: str, result: Mapping[str, Any]) -> None:
        """Store a held-out result under ``before`` or ``after``."""
        self.write_json("evaluation.json", {**self.evaluations(), when: result})

    def evaluations(self) -> dict[str, Any]:
        """Return the stored held-out results, empty before the first one."""
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

        Reports newer damaged ones on stderr.
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
            save: Writes the agent into the folder it gets.

        Raises:
            RunError: It cannot be written; earlier checkpoints are untouched.
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
        """Go back to the newest whole checkpoint; the caller must hold `lock`.

        Removes what a killed process left half written, renames damaged checkpoints to ``<step>.damaged`` with a line
        on stderr, and cuts metrics, trajectories and evaluations back to the checkpoint.

        Returns:
            Its step and folder; 0 and None before the first one.

        Raises:
            RunError: All checkpoints are damaged, or a file is shorter than when the checkpoint was written.
        """
        root = self.folder / "checkpoints"
        with self._writing("checkpoints"):
            checkpoints.tidy(root, self.config.keep_checkpoints)
            for path in (*self.folder.glob(".*.tmp"), *self.folder.glob(f"{HELD_OUT}/.*.tmp")):
                path.unlink()
        whole, damaged = self.checkpoints(), checkpoints.damaged(root)
        if damaged and not whole:
            why = "; ".join(f"{path}: {why}" for _, path, why in damaged)
            raise RunError(f"expected a whole checkpoint, got {why}; put the files back, or move it away to start over")
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
            earlier = {when: result for when, result in stored.items() if result.get("iteration", 0) <= step}
            if earlier != stored:
                self.write_json("evaluation.json", earlier)
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
    """Return whether the folder holds a run."""
    return (Path(folder) / "config.toml").is_file() and (Path(folder) / "checkpoints").is_dir()


def check_new(folder: Path) -> None:
    """Refuse a folder that a new run cannot use.

    Raises:
        RunError: It is not empty, or not a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"expected a new or empty folder, got {folder}, which is a file; change --out")
    if folder.exists() and not _unused(folder):
        todo = f"go on with --resume {folder}" if is_run(folder) else "empty it"
        raise RunError(f"expected a new or empty folder, got {folder} with files; {todo}, or change --out")


def check_file(path: Path) -> None:
    """Refuse an output file that cannot be created, before any work is done.

    Raises:
        RunError: The parent folder does not exist, or the path is a folder.
    """
    if path.is_dir():
        raise RunError(f"expected a file to write, got the folder {path}; change --out")
    if not path.parent.is_dir():
        raise RunError(f"expected a file in an existing folder, got {path}; make {path.parent} first")


def _near(folder: Path) -> str:
    """Suggest the run that was probably meant: one with a similar name, beside it or under ``runs/``."""
    places = [place for place in (folder.parent, Path("runs")) if place.is_dir()]
    known = {path.name: path for place in places for path in sorted(place.iterdir()) if is_run(path)}
    meant = nearest(folder.name, known)
    return f"; did you mean {known[meant]}?" if meant else ""


def default_folder(config: TrainConfig, root: Path = Path("runs")) -> Path:
    """Return a folder under ``root`` that does not exist yet, named after what is trained."""
    name = re.sub(r"[^a-zA-Z0-9+]+", "-", f"{config.subject} {config.label} seed {config.seed}")  # +: of reinforce++
    return checkpoints.free(root / name)


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run folder under ``root`` whose metrics changed last.

    Raises:
        RunError: There is none.
    """
    runs = [path for path in root.iterdir() if is_run(path)] if root.is_dir() else []
    if not runs:
        raise RunError(f"expected a run under {root}/ to resume, got none; give its folder: --resume FOLDER")
    return max(runs, key=lambda path: max(f.stat().st_mtime for f in (path, *path.glob("*.jsonl"))))


def _unused(folder: Path) -> bool:
    """Return whether the folder is empty, apart from leftovers of a process killed while making a run."""
    ours = (LOCK, ".config.toml.tmp")
    if not folder.is_dir():
        return False
    return all(p.name in ours or (p.name == "checkpoints" and not any(p.iterdir())) for p in folder.iterdir())


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(configs.to_dict(config))
