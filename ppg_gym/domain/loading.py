"""A domain: its personas' facts, its rule table and its lines, read from data.

The embedded domains are the folders under ``envs/``; your own is a TOML file, given by its path. One rule table drives
the scripted partner, the facts judge and the exact twin. This module knows what a domain is and where to find it;
:mod:`ppg_gym.domain.files` reads and checks the files. Nothing here talks, judges or draws.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ppg_gym.domain import files as domain_files
from ppg_gym.nearest import did_you_mean

_EMBEDDED = importlib.resources.files("ppg_gym.domains")
DOMAINS = tuple(sorted(entry.name for entry in _EMBEDDED.iterdir() if (entry / "domain.toml").is_file()))
"""Names of the embedded domains: the folders that hold a ``domain.toml``."""
SPLITS = ("train", "held-out")
TRICKS = (
    *("silence", "gibberish", "meta", "slip", "copying", "repeating", "listing", "evasion", "question_back", "vague"),
    *("off_topic", "garbled"),
)
UNASKED = "unasked"
"""The kind of a reply to a line that asks about nothing: no kind of the table, as no policy can choose it."""


@dataclass(frozen=True)
class RuleTable:
    """Reply kinds x states: what a reply scores and where the partner goes next.

    Attributes:
        states: The first is where a conversation begins.
        kinds: Every kind that a reply can be read as.
        score: (state, kind) -> reward in [0, 1]; has an entry for `UNASKED` in every state, too.
        next: (state, kind) -> state; `UNASKED` never moves.
    """

    states: tuple[str, ...]
    kinds: tuple[str, ...]
    score: Mapping[tuple[str, str], float]
    next: Mapping[tuple[str, str], str]

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> RuleTable:
        """Read ``[tricks]`` (scores that hold in every state), ``[states.NAME]`` and ``unasked`` from a domain file.

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
        named = {kind for state in states.values() for kind in state if kind != "otherwise"}
        kinds = tuple(sorted(named - set(tricks))) + tuple(tricks)
        score: dict[tuple[str, str], float] = {}
        follow: dict[tuple[str, str], str] = {}
        for name, entries in states.items():
            stay = entries.get("otherwise", name)
            for kind in kinds:
                if kind not in entries and kind not in tricks:
                    raise ValueError(f"{where}: state {name!r} has no entry for kind {kind!r}")
                entry = entries.get(kind, [tricks.get(kind), stay])
                scored = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in (int, float)
                if not scored or not 0.0 <= entry[0] <= 1.0 or entry[1] not in states:
                    form = f"[score in [0, 1], one of {sorted(states)}]"
                    raise ValueError(f"{where}: states.{name}.{kind}: expected {form}, got {entry}")
                score[name, kind], follow[name, kind] = float(entry[0]), entry[1]
        for name in states:
            score[name, UNASKED], follow[name, UNASKED] = float(data["unasked"]), name
        return cls(tuple(states), kinds, score, follow)


@dataclass(frozen=True)
class ReadRule:
    """A reply that shows all of ``needs`` and none of ``without`` is of this kind."""

    kind: str
    needs: frozenset[str]
    without: frozenset[str]


@dataclass(frozen=True)
class Domain:
    """Everything that is known about one domain.

    Attributes:
        name: The name of the folder or file.
        source: What `load` takes in any process: the name, or the absolute path of your own.
        file: The file that holds it, for messages.
        turns: Default length of a conversation, in turns of the policy.
        scenario: One sentence for people and for a model that plays the partner.
        instruction: Template of the role-play instruction.
        table: The rule table.
        mix: Reply kinds of the untrained embedded model: kind -> weight, without those that never come.
        tilt: state -> kind -> factor on that weight; see :meth:`mix_in`.
        rules: How a reply is read, first match wins.
        slots: slot -> value -> phrases by which the value is recognised.
        cues: slot -> phrases by which a partner's question is recognised.
        claims: slot -> phrases after which any word names a value of it, also one that no list holds: "live in".
        asked_only: Slots whose values claim something only if the partner asked for them.
        markers: marker -> phrases.
        statements: slot -> sentence of the instruction.
        lines: The partner's lines.
        replies: kind -> templates (or slot -> templates): ways to say a reply of that kind.
        why: kind -> what the facts judge says about such a reply; ``{slot}`` and ``{fact}`` are filled in.
        partner: The role of a language model that plays the partner; see `ppg_gym.partners.scenes`. None if missing.
        persona_seed: Seed of the personas that come with the domain.
        options: ``[options]``, and the words that all domains know.
    """

    name: str
    source: str
    file: str
    turns: int
    scenario: str
    instruction: str
    table: RuleTable
    mix: Mapping[str, float]
    tilt: Mapping[str, Mapping[str, float]]
    rules: tuple[ReadRule, ...]
    slots: Mapping[str, Mapping[str, tuple[str, ...]]]
    cues: Mapping[str, tuple[str, ...]]
    claims: Mapping[str, tuple[str, ...]]
    asked_only: frozenset[str]
    markers: Mapping[str, tuple[str, ...]]
    statements: Mapping[str, str]
    lines: Mapping[str, Any]
    replies: Mapping[str, Any]
    why: Mapping[str, str]
    partner: Any
    persona_seed: int
    options: Mapping[str, Any]

    def mix_in(self, state: str) -> dict[str, float]:
        """Return the untrained embedded model's mixture of reply kinds in a state; it sums to 1."""
        tilt = self.tilt.get(state, {})
        weights = {kind: weight * tilt.get(kind, 1.0) for kind, weight in self.mix.items()}
        total = sum(weights.values())
        return {kind: weight / total for kind, weight in weights.items()}

    def words(self) -> Iterator[str]:
        """Yield every text of the domain's data; together they are its vocabulary."""
        yield self.instruction
        yield from _texts(self.slots)
        yield from _texts(self.cues)
        yield from _texts(self.markers)
        yield from _texts(self.statements)
        yield from _texts(self.lines)
        yield from _texts({kind: texts for kind, texts in self.replies.items() if kind not in ("gibberish", "garbled")})

    def instruct(self, name: str, facts: Mapping[str, str]) -> str:
        """Return the role-play instruction for a persona with these facts."""
        sentences = " ".join(text.format(**facts) for text in self.statements.values())
        return self.instruction.format(name=name, facts=sentences)


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
        ValueError: There is no such domain; the message offers the nearest name.
    """
    if name not in DOMAINS:
        hint = did_you_mean(name, DOMAINS)
        if isinstance(name, str) and Path(name).is_dir():
            hint = f"; for the folder write {f'./{name}'!r}"
        known = f"{', '.join(DOMAINS)}, or the path of your own (FILE.toml)"
        raise ValueError(f"expected a domain out of {known}, got {name!r}{hint}")
    return _EMBEDDED / name


def is_path(name: object) -> bool:
    """Return whether a domain's name is a path: it ends in ``.toml`` or has a slash in it."""
    return isinstance(name, str) and (name.endswith(".toml") or "/" in name or os.sep in name)


def load(name: str) -> Domain:
    """Return a domain; read once per process.

    Args:
        name: Of an embedded domain; or the path of your own, a TOML file or a folder with ``domain.toml`` in it,
            relative to the working directory. A path ends in ``.toml`` or has a slash in it.

    Raises:
        ValueError: There is no such domain, or something is wrong with its files: one line per fault, with file and
            key.
    """
    return _load(str(Path(name).resolve()) if is_path(name) else name)


@functools.cache
def _load(source: str) -> Domain:
    yours = is_path(source)
    name = Path(source).name.removesuffix(".toml") if yours else source
    data, where = domain_files.read(Path(source) if yours else folder(source), "" if yours else name)
    common = domain_files.toml(_EMBEDDED / "common.toml", "common.toml")
    domain_files.check_shape(data, where)
    data["unasked"] = common["unasked"]
    data["tricks"] = common["tricks"] | data.get("tricks", {})
    data["replies"] |= {kind: texts for kind, texts in common["replies"].items() if kind not in data["replies"]}
    table = RuleTable.parse(data, where["domain"])
    data.setdefault("mix", _even_mix(table.kinds, data["tricks"]))
    data["mix"].setdefault("garbled", 0.0)
    markers = common["markers"] | data.get("markers", {})
    domain_files.check(data, where, table.kinds, markers)
    slots = data["slots"]
    return Domain(
        name=name,
        source=source,
        file=where["domain"],
        turns=data["turns"],
        scenario=data["scenario"],
        instruction=data["instruction"],
        table=table,
        mix={kind: weight for kind, weight in data["mix"].items() if weight > 0},
        tilt=data.get("tilt", {}),
        rules=tuple(
            ReadRule(rule["kind"], frozenset(rule["needs"]), frozenset(rule.get("without", ())))
            for rule in data["read"]
        ),
        slots={s: {v: tuple(p) for v, p in entry["values"].items()} for s, entry in slots.items()},
        cues={s: tuple(entry["cues"]) for s, entry in slots.items()},
        claims={s: tuple(entry.get("claims", ())) for s, entry in slots.items()},
        asked_only=frozenset(s for s, entry in slots.items() if entry.get("asked_only", False)),
        markers={k: tuple(v) for k, v in markers.items()},
        statements={s: entry["statement"] for s, entry in slots.items()},
        lines=data["lines"],
        replies=data["replies"],
        why=data.get("why", {}),
        partner=data.get("partner"),
        persona_seed=data.get("persona_seed", zlib.crc32(name.encode())),
        options=data.get("options", {}) | {"common_words": tuple(common["words"].split())},
    )


def _even_mix(kinds: Sequence[str], tricks: Collection[str]) -> dict[str, float]:
    """Return the mixture of a domain without ``[mix]``: its own kinds share four fifths evenly, the tricks the rest."""
    honest = [kind for kind in kinds if kind not in tricks]
    shares = {kind: 0.8 / len(honest) if kind in honest else (0.2 if honest else 1.0) / len(tricks) for kind in kinds}
    return {kind: shares[kind] for kind in (*honest, *tricks)}
