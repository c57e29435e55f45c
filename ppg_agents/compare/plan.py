"""A comparison's plan: a TOML file, its cells, and the runs that fill them.

Reads and combines settings; starts nothing and may not import torch.

A run with a constant learning rate is the same whatever its length, so one run fills the cells of all sample sizes,
with evaluations on the way. With a falling rate, or a warm-up that is a share of the run, every size needs its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ppg_agents.agents.methods import METHODS
from ppg_agents.agents.registry import agents
from ppg_agents.config import settings as configs
from ppg_agents.config.checks import check_learning
from ppg_agents.config.parsing import ConfigError, build, flatten, put
from ppg_agents.config.settings import TrainConfig
from ppg_agents.credit import PolicyClass
from ppg_agents.horizon.choice import by_label
from ppg_agents.models.finding import base_of, locate
from ppg_agents.nearest import did_you_mean

UNTRAINED = tuple(name for name, method in METHODS.items() if not method.learns)
CLASSLESS = tuple(name for name, method in METHODS.items() if not (method.learns and method.credit))
SB3 = "sb3-"
SB3_AGENTS = ("sb3-ppo", "sb3-a2c", "sb3-dqn")
OURS = ("domain", "agent", "policy_class", "lookahead", "segments", "seed", "iterations", "out", "evaluation.at")


@dataclass(frozen=True)
class Plan:
    """The comparison's settings; its TOML form has the same names.

    Attributes:
        domains: Names of domains; left out where ``settings.env.id`` is another environment than PersonaChat-v0.
        agents: Names of agents, ``sb3-ppo``, ``sb3-a2c`` and ``sb3-dqn`` among them.
        classes: Policy classes, as `PolicyClass.parse` reads them, ``auto``, or ``segment/2`` for two segments of
            equal length.
        sizes: Training conversations.
        seeds: For training; evaluation uses the same personas and draws for all.
        settings: Any settings of a training run, for all runs.
        agent_settings: The same for the runs of one agent, by its name.
        class_agents: Agents to run with every class, the others with the first alone; empty for all.
    """

    domains: tuple[str, ...] = ("chatting",)
    agents: tuple[str, ...] = ("ppg",)
    classes: tuple[str, ...] = ("full",)
    sizes: tuple[int, ...] = (640,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    settings: dict[str, Any] = field(default_factory=dict)
    agent_settings: dict[str, Any] = field(default_factory=dict)
    class_agents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the plan.

        Raises:
            ConfigError: An empty or repeated list, a size below 1, or settings that the plan itself makes.
        """
        for name in ("domains", "agents", "classes", "sizes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: expected at least one value and none twice, got {list(values)}")
        if min(self.sizes) < 1 or min(self.seeds) < 0:
            raise ConfigError(f"expected sizes >= 1 and seeds >= 0, got {list(self.sizes)} and {list(self.seeds)}")
        for where, table in (("settings", self.settings), *self.agent_settings.items()):
            for key in OURS:
                if key in flatten(table):
                    raise ConfigError(f"{where}.{key}: the comparison sets it itself; leave it out")
        for name, table in self.agent_settings.items():
            for key in flatten(table):
                if key.startswith("evaluation.") or key in ("env.id", "env.max_turns", "env.kwargs.max_turns"):
                    raise ConfigError(f"agent_settings.{name}.{key}: it must be the same for all; use settings")
        if flatten(self.settings).get("evaluation.conversations") == 0:
            raise ConfigError("settings.evaluation.conversations: expected at least 1, got 0, which compares nothing")
        for name in (*self.agent_settings, *self.class_agents):
            if name not in self.agents:
                raise ConfigError(f"expected settings of agents out of {', '.join(self.agents)}, got {name!r}")


@dataclass(frozen=True)
class Job:
    """One run, and the cells that it fills.

    Attributes:
        agent: The agent.
        planning: The policy class in words; empty if the agent uses none.
        domain: Where: a domain, or the id of another environment than PersonaChat-v0.
        seed: Of the run.
        sizes: Training conversations of its cells.
        config: Its settings, as plain tables.

    A subclass may add measurements, with its own ``module``.
    """

    module: ClassVar[str] = "ppg_agents.compare.cell"
    further: ClassVar[tuple[str, ...]] = ()  # more files in its folder

    agent: str
    planning: str
    domain: str
    seed: int
    sizes: tuple[int, ...]
    config: dict[str, Any]

    @property
    def method(self) -> str:
        """The agent and its policy class, as tables show them."""
        if self.agent == "ppg":
            return self.planning
        return f"{self.agent} {self.planning}".strip()

    @property
    def name(self) -> str:
        """The folder's name; it stays the same when sizes are added."""
        size = "" if len(self.sizes) != 1 else f" n{self.sizes[0]}"
        words = f"{self.domain} {self.agent} {self.planning} s{self.seed}{'' if self.nested else size}"
        return re.sub(r"[^a-zA-Z0-9+]+", "-", words).strip("-")

    def measured(self, folder: Path) -> bool:
        """Return whether all further measurements are there."""
        return True

    @property
    def nested(self) -> bool:
        """Whether one run fills the cells of all sizes."""
        return not self.agent.startswith(SB3) and _any_length(self.config)


def read(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: The file cannot be read, or a setting is wrong; the message names it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a readable TOML file, got {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML: {error}") from error
    try:
        return build(Plan, tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def worlds(plan: Plan) -> dict[str, TrainConfig]:
    """Return the shared settings of all runs by domain, or by the id of the plan's own environment.

    Raises:
        ConfigError: A wrong setting; or domains with an environment other than PersonaChat-v0.
    """
    given = flatten(plan.settings)
    shared = [configs.load(None, {**given, "domain": domain}) for domain in plan.domains]
    return {config.world: config for config in shared}


def jobs(plan: Plan, turns: Mapping[str, int]) -> list[Job]:
    """Return the runs that fill the plan's cells: seed by seed, so an unfinished comparison has whole rounds.

    Args:
        plan: What is compared.
        turns: Of a conversation, by the keys of `worlds`.

    Raises:
        ConfigError: An agent that is unknown or cannot act there, a class that does not fit a domain's turns, a
            size that is no multiple of the batch, or a wrong setting.
    """
    places = worlds(plan)
    for agent in plan.agents:
        try:
            check_agent(agent)
        except ValueError as error:
            raise ConfigError(f"agents: {error}") from error
        for config in places.values():
            if agent.startswith(SB3) and not config.env.is_persona_chat:
                raise ConfigError(
                    f"agents: {agent!r} chooses among replies of PersonaChat-v0, got env.id = {config.env.id!r}; "
                    "leave it out"
                )
    return [
        job
        for seed in plan.seeds
        for world, config in places.items()
        for agent in plan.agents
        for planning in _classes(plan, agent, turns[world])
        for job in _runs(plan, agent, planning, config.domain, seed)
    ]


def check_agent(name: str) -> None:
    """Refuse an unknown agent before the first run starts.

    Raises:
        ValueError: No such agent; the message suggests the nearest.
    """
    known = [*agents(), *SB3_AGENTS]
    if name not in known and (":" not in name or name.startswith(SB3)):
        hint = did_you_mean(name, known) or "; docs/agents.md has their names"
        raise ValueError(f"expected an agent, or your own as 'package.module:Class', got {name!r}{hint}")


def check_models(jobs: Iterable[Job]) -> None:
    """Refuse a model that is not found, before the first run starts.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: As the run would; see `models.finding.locate`.
    """
    for name in dict.fromkeys(str(job.config["model"]) for job in jobs if not job.agent.startswith(SB3)):
        locate(base_of(name)[0])


def _classes(plan: Plan, agent: str, turns: int) -> list[PolicyClass | str]:
    """Return the classes to run an agent with, one per mask; ``""`` for an agent that uses none."""
    if agent in CLASSLESS or agent.startswith(SB3):
        return [""]
    all_classes = not plan.class_agents or agent in plan.class_agents
    kept: dict[bytes, PolicyClass | str] = {}
    for text in plan.classes if all_classes else plan.classes[:1]:
        name, _, parts = text.partition("/")
        if name == "segment" and parts.isdecimal() and 1 <= int(parts) <= turns:
            length, rest = divmod(turns, int(parts))
            text = "segment:" + ",".join(str(length + (i < rest)) for i in range(int(parts)))
        if text == "auto":
            kept[b""] = text
            continue
        try:
            one = PolicyClass.parse(text)
            kept.setdefault(one.mask(turns).tobytes(), one)  # with 6 turns, 6-step is full planning
            by_label(c for c in kept.values() if isinstance(c, PolicyClass))
        except ValueError as error:
            raise ConfigError(f"classes: {error}") from error
    return list(kept.values())


def _runs(plan: Plan, agent: str, planning: PolicyClass | str, domain: str, seed: int) -> Iterator[Job]:
    tables: dict[str, Any] = {}
    given = flatten(plan.settings) | flatten(plan.agent_settings.get(agent, {}))
    given |= {"domain": domain, "seed": seed, "policy_class": planning or "full"}
    given |= {"agent": "ppg" if agent.startswith(SB3) else agent}
    given.setdefault("schedule", "constant")
    for key, value in given.items():
        put(tables, key, value)
    config = configs.from_dict(tables)
    check_learning(config)
    world, batch = config.world, config.batch
    wrong = [size for size in plan.sizes if size % batch]
    if wrong:
        raise ConfigError(f"sizes: expected multiples of batch = {batch} of agent {agent}, got {wrong}")
    nested = not agent.startswith(SB3) and _any_length(tables)
    if agent in UNTRAINED:
        yield Job(agent, str(planning), world, seed, plan.sizes, _sized(tables, (batch,), batch))
    else:
        for sizes in [tuple(sorted(plan.sizes))] if nested else [(size,) for size in plan.sizes]:
            yield Job(agent, str(planning), world, seed, sizes, _sized(tables, sizes, batch))


def _any_length(tables: Mapping[str, Any]) -> bool:
    """Return whether a run's first steps are the same whatever its length."""
    return tables["schedule"] == "constant" and not 0 < tables.get("warmup", 0.0) < 1


def _sized(tables: Mapping[str, Any], sizes: Sequence[int], batch: int) -> dict[str, Any]:
    """Return a run's settings with its length and evaluations."""
    at = [size // batch for size in sizes]
    evaluation = {**tables.get("evaluation", {}), "at": at}
    return configs.to_dict(configs.from_dict({**tables, "iterations": at[-1], "evaluation": evaluation}))


def config_of(job: Job) -> TrainConfig:
    """Return the settings of a run's process: one thread, unless the plan says otherwise."""
    return configs.from_dict({"threads": 1, **job.config})
