"""A chat server on this machine, for tests, benchmarks and trying things offline.

It speaks as much of the OpenAI protocol as the client uses: ``GET /v1/models`` and ``POST /v1/chat/completions`` over
HTTP/1.1 with keep-alive. A function makes up the answers, and the faults. ``python -m ppg_gym.llm.loopback --latency
0.1`` serves one constant text from its own process and prints its URL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


@dataclass(frozen=True)
class Reply:
    """An answer that is more than a text: an error, a header, a delay.

    Attributes:
        status: The HTTP status; at 400 and above, ``text`` is the error's message.
        text: The assistant's text.
        thoughts: What the model thinks first, as a reasoning parser tells it; counts towards the limit on tokens.
        finish: The finish reason of an answer that was not cut off.
        message: Further keys of the assistant's message, such as a ``content`` in parts.
        error: Further keys of the error, such as ``code`` and ``param``.
        headers: Further headers.
        body: The raw body, instead of the usual JSON.
        hang: Seconds to wait first, on top of the server's latency.
        close: Close the connection instead of answering.
        drip: Seconds between one byte of the body and the next.
    """

    status: int = 200
    text: str = ""
    thoughts: str = ""
    finish: str = "stop"
    message: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hang: float = 0.0
    close: bool = False
    drip: float = 0.0


class _Wire(NamedTuple):
    """A response as bytes, and how to send it."""

    head: bytes
    body: bytes
    wait: float = 0.0
    close: bool = False
    drip: float = 0.0


_Respond = Callable[[bytes, bytes, bytes], _Wire]  # request line, other header lines, body -> response


class Loopback:
    """A chat server on 127.0.0.1 in its own thread; a context manager.

    Args:
        answer: Gives the assistant's text, or a Reply, for a request's JSON body. Called in the server's thread; an
            exception becomes an answer with status 500.
        latency: Seconds from request to answer.
        model: The models that ``/v1/models`` lists; with None there is no such path.
        key: Requests without this key are answered with 401.
        port: 0 for any free port.
        refuse: Parameters that are refused by name with 400, as services do with ``max_tokens``; or the only value that
            a parameter may have, such as ``{"temperature": 1}``.

    Attributes:
        url: ``http://127.0.0.1:PORT/v1``, once entered.
        requests: The JSON bodies of the chat requests so far, in order of arrival.
        looks: How often the list of models was asked for.
        peak: The most chat requests ever in flight at once.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | Reply],
        latency: float = 0.0,
        model: str | Sequence[str] | None = "loopback",
        key: str | None = None,
        port: int = 0,
        refuse: Collection[str] | Mapping[str, Any] = (),
    ) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.looks = 0
        self.peak = 0
        self._answer = answer
        self._latency = latency
        self._models = [model] if isinstance(model, str) else model
        self._key, self._port = key, port
        self._refuse = dict(refuse) if isinstance(refuse, Mapping) else dict.fromkeys(refuse)
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="loopback", daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> Loopback:
        self._pid = os.getpid()
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        if os.getpid() != self._pid:  # a forked child leaves the parent's server alone
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        made = self._loop.create_server(
            lambda: _Connection(self._loop, self._respond, self._connections), "127.0.0.1", self._port, backlog=1024
        )
        server = self._loop.run_until_complete(made)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for connection in list(self._connections):
            connection.drop()
        self._loop.run_until_complete(asyncio.sleep(0))

    def _respond(self, line: bytes, headers: bytes, body: bytes) -> _Wire:
        if self._key is not None and f"Bearer {self._key}".encode() not in headers:
            return _wire(Reply(401, "wrong key"), "")
        self.looks += line.startswith(b"GET /v1/models ")
        if line.startswith(b"GET /v1/models ") and self._models is not None:
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "loopback"} for name in self._models]
            return _wire(Reply(body=json.dumps({"object": "list", "data": listed}).encode()), "")
        if not line.startswith(b"POST /v1/chat/completions "):
            return _wire(Reply(404, "no such path"), "")
        try:
            asked = json.loads(body)
        except ValueError:
            return _wire(Reply(400, "expected a JSON body"), "")
        self.requests.append(asked)
        self.peak = max(self.peak, sum(connection.busy for connection in self._connections))
        for name, only in self._refuse.items():
            if name in asked and (only is None or asked[name] != only):
                return _wire(_refusal(name, only), "")
        try:
            answer = self._answer(asked)
        except Exception as error:
            answer = Reply(500, f"the answering function raised {error!r}")
        reply = Reply(text=answer) if isinstance(answer, str) else answer
        words = sum(len(str(message.get("content")).split()) for message in asked.get("messages", ()))
        limit = asked.get("max_completion_tokens", asked.get("max_tokens"))
        return _wire(reply, str(asked.get("model", "")), words, self._latency, limit)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; answers its requests one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop, respond: _Respond, connections: set[_Connection]) -> None:
        self.busy = False
        self._loop = loop
        self._respond = respond
        self._connections = connections
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._timer:
            self._timer.cancel()

    def drop(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if self.busy or end < 0:
            return
        line_end = self._buffer.find(b"\r\n")
        headers = self._buffer[line_end:end]
        at = headers.lower().find(b"\r\ncontent-length:")
        length = int(headers[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        start, stop = end + 4, end + 4 + length
        if len(self._buffer) < stop:
            return
        self.busy = True
        wire = self._respond(self._buffer[:line_end], headers, self._buffer[start:stop])
        self._buffer = self._buffer[stop:]
        if wire.wait > 0:
            self._timer = self._loop.call_later(wire.wait, self._send, wire)
        else:
            self._send(wire)

    def _send(self, wire: _Wire) -> None:
        self._timer = None
        if wire.close:
            self._transport.abort()
        elif wire.drip > 0 and wire.body:
            self._transport.write(wire.head + wire.body[:1])
            rest = wire._replace(head=b"", body=wire.body[1:])
            self._timer = self._loop.call_later(wire.drip, self._send, rest)
        else:
            self._transport.write(wire.head + wire.body)
            self.busy = False
            if self._buffer:
                self._next()


def _refusal(name: str, only: Any) -> Reply:
    """Return the refusal of a parameter, in OpenAI's words."""
    if only is not None:
        text = f"Unsupported value: '{name}' is not supported with this model. Only {only} is supported."
        return Reply(400, text, error={"param": name, "code": "unsupported_value"})
    instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
    text = f"Unsupported parameter: '{name}' is not supported with this model.{instead}"
    return Reply(400, text, error={"param": name, "code": "unsupported_parameter"})


def _wire(reply: Reply, model: str, words: int = 0, latency: float = 0.0, limit: int | None = None) -> _Wire:
    """Return a response; a word counts as a token, and an answer of more than ``limit`` is cut off."""
    if reply.body is not None:
        body = reply.body
    elif reply.status >= 400:
        error = {"message": reply.text, "type": "loopback", "code": reply.status, **reply.error}
        body = json.dumps({"error": error}).encode()
    else:
        thoughts, said = reply.thoughts.split(), reply.text.split()
        written, cut = len(thoughts) + len(said), limit is not None and len(thoughts) + len(said) > limit
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, **reply.message}
        if reply.thoughts:
            message["reasoning_content"] = reply.thoughts
        if limit is not None and cut:
            written, left = limit, limit - len(thoughts)
            message["content"] = " ".join(said[:left]) if left > 0 else None
        completion = {
            "id": "loopback",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "finish_reason": "length" if cut else reply.finish, "message": message}],
            "usage": {"prompt_tokens": words, "completion_tokens": written, "total_tokens": words + written},
        }
        body = json.dumps(completion).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Other')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return _Wire(head, body, latency + reply.hang, reply.close, reply.drip)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve one constant text until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m ppg_gym.llm.loopback", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds from request to answer")
    parser.add_argument("--text", default='{"score": 1.0}', help="the assistant's text")
    parser.add_argument("--model", default="loopback", help="the name of the model")
    parser.add_argument("--refuse", action="append", default=[], metavar="PARAMETER", help="answer it with a 400")
    given = parser.parse_args(arguments)

    def answer(body: dict[str, Any]) -> str:
        server.requests.clear()  # nobody looks at them here, and a long run would fill the memory
        return str(given.text)

    with Loopback(answer, given.latency, given.model, port=given.port, refuse=given.refuse) as server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
