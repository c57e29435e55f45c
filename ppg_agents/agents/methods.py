"""The alternatives by name: which advantage, which loss, which options, which of the run's settings they take.

A method is data and a few functions over `ppg_agents.alternatives`; `alternative`, `value_head` and `pairs` run it.
Losses here are per token, [R, L'] of a micro-batch; advantages per turn, [B, n] of the whole batch of all processes.
Nothing here knows a model or an optimiser.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.agents.gradient import Scored, Whole
from ppg_agents.alternatives.tokens import turn_share
from ppg_agents.losses import Aggregation, tokens_per_turn

log = logging.getLogger(__name__)

Options = Mapping[str, Any]
KL = Literal["none", "loss", "token", "reward"]
BoundPair = tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Turns:
    """The whole batch of all processes per turn, [B, n]; what stands at invalid turns is not read.

    Attributes:
        credit: Of the run's policy class.
        baselined: The credit less the run's baseline.
        valid: Played and judged.
        groups: B labels, equal for conversations that share a persona.
        lengths: Tokens of each reply.
        entropy: Mean token entropy of each reply at sampling, where the method asks for it.
    """

    credit: Tensor
    baselined: Tensor
    valid: Tensor
    groups: list[Any]
    lengths: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Method:
    """One alternative.

    Attributes:
        options: By name, with defaults. A tuple lists the choices, the default first; None takes a number.
        loss: Per token: a micro-batch, the advantage per token, the options.
        advantage: Per turn, of the whole batch; None is the credit less the run's baseline.
        ratio: Whether the loss weighs by w = π/π°, per token or, where the option ``ratio`` says so, per reply.
        bounds: Of w, given advantage and options; None where the loss has none.
        keep: Which conversations of the batch are learned from, [B]; None keeps all.
        takes: The run's settings that act on it, out of `TAKEN`.
        kl: What ``kl_coefficient`` does: nothing; ``loss`` adds `losses.kl_loss`, ``token`` `alternatives.kl_term`;
            ``reward`` takes the log-ratio off the reward before the credit is formed.
        group: Least number of conversations per persona.
        source_aggregation: What the source aggregates by; None where we do not know.
        entropy: Whether the advantage reads the entropies.
        credit: Whether the policy class's credit is read at all.
        offline: Whether it learns from logged dialogues as well.
        learns: False for what is only compared with.
        fixed: Options that the name decides.
    """

    options: Options = field(default_factory=dict)
    loss: Callable[[Scored, Tensor, Options], Tensor] = lambda part, advantage, o: alt.reinforce(
        part.log_probs, advantage, part.token_mask
    )
    advantage: Callable[[Turns, Options], Tensor] | None = None
    ratio: bool = True
    bounds: Callable[[Tensor, Options], BoundPair] | None = None
    keep: Callable[[Whole, Options], NDArray[np.bool_]] | None = None
    takes: frozenset[str] = frozenset()
    kl: KL = "loss"
    group: int = 1
    source_aggregation: Aggregation | None = None
    entropy: bool = False
    credit: bool = True
    offline: bool = False
    learns: bool = True
    fixed: Options = field(default_factory=dict)

    def fill(self, name: str, given: Options) -> dict[str, Any]:
        """Return all options, those given over the defaults.

        Args:
            name: The agent's, for messages.
            given: Some of the options.

        Raises:
            ValueError: An option that the agent does not have, of another type, or no choice of it.
        """
        options = {**self.options, **({"aggregation_of_source": False} if self.source_aggregation else {})}
        filled = {key: value[0] if isinstance(value, tuple) else value for key, value in options.items()}
        for key, value in given.items():
            if key not in options:
                near = difflib.get_close_matches(key, options, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"expected an option of {name!r} ({', '.join(options) or 'none'}), got {key!r}{hint}")
            filled[key] = _fitting(f"{name!r}: {key}", value, options[key])
        return {**filled, **self.fixed}


def _fitting(name: str, value: Any, default: Any) -> Any:
    """Return an option's value as the type of its default."""
    if isinstance(default, tuple):
        if value not in default:
            near = difflib.get_close_matches(str(value), default, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, default))}, got {value!r}{hint}")
        return value
    kind = float if default is None else type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


TAKEN: dict[str, tuple[Any, str]] = {
    "baseline": ("batch-mean", "its advantage has a baseline of its own"),
    "standardise": (False, "its advantage is scaled as its source scales it"),
    "discount": (1.0, "it forms no credit that is discounted by turn"),
    "importance": ("none", "its loss weighs by ratios of its own, or by none"),
    "importance_cap": (2.0, "its loss weighs by ratios of its own, or by none"),
    "kl_coefficient": (0.0, "it has no such term"),
    "aggregation": ("sum", "its loss is no sum over tokens"),
    "steps_per_batch": (1, "it takes no step on what it samples"),
}
"""Settings of a run that not every method takes: their defaults, and what is said of another value."""
_STEPS = frozenset({"aggregation", "steps_per_batch", "discount"})
_FREE = _STEPS | {"baseline", "standardise"}
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def ppo_clip(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    """Return PPO's clipped surrogate, with the ratio of the token or, with ``ratio = "reply"``, of the reply."""
    bounds = {name: o[name] for name in ("clip_low", "clip_high", "dual_clip", "ratio_cap") if name in o}
    mask, turn_index = part.token_mask, part.turn_index
    if o.get("ratio") != "reply":
        return alt.ppo_clip(part.log_probs, part.sampling, advantage, mask, **bounds)
    tokens, turn = tokens_per_turn(mask, turn_index)
    log_ratios = alt.turn_sum(alt.log_ratio(part.log_probs, part.sampling, mask), mask, turn_index, tokens.shape[1])
    of_turn = alt.turn_mean(advantage, mask, turn_index, tokens.shape[1])
    per_turn = alt.ppo_clip_turns(log_ratios, of_turn, tokens > 0, **bounds)
    return per_turn.gather(1, turn) * turn_share(mask, turn_index).to(per_turn)


def clip_bounds(advantage: Tensor, o: Options) -> BoundPair:
    """Return 1 − ε_lo and 1 + ε_hi."""
    return 1 - o["clip_low"], 1 + o["clip_high"]


def _reply_bounds(advantage: Tensor, o: Options) -> BoundPair:
    return (1 - o["clip"], 1 + o["clip"]) if o["clip"] else (0.0, float("inf"))


def _cispo(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    return alt.cispo(part.log_probs, part.sampling, advantage, part.token_mask, max_weight=o["max_weight"])


def _sapo(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    return alt.sapo(part.log_probs, part.sampling, advantage, part.token_mask, **o)


def _dispo(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    return alt.dispo(part.log_probs, part.sampling, advantage, part.token_mask, **o)


def _dispo_bounds(advantage: Tensor, o: Options) -> BoundPair:
    good = advantage > 0
    low = torch.where(good, 1 - o["positive_low"], 1 - o["negative_low"])
    return low, torch.where(good, 1 + o["positive_high"], 1 + o["negative_high"])


def _rpg(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    given = {key: o[key] for key in ("divergence", "beta", "clip", "clip_low", "clip_high", "dual_clip", "kl_to_go")}
    form = alt.rpg_reinforce if o["form"] == "reinforce" else alt.rpg_differentiable
    level: Literal["token", "turn"] = "turn" if o["ratio"] == "reply" else "token"
    arrays = (part.log_probs, part.sampling, advantage, part.token_mask, part.turn_index)
    return form(*arrays, level=level, **given)


def _rpg_bounds(advantage: Tensor, o: Options) -> BoundPair:
    return (0.0, float("inf")) if o["clip"] == "none" else clip_bounds(advantage, o)


def _weighted(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    weighted = advantage if part.weights is None else advantage * part.weights
    return alt.reinforce(part.log_probs, weighted, part.token_mask)


def _a_lol(part: Scored, advantage: Tensor, o: Options) -> Tensor:
    reference = part.log_probs.detach() if part.reference is None else part.reference
    given = {key: o[key] for key in ("variant", "clip", "beta")}
    return alt.a_lol(part.log_probs, reference, advantage, part.token_mask, part.turn_index, **given)


def _rloo(turns: Turns, o: Options) -> Tensor:
    return alt.rloo(turns.credit, turns.valid, turns.groups)


def _grpo(turns: Turns, o: Options) -> Tensor:
    return alt.grpo(turns.credit, turns.valid, turns.groups, epsilon=o["epsilon"])


def _dr_grpo(turns: Turns, o: Options) -> Tensor:
    return alt.grpo(turns.credit, turns.valid, turns.groups, scale_by_std=False)


def _whitened(turns: Turns, o: Options) -> Tensor:
    """REINFORCE++: over turns or, as its source, over tokens, where a turn weighs by its length."""
    credit = turns.credit
    if o["group_mean"]:
        credit = alt.grpo(credit, turns.valid, turns.groups, scale_by_std=False)
    if o["whiten"] == "turns":
        return alt.whiten(credit, turns.valid)
    lengths = (turns.lengths * turns.valid)[..., None]
    tokens = torch.arange(max(1, int(lengths.max())), device=lengths.device) < lengths
    return alt.whiten(credit[..., None].expand(tokens.shape).flatten(1), tokens.flatten(1)).view(tokens.shape)[..., 0]


def _rebn(turns: Turns, o: Options) -> Tensor:
    return alt.rebn(turns.credit, turns.valid, epsilon=o["epsilon"])


def _empg(turns: Turns, o: Options) -> Tensor:
    given = {key: o[key] for key in ("scale", "future_scale", "zeta")}
    return alt.empg(turns.baselined, turns.entropy, turns.valid, **given)


def _with_spread(whole: Whole, o: Options) -> NDArray[np.bool_]:
    if not o["dynamic_sampling"]:
        return np.ones(len(whole.groups), dtype=np.bool_)
    returns = torch.from_numpy(np.where(whole.valid, whole.rewards, 0.0).sum(1))
    kept: NDArray[np.bool_] = alt.groups_with_spread(returns, whole.groups).numpy()
    return kept


def best_share(whole: Whole, o: Options) -> NDArray[np.bool_]:
    """Return the best conversations by mean score over judged turns; of equal ones the earlier."""
    counts = whole.valid.sum(1)
    mean = np.where(whole.valid, whole.rewards, 0.0).sum(1) / np.maximum(counts, 1)
    order = np.argsort(np.where(counts > 0, -mean, np.inf), kind="stable")
    kept = np.zeros(len(mean), dtype=np.bool_)
    kept[order[: int(np.ceil(o["keep"] * int((counts > 0).sum())))]] = True
    return kept


def _imitated(turns: Turns, o: Options) -> Tensor:
    return torch.ones_like(turns.credit)


_PPO = partial(Method, loss=ppo_clip, bounds=clip_bounds, takes=_STEPS)
_GROUPED = partial(_PPO, advantage=_grpo, group=2, kl="token", source_aggregation="sequence_mean")
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
    loss=_rpg,
    bounds=_rpg_bounds,
    takes=_FREE,
    kl="none",
    source_aggregation="token_mean",
)


def _rpg_variant(divergence: str, form: str) -> Method:
    decided = {"divergence": divergence, "form": form}
    return replace(_RPG, options={k: v for k, v in _RPG.options.items() if k not in decided}, fixed=decided)


_PAIRS = frozenset({"steps_per_batch", "discount"})
_VALUE = {"value_clip": 0.5, "value_learning_rate": 3e-3}  # a value_clip of 0 is none
_GAE = {"credit": ("gae", "class"), **CLIP, "lam": 1.0, "token_discount": 1.0, "whiten": True, **_VALUE}

METHODS: dict[str, Method] = {
    "base": Method(learns=False, ratio=False, kl="none", takes=frozenset({"discount"})),
    "best-of-n": Method({"n": 4}, learns=False, ratio=False, kl="none", takes=frozenset({"discount"})),
    "sft": Method(
        {"keep": 0.25},
        advantage=_imitated,
        keep=best_share,
        ratio=False,
        kl="none",
        takes=_STEPS - {"discount"},
        credit=False,
        offline=True,
    ),
    "reinforce": Method(loss=_weighted, ratio=False, takes=_FREE | {"importance", "importance_cap"}),
    "rloo": _PPO({**CLIP, "ratio": ("reply", "token")}, advantage=_rloo, group=2, kl="reward"),
    "grpo": _GROUPED({**CLIP, "ratio_cap": None, "epsilon": 1e-4, "kl_weighted": True}),
    "dr-grpo": _GROUPED({**CLIP, "kl_weighted": True}, advantage=_dr_grpo, source_aggregation="constant"),
    "dapo": _GROUPED(
        {"clip_low": 0.2, "clip_high": 0.28, "epsilon": 1e-4, "dynamic_sampling": False, "overlong_buffer": 0},
        keep=_with_spread,
        kl="none",
        source_aggregation="token_mean",
    ),
    "reinforce++": _PPO({**CLIP, "whiten": ("turns", "tokens"), "group_mean": False}, advantage=_whitened, kl="reward"),
    "cispo": Method(
        {"max_weight": 5.0},
        loss=_cispo,
        bounds=lambda advantage, o: (0.0, o["max_weight"]),
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
        loss=_sapo,
        takes=_FREE,
        source_aggregation="sequence_mean",
    ),
    "dispo": Method(
        {"positive_low": 0.2, "positive_high": 10.0, "negative_low": 1.0, "negative_high": 100.0},
        loss=_dispo,
        bounds=_dispo_bounds,
        takes=_FREE,
        source_aggregation="token_mean",
    ),
    "empg": _PPO(
        {**CLIP, "scale": 1.0, "future_scale": 1.0, "zeta": 0.0}, advantage=_empg, takes=_FREE, entropy=True
    ),
    "rebn": _PPO({**CLIP, "epsilon": 1e-9}, advantage=_rebn, source_aggregation="constant"),
    "ppo": _PPO({**_GAE, "dual_clip": None}),
    "bi-level-gae": _PPO(_GAE),
    "a-lol": Method(
        {
            "variant": ("reference_free", "sequence_ratio", "token_ratio", "kl"),
            "value": ("mean", "head"),
            "clip": 0.9,
            "beta": 0.2,
            **_VALUE,
        },
        loss=_a_lol,
        ratio=False,
        takes=_STEPS,
        kl="none",
        offline=True,
    ),
    "p3o": Method({"clip": 0.2}, bounds=_reply_bounds, takes=_PAIRS, kl="reward", group=2),
    "copg": Method({"beta": 0.1}, ratio=False, takes=_PAIRS, kl="none", group=2),
    "refuel": Method({"eta": 1.0}, takes=_PAIRS, kl="none", group=2),
}
