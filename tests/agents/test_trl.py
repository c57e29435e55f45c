"""PersonaChat-v0 in TRL: a real GRPOTrainer trains on it, on the tokens that were sampled, for what the judge said."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra trl")

from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from ppg_agents.batch import batch
from ppg_agents.policy import Policy
from ppg_agents.trajectory import Trajectory
from ppg_agents.trl import PersonaChat
from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.judges.facts import FactsJudge

TINY = str(files("ppg_agents.models") / "tiny")
GROUP, BATCH, STEPS, TURNS = 4, 8, 2, 3


@dataclass
class Watched:
    """What went in and out of a trainer."""

    said: list[list[int]] = field(default_factory=list)  # every reply that TRL sampled
    inputs: list[dict[str, Any]] = field(default_factory=list)  # of the loss
    log_probs: list[torch.Tensor] = field(default_factory=list)  # per completion token, with gradients
    played: list[list[Trajectory]] = field(default_factory=list)  # per rollout
    before: dict[str, torch.Tensor] = field(default_factory=dict)


def trainer_of(chat: PersonaChat, folder: Path, steps: int, **options: Any) -> tuple[GRPOTrainer, Watched]:
    """Return a trainer on the embedded model, and what will have been seen of it."""
    watched = Watched()

    def rollout(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        output = chat.rollout(prompts, trainer)
        watched.played.append(chat.trajectories)
        return output

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=24,
        max_steps=steps,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    given = {"model": TINY, "args": config, "train_dataset": chat.dataset(16, seed=5), "reward_funcs": chat.reward}
    trainer = GRPOTrainer(**given, rollout_func=rollout, **options)
    generate, score, loss = (
        trainer._generate_single_turn,
        trainer._get_per_token_logps_and_entropies,
        trainer._compute_loss,
    )

    def generating(*args: Any) -> Any:
        output = generate(*args)
        watched.said.extend(output[0])
        return output

    def scoring(*args: Any, **kwargs: Any) -> Any:
        output = score(*args, **kwargs)
        if output[0].requires_grad:
            output[0].retain_grad()
            watched.log_probs.append(output[0])
        return output

    def losing(model: Any, inputs: dict[str, Any]) -> Any:
        watched.inputs.append(inputs)
        return loss(model, inputs)

    trainer._generate_single_turn = generating
    trainer._get_per_token_logps_and_entropies = scoring
    trainer._compute_loss = losing
    watched.before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return trainer, watched


@pytest.fixture(autouse=True)
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # that rollout_func is experimental


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GRPOTrainer, Watched]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        chat = PersonaChat(max_turns=TURNS)
        lora = LoraConfig(r=8, target_modules="all-linear")
        trainer, watched = trainer_of(chat, tmp_path_factory.mktemp("trl"), STEPS, peft_config=lora)
        trainer.train()
        yield trainer, replace(watched, **{f.name: copy.copy(getattr(watched, f.name)) for f in fields(watched)})
        chat.close()


def replayed(trajectory: Trajectory) -> float:
    """Return the mean reward when an environment of its own hears the same replies."""
    env = gym.make("ppg_gym:PersonaChat-v0", max_turns=TURNS)
    env.reset(seed=trajectory.seed)
    rewards = [float(env.step(turn.reply)[1]) for turn in trajectory.turns]
    assert len(rewards) == TURNS
    return sum(rewards) / TURNS


def test_the_adapter_learns_and_the_base_does_not(trained: tuple[GRPOTrainer, Watched]) -> None:
    trainer, watched = trained
    after = dict(trainer.model.named_parameters())
    changed = {name for name, value in watched.before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert trainer.model.training  # as TRL left it


def test_a_group_is_one_persona_and_one_opening(trained: tuple[GRPOTrainer, Watched]) -> None:
    _, watched = trained
    assert [len(played) for played in watched.played] == [BATCH] * STEPS
    for played in watched.played:
        for start in range(0, BATCH, GROUP):
            group = played[start : start + GROUP]
            assert len({(t.seed, t.persona, t.turns[0].message) for t in group}) == 1
            assert len({tuple(turn.reply for turn in t.turns) for t in group}) > 1
        assert len({t.seed for t in played}) == BATCH // GROUP


def test_the_logged_rewards_are_the_environment_s(trained: tuple[GRPOTrainer, Watched]) -> None:
    trainer, watched = trained
    expected = [[replayed(trajectory) for trajectory in played] for played in watched.played]
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert logged == pytest.approx([sum(rewards) / BATCH for rewards in expected], abs=1e-6)
    assert list(trainer._logs["rewards"]["reward"]) == pytest.approx(expected[-1], abs=1e-6)  # of the newest batch
    assert [entry["unjudged_turns"] for entry in trainer.state.log_history if "reward" in entry] == [0.0] * STEPS


def test_what_is_trained_on_is_what_was_sampled(trained: tuple[GRPOTrainer, Watched]) -> None:
    trainer, watched = trained
    said = {tuple(ids) for ids in watched.said}
    decode = trainer.processing_class.decode
    assert len(watched.said) == STEPS * BATCH * TURNS
    for inputs, played in zip(watched.inputs, watched.played, strict=True):
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        rows, whole = set(), set()
        for i in range(BATCH):  # TRL shuffles a batch
            real = inputs["completion_mask"][i].bool()
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            rows.add(tuple(inputs["completion_ids"][i][mask[i]].tolist()))
            whole.add((*prompt, *inputs["completion_ids"][i][real].tolist()))
        assert rows == {tuple(token for turn in t.turns for token in turn.token_ids) for t in played}
        assert whole == {tuple(t.token_ids()) for t in played}
        for turn in (turn for trajectory in played for turn in trajectory.turns):
            assert turn.token_ids in said
            assert turn.message in decode(turn.prompt_ids)  # between the replies: the partner's words, masked


def test_no_gradient_reaches_the_partner_s_tokens(trained: tuple[GRPOTrainer, Watched]) -> None:
    _, watched = trained
    for inputs, log_probs in zip(watched.inputs, watched.log_probs, strict=True):
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        moving = inputs["advantages"] != 0
        assert log_probs.grad is not None
        assert moving.any()
        assert (~mask & inputs["completion_mask"].bool()).sum(1).min() > 0
        assert torch.equal(log_probs.grad != 0, mask & moving[:, None])


def test_trl_scores_what_our_policy_scores(trained: tuple[GRPOTrainer, Watched]) -> None:
    _, watched = trained
    policy = Policy.load("tiny", lora=None)  # as it was at the first step
    inputs, played = watched.inputs[0], watched.played[0]
    data = batch(played, policy.pad_id)
    with torch.no_grad():
        expected = policy.log_probs(data.ids, data.attention, data.token_mask)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    ids, scores = inputs["completion_ids"], watched.log_probs[0]
    theirs = {tuple(ids[i][mask[i]].tolist()): scores[i][mask[i]] for i in range(BATCH)}
    for i, row in enumerate(data.token_mask):
        found = theirs[tuple(data.ids[i][row].tolist())]
        assert torch.allclose(found, expected[i][row], atol=1e-4)


def test_the_table_of_completions_shows_the_conversations(trained: tuple[GRPOTrainer, Watched]) -> None:
    trainer, watched = trained
    shown = list(trainer._logs["extra"]["conversation"])
    for text, trajectory in zip(shown, watched.played[-1], strict=True):
        lines = [(f"partner: {t.message}", f"policy: {t.reply} ({t.reward:.2f})") for t in trajectory.turns]
        assert text.splitlines() == [line for both in lines for line in both]


def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def seeds_and_weights(resume: bool) -> tuple[list[list[int | None]], list[torch.Tensor]]:
        chat = PersonaChat(max_turns=1)
        trainer, watched = trainer_of(chat, tmp_path, 3)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        chat.close()
        return [[t.seed for t in played] for played in watched.played], list(trainer.model.parameters())

    (seeds, weights), (later, resumed) = seeds_and_weights(False), seeds_and_weights(True)
    assert later == seeds[1:]
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


@pytest.mark.parametrize("reward", ["mean", "sum"])
def test_a_failed_verdict_is_no_number(reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = FactsJudge.judge, iter(range(10_000))
    failed = Verdict("timeout", None, "too late")

    def judge(self: FactsJudge, conversations: Sequence[Conversation]) -> list[Verdict]:
        turn, verdicts = next(calls), original(self, conversations)
        return [failed if i == 0 or (i == 1 and turn == 1) else verdict for i, verdict in enumerate(verdicts)]

    monkeypatch.setattr(FactsJudge, "judge", judge)
    chat = PersonaChat(reward, max_turns=TURNS, on_judge_failure="nan", max_failure_rate=1.0)
    trainer, watched = trainer_of(chat, tmp_path, 1)  # all weights
    trainer.train()
    monkeypatch.undo()
    (played,) = watched.played
    assert [len(t.judged()) for t in played] == [0, TURNS - 1] + [TURNS] * (BATCH - 2)
    rewards = list(trainer._logs["rewards"]["reward"])
    worth = [sum(t.judged()) / (len(t.judged()) if reward == "mean" else 1) if t.judged() else None for t in played]
    missing = [0] if reward == "mean" else [0, 1]
    known = [i for i in range(BATCH) if i not in missing]
    assert [i for i, value in enumerate(rewards) if math.isnan(value)] == missing
    assert [rewards[i] for i in known] == pytest.approx([worth[i] for i in known])
    group = torch.tensor([rewards[i] for i in known if i < GROUP])
    expected = ((group - group.mean()) / (group.std() + 1e-4)).tolist()
    assert list(trainer._logs["advantages"])[:GROUP] == pytest.approx([0.0] * len(missing) + expected, abs=1e-4)
    (entry,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["reward"] == pytest.approx(sum(rewards[i] for i in known) / len(known))
    assert entry["unjudged_turns"] == pytest.approx((TURNS + 1) / (BATCH * TURNS))
    assert any(not torch.equal(watched.before[name], p) for name, p in trainer.model.named_parameters())


def test_the_judge_s_error_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Verdict("error", None, "gone")
    monkeypatch.setattr(FactsJudge, "judge", lambda self, conversations: [lost for _ in conversations])
    trainer, _ = trainer_of(PersonaChat(max_turns=TURNS), tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"expected a scored verdict, got status 'error' \(gone\)"):
        trainer.train()


def trainer_like(**changed: Any) -> Any:
    accelerator = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(name="NO"))
    parts = {"tools": [], "use_vllm": False, "accelerator": accelerator, "_generate_single_turn": None}
    return SimpleNamespace(**{**parts, **changed})


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected reward to be one of mean, sum, got 'men'; did you mean 'mean'"):
        PersonaChat("men")
    with pytest.raises(ValueError, match="terapy"):
        PersonaChat(domain="terapy")
    chat = PersonaChat(max_turns=TURNS)
    with pytest.raises(ValueError, match=r"got none; pass rollout_func=chat\.rollout"):
        chat.reward(log_metric=print, log_extra=print, completions=["Hello"])
    with pytest.raises(ValueError, match="expected TRL's GRPOTrainer"):
        chat.rollout([], SimpleNamespace())
    with pytest.raises(ValueError, match="expected a trainer without tools"):
        chat.rollout([], trainer_like(tools=[print]))
    sharded = SimpleNamespace(num_processes=2, distributed_type=SimpleNamespace(name="FSDP"))
    with pytest.raises(ValueError, match="expected processes that sample by themselves, got FSDP"):
        chat.rollout([], trainer_like(accelerator=sharded))
    with pytest.raises(ValueError, match=r"expected prompts from PersonaChat\.dataset, got 'Hello'"):
        chat.rollout(["Hello"], trainer_like())
    mixed = [json.dumps({"personas": personas, "seed": 0}) for personas in ("train", "held-out")]
    with pytest.raises(ValueError, match="expected the same personas in a batch"):
        chat.rollout(mixed, trainer_like())


def test_a_trainer_whose_replies_would_not_end_is_refused(
    trained: tuple[GRPOTrainer, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trained
    chat = PersonaChat(max_turns=TURNS)
    prompts = chat.dataset(2)["prompt"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "max_completion_length", 4096)
        with pytest.raises(ValueError, match="expected room in the context for a prompt and a reply of 4096 tokens"):
            chat.rollout(prompts, trainer)
    monkeypatch.setattr(trainer, "eos_token_ids", [0])
    with pytest.raises(ValueError, match=r"expected '<\|end\|>'.*among what ends a completion, got tokens \[0\]"):
        chat.rollout(prompts, trainer)


def test_the_chat_template_has_the_trainer_s_options(
    trained: tuple[GRPOTrainer, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trained
    template = trainer.processing_class.chat_template
    monkeypatch.setattr(trainer.processing_class, "chat_template", "{{ shout | default('') }}" + template)
    monkeypatch.setattr(trainer, "chat_template_kwargs", {"shout": "LOUD"})
    chat = PersonaChat(max_turns=1)
    chat.rollout(chat.dataset(1)["prompt"], trainer)
    assert trainer.processing_class.decode(chat.trajectories[0].turns[0].prompt_ids).startswith("LOUD")
    chat.close()


def test_evaluation_on_held_out_personas(trained: tuple[GRPOTrainer, Watched]) -> None:
    trainer, watched = trained
    chat = PersonaChat(max_turns=TURNS)
    trainer.rollout_func, trainer.reward_funcs = chat.rollout, [chat.reward]
    measured = trainer.evaluate(chat.dataset(BATCH // GROUP, seed=7, personas="held-out"))
    assert {t.seed for t in chat.trajectories} == {7, 8}
    assert not {t.persona for t in chat.trajectories} & {t.persona for played in watched.played for t in played}
    assert measured["eval_reward"] == pytest.approx(sum(sum(t.judged()) for t in chat.trajectories) / BATCH / TURNS)
