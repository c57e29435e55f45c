"""The training loop, online and offline, top to bottom.

    evaluate on held-out personas
    repeat:  sample a batch of conversations -> judge -> credit -> gradient step          (online)
             take a batch of logged conversations -> credit -> gradient step              (offline)
    evaluate again, draw the picture

An iteration's randomness comes from (seed, iteration) alone: a checkpoint holds no generator, and a resumed run goes on
as if it had never stopped. An agent may take several gradient steps on a batch.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch

from ppg_agents.agents.protocol import Agent
from ppg_agents.building import advise, build_agent, integer_seed, load_policy, split, synchronise
from ppg_agents.config.checks import check_learning
from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig, differences
from ppg_agents.credit import Mask
from ppg_agents.distributed import Workers, finish, workers
from ppg_agents.evaluate import play, summarise
from ppg_agents.generation import GenerationError, Sampler, SingleSampler, make_sampler, speaking
from ppg_agents.horizon.planner import Planner
from ppg_agents.ledger import LedgerError
from ppg_agents.offline import Offline
from ppg_agents.policy.policy import Policy
from ppg_agents.prefixes import price, rewarded
from ppg_agents.rollout.environment import (
    HELD_OUT,
    ConversationError,
    make_env,
    make_envs,
    planned_turns,
)
from ppg_agents.rollout.lockstep import collect
from ppg_agents.rollout.metrics import batch_metrics, check_judge, check_partner, reply_lengths
from ppg_agents.rollout.pairs import play_pairs
from ppg_agents.rollout.speaker import PolicySpeaker, speaker_of
from ppg_agents.rollout.threads import Envs, collect_each
from ppg_agents.runs.curve import curve
from ppg_agents.runs.run import Run, lock
from ppg_agents.runs.tracking import Trackers, make_trackers, require
from ppg_agents.terminal.interrupt import Interrupt, Interrupted, Stop, saved
from ppg_agents.terminal.progress import Progress, interval, number, say, status
from ppg_agents.trajectory import Trajectory

ONE_LINE = ("facts", "llm", "nli")
"""Judges of the newest reply; none of them scores the conversation so far."""


def train(config: TrainConfig, folder: Path, *, resume: bool = False) -> Run:
    """Train a policy and keep everything about it in a run folder.

    Args:
        config: The settings; online unless ``offline.files`` names logged dialogues.
        folder: The run folder: new or empty, or that of the run to resume.
        resume: Continue from the folder's newest checkpoint.

    Returns:
        The finished run.

    Raises:
        ConfigError: Settings that contradict the environment or the resumed run.
        RunError: The folder is not empty, holds no run or a damaged one, is in use, or cannot be written.
        ConversationError: Judge or partner fails too often, a server is gone, a budget is used up; the run is saved.
        LedgerError: A batch is not what the policy sampled; the run is saved.
        Interrupted: The user stopped the run; it is saved.
    """
    require(config.report_to)
    check_learning(config)
    with Interrupt() as interrupt, ExitStack() as held:
        held.callback(finish)
        team = workers()
        interrupt.alone = team.size == 1
        folder = Path(team.gather([str(folder)])[0])  # rank 0 picks the folder, and only it writes there
        run = Run.open(folder) if resume else None
        if run is not None:
            if team.main:
                held.enter_context(lock(folder))
            run = continue_run(run, config, write=team.main)
        if config.threads:
            torch.set_num_threads(config.threads)
        task: Task = Offline(config, interrupt, team) if config.offline.files else Online(config, interrupt, team)
        policy = load_policy(config)
        if team.main:
            advise(config, policy)
        name = team.gather([uuid.uuid4().hex])[0]
        speech = replace(config.sampling, backend="hf", endpoints=()) if config.offline.files else config.sampling
        sampler = make_sampler(policy, speech, folder / "sampler", run=name, write=team.main)
        held.callback(sampler.close)
        if team.sharded:
            split(config, policy)
        task.prepare(policy, sampler)
        agent = build_agent(config, policy, sampler, team, task.iterations, task.turns, task.mask)
        task.meet(agent)
        if run is None and team.main:
            run = Run.create(folder, config)
            held.enter_context(lock(folder))
        start = run.rewind() if run is not None and team.main else (0, None)
        done, checkpoint = team.gather([start])[0]
        run = run or Run(folder, config)
        if team.main:
            task.describe(run)
        if checkpoint is not None:
            run.load_checkpoint(checkpoint, agent.load)
            task.remember(run)
        trackers = held.enter_context(make_trackers(config.report_to, run.folder, config, step=done))
        try:
            synchronise(sampler, policy, team)
            if not done and team.main:
                held_out(task, run, "before", done, trackers)
            if done in config.evaluation.at and team.main:  # stopped on the way to it
                held_out(task, run, f"iteration {done}", done, trackers)
            with Progress("training", task.iterations, start=done) if team.main else nullcontext() as progress:
                for iteration in range(done, task.iterations):
                    interrupt.requested = any(team.gather([interrupt.requested]))
                    interrupt.check()
                    torch.manual_seed(integer_seed(config.seed, iteration, -1))  # for dropout
                    metrics = task.step(run, iteration)
                    done = iteration + 1
                    save = done % config.checkpoint_every == 0 or done == task.iterations
                    if progress is not None:
                        run.append_metrics({"iteration": done, **metrics})
                        trackers.log(metrics, done)
                    if done in config.evaluation.at:
                        synchronise(sampler, policy, team)
                        if team.main:
                            held_out(task, run, f"iteration {done}", done, trackers)
                    if save:
                        save_checkpoint(run, done, agent, team)
                    if progress is not None:
                        progress.advance(done, status(metrics))
            synchronise(sampler, policy, team)
            if team.main:
                held_out(task, run, "after", done, trackers)
        except (Stop, ConversationError, GenerationError, LedgerError) as stop:  # no step was taken on the batch
            latest = run.latest_checkpoint()
            fresh = latest is not None and latest[0] == done
            if isinstance(stop, Stop):  # all ranks stop together; a fault may hit one alone
                fresh = team.gather([fresh])[0]
            if not fresh and (isinstance(stop, Stop) or not team.sharded):
                save_checkpoint(run, done, agent, team)
            if isinstance(stop, Stop):
                raise Interrupted(run.folder, done) from None
            latest = run.latest_checkpoint()
            kind = LedgerError if isinstance(stop, LedgerError) else ConversationError
            raise kind(f"{stop}; {saved(run.folder, latest[0] if latest else 0)}") from stop
        finally:
            task.close()
        if team.main:
            curve(run)
    return run


def save_checkpoint(run: Run, done: int, agent: Agent, team: Workers) -> None:
    """Save after ``done`` iterations."""
    # All ranks hold the same weights, so rank 0 alone writes; split weights need every rank to gather them.
    if team.main:
        run.save_checkpoint(done, agent.save)
    elif team.sharded:
        with TemporaryDirectory() as unused:
            agent.save(unused)


class Task(Protocol):
    """The source of conversations: played by the policy, or logged."""

    iterations: int
    turns: int | None

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Take the policy and its sampler."""

    def meet(self, agent: Agent) -> None:
        """Take the agent, which may speak for itself."""

    def describe(self, run: Run) -> None:
        """Report the data."""

    def mask(self, n: int) -> Mask:
        """Return the policy class in use, for conversations of n turns."""

    def remember(self, run: Run) -> None:
        """Restore what a resumed run had chosen."""

    def step(self, run: Run, iteration: int) -> dict[str, Any]:
        """Do one iteration and return its metrics."""

    def evaluate(self) -> tuple[dict[str, Any], Sequence[Trajectory]] | None:
        """Return held-out results and the conversations played for them; None when evaluation is off."""

    def close(self) -> None:
        """Close the environments."""


class Online:
    """Conversations with the environment, sampled from the current policy."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt, team: Workers) -> None:
        self.config, self.interrupt, self.team = config, interrupt, team
        self.iterations = config.iterations
        if config.batch < team.size:
            raise ConfigError(f"batch: expected one conversation or more per process, {team.size}, got {config.batch}")
        self.own = team.shard(config.batch)
        self.envs = make_envs(config, self.own.stop - self.own.start, config.personas)
        self.turns = planned_turns(self.envs, config)
        self.each: Envs | None = None
        self.planner = Planner(config, self.turns, team)
        self.mask = self.planner.mask

    def remember(self, run: Run) -> None:
        """Restore the policy class that was chosen last."""
        self.planner.remember(run.metrics())

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Take the policy and its sampler."""
        self.policy, self.sampler = policy, sampler

    def meet(self, agent: Agent) -> None:
        """Take the agent, which may speak for itself."""
        self.agent = agent
        self.speaker = speaker_of(agent, self.policy, self.sampler)
        if isinstance(self.sampler, SingleSampler) and isinstance(self.speaker, PolicySpeaker):
            # Servers answer one at a time, so a conversation waiting for its judge need not hold up the others.
            self.each = Envs(lambda: make_env(self.config, self.config.personas))

    def describe(self, run: Run) -> None:
        """Report the task and the run folder."""
        config, length = self.config, f"{self.turns} turns" if self.turns else "open length"
        say(f"{config.subject}, {config.label}: {config.batch} conversations of {length} per iteration")
        if config.reward == "prefix" and config.env.is_persona_chat and config.env.judge in ONE_LINE:
            say(
                "reward 'prefix' takes a score as that of the whole conversation so far; the judge "
                f"{config.env.judge!r} scores the newest reply, so the run learns to give one good reply"
            )
        say(f"run folder: {run.folder}")

    def step(self, run: Run, iteration: int) -> dict[str, Any]:
        """Sample a batch of conversations, let the agent learn from it, and record it."""
        config = self.config
        draws = np.random.SeedSequence([config.seed, iteration]).generate_state(config.batch // config.group)
        seeds = [int(seed) for seed in np.repeat(draws, config.group)][self.own]  # equal seeds share a persona
        generator = torch.Generator(self.policy.device)
        generator.manual_seed(integer_seed(config.seed, iteration, self.team.rank))
        began = time.perf_counter()
        synchronise(self.sampler, self.policy, self.team)
        with speaking(self.policy, self.sampler), self.interrupt.abandonable():
            if self.agent.needs.branch:
                rng = np.random.default_rng([config.seed, iteration, self.team.rank])
                one_half = partial(self._play, generator=generator)
                trajectories = play_pairs(one_half, self.sampler, seeds, rng, self.policy.end_of_turn_id)
            else:
                trajectories = self._play(self.sampler, seeds, generator)
        everything = self.team.gather(trajectories)
        check_judge(everything, config.env.max_failure_rate)
        check_partner(everything, config.env.max_partner_failure_rate)
        sampled = time.perf_counter()
        learned_from = rewarded(trajectories, config.reward)
        chosen = self.planner.review(learned_from, self.policy, iteration)
        learned = self.agent.learn(learned_from)
        seconds = {"seconds_sampling": sampled - began, "seconds_learning": time.perf_counter() - sampled}
        if self.team.main:
            run.append_trajectories(rewarded(everything, config.reward))
        usage = self.envs.usage()  # requests to servers
        paid = price(everything) if config.reward == "prefix" else {}
        played = {**batch_metrics(everything), **paid, **reply_lengths(everything, self.policy.end_of_turn_id)}
        return {**played, **learned, **chosen, **({"usage": usage} if usage else {}), **seconds}

    def _play(self, sampler: Sampler, seeds: Sequence[int], generator: torch.Generator) -> list[Trajectory]:
        """Hold one conversation per seed."""
        if self.each is not None and isinstance(sampler, SingleSampler):
            return collect_each(self.each, self.policy, sampler, seeds, generator, self.config.world)
        if self.envs.num_envs != len(seeds):  # pairs are played one half after the other
            self.envs.close()
            self.envs = make_envs(self.config, len(seeds), self.config.personas)
        speaker = self.speaker if sampler is self.sampler else PolicySpeaker(self.policy, sampler)
        return collect(self.envs, self.policy, sampler, seeds, generator, self.config.world, speaker=speaker)

    def evaluate(self) -> tuple[dict[str, Any], Sequence[Trajectory]] | None:
        """Play held-out personas; the agent speaks for itself if it can, else the policy speaks."""
        settings = self.config.evaluation
        if not settings.conversations:
            return None
        with speaking(self.policy, self.sampler), self.interrupt.abandonable():
            played, reachable = play(
                self.policy,
                self.sampler,
                self.config,
                personas=HELD_OUT,
                conversations=settings.conversations,
                seed=settings.seed,
                best_of=self.agent.needs.best_of,
                speaker=self.speaker,
            )
        return summarise(played, reachable).to_dict(), played

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()
        if self.each is not None:
            self.each.close()


def held_out(task: Task, run: Run, when: str, iteration: int, trackers: Trackers) -> None:
    """Evaluate on held-out personas unless already done, before a resume or under another name."""
    stored = run.evaluations()
    known = stored.get(when)
    if known is not None and (when == "before" or known["iteration"] == iteration):
        return
    same = [result for name, result in stored.items() if name != "before" and result["iteration"] == iteration]
    if same:
        run.write_evaluation(when, same[-1])
        return
    evaluated = task.evaluate()
    if evaluated is None:
        return
    result, conversations = evaluated
    if conversations:
        run.write_held_out(iteration, conversations)
    run.write_evaluation(when, {"iteration": iteration, **result})
    trackers.log({"held_out": {key: value for key, value in result.items() if key != "personas"}}, iteration)
    if "persona_consistency" in result:
        best = "" if result["reachable"] is None else f", reachable {number(result['reachable'])}"
        say(
            f"held-out personas, {when}: consistency {number(result['persona_consistency'])} "
            f"{interval(result['ci95'])}{best} ({result['n_personas']} personas)"
        )
    else:
        say(
            f"held-out personas, {when}: reward-weighted log-likelihood {result['log_likelihood']:.3f} "
            f"per conversation, {result['log_likelihood_per_token']:.4f} per judged token"
        )


def continue_run(run: Run, config: TrainConfig, *, write: bool = True) -> Run:
    """Return the run with new settings that agree with its own.

    Raises:
        ConfigError: A setting that may not change differs; the message names each.
    """
    different = differences(run.config, config)
    if different:
        raise ConfigError(f"expected the settings of the run in {run.folder}; {'; '.join(different)}")
    run = replace(run, config=config)
    if write:
        run.write_config()
    return run
