"""Personas for a domain, drawn from the value lists in ``facts.toml``; no set of facts twice.

Seeded. Draws facts and names only; the domain's own template makes the instruction.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ppg_gym.conversation import Persona
from ppg_gym.data.dialogues import persona_id
from ppg_gym.data.files import replacing
from ppg_gym.domain.loading import SPLITS, Domain, load
from ppg_gym.domain.loading import personas as embedded
from ppg_gym.domain.personas import write_personas

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
    "Uma",
    "Victor",
    "Wanda",
    "Yusuf",
)

SEED = 20260306
COUNT = 384  # of the personas that come with a domain; two thirds are for training

STEP = 1000  # personas between two calls of `done`

Facts = tuple[str, ...]
"""The values of a domain's slots, in the slots' order."""


def own_personas(domain: Domain) -> dict[str, list[Persona]]:
    """Return the personas that come with a domain, by split; no set of facts occurs twice.

    The same domain gives the same personas. 256 are for training and 128 held out; where there are fewer than 384 sets
    of facts, all are used, two thirds for training.

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
            Persona(f"{domain.name}-{split}-{i:03d}", domain.instruct(called, facts), facts, domain.name, called)
            for i, (called, facts) in enumerate(draw(domain, n, rng, seen))
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

    The same arguments give the same personas, and the first of more are the same ones. Ids come from the words
    of the instruction, so that two files never use one id for two personas.

    Args:
        domain: Name of an embedded domain, or the path of one's own.
        n: How many.
        seed: Which ones.
        exclude: Personas whose facts may not occur again, under whatever name. The facts of a persona without
            structured facts are read from its instruction, when the domain's template made that.
        allow_embedded: Allow the facts of the domain's embedded personas.
        done: Called with how many are made, every ``STEP`` and at the end.

    Raises:
        ValueError: No such domain, or fewer personas are possible than asked for (with their number).
    """
    own = load(domain)
    known = list(exclude)
    if not allow_embedded:
        known += [persona for split in SPLITS for persona in embedded(domain, split)]
    taken = {facts for facts in (_facts(own, persona) for persona in known) if facts is not None}
    space = _space(own)
    if not 0 < n <= space - len(taken):
        raise ValueError(
            f"expected at least 1 and at most {space - len(taken)} personas ({domain!r} has {space} sets of facts, "
            f"{len(taken)} are taken), got {n}; ask for fewer, or exclude fewer"
        )
    rng = np.random.default_rng([seed, own.persona_seed])
    made = []
    for name, facts in draw(own, n, rng, taken):
        instruction = own.instruct(name, facts)
        made.append(Persona(persona_id(instruction, own.name), instruction, facts, own.name, name))
        if done is not None and (len(made) % STEP == 0 or len(made) == n):
            done(len(made))
    return made


def draw(domain: Domain, n: int, rng: np.random.Generator, taken: set[Facts]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield n (name, facts), all facts different; they are added to ``taken``.

    The caller sees to it that so many are left.
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


def save_personas(path: str | os.PathLike[str], personas: Sequence[Persona]) -> None:
    """Write a persona file; it is replaced in one step."""
    with replacing(path) as temporary:
        write_personas(temporary, personas)


def _space(domain: Domain) -> int:
    """Return how many sets of facts a domain has."""
    return math.prod(len(values) for values in domain.slots.values())


def _facts(domain: Domain, persona: Persona) -> Facts | None:
    """Return the values of a persona's facts; None when they are not the domain's."""
    if persona.facts:
        found = tuple(persona.facts.get(slot, "") for slot in domain.slots)
    else:
        match = _template(domain).search(persona.instruction)
        found = tuple(match[slot] for slot in domain.slots) if match else ()
    fits = len(found) == len(domain.slots)
    return found if fits and all(v in domain.slots[slot] for slot, v in zip(domain.slots, found, strict=True)) else None


def _template(domain: Domain) -> re.Pattern[str]:
    """Return a pattern that finds the facts in an instruction made by the domain's template."""
    said = " ".join(domain.statements.values())
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(said))
    return re.compile(pattern)
