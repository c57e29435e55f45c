"""Servers that a command line names, asked whether they are there and are what they should be.

All at the same time, each in a thread of its own with a limit, by the standard library alone: this must work where the
real clients' packages are missing. Like the real clients, it goes through the environment's proxies to judges and
partners and past them to rollout servers. Nothing is loaded on a server; each is asked for one token.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal
from urllib.parse import urlsplit

from ppg_agents.inspect.text import visible

LIMIT = 5.0
"""Seconds that a server may take over one answer."""
ALL = 15.0
"""Seconds that a server may take over everything it is asked."""
_MOST = 2**20  # bytes of an answer that are read
_NOWHERE = "ppg-agent-doctor"  # an adapter that is nowhere
_UPDATING = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 16, or sampling.sync=merged"
)

_TODO = "start the server, correct the URL, or see to the network and its proxies"

Kind = Literal["judge", "partner", "rollout"]


@dataclass(frozen=True)
class Named:
    """A server as it was named."""

    kind: Kind
    url: str
    model: str | None = None


@dataclass(frozen=True)
class Asked:
    """The servers that a command line names."""

    judge_urls: tuple[str, ...] = ()
    judge_model: str | None = None
    partner_urls: tuple[str, ...] = ()
    partner_model: str | None = None
    rollout_urls: tuple[str, ...] = ()

    def servers(self) -> list[Named]:
        """Return them one by one."""
        return [
            *(Named("judge", url, self.judge_model) for url in self.judge_urls),
            *(Named("partner", url, self.partner_model) for url in self.partner_urls),
            *(Named("rollout", url) for url in self.rollout_urls),
        ]

    def lacking(self) -> str:
        """Return what is said of a model without a URL to ask for it; "" when there is none."""
        for part, urls, model in (
            ("judge", self.judge_urls, self.judge_model),
            ("partner", self.partner_urls, self.partner_model),
        ):
            if model and not urls:
                return f"--{part}-model names a model that an endpoint serves; give --{part}-url too"
        return ""

    def extras(self) -> set[str]:
        """Return the extras that a run with them needs."""
        needed = {"agents", "llm"} if self.rollout_urls else set()
        return needed | ({"llm"} if self.judge_urls or self.partner_urls else set())


@dataclass(frozen=True)
class Server:
    """What a server said.

    Attributes:
        name: What it is for, and its URL.
        status: ``fault`` when a run could not use it.
        value: What it said, for people.
        todo: What to do about it.
        details: As plain JSON: ``models``, ``seconds``, ``vllm``, ``lora``, as far as they were told.
    """

    name: str
    status: Literal["ok", "note", "fault"]
    value: str
    todo: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class WrongError(Exception):
    """A server can not be used; the second argument is what to do."""


@dataclass(frozen=True)
class Answer:
    """An answer: its HTTP status, its JSON (None for anything else), its text on one line, the seconds it took."""

    status: int
    body: Any
    text: str
    seconds: float


def ask_all(servers: Sequence[Named]) -> list[Server]:
    """Ask all servers at once; return what they said, in order, after `ALL` seconds at the latest."""
    said: list[Server | None] = [None] * len(servers)

    def ask_one(index: int) -> None:
        said[index] = ask(servers[index])

    threads = [threading.Thread(target=ask_one, args=(i,), daemon=True) for i in range(len(servers))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + ALL
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no whole answer within {ALL:.0f} s"
    return [
        one or Server(title(server), "fault", late, "see to the server or the network")
        for one, server in zip(said, servers, strict=True)
    ]


def title(server: Named) -> str:
    """Return what a server is for and its URL; a URL that may hold a secret is not repeated."""
    return f"{server.kind} {server.url if plain(server.url) else '(URL not repeated)'}"


def plain(url: str) -> bool:
    """Return whether a URL holds no user, password or query."""
    return not any(sign in url for sign in "@?#") and url.isprintable()


def ask(server: Named) -> Server:
    """Ask one server everything."""
    details: dict[str, Any] = {}
    try:
        value, todo = examine(server, details)
        return Server(title(server), "note" if todo else "ok", value, todo, details)
    except WrongError as wrong:
        return Server(title(server), "fault", str(wrong.args[0]), str(wrong.args[1]), details)
    except Exception as error:  # whatever a server answers; its text may hold anything, a key too
        why = f"can not be asked: {type(error).__name__}"
        return Server(title(server), "fault", why, "see that it is an OpenAI-compatible server", details)


def examine(server: Named, details: dict[str, Any]) -> tuple[str, str]:
    """Return what there is to say and to do, and fill the details.

    Raises:
        WrongError: A run could not use the server.
    """
    variable = "VLLM_API_KEY" if server.kind == "rollout" else "OPENAI_API_KEY"
    wire = Wire(base(server), variable, proxies=server.kind != "rollout")
    cards, seconds = models(wire, server)
    names = [visible(str(card["id"]))[:200] for card in cards]
    details |= {"models": names, "seconds_list": round(seconds, 4)}
    parts = [f"serves {', '.join(names[:5]) or 'no model that it names'}{' …' if len(names) > 5 else ''}"]
    wanted = server.model
    if server.kind == "rollout":
        wanted = rollout(wire, cards, parts, details)
    elif any(card.get("owned_by") == "vllm" for card in cards):
        vllm(wire, parts, details)
    if wanted is None:
        hint = names[0] if names else "NAME"
        return f"reachable, {parts[0]}", f"name a model: --{server.kind}-model {hint}"
    if names and wanted not in names:
        near = get_close_matches(wanted, names, n=1) or names[:1]
        raise WrongError(
            f"expected the model {wanted!r}, got none of that name; {parts[0]}", f"did you mean {near[0]!r}?"
        )
    body = {"model": wanted, "max_tokens": 1, "temperature": 0.0}
    if server.kind == "rollout":
        answer = wire.call("/completions", body | {"prompt": "Hello"})
    else:
        answer = wire.call("/chat/completions", body | {"messages": [{"role": "user", "content": "Hello"}]})
    if answer.status != 200 or not isinstance(answer.body, dict) or not answer.body.get("choices"):
        raise WrongError(
            f"a call ended with status {answer.status}: {answer.text}", "check model and URL, which ends in /v1"
        )
    details["seconds"] = round(answer.seconds, 4)
    return f"{'; '.join(parts)}; one token took {answer.seconds * 1000:.0f} ms", ""


def base(server: Named) -> str:
    """Return the URL that paths are added to.

    Raises:
        WrongError: It is no plain URL.
    """
    example = "give one such as http://localhost:8000/v1"
    if not plain(server.url):
        raise WrongError(
            "expected a plain URL, got one with a user, a password or a query", f"{example}; keys: environment"
        )
    try:
        parts = urlsplit(server.url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        there = False
    if not there:
        raise WrongError("expected an http or https URL", example)
    url = server.url.rstrip("/")
    return url.removesuffix("/v1") + "/v1" if server.kind == "rollout" else url


def models(wire: Wire, server: Named) -> tuple[list[dict[str, Any]], float]:
    """Return the cards of the models that a server lists; none where a chat server has no list.

    Raises:
        WrongError: It does not answer, or wants a key.
    """
    answer = wire.call("/models")
    try:
        cards = [card for card in answer.body["data"] if isinstance(card, dict) and "id" in card]
    except (TypeError, KeyError):
        cards = []
    if answer.status in (401, 403):
        raise WrongError(
            f"refused the key (status {answer.status}); {wire.variable} is {wire.state}", f"set {wire.variable}"
        )
    if answer.status >= 500 or (not cards and server.kind == "rollout"):
        raise WrongError(f"no list of models, status {answer.status}: {answer.text}", "check that the URL ends in /v1")
    return cards, answer.seconds


def vllm(wire: Wire, parts: list[str], details: dict[str, Any]) -> None:
    """Note the server's version, if it tells it."""
    answer = wire.call("/version", root=True)
    details["vllm"] = answer.body.get("version") if isinstance(answer.body, dict) else None
    parts.append(f"vLLM {details['vllm'] or 'of unknown version'}")


def rollout(wire: Wire, cards: Sequence[Mapping[str, Any]], parts: list[str], details: dict[str, Any]) -> str:
    """Find out whether a server takes adapters while it runs; return the name of its base model.

    It is asked to load one that is nowhere. Without ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` there is no such path (404);
    without ``--enable-lora`` the engine says so; else it says that there is nothing to load.

    Raises:
        WrongError: It is no vLLM server, or takes no adapters.
    """
    bases = [card for card in cards if not card.get("parent")]
    if not any(card.get("owned_by") == "vllm" for card in bases):
        raise WrongError(
            f"expected a vLLM server, got another one; {parts[0]}", "rollouts need vLLM, which returns token ids"
        )
    vllm(wire, parts, details)
    body = {"lora_name": _NOWHERE, "lora_path": f"/nonexistent/{_NOWHERE}"}
    answer = wire.call("/load_lora_adapter", body)
    path = wire.call("/load_lora_adapter", {"lora_name": "", "lora_path": ""}).status != 404
    enabled = path and "not enabled" not in answer.text.lower()
    details["lora"] = {"updating": path, "enabled": enabled}
    if not path:
        raise WrongError(f"{'; '.join(parts)}; adapters can not be loaded while it runs", _UPDATING)
    if not enabled:
        raise WrongError(f"{'; '.join(parts)}; LoRA is not enabled", _UPDATING)
    parts.append("takes LoRA adapters")
    return str(bases[0]["id"])


class Wire:
    """Calls to one server."""

    def __init__(self, url: str, variable: str, *, proxies: bool) -> None:
        """Take the key out of the environment.

        Args:
            url: Ends in ``/v1``, as a rule.
            variable: Name of the environment variable with the key.
            proxies: Whether the environment's proxies are used.

        Raises:
            WrongError: The key can not be sent.
        """
        self.url, self.variable = url, variable
        self._key = os.environ.get(variable, "")
        self.state = "set" if self._key else "unset"
        if wrong := _unsendable(self._key):
            raise WrongError(f"the key in {variable} holds {wrong}", f"set {variable} to the key alone")
        self._proxy = _proxy_variable(urlsplit(url).scheme) if proxies else None
        handler = urllib.request.ProxyHandler(None if proxies else {})
        self._opener = urllib.request.build_opener(handler)

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, root: bool = False) -> Answer:
        """Return the answer to a GET, or with a body to a POST.

        Args:
            path: Added to the URL.
            body: Sent as JSON.
            root: Leave the URL's ``/v1`` out.

        Raises:
            WrongError: No answer.
        """
        request = urllib.request.Request(
            (self.url.removesuffix("/v1") if root else self.url) + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Accept": "application/json"},
        )
        if self._key:  # not sent on to where the server may redirect to
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        began = time.monotonic()
        try:
            try:
                with self._opener.open(request, timeout=LIMIT) as response:
                    status, raw = int(response.status), response.read(_MOST)
            except urllib.error.HTTPError as error:
                with error:
                    status, raw = error.code, error.read(_MOST)
        except OSError as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = isinstance(reason, TimeoutError)
            why = f"no answer within {LIMIT:.0f} s" if late else f"can not be reached: {self._clean(str(reason))}"
            raise WrongError(why, _TODO) from None
        except (http.client.HTTPException, ValueError) as error:  # its text may hold a key or a password: not repeated
            if not isinstance(error, (http.client.InvalidURL, ValueError)):
                raise WrongError(f"gave no HTTP answer: {type(error).__name__}", _TODO) from None
            if self._proxy and self.url.isascii() and " " not in self.url:  # only the proxy's URL is left
                todo = f"correct {self._proxy}: expected a URL such as http://proxy:3128"
                raise WrongError(f"can not be reached: the proxy URL in {self._proxy} can not be read", todo) from None
            raise WrongError("can not be reached: the URL can not be read", _TODO) from None
        text = raw.decode(errors="replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        return Answer(status, value, self._clean(_message(value, text)), time.monotonic() - began)

    def _clean(self, text: str) -> str:
        """Return a text on one short line, printable and without the key."""
        if key := self._key.strip():
            for written in (key, repr(key)[1:-1], json.dumps(key)[1:-1]):
                text = text.replace(written, "[key]")
        text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
        return text if len(text) <= 160 else text[:160] + "…"


def _message(value: Any, text: str) -> str:
    """Return what an error answer says."""
    found = value.get("error", value) if isinstance(value, dict) else text
    return str(found.get("message") or found.get("detail") or found) if isinstance(found, dict) else str(found)


def _unsendable(key: str) -> str:
    """Return what keeps a key from being sent in a header; nothing, as a rule."""
    if "\r" in key or "\n" in key:
        return "a line break"
    if any(sign < " " or sign == "\x7f" for sign in key):
        return "a control character"
    return "" if all(sign <= "\xff" for sign in key) else "a character that no header can hold"


def _proxy_variable(scheme: str) -> str | None:
    """Return the name of the environment variable with the proxy for a scheme, if there is one."""
    name = f"{scheme}_proxy".lower()
    if scheme.lower() not in urllib.request.getproxies():
        return None
    return next((one for one in (name, name.upper()) if os.environ.get(one)), f"{name} or the system's settings")
