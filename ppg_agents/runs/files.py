"""Files that survive a crash: replaced atomically, synced to disk, locked; with clear errors when that fails.

Knows nothing about runs or learning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppg_agents.terminal.progress import say

LOCK = ".lock"
_TODO = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "choose a folder that can be written",
}
_locked: set[tuple[str, int]] = set()  # (lock, process): a record lock does not stop its own process


class RunError(ValueError):
    """Something is wrong with a run folder; the message tells the user what to do."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep every other process from training in a run folder; the lock is released if the process dies.

    Raises:
        RunError: Another process is training there, or the folder cannot be written.
    """
    path = Path(folder) / LOCK
    key = os.path.realpath(path), os.getpid()
    if key in _locked:
        raise RunError(_in_use(folder, "this process"))
    with writing(path, "{todo}"):
        descriptor = _lock(path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locked.add(key)
    try:
        yield
    finally:
        _locked.discard(key)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise RunError(_in_use(path.parent, holder or "another process")) from error
        except OSError as error:
            say(f"{path}: {error.strerror}: this file system has no locks; let nothing else train in {path.parent}")
            return descriptor
        os.close(descriptor)  # its holder has just deleted the file


def _in_use(folder: Path, holder: str) -> str:
    return f"expected a run folder that nobody trains in, got {folder}, in use by {holder}; wait for it or stop it"


@contextmanager
def writing(path: Path, todo: str) -> Iterator[None]:
    """Report what could not be written, why, and what to do.

    Libraries written in Rust raise their own errors; those are recognised by the error number at the end.

    Args:
        path: The file or folder being written.
        todo: What to do; ``{todo}`` in it becomes the remedy for this error.

    Raises:
        RunError: In place of an operating system error.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not isinstance(error, OSError) and number is None:
            raise
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else 0
        what = os.strerror(code) if code else str(error)
        at = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        act = todo.replace("{todo}", _TODO.get(code or 0, "see to that"))
        raise RunError(f"expected to write {path}, got: {what}{at}; {act}") from error


def replace(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file or folder to disk; a file system that cannot sync folders is excused."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RunError: The file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSONL file, leaving out a torn last line; a missing file is empty.

    Raises:
        RunError: Any other line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            objects.append(json.loads(line))
            broken = not isinstance(objects[-1], dict)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            broken = True
        if broken:
            raise RunError(
                f"{path}:{number}: expected one JSON object, got {line[:40]!r}; mend the line or put a whole copy back"
            )
    return objects


def finite(value: Any) -> Any:
    """Return ``value`` as plain JSON, with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def size(path: Path) -> int:
    """Return a file's size in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
