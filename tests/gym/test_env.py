"""PersonaChat-v0 as Gymnasium sees it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppg_gym
from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.domain.twin import Twin
from ppg_gym.env import MAX_CHARS, PersonaChatEnv
from ppg_gym.judges import JudgeError

NAME = "PersonaChat-v0"
RESERVED = {"episode", "final_obs", "final_info", "terminal_observation", "TimeLimit.truncated"}
MODES = pytest.mark.parametrize("mode", [None, "ansi"])
ALL = pytest.mark.parametrize("domain", DOMAINS)


class Stub:
    """A judge that gives the same verdict to everybody."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def check(self, persona: Persona) -> None:
        pass

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        return [self.verdict for _ in conversations]


def play(env: gym.Env[Any, Any], seed: int | None, turns: int = 99, **options: Any) -> list[Any]:
    """Return everything that a conversation with mixed replies shows, up to its end."""
    base: PersonaChatEnv = env.unwrapped  # type: ignore[assignment]
    read, rng = reader(base.simulator.domain.name), np.random.default_rng(0)
    kinds = list(base.simulator.domain.mix)
    shown: list[Any] = [env.reset(seed=seed, options=options or None)]
    for _ in range(turns):
        assert base._conversation is not None
        reply = say(read, kinds[int(rng.integers(len(kinds)))], base._conversation, rng)
        shown.append((reply, *env.step(reply)))
        if shown[-1][3] or shown[-1][4]:
            break
    return shown


@ALL
@MODES
def test_the_checker_has_nothing_to_say(domain: str, mode: str | None) -> None:
    check_env(gym.make(NAME, domain=domain, render_mode=mode).unwrapped)


@ALL
def test_a_conversation_through_all_of_make_s_wrappers(domain: str) -> None:
    with gym.make(NAME, domain=domain) as env:
        shown = play(env, 3)
    assert len(shown) == load(domain).turns + 1
    assert shown[-1][3] is True
    assert shown[-1][4] is False
    assert [step[5]["turn"] for step in shown[1:]] == list(range(1, load(domain).turns + 1))
    assert shown[0][1]["reachable"] == Twin.of(load(domain).table).best(load(domain).turns)


def test_importing_by_name_registers() -> None:
    assert gym.make(f"ppg_gym:{NAME}").unwrapped.spec.id == NAME
    assert ppg_gym.__all__


def test_the_spec_goes_through_json() -> None:
    made = gym.make(
        NAME, domain="therapy", personas="held-out", max_turns=3, on_judge_failure="nan", partner_options={}
    )
    spec = EnvSpec.from_json(made.spec.to_json())
    assert json.loads(made.spec.to_json())["kwargs"]["domain"] == "therapy"
    again = gym.make(spec)
    assert again.spec == made.spec
    assert play(again, 1) == play(made, 1)


@ALL
def test_copies_and_pickles_go_on_alike(domain: str) -> None:
    env = PersonaChatEnv(domain, max_turns=6, render_mode="ansi")
    play(env, 5, turns=3)
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert other.render() == env.render()
        twin = copy.deepcopy(env)
        assert [other.step("I see, and then?") for _ in range(3)] == [twin.step("I see, and then?") for _ in range(3)]
        assert other.observation_space == env.observation_space


def test_gymnasium_s_wrappers() -> None:
    env = RecordEpisodeStatistics(gym.make(NAME))
    shown = play(env, 0)
    assert shown[-1][5]["episode"]["l"] == load("chatting").turns
    assert shown[-1][5]["episode"]["r"] == pytest.approx(sum(step[2] for step in shown[1:]))
    cut = play(TimeLimit(gym.make(NAME), 3), 0)
    assert len(cut) == 4
    assert cut[-1][3:5] == (False, True)
    assert play(gym.make(NAME, max_episode_steps=2), 0)[-1][3:5] == (False, True)


@ALL
def test_the_same_seed_gives_the_same_conversation(domain: str) -> None:
    first, second, other = (play(PersonaChatEnv(domain), seed) for seed in (7, 7, 8))
    assert first == second
    assert first != other
    env = PersonaChatEnv(domain)
    assert play(env, 7) == first
    assert play(env, None) != first  # the generator goes on
    assert play(env, 7) == first


def test_personas_come_from_their_split() -> None:
    for split in ("train", "held-out"):
        env, ids = PersonaChatEnv(personas=split), {p.id for p in personas("chatting", split)}
        assert len({env.reset(seed=seed)[1]["persona"] for seed in range(40)} & ids) > 20


@pytest.mark.parametrize("form", ["id", "persona", "dict"])
def test_reset_takes_a_persona(form: str) -> None:
    wanted = personas("therapy", "train")[9]
    given_as = {"id": wanted.id, "persona": wanted, "dict": dataclasses.asdict(wanted)}[form]
    env = PersonaChatEnv("therapy")
    observation, info = env.reset(seed=1, options={"persona": given_as})
    assert info["persona"] == wanted.id
    assert observation["instruction"] == wanted.instruction
    facts_only = {"instruction": "Be somebody.", "facts": wanted.facts}
    assert env.reset(options={"persona": facts_only})[1]["persona"] == "custom"


@pytest.mark.parametrize("wanted", [{"facts": {}}, 3, ["a"], {"instruction": 5}])
def test_a_persona_that_is_none_is_refused(wanted: object) -> None:
    with pytest.raises(ValueError, match=r'expected options\["persona"\] to be an id'):
        PersonaChatEnv().reset(options={"persona": wanted})


def test_an_unknown_persona_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the id of one of"):
        PersonaChatEnv().reset(options={"persona": "nobody"})


def test_a_persona_without_facts_names_the_judges_that_could_take_it() -> None:
    with pytest.raises(ValueError, match=r'Judge personas that are prose with judge="llm" or judge="nli"'):
        PersonaChatEnv().reset(options={"persona": {"instruction": "You are a quiet man."}})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"domain": "chating"}, "did you mean 'chatting'"),
        ({"partner": "scripting"}, "did you mean 'scripted'"),
        ({"judge": "fact"}, "did you mean 'facts'"),
        ({"personas": "heldout"}, "expected personas to be 'train' or 'held-out' or a path"),
        ({"judge_options": {"strict": 1}}, r"expected no judge_options for the facts judge, got \['strict'\]"),
        ({"partner_options": {"speed": 1}}, r"expected no partner_options for the scripted partner, got \['speed'\]"),
        ({"max_turns": 0}, "expected max_turns to be a positive integer or None, got 0"),
        ({"max_turns": 2.0}, "expected max_turns"),
        ({"max_turns": True}, "expected max_turns"),
        ({"on_judge_failure": "zero"}, "expected on_judge_failure out of raise, nan, truncate, got 'zero'"),
        ({"render_mode": "human"}, "expected render_mode None or 'ansi', got 'human'"),
    ],
)
def test_an_option_that_is_none_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersonaChatEnv(**kwargs)


@pytest.mark.parametrize("action", [None, 3, b"bytes", ["a"]])
def test_an_action_that_is_none_is_refused(action: Any) -> None:
    env = PersonaChatEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected the action to be a str of at most"):
        env.step(action)


@ALL
@pytest.mark.parametrize(
    "reply", ["I " * 20_000, "x" * 100_000, "I nurse people. " * 50_000, "(\n" * 9_000, "日本" * 9_000]
)
def test_a_reply_of_any_length_is_judged_on_its_first_part(domain: str, reply: str) -> None:
    whole, part = PersonaChatEnv(domain), PersonaChatEnv(domain)
    for env in (whole, part):
        env.reset(seed=0)
    step = whole.step(reply)
    assert step == part.step(reply[: MAX_CHARS - 4] + " […]")
    assert step[-1]["verdict"]["status"] == "scored"
    assert whole._conversation is not None
    assert len(whole._conversation.said()[0]) == MAX_CHARS
    whole.step("I am fine.")


def test_only_a_conversation_that_goes_on_can_be_stepped() -> None:
    env = PersonaChatEnv(max_turns=1)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step("Hi.")
    env.reset(seed=0)
    observation, _, terminated, _, _ = env.step("Hi.")
    assert terminated
    assert observation["message"] == ""
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step("Hi.")


@ALL
def test_ansi_shows_every_line_and_verdict(domain: str) -> None:
    env = PersonaChatEnv(domain, render_mode="ansi")
    assert env.render() == ""
    (observation, _), *steps = play(env, 2)
    shown = env.render()
    assert shown is not None
    assert observation["instruction"] in shown
    for message in (observation["message"], *(step[1]["message"] for step in steps)):
        assert message in shown
    for reply, _, reward, *_, info in steps:
        assert reply in shown
        assert f"({reward:.2f}) {info['verdict']['rationale']}" in shown


def test_render_without_a_mode_says_what_to_do() -> None:
    with pytest.warns(UserWarning, match="render_mode='ansi'"):
        assert PersonaChatEnv().render() is None


@pytest.mark.parametrize("status", ["unparsed", "timeout", "refused", "error"])
def test_a_lost_judge_is_never_a_number(status: Any) -> None:
    for mode in ("raise", "nan", "truncate"):
        env = PersonaChatEnv(on_judge_failure=mode, max_turns=3, render_mode="ansi")
        env.simulator.judge = Stub(Verdict(status, None, "No answer."))
        env.reset(seed=0)
        if mode == "raise":
            with pytest.raises(JudgeError, match=f"got status '{status}'.*on_judge_failure=\"nan\"") as caught:
                env.step("Hi.")
            assert caught.value.verdict.status == status
            continue
        _, reward, terminated, truncated, info = env.step("Hi.")
        assert math.isnan(reward)
        assert info["verdict"] == {"status": status, "score": None, "rationale": "No answer.", "kind": ""}
        assert (terminated, truncated) == (False, mode == "truncate")
        assert f"({status}) No answer." in (env.render() or "")
        if mode == "nan":
            env.step("Hi.")
            assert env.step("Hi.")[2:4] == (True, False)


def test_a_conversation_without_an_end_in_sight_does_not_run_out() -> None:
    shown = play(PersonaChatEnv("therapy", max_turns=60), 1)
    assert len(shown) == 61


@ALL
def test_info_and_observation_are_fresh_and_of_one_type(domain: str) -> None:
    env = PersonaChatEnv(domain, max_turns=60)
    shown = play(env, 4)
    (observation, start), *steps = shown
    types: dict[str, set[type]] = {}
    for info in [start] + [step[5] for step in steps]:
        for key, value in _flat(info):
            assert key not in RESERVED
            assert not key.startswith("_")
            types.setdefault(key, set()).add(type(value))
    assert all(len(found) == 1 for found in types.values()), types
    objects = [observation, *(step[1] for step in steps)], [start, *(step[5] for step in steps)]
    for made in objects:
        assert len({id(one) for one in made}) == len(made)
    steps[0][5]["verdict"]["score"] = "spoilt"
    steps[0][1]["message"] = "spoilt"
    assert "spoilt" not in str(play(env, 4)[1][1:])
    for _, seen, reward, terminated, truncated, info in steps[1:]:
        assert env.observation_space.contains(seen)
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        assert reward == info["verdict"]["score"]
        assert json.loads(json.dumps(info)) == info


def _flat(info: dict[str, Any]) -> Any:
    for key, value in info.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in _flat(value))
        yield key, value


ANY_TEXT = st.text(max_size=60) | st.text(
    st.sampled_from("nurse cat I'm not a yes,.!?<|{}[]:\n\u200b\u0301é日🙂\x00"), max_size=40
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.sampled_from(DOMAINS), st.integers(0, 2**32), st.lists(ANY_TEXT, min_size=100, max_size=100))
def test_ten_thousand_random_replies_always_score(domain: str, seed: int, replies: list[str]) -> None:
    env = PersonaChatEnv(domain, max_turns=100)
    env.reset(seed=seed)
    for turn, reply in enumerate(replies, 1):
        observation, reward, terminated, truncated, info = env.step(reply)
        assert 0.0 <= reward <= 1.0
        assert info["verdict"]["status"] == "scored"
        assert (terminated, truncated) == (turn == 100, False)
        assert env.observation_space.contains(observation)
