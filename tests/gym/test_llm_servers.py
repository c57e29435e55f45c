"""Servers as they are: their parameters, their forms of an answer, thoughts, cut answers, probes and filters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.judges.llm import LLMJudge
from ppg_gym.llm import answers, background, client
from ppg_gym.llm.chat import Answer, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.loopback import Loopback, Reply
from ppg_gym.llm.settings import ClientSettings
from ppg_gym.partners import Said
from ppg_gym.partners.llm import LLMPartner

Answering = Callable[[dict[str, Any]], str | Reply]
VERDICT = json.dumps({"rationale": "Fine.", "contradicts": False, "addresses_judge": False, "says_something": True})
SNOW = '{"snow_is_white": true}'
TALK = Conversation(Persona("p", "I am a nurse.", name="Ann")).add("partner", "Hi?").add("policy", "I nurse people.")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def make() -> Iterator[Callable[..., ChatClient]]:
    made: list[ChatClient] = []

    def make(server: Loopback, **options: Any) -> ChatClient:
        made.append(ChatClient(ClientSettings((server.url,), "loopback", **{"cache": False, **options})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(chat: ChatClient, **how: Any) -> Answer:
    return background.run(chat.ask(Request(({"role": "user", "content": "Who are you?"},), **how)))


def judging(answer: str | Reply) -> Answering:
    """Return a server that honours a schema and says the same to every request of a judge."""
    return lambda body: SNOW if "snow" in str(body["messages"]) else answer


def judge(server: Loopback, **options: Any) -> LLMJudge:
    return LLMJudge("chatting", {"base_url": server.url, "model": "loopback", "cache": False, **options})


def partner(server: Loopback, **options: Any) -> LLMPartner:
    return LLMPartner("chatting", {"base_url": server.url, "model": "loopback", "cache": False, **options})


def speak(speaker: LLMPartner) -> Said:
    said = speaker.speak([TALK], [np.random.default_rng(0)])[0]
    speaker.close()
    return said


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuse", [["max_tokens"], ["max_tokens", "seed"], {"max_tokens": None, "temperature": 1}])
def test_a_parameter_that_is_refused_by_name_is_avoided_from_then_on(make: Any, refuse: Any) -> None:
    with Loopback(lambda body: "fine", refuse=refuse) as server:
        chat = make(server)
        assert ask(chat, seed=1, max_tokens=9).text == "fine"
        learning = len(server.requests)
        assert learning == 1 + len(refuse)
        for seed in range(3):
            assert ask(chat, seed=seed, max_tokens=9).text == "fine"
        chat.close()  # another set of connections, the same server
        assert ask(chat, seed=7, max_tokens=9).text == "fine"
    assert len(server.requests) == learning + 4
    assert server.requests[-1]["max_completion_tokens"] == 9
    assert not {"max_tokens", *(refuse if "seed" in refuse else ())} & server.requests[-1].keys()
    assert (chat.counts.calls, chat.counts.failures) == (learning + 4, learning - 1)


def test_only_the_temperature_that_was_refused_is_left_out(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def positive(body: dict[str, Any]) -> str | Reply:
        return Reply(422, "`temperature` must be strictly positive") if body.get("temperature") == 0 else "fine"

    with Loopback(positive) as server:
        chat = make(server)
        assert [ask(chat, temperature=warm).text for warm in (0.0, 0.0, 0.7)] == ["fine"] * 3
    assert [body.get("temperature") for body in server.requests] == [0.0, None, None, 0.7]
    assert "does not take temperature 0: it is left out" in caplog.text


FORMS = {
    "param": {"error": {"message": "No.", "param": "max_tokens", "code": "unsupported_parameter"}},
    "words": {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", "param": None}},
    "old words": {"error": {"message": "Unrecognized request argument supplied: max_tokens"}},
    "FastAPI": {"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted", "input": 9}]},
    "a text": {"error": "unknown field `max_tokens`"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_is_understood_in_every_form(make: Any, form: Any, status: int) -> None:
    def strict(body: dict[str, Any]) -> str | Reply:
        return Reply(status, body=json.dumps(form).encode()) if "max_tokens" in body else "fine"

    with Loopback(strict) as server:
        assert ask(make(server)).text == "fine"
    assert len(server.requests) == 2


def test_what_did_not_help_is_not_remembered_and_other_parameters_are_left_alone(make: Any) -> None:
    told = "max_tokens is too large: 9000. This model's context has 4096."
    with Loopback(lambda body: Reply(400, told) if 9000 in body.values() else "fine") as server:
        chat = make(server)
        answer = ask(chat, max_tokens=9000)
        assert (answer.status, "too large" in answer.reason) == ("error", True)
        assert len(server.requests) == 2
        assert ask(chat, max_tokens=9).text == "fine"
        assert server.requests[-1]["max_tokens"] == 9
    told = {"error": {"message": "bad seed in messages", "param": "messages[0]"}}
    with Loopback(lambda body: Reply(400, body=json.dumps(told).encode())) as server:
        ask(make(server), seed=3)
    assert len(server.requests) == 1


def test_parameters_by_hand(make: Any) -> None:
    with Loopback(lambda body: "fine") as server:
        given = {"omit": ["temperature", "max_tokens"], "extra_body": {"max_completion_tokens": 70, "top_k": 3}}
        assert ask(make(server, **given), seed=2).text == "fine"
    sent = server.requests[0]
    assert {k: sent[k] for k in sent if k not in BASE} == {"max_completion_tokens": 70, "top_k": 3, "seed": 2}
    for wrong, said in (
        ({"omit": ["messages"]}, "a list out of temperature, seed, max_tokens"),
        ({"extra_body": {"stream": True}}, "none of model, messages"),
        ({"extra_body": {"x": {1, 2}}}, "plain JSON"),
        ({"headroom": -1}, "at least 0"),
        ({"identity": ""}, "their old URL"),
    ):
        with pytest.raises(ValueError, match=said):
            ClientSettings(("http://a/v1",), "m", **wrong)


BASE = ("model", "messages")


# --- forms of an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}], "Hello."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"text": "Hello."}], "Hello."),
        ([{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "Hello."}], "Hello."),
        (["Hello."], "Hello."),
        ({"type": "text", "text": {"value": "Hello."}}, "Hello."),
    ],
)  # fmt: skip
def test_content_in_parts_is_read_at_the_first_call(make: Any, content: Any, text: str) -> None:
    with Loopback(lambda body: Reply(message={"content": content})) as server:
        assert ask(make(server)).text == text
    assert len(server.requests) == 1


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": None}, {"prompt_tokens": 1.5}, [], "many"])
def test_what_a_server_says_of_its_tokens_spoils_no_answer(make: Any, usage: Any) -> None:
    body = {"choices": [{"message": {"content": "fine"}, "finish_reason": 3}], "usage": usage}
    with Loopback(lambda _: Reply(body=json.dumps(body).encode())) as server:
        assert ask(make(server)).text == "fine"
    assert len(server.requests) == 1


# --- thoughts and cut answers -------------------------------------------------------------------------------------


def reasoning(thoughts: int, answer: str, parser: bool = True) -> Answering:
    """Return a model that thinks so many words first, behind a parser or in the text."""
    hidden = "hm " * thoughts

    def say(body: dict[str, Any]) -> Reply:
        text = SNOW if "snow" in str(body["messages"]) and "response_format" in body else answer
        return Reply(thoughts=hidden, text=text) if parser else Reply(text=f"<think> {hidden}</think> {text}")

    return say


@pytest.mark.parametrize("parser", [True, False])
@pytest.mark.parametrize("thoughts", [50, 300, 1500])
def test_a_model_that_thinks_costs_one_call_per_reply_after_the_probe(thoughts: int, parser: bool) -> None:
    with Loopback(reasoning(thoughts, VERDICT, parser)) as server:
        asking = judge(server)
        assert asking.judge([TALK])[0].score == 1.0
        first = len(server.requests)
        assert first <= 3  # a probe that may be cut off once, and the reply
        for n in range(4):
            assert asking.judge([TALK.add("partner", "So?").add("policy", f"Nights, {n}.")])[0].score == 1.0
        asking.close()
    assert len(server.requests) == first + 4


@pytest.mark.parametrize("parser", [True, False])
def test_a_partner_that_thinks_speaks_without_its_thoughts(parser: bool) -> None:
    with Loopback(reasoning(400, "What do you like about it?", parser)) as server:
        speaker = partner(server)
        assert [speaker.speak([TALK], [np.random.default_rng(n)])[0] for n in range(4)] == [
            Said("What do you like about it?")
        ] * 4
        speaker.close()
    assert len(server.requests) == 5  # the first was cut off once


@pytest.mark.parametrize("thoughts", ["hm " * 5000, ""])
def test_an_answer_that_is_cut_off_is_asked_for_once_more_with_more_room_and_fails_typed(thoughts: str) -> None:
    endless = Reply(thoughts=thoughts, text="word " * 9000)
    with Loopback(judging(endless)) as server:
        asking = judge(server)
        verdict = asking.judge([TALK])[0]
        assert (verdict.status, verdict.score) == ("unparsed", None)
        assert "raise judge_options['max_tokens']" in verdict.rationale
        asking.close()
    room = 2048 if thoughts else 400
    assert [body["max_tokens"] for body in server.requests] == [128, 400, 400 + room]
    with Loopback(lambda body: endless) as server:
        assert speak(partner(server)) == Said("", "too_long", "cut off at max_tokens")
    assert len(server.requests) == 2


def test_room_that_helped_is_kept_and_no_headroom_means_none(make: Any) -> None:
    with Loopback(lambda body: "word " * 30) as server:
        chat = make(server)
        assert [ask(chat, max_tokens=20).finish for _ in range(3)] == ["stop"] * 3
        assert [body["max_tokens"] for body in server.requests] == [20, 40, 40, 40]
        assert ask(make(server, headroom=0), max_tokens=20).finish == "length"
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "mute",
    [
        Reply(thoughts="The answer is yes.", message={"content": None}),
        Reply(thoughts="The answer is yes.", message={"content": ""}),
        Reply(message={"content": None, "reasoning": "The answer is yes."}),
        Reply(text="a b c d e f g h i j", message={"content": None}),  # counted, and not sent
    ],
)
def test_thoughts_without_an_answer_are_paid_for_once(make: Any, mute: Reply) -> None:
    with Loopback(lambda body: mute) as server:
        answer = ask(make(server))
        assert answer.status == "error"
        assert "enable_thinking" in answer.reason
        assert len(server.requests) == 1
        asking = judge(server)
        for _ in range(3):
            assert asking.judge([TALK])[0].status == "error"
        asking.close()
    assert len(server.requests) == 1 + 2 + 3  # a probe with and without a schema, then one call per reply


def test_a_server_that_hides_answers_to_a_schema_is_asked_without_one() -> None:
    def say(body: dict[str, Any]) -> str | Reply:
        return Reply(thoughts=VERDICT, message={"content": None}) if "response_format" in body else VERDICT

    with Loopback(say) as server:
        asking = judge(server)
        assert [asking.judge([TALK])[0].score for _ in range(3)] == [1.0] * 3
        asking.close()
    assert len(server.requests) == 2 + 3


# --- the probe ----------------------------------------------------------------------------------------------------


def test_a_refusal_for_another_reason_is_not_kept(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ill = True

    def say(body: dict[str, Any]) -> str | Reply:
        return Reply(400, "no healthy deployment") if ill else SNOW

    with Loopback(say) as server:
        chat = make(server, cache=str(tmp_path))
        assert [background.run(chat.structured()) for _ in range(3)] == [False] * 3
        assert len(server.requests) == 2  # once with, once without; not again at every judging
        ill = False
        assert background.run(make(server, cache=str(tmp_path)).structured()) is True
        monkeypatch.setattr(time, "monotonic", lambda: 1e12)
        assert background.run(chat.structured()) is True


def test_what_the_probe_found_is_known_to_the_next_run(make: Any, tmp_path: Path) -> None:
    with Loopback(reasoning(300, "fine")) as server:
        first = make(server, cache=str(tmp_path))
        assert background.run(first.structured()) is True
        assert len(server.requests) == 2
        first.close()
        again = make(server, cache=str(tmp_path))
        assert background.run(again.structured()) is True
        assert ask(again, max_tokens=100).text == "fine"
    assert len(server.requests) == 3


def test_a_probe_that_is_cut_off_is_not_repeated_at_every_judging() -> None:
    def say(body: dict[str, Any]) -> str | Reply:
        return Reply(thoughts="hm " * 9000) if "snow" in str(body["messages"]) else VERDICT

    with Loopback(say) as server:
        asking = judge(server)
        assert [asking.judge([TALK])[0].score for _ in range(4)] == [1.0] * 4
        asking.close()
    assert len(server.requests) == 2 + 4


# --- filters ------------------------------------------------------------------------------------------------------

FILTERS: dict[str, Reply] = {
    "OpenAI": Reply(400, "The response was filtered.", error={"code": "content_filter", "param": "prompt"}),
    "Azure": Reply(
        400,
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        error={"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}},
    ),
    "proxy": Reply(400, "ContentPolicyViolationError", error={"code": "content_policy_violation"}),
    "OpenAI's reasoning models": Reply(400, "Invalid prompt: flagged", error={"code": "invalid_prompt"}),
    "OpenRouter": Reply(403, "Your input was flagged", error={"code": 403}),
    "OpenRouter with 200": Reply(body=b'{"error": {"code": 403, "message": "Your input was flagged"}}'),
    "Alibaba": Reply(400, "Input data may contain inappropriate content.", error={"code": "data_inspection_failed"}),
    "DeepSeek": Reply(400, "Content Exists Risk", error={"type": "invalid_request_error"}),
    "Google": Reply(finish="PROHIBITED_CONTENT", message={"content": None}),
    "finish": Reply(text="I", finish="content_filter"),
    "a part": Reply(message={"content": [{"type": "refusal", "refusal": "No."}]}),
}


@pytest.mark.parametrize("reply", FILTERS.values(), ids=FILTERS.keys())
def test_a_content_filter_is_a_refusal_however_it_is_told(reply: Reply) -> None:
    with Loopback(judging(reply)) as server:
        asking = judge(server)
        verdict = asking.judge([TALK])[0]
        asking.close()
        assert (verdict.status, verdict.score) == ("refused", None)
        assert len(server.requests) == 2
        assert speak(partner(server)).status == "refused"


@pytest.mark.parametrize(
    "reply",
    [Reply(400, "the content of messages must be a list"), Reply(401, "flagged key"), Reply(403, "no such project")],
)
def test_other_refusals_stay_errors(make: Any, reply: Reply) -> None:
    with Loopback(lambda body: reply) as server:
        assert ask(make(server)).status == "error"


def test_an_error_told_with_200_is_repeated_when_that_may_help(make: Any) -> None:
    replies = [b'{"error": {"code": 502, "message": "upstream"}}', b'{"error": {"message": "busy"}}']
    with Loopback(lambda body: Reply(body=replies.pop()) if replies else "fine") as server:
        assert ask(make(server)).text == "fine"
    assert len(server.requests) == 3
    told = answers.completion('{"choices": [{"error": {"code": 502, "message": "gone"}}]}')
    assert isinstance(told, answers.Fault)
    assert told.code == 502
