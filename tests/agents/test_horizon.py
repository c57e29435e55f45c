"""The advisor against brute force on a small tabular MDP, its verdicts on problems with a known answer, its command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from ppg_agents import credit
from ppg_agents.commands.horizon import horizon, picture, table
from ppg_agents.horizon.advice import Verdict, _aligned, advise, own_mean_removed
from ppg_agents.horizon.choice import choose, default_candidates, distinct, masks
from ppg_agents.horizon.moments import estimate, products
from ppg_agents.horizon.sketch import Sketches

Array = NDArray[np.float64]
N, STATES, ACTIONS = 3, 2, 2
CLASSES = {"greedy": credit.greedy(N), "2-step": credit.k_step(N, 2), "full": credit.full(N)}
REWARD_SETS = {"greedy": [{0}, {1}, {2}], "2-step": [{0, 1}, {1, 2}, {2}], "full": [{0, 1, 2}, {1, 2}, {2}]}


class MDP:
    """All paths of a random MDP with a softmax policy: probability, score gradient per turn, reward per turn."""

    def __init__(self, seed: int = 0, off_policy: bool = False) -> None:
        rng = np.random.default_rng(seed)
        start, move = rng.dirichlet(np.ones(STATES)), rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
        reward = rng.random((N, STATES, ACTIONS))
        scored = rng.dirichlet(np.ones(ACTIONS), (N, STATES))
        played = rng.dirichlet(np.ones(ACTIONS), (N, STATES)) if off_policy else scored
        steps = list(itertools.product(range(STATES), range(ACTIONS)))
        paths = list(itertools.product(steps, repeat=N))
        self.probability = np.ones(len(paths))
        self.scores = np.zeros((len(paths), N, N, STATES, ACTIONS))
        self.rewards = np.zeros((len(paths), N))
        for i, path in enumerate(paths):
            for t, (s, a) in enumerate(path):
                arrive = start if t == 0 else move[path[t - 1]]
                self.probability[i] *= arrive[s] * played[t, s, a]
                self.scores[i, t, t, s] = np.eye(ACTIONS)[a] - scored[t, s]
                self.rewards[i, t] = reward[t, s, a]
        self.scores = self.scores.reshape(len(paths), N, -1)

    def contributions(self, label: str, centred: bool) -> Array:
        """Return ĝ of every path [paths, D], written out with the sets R_t; centred by the exact mean credit."""
        sets = REWARD_SETS[label]
        credits = np.stack([self.rewards[:, sorted(sets[t])].sum(1) for t in range(N)], axis=1)
        credits -= centred * (self.probability @ credits)
        return np.asarray(np.einsum("pt,ptd->pd", credits, self.scores))

    def sketches(self, rows: NDArray[np.int64], personas: list[str] | None = None) -> Sketches:
        names = tuple(personas or (f"p{i:04d}" for i in range(len(rows))))
        valid = np.ones((len(rows), N), dtype=np.bool_)
        return Sketches(self.scores[rows].astype(np.float32), self.rewards[rows], valid, names, 12, 0)


def test_without_baseline_the_products_are_the_enumerated_moments() -> None:
    """Every path once, weighted by its probability; pairs of a path with itself, left out, are put back."""
    mdp = MDP()
    p = mdp.probability
    found = products(mdp.sketches(np.arange(len(p))), list(CLASSES.values()), baseline="none")
    full = mdp.contributions("full", False)
    for c, label in enumerate(CLASSES):
        g = mdp.contributions(label, False)
        own = p @ found.with_self[c] @ p + (p**2) @ found.squares[c]
        both = p @ found.with_full[c] @ p + (p**2) @ (g * full).sum(1)
        assert own == pytest.approx(float((p @ g) @ (p @ g)), rel=1e-5)
        assert both == pytest.approx(float((p @ g) @ (p @ full)), rel=1e-5)
        assert p @ found.squares[c] == pytest.approx(float(p @ (g**2).sum(1)), rel=1e-5)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "logged"])
def test_with_baseline_mean_and_alignment_are_right_on_average(off_policy: bool) -> None:
    """Many small batches: estimates average to the exact values, also where E ∇ log π is not 0."""
    mdp, rng, size, repeats = MDP(1, off_policy), np.random.default_rng(0), 8, 500
    seen: dict[str, list[Array]] = {"mean_square": [], "alignment": []}
    for _ in range(repeats):
        rows = rng.choice(len(mdp.probability), size=size, p=mdp.probability)
        one = estimate(products(mdp.sketches(rows), list(CLASSES.values())))
        for name, values in seen.items():
            values.append(getattr(one, name))
    exact = {label: mdp.probability @ mdp.contributions(label, True) for label in CLASSES}
    truth = {
        "mean_square": [float(mu @ mu) for mu in exact.values()],
        "alignment": [float(mu @ exact["full"]) for mu in exact.values()],
    }
    for name, expected in truth.items():
        values = np.array(seen[name])
        error = 4.5 * values.std(0) / np.sqrt(repeats)
        assert (np.abs(values.mean(0) - expected) < error).all(), name
        assert (error < 0.5 * np.abs(expected)).all(), name  # the comparison says something


def test_the_variance_is_that_of_the_batch_gradient() -> None:
    """Total variance over B against the spread of many batches' gradients, each with its own leave-one-out baseline."""
    mdp, rng, size, repeats = MDP(1), np.random.default_rng(1), 32, 4000
    rows = rng.choice(len(mdp.probability), size=(repeats, size), p=mdp.probability)
    one = [estimate(products(mdp.sketches(r), list(CLASSES.values()))).variance for r in rows[:150]]
    for c, mask in enumerate(CLASSES.values()):
        value = mdp.rewards[rows] @ mask.T
        advantage = value - (value.sum(1, keepdims=True) - value) / (size - 1)
        gradients = np.einsum("rbt,rbtd->rd", advantage, mdp.scores[rows]) / size
        assert np.mean(one, axis=0)[c] / size == pytest.approx(float(gradients.var(0).sum()), rel=0.08)


def test_exact_progress_is_recovered_from_a_large_batch() -> None:
    mdp, size = MDP(2), 300
    rows = np.random.default_rng(0).choice(len(mdp.probability), size=size, p=mdp.probability)
    report = advise(mdp.sketches(rows), CLASSES, batch=16, resamples=300)
    mu = {label: mdp.probability @ mdp.contributions(label, True) for label in CLASSES}
    for one in report.classes:
        own = mu[one.label]
        trace = float(mdp.probability @ (mdp.contributions(one.label, True) ** 2).sum(1) - own @ own)
        progress = float(own @ mu["full"]) / np.sqrt(float(own @ own) + trace / 16)
        assert one.progress.low < progress < one.progress.high
        assert one.variance.low < trace < one.variance.high
        assert one.progress.high - one.progress.low < progress
    assert sum(v.value for v in report.lags) == pytest.approx(report.classes[-1].progress.value)


def synthetic(kind: str, size: int, seed: int = 0, n: int = 4) -> Sketches:
    """Scores ±1 in a dimension per turn; the reward is of the reply itself, of the first reply at the end, or noise."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(size, n))
    noise = rng.normal(size=(size, n))
    rewards = {"own": 0.5 * signs + noise, "delayed": noise * 0.3, "noise": noise}[kind]
    if kind == "delayed":
        rewards[:, -1] += signs[:, 0]
    vectors = (np.eye(n) * signs[:, :, None]).astype(np.float32)
    return Sketches(vectors, rewards, np.ones((size, n), np.bool_), tuple(map(str, range(size))), n, seed)


ALL_OF_4 = masks(distinct(default_candidates(4), 4), 4)


def test_verdicts_where_the_answer_is_known() -> None:
    own = advise(synthetic("own", 300), ALL_OF_4, batch=4, resamples=500)
    assert own.verdict == Verdict(4, "greedy", ("greedy",))
    assert own.classes[0].variance.high < own.classes[-1].variance.low
    assert own.reach == 1
    delayed = advise(synthetic("delayed", 300), ALL_OF_4, resamples=500)
    assert delayed.verdict == Verdict(300, "full", ("full",))
    low = [value.low for value in delayed.lags]
    assert low[3] > 0
    assert delayed.reach == 4
    assert all(value.low < 0.1 for value in delayed.lags[:3])


def test_faults_show_no_direction() -> None:
    """Every reward is .8: whoever was lost or not judged, no class has a gradient."""
    plain = synthetic("own", 12)
    valid = np.ones((12, 4), np.bool_)
    valid[0, 1:], valid[5, 2] = False, False
    found = replace(plain, rewards=np.where(valid, 0.8, np.nan), valid=valid, vectors=plain.vectors * valid[:, :, None])
    with_faults = products(replace(found, missing=~valid), list(ALL_OF_4.values()))
    assert float(np.abs(with_faults.squares).max()) < 1e-20
    ended = products(replace(found, missing=(np.arange(12)[:, None] == 5) & ~valid), list(ALL_OF_4.values()))
    assert float(ended.squares.max()) > 1  # had conversation 0 wanted to end, it would have lost by it


def test_noise_is_undecided() -> None:
    """The best class is equal to all others: none of them may be excluded in more than 5% of the batches."""
    reports = [advise(synthetic("noise", 30, seed), ALL_OF_4, resamples=200) for seed in range(40)]
    assert sum(report.verdict.undecided == tuple(ALL_OF_4) for report in reports) >= 36
    assert sum(report.reach == 0 for report in reports) >= 36


def test_more_conversations_per_step_move_the_verdict_to_longer_horizons() -> None:
    """Half of the signal comes late: worth its variance only in a large batch."""
    rng, size, n = np.random.default_rng(0), 400, 4
    signs = rng.choice([-1.0, 1.0], size=(size, n))
    rewards = signs + rng.normal(size=(size, n))
    rewards[:, 1:] += 0.5 * signs[:, :-1]
    base = synthetic("own", size)
    report = advise(
        replace(base, vectors=(np.eye(n) * signs[:, :, None]).astype(np.float32), rewards=rewards),
        {"greedy": credit.greedy(n), "2-step": credit.k_step(n, 2), "full": credit.full(n)},
        batch=1, other_batches=(1000,), resamples=300,
    )  # fmt: skip
    assert [v.recommended for v in report.verdicts] == ["greedy", "2-step"]


def test_invariances() -> None:
    mdp, rng = MDP(3), np.random.default_rng(0)
    rows = rng.choice(len(mdp.probability), size=20, p=mdp.probability)
    base = mdp.sketches(rows, [f"p{i % 9}" for i in range(20)])
    one = products(base, list(CLASSES.values()))
    assert not np.diagonal(one.with_self, axis1=1, axis2=2).any()  # no pairs with one persona
    order = rng.permutation(20)
    mixed = Sketches(
        base.vectors[order], base.rewards[order], base.valid[order], tuple(base.personas[i] for i in order), 12, 0
    )
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    turned = replace(base, vectors=(base.vectors.astype(np.float64) @ rotation).astype(np.float32))
    shifted = replace(base, rewards=base.rewards + np.array([0.3, -1.0, 2.0]))  # the baseline takes it off
    padded = Sketches(
        np.pad(base.vectors, ((0, 0), (0, 1), (0, 0)), constant_values=9.0),
        np.pad(base.rewards, ((0, 0), (0, 1)), constant_values=np.nan),
        np.pad(base.valid, ((0, 0), (0, 1))), base.personas, 12, 0,
    )  # fmt: skip
    longer = [credit.greedy(4), credit.k_step(4, 2), credit.full(4)]
    for other in (products(s, list(CLASSES.values())) for s in (mixed, turned, shifted)):
        for name in ("with_full", "with_self", "squares", "counts"):
            np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=0, atol=1e-4)
    np.testing.assert_allclose(products(padded, longer).with_self, one.with_self, rtol=0, atol=1e-4)


def test_own_mean_removed() -> None:
    valid = np.array([[True, True, False], [True, False, False]])
    got = own_mean_removed(np.array([[1.0, 0.0, 7.0], [0.5, np.nan, np.nan]]), valid)
    np.testing.assert_array_equal(got, [[0.5, -0.5, np.nan], [0.0, np.nan, np.nan]])


def test_errors_say_what_is_expected() -> None:
    one = replace(synthetic("own", 4), personas=("p",) * 4)
    with pytest.raises(ValueError, match="at least two personas"):
        advise(one, ALL_OF_4)
    with pytest.raises(ValueError, match="expected full planning"):
        advise(synthetic("own", 4), {"greedy": credit.greedy(4)})
    with pytest.raises(ValueError, match=r"cosine in \(0, 1\], got 0"):
        advise(synthetic("own", 4), ALL_OF_4, cosine=0)
    with pytest.raises(ValueError, match="expected a baseline"):
        products(synthetic("own", 4), [credit.full(4)], baseline="batch-mean")  # type: ignore[arg-type]


def test_candidates() -> None:
    read = map(credit.PolicyClass.parse, ("4", "segment:1,1,1,1", np.triu(np.ones((4, 4))), np.eye(4) / 2))
    assert list(distinct(list(read), 4)) == ["segment 1,1,1,1", "custom 4x4", "full"]
    assert list(ALL_OF_4) == ["greedy", "2-step", "3-step", "full"]
    many = [c.label for c in default_candidates(60)]
    assert len(many) <= 12
    assert (many[0], many[1], many[-1]) == ("greedy", "2-step", "full")


@pytest.mark.parametrize(("kind", "aligned"), [("own", ("greedy", "2-step", "3-step", "full")), ("delayed", ("full",))])
def test_the_shortest_class_that_points_the_same_way(kind: str, aligned: tuple[str, ...]) -> None:
    assert advise(synthetic(kind, 600), ALL_OF_4, resamples=500).aligned == aligned


def test_a_class_whose_cosine_is_too_low_is_hardly_ever_called_aligned() -> None:
    """The value's gradient is (3, 1, 1, 1), one entry per turn; what does not see the end has (1, 1, 1, 1): .866."""
    wrong, few = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        base = synthetic("own", 80, seed)
        signs = base.vectors.sum(2).astype(np.float64)
        rewards = signs + 0.3 * rng.normal(size=signs.shape)
        rewards[:, -1] += 2 * signs[:, 0]  # the first reply's effect at the end is twice its own reward
        found = advise(replace(base, rewards=rewards), ALL_OF_4, resamples=200, cosine=0.9).aligned
        wrong += found[0] != "full"
        few += advise(replace(base, rewards=rewards), ALL_OF_4, resamples=200, cosine=0.4).aligned[0] == "greedy"
    assert wrong <= 3
    assert few >= 30


def test_a_short_class_is_not_tested_past_a_longer_one_that_fails() -> None:
    """The last reward undoes what the one before it said: 2-step looks right, 3-step does not."""
    low = np.array([1.0, 0.0, 1.0, 1.0])  # greedy, 2-step, 3-step, full
    assert _aligned(list(ALL_OF_4), list(ALL_OF_4.values()), low, 0.9) == ("3-step", "full")


def test_where_no_direction_is_seen_every_cosine_is_possible() -> None:
    report = advise(synthetic("noise", 30, 4), ALL_OF_4, resamples=200)
    assert report.aligned == ("full",)
    assert all((c.cosine.low, c.cosine.high) == (-1.0, 1.0) for c in report.classes)


def test_a_choice_says_what_it_was_made_by() -> None:
    policy = cast(Any, None)
    said = []
    for kind, previous in (("own", "full"), ("own", "greedy"), ("delayed", "greedy"), ("delayed", "full")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ppg_agents.horizon.sketch.sketch", lambda *_, kind=kind, **__: synthetic(kind, 300))
            choice = choose([], policy, (), credit.PolicyClass.parse(previous), np.random.default_rng(0))
        logged = json.loads(json.dumps(dict(choice.metrics()), allow_nan=False))
        assert logged["horizon_class"] == choice.policy_class.label
        assert list(logged["horizon_cosine"]) == list(ALL_OF_4)
        said.append((choice.policy_class.label, choice.switched, choice.reason.partition(",")[0]))
    assert said == [
        ("greedy", True, "switching from full to greedy"),
        ("greedy", False, "keeping greedy"),
        ("full", True, "switching from greedy to full"),
        ("full", False, "keeping full"),
    ]


def test_the_report_is_plain_json_a_table_and_a_picture(tmp_path: Path) -> None:
    report = advise(synthetic("own", 60), ALL_OF_4, batch=32, other_batches=(8,), resamples=200)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [c["label"] for c in plain["classes"]] == list(ALL_OF_4)
    text = table(report)
    assert f"{report.verdict.recommended} *" in text
    assert "8 conversations per step:" in text
    assert "points where full planning points" in text
    picture(report, "toy").savefig(tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 10_000


def test_the_command(tmp_path: Path) -> None:
    settings = ["--set", "env.max_turns=2", "--set", "sampling.max_new_tokens=16"]
    flags = ["--domain", "therapy", "--conversations", "4", "--classes", "greedy", "--batch", "8,32", "--seed", "1"]
    ran = CliRunner().invoke(horizon, ["tiny", *flags, *settings, "--json", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    record = json.loads(ran.stdout)
    assert [c["label"] for c in record["classes"]] == ["greedy", "full"]
    assert [v["batch"] for v in record["verdicts"]] == [8, 32]
    assert record["parameters"] > 100_000
    assert json.loads((tmp_path / "horizon.json").read_text()) == record
    assert (tmp_path / "horizon.png").is_file()
    wrong: Callable[..., object] = lambda *more: CliRunner().invoke(horizon, ["tiny", *more]).output  # noqa: E731
    assert "go after --offline" in str(wrong("file.json"))
    assert "such as 32,128" in str(wrong("--batch", "32,x"))
