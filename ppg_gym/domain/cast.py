"""The personas of a domain: those that come with it, and more, drawn from the values that its facts can have.

Drawing is seeded, and no set of facts comes up twice. Only facts and names are drawn; the domain's own template makes
the instruction.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ppg_gym.conversation import Persona
from ppg_gym.domain.loading import SPLITS, Domain, folder, is_path, load
from ppg_gym.domain.personas import persona_id, read_personas

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mia", "Noah"),
    *("Olga", "Paul", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Victor", "Wanda", "Yusuf"),
)

SEED = 20260306
COUNT = 384  # of the personas that come with a domain; two thirds are for training

STEP = 1000  # personas between two calls of `done`

Facts = tuple[str, ...]
"""The values of a domain's slots, in the slots' order."""


def personas(name: str, split: str) -> tuple[Persona, ...]:
    """Return the personas that come with a domain, of the split ``train`` or ``held-out``.

    They are read from ``personas-SPLIT.jsonl`` in the domain's folder. A domain of your own that has no such file gets
    personas made from its facts: 384 of them, two thirds for training, or as many as there are sets of facts.

    Raises:
        ValueError: No such domain, an embedded one without its files, or too few values for two splits.
    """
    return _personas(load(name).source, split)


@functools.cache
def _personas(source: str, split: str) -> tuple[Persona, ...]:
    if not is_path(source):
        try:
            text = (folder(source) / f"personas-{split}.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            todo = "scripts/make_personas.py makes it"
            raise ValueError(f"{error.filename}: expected a file of personas, got none; {todo}") from error
        return tuple(Persona(**json.loads(line)) for line in text.splitlines())
    domain = load(source)
    files = {name: Path(source) / f"personas-{name}.jsonl" for name in SPLITS}
    if any(file.is_file() for file in files.values()):
        return tuple(read_personas(files[split], domain.name))
    return tuple(drawn_personas(domain)[split])


def drawn_personas(domain: Domain) -> dict[str, list[Persona]]:
    """Return the personas of a domain as its facts give them, by split; the same domain gives the same ones.

    256 are for training and 128 held out; where there are fewer than 384 sets of facts, all are used, two thirds for
    training.

    Raises:
        ValueError: Too few sets of facts for two splits.
    """
    total = min(COUNT, _space(domain))
    if total < 2:
        raise ValueError(f"{domain.file}: expected slots with values for two personas or more, got {total}")
    train = max(1, total * 2 // 3)
    rng, seen = np.random.default_rng([SEED, domain.persona_seed]), set[Facts]()
    return {
        split: [
            Persona(f"{domain.name}-{split}-{i:03d}", domain.instruct(name, facts), facts, domain.name, name)
            for i, (name, facts) in enumerate(draw(domain, n, rng, seen))
        ]
        for split, n in zip(SPLITS, (train, total - train), strict=True)
    }


def make_personas(
    domain: str,
    n: int,
    seed: int = 0,
    exclude: Iterable[Persona] = (),
    allow_embedded: bool = False,
    done: Callable[[int], object] | None = None,
) -> list[Persona]:
    """Make more personas for a domain.

    The same arguments give the same personas, and a larger ``n`` begins with the same ones. Ids come from the words of
    the instruction, so that two files never use one id for two personas.

    Args:
        domain: Name of an embedded domain, or the path of your own.
        n: How many.
        seed: Which ones.
        exclude: Personas whose facts may not come up again, under any name. Where a persona has no structured facts,
            they are read from its instruction if the domain's template made it.
        allow_embedded: Allow the facts of the personas that come with the domain.
        done: Called with the number made so far, every ``STEP`` and at the end.

    Raises:
        ValueError: No such domain, or fewer personas are possible than asked for (with their number).
    """
    loaded = load(domain)
    known = list(exclude)
    if not allow_embedded:
        known += [persona for split in SPLITS for persona in personas(domain, split)]
    taken = {facts for facts in (_facts(loaded, persona) for persona in known) if facts is not None}
    space = _space(loaded)
    if not 0 < n <= space - len(taken):
        raise ValueError(
            f"expected at least 1 and at most {space - len(taken)} personas ({domain!r} has {space} sets of facts, "
            f"{len(taken)} are taken), got {n}; ask for fewer, or exclude fewer"
        )
    rng = np.random.default_rng([seed, loaded.persona_seed])
    made = []
    for name, facts in draw(loaded, n, rng, taken):
        instruction = loaded.instruct(name, facts)
        made.append(Persona(persona_id(instruction, loaded.name), instruction, facts, loaded.name, name))
        if done is not None and (len(made) % STEP == 0 or len(made) == n):
            done(len(made))
    return made


def draw(domain: Domain, n: int, rng: np.random.Generator, taken: set[Facts]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield n (name, facts), all facts different; they are added to ``taken``.

    Never ends when fewer than n sets of facts are left: the caller makes sure that there are enough.
    """
    slots = {slot: list(values) for slot, values in domain.slots.items()}
    while n > 0:
        facts = {slot: values[int(rng.integers(len(values)))] for slot, values in slots.items()}
        values = tuple(facts.values())
        if values in taken:
            continue
        taken.add(values)
        n -= 1
        yield NAMES[int(rng.integers(len(NAMES)))], facts


def _space(domain: Domain) -> int:
    """Return how many sets of facts a domain has."""
    return math.prod(len(values) for values in domain.slots.values())


def _facts(domain: Domain, persona: Persona) -> Facts | None:
    """Return the values of a persona's facts; None when they are not the domain's."""
    if persona.facts:
        values = [persona.facts.get(slot, "") for slot in domain.slots]
    elif match := _template(domain).search(persona.instruction):
        values = [match[slot] for slot in domain.slots]
    else:
        return None
    known = all(value in domain.slots[slot] for slot, value in zip(domain.slots, values, strict=True))
    return tuple(values) if known else None


def _template(domain: Domain) -> re.Pattern[str]:
    """Return a pattern that finds the facts in an instruction made by the domain's template."""
    sentences = " ".join(domain.statements.values())
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(sentences)))
