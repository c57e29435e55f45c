"""Thousands of requests against a server of which every third call goes wrong: nothing is lost, nothing hangs."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from typing import Any

import pytest

from ppg_gym.llm import background, client, endpoints
from ppg_gym.llm.chat import Answer, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.loopback import Loopback, Reply
from ppg_gym.llm.settings import ClientSettings

ASKS = 2000
TIMEOUT = 1.0
FAULTS = {
    "500": Reply(500, "out of order"),
    "429": Reply(429, "too fast", headers={"Retry-After": "0.002"}),
    "hang": Reply(hang=60.0),
    "cut": Reply(body=b'{"choices": [{"index": 0, "message": {"role": "assistant", "con'),
    "schema": Reply(body=b'{"object": "error", "message": "what?"}'),
    "nan": Reply(body=b'{"choices": [{"message": {"content": "0.5"}, "score": NaN}]}'),
    "empty": Reply(text=""),
    "closed": Reply(close=True),
}
REFUSAL = Reply(body=json.dumps({"choices": [{"message": {"content": None, "refusal": "No."}}]}).encode())


class FaultyServer:
    """Answers by the question, and spoils 30% of the calls; what it does depends on the question and the attempt."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.given: collections.Counter[str] = collections.Counter()
        self.attempts: collections.Counter[str] = collections.Counter()

    def __call__(self, body: dict[str, Any]) -> str | Reply:
        asked = body["messages"][-1]["content"]
        self.attempts[asked] += 1
        rng = random.Random(f"{self.seed} {asked} {self.attempts[asked]}")
        if rng.random() < 0.3:
            # A hang holds its place for the whole timeout: less often, so that the test ends soon.
            kind = rng.choices(list(FAULTS), [1 if kind == "hang" else 3 for kind in FAULTS])[0]
        else:
            kind = "refusal" if rng.random() < 0.01 else "text"
        self.given[kind] += 1
        return {**FAULTS, "refusal": REFUSAL}.get(kind, f"answer to {asked}")


def test_every_request_ends_in_its_text_or_a_typed_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(endpoints, "FIRST_REST", 0.002)
    monkeypatch.setattr(endpoints, "LONGEST_REST", 0.02)

    async def everything(chat: ChatClient) -> tuple[list[Answer], int]:
        asks = (chat.ask(Request(({"role": "user", "content": f"{n}"},))) for n in range(ASKS))
        answers = await asyncio.gather(*asks)
        return answers, len(asyncio.all_tasks())

    faults = FaultyServer(seed=7)
    with Loopback(faults) as server:
        settings = ClientSettings((server.url,), "loopback", TIMEOUT, attempts=5, concurrency=48, cache=False)
        chat = ChatClient(settings)
        began = time.monotonic()
        answers, tasks = background.run(everything(chat))
        spent = time.monotonic() - began
        chat.close()

    by_status = collections.Counter(answer.status for answer in answers)
    assert all(answer.text == f"answer to {n}" for n, answer in enumerate(answers) if answer.status == "ok")
    assert all(answer.reason and not answer.text for answer in answers if answer.status != "ok")
    assert by_status["ok"] >= 0.98 * ASKS
    assert by_status["refused"] == faults.given["refusal"] > 0
    assert sum(by_status.values()) == ASKS

    counts = chat.counts
    assert set(faults.given) == {*FAULTS, "refusal", "text"}
    assert counts.calls >= len(server.requests) == sum(faults.given.values())  # some may time out on their way
    assert counts.calls == by_status["ok"] + counts.failures
    assert counts.retries == counts.calls - ASKS
    assert max(faults.attempts.values()) <= 5
    failed = [answer.reason for answer in answers if answer.status in ("error", "timeout")]
    assert all(reason.endswith("(5 calls)") for reason in failed)  # all of these can be repeated, and all were
    assert tasks == 1
    assert spent < 30.0
