"""Check language against the twin: how much the reply at one turn changes the rewards of the turns that follow.

Two sets of conversations are held. Every turn but one is played by a fixed stochastic policy, the domain's mix of reply
kinds in each state (that of the untrained embedded model). At turn t one set plays the best kind, the other the worst.
What is shown is the difference of the expected reward, best minus worst, at t+1, t+2, …: as points, language (scripted
partner, facts judge, held-out personas; mean and 95% interval over pairs of conversations with the same seed); as a
line, the exact prediction of the domain's twin.

Best and worst are meant by the twin's action value: in each state, of the kinds that the mix plays, the one with the
highest and the one with the lowest expected sum of the rewards from turn t to the end, the mix being played after t.
The kind that is forced may therefore differ from state to state; the picture names them.

    python scripts/influence.py --domain all --conversations 2000 --turn 3 --out influence.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from ppg_agents import credit
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.domain.twin import Twin, influence
from ppg_gym.simulator import Simulator

Array = npt.NDArray[np.float64]
LINE, POINT, QUIET = "#7a7a7a", "#1f5fa8", "#444444"


@dataclass(frozen=True)
class Influence:
    """Best minus worst of one domain, from turn t on.

    Attributes:
        domain: Name.
        turn: t, from 1.
        exact: [n - t + 1], the twin's.
        mean: [n - t + 1], language's.
        half: [n - t + 1], half of its 95% interval.
        best: Kind per state.
        worst: Kind per state.
        likely: Chance of each state at turn t.
    """

    domain: str
    turn: int
    exact: Array
    mean: Array
    half: Array
    best: Sequence[str]
    worst: Sequence[str]
    likely: Array


def measure(name: str, turn: int, conversations: int, seed: int) -> Influence:
    """Return the influence of turn ``turn`` (from 1) on the twin and in language."""
    domain = load(name)
    twin, n = Twin.of(domain.table), domain.turns
    policy = twin.start(domain, n)
    value = twin.action_value(policy, credit.full(n))[turn - 1]
    played = np.array([kind in domain.mix for kind in twin.kinds])
    best = [twin.kinds[i] for i in np.where(played, value, -np.inf).argmax(axis=1)]
    worst = [twin.kinds[i] for i in np.where(played, value, np.inf).argmin(axis=1)]
    high, low = influence(twin, policy, turn - 1, best, worst)
    change = sample(name, turn, best, conversations, seed) - sample(name, turn, worst, conversations, seed)
    half = 1.96 * change.std(axis=0, ddof=1) / np.sqrt(conversations)
    rest = slice(turn - 1, None)
    return Influence(
        name,
        turn,
        (high - low)[rest],
        change.mean(axis=0)[rest],
        half[rest],
        best,
        worst,
        twin.visits(policy)[turn - 1],
    )


def sample(name: str, turn: int, forced: Sequence[str], conversations: int, seed: int) -> Array:
    """Return rewards [conversations, n]: the mix but for ``turn``, where the state's forced kind is played."""
    domain, read, simulator = load(name), reader(name), Simulator(name, personas="held-out")
    mixes = {state: domain.mix_in(state) for state in domain.table.states}
    kinds, weights = list(domain.mix), {state: list(mix.values()) for state, mix in mixes.items()}
    rngs = [np.random.default_rng([seed, i]) for i in range(conversations)]
    held = [conversation for conversation, _ in simulator.open([simulator.persona(None, rng) for rng in rngs], rngs)]
    rewards = np.zeros((conversations, domain.turns))
    for t in range(domain.turns):
        states = [read.track(c).state for c in held]
        drawn = [kinds[int(rng.choice(len(kinds), p=weights[s]))] for s, rng in zip(states, rngs, strict=True)]
        if t == turn - 1:
            drawn = [forced[domain.table.states.index(state)] for state in states]
        replies = [say(read, kind, c, rng) for kind, c, rng in zip(drawn, held, rngs, strict=True)]
        outcomes = simulator.turn(held, replies, rngs)
        held = [outcome.conversation for outcome in outcomes]
        rewards[:, t] = [outcome.reward for outcome in outcomes]
    return rewards


def draw(found: Sequence[Influence], conversations: int) -> Figure:
    """Return the picture: a panel per domain, each with its own scale; what happens at t itself is in the caption."""
    figure = Figure(figsize=(3.1 * len(found) + 0.5, 4.4), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, one in zip(panels, found, strict=True):
        at = np.arange(1, len(one.exact))
        panel.axhline(0.0, color="#cccccc", linewidth=0.8, zorder=0)
        panel.plot(at, one.exact[1:], color=LINE, linewidth=1.6, label="twin, exact", zorder=1)
        panel.errorbar(
            at, one.mean[1:], one.half[1:], fmt="o", color=POINT, markersize=4, capsize=2.5, linewidth=1.2,
            label=f"language, {conversations:,} pairs, 95% interval", zorder=2,
        )  # fmt: skip
        panel.set_title(one.domain, fontsize=11, loc="left", fontweight="bold")
        panel.set_xticks(at, [f"t+{i}" for i in at])
        panel.set_xlabel(f"turn (t = {one.turn})")
        panel.set_ylim(top=2.1 * max((one.mean + one.half)[1:].max(), one.exact[1:].max()))
        panel.text(
            0.98, 0.98, captions(one), transform=panel.transAxes, ha="right", va="top", fontsize=8, color=QUIET,
            linespacing=1.5,
        )  # fmt: skip
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change of the expected reward,\nbest minus worst reply at t")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def captions(one: Influence) -> str:
    """Return the change at turn t itself, and a line per state met there: the best kind and the worst."""
    states = load(one.domain).table.states
    rows = [
        f"{state.replace('_', ' ')}: {best} / {worst}"
        for state, best, worst, chance in zip(states, one.best, one.worst, one.likely, strict=True)
        if chance > 0
    ]
    at_once = [f"at t itself: twin {one.exact[0]:+.3f},", f"language {one.mean[0]:+.3f} ± {one.half[0]:.3f}"]
    return "\n".join([*at_once, "best / worst reply at t, by state:", *rows])


def main() -> None:
    """Measure, print a table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="all", help="a name, or the path of your own (default: all embedded ones)")
    parser.add_argument("--conversations", type=int, default=2000, help="pairs of conversations (default: 2000)")
    parser.add_argument("--turn", type=int, default=3, help="t, from 1 (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("influence.png"))
    arguments = parser.parse_args()
    names = DOMAINS if arguments.domain == "all" else (arguments.domain,)
    turns = min(load(name).turns for name in names) - 1
    if not 1 <= arguments.turn <= turns or arguments.conversations < 2:
        parser.error(f"expected --turn from 1 to {turns} and at least 2 --conversations")
    found = [measure(name, arguments.turn, arguments.conversations, arguments.seed) for name in names]
    for one in found:
        print(f"## {one.domain}\n\n| turn | twin | language | 95% interval |\n|---|---|---|---|")
        for i, (exact, mean, half) in enumerate(zip(one.exact, one.mean, one.half, strict=True)):
            print(f"| t+{i} | {exact:+.3f} | {mean:+.3f} | {mean - half:+.3f} to {mean + half:+.3f} |")
        print(f"\n{captions(one)}\n")
    draw(found, arguments.conversations).savefig(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
