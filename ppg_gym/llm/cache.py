"""Nothing is paid for twice: answers on disk, which several processes may share, and requests under way.

An answer's key is a digest of everything that shapes it. No server key and no request text is stored, and nothing is
pickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from ppg_gym.extras import need
from ppg_gym.llm.chat import BudgetError, CacheError, EndpointError

SHORT_LIVED = 7 * 24 * 3600.0  # seconds: for facts that an update of the server may change

T = TypeVar("T")


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_folder() -> Path:
    """Return the user's folder for cached answers."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        base = Path(given)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "ppg-gym" / "answers"


class AnswerCache:
    """A folder of JSON objects by key.

    Args:
        folder: True for the user's folder, or a path.

    Raises:
        CacheError: The folder cannot be made, read or written.
    """

    def __init__(self, folder: bool | str, whose: str) -> None:
        diskcache = need("diskcache", "llm")

        class Disk(diskcache.JSONDisk):  # type: ignore[misc, name-defined]
            """Reads JSON only: unpickling a file that somebody else put there would run their code."""

            def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
                if mode == diskcache.core.MODE_PICKLE:
                    raise ValueError("expected JSON in the cache, got a pickle")
                return super().fetch(mode, filename, value, read)

        self._whose = whose
        self._errors = (OSError, sqlite3.Error, ValueError, zlib.error, RuntimeError, diskcache.Timeout)
        self.folder = str(folder)
        try:
            path = default_folder() if folder is True else Path(str(folder)).expanduser()
            self.folder = str(path)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._cache = diskcache.Cache(str(path), disk=Disk, timeout=10, cull_limit=0)
            self._cache.set("writable", True)
            # Culling (the expired, and the oldest beyond 1 GB) slows writes down: once here instead of at every write.
            self._cache.cull()
            self._cache.close()  # this thread's connection; the thread that asks opens its own
        except self._errors as error:
            raise self._broken(error) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the object stored under a key, None when there is none."""
        try:
            value = self._cache.get(key)
        except self._errors as error:
            raise self._broken(error) from error
        return value if isinstance(value, dict) else None

    def put(self, key: str, value: dict[str, Any], expire: float | None = None) -> None:
        """Store a JSON object, for ``expire`` seconds at most."""
        try:
            self._cache.set(key, value, expire=expire)
        except self._errors as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """Close this thread's connection; the next use opens another."""
        self._cache.close()

    def _broken(self, error: BaseException) -> CacheError:
        return CacheError(
            f"expected a folder for cached answers that can be read and written, got {self.folder!r}:"
            f" {error or type(error).__name__}; delete or repair it, name another one with {self._whose}['cache'], or"
            f" set {self._whose}['cache'] to false"
        )


class Flights:
    """Work under way on one loop: the first to ask for something does it, and the others wait for the outcome."""

    def __init__(self) -> None:
        self._flying: dict[str, asyncio.Future[tuple[Any, Exception | None] | None]] = {}

    async def share(self, key: str, do: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """Return the outcome, and whether somebody else's work gave it."""
        while (flying := self._flying.get(key)) is not None:
            outcome = await asyncio.shield(flying)
            if outcome is None:  # its owner was cancelled: the next one in line does the work
                continue
            value, error = outcome
            if error is not None:  # a new exception for each: a shared one would collect all their tracebacks
                raise type(error)(*error.args) from error
            return value, True
        flight = self._flying[key] = asyncio.get_running_loop().create_future()
        outcome = None
        try:
            value = await do()
            outcome = value, None
            return value, False
        except (BudgetError, CacheError, EndpointError) as error:
            outcome = None, error
            raise
        finally:
            del self._flying[key]
            flight.set_result(outcome)
