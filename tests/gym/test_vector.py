"""Many conversations at once: through every vector environment, and always those of N single environments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.env import PersonaChatEnv
from ppg_gym.judges import JudgeError
from ppg_gym.vector import PersonaChatVectorEnv

NAME, N = "PersonaChat-v0", 5
SEEDS = [11, 12, 11, 13, 14]


class StubJudge:
    """Gives every conversation the verdict at its place in the batch."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = verdicts

    def check(self, persona: Persona) -> None:
        pass

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        return list(self.verdicts[: len(conversations)])


def script(domain: str, seeds: Sequence[int], turns: int | None = None) -> tuple[list[list[str]], list[list[Any]]]:
    """Return what N single environments are told and what they show, up to the end of each."""
    told, shown = [], []
    for i, seed in enumerate(seeds):
        env, rng = PersonaChatEnv(domain, max_turns=turns), np.random.default_rng([seed, i])
        kinds, read = list(load(domain).mix), reader(domain)
        steps: list[Any] = [env.reset(seed=seed)]
        replies: list[str] = []
        while len(steps) == 1 or not steps[-1][2]:
            assert env._conversation is not None
            replies.append(say(read, kinds[int(rng.integers(len(kinds)))], env._conversation, rng))
            steps.append(env.step(replies[-1]))
        told.append(replies)
        shown.append(steps)
    return told, shown


def check_row(step: tuple[Any, ...], single: tuple[Any, ...], row: int) -> None:
    """Compare one row of a vector step with a single environment's step."""
    observations, rewards, terminated, truncated, infos = step
    observation, reward, end, cut, info = single
    assert {key: column[row] for key, column in observations.items()} == observation
    assert (rewards[row], terminated[row], truncated[row]) == (reward, end, cut)
    assert infos["turn"][row] == info["turn"]
    assert infos["persona"][row] == info["persona"]
    assert {key: infos["verdict"][key][row] for key in info["verdict"]} == info["verdict"]
    assert infos["partner"]["status"][row] == "ok"


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("mode", ["vector_entry_point", "sync", "async"])
def test_the_same_seeds_give_the_conversations_of_single_environments(mode: str, domain: str) -> None:
    told, shown = script(domain, SEEDS)
    extra: dict[str, Any] = {"vector_kwargs": {"shared_memory": False}} if mode == "async" else {}
    if mode != "vector_entry_point":
        extra.setdefault("vector_kwargs", {})["autoreset_mode"] = AutoresetMode.DISABLED
    envs = gym.make_vec(NAME, num_envs=N, vectorization_mode=mode, domain=domain, **extra)
    try:
        observations, infos = envs.reset(seed=SEEDS)
        for i in range(N):
            assert {key: column[i] for key, column in observations.items()} == shown[i][0][0]
            started = {key: infos[key][i] for key in ("turn", "persona", "reachable")}
            assert started | {"partner": {"status": infos["partner"]["status"][i]}} == shown[i][0][1]
        for t in range(load(domain).turns):
            step = envs.step(tuple(replies[t] for replies in told))
            for i in range(N):
                check_row(step, shown[i][t + 1], i)
        assert step[2].all()
    finally:
        envs.close()


def test_make_vec_takes_the_vector_environment_by_default() -> None:
    envs = gym.make_vec(NAME, num_envs=3, domain="therapy")
    assert isinstance(envs, PersonaChatVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    observations, _ = envs.reset(seed=1)
    assert envs.observation_space.contains(observations)
    assert envs.action_space.contains(("a", "b", "c"))
    assert envs.spec is not None
    assert gym.make_vec(envs.spec).num_envs == 3


def test_shared_memory_fails_loudly() -> None:
    with pytest.raises((TypeError, ValueError), match="shared_memory"):
        gym.make_vec(NAME, num_envs=2, vectorization_mode="async")


def test_one_seed_counts_up_and_a_repeated_seed_repeats() -> None:
    envs, listed = PersonaChatVectorEnv(4), PersonaChatVectorEnv(4)
    assert _texts(envs.reset(seed=5)) == _texts(listed.reset(seed=[5, 6, 7, 8]))
    group = envs.reset(seed=[9, 9, 10, 10])[1]["persona"]
    assert group[0] == group[1] != group[2] == group[3]
    assert _texts(envs.reset(seed=[9, 9, None, None]))[0] == _texts(envs.reset(seed=[9, 1, 1, 1]))[0]


def _texts(reset: tuple[dict[str, tuple[str, ...]], dict[str, Any]]) -> list[tuple[str, str]]:
    observations = reset[0]
    return list(zip(observations["instruction"], observations["message"], strict=True))


def test_what_has_ended_stays_ended_until_its_mask_is_set() -> None:
    envs = PersonaChatVectorEnv(3, max_turns=2)
    envs.reset(seed=0)
    envs.step(["Hi."] * 3)
    envs.reset(options={"reset_mask": np.array([False, True, False])})  # the middle one begins anew
    _, rewards, terminated, _, _ = envs.step(["Well."] * 3)
    assert terminated.tolist() == [True, False, True]
    observations, rewards, terminated, truncated, infos = envs.step(["", "So.", ""])
    assert observations["message"] == ("", "", "")
    assert rewards[[0, 2]].tolist() == [0.0, 0.0]
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert infos["_turn"].tolist() == [False, True, False]
    assert infos["verdict"]["_score"].tolist() == [False, True, False]
    assert envs.step(["x"] * 3)[4] == {}


def test_a_masked_reset_leaves_the_others_alone_and_its_argument_as_it_was() -> None:
    told, shown = script("chatting", [3, 4])
    envs = PersonaChatVectorEnv(2)
    envs.reset(seed=[99, 4])
    envs.step(["Hi.", told[1][0]])
    mask = np.array([True, False])
    options = {"reset_mask": mask}
    observations, infos = envs.reset(seed=[3, None], options=options)
    assert options == {"reset_mask": mask}
    assert observations["message"] == (shown[0][0][0]["message"], shown[1][1][0]["message"])
    assert infos["_persona"].tolist() == [True, False]
    for t in range(5):
        step = envs.step([told[0][t], told[1][t + 1]])
        check_row(step, shown[0][t + 1], 0)
        check_row(step, shown[1][t + 2], 1)


def test_personas_by_option_one_for_all_or_one_each() -> None:
    one, two = (p.id for p in personas("chatting", "train")[:2])
    envs = PersonaChatVectorEnv(2)
    assert envs.reset(options={"persona": one})[1]["persona"].tolist() == [one, one]
    assert envs.reset(options={"persona": [two, one]})[1]["persona"].tolist() == [two, one]


def test_same_step_begins_anew_at_once_and_keeps_the_end() -> None:
    told, shown = script("chatting", [1, 2], turns=2)
    envs = gym.make_vec(NAME, num_envs=2, max_turns=2, autoreset_mode="same-step")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs.reset(seed=[1, 2])
    envs.step([told[0][0], told[1][0]])
    observations, rewards, terminated, _, infos = envs.step([told[0][1], told[1][1]])
    assert terminated.all()
    for i in range(2):
        last = shown[i][2]
        assert infos["final_obs"][i] == last[0]
        assert rewards[i] == last[1] == infos["final_info"]["verdict"]["score"][i]
        assert infos["final_info"]["turn"][i] == 2
        assert infos["turn"][i] == 0
        assert observations["message"][i] not in ("", last[0]["message"])
        assert infos["persona"][i] in {p.id for p in personas("chatting", "train")}
    assert envs.step(["Hi.", "Hi."])[4]["turn"].tolist() == [1, 1]


def test_same_step_with_some_ended_keeps_both_kinds_of_info() -> None:
    envs = PersonaChatVectorEnv(2, autoreset_mode="same-step", max_turns=2)
    envs.reset(seed=0)
    envs.step(["Hi.", "Hi."])
    envs.reset(options={"reset_mask": np.array([False, True])})
    infos = envs.step(["Well.", "Hi."])[4]
    assert infos["turn"].tolist() == [0, 1]
    assert infos["_turn"].tolist() == [True, True]
    assert infos["_final_info"].tolist() == [True, False]
    assert infos["verdict"]["_kind"].tolist() == [False, True]
    assert infos["_reachable"].tolist() == [True, False]
    assert (infos["persona"] != None).all()  # noqa: E711 (elementwise)


def test_max_episode_steps_truncates() -> None:
    envs = gym.make_vec(NAME, num_envs=2, max_episode_steps=2)
    envs.reset(seed=0)
    assert not envs.step(["Hi."] * 2)[3].any()
    _, _, terminated, truncated, _ = envs.step(["Hi."] * 2)
    assert (terminated.any(), truncated.all()) == (False, True)
    both = PersonaChatVectorEnv(1, max_episode_steps=2, max_turns=2)
    both.reset(seed=0)
    both.step(["Hi."])
    assert [flag.tolist() for flag in both.step(["Hi."])[2:4]] == [[True], [False]]


LOST, GOOD = Verdict("timeout", None, "No answer."), Verdict("scored", 0.5, "Fine.", "truth")


@pytest.mark.parametrize("verdicts", [(LOST, GOOD), (GOOD, LOST), (LOST, LOST)])
def test_a_lost_judge_is_nan_and_none(verdicts: tuple[Verdict, ...]) -> None:
    for mode in ("nan", "truncate"):
        envs = PersonaChatVectorEnv(2, on_judge_failure=mode)
        envs.simulator.judge = StubJudge(*verdicts)
        envs.reset(seed=0)
        _, rewards, terminated, truncated, infos = envs.step(["Hi.", "Hi."])
        for i, verdict in enumerate(verdicts):
            assert infos["verdict"]["status"][i] == verdict.status
            if verdict.score is None:
                assert math.isnan(rewards[i])
                assert infos["verdict"]["score"][i] is None
            else:
                assert rewards[i] == infos["verdict"]["score"][i] == verdict.score
            assert truncated[i] == (mode == "truncate" and verdict.score is None)
        assert not terminated.any()


def test_a_lost_judge_raises_by_default() -> None:
    envs = PersonaChatVectorEnv(2)
    envs.simulator.judge = StubJudge(GOOD, LOST)
    envs.reset(seed=0)
    with pytest.raises(JudgeError, match="got status 'timeout'"):
        envs.step(["Hi.", "Hi."])


def test_render_is_one_text_per_conversation() -> None:
    envs: VectorEnv[Any, Any, Any] = gym.make_vec(NAME, num_envs=2, render_mode="ansi")
    envs.reset(seed=3)
    envs.step(["Hello there.", "Good day."])
    first, second = envs.render()
    assert "Hello there." in first
    assert "Good day." in second
    assert PersonaChatVectorEnv(2).render() is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "expected num_envs to be a positive integer, got 0"),
        ({"autoreset_mode": "next-step"}, "expected autoreset_mode out of disabled, same-step, got 'next-step'"),
        ({"domain": "chat"}, "expected a domain out of"),
    ],
)
def test_an_argument_that_is_none_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersonaChatVectorEnv(**kwargs)


def test_calls_of_the_wrong_size_or_order_are_refused() -> None:
    envs = PersonaChatVectorEnv(2)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        envs.step(["a", "b"])
    for options, message in (
        ({"reset_mask": np.ones(3, dtype=bool)}, r"expected reset_mask to be bool of shape \(2,\), got bool \(3,\)"),
        ({"reset_mask": np.ones(2)}, "got float64"),
        ({"persona": ["a"]}, "expected 2 personas, got 1"),
        ({"persona": "nobody"}, "expected the id of one of"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.reset(options=options)
    with pytest.raises(ValueError, match="expected 2 seeds, got 1"):
        envs.reset(seed=[1])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="expected 2 replies, got 1"):
        envs.step(["a"])
    with pytest.raises(ValueError, match="expected the action to be a str"):
        envs.step(["a", 3])  # type: ignore[list-item]


def test_a_first_reset_that_leaves_rows_out_asks_for_them() -> None:
    envs = PersonaChatVectorEnv(2)
    envs.reset(seed=0, options={"reset_mask": np.array([True, False])})
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        envs.step(["a", "b"])
