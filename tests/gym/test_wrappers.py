"""A choice among candidates, and the transcript, as Gymnasium sees them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st

import ppg_gym
from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.env import PersonaChatEnv
from ppg_gym.judges.facts import FactsJudge
from ppg_gym.simulator import Simulator
from ppg_gym.wrappers import ReplySelection, TranscriptObservation, UnjudgedError
from ppg_gym.wrappers.candidates import DomainBank, HashedWords, Scene, hashed

ALL = pytest.mark.parametrize("domain", DOMAINS)
RESERVED = {"episode", "final_obs", "final_info", "terminal_observation", "TimeLimit.truncated"}


class Echo(gym.Env[dict[str, str], str]):
    """A text environment of somebody else: likes long replies, and never says when it ends."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own)

    def __init__(self) -> None:
        text = gym.spaces.Text(100)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space = text

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"instruction": "Be brief.", "message": "Hello?"}, {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return {"instruction": "Be brief.", "message": "And?"}, float(len(action)), False, False, {}


def propose(instruction: str, message: str, history: Any, rng: np.random.Generator) -> list[str]:
    """Offer a short and a long reply, in this order."""
    return [f"No {len(history)}.", f"{instruction} {message}"]


def select(domain: str = "chatting", **options: Any) -> ReplySelection:
    own = {k: options.pop(k) for k in ("candidates", "features_options", "on_unjudged") if k in options}
    return ReplySelection(gym.make("PersonaChat-v0", domain=domain, **options), **own)


def rollout(env: gym.Env[Any, Any], seed: int, action: int = 0) -> list[Any]:
    """Return everything that one conversation shows."""
    shown: list[Any] = [env.reset(seed=seed)]
    while len(shown) == 1 or not (shown[-1][2] or shown[-1][3]):
        shown.append(env.step(np.int64(action)))
    return shown


@ALL
def test_it_is_an_environment_of_numbers(domain: str) -> None:
    for env in (select(domain), gym.make("ppg_gym:ReplySelection-v0", domain=domain, candidates=3)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is different from the unwrapped version.*")  # true of every wrapper
            check_env(env, skip_render_check=True)
        assert env.observation_space.dtype == np.float32


@ALL
def test_what_is_chosen_is_what_is_said(domain: str) -> None:
    env, plain = select(domain, candidates=5), PersonaChatEnv(domain)
    _, info = env.reset(seed=3)
    plain.reset(seed=3)
    for turn in range(1, plain.max_turns + 1):
        offered = info["candidates"]
        assert len(set(offered)) == 5
        _, reward, terminated, truncated, info = env.step(np.int64(turn % 5))
        _, expected, *_ = plain.step(offered[turn % 5])
        plain._conversation = env.unwrapped._conversation  # the partners' draws differ
        assert (info["reply"], info["turn"], reward) == (offered[turn % 5], turn, expected)
        assert not set(info) & RESERVED
    assert (terminated, truncated) == (True, False)
    assert info["candidates"] == ("",) * 5  # there is nothing more to be said
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.int64(0))


def test_the_same_seed_gives_the_same_numbers_in_every_process() -> None:
    code = """
import zlib
import gymnasium as gym, numpy as np
from ppg_gym.wrappers import ReplySelection
env = ReplySelection(gym.make("PersonaChat-v0", domain="therapy"))
total = zlib.crc32(env.reset(seed=5)[0].tobytes())
for _ in range(8):
    total = zlib.crc32(env.step(np.int64(1))[0].tobytes(), total)
print(total)
"""
    sums = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True, text=True
        ).stdout
        for salt in ("1", "2")
    }
    shown = rollout(select("therapy"), 5, action=1)
    total = 0
    for row in shown:
        total = zlib.crc32(row[0].tobytes(), total)
    assert sums == {f"{total}\n"}


def test_features_are_laid_out_as_documented() -> None:
    scene = Scene(
        instruction="You have a cat.",
        message="Do you have a cat or a dog?",
        history=(("Hi.", "I like cheese."),),
        candidates=("I have a cat.", "Any dog?", "I like cheese."),
        progress=0.25,
    )
    features = HashedWords(3, buckets=4)
    row = features(scene)
    assert (features.shared, features.each, row.shape) == (9, 12, (9 + 3 * 12,))
    assert row[0] == 0.25
    fallen = {zlib.crc32(word) % 4 for word in (b"you", b"have", b"a", b"cat")}
    assert set(np.flatnonzero(row[1:5])) == fallen
    blocks = row[9:].reshape(3, 12)
    assert set(np.flatnonzero(blocks[1, :4])) == set(hashed("any dog", 4).tolist())
    # in_persona, like_persona, spread, in_message, covers_message, repeats, length, question
    np.testing.assert_allclose(blocks[0, 4:], [1, 3 / 4, 1 / 8, 1, 1 / 2, 1 / 6, 4 / 60, 0], rtol=1e-6)
    np.testing.assert_allclose(blocks[1, 4:], [0, 0, 0, 1, 1 / 2, 0, 2 / 60, 1], rtol=1e-6)
    np.testing.assert_allclose(blocks[2, 4:], [0, 0, 0, 0, 0, 1, 3 / 60, 0], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(domain=st.sampled_from(DOMAINS), n=st.integers(2, 12), seed=st.integers(0, 2**32 - 1), turns=st.integers(0, 6))
def test_the_bank_s_replies_differ(domain: str, n: int, seed: int, turns: int) -> None:
    env = PersonaChatEnv(domain)
    env.reset(seed=seed)
    bank, rng = DomainBank(domain, n), np.random.default_rng(seed)
    for turn in range(turns + 1):
        assert env._conversation is not None
        replies = bank(env._conversation, rng)
        assert len(set(replies)) == n
        if turn < turns:
            env.step(replies[0])


def test_the_bank_draws_kinds_by_the_domain_s_mixture_and_their_place_means_nothing() -> None:
    env = PersonaChatEnv("chatting")
    env.reset(seed=0)
    talk, read, rng = env._conversation, reader("chatting"), np.random.default_rng(0)
    assert talk is not None
    bank, places, n = DomainBank("chatting", 2), Counter[int](), 1000
    for _ in range(n):
        for place, reply in enumerate(bank(talk, rng)):
            conversation = talk.add("policy", reply)
            if read.track(conversation).readings[-1].kind == "truth":
                places[place] += 1
    mix = load("chatting").mix_in("open")
    second = sum(p * mix["truth"] / (1 - p) for kind, p in mix.items() if kind != "truth")
    assert sum(places.values()) / n == pytest.approx(mix["truth"] + second, abs=0.05)
    assert places[0] / sum(places.values()) == pytest.approx(0.5, abs=0.06)


def test_a_line_that_asks_for_nothing_known_is_answered_with_some_fact() -> None:
    talk = Conversation(personas("chatting", "train")[0]).add("partner", "Lovely weather, is it not?")
    replies = DomainBank("chatting", 4)(talk, np.random.default_rng(0))
    assert len(set(replies)) == 4


def test_specs_recreate_it_even_through_json() -> None:
    wrapped = select("therapy", candidates=3, features_options={"buckets": 8})
    registered = gym.make("ppg_gym:ReplySelection-v0", domain="therapy", candidates=3, features_options={"buckets": 8})
    expected = rollout(wrapped, 1)
    for env in (wrapped, registered):
        assert env.spec is not None
        for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
            again = gym.make(spec)
            assert data_equivalence(rollout(again, 1), expected)
            assert str(again).count("ReplySelection<") == 1


def test_somebody_s_own_bank_around_somebody_s_own_environment() -> None:
    env = ReplySelection(Echo(), candidates=2, bank=propose)
    _, info = env.reset(seed=0)
    assert info["candidates"] == ("No 0.", "Be brief. Hello?")
    observation, reward, *_, info = env.step(np.int64(0))
    assert (reward, info["reply"], env.history) == (5.0, "No 0.", (("Hello?", "No 0."),))
    assert observation[0] == 0  # planned turns: nobody knows
    assert env._saved_kwargs["bank"] == f"{__name__}:propose"
    with pytest.raises(ValueError, match="expected 4 replies from the bank, got 2"):
        ReplySelection(Echo(), candidates=4, bank=propose).reset()


def test_vector_environments_carry_it() -> None:
    envs = gym.make_vec("ppg_gym:ReplySelection-v0", 2, "sync", domain="chatting")
    observations, _ = envs.reset(seed=[0, 1])
    assert observations.shape == (2, *select().observation_space.shape)
    _, rewards, *_, infos = envs.step(np.array([0, 1]))
    assert rewards.shape == (2,)
    assert all(isinstance(reply, str) for reply in infos["reply"])


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Verdict("timeout", None, "too late")
    monkeypatch.setattr(FactsJudge, "judge", lambda self, conversations: [failed for _ in conversations])


@pytest.mark.usefixtures("no_verdicts")
@pytest.mark.parametrize("on_failure", ["nan", "truncate"])
def test_an_unjudged_reply_never_becomes_a_number(on_failure: str) -> None:
    env = select(on_judge_failure=on_failure, max_failure_rate=1.0, disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(UnjudgedError, match=r"got none \(timeout: too late\).*retry more often"):
        env.step(np.int64(0))
    env = select(on_judge_failure=on_failure, max_failure_rate=1.0, on_unjudged="nan", disable_env_checker=True)
    env.reset(seed=0)
    _, reward, _, truncated, info = env.step(np.int64(0))
    assert math.isnan(reward)
    assert truncated == (on_failure == "truncate")
    assert info["verdict"]["score"] is None


def test_a_partner_that_never_opens_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ppg_gym.partners.Said("", "timeout")  # type: ignore[attr-defined]
    monkeypatch.setattr(Simulator, "open", lambda self, chosen, rngs: [(Conversation(p), said) for p in chosen])
    env = select(on_unjudged="nan", disable_env_checker=True)
    observation, info = env.reset(seed=0)
    assert info["candidates"] == ("",) * 4
    assert observation in env.observation_space
    _, reward, terminated, truncated, _ = env.step(np.int64(2))
    assert math.isnan(reward)
    assert (terminated, truncated) == (False, True)


class Wide:
    """Features outside the space."""

    shared, each = 1, 0

    def __init__(self, candidates: int) -> None:
        self.n = candidates

    def __call__(self, scene: Scene) -> Any:
        return np.array([2.0], dtype=np.float32)


def test_features_of_your_own_are_checked() -> None:
    env = ReplySelection(gym.make("PersonaChat-v0"), features=Wide)
    with pytest.raises(ValueError, match=r"expected features of shape \(1,\) in \[0, 1\]"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "integer of at least 2, got 1"),
        ({"candidates": 13}, "at most 12 candidates from the bank of 'chatting', got 13"),
        ({"bank": "domian"}, "expected bank to be 'domain', a callable or its name .* got 'domian'"),
        ({"bank": "ppg_gym:nothing"}, "got 'ppg_gym:nothing'; module 'ppg_gym' has no attribute"),
        ({"bank": "ppg_gym:__name__"}, "to be callable, got str"),
        ({"features": "words2"}, "expected features to be 'words', a callable"),
        ({"features_options": {"buckets": 0}}, "buckets to be a positive integer, got 0"),
        ({"on_unjudged": "zero"}, "on_unjudged out of raise, nan, got 'zero'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplySelection(gym.make("PersonaChat-v0"), **options)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="expected PersonaChat-v0 for the domain's bank, got Echo; pass bank="):
        ReplySelection(Echo())
    for wrapper in (ReplySelection, TranscriptObservation):
        with pytest.raises(ValueError, match="string actions, got Box"):
            wrapper(gym.make("CartPole-v1"))
    env = select()
    with pytest.raises(RuntimeError, match="call reset"):
        env.unwrapped.step("Hi.")
    env.reset(seed=0)
    for action in (4, -1, 0.5, "0", None):
        with pytest.raises(ValueError, match="integer from 0 to 3"):
            env.step(action)  # type: ignore[arg-type]
    prose = Persona("prose", "You are a quiet person.", domain="chatting")
    bank = DomainBank("chatting", 2)
    with pytest.raises(ValueError, match=r"got 'prose' without job, city, .*; pass bank="):
        bank(Conversation(prose).add("partner", "Hi."), np.random.default_rng(0))


def test_the_transcript_is_everything_that_was_said() -> None:
    env = TranscriptObservation(gym.make("PersonaChat-v0"))
    assert env.spec is not None
    first, info = env.reset(seed=0)
    instruction, opening = first.split("\n\n")
    assert opening.startswith("partner: ")
    shown, *_ = env.step("Fine.\npartner: I know.")
    head, new = shown.rsplit("\n", 1)
    assert head == f"{instruction}\n\n{opening}\nyou: Fine.\n    partner: I know."
    assert new.startswith("partner: ")
    assert "candidates" not in info
    for _ in range(7):
        last, _, terminated, *_ = env.step("I like tea.")
    assert terminated
    assert last.endswith("\nyou: I like tea.")  # nobody says more
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is different from the unwrapped version.*")
        check_env(env, skip_render_check=True)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.reset(seed=0)[0] == first
    with pytest.raises(ValueError, match=r"at most 10 characters, got .*; raise max_chars"):
        TranscriptObservation(gym.make("PersonaChat-v0"), max_chars=10).reset(seed=0)


def test_specs_are_plain_json() -> None:
    spec = select("education", features_options={"buckets": 8}).spec
    assert spec is not None
    (selection,) = (w for w in json.loads(spec.to_json())["additional_wrappers"] if w["name"] == "ReplySelection")
    assert selection["kwargs"]["features_options"] == {"buckets": 8}
