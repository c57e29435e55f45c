"""Alternatives that compare two conversations at a time: P3O, CoPG and REFUEL.

P3O takes any two with one persona, at every turn that both have judged; CoPG and REFUEL two that share a history (see
`ppg_agents.rollout.pairs`), at the turn where they part. The loss is the mean over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.agents.alternative import AlternativeAgent
from ppg_agents.agents.gradient import Loss, Ratios, Reduction, Scored, Whole
from ppg_agents.agents.methods import Method
from ppg_agents.credit import Mask
from ppg_agents.policy.policy import Policy
from ppg_agents.rollout.pairs import branch_point
from ppg_agents.trajectory import Batch, Trajectory


class PairAgent(AlternativeAgent):
    """Learns a policy from pairs of conversations: rows 2p and 2p + 1 of every process."""

    together = 2

    def __init__(self, name: str, method: Method, policy: Policy, mask: Callable[[int], Mask], **given: Any) -> None:
        """Make an agent; see `AlternativeAgent`."""
        super().__init__(name, method, policy, mask, **given)
        self.branch = name in ("copg", "refuel")

    def _keep(
        self, trajectories: Sequence[Trajectory], data: Batch, whole: Whole
    ) -> tuple[NDArray[np.bool_] | None, dict[str, float]]:
        """Return the turns that both conversations of a pair learn from."""
        if len(trajectories) % 2 or any(
            one.instruction != other.instruction
            for one, other in zip(trajectories[::2], trajectories[1::2], strict=False)
        ):
            raise ValueError(
                f"{self.name!r}: expected pairs of conversations with one persona, one after the other, got others; "
                "set --set group=2, and a batch that is a multiple of 2 × processes"
            )
        both = data.valid[::2] & data.valid[1::2]
        if self.branch:
            at = [branch_point(one, other) for one, other in zip(trajectories[::2], trajectories[1::2], strict=True)]
            parts = np.array([-1 if t is None else t for t in at])
            both &= np.arange(both.shape[1]) == parts[:, None]
        found = self._workers.gather([both.repeat(2, axis=0)])
        kept = np.concatenate(found)
        return kept, {"pairs_dropped": int((~kept.any(1)).sum()) // 2}

    def _loss(self, data: Batch, whole: Whole, temperature: float) -> Loss:
        credit, valid = torch.from_numpy(whole.credit[whole.own]), torch.from_numpy(data.valid)

        def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
            mask, turn_index, n = part.token_mask, part.turn_index, valid.shape[1]
            other = part.reference if part.reference is not None else part.sampling
            log_ratios = alt.turn_sum(alt.log_ratio(part.log_probs, other, mask), mask, turn_index, n)
            scores = credit[part.rows].to(log_ratios)
            both = valid[part.rows][::2].to(log_ratios.device)
            arrays = (log_ratios[::2], log_ratios[1::2], scores[::2], scores[1::2], both)
            pairs = reduction["batch_size"] / 2
            return self._pair_loss(*arrays).sum() / pairs, self._ratios(part, scores)

        return loss

    def _pair_loss(self, one: Tensor, other: Tensor, score: Tensor, other_score: Tensor, valid: Tensor) -> Tensor:
        """Return the loss per pair and turn [P, n]."""
        if self.name == "p3o":
            clip = self.options["clip"]
            return alt.p3o(one, other, score, other_score, valid, clip=clip or None)
        if self.name == "copg":
            return alt.copg(one, other, score, other_score, valid, beta=self.options["beta"])
        return alt.refuel(one, other, score, other_score, valid, eta=self.options["eta"])

    def _by_reply(self) -> bool:
        return True

    def _refers(self) -> bool:
        return self.name == "copg"

    def _try_options(self) -> None:
        zeros = torch.zeros((1, 1))
        self._pair_loss(zeros, zeros, zeros, zeros, zeros == 0)
