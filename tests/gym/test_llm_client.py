"""The chat client against a loopback server: typed answers, spreading and resting, budget, keys, cancellation, exit."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from ppg_gym.llm import background, client, endpoints
from ppg_gym.llm.chat import Answer, BudgetError, EndpointError, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.loopback import Loopback, Reply
from ppg_gym.llm.settings import ClientSettings

Make = Callable[..., ChatClient]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that makes a client of some servers or URLs; pauses are short, and all are closed."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    monkeypatch.setattr(endpoints, "FIRST_REST", 0.01)
    made: list[ChatClient] = []

    def make(*servers: Loopback | str, **options: Any) -> ChatClient:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        given = {"base_url": urls, "model": "loopback", "cache": False, "timeout": 5.0, **options}
        made.append(ChatClient(ClientSettings.take(given, "judge_options")[0]))
        return made[-1]

    yield make
    for one in made:
        one.close()


def question(text: str = "Who are you?", **rest: Any) -> Request:
    return Request(({"role": "user", "content": text},), **rest)


def ask(chat: ChatClient, *texts: str) -> list[Answer]:
    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(chat.ask(question(text)) for text in texts))

    return background.run(all_at_once())


def echo(body: dict[str, Any]) -> str:
    return f"You said: {body['messages'][-1]['content']}"


def completion(**choice: Any) -> Reply:
    return Reply(body=json.dumps({"choices": [choice]}).encode())


def test_a_request_reaches_the_model_as_it_was_asked(make: Make) -> None:
    with Loopback(echo) as server:
        chat = make(server)
        answer = background.run(chat.ask(question("hé \ud800?", temperature=0.5, max_tokens=7, seed=3, sample=9)))
    assert answer == Answer("ok", "You said: hé \ud800?", finish="stop")
    assert server.requests == [
        {
            "model": "loopback",
            "messages": [{"role": "user", "content": "hé \ud800?"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "seed": 3,
        }
    ]
    assert (chat.counts.calls, chat.counts.prompt_tokens, chat.counts.completion_tokens) == (1, 2, 4)


@pytest.mark.parametrize(
    ("reply", "status", "calls", "said"),
    [
        (Reply(hang=9.0), "timeout", 2, "no answer within 0.2 s"),
        (Reply(text="slow", drip=0.01), "timeout", 2, "no answer within 0.2 s"),
        (Reply(close=True), "error", 2, "cannot be reached"),
        (Reply(500, "boom"), "error", 2, "status 500: boom"),
        (Reply(429, "slow down"), "error", 2, "status 429: slow down"),
        (Reply(body=b'{"choices": [{"mess'), "error", 2, "malformed"),
        (Reply(body=b'{"choices": []}'), "error", 2, "malformed"),
        (Reply(body=b"[]"), "error", 2, "malformed"),
        (Reply(body=b"[" * 100_000), "error", 2, "malformed"),
        (Reply(body=b'{"choices": [{"message": {"content": "x"}, "logprobs": NaN}]}'), "error", 2, "NaN"),
        (completion(message={"content": 5}), "error", 1, "expected a text, a list of parts or null as content"),
        (completion(message={"content": None}), "error", 2, "empty text"),
        (Reply(text="  \n"), "error", 2, "empty text"),
        (completion(message={"content": None, "refusal": "I can't."}), "refused", 1, "I can't."),
        (completion(message={"content": "x"}, finish_reason="content_filter"), "refused", 1, "content_filter"),
        (Reply(400, "no such parameter"), "error", 1, "no such parameter"),
        (Reply(404, "no model"), "error", 1, "judge_options['base_url'] ends like '/v1'"),
        (Reply(403, "no"), "error", 1, "OPENAI_API_KEY"),
    ],
)
def test_every_failure_is_a_typed_answer(make: Make, reply: Reply, status: str, calls: int, said: str) -> None:
    with Loopback(lambda body: reply) as server:
        chat = make(server, attempts=2, timeout=0.2)
        (answer,) = ask(chat, "x")
    assert (answer.status, answer.text) == (status, "")
    assert said in answer.reason
    assert (chat.counts.calls, chat.counts.failures, chat.counts.retries) == (calls, calls, calls - 1)
    assert len(server.requests) == calls


def test_the_least_loaded_endpoint_is_next_and_none_is_overloaded(make: Make) -> None:
    with Loopback(echo, latency=0.05) as one, Loopback(echo, latency=0.05) as two:
        chat = make(one, two, concurrency=8)
        answers = ask(chat, *map(str, range(32)))
    assert [answer.text for answer in answers] == [f"You said: {n}" for n in range(32)]
    assert len(one.requests) + len(two.requests) == 32
    assert abs(len(one.requests) - len(two.requests)) <= 4
    assert one.peak == two.peak == 8


def test_an_endpoint_in_trouble_rests_while_the_others_work(make: Make) -> None:
    with Loopback(lambda body: Reply(500, "boom")) as broken, Loopback(echo, latency=0.005) as well:
        chat = make(broken, well, concurrency=4)
        answers = ask(chat, *map(str, range(60)))
    assert {answer.status for answer in answers} == {"ok"}
    assert len(well.requests) == 60
    assert 4 <= len(broken.requests) <= 14  # the first four together, then one at a time after rests that double
    assert chat.counts.failures == chat.counts.retries == len(broken.requests)


def test_when_all_rest_the_first_to_return_is_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_REST", 0.1)
    replies = [Reply(500), Reply(close=True)]
    with Loopback(lambda body: replies.pop() if replies else "back") as server:
        chat = make(server)
        began = time.monotonic()
        answers = ask(chat, "x") + ask(chat, "y")
    assert [answer.text for answer in answers] == ["back", "back"]
    assert time.monotonic() - began >= 0.1 + 0.2
    assert chat.counts.calls == 4


def test_retry_after_is_honoured_by_every_call_to_that_endpoint(make: Make) -> None:
    seen: list[float] = []

    def answer(body: dict[str, Any]) -> str | Reply:
        seen.append(time.monotonic())
        return Reply(429, headers={"Retry-After": "0.2"}) if len(seen) == 1 else "fine"

    with Loopback(answer) as server:
        chat = make(server, concurrency=1)
        assert [answer.status for answer in ask(chat, "x", "y")] == ["ok", "ok"]
    assert seen[1] - seen[0] >= 0.2


def test_retry_after_is_seconds_or_a_date_and_has_an_end() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    read = endpoints._retry_after
    assert read("3") == 3.0
    assert 18.0 <= (read(soon) or 0.0) <= 20.0
    assert read("Wed, 21 Oct 2015 07:28:00 GMT") == read("-1") == 0.0
    assert read("1e9") == read("Fri, 31 Dec 2100 23:59:59 GMT") == endpoints.LONGEST_RETRY_AFTER
    assert read("nan") is read("soon") is read("") is None


def test_the_budget_stops_before_the_next_call(make: Make, tmp_path: Path) -> None:
    with Loopback(echo, latency=0.02) as server:
        chat = make(server, max_calls=3, cache=str(tmp_path))

        async def eight() -> list[Answer | BaseException]:
            return await asyncio.gather(*(chat.ask(question(str(n))) for n in range(8)), return_exceptions=True)

        outcomes = background.run(eight())
        with pytest.raises(BudgetError, match=r"3 by judge_options\['max_calls'\].*3 calls made.*resume.*cache"):
            ask(chat, "one more")
        assert ask(chat, "0")[0].cached
        assert ask(make(server, max_calls=4, cache=str(tmp_path)), *map(str, range(7)))[6].text == "You said: 6"
        small = make(server, max_total_tokens=5)
        ask(small, "four words of mine")
        with pytest.raises(BudgetError, match="max_total_tokens"):
            ask(small, "x")
    assert [isinstance(outcome, BudgetError) for outcome in outcomes] == [False] * 3 + [True] * 5
    assert len(server.requests) == 3 + 4 + 1


def test_a_budget_of_tokens_needs_a_server_that_reports_them(make: Make) -> None:
    with Loopback(lambda body: completion(message={"content": "x"})) as server:
        chat = make(server, max_total_tokens=1000)
        assert ask(chat, "x")[0].status == "ok"
        with pytest.raises(BudgetError, match="without usage; set max_calls"):
            ask(chat, "y")


def test_the_first_look_says_what_is_wrong(make: Make) -> None:
    with Loopback(echo) as gone:
        pass
    with Loopback(echo, model=["qwen-8b", "qwen-32b"], key="right") as server, pytest.MonkeyPatch.context() as patch:
        with pytest.raises(EndpointError) as unreachable:
            ask(make(gone, "http://127.0.0.1:1/v1"), "x")
        with pytest.raises(EndpointError, match=r"variable OPENAI_KEY is not set"):
            ask(make(server, api_key_env="OPENAI_KEY"), "x")
        patch.setenv("OPENAI_KEY", "right")
        with pytest.raises(EndpointError, match="did you mean 'qwen-8b'"):
            ask(make(server, model="qwen-8", api_key_env="OPENAI_KEY"), "x")
        working = make(gone, server, model="qwen-8b", api_key_env="OPENAI_KEY")
        assert ask(working, "x")[0].text == "You said: x"
    for part in (gone.url, "http://127.0.0.1:1/v1", "within 0.", "Connect", "judge_options['base_url']"):
        assert part in str(unreachable.value)


def test_the_first_look_is_shared_and_needs_no_list_of_models(make: Make) -> None:
    with Loopback(echo, model=None, latency=0.01) as server:
        answers = ask(make(server), *map(str, range(20)))
    assert {answer.status for answer in answers} == {"ok"}
    assert server.looks == 1


def test_a_later_outage_is_a_failed_answer(make: Make) -> None:
    with Loopback(echo) as server:
        chat = make(server, attempts=3)
        assert ask(chat, "x")[0].status == "ok"
    (answer,) = ask(chat, "y")
    assert answer.status == "error"
    assert "cannot be reached" in answer.reason
    assert "(3 calls)" in answer.reason


HTML = Reply(body=b"<!doctype html>\n<p>Welcome</p>", headers={"content-type": "text/html"})


def test_what_never_spoke_json_is_no_chat_server_and_stops_at_once(make: Make) -> None:
    said = r"got '<!doctype html> <p>Welcome</p>'; check judge_options\['base_url'\], which usually ends in /v1$"
    with Loopback(lambda body: HTML, model=None) as server:
        with pytest.raises(EndpointError, match=f"^{server.url}: expected JSON, {said}"):
            ask(make(server), "x", "y")
        with pytest.raises(EndpointError):
            background.run(make(server).structured())
    assert 2 <= len(server.requests) <= 3, "none is asked again"


def test_an_endpoint_that_has_spoken_json_may_stumble(make: Make) -> None:
    replies = ["well", HTML, HTML]
    with Loopback(lambda body: replies.pop(0)) as server:
        chat = make(server, attempts=2)
        assert ask(chat, "x")[0].status == "ok"
        background.run(chat.aclose())  # other connections, the same server
        (answer,) = ask(chat, "y")
    assert (answer.status, answer.text) == ("error", "")
    assert "expected JSON, got" in answer.reason
    assert "(2 calls)" in answer.reason


def test_a_schema_is_sent_only_to_a_server_that_honours_it(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ppg_gym.llm")

    def honours(body: dict[str, Any]) -> str:
        return '{"snow_is_white": true}' if "response_format" in body else "prose"

    def without(body: dict[str, Any]) -> str | Reply:
        return Reply(400, "what?") if "response_format" in body else "prose"

    asked = [question(schema={"type": "object"}), question("y", schema={"type": "object"})]
    for answer, honoured in ((honours, True), (echo, False), (without, False)):
        with Loopback(answer) as server:
            chat = make(server)

            async def both(chat: ChatClient = chat) -> list[Answer]:
                return await asyncio.gather(*(chat.ask(one) for one in asked))

            background.run(both())
            assert background.run(chat.structured()) is honoured
            probe, *rest = server.requests
            rest = rest[-2:]  # a refusal is followed by the same question without a schema
            assert probe["response_format"]["json_schema"]["strict"] is True
            assert [("response_format" in body) for body in rest] == [honoured] * 2
            assert ("is sent" if honoured else "is not sent") in caplog.messages[-1]


def test_a_probe_without_an_answer_decides_nothing_and_is_told_of_once(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    replies = [Reply(500, "boom")] * 4
    with Loopback(lambda body: replies.pop() if replies else '{"snow_is_white": false}') as server:
        chat = make(server, attempts=2)
        assert background.run(chat.structured()) is False
        assert background.run(chat.structured()) is False
        assert background.run(chat.structured()) is True
    assert sum("could not try a JSON schema" in message for message in caplog.messages) == 1


def test_the_key_is_nowhere(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "sk-Secret-0123456789"
    monkeypatch.setenv("SOME_KEY", secret)
    caplog.set_level(logging.DEBUG)

    def answer(body: dict[str, Any]) -> str | Reply:
        kind = body["messages"][-1]["content"]
        refusal = completion(message={"content": None, "refusal": f"not with {secret}"})
        told = {"bad": Reply(400, f"bad key {secret}"), "raw": Reply(body=secret.encode()), "no": refusal}
        return told.get(kind, "ok")

    with Loopback(answer, key=secret) as server, Loopback(echo, key="another") as strict:
        chat = make(server, api_key_env="SOME_KEY", cache=str(tmp_path), attempts=2)
        answers = ask(chat, "good", "bad", "raw", "no")
        with pytest.raises(EndpointError) as wrong:
            ask(make(strict, api_key_env="SOME_KEY"), "x")
    assert [answer.status for answer in answers] == ["ok", "error", "error", "refused"]
    assert "[key]" in answers[1].reason
    assert "environment variable SOME_KEY holds the key that was sent" in str(wrong.value)
    seen = [repr(chat), repr(chat.settings), repr(answers), caplog.text, *traceback.format_exception(wrong.value)]
    assert not [text for text in seen if secret in text]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"api_key": "sk-1"}, r"\['api_key'\].*environment variable OPENAI_API_KEY"),
        ({"api_key_env": "sk-1"}, "name of an environment variable"),
        ({"base_url": "http://me:sk-1@host/v1"}, "environment variable OPENAI_API_KEY"),
        ({"base_url": "http://host/v1?api_key=sk-1"}, "environment variable OPENAI_API_KEY"),
        ({"base_url": "localhost:8000"}, "a URL such as"),
        ({"base_url": "http://host:99999/v1"}, "a URL such as"),
        ({"base_url": []}, "list of them"),
        ({"base_url": ["http://a/v1", "http://a/v1/"]}, "every endpoint once"),
        ({"model": ""}, "served model"),
        ({"timeout": float("nan")}, "seconds above 0"),
        ({"attempts": 0}, "at least 1"),
        ({"concurrency": True}, "at least 1"),
        ({"max_calls": 1.5}, "at least 1"),
        ({"cache": 1}, "true, false or a folder"),
        ({"temprature": 0.0}, "did you mean 'temperature'"),
        ({"time_out": 3}, "did you mean 'timeout'"),
        ({"whose": "mine"}, "got 'whose'"),
    ],
)
def test_a_bad_option_is_refused_without_repeating_a_key(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        ClientSettings.take({"base_url": "http://a/v1", "model": "m", **options}, "judge_options", ["temperature"])
    assert "judge_options" in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_options_are_split_into_settings_and_the_callers_own() -> None:
    given = {"base_url": "https://a.example/v1/", "model": "m", "timeout": 3, "samples": 2}
    settings, own = ClientSettings.take(given, "partner_options", ["samples", "style"])
    assert settings == ClientSettings(("https://a.example/v1",), "m", timeout=3)
    assert own == {"samples": 2}
    with pytest.raises(ValueError, match="partner_options: expected 'model', got none"):
        ClientSettings.take({"base_url": "http://a/v1"}, "partner_options")


def test_an_interrupt_cancels_what_was_asked_and_leaves_nothing_running(make: Make) -> None:
    async def others() -> list[asyncio.Task[Any]]:
        await asyncio.sleep(0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Loopback(lambda body: Reply(text="late", hang=0.0 if "now" in str(body) else 60.0)) as server:
            chat = make(server, concurrency=4)
            main = threading.main_thread().ident
            stopped: list[float] = []

            def stop() -> None:
                until = time.monotonic() + 20.0
                while server.peak < 4 and time.monotonic() < until:
                    time.sleep(0.01)
                stopped.append(time.monotonic())
                signal.pthread_kill(main or 0, signal.SIGINT)

            stopper = threading.Thread(target=stop)
            stopper.start()
            with pytest.raises(KeyboardInterrupt):
                ask(chat, *map(str, range(8)))
            stopper.join()
            assert time.monotonic() - stopped[0] < 5.0
            assert background.run(others()) == []
            assert ask(chat, *["now"] * 8)[7].text == "late"
    finally:
        signal.signal(signal.SIGINT, before)
    assert chat.counts.calls == 4 + 8
    assert chat.counts.failures == 4


def test_many_threads_wait_on_one_loop_and_the_loop_itself_may_not(make: Make) -> None:
    async def inside() -> None:
        background.run(asyncio.sleep(0))

    with Loopback(echo, latency=0.05) as server:
        chat = make(server)
        texts: list[str] = []
        threads = [threading.Thread(target=lambda n=n: texts.append(ask(chat, str(n))[0].text)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(texts) == [f"You said: {n}" for n in range(8)]
    assert server.peak > 1
    with pytest.raises(RuntimeError, match="await the coroutine"):
        background.run(inside())


def test_a_forked_child_asks_too_and_the_exit_is_silent() -> None:
    code = """
        import os, sys
        from ppg_gym.llm import background
        from ppg_gym.llm.chat import Request
        from ppg_gym.llm.client import ChatClient
        from ppg_gym.llm.loopback import Loopback
        from ppg_gym.llm.settings import ClientSettings

        def ask(chat, text):
            return background.run(chat.ask(Request(({"role": "user", "content": text},)))).text

        with Loopback(lambda body: body["messages"][0]["content"]) as server:
            chat = ChatClient(ClientSettings((server.url,), "loopback", cache=False))
            dropped = ChatClient(ClientSettings((server.url,), "loopback", cache=False))
            said = [ask(chat, "before"), ask(dropped, "dropped")]
            del dropped
            child = os.fork()
            if child == 0:
                sys.exit(0 if ask(chat, "child") == "child" else 1)
            said += [os.waitpid(child, 0)[1], ask(chat, "after")]
            print(said)
            chat.close()
            print(ask(chat, "again"))
    """
    command = [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines() == ["['before', 'dropped', 0, 'after']", "again"], done.stderr
    assert done.stderr == ""
