"""How to reach a chat model: the endpoints, the model, limits and the cache, read from plain options.

Holds the name of the environment variable with the key, never the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ppg_gym.nearest import refuse_unknown
from ppg_gym.options import whole, wrong

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OMITTABLE = ("temperature", "seed", "max_tokens")
_OURS = ("model", "messages", "response_format", "stream", "n")  # the client could not read another kind of answer


@dataclass(frozen=True)
class ClientSettings:
    """Settings of a chat client.

    Attributes:
        base_url: OpenAI-compatible endpoints that serve the same model, such as ``http://localhost:8000/v1``.
        model: The name under which the endpoints serve it.
        timeout: Most seconds per call.
        attempts: Most calls per answer, the first included.
        concurrency: Most calls in flight per endpoint.
        api_key_env: Name of the environment variable with the key; leave it unset for a server without keys.
        cache: True for the user's cache folder, False for no cache, or a folder.
        identity: Under which name the cache knows the servers; None: by ``base_url``. When a server moves, give its old
            URL (of several: all, sorted, with a space between), and what was paid for is found again.
        headroom: Most tokens on top of the limit for a model that thinks before it answers. An answer that was cut off
            is asked for once more with a higher limit, which is kept where it helped: this for thoughts, twice the
            limit for a plain text. 0: a cut answer stays cut.
        omit: Parameters that are never sent, such as ``seed``.
        extra_body: Further parameters of every request, such as ``{"reasoning_effort": "low"}``.
        max_calls: Budget of calls; cached answers are free.
        max_total_tokens: Budget of prompt and completion tokens, as reported by the servers; calls in flight when it
            runs out are not stopped.
        whose: Name of the options these came from, for messages.

    Raises:
        ValueError: A value of the wrong type or range.
    """

    base_url: tuple[str, ...]
    model: str
    timeout: float = 60.0
    attempts: int = 5
    concurrency: int = 64
    api_key_env: str = "OPENAI_API_KEY"
    cache: bool | str = True
    identity: str | None = None
    headroom: int = 2048
    omit: tuple[str, ...] = ()
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    max_calls: int | None = None
    max_total_tokens: int | None = None
    whose: str = dataclasses.field(default="options", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.api_key_env, str) or not _ENV_NAME.fullmatch(self.api_key_env):
            raise ValueError(
                f"{self.whose}['api_key_env']: expected the name of an environment variable such as"
                " 'OPENAI_API_KEY', got something else (not repeated here, as it may be a key);"
                " put the key into that variable"
            )
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        if not isinstance(urls, list | tuple) or not urls or not all(isinstance(url, str) for url in urls):
            raise wrong(self.whose, "base_url", "an endpoint's URL or a list of them", type(self.base_url).__name__)
        urls = tuple(self._url(url) for url in urls)
        if len(set(urls)) < len(urls):
            raise wrong(self.whose, "base_url", "every endpoint once", ", ".join(urls))
        object.__setattr__(self, "base_url", urls)
        if not isinstance(self.model, str) or not self.model.strip():
            raise wrong(self.whose, "model", "the name of a served model", self.model)
        seconds = self.timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise wrong(self.whose, "timeout", "seconds above 0", seconds)
        for name in ("attempts", "concurrency", "max_calls", "max_total_tokens"):
            if getattr(self, name) is not None or not name.startswith("max_"):
                whole(self.whose, name, getattr(self, name))
        if not isinstance(self.cache, bool | str) or self.cache == "":
            raise wrong(self.whose, "cache", "true, false or a folder", self.cache)
        if self.identity is not None and (not isinstance(self.identity, str) or not self.identity.strip()):
            raise wrong(self.whose, "identity", "a name for the servers, such as their old URL", self.identity)
        whole(self.whose, "headroom", self.headroom, 0)
        omitted = (self.omit,) if isinstance(self.omit, str) else self.omit
        if not isinstance(omitted, list | tuple) or not set(omitted) <= set(_OMITTABLE):
            raise wrong(self.whose, "omit", f"a list out of {', '.join(_OMITTABLE)}", self.omit)
        object.__setattr__(self, "omit", tuple(omitted))
        if not isinstance(self.extra_body, Mapping) or set(self.extra_body) & set(_OURS):
            expected = f"parameters of a request by name, none of {', '.join(_OURS)}"
            raise wrong(self.whose, "extra_body", expected, self.extra_body)
        try:
            object.__setattr__(self, "extra_body", json.loads(json.dumps(dict(self.extra_body), allow_nan=False)))
        except (TypeError, ValueError):
            raise wrong(self.whose, "extra_body", "plain JSON values", self.extra_body) from None

    @property
    def servers(self) -> str:
        """By what the cache knows the servers."""
        return self.identity or " ".join(sorted(self.base_url))

    @classmethod
    def take(
        cls, options: Mapping[str, Any], whose: str, known: Iterable[str] = ()
    ) -> tuple[ClientSettings, dict[str, Any]]:
        """Split plain options into the client's settings and the caller's.

        Args:
            options: Plain JSON values by name.
            whose: ``"judge_options"`` or ``"partner_options"``.
            known: Names of the options that are the caller's.

        Returns:
            The client's settings, and the options named in ``known``.

        Raises:
            ValueError: An unknown name (the message offers the nearest one), a missing one, or a bad value.
        """
        settings_names = [field.name for field in dataclasses.fields(cls) if field.name != "whose"]
        callers = set(known)
        if "api_key" in options:
            name = options.get("api_key_env", cls.api_key_env)
            variable = name if isinstance(name, str) and _ENV_NAME.fullmatch(name) else cls.api_key_env
            raise ValueError(
                f"{whose}['api_key']: expected no key among the options, which are written to files; put it into the"
                f" environment variable {variable}, or name another variable with {whose}['api_key_env']"
            )
        refuse_unknown(whose, options, sorted({*settings_names, *callers}))
        for name, example in (("base_url", "'http://localhost:8000/v1'"), ("model", "the name the server lists")):
            if name not in options:
                raise ValueError(f"{whose}: expected {name!r}, got none; set it to {example}")
        settings = cls(**{name: options[name] for name in settings_names if name in options}, whose=whose)
        return settings, {name: value for name, value in options.items() if name in callers}

    def _url(self, url: str) -> str:
        try:
            parts = urlsplit(url.strip())
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if "@" in url or parts.query or "?" in url or "#" in url:
            raise ValueError(
                f"{self.whose}['base_url']: expected a plain URL such as 'http://localhost:8000/v1', got one with a"
                " user, a password or a query (not repeated here, as it may hold a key); put the key into the"
                f" environment variable {self.api_key_env}"
            )
        if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", url.strip()):
            raise wrong(self.whose, "base_url", "a URL such as 'http://localhost:8000/v1'", url)
        return url.strip().rstrip("/")
