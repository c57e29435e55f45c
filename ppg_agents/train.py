"""The training loop, online and offline, top to bottom.

    evaluate on held-out personas
    repeat:  sample a batch of conversations -> judge -> credit -> one gradient step      (online)
             take a batch of logged conversations -> credit -> one gradient step          (offline)
    evaluate again, draw the picture

One iteration's randomness comes from (seed, iteration) alone, so a run that is resumed goes on as if it had
never stopped. What this leaves out: several gradient steps per batch and importance weights (every batch is
on-policy, so ratios are 1), a value network and KL penalties (a policy class is the point here), several
devices, and sampling on another machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ppg_agents import trajectory as ledger
from ppg_agents.agents import Agent, make_agent
from ppg_agents.config import ConfigError, TrainConfig, differences
from ppg_agents.credit import policy_class
from ppg_agents.environment import ConversationError, check_segments, make_envs, planned_turns
from ppg_agents.evaluate import evaluate, partner_faults, reward_table
from ppg_agents.figures import curve
from ppg_agents.generation import Sampler
from ppg_agents.generation.hf import HFSampler
from ppg_agents.interrupt import Interrupt, Stop
from ppg_agents.offline import encode, held_out_likelihood, likelihood, read_files, report_table, to_json
from ppg_agents.policy import Policy
from ppg_agents.progress import Progress, number, quiet_libraries, say, status
from ppg_agents.rollout import collect
from ppg_agents.runs import Run
from ppg_agents.trajectory import Trajectory


class Interrupted(Exception):  # noqa: N818 (no error: the user asked for it)
    """The user stopped the run; it is saved after ``iteration`` iterations in ``folder``."""

    def __init__(self, folder: Path, iteration: int) -> None:
        super().__init__(saved(folder, iteration))
        self.folder, self.iteration = folder, iteration


def saved(folder: Path, iteration: int) -> str:
    """Return where a stopped run is, and how to go on with it."""
    return f"saved after iteration {iteration}; go on with: ppg-agent train --resume {folder}"


def train(config: TrainConfig, folder: Path, *, resume: bool = False) -> Run:
    """Train a policy, and leave everything about it in a run folder.

    Args:
        config: The settings; online unless ``offline.files`` names logged dialogues.
        folder: The run folder: new or empty, or that of the run to resume.
        resume: Go on from the folder's newest checkpoint.

    Returns:
        The finished run.

    Raises:
        ConfigError: Settings that contradict the environment or the run that is resumed.
        RunError: The folder is not empty, or holds no run.
        ConversationError: The judge fails too often, a server is gone, a budget is used up; the run is saved.
        Interrupted: The user stopped the run; it is saved.
    """
    run = continue_run(folder, config) if resume else None
    with Interrupt() as interrupt:
        if config.threads:
            torch.set_num_threads(config.threads)
        task: Task = Offline(config, interrupt) if config.offline.files else Online(config, interrupt)
        policy = load_policy(config)
        sampler = make_sampler(config, policy)
        task.prepare(policy, sampler)
        agent = build_agent(config, policy, sampler, task)
        run = run or Run.create(folder, config)
        task.describe(run)
        done, checkpoint = run.rewind()
        if checkpoint is not None:
            agent.load(checkpoint)
        try:
            held_out(task, agent, run, "before", done)
            with Progress("training", task.iterations, start=done) as progress:
                for iteration in range(done, task.iterations):
                    interrupt.check()
                    torch.manual_seed(integer_seed(config.seed, iteration))  # of dropout, where there is any
                    metrics = task.step(agent, run, iteration)
                    done = iteration + 1
                    run.append_metrics({"iteration": done, **metrics})
                    if done % config.checkpoint_every == 0 or done == task.iterations:
                        run.save_checkpoint(done, agent.save)
                    progress.advance(done, status(metrics))
            held_out(task, agent, run, "after", done)
        except (Stop, ConversationError) as stop:
            latest = run.latest_checkpoint()
            if latest is None or latest[0] != done:
                run.save_checkpoint(done, agent.save)
            if isinstance(stop, Stop):
                raise Interrupted(run.folder, done) from None
            raise ConversationError(f"{stop}; {saved(run.folder, done)}") from stop
        finally:
            task.close()
    curve(run)
    return run


class Task(Protocol):
    """What is learned from: conversations that the policy plays, or logged ones."""

    iterations: int
    turns: int | None

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Take what speaks."""

    def describe(self, run: Run) -> None:
        """Say what is learned from."""

    def step(self, agent: Agent, run: Run, iteration: int) -> dict[str, Any]:
        """Do one iteration and return its metrics."""

    def evaluate(self, agent: Agent) -> dict[str, Any] | None:
        """Return held-out results; None when evaluation is off."""

    def close(self) -> None:
        """Let go of the environments."""


class Online:
    """Conversations with the environment, sampled from the current policy."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt) -> None:
        self.config, self.interrupt = config, interrupt
        self.iterations = config.iterations
        self.envs = make_envs(config, config.batch, config.personas)
        self.turns = planned_turns(self.envs, config)
        check_segments(config, self.turns)

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Take what speaks."""
        self.policy, self.sampler = policy, sampler

    def describe(self, run: Run) -> None:
        """Say what is learned, and where it is kept."""
        config, length = self.config, f"{self.turns} turns" if self.turns else "open length"
        say(f"{config.domain}, {config.label}: {config.batch} conversations of {length} per iteration")
        say(f"run folder: {run.folder}")

    def step(self, agent: Agent, run: Run, iteration: int) -> dict[str, Any]:
        """Sample a batch of conversations, let the agent learn from it, and write it down."""
        config = self.config
        draws = np.random.SeedSequence([config.seed, iteration]).generate_state(config.batch // config.group)
        seeds = [int(seed) for seed in np.repeat(draws, config.group)]  # equal seeds share a persona
        generator = torch.Generator(self.policy.device).manual_seed(integer_seed(config.seed, iteration))
        began = time.perf_counter()
        with self.policy.merged(), self.interrupt.abandonable():
            trajectories = collect(self.envs, self.policy, self.sampler, seeds, generator, config.domain)
        sampled = time.perf_counter()
        learned = agent.learn(trajectories)
        seconds = {"seconds_sampling": sampled - began, "seconds_learning": time.perf_counter() - sampled}
        ledger.append(run.trajectories_file, trajectories)
        usage: dict[str, Any] = getattr(self.envs.unwrapped, "usage", dict)()  # what the environment asked servers for
        return {**batch_metrics(trajectories), **learned, **({"usage": usage} if usage else {}), **seconds}

    def evaluate(self, agent: Agent) -> dict[str, Any] | None:
        """Play held-out personas; the agent speaks through the policy it learns."""
        if not self.config.evaluation.conversations:
            return None
        with self.policy.merged(), self.interrupt.abandonable():
            return evaluate(self.policy, self.sampler, self.config).to_dict()

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


class Offline:
    """Logged dialogues; the objective is their reward-weighted log-likelihood."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt) -> None:
        self.config, self.interrupt = config, interrupt
        self.dialogues, self.reports = read_files(config.offline)
        turns = max((len(dialogue.turns) for dialogue in self.dialogues), default=1)
        check_segments(config, turns)
        self.turns: int | None = turns
        self.mask = policy_class(config.policy_class, turns, config.lookahead, config.segments)

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Hold out personas and encode the dialogues."""
        self.data = encode(self.dialogues, self.reports, self.config.offline, policy, self.config.seed)
        self.per_epoch = math.ceil(len(self.data.train) / self.config.batch)
        self.iterations = self.config.offline.epochs * self.per_epoch

    def describe(self, run: Run) -> None:
        """Say what was read, and keep it in the run folder."""
        say(report_table(self.data))
        say(f"run folder: {run.folder}")
        text = json.dumps(to_json(self.data), indent=2, ensure_ascii=False)
        (run.folder / "offline.json").write_text(text + "\n", encoding="utf-8")

    def step(self, agent: Any, run: Run, iteration: int) -> dict[str, Any]:
        """Learn from the iteration's share of a pass over the data; every pass has its own order."""
        epoch, position = divmod(iteration, self.per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.data.train))
        rows = order[position * self.config.batch :][: self.config.batch]
        trajectories = [self.data.train[row] for row in rows]
        began = time.perf_counter()
        learned = agent.learn_offline(trajectories)
        metrics = {"epoch": epoch + 1, **batch_metrics(trajectories), **learned}
        if self.config.aggregation == "sum" and not self.config.standardise:  # loss = -objective
            total = -learned["loss"] * len(trajectories)
            metrics |= likelihood(total, trajectories, self.mask, self.config.discount)
        return {**metrics, "seconds_learning": time.perf_counter() - began}

    def evaluate(self, agent: Any) -> dict[str, Any] | None:
        """Score the dialogues of held-out personas."""
        with self.interrupt.abandonable():
            return held_out_likelihood(agent, self.data.held_out, self.mask, self.config.discount)

    def close(self) -> None:
        """There is nothing to let go of."""


def held_out(task: Task, agent: Agent, run: Run, when: str, iteration: int) -> None:
    """Evaluate on held-out personas unless a resumed run has done so already."""
    known = run.evaluations().get(when)
    if known is not None and (when == "before" or known["iteration"] == iteration):
        return
    result = task.evaluate(agent)
    if result is None:
        return
    run.write_evaluation(when, {"iteration": iteration, **result})
    if "persona_consistency" in result:
        low, high = result["ci95"]
        best = "" if result["reachable"] is None else f", reachable {number(result['reachable'])}"
        say(
            f"held-out personas, {when}: consistency {number(result['persona_consistency'])} "
            f"[{number(low)}, {number(high)}]{best} ({result['n_personas']} personas)"
        )
    else:
        say(
            f"held-out personas, {when}: reward-weighted log-likelihood {result['log_likelihood']:.3f} "
            f"per conversation, {result['log_likelihood_per_token']:.4f} per judged token"
        )


def batch_metrics(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return what the judge said about a batch; unjudged turns are counted and left out of the means.

    ``partner_failures``: the partner's faults, fault -> conversations that it ended.
    """
    rewards = reward_table([[turn.reward for turn in t.turns] for t in trajectories])
    judged = np.isfinite(rewards)
    turns = sum(len(t.turns) for t in trajectories)
    lost = turns - int(judged.sum())
    counts, sums = judged.sum(0), np.where(judged, rewards, 0.0).sum(0)
    per_turn = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return {
        "consistency": float(sums.sum() / counts.sum()) if counts.sum() else None,
        "reward_per_turn": per_turn,
        "judge_failures": lost,
        "judge_failure_rate": lost / turns if turns else None,
        "partner_failures": partner_faults(trajectories),
        "truncated": sum(t.truncated for t in trajectories),
    }


def load_policy(config: TrainConfig) -> Policy:
    """Return the policy that the run starts from: the model with a fresh adapter."""
    quiet_libraries()
    return Policy.load(config.model, lora=config.lora if config.lora.rank else None, seed=config.seed)


def make_sampler(config: TrainConfig, policy: Policy) -> HFSampler:
    """Return the sampler of the run's settings."""
    return HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature)


def build_agent(config: TrainConfig, policy: Policy, sampler: Sampler, task: Task) -> Agent:
    """Return the learner; its policy class is the run's, for as many turns as the task has.

    Raises:
        ConfigError: No agent of that name, or one that lacks what the settings ask of it.
    """
    turns = task.turns or (sum(config.segments) if config.segments else None)
    if config.baseline == "moving-average" and turns is None:
        raise ConfigError("baseline 'moving-average' needs the number of turns; set env.max_turns")
    try:
        agent = make_agent(
            config.agent,
            policy,
            lambda n: policy_class(config.policy_class, n, config.lookahead, config.segments),
            n_turns=turns,
            discount=config.discount,
            baseline=config.baseline,
            standardise=config.standardise,
            aggregation=config.aggregation,
            constant=config.aggregation_constant,
            learning_rate=lambda step: learning_rate(config, step, task.iterations),
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            micro_batch_tokens=config.micro_batch_tokens,
            sampler=sampler,
        )
    except ValueError as error:
        raise ConfigError(f"agent: {error}") from error
    if config.offline.files and not hasattr(agent, "learn_offline"):
        raise ConfigError(f"agent: expected one that learns offline, such as 'ppg', got {config.agent!r}")
    return agent


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step out of ``steps``: constant, or falling towards 0."""
    left = max(0.0, 1.0 - step / steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * {"constant": 1.0, "linear": left, "cosine": cosine}[config.schedule]


def integer_seed(seed: int, iteration: int) -> int:
    """Return one integer made of both, for torch's generators."""
    return int(np.random.SeedSequence([seed, iteration, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def continue_run(folder: Path, config: TrainConfig) -> Run:
    """Open a run to go on with it, under settings that agree with its own.

    Raises:
        ConfigError: A setting differs that the run depends on; the message names each.
        RunError: There is no run in the folder.
    """
    run = Run.open(folder)
    different = differences(run.config, config)
    if different:
        raise ConfigError(f"expected the settings of the run in {folder}; {'; '.join(different)}")
    run = replace(run, config=config)
    run.write_config()
    return run
