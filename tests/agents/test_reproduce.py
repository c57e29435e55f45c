"""Step-level evaluation against the rollout that it takes apart; the numbers of every figure from hand-made cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from click.testing import CliRunner, Result

from ppg_agents import config as configs
from ppg_agents.commands.reproduce import reproduce
from ppg_agents.compare import engine
from ppg_agents.compare.cell import finished
from ppg_agents.compare.plan import Job, config_of
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.evaluate import play, summarise
from ppg_agents.generation import Sample
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.reproduce import numbers, plans
from ppg_agents.reproduce.cell import measure, trained
from ppg_agents.reproduce.step_level import evaluate_steps
from ppg_agents.runs import Run, RunError

Make = Callable[..., Policy]
TURNS = 3


class Asking(gym.Env[dict[str, str], str]):
    """Asks three times, repeating what it heard; likes vowels; gives no verdict at one turn."""

    def __init__(self, unjudged: int = 0, max_turns: int = TURNS) -> None:
        text = gym.spaces.Text(500)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space = text
        self.unjudged, self.turns = unjudged, max_turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.persona = 0, f"p{int(self.np_random.integers(4))}"
        return self.seen("hi"), {"persona": self.persona}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        self.turn += 1
        score = sum(letter in "aeiou" for letter in action.lower()) / max(len(action), 1)
        reward = math.nan if self.turn == self.unjudged else score
        return self.seen(action[:5]), reward, self.turn >= self.turns, False, {"persona": self.persona}

    def seen(self, message: str) -> dict[str, str]:
        return {"instruction": f"Be {self.persona}.", "message": message}


@pytest.fixture
def config() -> TrainConfig:
    """Return the settings of the toy; 6 conversations in chunks of 4."""
    if "Asking-v0" not in gym.registry:
        gym.register("Asking-v0", entry_point=Asking)
    tables = {"batch": 4, "env": {"id": "Asking-v0", "max_turns": TURNS}, "evaluation": {"conversations": 6, "seed": 3}}
    return configs.from_dict({**tables, "sampling": {"max_new_tokens": 6}})


class Spy(HFSampler):
    """Keeps the prompts that it was given."""

    def start(self, n: int) -> None:
        self.heard: list[tuple[int, ...]] = getattr(self, "heard", [])
        super().start(n)

    def reply(
        self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None = None
    ) -> list[Sample | None]:
        self.heard += [tuple(prompt) for prompt in prompts if prompt is not None]
        return super().reply(prompts, generator)


def test_the_base_after_itself_is_the_rollout_turn_by_turn(make_policy: Make, config: TrainConfig) -> None:
    """Same seeds, same draws: reading the history at once must give what speaking turn by turn gave."""
    policy, base = make_policy(), make_policy()
    rollout, _ = play(base, HFSampler(base, 6), config, personas="held-out", conversations=6, seed=3)
    told: list[int] = []
    found = evaluate_steps(policy, HFSampler(policy, 6), base, HFSampler(base, 6), config, done=told.append)
    whole = summarise(rollout)
    assert found.personas.keys() == whole.personas.keys()
    for name, row in found.personas.items():
        assert row["scores"] == pytest.approx(whole.personas[name]["scores"])
        assert row["judged"] == whole.personas[name]["judged"]
    assert found.per_turn == pytest.approx(whole.per_turn)
    assert (found.conversations, found.judge_failures, told[-1]) == (6 * TURNS, 0, 6 * TURNS)


def test_the_policy_reads_the_very_tokens_of_the_history(make_policy: Make, config: TrainConfig) -> None:
    """Whoever is evaluated gets the same histories, replies that were cut included."""
    base, heard = make_policy(), []
    rollout, _ = play(base, HFSampler(base, 6), config, personas="held-out", conversations=6, seed=3)
    for seed in (1, 2):
        policy = make_policy(seed=seed)
        spy = Spy(policy, 6)
        spy.heard.clear()  # a sampler tries itself out when it is made
        evaluate_steps(policy, spy, base, HFSampler(base, 6), config)
        heard.append(spy.heard)
    assert heard[0] == heard[1]
    for turn in range(TURNS):
        rows = heard[0][8 * turn : 8 * turn + 6]  # two chunks of 4, the last 2 rows fill up the second
        assert rows == [tuple(t.token_ids()[: t.spans()[turn].start]) for t in rollout]


def test_what_is_not_judged_or_has_no_end_is_said(make_policy: Make, config: TrainConfig) -> None:
    policy = make_policy()
    sampler = HFSampler(policy, 6)
    unjudged = replace(config, env=replace(config.env, kwargs={"unjudged": 2}))
    found = evaluate_steps(policy, sampler, policy, HFSampler(policy, 6), unjudged)
    assert (found.judge_failures, found.judge_failure_rate) == (6, pytest.approx(1 / 3))
    assert math.isnan(found.per_turn[1])
    assert found.per_turn[2] > 0
    endless = replace(config, env=replace(config.env, max_turns=None))
    with pytest.raises(ConfigError, match=r"fixed length.*set env\.max_turns"):
        evaluate_steps(policy, sampler, policy, HFSampler(policy, 6), endless)


def evaluation(*per_turn: float, personas: int = 40, spread: float = 0.0) -> dict[str, Any]:
    """Return a held-out result with these means; personas differ by so much."""
    rows = {}
    for p in range(personas):
        aside = spread * (p - (personas - 1) / 2)
        rows[f"p{p}"] = {"scores": [value + aside for value in per_turn], "judged": [1.0] * len(per_turn)}
    mean = sum(per_turn) / len(per_turn)
    return {"persona_consistency": mean, "reachable": 1.0, "personas": rows, "conversations": personas}


def put_cells(job: Job, out: Path, value: Callable[[Job, int], dict[str, Any]]) -> None:
    """Leave a run as if it had been trained, measured and evaluated at all sizes."""
    run = Run.create(engine.folder_of(job, out), config_of(job))
    run.write_evaluation("before", {"iteration": 0, **value(job, 0)})
    for size in job.sizes:
        done = size // run.config.batch
        run.write_evaluation(f"iteration {done}", {"iteration": done, **value(job, size)})
    if isinstance(job, plans.Measured):
        put_measured(job, run, value(job, job.sizes[-1]))


def put_measured(job: plans.Measured, run: Run, found: dict[str, Any]) -> None:
    """Leave what is asked for beside a run."""
    if job.steps:
        run.write_json(plans.STEPS, {plans.after(job): found})
    if job.turns:
        run.write_json(plans.LENGTHS, {plans.after(job): {str(turns): found for turns in job.turns}})


LEVEL = {"greedy": 0.2, "2-step": 0.5, "3-step": 0.6, "4-step": 0.6, "5-step": 0.6, "full": 0.9, "auto": 0.4}


def level(job: Job, size: int) -> dict[str, Any]:
    """Greedy is flat, the others come to their level with size; the second turn is worth .1 more to 2-step."""
    value = 0.1 if not size else LEVEL.get(job.planning, 0.3)
    return evaluation(value, value + 0.1 * (job.planning == "2-step"), spread=0.001 * job.seed)


def drawn(figure: str, out: Path, *more: str) -> Result:
    done = CliRunner().invoke(reproduce, [figure, "--out", str(out), *more], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def numbers_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fill cells by hand in place of training; return the names of the runs that were started."""
    started: list[str] = []

    def fill(jobs: Sequence[Job], out: Path, workers: int, done: Callable[[Job, str | None], None]) -> None:
        for job in jobs:
            started.append(job.name)
            if job.agent == "ppo":
                folder = engine.folder_of(job, out)
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.with_suffix(f".{engine.FAILED}").write_text("exit code 1: no ppo here\n")
                done(job, "exit code 1: no ppo here")
                continue
            folder = engine.folder_of(job, out)
            if folder.exists():
                assert isinstance(job, plans.Measured)
                put_measured(job, Run.open(folder), level(job, job.sizes[-1]))
            else:
                put_cells(job, out, level)
            done(job, None)

    monkeypatch.setattr(engine, "run_here", fill)
    return started


def test_figures_share_their_runs_and_their_numbers_are_right(tmp_path: Path, runner: list[str]) -> None:
    few = ("--domain", "therapy", "--seeds", "5", "--sizes", "16,32")
    drawn("fig3", tmp_path, *few)
    assert len(runner) == 30  # K = 1..5 and full planning, five seeds
    rows = numbers_of(tmp_path / "fig3.csv")
    found = {(row["class"], int(row["conversations"])): row for row in rows}
    assert len(rows) == 13
    assert float(found["untrained", 0]["value"]) == pytest.approx(0.1)
    top = found["full", 32]
    assert (top["K"], top["seeds"], top["personas"], float(top["value"])) == (
        "8",
        "0 1 2 3 4",
        "40",
        pytest.approx(0.9),
    )
    assert float(top["low"]) < 0.9 < float(top["high"])

    drawn("fig4", tmp_path, *few)
    assert len(runner) == 30
    best = {row["class"]: row for row in numbers_of(tmp_path / "fig4.csv") if row["conversations"] == "32"}
    assert {name: float(row["share"]) for name, row in best.items()} == {**dict.fromkeys(best, 0.0), "full": 1.0}
    assert [name for name, row in best.items() if row["not_worse"] == "True"] == ["full"]

    drawn("fig2", tmp_path, *few)
    assert sorted(runner[30:]) == sorted(f"therapy-ppg-{name}-s{seed}" for name in list(LEVEL)[:5] for seed in range(5))
    rows = numbers_of(tmp_path / "fig2.csv")
    assert {row["level"] for row in rows} == {"rollout", "step"}
    # turn 1: .2 .5 .6 .6 .6, mean .5; turn 2: .2 .6 .6 .6 .6, mean .52; the largest is greedy's -.32
    turn = {(row["class"], int(row["turn"])): float(row["value"]) for row in rows if row["level"] == "step"}
    assert turn["greedy", 2] == pytest.approx(-1)
    assert turn["greedy", 1] == pytest.approx(-0.3 / 0.32, abs=1e-5)
    assert (turn["2-step", 1], turn["2-step", 2]) == (pytest.approx(0, abs=1e-5), pytest.approx(0.25, abs=1e-5))

    drawn("fig5", tmp_path, *few, "--turns", "10,20")
    rows = numbers_of(tmp_path / "fig5.csv")
    assert sorted({int(row["turns"]) for row in rows}) == [8, 10, 20]
    before = len(runner)
    drawn("fig5", tmp_path, *few, "--turns", "10,20")
    assert len(runner) == before
    for name in ("fig2", "fig3", "fig4", "fig5"):
        assert 10_000 < (tmp_path / f"{name}.png").stat().st_size < 300_000


def test_a_method_that_fails_is_in_the_table_as_failed(tmp_path: Path, runner: list[str]) -> None:
    done = drawn("table", tmp_path, "--domain", "chatting", "--seeds", "2", "--sizes", "16")
    assert done.return_value == 1
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| full | **0.900 (too few to say)** | best | – |" in text
    assert "| ppo full | failed | – | – |" in text
    assert "no ppo here" in text
    rows = {row["method"]: row for row in numbers_of(tmp_path / "table.csv")}
    assert rows["ppo full"]["verdict"] == "failed"
    assert (rows["greedy"]["verdict"], rows["greedy"]["low"], rows["greedy"]["p_holm"]) == ("undecided", "", "")
    assert float(rows["greedy"]["to_best"]) == pytest.approx(-0.7)


def test_a_tie_is_shared_and_unpaired_seeds_are_left_out(tmp_path: Path) -> None:
    request = plans.Request("fig4", ("therapy",), (16,), 2)
    jobs = [job for own in plans.planned(request, tmp_path).values() for job in own if job.planning[0] in "34"]
    for job in jobs[:3]:  # 3-step and 4-step with seed 0, 3-step alone with seed 1
        put_cells(job, tmp_path, level)
    table = numbers.standings(numbers.cells(jobs, tmp_path), {"therapy": 8})
    assert [(one.planning, one.share, one.seeds) for one in table] == [("3-step", 0.5, (0,)), ("4-step", 0.5, (0,))]
    assert all(one.not_worse for one in table)


def test_a_folder_of_other_runs_is_refused(tmp_path: Path) -> None:
    request = plans.Request("fig2", ("therapy",), (16,), 1)
    job = plans.planned(request, tmp_path)[tmp_path][0]
    assert isinstance(job, plans.Measured)
    put_cells(job, tmp_path, level)
    assert finished(job, engine.folder_of(job, tmp_path))
    with pytest.raises(ConfigError, match=r"model: was 'tiny', got 'other'; choose another --out"):
        plans.check([replace(job, config={**job.config, "model": "other"})], tmp_path)
    longer = replace(job, sizes=(16, 32))
    assert not finished(longer, engine.folder_of(longer, tmp_path))
    with pytest.raises(RunError, match=r"expected checkpoint 2 .* got none"):
        trained(longer, Run.open(engine.folder_of(longer, tmp_path)))
    with pytest.raises(ConfigError, match="the comparison sets it itself"):
        plans.plan(replace(request, settings={"seed": 3}))


def test_a_run_is_measured_on_its_own_checkpoint(
    tmp_path: Path, make_policy: Make, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell module and file format, on the toy: what is there is not measured again."""
    job = plans.Measured("ppg", "greedy", "toy", 0, (8,), configs.to_dict(config), steps=True, turns=(2, 4))
    run = Run.create(tmp_path / "run", config_of(job))
    run.save_checkpoint(2, make_policy().save)
    loaded: list[str] = []
    monkeypatch.setattr("ppg_agents.building.load_policy", lambda config: loaded.append("x") or make_policy(seed=5))
    measure(job, run.folder)
    assert job.measured(run.folder)
    assert [len(plans.measurements(job, run.folder, plans.LENGTHS)[n]["per_turn"]) for n in ("2", "4")] == [2, 4]
    assert len(plans.measurements(job, run.folder, plans.STEPS)["per_turn"]) == TURNS
    assert len(loaded) == 2
    measure(job, run.folder)
    assert len(loaded) == 2


def test_help_names_what_is_wrong(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(reproduce, ["fig3", "--turns", "10"])
    assert "belong to fig5" in wrong.output
    assert "expected numbers such as" in CliRunner().invoke(reproduce, ["fig3", "--sizes", "0,ten"]).output
    with pytest.raises(RunError, match="expected runs to draw fig3 from"):
        drawn("fig3", tmp_path, "--draw", "--domain", "therapy")
