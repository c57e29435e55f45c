"""Runs, pictures, pages and comparisons are named by where and by whom: an own environment and an agent as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from matplotlib.figure import Figure

from ppg_agents import config as configs
from ppg_agents.compare.cell import turns_of
from ppg_agents.compare.plan import Plan, jobs
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.inspect.page import data, facts
from ppg_agents.inspect.report import write_report
from ppg_agents.inspect.source import read
from ppg_agents.rollout.environment import keyword_arguments
from ppg_agents.runs import Run, default_folder
from ppg_agents.runs.curve import curve

OWN = {"env": {"id": "my_module:MyEnv-v0"}}


@pytest.mark.parametrize(
    ("settings", "folder", "title", "about"),
    [
        ({}, "chatting-full-seed-0", "chatting, policy class: full, seed 0", ["chatting", "full"]),
        (
            {"domain": "therapy", "agent": "grpo", "group": 2, "policy_class": "k-step", "lookahead": 3},
            "therapy-grpo-3-step-seed-0",
            "therapy, grpo, policy class: 3-step, seed 0",
            ["therapy", "grpo", "3-step"],
        ),
        (
            {"agent": "reinforce++"},
            "chatting-reinforce++-full-seed-0",
            "chatting, reinforce++, policy class: full, seed 0",
            ["chatting", "reinforce++", "full"],
        ),
        (
            {**OWN, "agent": "best_half:BestHalf"},
            "MyEnv-v0-BestHalf-full-seed-0",
            "MyEnv-v0, BestHalf, policy class: full, seed 0",
            ["MyEnv-v0", "BestHalf", "full"],
        ),
        (
            {"agent": "sft", "offline": {"files": ["logged.json"]}},
            "offline-sft-full-seed-0",
            "offline, sft, policy class: full, seed 0",
            ["logged.json", "sft", "no credit is read"],
        ),
    ],
)
def test_a_run_is_named_by_where_and_by_whom(
    settings: dict[str, Any],
    folder: str,
    title: str,
    about: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run.create(default_folder(configs.from_dict(settings), tmp_path), configs.from_dict(settings))
    assert run.folder.name == folder
    run.append_metrics({"iteration": 1, "consistency": 0.5, "weighted_token_log_prob": -1.0})
    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **style: titles.append(text))
    curve(run)
    assert titles == [title]
    assert data(read(run.folder, 10))["about"] == about


def test_page_and_report_name_the_environment_and_no_judge_that_it_does_not_have(tmp_path: Path) -> None:
    shown = dict(facts(configs.from_dict(OWN)))
    assert shown["Environment"] == "MyEnv-v0"
    assert not {"Domain", "Partner", "Judge"} & set(shown)
    run = Run.create(tmp_path / "run", configs.from_dict(OWN))
    report = write_report(run.folder).read_text(encoding="utf-8")
    assert "| Environment | MyEnv-v0 |" in report
    assert "chatting" not in report


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"domain": "therapy"}, "domain: "),
        ({"env": {"judge": "llm", "judge_options": {"model": "m"}}}, "env.judge, env.judge_options: "),
    ],
)
def test_a_setting_that_the_environment_would_not_read_is_refused(settings: dict[str, Any], named: str) -> None:
    tables = {**settings, "env": {**OWN["env"], **settings.get("env", {})}}
    with pytest.raises(ConfigError, match=f"^{named}expected only with PersonaChat-v0, got env.id = 'my_module:MyEnv"):
        configs.from_dict(tables)
    with pytest.raises(ConfigError, match=r"personas: expected train or held-out with env\.id = 'my_module:MyEnv-v0'"):
        keyword_arguments(configs.from_dict(OWN), "people.jsonl")


class Three(gym.Env[dict[str, str], str]):
    """Says itself how long it is."""

    max_turns = 3
    action_space = gym.spaces.Text(9)
    observation_space = gym.spaces.Dict({"instruction": action_space, "message": action_space})


def test_a_comparison_is_named_by_the_environment() -> None:
    if "Three-v0" not in gym.registry:
        gym.register("Three-v0", entry_point=Three)
    plan = Plan(agents=("ppg", "grpo"), classes=("2", "full"), seeds=(0,), settings={"group": 2, "env.id": "Three-v0"})
    turns = turns_of(plan)
    assert turns == {"Three-v0": 3}
    made = jobs(plan, turns)
    assert {job.domain for job in made} == {"Three-v0"}
    names = ["Three-v0-ppg-2-step-s0", "Three-v0-ppg-full-s0", "Three-v0-grpo-2-step-s0", "Three-v0-grpo-full-s0"]
    assert [job.name for job in made] == names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ("therapy",)}, "domain: expected only with PersonaChat-v0"),
        ({"agents": ("sb3-ppo",)}, "agents: 'sb3-ppo' chooses among replies of PersonaChat-v0, got env.id = 'my_mod"),
    ],
)
def test_a_comparison_that_another_environment_cannot_have_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs(Plan(settings=OWN, **wrong), {"MyEnv-v0": 3})
    with pytest.raises(ConfigError, match=r"agent_settings.ppg.env.id: it must be the same for all"):
        Plan(agent_settings={"ppg": OWN})


def test_the_default_names_are_those_of_persona_chat_with_and_without_its_module() -> None:
    for name in ("ppg_gym:PersonaChat-v0", "PersonaChat-v0"):
        config = configs.from_dict({"domain": "therapy", "env": {"id": name}})
        assert (config.world, config.subject, config.learner) == ("therapy", "therapy", "")
    assert TrainConfig().world == "chatting"
