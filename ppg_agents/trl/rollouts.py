"""PersonaChat-v0 for TRL's GRPOTrainer: conversations of several turns, sampled by TRL, judged by the environment.

    chat = PersonaChat(domain="therapy")
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRPOConfig(max_completion_length=64, num_generations=8, ...),
        train_dataset=chat.dataset(512),
        rollout_func=chat.rollout,
        reward_funcs=chat.reward,
        peft_config=LoraConfig(...),  # or none, to train all weights
    )
    trainer.train()

TRL's ``environment_factory`` is for tools: a conversation would end with the first reply that calls none. So this is a
``rollout_func``. TRL samples, with whichever backend and settings it was given; partner, judge and personas are the
environment's. The tokens that were sampled are the tokens that are trained on, by id; the partner's and the template's
are masked (``env_mask``). All completions of a group are conversations of one seed: one persona, one opening line.

What TRL cannot do here, and ``ppg-agent train`` can:

- With the plain GRPOTrainer: one reward per conversation, so every token of every reply has the same advantage, and bad
  replies share what a good one earned. `ppg_agents.trl.credit.PartialCreditTrainer` is a GRPOTrainer
  with credit by turn, whose policy class can be chosen.
- All conversations of a batch wait for one another at every turn, where the model's own ``generate`` reads the whole
  conversation again (vLLM keeps it in its prefix cache).
- ``max_completion_length`` limits a reply, not a conversation: ``mask_truncated_completions`` and the clipped ratio
  look at the last reply alone, and ``dr_grpo`` divides by the limit of one reply.
- Several processes only where each can sample by itself (DDP): not with a vLLM server, tensor parallelism, DeepSpeed or
  FSDP.

**Verdicts that failed** are never numbers. With ``on_judge_failure="raise"`` (the environment's default) the error ends
``trainer.train()``. With ``"nan"`` and ``"truncate"`` an unjudged turn is left out of the mean. A conversation without
a judged turn, and with ``reward="sum"`` one with any unjudged turn or a lost partner, has the reward None: TRL makes it
NaN, leaves it out of the group's mean and deviation and out of the logged rewards, and sets its advantage to 0. Its
tokens still count where a loss is divided by a number of tokens (``dapo``, ``bnpo``, …) or rows (``grpo``): the step is
smaller, in the same direction with ``beta=0`` (a KL term still pulls at them). The tokens of an unjudged turn learn
with the conversation's advantage, as all others: TRL has one per conversation. Above ``max_failure_rate`` the
environment raises.

Nothing here imports TRL: the trainer comes in as an argument.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch

from ppg_agents.generation import Sample
from ppg_agents.nearest import not_one_of
from ppg_agents.policy.policy import Policy
from ppg_agents.rollout.lockstep import collect
from ppg_agents.trajectory import Trajectory

if TYPE_CHECKING:
    from datasets import Dataset

ENVIRONMENT = "ppg_gym:PersonaChat-v0"
REWARDS = ("mean", "sum")
ALONE = ("NO", "MULTI_GPU", "MULTI_CPU")  # kinds of distribution in which every process holds the whole model


class PersonaChat:
    """A dataset, a rollout function and a reward function, to train a GRPOTrainer on PersonaChat-v0.

    Attributes:
        trajectories: The conversations of the newest rollout, in the order of its prompts.

    Args:
        reward: Of a conversation, the ``mean`` or ``sum`` of its judged turns.
        personas: ``train``, ``held-out`` or a path to a persona file.
        **env_kwargs: For PersonaChat-v0: ``domain``, ``judge``, ``partner``, ``max_turns``, ``on_judge_failure``, …

    Raises:
        ValueError: A wrong option.
    """

    def __init__(self, reward: str = "mean", personas: str = "train", **env_kwargs: Any) -> None:
        if reward not in REWARDS:
            raise ValueError(not_one_of("reward", reward, REWARDS))
        self.trajectories: list[Trajectory] = []
        self._reward, self._personas, self._env_kwargs = reward, personas, env_kwargs
        self._envs: dict[tuple[str, int], gym.vector.VectorEnv[Any, Any, Any]] = {}
        self._policy: Policy | None = None
        self._environments(personas, 1)  # a wrong option is an error now, not at the first step

    def dataset(self, conversations: int, seed: int = 0, personas: str | None = None) -> Dataset:
        """Return one prompt per conversation: it names the seed and the personas, the environment does the rest.

        Args:
            conversations: How many; GRPO plays each ``num_generations`` times.
            seed: Of the first; the others follow.
            personas: Default: those of the constructor. ``held-out`` for an ``eval_dataset``.

        Raises:
            ModuleNotFoundError: The library ``datasets`` is not installed.
        """
        try:
            from datasets import Dataset
        except ModuleNotFoundError as error:
            message = f'{error.name} is not installed; run: pip install "ppg-gym[agents,trl]"'
            raise ModuleNotFoundError(message, name=error.name) from error
        named = self._personas if personas is None else personas
        prompts = [json.dumps({"personas": named, "seed": seed + i}) for i in range(conversations)]
        return Dataset.from_dict({"prompt": prompts})

    def rollout(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Hold one conversation per prompt; for ``rollout_func``.

        Args:
            prompts: From `dataset`; equal ones, which TRL passes side by side, form a group.
            trainer: The GRPOTrainer, whose model and sampling settings speak.

        Returns:
            Per conversation ``prompt_ids`` (up to the first reply), ``completion_ids`` (from there to its end),
            ``env_mask`` (1 on sampled tokens), ``logprobs`` (with vLLM, else None), ``turn_rewards`` (None where a turn
            was not judged), ``lost`` (whether a fault ended it), ``conversation_reward`` and ``conversation`` (lines
            and scores, as text); TRL passes the last four to the reward functions.

        Raises:
            ValueError: A prompt from another dataset, or an unsuitable trainer.
            RuntimeError: The environment cannot go on: see PersonaChat-v0.
        """
        _check(trainer)
        personas, seeds = _read(prompts)
        policy = self._speaker(trainer)
        envs = self._environments(personas, len(seeds))
        domain = str(self._env_kwargs.get("domain", ""))
        played = collect(envs, policy, TrainerSampler(trainer, policy), seeds, domain=domain)
        for trajectory in played:
            if not trajectory.turns:
                raise ValueError(
                    f"expected room in the context for a prompt and a reply of {trainer.max_completion_length} tokens, "
                    f"got too little for persona {trajectory.persona!r}; lower max_completion_length"
                )
        self.trajectories = played
        rows = [_row(trajectory) for trajectory in played]
        return {
            "prompt_ids": [list(trajectory.turns[0].prompt_ids) for trajectory in played],
            "completion_ids": [ids for ids, _, _ in rows],
            "env_mask": [mask for _, mask, _ in rows],
            "logprobs": [log_probs for _, _, log_probs in rows] if trainer.use_vllm else None,
            "turn_rewards": [[t.reward if math.isfinite(t.reward) else None for t in p.turns] for p in played],
            "lost": [trajectory.lost for trajectory in played],
            "conversation_reward": [self._worth(trajectory) for trajectory in played],
            "conversation": [_text(trajectory) for trajectory in played],
        }

    def reward(
        self,
        conversation_reward: list[float | None] | None = None,
        turn_rewards: Sequence[Sequence[float | None]] = (),
        conversation: Sequence[str] = (),
        *,
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list[str]], None],
        **_: Any,
    ) -> list[float | None]:
        """Return what the conversations earned, None for TRL to leave one out; for ``reward_funcs``.

        Logs ``unjudged_turns``, the share of turns without a score, and for ``log_completions`` the column
        ``conversation``: TRL's own column runs replies and the partner's lines together.

        Raises:
            ValueError: The completions are not conversations of `rollout`.
        """
        if conversation_reward is None:
            raise ValueError("expected conversations of PersonaChat.rollout, got none; pass rollout_func=chat.rollout")
        turns = [reward for rewards in turn_rewards for reward in rewards]
        log_metric("unjudged_turns", turns.count(None) / len(turns))
        log_extra("conversation", list(conversation))
        return conversation_reward

    def close(self) -> None:
        """Close the environments, with judge and partner."""
        for envs in self._envs.values():
            envs.close()
        self._envs.clear()

    def _worth(self, trajectory: Trajectory) -> float | None:
        judged = trajectory.judged()
        if self._reward == "mean":
            return sum(judged) / len(judged) if judged else None
        whole = len(judged) == len(trajectory.turns) and not trajectory.lost
        return sum(judged) if whole else None

    def _environments(self, personas: str, n: int) -> gym.vector.VectorEnv[Any, Any, Any]:
        """Return n conversations; they are kept, as TRL's batches have one size in training and few in evaluation."""
        if (personas, n) not in self._envs:
            self._envs[personas, n] = gym.make_vec(ENVIRONMENT, num_envs=n, personas=personas, **self._env_kwargs)
        return self._envs[personas, n]

    def _speaker(self, trainer: Any) -> Policy:
        """Return the trainer's model as a policy, for its prompt format; the model stays as it is."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._policy is None or self._policy.model is not model:
            tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
            training = model.training
            self._policy = Policy(model, tokenizer, template_options=trainer.chat_template_kwargs)
            model.train(training)
        if self._policy.end_of_turn_id not in trainer.eos_token_ids:
            raise ValueError(
                f"expected {self._policy.format.end_of_turn!r}, which closes a reply in the chat template, among what "
                f"ends a completion, got tokens {trainer.eos_token_ids}; add it to model.generation_config.eos_token_id"
            )
        return self._policy


class TrainerSampler:
    """A GRPOTrainer's own generation, whichever backend it uses, for n conversations in lockstep."""

    own_model = False  # TRL prepares the model or server itself

    def __init__(self, trainer: Any, policy: Policy) -> None:
        self.max_new_tokens = int(trainer.max_completion_length)
        self.context_length = int(trainer.args.vllm_max_model_length or policy.context_length)
        self.temperature = float(trainer.temperature)
        self._trainer, self._end = trainer, policy.end_of_turn_id
        self._ids: list[list[int]] = []

    def start(self, n: int) -> None:
        """Begin n new conversations and forget the old ones."""
        self._ids = [[] for _ in range(n)]

    def sync(self, policy: Policy | None = None) -> None:
        """Do nothing: TRL keeps its generation up to date."""

    def close(self) -> None:
        """Do nothing: the trainer owns the generator."""

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out. TRL draws from torch's global generator.

        Args:
            prompts: The tokens since the conversation's last sampled token; None when it is finished.
            generator: Not used.
        """
        rows = [i for i, prompt in enumerate(prompts) if prompt is not None]
        replies: list[Sample | None] = [None] * len(prompts)
        if not rows:
            return replies
        for i in rows:
            self._ids[i].extend(prompts[i] or ())
        trainer = self._trainer
        completions, scores = trainer._generate_single_turn([list(self._ids[i]) for i in rows], None, {}, 1)
        for k, i in enumerate(rows):
            tokens = tuple(int(token) for token in completions[k])
            unknown = [None] * len(tokens)
            replies[i] = Sample(
                token_ids=tokens,
                log_probs=tuple(math.nan if s is None else float(s) for s in (scores[k] if scores else unknown)),
                ended=tokens[-1] == self._end,
                policy_version=int(trainer.state.global_step),
                temperature=float(trainer.temperature),
                sampler="vllm" if trainer.use_vllm else "hf",
            )
            self._ids[i].extend(tokens)
        return replies


def _row(trajectory: Trajectory) -> tuple[list[int], list[int], list[float]]:
    """Return a conversation from its first reply on: tokens, 1 on the sampled ones, and their log-probs (else 0)."""
    first, *later = trajectory.turns
    ids, mask, log_probs = list(first.token_ids), [1] * len(first.token_ids), list(first.log_probs)
    for turn in later:
        ids += [*turn.prompt_ids, *turn.token_ids]
        mask += [0] * len(turn.prompt_ids) + [1] * len(turn.token_ids)
        log_probs += [0.0] * len(turn.prompt_ids) + list(turn.log_probs)
    return ids, mask, log_probs


def _text(trajectory: Trajectory) -> str:
    """Return a conversation as text, with a score after every reply."""
    score = [f"{turn.reward:.2f}" if math.isfinite(turn.reward) else "no score" for turn in trajectory.turns]
    both = zip(trajectory.turns, score, strict=True)
    return "\n".join(f"partner: {turn.message}\npolicy: {turn.reply} ({score})" for turn, score in both)


def _read(prompts: Sequence[str]) -> tuple[str, list[int]]:
    """Return the personas and the seeds that prompts name."""
    try:
        named = [json.loads(prompt) for prompt in prompts]
        personas, seeds = {str(name["personas"]) for name in named}, [int(name["seed"]) for name in named]
    except (TypeError, KeyError, ValueError) as error:
        message = f"expected prompts from PersonaChat.dataset, got {prompts[0]!r}; pass that dataset to the trainer"
        raise ValueError(message) from error
    if len(personas) != 1:
        raise ValueError(f"expected the same personas in a batch, got {sorted(personas)}; keep the datasets apart")
    return personas.pop(), seeds


def _check(trainer: Any) -> None:
    """Raise a ValueError for a trainer that cannot hold these conversations."""
    if not hasattr(trainer, "_generate_single_turn"):
        raise ValueError(f"expected TRL's GRPOTrainer, 1.16 or newer, got {type(trainer).__name__}; upgrade TRL")
    if trainer.tools:  # TRL would then drop env_mask and train on the partner's words
        raise ValueError("expected a trainer without tools, got some; a persona answers in words: drop tools=")
    kind = trainer.accelerator.distributed_type.name
    together = trainer.use_vllm and (trainer.vllm_mode == "server" or trainer.vllm_tensor_parallel_size > 1)
    if trainer.accelerator.num_processes > 1 and (kind not in ALONE or together):
        raise ValueError(
            f"expected processes that sample by themselves, got {kind}{' with shared vLLM' if together else ''}: the "
            "conversations of one process may end before those of another, which would wait forever; use DDP"
        )
