"""The folder of one training run: settings, metrics, trajectories, checkpoints.

    runs/<name>/
      config.toml            the resolved settings
      metrics.jsonl          one line per iteration, flushed
      trajectories.jsonl     every conversation that was learned from
      evaluation.json        held-out results before and after
      checkpoints/<step>/    adapter, tokenizer, optimizer, state.json, config.toml

Knows files, not learning: what a checkpoint contains is the agent's affair. A checkpoint is written
beside its place and renamed, so that it is there whole or not at all. Resuming cuts the two JSONL files
back to the length they had when the checkpoint was written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppg_agents import config as configs
from ppg_agents.config import TrainConfig


class RunError(ValueError):
    """A run folder is not what it should be; the message says what to do."""


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
            RunError: The folder holds something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            todo = f"go on with --resume {folder}" if is_run(folder) else "empty it"
            raise RunError(f"expected a new or empty folder, got {folder} with files; {todo}, or change --out")
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, config)
        run.write_config()
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open the folder of an existing run.

        Raises:
            RunError: There is no run in it.
            ConfigError: Its settings are damaged.
        """
        folder = Path(folder)
        if not is_run(folder):
            raise RunError(f"expected a run folder with config.toml and checkpoints/, got {folder}")
        return cls(folder, configs.load(folder / "config.toml"))

    def write_config(self) -> None:
        """Write the resolved settings."""
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        _write(self.folder / "config.toml", _toml(self.config))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite are written as null."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines so far; a torn last line is left out."""
        return read_jsonl(self.metrics_file)

    def write_evaluation(self, when: str, result: Mapping[str, Any]) -> None:
        """Store a held-out result under ``before`` or ``after``."""
        results = {**self.evaluations(), when: finite(result)}
        _write(self.folder / "evaluation.json", json.dumps(results, indent=2, allow_nan=False) + "\n")

    def evaluations(self) -> dict[str, Any]:
        """Return the stored held-out results, empty before the first one."""
        path = self.folder / "evaluation.json"
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return results

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of every whole checkpoint, oldest first."""
        folder = self.folder / "checkpoints"
        found = [path for path in folder.iterdir() if path.name.isdigit() and (path / "state.json").exists()]
        return sorted((int(path.name), path) for path in found)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Return the newest whole checkpoint as (step, folder), None before the first one."""
        return self.checkpoints()[-1] if self.checkpoints() else None

    def save_checkpoint(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write a checkpoint whole or not at all, then remove all but the newest.

        Args:
            step: Iterations done.
            save: Writes the agent into the folder it is given.
        """
        target = self.folder / "checkpoints" / str(step)
        temporary = target.with_name(f".{step}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save(temporary)
        lengths = {name: _size(self.folder / name) for name in ("metrics.jsonl", "trajectories.jsonl")}
        _write(temporary / "config.toml", _toml(self.config))
        state = {"iteration": step, "bytes": lengths}
        _write(temporary / "state.json", json.dumps(state, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        for _, old in self.checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        return target

    def rewind(self) -> tuple[int, Path | None]:
        """Cut metrics and trajectories back to the newest checkpoint; return its step and folder."""
        latest = self.latest_checkpoint()
        lengths: dict[str, int] = {}
        if latest is not None:
            lengths = json.loads((latest[1] / "state.json").read_text(encoding="utf-8"))["bytes"]
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            path = self.folder / name
            if path.exists():
                os.truncate(path, min(lengths.get(name, 0), _size(path)))
        return latest if latest else (0, None)


def is_run(folder: Path) -> bool:
    """Return whether the folder is that of a run."""
    return (Path(folder) / "config.toml").is_file() and (Path(folder) / "checkpoints").is_dir()


def default_folder(config: TrainConfig, root: Path = Path("runs")) -> Path:
    """Return a folder under ``root`` that does not exist yet, named by what is trained."""
    what = "offline" if config.offline.files else config.domain
    name = re.sub(r"[^a-zA-Z0-9]+", "-", f"{what} {config.label} seed {config.seed}")
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run folder under ``root`` whose metrics changed last.

    Raises:
        RunError: There is none.
    """
    found = [path for path in root.iterdir() if is_run(path)] if root.is_dir() else []
    if not found:
        raise RunError(f"expected a run under {root}/ to resume, got none; give its folder: --resume FOLDER")
    return max(found, key=lambda path: max(f.stat().st_mtime for f in (path, *path.glob("*.jsonl"))))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a torn last line is left out, a missing file is empty.

    Raises:
        RunError: Another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: expected one JSON object, got {line[:40]!r}") from error
    return objects


def finite(value: Any) -> Any:
    """Return ``value`` as plain JSON, with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(configs.to_dict(config))


def _write(path: Path, text: str) -> None:
    """Replace a small file whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
