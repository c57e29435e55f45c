"""Credit by turn in TRL: a GRPOTrainer with a policy class of the partial policy gradient.

    chat = PersonaChat(domain="therapy", on_judge_failure="nan")
    trainer = PartialCreditTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRPOConfig(max_completion_length=64, num_generations=8, ...),
        train_dataset=chat.dataset(512),
        rollout_func=chat.rollout,
        reward_funcs=chat.reward,
        policy_class="k-step 3",
    )

GRPOTrainer has one advantage per completion, but its loss takes one per token as well, "to support subclasses": this
class changes nothing else. Sampling, losses, clipping, KL term and logging are TRL's. In a
group of conversations b,

    credit[b, t] = Σ_{ℓ ∈ R_t} γ^(ℓ−t) · r[b, ℓ]                                                    [P], γ [D]
    A[b, t] = (credit[b, t] − mean over the group of credit[·, t]) / (σ_t + 1e-4)                   [D]

[P] is arXiv 2603.06138, [D] this project's definition: TRL's own rule, for every turn by itself. σ_t is the deviation
of credit[·, t] in the group (``scale_rewards="group"``) or in the batch (``"batch"``); with ``"none"`` nothing is
divided. So conversations of one turn are trained exactly as by GRPO, and with full planning so are those without a
reward before the last turn. A conversation is part of its group's mean: where G of them play a turn, A is (G−1)/G
times the credit less the mean of the others. With ``scale_rewards="none"`` and ``loss_type="dr_grpo"`` the gradient
is that of the partial policy gradient with the baseline ``leave-one-out``, times (G−1)/G and over
``max_completion_length``.

A turn without a verdict has the advantage 0 (its tokens count where a loss is divided by a number of tokens), and what
judge or partner did not give costs nobody anything: every reward is compared with its own turn's before credit is
formed, and weighed by how likely it was to be seen (`ppg_agents.missing`). What `PersonaChat.reward` returns, the mean
or the sum of a conversation, is only logged.

It works with any rollout function that returns ``env_mask`` and ``turn_rewards``, and ``lost``, per conversation, if a
fault may end one: without it a conversation that ends early is taken to have wanted to.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from ppg_agents.baselines import group_mean
from ppg_agents.credit import PolicyClass, credit
from ppg_agents.losses import broadcast_credit
from ppg_agents.missing import Credits


class PartialCreditTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is not type-checked
    """TRL's GRPOTrainer, in which every turn of a conversation has its own advantage.

    Args:
        policy_class: A `PolicyClass`, or what its ``parse`` reads: ``greedy``, ``k-step 3``, a matrix, ….
        discount: γ, per turn.
        *args: For GRPOTrainer, as are all other names.

    Raises:
        ValueError: A wrong option, or one of TRL's that does not work with credit by turn.
    """

    def __init__(
        self,
        *args: Any,
        policy_class: object = "full",
        discount: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not hasattr(GRPOTrainer, "_generate_and_score_completions"):  # else credit would silently be TRL's
            raise ValueError(
                "expected TRL 1.16, or a version that computes advantages in the same place; change the version"
            )
        self._class, self._discount = PolicyClass.parse(policy_class), discount
        self._class.check(None)  # a wrong option is an error now, not at the first step
        credit(np.zeros((1, 1)), np.ones((1, 1), dtype=bool), np.ones((1, 1), dtype=bool), discount)
        super().__init__(*args, **kwargs)
        if len(self.reward_funcs) != 1 or self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"expected one reward function and sum_then_normalize, got {self.reward_func_names} and "
                f"{self.multi_objective_aggregation}: credit is made of turn_rewards alone; put the others into those"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "turn_rewards" not in inputs[0]:
            raise ValueError("expected a rollout_func that returns turn_rewards, got none; see ppg_agents.trl.rollouts")
        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool()
        before = torch.nn.functional.pad(mask, (1, -1))
        turn = (mask & ~before).cumsum(1) - 1  # a reply is a run of sampled tokens
        judged = [row["turn_rewards"] for row in inputs]
        for rewards, replies in zip(judged, (turn[:, -1] + 1).tolist(), strict=True):
            if replies not in (len(rewards), 0):  # 0: mask_truncated_completions
                raise ValueError(f"expected turn_rewards for {replies} replies, as in env_mask, got {len(rewards)}")
        told = [(row["turn_rewards"], bool(row.get("lost"))) for row in inputs]
        everywhere = gather_object(told)  # of all processes: they may share a group
        advantages = self._advantages(everywhere).to(mask.device)
        start = self.accelerator.process_index * len(judged)
        here = advantages[start : start + len(judged)].nan_to_num(0.0)
        output["advantages"] = broadcast_credit(here, mask, turn)
        logged = self._logs["advantages"]  # TRL's, of the newest conversations; now their mean over turns
        earlier = list(logged)[: -len(everywhere)]
        logged.clear()
        logged.extend(earlier + advantages.nanmean(1).nan_to_num(0.0).tolist())
        return output

    def _advantages(self, conversations: list[tuple[list[float | None], bool]]) -> Tensor:
        """Return A [B, n] of the conversations of whole groups; NaN where a turn was not played or not judged.

        Args:
            conversations: Their rewards, and whether a fault ended them.
        """
        turn_rewards, lost = zip(*conversations, strict=True)
        n = max(len(rewards) for rewards in turn_rewards)
        table = np.full((len(turn_rewards), max(n, self._class.turns or 0)), np.nan)
        missing = np.repeat(np.array(lost)[:, None], table.shape[1], axis=1)
        for row, absent, rewards in zip(table, missing, turn_rewards, strict=True):
            row[: len(rewards)] = [np.nan if reward is None else reward for reward in rewards]
            absent[: len(rewards)] = np.isnan(row[: len(rewards)])
        judged = np.isfinite(table)
        credits = Credits(table, judged, missing, self._class.mask(table.shape[1]), self._discount)
        members = self.num_generations if self.model.training else self.num_generations_eval

        def scores(of: Any) -> Tensor:
            weight = float(self.reward_weights[0])
            return (torch.from_numpy(np.where(judged, of, np.nan)[:, :n]).float() * weight).view(-1, members, n)

        value = scores(credits.filled())
        centred = scores(credits.against(partial(group_mean, groups=[b // members for b in range(len(table))])))
        if self.scale_rewards == "batch":
            centred = centred / (nanstd(value.flatten(0, 1), dim=0) + 1e-4)
        elif self.scale_rewards != "none":
            centred = centred / (nanstd(value, dim=1, keepdim=True) + 1e-4)
        if self.loss_type == "dr_grpo":  # the other losses divide by the tokens that are there
            centred = centred * torch.from_numpy(credits.replies[:, :n]).float().view(-1, members, n)
        advantages: Tensor = centred.flatten(0, 1)
        return advantages
