"""A domain: its personas' facts, its rule table and its lines, read from the data under ``envs/``.

One rule table drives the scripted partner, the facts judge and the exact twin. This module reads and
validates data; it does not talk, judge or draw anything.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources.abc import Traversable
from typing import Any

from ppg_gym.conversation import Persona

DOMAINS = ("chatting", "education", "therapy")
SPLITS = ("train", "held-out")
TRICKS = (
    "silence",
    "gibberish",
    "meta",
    "slip",
    "copying",
    "repeating",
    "listing",
    "evasion",
    "question_back",
    "vague",
    "off_topic",
)


@dataclass(frozen=True)
class RuleTable:
    """Reply kinds x states: what a reply scores and where the partner goes next.

    Attributes:
        states: The first is where a conversation begins.
        kinds: Every kind that a reply can be read as.
        score: (state, kind) -> reward in [0, 1].
        next: (state, kind) -> state.
    """

    states: tuple[str, ...]
    kinds: tuple[str, ...]
    score: Mapping[tuple[str, str], float]
    next: Mapping[tuple[str, str], str]

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> RuleTable:
        """Read ``[tricks]`` (scores that hold in every state) and ``[states.NAME]`` from a domain file.

        A state's entry ``kind = [score, next]`` overrides the trick's score; a trick without an entry
        leads to the state's ``otherwise`` (default: no move).

        Raises:
            ValueError: A score outside [0, 1], an unknown next state, or a kind that a state lacks.
        """
        tricks: dict[str, float] = data["tricks"]
        states: dict[str, dict[str, Any]] = data["states"]
        missing = set(TRICKS) - set(tricks)
        if missing:
            raise ValueError(f"{where}: expected a score for every trick, missing {sorted(missing)}")
        own = {kind for state in states.values() for kind in state if kind != "otherwise"}
        kinds = tuple(sorted(own - set(tricks))) + tuple(tricks)
        score: dict[tuple[str, str], float] = {}
        follow: dict[tuple[str, str], str] = {}
        for name, entries in states.items():
            stay = entries.get("otherwise", name)
            for kind in kinds:
                if kind not in entries and kind not in tricks:
                    raise ValueError(f"{where}: state {name!r} has no entry for kind {kind!r}")
                value, after = entries.get(kind, (tricks.get(kind), stay))
                if not 0.0 <= value <= 1.0 or after not in states:
                    raise ValueError(
                        f"{where}: states.{name}.{kind}: expected [score in [0, 1], one of {sorted(states)}],"
                        f" got [{value}, {after!r}]"
                    )
                score[name, kind], follow[name, kind] = float(value), after
        return cls(tuple(states), kinds, score, follow)


@dataclass(frozen=True)
class ReadRule:
    """A reply that shows all of ``needs`` and none of ``without`` is of this kind."""

    kind: str
    needs: frozenset[str]
    without: frozenset[str]


@dataclass(frozen=True)
class Domain:
    """Everything that is known of one domain.

    Attributes:
        name: ``chatting``, ``education`` or ``therapy``.
        turns: Default length of a conversation, in turns of the policy.
        scenario: One sentence for people and for a model that plays the partner.
        instruction: Template of the role-play instruction.
        table: The rule table.
        mix: Reply kinds of the untrained embedded model: kind -> weight.
        tilt: state -> kind -> factor on that weight; see :meth:`mix_in`.
        rules: How a reply is read, first match wins.
        slots: slot -> value -> phrases by which the value is recognised.
        cues: slot -> phrases by which a partner's question is recognised.
        asked_only: Slots whose values claim something only when they were asked for.
        markers: marker -> phrases.
        statements: slot -> sentence of the instruction.
        lines: The partner's lines.
        replies: kind -> templates (or slot -> templates): ways in which a reply of that kind is said.
        options: Everything else in ``domain.toml``'s ``[options]``.
    """

    name: str
    turns: int
    scenario: str
    instruction: str
    table: RuleTable
    mix: Mapping[str, float]
    tilt: Mapping[str, Mapping[str, float]]
    rules: tuple[ReadRule, ...]
    slots: Mapping[str, Mapping[str, tuple[str, ...]]]
    cues: Mapping[str, tuple[str, ...]]
    asked_only: frozenset[str]
    markers: Mapping[str, tuple[str, ...]]
    statements: Mapping[str, str]
    lines: Mapping[str, Any]
    replies: Mapping[str, Any]
    options: Mapping[str, Any]

    def mix_in(self, state: str) -> dict[str, float]:
        """Return the untrained embedded model's mixture of reply kinds in a state; it sums to 1."""
        tilt = self.tilt.get(state, {})
        weights = {kind: weight * tilt.get(kind, 1.0) for kind, weight in self.mix.items()}
        total = sum(weights.values())
        return {kind: weight / total for kind, weight in weights.items()}

    def words(self) -> Iterator[str]:
        """Yield every text of the domain's data: together they are its vocabulary."""
        yield self.instruction
        yield from _texts(self.slots)
        yield from _texts(self.cues)
        yield from _texts(self.markers)
        yield from _texts(self.statements)
        yield from _texts(self.lines)
        yield from _texts({kind: said for kind, said in self.replies.items() if kind != "gibberish"})

    def instruct(self, name: str, facts: Mapping[str, str]) -> str:
        """Return the role-play instruction for a persona with these facts."""
        said = " ".join(text.format(**facts) for text in self.statements.values())
        return self.instruction.format(name=name, facts=said)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key).replace("_", " ")
            yield from _texts(item)
    else:
        for item in value:
            yield from _texts(item)


def folder(name: str) -> Traversable:
    """Return the data folder of an embedded domain.

    Raises:
        ValueError: There is no such domain; the nearest name is offered.
    """
    if name not in DOMAINS:
        near = get_close_matches(str(name), DOMAINS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a domain out of {', '.join(DOMAINS)}, got {name!r}{hint}")
    return importlib.resources.files("ppg_gym.domains") / name


def _toml(name: str, file: str) -> dict[str, Any]:
    return tomllib.loads((folder(name) / file).read_text(encoding="utf-8"))


@functools.cache
def load(name: str) -> Domain:
    """Return an embedded domain; read once per process.

    Raises:
        ValueError: There is no such domain, or its files contradict one another.
    """
    data, facts = _toml(name, "domain.toml"), _toml(name, "facts.toml")
    common_path = importlib.resources.files("ppg_gym.domains") / "common.toml"
    common = tomllib.loads(common_path.read_text(encoding="utf-8"))
    table = RuleTable.parse(data, f"{name}/domain.toml")
    rules = tuple(
        ReadRule(rule["kind"], frozenset(rule["needs"]), frozenset(rule.get("without", ()))) for rule in data["read"]
    )
    tilted = {kind for factors in data.get("tilt", {}).values() for kind in factors}
    unknown = ({rule.kind for rule in rules} | set(data["mix"]) | tilted) - set(table.kinds)
    if unknown:
        raise ValueError(f"{name}/domain.toml: kinds that no state has an entry for: {sorted(unknown)}")
    return Domain(
        name=name,
        turns=data["turns"],
        scenario=data["scenario"],
        instruction=data["instruction"],
        table=table,
        mix=data["mix"],
        tilt=data.get("tilt", {}),
        rules=rules,
        slots={s: {v: tuple(p) for v, p in entry["values"].items()} for s, entry in facts["slots"].items()},
        cues={s: tuple(entry["cues"]) for s, entry in facts["slots"].items()},
        asked_only=frozenset(s for s, entry in facts["slots"].items() if entry.get("asked_only", False)),
        markers={k: tuple(v) for k, v in (common["markers"] | data.get("markers", {})).items()},
        statements={s: entry["statement"] for s, entry in facts["slots"].items()},
        lines=_toml(name, "lines.toml"),
        replies=_toml(name, "replies.toml"),
        options=data.get("options", {}) | {"common_words": tuple(common["words"].split())},
    )


@functools.cache
def personas(name: str, split: str) -> tuple[Persona, ...]:
    """Return the embedded personas of a domain's split, ``train`` or ``held-out``."""
    text = (folder(name) / f"personas-{split}.jsonl").read_text(encoding="utf-8")
    return tuple(Persona(**json.loads(line)) for line in text.splitlines())
