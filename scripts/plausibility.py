"""Measure whether the facts judge tells sentences from words in a row.

    python scripts/plausibility.py                         # a few seconds
    python scripts/plausibility.py --csv ../shared/data/synthetic-persona-chat/test.csv   # lines of real chats too
    python scripts/plausibility.py --show 20               # and the replies that it gets wrong

Good replies are those of ``scripts/paraphrases.toml``, which answer truly and of which nothing is built. Bad ones are
made of them: shuffled, truncated (after a word that no sentence ends in), duplicated, negated, beside a false fact. The
judge's score ranks them; equal scores are ranked by the surprise of the word order. Lines of real chats answer no
question: there the order of the words alone is measured, on the half that the grammar was not written by.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas
from ppg_gym.domain.lint import cores
from ppg_gym.domain.loading import load
from ppg_gym.domain.parsing import words
from ppg_gym.domain.sentences import UNLIKELY, Sentences, sentences
from ppg_gym.judges.facts import FactsJudge

SOURCE = Path(__file__).resolve().parent / "paraphrases.toml"
NO_LAST_WORDS = "a an the my your our their of in at as with from and or but because to for is am are"
VALUES = 4  # of every fact that a paraphrase is tried with
REFUSED = ("garbled", "gibberish", "slip")
KEPT = 0.5  # of the lines of real chats, those that count


class Reply(NamedTuple):
    """A reply, and what it answers."""

    domain: str
    persona: Persona
    message: str
    text: str


def paraphrases(rng: random.Random) -> Iterator[Reply]:
    """Yield every paraphrase with some values of its fact."""
    for name, slots in tomllib.loads(SOURCE.read_text(encoding="utf-8")).items():
        domain = load(name)
        for slot, texts in slots.items():
            asked = slot if "ask" in domain.lines else ""
            for text in texts:
                for persona in rng.sample(personas(name, "held-out"), VALUES):
                    lines = [(key, line) for key, line in cores(domain, persona.facts) if key == asked or not asked]
                    key, line = rng.choice(lines[:5])
                    said = text.format(value=persona.facts[slot], key=key)
                    yield Reply(name, persona, line, said[:1].upper() + said[1:] if text[0] in "{" else said)


def shuffled(text: str, rng: random.Random) -> str:
    """Return the words in another order, at least half of them elsewhere; "" for less than four words."""
    said = re.findall(r"[^\s,.!?;:]+", text)
    for _ in range(50):
        other = rng.sample(said, len(said))
        if len(said) >= 4 and sum(a != b for a, b in zip(said, other, strict=True)) * 2 >= len(said):
            return " ".join(other) + ("" if text[-1].isalnum() else text[-1])
    return ""


def truncated(text: str, rng: random.Random) -> str:
    """Return a reply that ends after a word that no sentence ends in; "" where there is none after the second."""
    said = text.split()
    ends = [i for i in range(2, len(said)) if said[i - 1].lower() in NO_LAST_WORDS.split()]
    return " ".join(said[: rng.choice(ends)]) + "." if ends else ""


def duplicated(text: str, rng: random.Random) -> str:
    """Return a reply that says one of its words, a few of them, or everything again."""
    said = text.split()
    at = rng.randrange(len(said))
    many = rng.choice((1, 1, 2, 3, len(said)))
    again = said if many == len(said) else said[at : at + many]
    at = 0 if many == len(said) else at
    return " ".join([*said[: at + len(again)], *again, *said[at + len(again) :]])


def negated(reply: Reply, rng: random.Random) -> str:
    """Return a reply that denies its fact, where that stands close behind a verb that can be denied; else ""."""
    del rng
    verbs = "have|like|love|work|listen|live|struggle|feel|own|drink|play|enjoy|train|stay|want|keep|fear|need"
    for pattern, denial in (
        (r"\b(I am|I'm|i'm|i am|Im|im|It's|it's)\b", r"\1 not"),
        (rf"\b([Ii]) ({verbs})\b", r"\1 do not \2"),
    ):
        if found := re.search(pattern, reply.text):
            ahead = reply.text[found.end() :].split()[:3]
            value = next((fact for fact in reply.persona.facts.values() if fact in " ".join(ahead)), "")
            if value and not {"just", "only"}.intersection(ahead):
                return re.sub(pattern, denial, reply.text, count=1)
    return ""


def beside_false(reply: Reply, rng: random.Random) -> str:
    """Return a reply with another value of another fact joined to it, in the words of the instruction."""
    domain = load(reply.domain)
    usable = [slot for slot in domain.statements if reply.domain == "chatting" and slot not in ("pet", "hobby")]
    if not usable:
        return ""
    slot = rng.choice(usable)
    wrong = rng.choice([value for value in domain.slots[slot] if value != reply.persona.facts[slot]])
    statement = domain.statements[slot].format(**{slot: wrong}).rstrip(".")
    own = re.sub(r"^You", "I", re.sub(r"^Your", "my", statement))
    return f"{reply.text.rstrip('.!?')} and {own}."


def chats(path: Path) -> list[str]:
    """Return lines of real chats, without those that name the speakers; the half that was kept back."""
    csv.field_size_limit(10**9)
    found = []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for line in row["Best Generated Conversation"].split("\n"):
                said = re.match(r"User \d: (.*)", line.strip())
                if said and "[" not in line and "User" not in said[1] and "(" not in said[1]:
                    found.append(said[1])
    random.Random(0).shuffle(found)
    return found[round(len(found) * KEPT) :]


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the chance that a good reply ranks above a bad one; a tie counts half."""
    ranked = np.sort(np.asarray(good))
    below = np.searchsorted(ranked, bad, side="left") + np.searchsorted(ranked, bad, side="right")
    return float(1.0 - below.mean() / 2 / len(ranked))


def judged(replies: Sequence[Reply]) -> list[tuple[float, str, float]]:
    """Return (score, kind, surprise of the worst sentence) of every reply."""
    found = []
    tools = {name: (FactsJudge(name), Sentences(load(name), words)) for name in {reply.domain for reply in replies}}
    for reply in replies:
        judge, order = tools[reply.domain]
        said = Conversation(reply.persona).add("partner", reply.message).add("policy", reply.text)
        verdict = judge.judge([said])[0]
        assert verdict.score is not None
        surprise = max((order.surprise(sentence) for sentence in sentences(words(reply.text))), default=0.0)
        found.append((verdict.score, verdict.kind, surprise))
    return found


def rank(verdict: tuple[float, str, float]) -> float:
    """Return a number that orders replies by score, then by surprise."""
    return verdict[0] - 1e-4 * min(verdict[2], 100.0)


def mean(verdicts: Sequence[tuple[float, str, float]]) -> float:
    """Return the mean score."""
    return sum(score for score, _, _ in verdicts) / len(verdicts)


def main() -> None:
    """Judge good and bad replies and print how well they are told apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="Synthetic-Persona-Chat's test.csv, for lines of real chats")
    parser.add_argument("--show", type=int, default=0, help="replies that are judged wrongly, at most, of each kind")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(namespace=SimpleNamespace())
    rng = random.Random(settings.seed)
    good = list(paraphrases(rng))
    verdicts = judged(good)
    ranks = [rank(verdict) for verdict in verdicts]
    refused = [(r.text, v[1]) for r, v in zip(good, verdicts, strict=True) if v[1] in REFUSED]
    print(
        f"good: {len(good)}, refused {len(refused)} ({len(refused) / len(good):.1%}), mean score {mean(verdicts):.3f}"
    )
    show(refused, settings.show)
    makers: dict[str, Callable[[Reply], str]] = {
        **{f.__name__: (lambda reply, f=f: f(reply.text, rng)) for f in (shuffled, truncated, duplicated)},
        "negated": lambda reply: negated(reply, rng),
        "beside_false": lambda reply: beside_false(reply, rng),
    }
    all_ranks: list[float] = []
    for name, make in makers.items():
        bad = [reply._replace(text=text) for reply in good if (text := make(reply))]
        found = judged(bad)
        all_ranks += (these := [rank(verdict) for verdict in found])
        missed = [(r.text, f"{v[1]} {v[0]:.1f}") for r, v in zip(bad, found, strict=True) if v[0] >= 0.5]
        told_apart = f"AUC {auc(ranks, these):.3f}, paid {len(missed) / len(bad):.1%}"
        print(f"{name}: {len(bad)}, {told_apart}, mean score {mean(found):.3f}")
        show(missed, settings.show)
    print(f"all bad ones: {len(all_ranks)}, AUC {auc(ranks, all_ranks):.3f}")
    if settings.csv:
        real(chats(settings.csv), rng, settings.show)


def real(lines: Sequence[str], rng: random.Random, most: int) -> None:
    """Print how well the order of words tells lines of real chats from what is made of them."""
    order = Sentences(load("chatting"), words)

    def surprise(text: str) -> float:
        return max((order.surprise(sentence) for sentence in sentences(words(text))), default=0.0)

    surprises = [surprise(line) for line in lines]
    refused = [(line, f"{s:.2f}") for line, s in zip(lines, surprises, strict=True) if s > UNLIKELY]
    print(f"lines of real chats: {len(lines)}, refused {len(refused) / len(lines):.1%}")
    show(rng.sample(refused, min(most, len(refused))), most)
    for make in (shuffled, truncated):
        single = [line for line in lines if len(re.findall(r"[.!?]", line)) <= 1]
        bad = [text for line in single if (text := make(line, rng))]
        scores = [surprise(text) for text in bad]
        alone = [surprise(line) for line in single]
        print(f"{make.__name__}: {len(bad)}, AUC {auc([-s for s in alone], [-s for s in scores]):.3f}")


def show(replies: Sequence[tuple[str, str]], most: int) -> None:
    """Print some replies and how they were read."""
    for text, kind in replies[:most]:
        print(f"    {kind}: {text}")


if __name__ == "__main__":
    main()
