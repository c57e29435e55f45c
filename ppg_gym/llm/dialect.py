"""Which parameters a server takes, and a request written down for it.

Services differ: some refuse ``max_tokens`` and want ``max_completion_tokens``, some have one temperature, some no seed.
A refusal that names such a parameter tells how to ask instead.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ppg_gym.llm.chat import Request
from ppg_gym.llm.settings import ClientSettings

OLD_LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"


@dataclass(frozen=True)
class Dialect:
    """What a server takes, as far as it has said so.

    Attributes:
        limit: The name of the limit on tokens.
        temperatures: Those that it refuses; a request with one of them is sent without.
        seed: Whether it takes a seed.
    """

    limit: str = OLD_LIMIT
    temperatures: frozenset[float] = frozenset()
    seed: bool = True

    def avoiding(self, named: Collection[str], request: Request) -> Dialect | None:
        """Return the dialect without what a refusal of a request names; None if that changes nothing."""
        other = self
        if self.limit == OLD_LIMIT and OLD_LIMIT in named:
            other = replace(other, limit=NEW_LIMIT)
        if "temperature" in named:
            other = replace(other, temperatures=self.temperatures | {request.temperature})
        if "seed" in named and request.seed is not None:
            other = replace(other, seed=False)
        return None if other == self else other

    def body(self, settings: ClientSettings, request: Request, schema: bool, room: int = 0) -> dict[str, Any]:
        """Return a request as JSON.

        Args:
            settings: The model's name, what is never sent and what is sent besides.
            request: The request.
            schema: Whether its schema is sent.
            room: Tokens on top of its limit.
        """
        body: dict[str, Any] = {"model": settings.model, "messages": request.messages}
        if request.temperature not in self.temperatures:
            body["temperature"] = request.temperature
        body[self.limit] = request.max_tokens + room
        if request.seed is not None and self.seed:
            body["seed"] = request.seed
        if schema and request.schema is not None:
            given = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": given}
        return {name: value for name, value in body.items() if name not in settings.omit} | dict(settings.extra_body)
