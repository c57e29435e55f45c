"""Credit by turn in TRL: GRPO where there is nothing to choose, the partial policy gradient where there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra trl")

from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from ppg_agents.baselines import leave_one_out
from ppg_agents.batch import batch
from ppg_agents.credit import PolicyClass, credit
from ppg_agents.losses import partial_policy_gradient
from ppg_agents.policy import Policy
from ppg_agents.trl import PersonaChat
from ppg_agents.trl import credit as trl_credit
from ppg_agents.trl.credit import PartialCreditTrainer

TINY = str(files("ppg_agents.models") / "tiny")
GROUP, LIMIT = 4, 24
CLASSES: list[dict[str, Any]] = [
    {"policy_class": "full"},
    {"policy_class": "greedy"},
    {"policy_class": PolicyClass("k-step", 2)},
    {"policy_class": "segment 1,2"},
    {"policy_class": [[1, 0, -0.5], [0, 1, 0.5], [0, 0, 1]]},
]
SCALES = ["group", "batch", "none"]
Rewards = list[list[float | None]]

# Two groups of four conversations; the last one of the first group is shorter, one turn was not judged.
PLAYED: Rewards = [[1, 0, 0.5], [0, 1, 0.25], [0, None, 1], [0.5, 0.5], [1, 1, 1], [1, 0, 0], [0, 0, 1], [0.5, 0, 0]]


@pytest.fixture(autouse=True)
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # that rollout_func is experimental


def settings(folder: Path, **changed: Any) -> GRPOConfig:
    plain = {
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": LIMIT,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return GRPOConfig(output_dir=str(folder), **{**plain, **changed})


def told(rewards: Rewards, **more: list[Any]) -> Callable[..., dict[str, Any]]:
    """Return a rollout function that is not ours: replies of two tokens, three of the partner's between them."""

    def rollout(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        rows = rewards[: len(prompts)]
        return {
            "prompt_ids": [[5, 6, 7] for _ in rows],
            "completion_ids": [[10 + i, 20, *[30, 31, 32, 10 + i, 20] * (len(row) - 1)] for i, row in enumerate(rows)],
            "env_mask": [[1, 1, *[0, 0, 0, 1, 1] * (len(row) - 1)] for row in rows],
            "logprobs": None,
            "turn_rewards": rows,
            **more,
        }

    return rollout


def earned(turn_rewards: Rewards, **_: Any) -> list[float | None]:
    """Return the sum of the turns, a reward function as TRL knows it."""
    known = [[reward for reward in rewards if reward is not None] for rewards in turn_rewards]
    return [sum(rewards) if rewards else None for rewards in known]


def trainer_of(folder: Path, rewards: Rewards, kind: Any = PartialCreditTrainer, **options: Any) -> Any:
    """Return a trainer on conversations that are told, with settings of TRL and of the trainer as options."""
    names = {"policy_class", "discount", "peft_config", "reward_funcs"}
    own = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    given: dict[str, Any] = {"reward_funcs": earned, "rollout_func": told(rewards), **own}
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    return kind(model=TINY, args=settings(folder, **rest), train_dataset=data, **given)


def rows(trainer: Any, prompts: int = 2) -> list[dict[str, Any]]:
    return [{"prompt": trainer.train_dataset[i]["prompt"]} for i in range(prompts) for _ in range(GROUP)]


def advantages(trainer: Any, prompts: int = 2) -> torch.Tensor:
    """Return the advantage of every turn [B, n], having checked that its tokens share it and no others have any."""
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows(trainer, prompts))
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    found = output["advantages"]
    assert found.shape == mask.shape
    assert bool((found[~mask] == 0).all())
    starts = list(range(0, mask.shape[1], 5))
    assert torch.equal(found[:, starts], found[:, [s + 1 for s in starts]])
    return torch.as_tensor(found[:, starts])


def test_advantages_by_hand(tmp_path: Path) -> None:
    found = advantages(trainer_of(tmp_path, PLAYED, scale_rewards="none", **CLASSES[2]))
    # Two rewards each, every one less its turn's mean over the group. Turn 1 is judged in 7 of 8 conversations, so for
    # turn 0 it counts 8/7 where it is, and nothing where it is not. What follows the end of the fourth is 0.
    w = 8 / 7
    expected = [
        [0.625 - 0.5 * w, -0.5 + 0.25, 0.5 - 7 / 12],
        [-0.375 + 0.5 * w, 0.5 + 0.0, 0.25 - 7 / 12],
        [-0.375, 0.0, 1 - 7 / 12],
        [0.125 + 0.0 * w, 0.0 - 0.25, 0.0],
        [0.375 + 0.75 * w, 0.75 + 0.5, 0.5],
        [0.375 - 0.25 * w, -0.25 - 0.5, -0.5],
        [-0.625 - 0.25 * w, -0.25 + 0.5, 0.5],
        [-0.125 - 0.25 * w, -0.25 - 0.5, -0.5],
    ]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_what_was_lost_costs_nobody_anything(tmp_path: Path) -> None:
    played: Rewards = [[0.8] * 3 for _ in range(8)]
    played[1], played[6] = [0.8], [0.8, None, 0.8]
    for options in ({}, {"scale_rewards": "none", "loss_type": "dr_grpo"}):
        trainer = trainer_of(tmp_path, played, policy_class="full", **options)
        paid = advantages(trainer)
        trainer.rollout_func = told(played, lost=[b == 1 for b in range(8)])
        found = advantages(trainer)
        assert float(paid[0].abs().max()) > 0.1  # as if conversation 1 had wanted to end
        assert float(found.abs().max()) < 1e-6


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param([[row[0]] for row in PLAYED[:3]] + [[None]] + [[row[0]] for row in PLAYED[4:]], id="one-turn"),
        pytest.param([[0.0, 0.0, row[0]] for row in PLAYED], id="all-at-the-end"),
    ],
)
def test_full_planning_is_grpo_where_there_is_no_turn_to_choose(rewards: Rewards, scale: str, tmp_path: Path) -> None:
    kinds = (PartialCreditTrainer, GRPOTrainer)
    options = {"scale_rewards": scale, "optim": "sgd"}  # Adam would make a step of a rounding error
    ours, theirs = (trainer_of(tmp_path, rewards, kind, **options) for kind in kinds)
    whole = {}
    for trainer in (ours, theirs):
        trainer.model.train()
        whole[trainer] = trainer._generate_and_score_completions(rows(trainer))
    mask = whole[theirs]["completion_mask"] * whole[theirs]["tool_mask"]
    torch.testing.assert_close(whole[ours]["advantages"], whole[theirs]["advantages"][:, None] * mask)
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]), abs=1e-6)
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # TRL shuffles the batch
        trainer.train()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", CLASSES, ids=lambda options: str(PolicyClass.parse(options["policy_class"])))
def test_a_turn_s_advantage_depends_on_the_rewards_of_its_class_alone(options: dict[str, Any], tmp_path: Path) -> None:
    played: Rewards = [[0.1 * b + 0.05 * t * (b % 3) for t in range(3)] for b in range(2 * GROUP)]
    trainer = trainer_of(tmp_path, played, **options)
    before = advantages(trainer)
    mask = PolicyClass.parse(options["policy_class"]).mask(3) != 0
    for end in range(3):
        changed = [[r + (0.7 if (b, t) == (0, end) else 0) for t, r in enumerate(row)] for b, row in enumerate(played)]
        trainer.rollout_func = told(changed)
        moved = (advantages(trainer) != before).any(0)
        assert moved.tolist() == mask[:, end].tolist()


@pytest.mark.parametrize("options", CLASSES[1:3], ids=lambda options: str(PolicyClass.parse(options["policy_class"])))
def test_the_gradient_is_the_partial_policy_gradient(options: dict[str, Any], tmp_path: Path) -> None:
    chat = PersonaChat(max_turns=3)
    args = settings(tmp_path, scale_rewards="none", loss_type="dr_grpo")
    trainer = PartialCreditTrainer(
        model=TINY,
        args=args,
        train_dataset=chat.dataset(2),
        rollout_func=chat.rollout,
        reward_funcs=chat.reward,
        discount=0.9,
        **options,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows(trainer))).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    policy = Policy(trainer.model, trainer.processing_class)
    data = batch(chat.trajectories, policy.pad_id)
    mask = PolicyClass.parse(options["policy_class"]).mask(3)
    value = credit(data.rewards, mask, data.valid, 0.9)
    against = value - leave_one_out(value, data.valid, [t.seed for t in chat.trajectories])
    log_probs = policy.log_probs(data.ids, data.attention, data.token_mask)
    loss = partial_policy_gradient(
        log_probs, data.token_mask, data.turn_index, torch.from_numpy(against), aggregation="constant", constant=LIMIT
    )
    (loss * (GROUP - 1) / GROUP).backward()  # type: ignore[no-untyped-call]
    assert np.abs(against).max() > 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    chat.close()


def test_it_trains_and_evaluates(tmp_path: Path) -> None:
    chat = PersonaChat(max_turns=2)
    args = settings(
        tmp_path, max_steps=4, num_iterations=2, beta=0.01, importance_sampling_level="sequence", steps_per_generation=2
    )
    trainer = PartialCreditTrainer(
        model=TINY,
        args=args,
        train_dataset=chat.dataset(8),
        eval_dataset=chat.dataset(3, personas="held-out"),
        rollout_func=chat.rollout,
        reward_funcs=chat.reward,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        policy_class="k-step 1",
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {name for name in after if not torch.equal(before[name], after[name])} == {n for n in after if "lora_" in n}
    assert 0 <= trainer.evaluate()["eval_reward"] <= 1
    lengths = {len(trainer._logs[name]) for name in ("prompt", "completion", "advantages")}
    assert lengths == {len(trainer._logs["extra"]["conversation"])}  # the table of completions is whole
    chat.close()


def test_replies_that_were_cut_are_left_out_as_trl_does(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, PLAYED, mask_truncated_completions=True)
    trainer.eos_token_ids = [0]  # no reply ends
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows(trainer))
    assert not output["completion_mask"].any()
    assert not output["advantages"].any()


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = advantages(trainer_of(tmp_path, PLAYED, scale_rewards="batch"))
    second = trainer_of(tmp_path, PLAYED[GROUP:], scale_rewards="batch", per_device_train_batch_size=GROUP)
    monkeypatch.setattr(trl_credit, "gather_object", lambda told: [(row, False) for row in PLAYED[:GROUP]] + told)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    assert torch.equal(advantages(second, prompts=1), whole[GROUP:])


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'k-stp'; did you mean 'k-step 3'"):
        trainer_of(tmp_path, PLAYED, policy_class="k-stp")
    with pytest.raises(ValueError, match="k-step needs lookahead; write 'k-step 3'"):
        trainer_of(tmp_path, PLAYED, policy_class="k-step")
    with pytest.raises(ValueError, match=r"expected one reward function .*\['earned', 'earned'\].*put the others"):
        trainer_of(tmp_path, PLAYED, reward_funcs=[earned, earned])
    with pytest.raises(ValueError, match=r"segment lengths that sum to n = 3 turns, got \[1, 1\]"):
        advantages(trainer_of(tmp_path, PLAYED, policy_class="segment 1,1"))
    trainer = trainer_of(tmp_path, PLAYED)
    told_all = told(PLAYED)
    trainer.rollout_func = lambda *given: {**told_all(*given), "turn_rewards": [[1.0]] * len(PLAYED)}
    with pytest.raises(ValueError, match="expected turn_rewards for 3 replies, as in env_mask, got 1"):
        advantages(trainer)
    trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    trainer.rollout_func = lambda *given: {k: v for k, v in told_all(*given).items() if k != "turn_rewards"}
    with pytest.raises(ValueError, match="expected a rollout_func that returns turn_rewards, got none"):
        advantages(trainer)
