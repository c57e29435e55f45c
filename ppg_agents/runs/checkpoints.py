"""The ``checkpoints/`` folder of a run: one numbered folder per checkpoint, complete or absent.

A checkpoint is written under a temporary name, synced to disk and renamed. Its ``state.json`` lists its files with
their sizes, to detect later damage, and the length of the run's JSONL files at the time. The caller adds the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ppg_agents.runs.files import RunError, json_object, size, sync

_LEFTOVER = re.compile(r"\.(\d+)\.(tmp|replaced|removed)")


def whole(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every whole checkpoint, oldest first."""
    return [(step, path) for step, path in _numbered(root) if damage(path) is None]


def damaged(root: Path) -> list[tuple[int, Path, str]]:
    """Return (step, folder, what is wrong) of every checkpoint that is not whole, oldest first; see `damage`."""
    return [(step, path, why) for step, path in _numbered(root) if (why := damage(path)) is not None]


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder: a file missing or of the wrong size; None if whole."""
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


def lengths(checkpoint: Path) -> dict[str, int]:
    """Return the size in bytes of each of the run's JSONL files when the checkpoint was written."""
    return dict(json_object(checkpoint / "state.json")["bytes"])


def write(root: Path, step: int, save: Callable[[Path], None], lines: Sequence[Path], *, keep: int) -> Path:
    """Write a checkpoint whole or not at all, then remove all but the newest.

    Args:
        root: The ``checkpoints`` folder.
        step: Iterations done.
        save: Writes the checkpoint's content into the folder it gets.
        lines: Files outside the checkpoint whose lengths it records.
        keep: How many checkpoints to keep.

    Raises:
        OSError: It cannot be written; earlier checkpoints are untouched.
    """
    target, temporary, replaced = root / str(step), root / f".{step}.tmp", root / f".{step}.replaced"
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        save(temporary)
        state = {"iteration": step, "bytes": {path.name: size(path) for path in lines}, "files": _sizes(temporary)}
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in (*(line for line in lines if line.exists()), *temporary.rglob("*"), temporary):
            sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _keep_newest(root, keep)
    return target


def _keep_newest(root: Path, keep: int) -> None:
    for old, path in whole(root)[:-keep]:
        removed = root / f".{old}.removed"  # rename first: a half-deleted folder must not pass for a checkpoint
        os.rename(path, removed)
        shutil.rmtree(removed)


def read(folder: Path, load: Callable[[Path], None]) -> None:
    """Read a checkpoint folder back with ``load``.

    Raises:
        RunError: A file cannot be read, or belongs to something else.
    """
    from safetensors import SafetensorError

    try:
        load(folder)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise RunError(
            f"expected a checkpoint that can be read in {folder}, got {type(error).__name__}: {error}; put its "
            f"files back, or move it away to go on from the one before"
        ) from error


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to ``<step>.damaged``, so that nothing loads it; return its new path."""
    aside = free(checkpoint.with_name(f"{checkpoint.name}.damaged"))
    os.rename(checkpoint, aside)
    return aside


def tidy(root: Path, keep: int) -> None:
    """Undo or finish what a killed process left half done, the removal of all but the newest ``keep`` included."""
    for path in list(root.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not path.with_name(match[1]).exists():
            os.rename(path, path.with_name(match[1]))  # killed between the two renames
        else:
            shutil.rmtree(path)
    _keep_newest(root, keep)


def free(path: Path) -> Path:
    """Return the path, with a number appended if it exists."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _numbered(root: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.name), p) for p in root.iterdir() if p.name.isdigit())


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): size(p) for p in sorted(folder.rglob("*")) if p.is_file()}
