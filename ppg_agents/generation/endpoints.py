"""HTTP calls to rollout servers, from any thread over one event loop, and a record of how each server is doing.

Knows HTTP and vLLM's error replies; nothing about tokens, versions or conversations.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ppg_agents.generation import GenerationError

T = TypeVar("T")

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
_RETRY = (429, 502, 503, 504)
_SHORT, _LONG = 0.1, 5.0  # seconds to leave a silent server alone, doubled each time from the first to the second
_LOOK = 0.1  # seconds between checks for a signal


class ServerRefusedError(GenerationError):
    """A server answered with a refusal."""


class ServersGoneError(GenerationError):
    """No server has answered for longer than the sampler's patience."""


class UnreachableError(Exception):
    """A server did not answer this time; ``gone`` if the connection broke, so it may have restarted."""

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class UnknownAdapterError(Exception):
    """A server does not know the adapter: it has restarted."""


@dataclass
class Endpoint:
    """A server and how it is doing; only touched on the event loop.

    Attributes:
        url: Without ``/v1``.
        model: Name of its base model.
        loaded: Name of the version it has loaded.
        rest: Monotonic time until which it is left alone.
        since: Monotonic time since which it has been silent; None while it answers.
        failures: Calls in a row that it did not answer.
        reason: Why the last of them failed.
        loading: Held while a version is being loaded.
    """

    url: str
    model: str = ""
    loaded: str = ""
    rest: float = 0.0
    since: float | None = None
    failures: int = 0
    reason: str = ""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def answered(self) -> None:
        """Record that it answered."""
        self.rest, self.since, self.failures = 0.0, None, 0

    def silent(self, error: UnreachableError) -> None:
        """Record that it did not answer; if it is gone, so is the version it had loaded."""
        now = time.monotonic()
        self.rest = now + min(_LONG, _SHORT * 2**self.failures)
        self.since = now if self.since is None else self.since
        self.failures += 1
        self.loaded, self.reason = "" if error.gone else self.loaded, str(error)


class Wire:
    """An event loop in its own thread, with connections to the servers."""

    def __init__(self, timeout: float, key_env: str) -> None:
        """Start the loop; connections open with the first call.

        Args:
            timeout: Seconds allowed for one answer.
            key_env: Name of the environment variable that holds the servers' key; leave it unset if they need none.
        """
        key = os.environ.get(key_env)
        self._key_env, self._has_key = key_env, bool(key)
        self._under_way: set[Future[Any]] = set()
        self._listed = threading.RLock()  # a call is listed before `cancel` can run, so none is missed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ppg-rollouts", daemon=True)
        self._thread.start()
        self._session: Any = self.run(_session(timeout, key))
        atexit.register(self.close)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; an exception in the waiting thread cancels it.

        Raises:
            GenerationError: `cancel` was called, or the connections are closed.
        """
        if not self._thread.is_alive():
            coroutine.close()
            raise GenerationError("expected an open sampler, got a closed one; make a new one")
        with self._listed:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._under_way.add(future)
        try:
            while not wait([future], timeout=_LOOK).done:  # signals get through between waits
                pass
            return future.result()
        except CancelledError:
            raise GenerationError("expected an answer from the servers, got cancelled while waiting") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            self._under_way.discard(future)

    def cancel(self) -> None:
        """Cancel everything `run` waits for; the servers stop working on it."""
        with self._listed:
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()

    def close(self) -> None:
        """Close the connections and end the thread; a second call does nothing."""
        if not self._thread.is_alive():
            return
        atexit.unregister(self.close)
        self.cancel()
        self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def call(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Return a server's JSON answer; empty if it sends something else.

        Raises:
            UnreachableError: It did not answer, is too busy, or has a fault.
            UnknownAdapterError: It does not know the adapter it was asked for.
            ServerRefusedError: It refused.
        """
        status, text = await self._send(endpoint, method, path, body)
        wants_reply = path == COMPLETIONS
        if status >= 500 and wants_reply:
            raise UnreachableError(f"HTTP {status} {text[:200]}")
        if status == 404 and wants_reply and body["model"] != endpoint.model:
            raise UnknownAdapterError
        if status >= 400:
            raise ServerRefusedError(f"{endpoint.url}{path}: expected success, got HTTP {status}: {_message(text)}")
        try:
            answer = json.loads(text) if text.startswith("{") else {}
        except json.JSONDecodeError as error:
            raise UnreachableError(f"broken JSON: {error}") from None
        return answer if isinstance(answer, dict) else {}

    async def base_model(self, endpoint: Endpoint) -> tuple[str, int]:
        """Return the name of a server's base model, and its context length in tokens.

        Raises:
            UnreachableError: It did not answer, or is too busy.
            ServerRefusedError: It refused, or is not a vLLM server; the message says what to check.
        """
        where = f"{endpoint.url}{MODELS}"
        status, text = await self._send(endpoint, "GET", MODELS)
        if status >= 400:
            todo = "check the URL, which must end in /v1" if status in (404, 405) else "look in the server's log"
            if status in (401, 403):
                state = "holds the key that was sent" if self._has_key else "is not set"
                todo = f"check the key: the environment variable {self._key_env} {state}"
            raise ServerRefusedError(f"{where}: expected a list of models, got HTTP {status}: {_message(text)}; {todo}")
        try:
            base = next(card for card in json.loads(text)["data"] if not card.get("parent"))
            name = str(base["id"])
        except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
            raise ServerRefusedError(
                f"{where}: expected a list of models, got {' '.join(text.split())[:80]!r}; check the URL, which must "
                "end in /v1"
            ) from None
        length = base.get("max_model_len")
        if not isinstance(length, int):
            raise ServerRefusedError(
                f"{where}: expected a vLLM server, which reports max_model_len, got {name!r} with "
                f"{', '.join(sorted(base))}; rollouts need vLLM (vllm serve), other servers can be judge or partner"
            )
        return name, length

    async def _send(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Return status and text of a server's answer.

        Raises:
            UnreachableError: It did not answer, or is too busy.
        """
        import aiohttp

        try:
            async with self._session.request(method, endpoint.url + path, json=body) as response:
                status, text = response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            gone = not isinstance(error, TimeoutError)
            raise UnreachableError(f"{type(error).__name__} {error}".rstrip(), gone=gone) from None
        if status in _RETRY:
            raise UnreachableError(f"HTTP {status} {text[:200]}")
        return status, text


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all of them; if one raises, cancel the others first."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_patience(endpoints: Sequence[Endpoint], patience: float) -> None:
    """Raise if none of these servers has answered for ``patience`` seconds.

    Raises:
        ServersGoneError: None has; the message says which, for how long, and what to do.
    """
    now = time.monotonic()
    waited = [now - e.since for e in endpoints if e.since is not None]
    if len(waited) == len(endpoints) and min(waited) >= patience:
        reasons = "; ".join(f"{e.url}: {e.reason}" for e in endpoints)
        raise ServersGoneError(
            f"expected an answer from {'one of ' if len(endpoints) > 1 else ''}the rollout servers, got none for "
            f"{min(waited):.1f} s ({reasons}); start them again, or name others with --rollout-endpoints"
        )


def root(url: str) -> str:
    """Return an endpoint's URL without ``/v1``.

    Raises:
        ValueError: It is not an HTTP URL.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number
        usable = False
    if not usable:
        raise ValueError(f"expected an endpoint's URL such as http://localhost:8000/v1, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


async def _session(timeout: float, key: str | None) -> Any:
    import aiohttp

    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=min(10.0, timeout)),
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


def _message(text: str) -> str:
    """Return the message in an error answer."""
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (json.JSONDecodeError, AttributeError):
        return " ".join(text.split())[:500]
