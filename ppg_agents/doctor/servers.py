"""Asks the servers named on the command line for their models, with the standard library alone.

As in a run, judges and partners are reached through the environment's proxies, rollout servers directly. Nothing that
might hold a key or password is shown: for an exception that might, only its type is.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal

from ppg_agents.nearest import did_you_mean

LIMIT = 5.0
"""Seconds to wait for a server."""
_MOST = 2**20  # bytes to read of an answer

Status = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Server:
    """A server from the command line: its purpose, its URL, and the model it should serve."""

    kind: Literal["judge", "partner", "rollout"]
    url: str
    model: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is an HTTP URL without user, password or query."""
        return self.url.startswith(("http://", "https://")) and not set(self.url) & set("@?#")

    @property
    def key(self) -> str:
        """The environment variable that holds its key."""
        return "VLLM_API_KEY" if self.kind == "rollout" else "OPENAI_API_KEY"


def ask(server: Server) -> tuple[Status, str, str]:
    """Ask a server for its models.

    Returns:
        The status, ``fault`` if a run could not use it; what it serves or what is wrong; what to do, "" for nothing.
    """
    if not server.plain:
        return "fault", "expected an http or https URL without user, password or query", f"its key goes in {server.key}"
    url = server.url.rstrip("/").removesuffix("/v1") + "/v1" if server.kind == "rollout" else server.url.rstrip("/")
    check = f"check that the URL ends in /v1, {server.key} and the proxies"
    try:
        cards = _models(url, os.environ.get(server.key, ""), proxies=server.kind != "rollout")
        names = [str(card["id"])[:200] for card in cards]
    except urllib.error.HTTPError as error:
        unauthorised = error.code in (401, 403)
        return (
            "fault",
            f"GET {url}/models: status {error.code}",
            f"set {server.key} to its key" if unauthorised else check,
        )
    except OSError as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or type(reason).__name__
        timed_out = isinstance(reason, TimeoutError)
        value = f"no answer within {LIMIT:.0f} s" if timed_out else f"cannot be reached: {why}"
        return "fault", value, "start the server, correct the URL, or check the network and its proxies"
    except Exception as error:  # a key no header can hold, a proxy that is not a URL, a page instead of a list
        return "fault", f"GET {url}/models: no list of models ({type(error).__name__})", check
    serves = f"serves {', '.join(names[:5]) or 'no named model'}{' …' if len(names) > 5 else ''}"
    if server.kind == "rollout":
        if not any(card.get("owned_by") == "vllm" for card in cards):
            return "fault", f"{serves}; expected vLLM, got another server", "rollouts need vLLM's token ids"
    elif server.model is None:
        return "note", serves, f"name the model: --{server.kind}-model {names[0] if names else 'NAME'}"
    elif names and server.model not in names:
        hint = did_you_mean(server.model, names)
        return "fault", f"{serves}; expected {server.model!r}{hint}", f"correct --{server.kind}-model"
    return "ok", serves, ""


def _models(url: str, key: str, *, proxies: bool) -> list[dict[str, object]]:
    request = urllib.request.Request(f"{url}/models")
    if key:  # not sent on if the server redirects
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(None if proxies else {}))
    with opener.open(request, timeout=LIMIT) as answer:
        return list(json.loads(answer.read(_MOST))["data"])
