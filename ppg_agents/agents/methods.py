"""The table of methods, as data. Listing, checking and describing them needs no torch.

A row names its functions by string, ``module:function``; a module without a package is in ``ppg_agents.agents``.
`learner.Learner` runs them all. To add a method, add a row here and, if the formula is new, a function. Your own row,
for `Learner(method=row)`, may hold the functions themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from ppg_agents.nearest import did_you_mean

Options = Mapping[str, Any]
Reference = str | Callable[..., Any]
KL = Literal["none", "loss", "token", "reward"]


@dataclass(frozen=True)
class Method:
    """One way to learn from judged conversations.

    Attributes:
        options: By name, with defaults. A tuple lists the choices, the default first; None takes a number.
        loss: ``(micro-batch, advantage [R, L'], options) -> [R, L']``, a loss per token.
        pair_loss: In place of ``loss``: ``(log w, log w', credit, credit', valid, options) -> [P, n]`` for P pairs of
            conversations, rows 2p and 2p + 1.
        advantage: ``(turns, options) -> [B, n]``, per turn of the whole batch; None is the credit less the baseline.
        critic: In place of ``advantage``: ``(estimation, options) -> Critique``, with or without a value head.
        keep: ``(whole, options) -> [B]``, the conversations to learn from; None keeps all.
        bounds: ``(advantage, options) -> (low, high)`` of w = π / π°, to count clipped tokens; None without bounds.
        check: ``(options, settings) -> None``; raises a ValueError for options or settings that clash.
        ratio: Whether the loss reads w.
        branch: Whether a pair shares its history up to a turn (see ``rollout.pairs``).
        refers: Whether the pair loss reads the reference model in place of the sampler.
        takes: The settings of `SETTINGS` that the method uses.
        kl: What ``kl_coefficient`` does: nothing; ``loss`` adds ``losses.kl_loss``, ``token`` ``alternatives.kl_term``;
            ``reward`` subtracts the log-ratio from the reward before credit is formed.
        group: Least number of conversations per persona.
        source_aggregation: How the source turns token losses into one number; None where we do not know.
        entropy: Whether the advantage uses the replies' entropies.
        credit: Whether it uses the policy class's credit.
        offline: Whether it also learns from logged dialogues.
        learns: False for methods that only serve as a comparison.
        baseline: The default baseline.
        fixed: Options that the name fixes.
    """

    options: Options = field(default_factory=dict)
    loss: Reference = "surrogates:policy_gradient"
    pair_loss: Reference | None = None
    advantage: Reference | None = None
    critic: Reference | None = None
    keep: Reference | None = None
    bounds: Reference | None = None
    check: Reference | None = None
    ratio: bool = True
    branch: bool = False
    refers: bool = False
    takes: frozenset[str] = frozenset()
    kl: KL = "loss"
    group: int = 1
    source_aggregation: Literal["constant", "token_mean", "sequence_mean"] | None = None
    entropy: bool = False
    credit: bool = True
    offline: bool = False
    learns: bool = True
    baseline: Literal["batch-mean", "leave-one-out"] = "batch-mean"
    fixed: Options = field(default_factory=dict)

    def fill(self, name: str, given: Options) -> dict[str, Any]:
        """Return all options, ``given`` over the defaults; ``name`` is the method's, for messages.

        Raises:
            ValueError: An option that the method does not have, of the wrong type, out of range, or not a choice.
        """
        known = {**self.options, **({"aggregation_of_source": False} if self.source_aggregation else {})}
        filled = {key: default[0] if isinstance(default, tuple) else default for key, default in known.items()}
        for key, value in given.items():
            if key not in known:
                hint = did_you_mean(key, known)
                raise ValueError(f"expected an option of {name!r} ({', '.join(known) or 'none'}), got {key!r}{hint}")
            filled[key] = _fitting(f"{name!r}: {key}", value, known[key])
        for key, (fits, expected) in RANGES.items():
            if key in filled and not fits(filled[key]):
                raise ValueError(f"{name!r}: expected {key} {expected}, got {filled[key]}")
        return {**filled, **self.fixed}

    def check_settings(self, name: str, settings: Options) -> None:
        """Refuse settings of the run that the method would ignore.

        Raises:
            ValueError: A setting with another value than its default; the message says why it does not act.
        """
        for key, (default, why) in SETTINGS.items():
            value = settings.get(key, default)
            takes = self.kl != "none" if key == "kl_coefficient" else key in self.takes
            takes |= key == "entropy_coefficient" and self.learns
            if value != default and not takes:
                raise ValueError(f"{name!r}: expected {key} = {default!r}, got {value!r}: {why}; leave it out")
        steps = settings.get("steps_per_batch", 1)
        if steps > 1 and not self.repeatable and settings.get("importance", "none") == "none":
            raise ValueError(
                f"expected steps_per_batch = 1 with importance 'none', got {steps}: a later step learns from replies "
                "of an older policy; set importance to 'turn' or 'token'"
            )

    def reads_reference(self, options: Options, beta: float) -> bool:
        """Return whether the loss reads the reference model's log-probs, given the options and ``kl_coefficient``."""
        variant = options.get("variant", "reference_free")
        return self.refers or variant != "reference_free" or (self.kl == "token" and beta > 0)

    def full_only(self, options: Options) -> bool:
        """Return whether it takes full planning only, because it uses no policy class's credit."""
        return not self.credit or options.get("credit") == "gae"

    @property
    def repeatable(self) -> bool:
        """Whether several steps on a batch need no importance weights, as the loss has its own ratios."""
        return "importance" not in self.takes


def resolve(reference: Reference) -> Callable[..., Any]:
    """Return the function that a row names as ``module:function``, or the function that it holds."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    place = module if "." in module else f"ppg_agents.agents.{module}"
    function: Callable[..., Any] = getattr(importlib.import_module(place), name)
    return function


def _fitting(name: str, value: Any, default: Any) -> Any:
    """Return an option's value as the type of its default."""
    if isinstance(default, tuple):
        if value not in default:
            hint = did_you_mean(str(value), default)
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, default))}, got {value!r}{hint}")
        return value
    kind = float if default is None else type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "keep": (lambda share: 0 < share <= 1, "in (0, 1]"),
    "n": (lambda count: count >= 1, ">= 1"),
    "lam": (lambda weight: 0 <= weight <= 1, "in [0, 1]"),
    "token_discount": (lambda discount: 0 <= discount <= 1, "in [0, 1]"),
    "epsilon": (lambda epsilon: epsilon > 0, "> 0"),
    "value_clip": (lambda clip: clip >= 0, ">= 0 (0 for none)"),
    "value_epochs": (lambda count: count >= 1, ">= 1"),
    "value_learning_rate": (lambda rate: 0 < rate < float("inf"), "> 0"),
}
"""Ranges of options, the same for every method; the losses check their own."""

SETTINGS: dict[str, tuple[Any, str]] = {
    "baseline": ("batch-mean", "its advantage has its own baseline"),
    "standardise": (False, "its advantage is scaled as its source scales it"),
    "discount": (1.0, "it has no credit to discount by turn"),
    "importance": ("none", "its loss has its own ratios, or none"),
    "importance_cap": (2.0, "its loss has its own ratios, or none"),
    "kl_coefficient": (0.0, "it has no such term"),
    "aggregation": ("sum", "its loss is no sum over tokens"),
    "steps_per_batch": (1, "it takes no optimiser step"),
    "entropy_coefficient": (0.0, "it takes no optimiser step"),
}
"""Settings that not every method uses: their defaults, and why another value would be ignored."""

_STEPS = frozenset({"aggregation", "steps_per_batch", "discount"})
_FREE = _STEPS | {"baseline", "standardise"}
_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
_VALUE = {"value_clip": 0.5, "value_learning_rate": 0.02, "value_epochs": 4}  # a value_clip of 0 is none
_GAE = {"credit": ("gae", "class"), **_CLIP, "lam": 1.0, "token_discount": 1.0, "whiten": True, **_VALUE}

_CLIPPED = partial(Method, loss="surrogates:ppo_clip", bounds="surrogates:clip_bounds", takes=_STEPS)
_GROUPED = partial(_CLIPPED, advantage="advantages:grpo", group=2, kl="token", source_aggregation="sequence_mean")
_PAIRED = partial(Method, group=2, takes=frozenset({"steps_per_batch", "discount"}))
_BRANCHED = partial(_PAIRED, branch=True, kl="none")
_COMPARED = partial(Method, learns=False, ratio=False, kl="none", takes=frozenset({"discount"}))
_RPG = Method(
    options={
        "divergence": ("reverse_u", "forward", "forward_u", "reverse"),
        "form": ("differentiable", "reinforce"),
        "beta": 1e-4,
        "clip": ("paper", "none", "released", "hard"),
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": 10.0,
        "ratio": ("token", "reply"),
        "kl_to_go": False,
    },
    loss="surrogates:rpg",
    bounds="surrogates:rpg_bounds",
    takes=_FREE,
    kl="none",
    source_aggregation="token_mean",
)


def _rpg_variant(divergence: str, form: str) -> Method:
    """Return RPG with divergence and form fixed by the name, so that a comparison can include several."""
    decided = {"divergence": divergence, "form": form}
    return replace(_RPG, options={k: v for k, v in _RPG.options.items() if k not in decided}, fixed=decided)


METHODS: dict[str, Method] = {
    "ppg": Method(ratio=False, takes=_FREE | {"importance", "importance_cap"}, offline=True, baseline="leave-one-out"),
    "base": _COMPARED(),
    "best-of-n": _COMPARED({"n": 4}),
    "sft": Method(
        {"keep": 0.25},
        advantage="advantages:imitated",
        keep="advantages:best_share",
        ratio=False,
        kl="none",
        takes=_STEPS - {"discount"},
        credit=False,
        offline=True,
    ),
    "rloo": _CLIPPED({**_CLIP, "ratio": ("reply", "token")}, advantage="advantages:rloo", group=2, kl="reward"),
    "grpo": _GROUPED({**_CLIP, "ratio_cap": None, "epsilon": 1e-4, "kl_weighted": True}),
    "dr-grpo": _GROUPED({**_CLIP, "kl_weighted": True}, advantage="advantages:dr_grpo", source_aggregation="constant"),
    "dapo": _GROUPED(
        {"clip_low": 0.2, "clip_high": 0.28, "epsilon": 1e-4, "dynamic_sampling": False, "overlong_buffer": 0},
        keep="advantages:with_spread",
        kl="none",
        source_aggregation="token_mean",
    ),
    "reinforce++": _CLIPPED(
        {**_CLIP, "whiten": ("turns", "tokens"), "group_mean": False}, advantage="advantages:whitened", kl="reward"
    ),
    "cispo": Method(
        {"max_weight": 5.0},
        loss="surrogates:cispo",
        bounds="surrogates:cispo_bounds",
        takes=_FREE,
        source_aggregation="token_mean",
    ),
    "rpg": _RPG,
    **{
        f"rpg-{divergence.replace('_', '-')}{suffix}": _rpg_variant(divergence, form)
        for divergence in ("forward", "forward_u", "reverse", "reverse_u")
        for form, suffix in (("differentiable", ""), ("reinforce", "-reinforce"))
    },
    "sapo": Method(
        {"temperature_positive": 1.0, "temperature_negative": 1.05},
        loss="surrogates:sapo",
        takes=_FREE,
        source_aggregation="sequence_mean",
    ),
    "dispo": Method(
        {"positive_low": 0.2, "positive_high": 10.0, "negative_low": 1.0, "negative_high": 100.0},
        loss="surrogates:dispo",
        bounds="surrogates:dispo_bounds",
        check="surrogates:check_dispo",
        takes=_FREE,
        source_aggregation="token_mean",
    ),
    "empg": _CLIPPED(
        {**_CLIP, "scale": 1.0, "future_scale": 1.0, "zeta": 0.0},
        advantage="advantages:empg",
        takes=_FREE,
        entropy=True,
    ),
    "rebn": _CLIPPED({**_CLIP, "epsilon": 1e-9}, advantage="advantages:rebn", source_aggregation="constant"),
    "ppo": _CLIPPED({**_GAE, "dual_clip": None}, critic="value_head:gae", check="value_head:check_gae"),
    "bi-level-gae": _CLIPPED(_GAE, critic="value_head:bi_level_gae"),
    "a-lol": Method(
        {
            "variant": ("reference_free", "sequence_ratio", "token_ratio", "kl"),
            "value": ("mean", "head"),
            "clip": 0.9,
            "beta": 0.2,
            **_VALUE,
        },
        loss="surrogates:a_lol",
        critic="value_head:per_turn",
        ratio=False,
        takes=_STEPS,
        kl="none",
        offline=True,
    ),
    "p3o": _PAIRED({"clip": 0.2}, pair_loss="pairs:p3o", bounds="surrogates:reply_bounds", kl="reward"),
    "copg": _BRANCHED({"beta": 0.1}, pair_loss="pairs:copg", ratio=False, refers=True),
    "refuel": _BRANCHED({"eta": 1.0}, pair_loss="pairs:refuel"),
}
