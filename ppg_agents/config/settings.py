"""The settings of one training run: frozen dataclasses, one TOML file, ``--set a.b=c``.

Must not import torch, so that the command line can report a wrong key at once. A setting that is unknown, of the wrong
type (see `parsing`) or out of range (see `checks`) is an error that names it.
Precedence: defaults < recipe < TOML file < ``--set`` < flags.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ppg_agents.config.checks import check
from ppg_agents.config.parsing import ConfigError, build, flatten, plain, put, tables
from ppg_agents.credit import PolicyClass
from ppg_agents.recipes import recipe as recipe_file

Baseline = Literal["none", "leave-one-out", "batch-mean", "moving-average", "group", "group-turn"]
Schedule = Literal["constant", "linear", "cosine"]

PERSONA_CHAT = "ppg_gym:PersonaChat-v0"
_SERVER = (
    *("base_url", "timeout", "attempts", "concurrency", "api_key_env", "cache", "max_calls", "max_total_tokens"),
    *("identity", "headroom", "omit", "extra_body"),
)
RESUMABLE = (
    *("iterations", "out", "threads", "checkpoint_every", "keep_checkpoints", "report_to", "env.max_failure_rate"),
    *("evaluation.at", "env.max_partner_failure_rate", "max_log_prob_gap"),
    *("sampling.endpoints", "sampling.timeout", "sampling.patience", "load.gradient_checkpointing"),
    *(f"env.{part}_options.{key}" for part in ("judge", "partner") for key in _SERVER),
)
"""Settings that may change when a run is resumed; with more ``iterations``, a falling learning rate continues at its
place in the longer schedule."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation (arXiv 2106.09685): which layers, and how much.

    Attributes:
        rank: Rank of the update; in a run, 0 trains all weights.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Dropout before the update, while gradients are recorded.
        targets: ``"all-linear"`` (every linear layer but the head) or module name endings.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        dora: Learn magnitude and direction separately (arXiv 2402.09353).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True)
class LoadSettings:
    """How the model is loaded.

    Attributes:
        chat_template: Jinja text, or a path to it, to replace the tokenizer's.
        template_options: Extra variables for the template, e.g. ``enable_thinking``.
        quantisation: ``4bit`` keeps the base weights in NF4 (bitsandbytes, CUDA).
        dtype: ``auto`` is bfloat16 on CUDA, else float32.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        kernels: ``liger`` uses liger-kernel's norms and MLPs.
    """

    chat_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    quantisation: Literal["none", "4bit"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    kernels: Literal["none", "liger"] = "none"


@dataclass(frozen=True)
class SamplingSettings:
    """How replies are sampled; the ledger holds log-probs of the distribution that was sampled from.

    Attributes:
        max_new_tokens: A reply is cut at this length.
        temperature: For sampling and for the learner's log-probs. 0 takes the most likely token, where nothing is
            learned: evaluate, rollout, chat.
        backend: ``hf`` (the learner's own model) or ``vllm``.
        endpoints: vLLM servers; empty for vLLM in this process.
        sync: How vLLM gets the newest weights: a new ``adapter`` per version, or ``merged`` weights.
        timeout: Seconds a server may take for one answer.
        patience: Seconds without an answer from any server before it is an error.
        api_key_env: Environment variable with the servers' key; leave it unset if they need none.
        engine: More arguments for vLLM's engine in this process.
    """

    max_new_tokens: int = 48
    temperature: float = 1.0
    backend: Literal["hf", "vllm"] = "hf"
    endpoints: tuple[str, ...] = ()
    sync: Literal["adapter", "merged"] = "adapter"
    timeout: float = 300.0
    patience: float = 120.0
    api_key_env: str = "VLLM_API_KEY"
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EnvSettings:
    """The Gymnasium environment.

    ``kwargs`` goes to ``gym.make_vec`` on top of the other settings. An ``id`` other than PersonaChat-v0 gets
    ``kwargs`` alone; evaluation adds ``held_out_kwargs``. ``instruction`` is what the policy is told where observations
    are plain text.
    """

    id: str = PERSONA_CHAT
    partner: str = "scripted"
    partner_options: dict[str, Any] = field(default_factory=dict)
    judge: str = "facts"
    judge_options: dict[str, Any] = field(default_factory=dict)
    max_turns: int | None = None
    on_judge_failure: Literal["raise", "nan", "truncate"] = "nan"
    max_failure_rate: float = 0.05
    max_partner_failure_rate: float = 0.05
    kwargs: dict[str, Any] = field(default_factory=dict)
    held_out_kwargs: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""

    @property
    def name(self) -> str:
        """The id without its module."""
        return self.id.rpartition(":")[2]

    @property
    def is_persona_chat(self) -> bool:
        """Whether it is PersonaChat-v0, which takes domain, personas, partner and judge from the settings."""
        return self.name == PERSONA_CHAT.rpartition(":")[2]


@dataclass(frozen=True)
class OfflineSettings:
    """Training on logged dialogues: passes over the data, share of personas held out, longest sequence."""

    files: tuple[str, ...] = ()
    epochs: int = 1
    held_out: float = 0.2
    max_tokens: int | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation before and after training; 0 conversations switches it off.

    Attributes:
        conversations: How many to play per evaluation.
        seed: For personas, partners and draws; the same in every evaluation of the run.
        at: More iterations after which to evaluate.
    """

    conversations: int = 128
    seed: int = 1_000_003
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class AutoSettings:
    """The policy class ``auto``: now and then, take the shortest class shown to point where full planning does.

    See ``docs/horizon.md``.

    Attributes:
        every: Iterations from one choice to the next.
        cosine: Least cosine of a class's gradient with full planning's, at 95% confidence.
        classes: Candidates, as `PolicyClass.parse` reads them; empty for every K.
    """

    every: int = 20
    cosine: float = 0.9
    classes: tuple[PolicyClass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(PolicyClass.parse, self.classes)))


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on.

    ``batch`` is conversations per iteration, ``group`` of them with the same persona. ``policy_class`` is what
    `PolicyClass.parse` reads, or ``"auto"``, chosen as the settings ``auto`` say. An online agent takes
    ``steps_per_batch`` optimiser steps on every batch; ``agent_options`` are its own options, by name. ``reward`` says
    what the judge's score of a turn is: its reward, or, with ``prefix``, a score of the whole conversation so far
    (`ppg_agents.prefixes`). ``warmup`` is how long the learning rate rises before ``schedule`` takes over: below 1 a
    share of all optimiser steps, from 1 on a number of them. ``max_grad_norm`` 0 is no clipping.
    ``reference_kl_every`` is in iterations, 0 for never.
    """

    domain: str = "chatting"
    policy_class: Literal["auto"] | PolicyClass = field(default_factory=PolicyClass)
    agent: str = "ppg"
    agent_options: dict[str, Any] = field(default_factory=dict)
    model: str = "tiny"
    personas: str = "train"
    iterations: int = 100
    batch: int = 32
    group: int = 1
    seed: int = 0
    out: str | None = None
    steps_per_batch: int = 1
    reward: Literal["turn", "prefix"] = "turn"
    baseline: Baseline = "batch-mean"
    standardise: bool = False
    discount: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-3
    schedule: Schedule = "linear"
    warmup: float = 0.0
    max_grad_norm: float = 1.0
    aggregation: Literal["sum", "constant", "token_mean", "sequence_mean", "turn_mean"] = "sum"
    aggregation_constant: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    micro_batch_tokens: int = 8_192
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    threads: int | None = None
    importance: Literal["none", "turn", "token"] = "none"
    importance_cap: float = 2.0
    max_staleness: int = 0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    reference_kl_every: int = 5
    max_log_prob_gap: float | None = None
    report_to: tuple[str, ...] = ()
    auto: AutoSettings = field(default_factory=AutoSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    env: EnvSettings = field(default_factory=EnvSettings)
    offline: OfflineSettings = field(default_factory=OfflineSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        """Check ranges and combinations.

        Raises:
            ConfigError: A value out of range, or settings that contradict one another.
        """
        if self.policy_class != "auto":  # Python may write it as files do
            object.__setattr__(self, "policy_class", PolicyClass.parse(self.policy_class))
        check(self)

    @property
    def label(self) -> str:
        """The policy class in words, for titles and run names: ``3-step``, ``segment 3,3,2``, ``auto``."""
        return str(self.policy_class)

    @property
    def world(self) -> str:
        """Where the policy speaks, for trajectories and tables: PersonaChat's domain, or the environment's id."""
        return self.domain if self.env.is_persona_chat else self.env.name

    @property
    def learner(self) -> str:
        """The agent's name in titles: ``Class`` for ``module:Class``; empty for the default, ``ppg``."""
        return "" if self.agent == "ppg" else self.agent.rpartition(":")[2]

    @property
    def subject(self) -> str:
        """The start of titles and run names: ``chatting``, ``therapy, grpo``, ``MyEnv-v0``, ``offline, sft``."""
        where = "offline" if self.offline.files else self.world
        return f"{where}, {self.learner}" if self.learner else where


def load(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, recipe: str | None = None
) -> TrainConfig:
    """Return the settings of a TOML file, over those of a recipe, with dotted ``overrides`` on top; later keys win.

    A judge or partner of the file that is not the recipe's starts without the recipe's options.

    Raises:
        ConfigError: The file cannot be read, or a setting is wrong; the message names it.
        ValueError: No recipe has that name.
    """
    given, merged = _layers(path, recipe)
    try:
        merged = _folded(deepcopy(merged))
        for key, value in _folded(overrides or {}).items():
            put(merged, key, value)
        if recipe is not None and not _table(merged, "offline").get("files"):
            raise ConfigError(f"the recipe {recipe!r} learns from logged dialogues; give --offline FILES")
        return from_dict(merged)
    except ConfigError as error:
        fault = str(error)
        if path is None or not _at_fault(given, fault):
            raise
        raise ConfigError(f"{path}: {fault}") from error


def speaker(part: Literal["judge", "partner"], path: Path | None = None, recipe: str | None = None) -> str:
    """Return the judge or partner that a file over a recipe names, or the default.

    Raises:
        ConfigError: The file cannot be read.
        ValueError: No recipe has that name.
    """
    return str(_table(_layers(path, recipe)[1], "env").get(part, getattr(EnvSettings, part)))


def _layers(path: Path | None, recipe: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's tables, and the same over those of a recipe."""
    given = {} if path is None else _read(path)
    if recipe is None:
        return given, given
    beneath = _read(recipe_file(recipe))
    for part in ("judge", "partner"):
        named = _table(given, "env").get(part)
        if named is not None and named != _table(beneath, "env").get(part):
            _table(beneath, "env").pop(f"{part}_options", None)
    return given, _over(beneath, given)


def _read(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables, or raise a ConfigError that names it."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a readable TOML file, got {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML: {error}") from error


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a table of the tables; an empty one where it is missing, or no table, which `build` reports."""
    inner = tables.get(name)
    return inner if isinstance(inner, dict) else {}


def _over(beneath: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, table by table; what is given wins."""
    merged = {**beneath, **given}
    for key in beneath.keys() & given.keys():
        if isinstance(beneath[key], Mapping) and isinstance(given[key], Mapping):
            merged[key] = _over(beneath[key], given[key])
    return merged


def _at_fault(given: Mapping[str, Any], fault: str) -> bool:
    """Return whether the file alone has the same fault."""
    try:
        from_dict(given)
    except ConfigError as error:
        return str(error) == fault
    return False


def _folded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with ``lookahead`` and ``segments`` (flags and older files) turned into ``policy_class``.

    Raises:
        ConfigError: They contradict it or each other, or are not valid.
    """
    kept = dict(given)
    for key, owner in (("lookahead", "k-step"), ("segments", "segment")):
        value, named = kept.pop(key, None), kept.get("policy_class", owner)
        if value is None:
            continue
        if named != owner:
            raise ConfigError(f"{key}: belongs to the policy class {owner}, got {named}; drop --{key} or use {owner}")
        if key == "segments" and not isinstance(value, list | tuple):
            raise ConfigError(f"segments: expected a list of lengths such as [3, 3, 2], got {value!r}")
        try:
            one = PolicyClass(owner, value) if key == "lookahead" else PolicyClass(owner, segments=tuple(value))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        kept["policy_class"] = one
    return kept


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return ``{"a.b": value}`` for strings ``a.b=value``; the value is read as TOML, else as a string.

    Raises:
        ConfigError: No ``=``, or no key before it.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set: expected key=value such as lora.rank=8, got {text!r}")
        try:
            values[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = value
    return values


def from_dict(given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that nested tables describe.

    Raises:
        ConfigError: An unknown key (with the nearest name), a wrong type, a value out of range.
    """
    return build(TrainConfig, _folded(given))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return nested plain tables for TOML and JSON; settings that are None are left out."""
    written: dict[str, Any] = plain(tables(config))
    return written


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return ``"key: was X, got Y"`` for every setting that a continuation of a run may not change."""
    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    keys = [key for key in sorted(old | new) if key not in RESUMABLE and {} not in (old.get(key), new.get(key))]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)!r}, got {new.get(key)!r}" for key in changed]
