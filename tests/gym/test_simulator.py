"""What judge and partner may do to a conversation: fail, wait side by side, and be anybody's own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.cast import personas
from ppg_gym.judges import FailureRateError, JudgeError
from ppg_gym.judges.failure_limit import FEW
from ppg_gym.llm.chat import BudgetError
from ppg_gym.llm.loopback import Loopback, Reply
from ppg_gym.partners import ENDED, PartnerFailureRateError, Said
from ppg_gym.partners.llm import LLMPartner
from ppg_gym.vector import PersonaChatVectorEnv

LOST = Verdict("timeout", None, "No answer in time.")


class Judge:
    """Scores 1, or fails for the personas and replies named."""

    waits = True

    def __init__(self, domain: str = "chatting", options: Mapping[str, Any] | None = None) -> None:
        self.options, self.closed = dict(options or {}), False

    def check(self, persona: Persona) -> None:
        pass

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        lost = self.options.get("lost", ())
        return [LOST if c.lines[-1].text in lost else Verdict("scored", 1.0) for c in conversations]

    def close(self) -> None:
        self.closed = True


class Partner:
    """Says how many lines it heard; fails where the newest line is ``break``, and at every opening if told to."""

    def __init__(self, domain: str = "chatting", options: Mapping[str, Any] | None = None) -> None:
        self.mute = dict(options or {}).get("mute", False)

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        for rng in rngs:
            rng.random()
        return [self._line(c) for c in conversations]

    def _line(self, conversation: Conversation) -> Said:
        if self.mute and not conversation.lines:
            return Said("", "empty")
        if conversation.lines and conversation.lines[-1].text == "break":
            return Said("", "role_flip")
        return Said(f"{len(conversation.lines)} lines")


def envs(n: int = 3, judge: Any = None, partner: Any = None, **kwargs: Any) -> PersonaChatVectorEnv:
    """Return N conversations with these parts."""
    made = PersonaChatVectorEnv(n, **{"on_judge_failure": "nan", "max_turns": 4, **kwargs})
    made.simulator.judge, made.simulator.partner = judge or Judge(), partner or Partner()
    return made


def test_a_partner_s_fault_truncates_and_costs_the_policy_nothing() -> None:
    made = envs()
    made.reset(seed=0)
    observations, rewards, terminated, truncated, infos = made.step(("hello", "break", "hello"))
    assert rewards.tolist() == [1.0, 1.0, 1.0]  # the reply was judged; the fault came after it
    assert truncated.tolist() == [False, True, False]
    assert not terminated.any()
    assert observations["message"] == ("2 lines", "", "2 lines")
    assert infos["partner"]["status"].tolist() == ["ok", "role_flip", "ok"]


def test_a_conversation_that_was_never_opened_ends_unjudged_at_its_first_step() -> None:
    made = envs(partner=Partner(options={"mute": True}), on_judge_failure="raise")
    observations, infos = made.reset(seed=0)
    assert observations["message"] == ("", "", "")
    assert infos["partner"]["status"].tolist() == ["empty"] * 3
    _, rewards, terminated, truncated, infos = made.step(("a", "b", "c"))
    assert np.isnan(rewards).all()
    assert truncated.all()
    assert not terminated.any()
    assert infos["verdict"]["status"].tolist() == ["error"] * 3
    assert infos["verdict"]["score"].tolist() == [None] * 3


def test_judge_and_partner_wait_side_by_side_and_say_the_same_as_one_after_the_other() -> None:
    meeting = threading.Barrier(2, timeout=10)

    class Waiting(Judge):
        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            meeting.wait()  # breaks when the partner does not come
            return super().judge(conversations)

    class Speaking(Partner):
        def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
            if conversations[0].lines:
                meeting.wait()
                assert all(len(c.verdicts) * 2 < len(c.lines) for c in conversations), "it hears no verdicts"
            return super().speak(conversations, rngs)

    together, apart = envs(judge=Waiting(), partner=Speaking()), envs()
    apart.simulator._overlap = lambda: False  # type: ignore[method-assign]
    for made in (together, apart):
        made.reset(seed=0)
    for replies in (("a", "break", "c"), ("d", "-", "f")):
        one, other = together.step(replies), apart.step(replies)
        assert one[0] == other[0]
        assert [a.tolist() for a in one[1:4]] == [a.tolist() for a in other[1:4]]
    assert [rng.random() for rng in together._rngs] == [rng.random() for rng in apart._rngs]


def test_a_lost_judge_truncates_and_the_partner_s_line_is_dropped() -> None:
    made = envs(judge=Judge(options={"lost": ("b",)}), on_judge_failure="truncate")
    made.reset(seed=0)
    observations, rewards, _, truncated, infos = made.step(("a", "b", "c"))
    assert truncated.tolist() == [False, True, False]
    assert observations["message"] == ("2 lines", "", "2 lines")
    assert [math.isnan(r) for r in rewards] == [False, True, False]
    assert infos["partner"]["status"].tolist() == ["ok"] * 3


def test_too_many_failures_stop_the_environment_and_show_what_they_were() -> None:
    made = envs(20, judge=Judge(options={"lost": ("bad",)}), max_turns=100)
    made.reset(seed=0)
    allowed = int(0.05 * FEW)
    made.step(("bad",) * allowed + ("good",) * (20 - allowed))
    with pytest.raises(FailureRateError, match=r"at most 5% .* got 11 of the .*: 11 × \[timeout\] No answer.*'bad'\)$"):
        made.step(("bad",) * 20)
    free = envs(20, judge=Judge(options={"lost": ("bad",)}), max_turns=100, max_failure_rate=1)
    free.reset(seed=0)
    for _ in range(20):
        assert np.isnan(free.step(("bad",) * 20)[1]).all()


def test_a_partner_that_fails_too_often_stops_the_environment_and_the_judge_is_not_blamed() -> None:
    made = envs(11, max_turns=100)
    made.reset(seed=0)
    with pytest.raises(PartnerFailureRateError) as fault:
        made.step(("break",) * 11)
    said = str(fault.value)
    assert "at most 5% of the partner's lines to be missing, got 11 of the last 22; mend the partner" in said
    assert "raise max_partner_failure_rate. The last causes: 11 × [role_flip] (last: persona chatting-train-" in said
    assert "reply 'break')" in said
    assert "judge" not in said
    free = envs(11, max_turns=100, max_partner_failure_rate=1)
    free.reset(seed=0)
    assert free.step(("break",) * 11)[3].all()
    assert not envs(10, max_turns=100).reset(seed=0)[1].get("reason")


def test_a_partner_that_never_opens_is_named_as_such() -> None:
    with Loopback(lambda body: Reply(400, "no such adapter"), model="m") as server:
        options = {"model": "m", "cache": False, "base_url": server.url}
        made = envs(11, partner=LLMPartner("chatting", options))
        with pytest.raises(PartnerFailureRateError, match=r"11 × \[no opening line\] error: .*no such ad") as fault:
            made.reset(seed=0)
        assert "mend the partner" in str(fault.value)
        few = envs(2, partner=made.simulator.partner)
        _, infos = few.reset(seed=0)
        assert infos["partner"]["status"].tolist() == ["error"] * 2
        assert "no such adapter" in infos["partner"]["reason"][0]
        made.close()


def test_a_person_who_stops_is_no_fault() -> None:
    class Person(Partner):
        def _line(self, conversation: Conversation) -> Said:
            return Said("", ENDED) if conversation.lines else Said("Hello.")

    made = envs(20, partner=Person(), max_partner_failure_rate=0)
    made.reset(seed=0)
    assert made.step(("a",) * 20)[3].all()


def test_parts_of_one_s_own_are_named_by_module_and_class() -> None:
    here = f"{__name__}:"
    made = gym.make(
        "ppg_gym:PersonaChat-v0",
        judge=here + "Judge",
        judge_options={"lost": ["bad"]},
        partner=here + "Partner",
        disable_env_checker=True,
    )
    made.reset(seed=0)
    assert made.step("good")[1] == 1.0
    with pytest.raises(JudgeError, match="timeout"):
        made.step("bad")
    made.close()
    assert made.unwrapped.simulator.judge.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"judge": "lllm"}, r"judge out of facts, llm, .* did you mean 'llm'"),
        ({"partner": "scriptd"}, r"partner out of scripted, llm, .* did you mean 'scripted'"),
        ({"judge": "nowhere.at_all:Judge"}, "ModuleNotFoundError: No module named 'nowhere'"),
        ({"judge": f"{__name__}:Nobody"}, "AttributeError"),
        ({"judge_options": {"model": "m"}}, r"no judge_options for the facts judge, got \['model'\]"),
        ({"partner_options": {"model": "m"}}, r"no partner_options for the scripted partner"),
        ({"max_failure_rate": 5}, r"max_failure_rate to be a number in \[0, 1\], got 5"),
    ],
)
def test_a_name_or_option_that_is_none_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("ppg_gym:PersonaChat-v0", **kwargs)


def test_environments_of_equal_settings_share_a_client_and_its_budget(tmp_path: Path) -> None:
    options = {"model": "m", "cache": str(tmp_path), "attempts": 1, "max_calls": 3}  # one call is the schema's probe
    with Loopback(lambda body: SAYS, model="m") as server:
        given = {"judge": "llm", "judge_options": {**options, "base_url": server.url, "schema": "never"}}
        first, second = PersonaChatVectorEnv(1, **given), PersonaChatVectorEnv(1, **given)
        assert first.simulator.judge.chat is second.simulator.judge.chat  # type: ignore[attr-defined]
        for made in (first, second):
            made.reset(seed=len(server.requests))
        first.step(("one",))
        second.step(("two",))
        first.close()
        first.close()
        second.step(("three",))
        with pytest.raises(BudgetError, match="max_calls"):
            second.step(("four",))
        second.close()


def test_an_interruption_ends_both_at_once(tmp_path: Path) -> None:
    with Loopback(lambda body: Reply(hang=60.0), model="m") as server:
        options = {"model": "m", "cache": False, "base_url": server.url}
        made = envs(2, partner=LLMPartner("chatting", options))
        made.simulator.judge = Interrupted(server)
        made._conversations = [Conversation(p).add("partner", "Hello?") for p in personas("chatting", "train")[:2]]
        made._over[:] = False
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            made.step(("a", "b"))
        assert time.monotonic() - began < 30
        made.close()


class Interrupted(Judge):
    """Is interrupted once the partner waits for the server."""

    def __init__(self, server: Loopback) -> None:
        self.server = server

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        while not self.server.requests:
            time.sleep(0.01)
        raise KeyboardInterrupt


SAYS = '{"rationale": "Fine.", "contradicts": false, "addresses_judge": false, "says_something": true}'


def test_usage_counts_calls_and_tokens(tmp_path: Path) -> None:
    with Loopback(lambda body: SAYS, model="m") as server:
        options = {"model": "m", "cache": str(tmp_path), "base_url": server.url, "schema": "never"}
        made = PersonaChatVectorEnv(2, judge="llm", judge_options=options)
        made.reset(seed=0)
        made.step(("one", "two"))
        made.close()
    assert made.usage()["judge"]["calls"] == 2
    assert made.usage()["judge"]["completion_tokens"] > 0
    assert PersonaChatVectorEnv(1).usage() == {}
