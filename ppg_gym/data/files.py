"""Text in and text out: say where a file is wrong, replace a file in one step.

Nothing here knows a format of dialogues or personas.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN = 5
_BLANK = " \t\r\n"


class DataError(ValueError):
    """A file that is refused; the message names the file, the place and what was expected."""


@dataclass(frozen=True)
class Problem:
    """Something in a file that cannot be used.

    Attributes:
        line: Line of the file on which it begins, from 1.
        where: The same place as a reader of the file counts: ``row 7``, ``dialogue 3``; may be empty.
        why: What is wrong; the same words for the same reason.
        detail: What the file holds instead; may be empty.
    """

    line: int
    where: str
    why: str
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.why}" + (f", got {self.detail}" if self.detail else "")


class RefusedError(DataError):
    """A file of which nothing is used. ``problems`` holds every reason; the message shows the first few."""

    def __init__(self, path: str | os.PathLike[str], problems: Iterable[Problem]) -> None:
        self.path, self.problems = str(path), tuple(problems)
        shown = [f"{path}:{problem.line}: {problem}" for problem in self.problems[:_SHOWN]]
        more = len(self.problems) - len(shown)
        if more:
            shown.append(f"and {more} more; see them all with: ppg-agent data validate {path}")
        super().__init__("\n  ".join(shown))


def shorten(value: object, limit: int = 60) -> str:
    """Return the ``repr`` of a value from a file, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_places(problems: Iterable[Problem]) -> str:
    """Return ``row 7, row 9, …``: the first places, in words."""
    places = [problem.where or f"line {problem.line}" for problem in problems]
    return ", ".join(places[:_SHOWN]) + (", …" if len(places) > _SHOWN else "")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: The file cannot be read, or holds a byte that is not UTF-8 (with its line).
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        todo = "make it readable" if isinstance(error, PermissionError) else "check the path"
        raise DataError(f"{path}: expected a readable file, got {error.strerror or error}; {todo}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"byte {content[error.start]:#04x}"
        raise RefusedError(path, [Problem(line, "", "expected a readable UTF-8 file", got)]) from error


def list_items(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, item) for every item of a JSON list, one at a time.

    Raises:
        json.JSONDecodeError: Not a JSON list, or broken at the place that the error names.
    """
    decoder = json.JSONDecoder()
    at, line, counted = _after_blank(text, 0), 1, 0
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("expected '['", text, at)
    at = _after_blank(text, at + 1)
    if text[at : at + 1] != "]":
        while True:
            try:
                item, end = decoder.raw_decode(text, at)
            except RecursionError as error:
                raise json.JSONDecodeError("nested too deeply", text, at) from error
            line, counted = line + text.count("\n", counted, at), at
            yield line, item
            at = _after_blank(text, end)
            if text[at : at + 1] != ",":
                break
            at = _after_blank(text, at + 1)
    if text[at : at + 1] != "]":
        raise json.JSONDecodeError("expected ',' or ']'", text, at)
    at = _after_blank(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("expected the end of the file", text, at)


def broken_json(error: json.JSONDecodeError) -> Problem:
    """Return the problem of a file that is not JSON."""
    return Problem(error.lineno, f"column {error.colno}", "expected JSON", f"a fault: {error.msg}")


def json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Yield (line, object) for every line that is not blank, or (line, problem) for one that holds something else."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            yield number, Problem(number, "", "expected a JSON object", f"invalid JSON ({reason})")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            yield number, Problem(number, "", "expected a JSON object", shorten(value))


def write_lines(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line; a write that fails leaves the file as it was."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            if not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line):
                line = json.dumps(row, allow_nan=False)  # UTF-8 cannot hold half a surrogate pair: escape it
            file.write(line + "\n")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside the target to write to; it replaces the target when the block ends without an error.

    Raises:
        DataError: The folder does not exist, or the target is not a regular file.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise DataError(f"{path}: expected a folder that exists, got {target.parent}; make it first")
    if target.exists() and not target.is_file():
        raise DataError(f"{path}: expected a file to write, got something else of that name; give another one")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _after_blank(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _BLANK:
        at += 1
    return at
