"""The folder of one training run: settings, metrics, trajectories, checkpoints.

    runs/<name>/
      config.toml            the resolved settings
      metrics.jsonl          one line per iteration, flushed
      trajectories.jsonl     every conversation that was learned from
      evaluation.json        held-out results before and after
      checkpoints/<step>/    adapter, tokenizer, optimizer, state.json, config.toml

Knows files, not learning: what a checkpoint contains is the agent's affair. A checkpoint is written beside its place,
forced onto the disk and renamed, so that it is there whole or not at all; ``state.json`` lists its files and their
sizes, so that one that was damaged later is noticed. Resuming cuts the two JSONL files back to the length they had
when the checkpoint was written. Whoever trains holds `lock`; reading a run needs none.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppg_agents import config as configs
from ppg_agents.config import TrainConfig
from ppg_agents.durable import LOCK, RunError, finite, json_object, lock, read_jsonl, replace, size, sync, writing
from ppg_agents.progress import say

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory

__all__ = [
    "Run",
    "RunError",
    "check_new",
    "damage",
    "default_folder",
    "finite",
    "is_run",
    "lock",
    "newest_run",
    "read_jsonl",
]

LINES = ("metrics.jsonl", "trajectories.jsonl")
_LEFTOVER = re.compile(r"\.(\d+)\.(tmp|replaced|removed)")


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
        return [(step, path) for step, path in self._numbered() if damage(path) is None]

    def damaged_checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of every checkpoint that is not whole, oldest first; see `damage`."""
        return [(step, path) for step, path in self._numbered() if damage(path) is not None]

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Return the newest whole checkpoint as (step, folder), None before the first one.

        A newer one that is damaged is named on stderr.
        """
        whole = self.checkpoints()
        for step, path in self.damaged_checkpoints():
            if whole and step > whole[-1][0]:
                say(f"{path}: {damage(path)}; taking the checkpoint before it, {whole[-1][0]}")
        return whole[-1] if whole else None

    def save_checkpoint(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write a checkpoint whole or not at all, then remove all but the newest.

        Args:
            step: Iterations done.
            save: Writes the agent into the folder it is given.

        Raises:
            RunError: It cannot be written; the checkpoints before it are as they were.
        """
        folder = self.folder / "checkpoints"
        target, temporary, replaced = folder / str(step), folder / f".{step}.tmp", folder / f".{step}.replaced"
        with self._writing(f"checkpoints/{step}"):
            try:
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir()
                save(temporary)
                (temporary / "config.toml").write_text(_toml(self.config), encoding="utf-8")
                lines = [self.folder / name for name in LINES]
                lengths = {path.name: size(path) for path in lines}
                state = {"iteration": step, "bytes": lengths, "files": _sizes(temporary)}
                (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                for path in (*(line for line in lines if line.exists()), *temporary.rglob("*"), temporary):
                    sync(path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            if target.exists():
                os.rename(target, replaced)
            os.rename(temporary, target)
            sync(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            for old, path in self.checkpoints()[: -self.config.keep_checkpoints]:
                removed = folder / f".{old}.removed"  # out of the way in one go: half a folder is no checkpoint
                os.rename(path, removed)
                shutil.rmtree(removed)
        return target

    def load_checkpoint(self, folder: Path, load: Callable[[Path], None]) -> None:
        """Read a checkpoint back.

        Args:
            folder: Of the checkpoint.
            load: Reads the agent out of the folder it is given.

        Raises:
            RunError: A file of it cannot be read, or is of something else.
        """
        from safetensors import SafetensorError

        try:
            load(folder)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise RunError(
                f"expected a checkpoint that can be read in {folder}, got {type(error).__name__}: {error}; put its "
                f"files back, or move it away to go on from the one before"
            ) from error

    def rewind(self) -> tuple[int, Path | None]:
        """Go back to the newest whole checkpoint: for whoever holds `lock`.

        Removes what a killed process left half-written, sets damaged checkpoints aside as ``<step>.damaged`` and says
        so on stderr, and cuts metrics, trajectories and evaluations back to the checkpoint.

        Returns:
            Its step and folder; 0 and None before the first one.

        Raises:
            RunError: All checkpoints are damaged, or a file lacks lines that the checkpoint was written after.
        """
        with self._writing("checkpoints"):
            self._tidy()
        whole, damaged = self.checkpoints(), self.damaged_checkpoints()
        if damaged and not whole:
            why = "; ".join(f"{path}: {damage(path)}" for _, path in damaged)
            raise RunError(f"expected a whole checkpoint, got {why}; put the files back, or move it away to begin anew")
        step, folder = whole[-1] if whole else (0, None)
        lengths = json_object(folder / "state.json")["bytes"] if folder else {}
        for name in LINES:
            expected, got = lengths.get(name, 0), size(self.folder / name)
            if got < expected:
                raise RunError(
                    f"{self.folder / name}: expected at least {expected} bytes, as when checkpoint {step} was written, "
                    f"got {got}; put the file back, or move {folder} away to go on from the checkpoint before it"
                )
        with self._writing("checkpoints"):
            for _, path in damaged:
                aside = _free(path.with_name(f"{path.name}.damaged"))
                say(f"{path}: {damage(path)}; set aside as {aside.name}, going on from checkpoint {step}")
                os.rename(path, aside)
            for name in LINES:
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, lengths.get(name, 0))
            stored = self.evaluations()
            kept = {when: found for when, found in stored.items() if found.get("iteration", 0) <= step}
            if kept != stored:
                self.write_json("evaluation.json", kept)
        return step, folder

    def _numbered(self) -> list[tuple[int, Path]]:
        return sorted((int(p.name), p) for p in (self.folder / "checkpoints").iterdir() if p.name.isdigit())

    def _write_config(self) -> None:
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        replace(self.folder / "config.toml", _toml(self.config))

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return writing(self.folder / name, f"{{todo}}, then go on with: ppg-agent train --resume {self.folder}")

    def _tidy(self) -> None:
        """Undo or finish what a killed process left half-done."""
        for path in list((self.folder / "checkpoints").iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None:
                continue
            if match[2] == "replaced" and not path.with_name(match[1]).exists():
                os.rename(path, path.with_name(match[1]))  # killed between the two renames
            else:
                shutil.rmtree(path)
        for path in self.folder.glob(".*.tmp"):
            path.unlink()


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder: a file that is missing or of another size; None when whole."""
    try:
        state = json_object(checkpoint / "state.json")
    except (OSError, RunError) as error:
        return f"state.json: {getattr(error, 'strerror', None) or error}"
    files = state.get("files", {})
    if not isinstance(state.get("bytes"), dict) or not isinstance(files, dict):
        return "state.json: expected the tables 'bytes' and 'files'"
    for name, expected in files.items():
        if not (checkpoint / name).is_file():
            return f"{name}: missing"
        if size(checkpoint / name) != expected:
            return f"{name}: expected {expected} bytes, got {size(checkpoint / name)}"
    return None


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
    near = get_close_matches(folder.name, known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _free(path: Path) -> Path:
    """Return the path, with a number when it is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def default_folder(config: TrainConfig, root: Path = Path("runs")) -> Path:
    """Return a folder under ``root`` that does not exist yet, named by what is trained."""
    what = "offline" if config.offline.files else config.domain
    name = re.sub(r"[^a-zA-Z0-9]+", "-", f"{what} {config.label} seed {config.seed}")
    return _free(root / name)


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run folder under ``root`` whose metrics changed last.

    Raises:
        RunError: There is none.
    """
    found = [path for path in root.iterdir() if is_run(path)] if root.is_dir() else []
    if not found:
        raise RunError(f"expected a run under {root}/ to resume, got none; give its folder: --resume FOLDER")
    return max(found, key=lambda path: max(f.stat().st_mtime for f in (path, *path.glob("*.jsonl"))))


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): size(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _unused(folder: Path) -> bool:
    """Return whether nothing is in the folder but what a process that was killed while making a run left."""
    ours = (LOCK, ".config.toml.tmp")
    if not folder.is_dir():
        return False
    return all(p.name in ours or (p.name == "checkpoints" and not any(p.iterdir())) for p in folder.iterdir())


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(configs.to_dict(config))
