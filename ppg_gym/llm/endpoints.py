"""The endpoints of one model: a single call to one of them, and the choice of the next one.

A call ends in a completion or in a CallError that says whether to try again. Nothing here counts, caches or repeats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NoReturn

from ppg_gym.extras import need
from ppg_gym.llm.answers import Completion, Fault, FormError, completion, fault
from ppg_gym.llm.settings import ClientSettings

FIRST_REST = 0.1  # seconds that an endpoint rests after a failure; doubles with every failure in a row
LONGEST_REST = 30.0
LONGEST_RETRY_AFTER = 60.0
IDLE = 3.0  # seconds before we drop an idle connection; servers do after 5 s or more, and a call in that moment is lost

_FILTERING = (400, 403, 422, 451)  # statuses with which services tell of a content filter
_log = logging.getLogger("ppg_gym.llm")


@dataclass(eq=False)
class CallError(Exception):
    """A call without a usable answer.

    Attributes:
        status: The answer's status, should this be the last call.
        reason: One sentence; never holds a key.
        again: Whether another call may succeed.
        lost: Whether the endpoint itself is in trouble.
        after: Seconds that the server asks us to wait, if it does.
        code: The HTTP status, if there was one.
        foreign: Whether the answer is not JSON at all, so that it is probably not a chat server.
        named: The parameters of the request that the server refuses.
        mute: Whether the model thought and then said nothing.
    """

    status: Literal["timeout", "refused", "error"]
    reason: str
    again: bool = field(default=False, kw_only=True)
    lost: bool = field(default=False, kw_only=True)
    after: float | None = field(default=None, kw_only=True)
    code: int | None = field(default=None, kw_only=True)
    foreign: bool = field(default=False, kw_only=True)
    named: frozenset[str] = field(default=frozenset(), kw_only=True)
    mute: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return self.reason


class Endpoint:
    """One server, reached through one client of the ``openai`` library."""

    def __init__(self, url: str, settings: ClientSettings) -> None:
        openai = need("openai", "llm")
        self.url = url
        self.load = 0
        self.streak = 0
        self.rested_at = -math.inf
        self.rest_until = -math.inf
        self.asked_until = -math.inf  # what the server asked for (Retry-After): no success shortens it
        self._settings = settings
        self._key = os.environ.get(settings.api_key_env, "")
        self._openai = openai
        # Only `Pool` limits calls; the connection pool is larger, so that no call ever waits in both.
        size = settings.concurrency + 8
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=size, max_keepalive_connections=size, keepalive_expiry=IDLE
        )
        client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self._key or "EMPTY",
            max_retries=0,
            # One clock for the whole call (below), none per read: a server that sends a byte at a time must time out.
            timeout=openai.Timeout(None, connect=settings.timeout),
            http_client=openai.DefaultAioHttpClient(limits=limits),
        )
        # The server has no use for headers that describe this machine, and every header costs time.
        self._client = client.with_options(default_headers={name: openai.Omit() for name in client.platform_headers()})

    async def complete(self, body: bytes) -> Completion:
        """Send one chat request.

        Args:
            body: The request as JSON.

        Raises:
            CallError: No answer, an error, or a malformed answer.
        """
        # The low-level method: building the library's typed objects would double the time per call.
        text = await self._call("post", "/chat/completions", self._settings.timeout, content=body)
        try:
            answer = completion(text)
        except (ValueError, RecursionError) as error:
            foreign = isinstance(error, json.JSONDecodeError) and text.lstrip()[:1] not in ("", "{", "[")
            reason = f"{self.url} sent a malformed answer: {self.scrub(str(error))}"
            if foreign:
                hint = f"check {self._settings.whose}['base_url'], which usually ends in /v1"
                reason = f"{self.url}: expected JSON, got {_shown(self.scrub(text))!r}; {hint}"
            raise CallError("error", reason, again=not isinstance(error, FormError), foreign=foreign) from None
        if isinstance(answer, Fault):
            raise self._failure(answer, answer.code)
        return answer

    async def models(self, timeout: float) -> list[str] | None:
        """Return the names of the served models; None when the server has no list that we can read.

        Raises:
            CallError: No answer, or an error.
        """
        try:
            listed = json.loads(await self._call("get", "/models", timeout))
            return [str(model["id"]) for model in listed["data"]]
        except (ValueError, TypeError, LookupError):
            return None
        except CallError as failure:  # many servers lack this path, and work all the same
            if failure.code is None or failure.code in (401, 403) or (failure.code >= 500 and failure.code != 501):
                raise
            return None

    def scrub(self, text: str) -> str:
        """Return the text on one line, short, and without the key."""
        text = text.replace(self._key, "[key]") if self._key else text
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:300] + "…"

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _call(self, method: str, path: str, timeout: float, **rest: Any) -> str:
        openai = self._openai
        try:
            async with asyncio.timeout(timeout):
                answer: str = await getattr(self._client, method)(self.url + path, cast_to=str, **rest)
                return answer
        except openai.APIStatusError as error:
            self._refused(error)
        except TimeoutError:
            reason = f"{self.url} gave no answer within {timeout:g} s"
        except Exception as error:
            # Anything the libraries raise is a failed call. They report a lost connection as a timeout too, but its
            # innermost cause tells the two apart.
            cause: BaseException = error
            while (deeper := cause.__cause__ or cause.__context__) is not None:
                cause = deeper
            if not isinstance(cause, TimeoutError):
                reason = f"{self.url} cannot be reached: {self.scrub(str(cause)) or type(cause).__name__}"
                raise CallError("error", reason, again=True, lost=True) from None
            reason = f"{self.url} gave no answer within {timeout:g} s"
        raise CallError("timeout", reason, again=True, lost=True)

    def _refused(self, error: Any) -> NoReturn:
        text: str = error.response.text
        try:
            told = fault(json.loads(text))
        except (ValueError, RecursionError):
            told = fault(text)
        failure = self._failure(told, error.status_code)
        if failure.again:
            failure.after = _retry_after(error.response.headers.get("retry-after", ""))
        raise failure from None

    def _failure(self, told: Fault, code: int | None) -> CallError:
        """Return the failed call that an error stands for; ``code`` None: it came without a status."""
        said, variable, whose = self.scrub(told.message), self._settings.api_key_env, self._settings.whose
        if told.filtered and (code is None or code in _FILTERING):
            return CallError("refused", f"{self.url} refused, by its content filter: {said}", code=code)
        if code in (401, 403):
            state = "holds the key that was sent" if self._key else "is not set"
            hint = f"; check the key: the environment variable {variable} {state}"
        elif code == 404:
            hint = f"; check {whose}['model'] and that {whose}['base_url'] ends like '/v1'"
        elif code in (400, 422):
            hint = f"; check {whose}: the model's name, and what the server takes (omit, extra_body)"
        else:
            hint = ""
        again = code is None or code in (408, 409, 429) or code >= 500
        reason = f"{self.url} answered with {'an error' if code is None else f'status {code}'}: {said}{hint}"
        return CallError(
            "error", reason, again=again, lost=code is not None and code >= 500, code=code, named=told.named
        )


class Pool:
    """Hands out endpoints: the least loaded first, those in trouble after a rest, none beyond its limit.

    While other endpoints are well, one that comes back from a rest gets one call at a time until a call succeeds: many
    calls at once would all be lost if it were still down.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.endpoints = tuple(Endpoint(url, settings) for url in settings.base_url)
        self._limit = settings.concurrency
        self._waiting: deque[asyncio.Future[Endpoint]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def take(self) -> Endpoint:
        """Return the endpoint for the next call, first come first served; give it back with ``done``."""
        if not self._waiting and (endpoint := self._next()):
            endpoint.load += 1
            return endpoint
        place: asyncio.Future[Endpoint] = self._loop.create_future()
        self._waiting.append(place)
        self._hand_out()
        try:
            return await place
        except asyncio.CancelledError:
            # An endpoint may have been handed out between the cancellation and now: give it to the next in line.
            if place.done() and not place.cancelled():
                place.result().load -= 1
            else:
                with suppress(ValueError):
                    self._waiting.remove(place)
            self._hand_out()
            raise

    def done(self, endpoint: Endpoint, began: float, failure: CallError | None, answered: bool) -> None:
        """Take an endpoint back after a call.

        Args:
            endpoint: From `take`.
            began: When the call began, in the loop's time.
            failure: How the call failed, if it did.
            answered: Whether the server answered at all; false for a cancelled call.
        """
        now = self._loop.time()
        endpoint.load -= 1
        if failure is not None and failure.lost:
            if began >= endpoint.rested_at:  # calls in flight together fail together, and count as one failure
                endpoint.streak += 1
                rest = min(LONGEST_REST, FIRST_REST * 2.0 ** min(endpoint.streak - 1, 30))
                endpoint.rested_at, endpoint.rest_until = now, now + rest
                level = logging.WARNING if endpoint.streak == 3 else logging.DEBUG
                _log.log(level, "%s; it rests for %.1f s", failure.reason, rest)
        elif answered:
            endpoint.streak, endpoint.rest_until = 0, -math.inf
        if failure is not None and failure.after is not None:
            endpoint.asked_until = max(endpoint.asked_until, now + failure.after)
        self._hand_out()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._timer:
            self._timer.cancel()
        await asyncio.gather(*(endpoint.aclose() for endpoint in self.endpoints))

    def _next(self) -> Endpoint | None:
        now = self._loop.time()
        free = [e for e in self._open() if max(e.rest_until, e.asked_until) <= now]
        return min(free, key=lambda e: e.load) if free else None

    def _open(self) -> Iterator[Endpoint]:
        """Yield the endpoints that could take another call, whether at rest or not."""
        well = any(e.streak == 0 for e in self.endpoints)
        return (e for e in self.endpoints if e.load < (1 if well and e.streak else self._limit))

    def _hand_out(self) -> None:
        while self._waiting and (endpoint := self._next()):
            place = self._waiting.popleft()
            if not place.done():
                endpoint.load += 1
                place.set_result(endpoint)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            returns = [max(e.rest_until, e.asked_until) for e in self._open()]
            if returns:
                self._timer = self._loop.call_at(min(returns), self._hand_out)


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def _retry_after(header: str) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or a date; None for anything else."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None
