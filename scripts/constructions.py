"""List the constructions that a trained policy is paid for, for a person to read: what pays and is not English?

    python scripts/constructions.py runs/NAME runs/OTHER          # held-out replies after training, score .8 or more
    python scripts/constructions.py runs/NAME --all --least 0.5   # of training, too

A construction is a reply with the values of facts (and the keywords and points of a lesson) replaced by their names.
Each is judged anew by the facts judge of this tree, in its conversation. Those that are among the domain's own replies
are counted and not listed, unless with ``--own``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ppg_gym.conversation import Conversation
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import Domain, load
from ppg_gym.domain.parsing import words
from ppg_gym.domain.sentences import own_texts
from ppg_gym.judges.facts import FactsJudge


def construction(domain: Domain, text: str) -> str:
    """Return a reply with the phrases of facts and of lessons replaced by their names, in lower case."""
    names = {phrase: slot for slot, values in domain.slots.items() for found in values.values() for phrase in found}
    for points in domain.lines.get("points", {}).values():
        names |= {" ".join(words(point.rstrip("."))): "point" for point in points.values()}
        names |= dict.fromkeys(points, "key")
    said = " ".join(words(text))
    found = "|".join(re.escape(phrase) for phrase in sorted(names, key=len, reverse=True))
    return re.sub(rf"\b(?:{found})\b", lambda match: f"{{{names[match[0]]}}}", said)


def replies(file: Path) -> Iterator[tuple[str, Conversation]]:
    """Yield (domain, conversation up to a reply) of every reply in a file of trajectories."""
    for line in file.read_text(encoding="utf-8").splitlines():
        talk: dict[str, Any] = json.loads(line)
        everybody = {p.id: p for split in ("train", "held-out") for p in personas(talk["domain"], split)}
        said = Conversation(everybody[talk["persona"]])
        for turn in talk["turns"]:
            said = said.add("partner", turn["message"]).add("policy", turn["reply"])
            yield talk["domain"], said


def main() -> None:
    """Judge the replies of runs and print their constructions, the frequent ones first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders on embedded domains")
    parser.add_argument("--least", type=float, default=0.8, help="score from which a construction is listed")
    parser.add_argument("--all", action="store_true", help="those sampled in training too")
    parser.add_argument("--own", action="store_true", help="list the domain's own, too")
    settings = parser.parse_args(namespace=SimpleNamespace())
    counts: Counter[tuple[str, str]] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for run in settings.runs:
        held_out = sorted((run / "held_out").glob("*.jsonl"), key=lambda file: int(file.stem))[-1:]
        for file in [*held_out, *([run / "trajectories.jsonl"] if settings.all else [])]:
            for name, said in replies(file):
                verdict = FactsJudge(name).judge([said])[0]
                kinds[name, verdict.kind] += 1
                if verdict.score is not None and verdict.score >= settings.least:
                    key = name, construction(load(name), said.lines[-1].text)
                    counts[key] += 1
                    examples.setdefault(key, said.lines[-1].text)
    for name in sorted({name for name, _ in counts}):
        domain = load(name)
        own = {construction(domain, text) for text in own_texts(domain)}
        listed = {key: times for key, times in counts.items() if key[0] == name and (settings.own or key[1] not in own)}
        total = sum(times for key, times in counts.items() if key[0] == name)
        print(f"\n{name}: {total} replies of {settings.least} or more, {sum(listed.values())} in words of their own")
        print("  kinds: " + ", ".join(f"{kind} {n}" for (where, kind), n in kinds.most_common() if where == name))
        for key, times in sorted(listed.items(), key=lambda item: -item[1]):
            print(f"{times:6} {key[1]}    {examples[key]}")


if __name__ == "__main__":
    main()
