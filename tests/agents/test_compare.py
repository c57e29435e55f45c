"""The comparison: which runs fill which cells, what the intervals mean, and that a failed run stops no other."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppg_agents import config as configs
from ppg_agents import train as training
from ppg_agents.compare import engine, report
from ppg_agents.compare import plan as plans
from ppg_agents.compare import statistics as stats
from ppg_agents.compare.cell import Result, check, fill, from_json, results, to_json
from ppg_agents.compare.plan import Job, Plan, jobs
from ppg_agents.config import ConfigError
from ppg_agents.terminal.interrupt import Interrupted, Stop

TINY = {
    "batch": 2,
    "env": {"max_turns": 2},
    "evaluation": {"conversations": 3},
    "sampling": {"max_new_tokens": 4},
    "lora": {"rank": 2},
}


def test_one_run_fills_the_cells_of_all_sizes_when_the_learning_rate_is_constant() -> None:
    plan = Plan(
        domains=("education", "chatting"),
        agents=("ppg", "base", "sb3-dqn"),
        classes=("greedy", "1", "8", "full", "segment/3"),
        sizes=(64, 32),
        seeds=(3, 4),
        settings={"batch": 16},
    )
    made = jobs(plan, {"education": 10, "chatting": 8})
    names = [job.name for job in made if job.seed == 3 and job.domain == "chatting"]
    assert names == [  # 1-step is greedy, and 8 steps of 8 turns are full planning
        "chatting-ppg-greedy-s3",
        "chatting-ppg-8-step-s3",
        "chatting-ppg-segment-3-3-2-s3",
        "chatting-base-s3",
        "chatting-sb3-dqn-s3-n64",
        "chatting-sb3-dqn-s3-n32",
    ]
    config = plans.config_of(made[0])
    assert (config.iterations, config.evaluation.at, config.threads, config.schedule) == (4, (2, 4), 1, "constant")
    falling = jobs(replace(plan, settings={"batch": 16, "schedule": "linear"}), {"education": 10, "chatting": 8})
    assert [(job.sizes, job.config["iterations"]) for job in falling[:2]] == [((64,), 4), ((32,), 2)]
    assert len({job.name for job in falling}) == len(falling)
    assert from_json(to_json(made[0])) == made[0]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("sizes = [10]\n[settings]\nbatch = 16", r"multiples of batch = 16 of agent ppg, got \[10\]"),
        ("seed = [1]", r"unknown setting 'seed'; did you mean seeds\?"),
        ("seeds = [1, 1]", "none twice"),
        ('agents = ["pppo"]', "agents: expected an agent.* got 'pppo'; did you mean 'ppo'"),
        ('classes = ["segment:5,5"]\nsizes = [32]', r"classes: .*sum to.*"),
        ("[settings]\nseed = 3", r"settings.seed: the comparison sets it itself"),
        ("[agent_settings.pppo]\nbatch = 3", "expected settings of agents out of ppg, got 'pppo'"),
        ("[settings]\nlearning_rates = 3", "did you mean learning_rate"),
        ("[agent_settings.ppg]\nevaluation.seed = 3", "it must be the same for all"),
        ("[settings]\nevaluation.conversations = 0", "which compares nothing"),
    ],
)
def test_a_wrong_plan_is_an_error_that_names_it(tables: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(tables)
    with pytest.raises(ConfigError, match=message):
        jobs(plans.read(file), {"chatting": 8})


def job(method: str = "greedy", seed: int = 0, domain: str = "d") -> Job:
    return Job("ppg", method, domain, seed, (32,), {"schedule": "constant"})


def scored(rng: np.random.Generator, mean: float, seeds: int = 5, personas: int = 30) -> stats.Scores:
    """Scores with an effect of the seed, of the persona, and of both together, all of size 0.1."""
    effects = rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.1, (1, personas)) + rng.normal(0, 0.1, (seeds, personas))
    judged = rng.integers(1, 9, personas) * np.ones((seeds, 1))
    return stats.Scores(tuple(range(seeds)), (mean + effects) * judged, judged)


def test_the_interval_covers_what_it_should_when_seeds_and_personas_vary() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0.5 <= high for low, high in (stats.mean_interval(scored(rng, 0.5)) for _ in range(300))]
    assert 0.93 < np.mean(covered) <= 1


def test_a_resample_has_the_variance_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 1))
    one_persona = stats.Scores(tuple(range(6)), values, np.ones((6, 1)))
    means = stats.resampled(one_persona, stats.weights(6, 1, 200_000))
    assert np.var(means) == pytest.approx(np.var(values, ddof=1) / 6, rel=0.02)


def test_differences_are_paired_by_seed_and_persona() -> None:
    rng = np.random.default_rng(2)
    base = scored(rng, 0.5)
    shifted = replace(base, scores=base.scores + 0.02 * base.judged)  # far inside either interval
    gap = stats.difference(shifted, base)
    assert gap is not None
    assert gap.value == pytest.approx(0.02)
    half = 2.04 * (2 / (32 * 31)) ** 0.5  # the two added personas, one 1 above the rest and one 1 below
    assert gap.ci95 == pytest.approx((0.02 - half, 0.02 + half), abs=2e-3)
    apart = stats.difference(replace(base, scores=base.scores + 0.3 * base.judged), base)
    assert apart is not None
    assert apart.p < 0.001
    same = stats.difference(base, base)
    assert same is not None
    assert same.p == 1
    assert stats.difference(base, replace(base, seeds=(9, 10, 11, 12, 13))) is None
    noisy = [stats.difference(scored(rng, 0.5), scored(rng, 0.5)) for _ in range(200)]
    assert np.mean([gap.p < 0.05 for gap in noisy if gap]) < 0.1


def test_equal_methods_are_hardly_ever_called_different_and_few_seeds_are_too_few_to_say() -> None:
    rng = np.random.default_rng(3)
    turns = np.ones((5, 9))
    seeds = [stats.Scores((0, 1, 2, 3, 4), rng.normal(0.5, 0.3, (5, 1)) * turns, turns) for _ in range(600)]
    found = [stats.difference(a, b) for a, b in zip(seeds[::2], seeds[1::2], strict=True)]
    assert np.mean([gap.p < 0.05 for gap in found if gap]) < 0.06
    three = stats.difference(stats.only(seeds[0], (0, 1, 2)), seeds[1])
    assert three is not None
    assert np.isnan([*three.ci95, three.p]).all()
    assert np.isnan(stats.mean_interval(stats.only(seeds[0], (0,)))).all()
    nothing = stats.Scores((0,), np.zeros((1, 9)), np.zeros((1, 9)))
    assert np.isnan(stats.mean_interval(nothing)).all()
    assert stats.difference(nothing, seeds[0]) is None


def test_residuals_of_a_figure_are_paired() -> None:
    rng = np.random.default_rng(4)
    base = scored(rng, 0.4)
    methods = [replace(base, scores=base.scores + shift * base.judged) for shift in (0.0, 0.1, 0.2)]
    for (low, high), expected in zip(stats.residual_intervals(methods), (-0.1, 0.0, 0.1), strict=True):
        assert low < expected < high
        assert high - low < 0.3  # the effects that all share are gone, the added personas remain


def test_holm_against_a_hand_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []
    assert stats.holm([0.02, np.nan, 0.01]) == pytest.approx([0.04, np.nan, 0.03], nan_ok=True)


def evaluation(mean: float, personas: int = 40) -> dict[str, Any]:
    table = {f"p{i}": {"scores": [mean + 0.01 * (i % 3), 0.0], "judged": [1.0, 0.0]} for i in range(personas)}
    return {"persona_consistency": mean, "reachable": 0.9, "personas": table}


def test_the_table_ranks_tests_and_names_what_failed(tmp_path: Path) -> None:
    cells = [
        Result(job(method, seed), 32, evaluation(mean + 0.001 * seed), 100 + seed, 2.0)
        for method, mean in (("greedy", 0.3), ("full", 0.5), ("3-step", 0.5))
        for seed in range(5)
    ]
    rows = report.write(cells, {"d-ppg-2-step-s0": "exit code 1: no luck"}, tmp_path)
    assert [row.method for row in rows] == ["full", "3-step", "greedy"]
    assert [row.verdict for row in rows] == ["best", "undecided", "worse"]
    assert rows[2].to_best is not None
    assert rows[2].to_best.value == pytest.approx(-0.2)
    assert rows[0].judged_turns == 102
    text = (tmp_path / "results.md").read_text()
    assert "- d-ppg-2-step-s0: exit code 1: no luck" in text
    assert "| d | 32 | greedy | 0.31" in text
    assert "| d | 32 |\n|---|---|\n| full | **0.51" in text
    assert "| 3-step | 0.51" in text
    assert "° [" in text
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["verdict"] for row in read] == ["best", "undecided", "worse"]
    assert float(read[2]["to_best"]) == pytest.approx(-0.2)
    assert (tmp_path / "results.png").stat().st_size > 5_000


def test_a_method_that_shares_no_seed_with_the_best_is_undecided() -> None:
    cells = [Result(job("full", 0), 32, evaluation(0.5), 1, 1.0), Result(job("greedy", 1), 32, evaluation(0.3), 1, 1.0)]
    assert [(row.method, row.verdict, row.to_best) for row in report.rows(cells)] == [
        ("full", "best", None),
        ("greedy", "undecided", None),
    ]


def test_a_method_is_not_better_for_the_seeds_that_it_lost() -> None:
    means = {"a": (0.2, 0.2, 0.2, 0.2, 0.95), "b": (None, None, None, None, 0.9)}
    cells = [
        Result(job(name, seed), 32, evaluation(mean), 1, 1.0)
        for name, found in means.items()
        for seed, mean in enumerate(found)
        if mean is not None
    ]
    rows = report.rows(cells)
    assert [(row.method, row.verdict, row.seeds) for row in rows] == [("a", "best", 5), ("b", "undecided", 1)]
    text = report.to_markdown(rows)
    assert "| b | 0.910 (too few to say) | 1 | -0.050 (too few to say) | – | undecided |" in text
    assert list(csv.DictReader(io.StringIO(report.to_csv(rows))))[1]["low"] == ""


def test_a_method_without_a_judged_turn_is_last() -> None:
    unjudged = {"persona_consistency": None, "reachable": None, "personas": {"p0": {"scores": [0.0], "judged": [0.0]}}}
    cells = [Result(job("a", 0), 32, unjudged, 1, 1.0), Result(job("b", 0), 32, evaluation(0.3), 1, 1.0)]
    assert [(row.method, row.verdict) for row in report.rows(cells)] == [("b", "best"), ("a", "undecided")]


def test_what_a_stopped_or_finished_run_says_is_forgotten(tmp_path: Path) -> None:
    run = tiny_jobs((2,))[0]
    folder = engine.folder_of(run, tmp_path)
    note = folder.with_suffix(".failed.txt")
    note.parent.mkdir(parents=True)
    note.write_text("exit code 1: no luck\n")
    assert engine.failure(run, tmp_path) == "exit code 1: no luck"
    fill(run, folder)
    assert engine.failure(run, tmp_path) is None
    fill(tiny_jobs((6,))[0], folder)
    with pytest.raises(ConfigError, match=r"evaluated at or has yet to come to, got \[4\]; choose another --out"):
        check(tiny_jobs((4, 6))[0], folder)


def tiny_jobs(sizes: tuple[int, ...] = (2, 4), classes: tuple[str, ...] = ("greedy",)) -> list[Job]:
    return jobs(Plan(classes=classes, sizes=sizes, seeds=(0,), settings=TINY), {"chatting": 2})


def test_a_failed_run_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    good = tiny_jobs((2,))[0]
    bad = replace(good, agent="ppgg", config={**good.config, "agent": "ppgg", "model": "/no/such/folder"})
    heard: dict[str, str | None] = {}
    engine.run_here([bad, good], tmp_path, 2, lambda job, why: heard.update({job.name: why}))
    assert heard[good.name] is None
    assert "/no/such/folder" in str(heard[bad.name])
    assert "/no/such/folder" in str(engine.failure(bad, tmp_path))
    assert engine.missing([bad, good], tmp_path) == [bad]


def test_a_nested_cell_is_the_short_run_and_a_longer_plan_goes_on_with_it(tmp_path: Path) -> None:
    nested, short, longer = tiny_jobs((2, 4))[0], tiny_jobs((2,))[0], tiny_jobs((2, 4, 6))[0]
    fill(nested, tmp_path / "nested")
    found = results(nested, tmp_path / "nested")
    assert [(result.size, result.judged_turns) for result in found] == [(2, 4), (4, 8)]
    fill(short, tmp_path / "short")
    assert results(short, tmp_path / "short")[0].evaluation == found[0].evaluation
    assert engine.folder_of(longer, tmp_path) == engine.folder_of(nested, tmp_path)
    fill(longer, tmp_path / "nested")
    more = results(longer, tmp_path / "nested")
    assert [result.size for result in more] == [2, 4, 6]
    assert [result.evaluation for result in more[:2]] == [result.evaluation for result in found]
    with pytest.raises(ConfigError, match=r"learning_rate: was 0.003, got 1.0; choose another --out"):
        check(replace(longer, config={**longer.config, "learning_rate": 1.0}), tmp_path / "nested")
    check(longer, tmp_path / "nested")
    with pytest.raises(ConfigError, match=r"learning_rate: was 0.003, got 1.0"):
        fill(replace(longer, config={**longer.config, "learning_rate": 1.0}), tmp_path / "nested")
    base = Job("base", "", "chatting", 0, (2, 4), configs.to_dict(configs.from_dict({**TINY, "iterations": 1})))
    untrained = results(base, tmp_path / "nested")
    assert [(result.size, result.judged_turns, result.evaluation["iteration"]) for result in untrained] == [
        (2, 0, 0),
        (4, 0, 0),
    ]


def test_an_evaluation_that_was_stopped_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = tiny_jobs((2, 4))[0], training.held_out

    def stop(task: Any, where: Any, when: str, *rest: Any) -> None:
        if when == "iteration 1":
            raise Stop
        real(task, where, when, *rest)

    monkeypatch.setattr(training, "held_out", stop)
    with pytest.raises(Interrupted):
        fill(run, tmp_path / "run")
    monkeypatch.undo()
    fill(run, tmp_path / "run")
    assert [result.size for result in results(run, tmp_path / "run")] == [2, 4]


def test_ray_runs_what_processes_run(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    wanted = tiny_jobs((2,))[0]
    heard: dict[str, str | None] = {}
    engine.run_on_ray([wanted], tmp_path, 1, lambda job, why: heard.update({job.name: why}))
    assert heard == {wanted.name: None}
    assert results(wanted, engine.folder_of(wanted, tmp_path))[0].evaluation["conversations"] == 3
