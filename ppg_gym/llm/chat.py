"""Requests to a chat model and its answers, counts and errors: plain data and one protocol.

Nothing here may import a client library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Status = Literal["ok", "timeout", "refused", "error"]


class EndpointError(RuntimeError):
    """The endpoints cannot serve at all: none is reachable, the model is not served, or the key is wrong."""


class BudgetError(RuntimeError):
    """The budget of calls or tokens is used up; the run can be resumed with a larger one."""


class CacheError(RuntimeError):
    """The folder of cached answers cannot be used."""


@dataclass(frozen=True)
class Request:
    """One question to a chat model.

    Attributes:
        messages: ``{"role": …, "content": …}``, oldest first.
        temperature: 0 is greedy.
        max_tokens: Most tokens of the answer; a client may allow more for thoughts.
        seed: Sampling seed, for servers that take one.
        schema: JSON schema of the answer; sent only to a server that honours schemas.
        sample: Tells several samples of one question apart in the cache; not sent.
    """

    messages: tuple[Mapping[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    sample: int = 0


@dataclass(frozen=True)
class Answer:
    """The outcome of a request.

    Attributes:
        status: ``ok``, or how the request failed.
        text: The model's text when ok, else empty; empty too when it was cut off before it said anything.
        reason: One sentence when not ok; never holds a key.
        cached: True when it cost no call.
        finish: The server's finish reason: ``stop``, ``length`` (cut off, and asking again would not help), …
    """

    status: Status
    text: str = ""
    reason: str = ""
    cached: bool = False
    finish: str = ""


@dataclass
class Counts:
    """What a client has done so far.

    Attributes:
        calls: Calls sent and paid for; ``failures`` of them failed, the others gave a text.
        retries: Calls that repeated a failed one.
        failures: Calls without a text: no answer, a malformed one, an empty one, a refusal.
        cached: Answers that cost no call.
        prompt_tokens: As reported by the servers.
        completion_tokens: As reported by the servers.
    """

    calls: int = 0
    retries: int = 0
    failures: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat(Protocol):
    """Answers requests: all that a judge or a partner needs from a chat model."""

    counts: Counts

    async def ask(self, request: Request) -> Answer:
        """Return the answer; a failed call gives an answer too, with its status.

        Raises:
            BudgetError: The budget is used up.
            EndpointError: No endpoint can serve the model.
        """
        ...

    async def structured(self) -> bool:
        """Return whether the server honours a JSON schema."""
        ...
