"""Cached answers: what makes two requests the same, what is stored, who shares it, and what breaks it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest

from ppg_gym.llm import background
from ppg_gym.llm import cache as cache_module
from ppg_gym.llm.chat import Answer, CacheError, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.loopback import Loopback, Reply
from ppg_gym.llm.settings import ClientSettings

Make = Callable[..., ChatClient]
PLAIN = Request(({"role": "user", "content": "Who are you?"},))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes a client of a server, with a cache in the test's folder; all are closed."""
    made: list[ChatClient] = []

    def make(server: Loopback, cache: bool | str = str(tmp_path / "answers"), **options: Any) -> ChatClient:
        settings = ClientSettings((server.url,), "loopback", cache=cache, whose="judge_options", **options)
        made.append(ChatClient(settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(chat: ChatClient, *requests: Request) -> list[Answer]:
    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(chat.ask(request) for request in requests))

    return background.run(all_at_once())


def constantly(text: str) -> Callable[[dict[str, Any]], str]:
    return lambda body: text


def test_a_hit_costs_no_call_and_outlives_the_client_and_the_server(make: Make) -> None:
    with Loopback(lambda body: "I am Anna.") as server:
        first = ask(make(server), PLAIN)[0]
    chat = make(server)
    assert ask(chat, PLAIN) == [dataclasses.replace(first, cached=True)]
    assert (chat.counts.calls, chat.counts.cached) == (0, 1)
    assert server.looks == len(server.requests) == 1


def test_what_shapes_the_answer_is_in_the_key_and_nothing_else(make: Make) -> None:
    variants = [
        PLAIN,
        dataclasses.replace(PLAIN, messages=({"role": "system", "content": "Who are you?"},)),
        dataclasses.replace(PLAIN, temperature=0.5),
        dataclasses.replace(PLAIN, max_tokens=7),
        dataclasses.replace(PLAIN, seed=0),
        dataclasses.replace(PLAIN, schema={"type": "object"}),
        dataclasses.replace(PLAIN, sample=1),
    ]
    with Loopback(lambda body: "fine") as one, Loopback(lambda body: "fine", model=["loopback", "other"]) as two:
        chat = make(one, identity="ours")
        assert not any(answer.cached for answer in ask(chat, *variants))
        assert len(one.requests) == len(variants) + 1  # and the probe for a schema
        same = dataclasses.replace(PLAIN, messages=({"content": "Who are you?", "role": "user"},))
        elsewhere = make(two, timeout=9.0, concurrency=2, attempts=1, identity="ours")
        assert all(answer.cached for answer in ask(elsewhere, *variants[:5], *variants[6:], same))
        other = ChatClient(dataclasses.replace(elsewhere.settings, model="other"))
        assert not ask(other, PLAIN)[0].cached
        other.close()


def test_another_server_under_the_same_name_is_asked_and_a_server_that_moved_is_not(make: Make) -> None:
    with Loopback(lambda body: "one") as one, Loopback(lambda body: "two") as two, Loopback(echo) as third:
        assert [ask(make(server), PLAIN)[0].text for server in (one, two)] == ["one", "two"]
        moved = make(third, identity=one.url)
        assert ask(moved, PLAIN)[0] == Answer("ok", "one", cached=True, finish="stop")
        assert ask(make(third, extra_body={"top_k": 1}), PLAIN)[0].text == "third"
        assert not ask(make(third, extra_body={"top_k": 2}), PLAIN)[0].cached
    several = [ClientSettings(urls, "m").servers for urls in ((one.url, two.url), (two.url, one.url))]
    assert several[0] == several[1] == " ".join(sorted((one.url, two.url)))


def test_an_answer_that_was_cut_off_is_kept_for_the_room_that_it_had(make: Make) -> None:
    long = Reply(text="word " * 400)
    with Loopback(lambda body: long) as server:
        first = ask(make(server, headroom=50), PLAIN)[0]
        assert first.finish == "length"
        assert ask(make(server, headroom=50), PLAIN)[0].cached
        paid = len(server.requests)
        more = ask(make(server, headroom=200), PLAIN)[0]
        assert (more.finish, more.cached) == ("stop", False)
        assert len(server.requests) == paid + 2


def echo(body: dict[str, Any]) -> str:
    return "third"


def test_a_schema_that_was_sent_is_another_question(make: Make) -> None:
    asked = dataclasses.replace(PLAIN, schema={"type": "object"})
    for honoured, text in ((True, '{"snow_is_white": true}'), (False, "prose")):
        with Loopback(constantly(text)) as server:
            chat = make(server)
            assert not ask(chat, asked)[0].cached
            assert background.run(chat.structured()) is honoured
            again = make(server)
            assert background.run(again.structured()) is honoured  # from the folder
            assert ask(again, asked)[0].cached
            assert again.counts.calls == 0


@pytest.mark.parametrize("reply", [Reply(400), Reply(text=" "), Reply(close=True)])
def test_only_answers_with_a_text_are_stored(make: Make, reply: Reply) -> None:
    with Loopback(lambda body: reply) as server:
        chat = make(server, attempts=1)
        assert [ask(chat, PLAIN)[0].status for _ in range(2)] == ["error"] * 2
    assert len(server.requests) == 2


def test_identical_requests_under_way_cost_one_call(make: Make) -> None:
    with Loopback(lambda body: "once", latency=0.02) as server:
        chat = make(server)
        answers = ask(chat, *[PLAIN] * 10)
        assert sorted(answer.cached for answer in answers) == [False] + [True] * 9
        assert {answer.text for answer in answers} == {"once"}
        assert (chat.counts.calls, chat.counts.cached) == (1, 9)
        uncached = make(server, cache=False)
        ask(uncached, *[PLAIN] * 3)
        assert uncached.counts.calls == 3


def test_when_the_first_asker_is_cancelled_the_next_one_asks(make: Make) -> None:
    async def race(chat: ChatClient) -> Answer:
        first, second = (asyncio.ensure_future(chat.ask(PLAIN)) for _ in range(2))
        while not server.requests:
            await asyncio.sleep(0.005)
        first.cancel()
        answer = await second
        assert first.cancelled()
        return answer

    with Loopback(lambda body: "still", latency=0.1) as server:
        chat = make(server)
        assert background.run(race(chat)) == Answer("ok", "still", finish="stop")
        assert chat.counts.calls == 2
        assert chat.counts.failures == 1


def test_processes_share_a_folder(make: Make, tmp_path: Path) -> None:
    code = """
import sys
from ppg_gym.llm import background
from ppg_gym.llm.chat import Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.settings import ClientSettings
chat = ChatClient(ClientSettings((sys.argv[1],), "loopback", cache=sys.argv[2]))
for n in range(40):
    background.run(chat.ask(Request(({"role": "user", "content": f"{n}"},))))
chat.close()
"""
    folder = str(tmp_path / "answers")
    with Loopback(lambda body: body["messages"][0]["content"]) as server:
        command = [sys.executable, "-W", "error", "-c", code, server.url, folder]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=60)[1] for process in running] == ["", ""]
        chat = make(server)
        answers = ask(chat, *(Request(({"role": "user", "content": f"{n}"},)) for n in range(40)))
    assert [answer.text for answer in answers] == [f"{n}" for n in range(40)]
    assert chat.counts.calls == 0


@pytest.mark.parametrize("kind", ["a file", "not a database", "not writable"])
def test_a_broken_folder_is_named_with_the_way_out(make: Make, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "broken"
    if kind == "a file":
        folder.write_text("x")
    elif kind == "not a database":
        folder.mkdir()
        (folder / "cache.db").write_text("no database " * 100)
    else:
        folder = Path("/proc/answers")
    with Loopback(lambda body: "x") as server, pytest.raises(CacheError, match=r"\['cache'\] to false") as caught:
        make(server, cache=str(folder))
    assert repr(str(folder)) in str(caught.value)


def test_a_pickle_in_the_folder_is_never_loaded(make: Make, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    with Loopback(lambda body: "x") as server:
        chat = make(server)
        ask(chat, PLAIN)
        chat.close()
        with diskcache.Cache(str(tmp_path / "answers"), disk=diskcache.JSONDisk) as raw:
            poison = (diskcache.core.MODE_PICKLE, pickle.dumps(Trap()))
            raw._sql("UPDATE Cache SET mode = ?, value = ?", poison)
        with pytest.raises(CacheError, match="got a pickle"):
            ask(make(server), PLAIN)
    assert not (tmp_path / "sprung").exists()


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Make) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with Loopback(lambda body: "x") as server:
        ask(make(server, cache=True), PLAIN)
    assert (tmp_path / "xdg" / "ppg-gym" / "answers" / "cache.db").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_module.default_folder().is_relative_to(Path.home())
