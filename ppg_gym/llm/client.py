"""The chat client: asks a chat model through its endpoints, and answers every request with a text or a typed failure.

Retries, cache, budget and the first look at the endpoints are here; single calls are in ``endpoints``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import os
import random
import time
from typing import Any

from ppg_gym.extras import need
from ppg_gym.llm import background
from ppg_gym.llm.answers import Completion
from ppg_gym.llm.bound import Bound
from ppg_gym.llm.cache import SHORT_LIVED, AnswerCache, digest
from ppg_gym.llm.chat import Answer, BudgetError, Counts, EndpointError, Request
from ppg_gym.llm.dialect import Dialect
from ppg_gym.llm.endpoints import CallError, Endpoint
from ppg_gym.llm.first_look import look
from ppg_gym.llm.settings import ClientSettings

FIRST_PAUSE = 0.25  # seconds before the second call; doubles every time, and half of it is random
LONGEST_PAUSE = 30.0
PATIENCE = 2.0  # seconds that an endpoint gets to come up, at the first look
PROBE_REST = 60.0  # seconds before a schema is tried again, when the last try told nothing and another would not either

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
        self._bound: Bound | None = None
        self._seen = False  # whether the endpoints have been checked
        self._structured: bool | None = None
        self._probe_from = -math.inf  # when a schema may be tried again
        self._thinks = self._wordy = False  # whether answers need more room: for thoughts, for the text itself
        self._dialects: dict[str, Dialect] = {}  # by URL: what the server takes
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
        asked = Dialect().body(self.settings, request, schema=True)
        key = digest([self.settings.servers, asked, schema, request.sample])
        stored = cache.get(key)
        # One that was cut off is asked for again when it may now become longer.
        if stored is not None and stored.get("headroom", self.settings.headroom) == self.settings.headroom:
            self.counts.cached += 1
            return Answer("ok", str(stored["text"]), cached=True, finish=str(stored["finish"]))

        async def pay() -> Answer:
            answer = await self._paid(request, schema)
            if answer.status == "ok":
                cut = {"headroom": self.settings.headroom} if answer.finish == "length" else {}
                cache.put(key, {"text": answer.text, "finish": answer.finish, **cut})
            return answer

        answer, shared = await flights.share(key, pay)
        if shared and answer.status == "ok":
            self.counts.cached += 1
            answer = dataclasses.replace(answer, cached=True)
        return answer

    async def structured(self) -> bool:
        """Return whether the server honours a JSON schema; a call or two find out, and the cache keeps it for a week.

        A probe that tells nothing (no answer, one that was cut off, a refusal for another reason) counts as no for
        now. It is not kept, and tried again later.

        Raises:
            BudgetError: The probe's call is beyond the budget.
            CacheError: The folder of cached answers cannot be used any more.
            EndpointError: No endpoint can serve the model.
        """
        if self._structured is None:
            if time.monotonic() < self._probe_from:
                return False
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

    def _bind(self) -> Bound:
        """Return the part for the running loop; a new one after a fork, or when the last loop has ended."""
        bound, loop = self._bound, asyncio.get_running_loop()
        if bound is not None and bound.loop is loop:
            return bound
        if bound is not None and bound.pid == os.getpid() and bound.loop.is_running():
            raise RuntimeError("expected one running event loop per client, got a second one; make a client for each")
        self._leave()
        self._bound = bound = Bound(self, self.settings, self.cache)
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

        An answer that is cut off is never asked for again as it stands: once with more room, if there is any.

        Raises:
            CallError: That of the last call, when all have failed or another would not help.
            EndpointError: No endpoint can serve the model, or the answers are not even JSON.
        """
        if not self._seen:
            await self._bind().flights.share("look", self._look)
        headroom = self.settings.headroom
        room = headroom if self._thinks else min(headroom, request.max_tokens) if self._wordy else 0
        done = await self._repeated(request, schema, room)
        if done.finish != "length":
            return done
        thinks = done.thought or not done.text.strip()
        more = headroom if thinks else min(headroom, request.max_tokens)
        if more <= room:
            return done
        done = await self._repeated(request, schema, more)
        if done.finish != "length":
            self._thinks, self._wordy = self._thinks or thinks, self._wordy or not thinks
            _log.info("%r: answers were cut off; from now on they get %d tokens more", self, more)
        return done

    async def _repeated(self, request: Request, schema: bool, room: int) -> Completion:
        """Return a text, which may be cut off; failed calls are repeated."""
        try:
            return await self._call(request, schema, room)
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
            return await self._call(request, schema, room, again=True)

        try:
            stop = self._tenacity.stop_after_attempt(self.settings.attempts)
            completion: Completion = await self._retrying(stop)(call)
        except CallError as failure:
            failure.reason += f" ({calls} call{'s' if calls > 1 else ''})"
            raise
        return completion

    async def _call(self, request: Request, schema: bool, room: int, again: bool = False) -> Completion:
        pool, counts = self._bind().pool, self.counts
        endpoint = await pool.take()
        began, failure, answered = asyncio.get_running_loop().time(), None, False
        try:
            done = await self._adapted(endpoint, request, schema, room, again)
            answered = True
            self._proven.add(endpoint.url)
            self._count_tokens(done)
            if done.refusal or done.finish == "content_filter":
                raise CallError("refused", f"the model refused: {endpoint.scrub(done.refusal) or done.finish}")
            if not done.text.strip() and done.finish != "length":
                raise self._empty(endpoint, done)
            self._thinks = self._thinks or (done.thought and done.finish != "length")
            counts.failures -= 1
            return done
        except CallError as error:
            failure, answered = error, not error.lost
            if error.foreign and endpoint.url not in self._proven:
                raise EndpointError(error.reason) from None
            raise
        finally:
            pool.done(endpoint, began, failure, answered)

    async def _adapted(self, endpoint: Endpoint, request: Request, schema: bool, room: int, again: bool) -> Completion:
        """Return one server's answer; where it refuses a parameter by name, ask without it, and remember what worked.

        Raises:
            CallError: No answer, or an error.
        """
        counts = self.counts
        known = dialect = self._dialects.get(endpoint.url, Dialect())
        while True:
            self._check_budget()
            counts.calls += 1
            counts.retries += again
            counts.failures += 1  # taken back once there is a text; anything raised counts
            try:
                done = await endpoint.complete(json.dumps(dialect.body(self.settings, request, schema, room)).encode())
            except CallError as error:
                other = dialect.avoiding(error.named, request) if error.code in (None, 400, 422) else None
                if other is None:
                    raise
                _log.info("%s; asking without", error.reason)
                dialect, again = other, True
                continue
            if dialect != known:
                self._dialects[endpoint.url] = dialect
                if dialect.temperatures - known.temperatures:
                    _log.warning(
                        "%s does not take temperature %g: it is left out, and the server's own is used",
                        endpoint.url,
                        request.temperature,
                    )
            return done

    def _empty(self, endpoint: Endpoint, done: Completion) -> CallError:
        """Return the failed call for an answer without a text."""
        if not done.thought:
            return CallError("error", f"{endpoint.url} sent an empty text, finish reason {done.finish!r}", again=True)
        whose = self.settings.whose
        return CallError(
            "error",
            f"{endpoint.url}: the model thought and then said nothing, finish reason {done.finish!r}; check"
            f" the server's reasoning parser, or switch thinking off with {whose}['extra_body'], such as"
            " {'chat_template_kwargs': {'enable_thinking': false}}",
            mute=True,
        )

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
        """Check every endpoint once."""
        retrying = self._retrying(self._tenacity.stop_after_delay(PATIENCE))
        await look(self._bind().pool.endpoints, self.settings, retrying)
        self._seen = True

    async def _probe(self) -> bool:
        cache, settings = self.cache, self.settings
        key = digest(["schema", settings.model, settings.servers, settings.omit, settings.extra_body])
        stored = cache.get(key) if cache else None
        if stored is not None:
            honoured, self._thinks = stored["structured"] is True, self._thinks or stored["thinks"] is True
        else:
            outcome = await self._try_schema()
            if outcome is None:
                return False
            honoured = outcome
            if cache:
                cache.put(key, {"structured": honoured, "thinks": self._thinks}, SHORT_LIVED)
        way = "is sent with every request" if honoured else "is not sent: the server does not honour it"
        _log.info("%r: a JSON schema %s", self, way)
        self._structured = honoured
        return honoured

    async def _try_schema(self) -> bool | None:
        """Return whether the server honours a schema; None when the try did not tell."""
        try:
            done = await self._complete(_PROBE, schema=True)
            if done.finish != "length":
                return _fits(done.text)
            reason, later = "the answer was cut off", True
        except CallError as failure:
            reason, later = failure.reason, not failure.again
            if failure.code in (400, 404, 422) or failure.mute:
                # Only if the same question is answered without a schema was the schema the reason.
                try:
                    await self._complete(_PROBE, schema=False)
                    return False
                except CallError as other:
                    reason, later = other.reason, not other.again
        if later:
            self._probe_from = time.monotonic() + PROBE_REST
        _log.log(
            logging.DEBUG if reason in self._warned else logging.WARNING,
            "could not try a JSON schema, which is not sent for now: %s",
            reason,
        )
        self._warned.add(reason)
        return None


def _worth_repeating(error: BaseException) -> bool:
    return isinstance(error, CallError) and error.again


def _fits(text: str) -> bool:
    """Return whether a text is JSON that fits the probe's schema."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and [*value] == ["snow_is_white"] and isinstance(value["snow_is_white"], bool)
