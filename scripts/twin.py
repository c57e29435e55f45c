"""Print a domain's rules and what every policy class reaches on its exact twin, as Markdown tables.

``python scripts/twin.py`` for all domains, ``--domain therapy`` for one, also your own by its path; ``--write`` puts
the tables into ``envs/<domain>/README.md``. Each class follows its own exact gradient from the replies of the untrained
embedded model (``[mix]`` and ``[tilt]`` in ``domain.toml``) until nothing moves; no language, no sampling.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ppg_agents import credit
from ppg_gym.domain.loading import DOMAINS, TRICKS, RuleTable, is_path, load
from ppg_gym.domain.twin import Twin

ENVS = Path(__file__).resolve().parent.parent / "envs"
LOOKAHEADS = (1, 2, 3, 4, 5, 6)


def rules(name: str) -> str:
    """Return the rule table: a row per state, a column per kind that is no trick, the slip, and all other tricks."""
    domain = load(name)
    table = domain.table
    own = [kind for kind in domain.mix if kind in table.kinds and kind not in TRICKS] + ["slip"]
    lines = [f"| state | {' | '.join(own)} | anything else |", "|---" * (len(own) + 2) + "|"]
    for state in table.states:
        cells = [f"{table.score[state, kind]:.3g}, {_after(table, state, kind)}" for kind in own]
        lines.append(f"| **{_plain(state)}** | {' | '.join(cells)} | {_after(table, state, 'silence')} |")
    return "\n".join(lines)


def _after(table: RuleTable, state: str, kind: str) -> str:
    after = table.next[state, kind]
    return "stays" if after == state else f"→ {_plain(after)}"


def _plain(state: str) -> str:
    return state.replace("_", " ")


def classes(name: str, steps: int) -> str:
    """Return the mean reward per turn that every policy class reaches, and its share of the best there is."""
    domain = load(name)
    twin, n = Twin.of(domain.table), domain.turns
    start, best = twin.start(domain, n), twin.best(n)
    rows = [("where learning starts", float(twin.rewards(start).mean()))]
    labels = [(f"{k}-step" if k > 1 else "greedy (1-step)", k) for k in LOOKAHEADS] + [(f"full ({n}-step)", n)]
    for label, k in labels:
        policy = twin.ascend(credit.k_step(n, k), start, steps=steps)
        rows.append((label, float(twin.rewards(policy).mean())))
    rows.append(("best there is", best))
    lines = ["| policy class | mean reward per turn | of the best |", "|---|---|---|"]
    lines += [f"| {label} | {value:.3f} | {value / best:.0%} |" for label, value in rows]
    return "\n".join(lines)


def write(name: str, *tables: str) -> None:
    """Replace the tables of a domain's README that have the same first column."""
    path = ENVS / name / "README.md"
    text = path.read_text(encoding="utf-8")
    for table in tables:
        begin = text.index(table[: table.index("|", 1) + 1])
        text = text[:begin] + table + text[text.index("\n\n", begin) :]
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="all", help="a name, or the path of your own (default: all embedded ones)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of exact gradient ascent (default: 1000)")
    parser.add_argument("--write", action="store_true", help="put the tables into the domains' READMEs")
    arguments = parser.parse_args()
    if arguments.write and is_path(arguments.domain):
        parser.error("expected --write with an embedded domain, whose README it fills in; leave it out")
    try:
        load(DOMAINS[0] if arguments.domain == "all" else arguments.domain)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name in DOMAINS if arguments.domain == "all" else (arguments.domain,):
        tables = rules(name), classes(name, arguments.steps)
        print(f"## {name}, {load(name).turns} turns\n\n" + "\n\n".join(tables) + "\n")
        if arguments.write:
            write(name, *tables)


if __name__ == "__main__":
    main()
