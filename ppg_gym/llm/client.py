"""The chat client: asks a chat model through its endpoints, and answers every request with a text or a typed failure.

Retries, cache, budget and the first look at the endpoints are here; single calls are in ``endpoints``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import random
import time
import weakref
from typing import Any

from ppg_gym.extras import need
from ppg_gym.llm import background
from ppg_gym.llm.cache import SHORT_LIVED, AnswerCache, Flights, digest
from ppg_gym.llm.chat import Answer, BudgetError, Counts, EndpointError, Request
from ppg_gym.llm.endpoints import CallError, Completion, Endpoint, Pool
from ppg_gym.llm.settings import ClientSettings
from ppg_gym.nearest import did_you_mean

FIRST_PAUSE = 0.25  # seconds before the second call; doubles every time, and half of it is random
LONGEST_PAUSE = 30.0
PATIENCE = 2.0  # seconds that an endpoint gets to come up, at the first look
GLANCE = 10.0  # most seconds to wait for the list of models

_PROBE = Request(
    messages=({"role": "user", "content": "Is snow white? Say one short sentence."},),
    max_tokens=128,
    schema={
        "type": "object",
        "properties": {"snow_is_white": {"type": "boolean"}},
        "required": ["snow_is_white"],
        "additionalProperties": False,
    },
)
_log = logging.getLogger("ppg_gym.llm")


class _Bound:
    """The part of a client that belongs to one event loop of one process: connections and calls under way.

    Connections cannot move to another loop, and a forked child must not use (or close) those of its parent. So a
    client makes a new one of these wherever it finds itself.
    """

    def __init__(self, client: ChatClient) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.get_running_loop()
        self.flights = Flights()
        self._settings = client.settings
        self._cache = client.cache
        self._pool: Pool | None = None
        self.forget = weakref.finalize(client, background.close_on, self.loop, self.pid, self)
        self.forget.atexit = False
        background.adopt(self)

    @property
    def pool(self) -> Pool:
        """The endpoints; made for the first call."""
        if self._pool is None:
            self._pool = Pool(self._settings)
        return self._pool

    async def aclose(self) -> None:
        """Close the connections to the endpoints and to the cache."""
        self.forget.detach()
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()
        if self._cache is not None:
            self._cache.close()


class ChatClient:
    """Asks one model, on one event loop at a time; made for ``background.run``. On a loop of your own, ``aclose`` it.

    A cached answer costs nothing. With the cache on, identical requests under way at the same time cost one call. The
    endpoints are checked once, before the first call.

    Args:
        settings: Endpoints, model and limits.

    Attributes:
        settings: The settings.
        counts: What the client has done so far.
        cache: The answers on disk; None when they are not kept.

    Raises:
        CacheError: The folder of cached answers cannot be used.
        ModuleNotFoundError: The extra ``[llm]`` is not installed.
    """

    def __init__(self, settings: ClientSettings) -> None:
        for module in ("openai", "aiohttp"):
            need(module, "llm")
        self._tenacity = need("tenacity", "llm")
        self.settings = settings
        self.counts = Counts()
        self.cache = AnswerCache(settings.cache, settings.whose) if settings.cache else None
        self._bound: _Bound | None = None
        self._seen = False  # whether the endpoints have been checked
        self._structured: bool | None = None
        self._unmetered = False  # whether a server leaves out its token counts
        self._proven: set[str] = set()  # URLs that have answered like a chat server
        self._warned: set[str] = set()  # reasons why the schema could not be tried
        self._random = random.Random()

    def __repr__(self) -> str:
        return f"ChatClient(model={self.settings.model!r}, base_url={list(self.settings.base_url)!r})"

    async def ask(self, request: Request) -> Answer:
        """Return the answer, from the cache or after as many calls as it takes; a failure is an answer too.

        Raises:
            BudgetError: A call is needed and the budget is used up.
            CacheError: The folder of cached answers cannot be used any more.
            EndpointError: At the first call: no endpoint can serve the model, or what answers is not a chat server.
        """
        schema = request.schema is not None and await self.structured()
        cache = self.cache
        if cache is None:
            return await self._paid(request, schema)
        flights = self._bind().flights
        key = digest([_body(self.settings.model, request, schema=True), schema, request.sample])
        stored = cache.get(key)
        if stored is not None:
            self.counts.cached += 1
            return Answer("ok", str(stored["text"]), cached=True, finish=str(stored["finish"]))

        async def pay() -> Answer:
            answer = await self._paid(request, schema)
            if answer.status == "ok":
                cache.put(key, {"text": answer.text, "finish": answer.finish})
            return answer

        answer, shared = await flights.share(key, pay)
        if shared and answer.status == "ok":
            self.counts.cached += 1
            answer = dataclasses.replace(answer, cached=True)
        return answer

    async def structured(self) -> bool:
        """Return whether the server honours a JSON schema; one call finds out, and the cache keeps it for a week.

        A probe that fails for another reason (no answer) counts as no, and is tried again the next time.

        Raises:
            BudgetError: The probe's call is beyond the budget.
            CacheError: The folder of cached answers cannot be used any more.
            EndpointError: No endpoint can serve the model.
        """
        if self._structured is None:
            return (await self._bind().flights.share("structured", self._probe))[0]
        return self._structured

    async def aclose(self) -> None:
        """Close the connections, on their loop; the next request opens others."""
        bound, self._bound = self._bound, None
        if bound is not None:
            await bound.aclose()

    def close(self) -> None:
        """Close the connections from outside their loop, and wait for it; the next request opens others."""
        bound = self._bound
        if bound is None or bound.pid != os.getpid() or not bound.loop.is_running():
            self._leave()
        else:
            background.run(self.aclose(), bound.loop)

    def _bind(self) -> _Bound:
        """Return the part for the running loop; a new one after a fork, or when the last loop has ended."""
        bound, loop = self._bound, asyncio.get_running_loop()
        if bound is not None and bound.loop is loop:
            return bound
        if bound is not None and bound.pid == os.getpid() and bound.loop.is_running():
            raise RuntimeError("expected one running event loop per client, got a second one; make a client for each")
        self._leave()
        self._bound = bound = _Bound(self)
        return bound

    def _leave(self) -> None:
        """Drop connections whose loop has ended or belongs to the parent process."""
        if self._bound is not None:
            self._bound.forget.detach()
            if self._bound.pid != os.getpid():
                background.keep(self._bound)
            self._bound = None

    async def _paid(self, request: Request, schema: bool) -> Answer:
        try:
            done = await self._complete(request, schema)
        except CallError as failure:
            return Answer(failure.status, reason=failure.reason)
        return Answer("ok", done.text, finish=done.finish)

    async def _complete(self, request: Request, schema: bool) -> Completion:
        """Return a text after as many calls as it takes.

        Raises:
            CallError: That of the last call, when all have failed or another would not help.
            EndpointError: No endpoint can serve the model, or the answers are not even JSON.
        """
        if not self._seen:
            await self._bind().flights.share("look", self._look)
        body = json.dumps(_body(self.settings.model, request, schema)).encode()
        try:
            return await self._call(body)
        except CallError as failure:
            first: CallError | None = failure
        calls = 1

        async def call() -> Completion:
            nonlocal first, calls
            if first is not None:
                # Most calls succeed at once: the first is made above without tenacity, whose loop costs time, and only
                # its failure is handed in here.
                failure, first = first, None
                raise failure
            calls += 1
            return await self._call(body, again=True)

        try:
            stop = self._tenacity.stop_after_attempt(self.settings.attempts)
            completion: Completion = await self._retrying(stop)(call)
        except CallError as failure:
            failure.reason += f" ({calls} call{'s' if calls > 1 else ''})"
            raise
        return completion

    async def _call(self, body: bytes, again: bool = False) -> Completion:
        pool, counts = self._bind().pool, self.counts
        endpoint = await pool.take()
        began, failure, answered = asyncio.get_running_loop().time(), None, False
        try:
            self._check_budget()
            counts.calls += 1
            counts.retries += again
            counts.failures += 1  # taken back once there is a text; anything raised counts
            done = await endpoint.complete(body)
            answered = True
            self._proven.add(endpoint.url)
            self._count_tokens(done)
            if done.refusal or done.finish == "content_filter":
                raise CallError("refused", f"the model refused: {endpoint.scrub(done.refusal) or done.finish}")
            if not done.text.strip():
                reason = f"{endpoint.url} sent an empty text, finish reason {done.finish!r}"
                raise CallError("error", reason, again=True)
            counts.failures -= 1
            return done
        except CallError as error:
            failure, answered = error, not error.lost
            if error.foreign and endpoint.url not in self._proven:
                raise EndpointError(error.reason) from None
            raise
        finally:
            pool.done(endpoint, began, failure, answered)

    def _retrying(self, stop: Any) -> Any:
        retry = self._tenacity.retry_if_exception(_worth_repeating)
        return self._tenacity.AsyncRetrying(stop=stop, wait=self._pause, retry=retry, reraise=True)

    def _pause(self, state: Any) -> float:
        """Return the seconds before the next call: exponential and half random, so that callers spread out."""
        longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(state.attempt_number - 1, 30))
        return longest * self._random.uniform(0.5, 1.0)

    def _check_budget(self) -> None:
        counts, settings = self.counts, self.settings
        used = counts.prompt_tokens + counts.completion_tokens
        if settings.max_total_tokens is not None and self._unmetered:
            raise BudgetError(
                f"{settings.whose}['max_total_tokens']: expected a server that reports its tokens, got an answer"
                " without usage; set max_calls instead"
            )
        for name, made, most in (
            ("max_calls", counts.calls, settings.max_calls),
            ("max_total_tokens", used, settings.max_total_tokens),
        ):
            if most is not None and made >= most:
                paid = "what was paid is in the cache" if self.cache else "with the cache on, nothing is paid twice"
                raise BudgetError(
                    f"expected at most {most} by {settings.whose}[{name!r}], and that is used up: {counts.calls} calls"
                    f" made, {used} tokens; raise {settings.whose}[{name!r}] and resume: {paid}"
                )

    def _count_tokens(self, done: Completion) -> None:
        if done.tokens is None:
            self._unmetered = True
        else:
            self.counts.prompt_tokens += done.tokens[0]
            self.counts.completion_tokens += done.tokens[1]

    async def _look(self) -> None:
        """Check every endpoint once: does it answer, and does it serve the model?"""
        began = time.monotonic()
        settings, endpoints = self.settings, self._bind().pool.endpoints
        seen = await asyncio.gather(*(self._look_at(endpoint) for endpoint in endpoints))
        failures = [models for models in seen if isinstance(models, CallError)]
        for failure in failures:
            if not failure.again:
                raise EndpointError(f"expected an endpoint that serves {settings.model!r}: {failure.reason}")
        if len(failures) == len(endpoints):
            listed = "; ".join(failure.reason for failure in failures)
            raise EndpointError(
                f"expected an endpoint that answers, got none within {time.monotonic() - began:.1f} s: {listed};"
                f" start the server or correct {settings.whose}['base_url']"
            )
        for failure in failures:
            _log.warning("%s; going on with the other endpoints", failure.reason)
        for endpoint, models in zip(endpoints, seen, strict=True):
            if isinstance(models, list) and models and settings.model not in models:
                hint = did_you_mean(settings.model, models, f"it serves {', '.join(models[:5])}")
                raise EndpointError(
                    f"expected {endpoint.url} to serve {settings.whose}['model'] = {settings.model!r}, got no such"
                    f" model{hint}"
                )
        self._seen = True

    async def _look_at(self, endpoint: Endpoint) -> list[str] | CallError | None:
        retrying = self._retrying(self._tenacity.stop_after_delay(PATIENCE))
        try:
            models: list[str] | None = await retrying(endpoint.models, min(self.settings.timeout, GLANCE))
        except CallError as failure:
            return failure
        return models

    async def _probe(self) -> bool:
        cache, settings = self.cache, self.settings
        key = digest(["structured", settings.model, settings.base_url])
        stored = cache.get(key) if cache else None
        if stored is not None:
            honoured = stored["structured"] is True
        else:
            try:
                honoured = _fits((await self._complete(_PROBE, schema=True)).text)
            except CallError as failure:
                if failure.code not in (400, 404, 422):
                    level = logging.DEBUG if failure.reason in self._warned else logging.WARNING
                    self._warned.add(failure.reason)
                    _log.log(level, "could not try a JSON schema, which is not sent for now: %s", failure.reason)
                    return False
                honoured = False
            if cache:
                cache.put(key, {"structured": honoured}, SHORT_LIVED)
        way = "is sent with every request" if honoured else "is not sent: the server does not honour it"
        _log.info("%r: a JSON schema %s", self, way)
        self._structured = honoured
        return honoured


def _body(model: str, request: Request, schema: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": request.messages,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if schema and request.schema is not None:
        given = {"name": "answer", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": given}
    return body


def _worth_repeating(error: BaseException) -> bool:
    return isinstance(error, CallError) and error.again


def _fits(text: str) -> bool:
    """Return whether a text is JSON that fits the probe's schema."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and [*value] == ["snow_is_white"] and isinstance(value["snow_is_white"], bool)
