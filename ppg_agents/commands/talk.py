"""A conversation at the terminal: a person plays the partner, the policy plays the persona.

Uses Gymnasium like everything else: the environment's partner is ``console``, which shows the persona and the judge's
verdict on each reply, and asks the person for a line. Nothing here learns.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import gymnasium as gym
import torch

from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import PERSONA_CHAT, TrainConfig
from ppg_agents.rollout.environment import keyword_arguments
from ppg_agents.rollout.speaker import PolicySpeaker

if TYPE_CHECKING:
    from ppg_agents.evaluate import Target

MANY_TURNS = 1000


def talk(
    target: Target, config: TrainConfig, *, personas: str, persona: str | None = None, seed: int | None = None
) -> list[float]:
    """Talk until the person enters an empty line, or the conversation outgrows the model's context.

    Args:
        target: The policy that plays the persona.
        config: Domain and judge.
        personas: ``train``, ``held-out`` or a path.
        persona: Id of the persona; None draws one.
        seed: Seeds the draws; None gives a new conversation every time.

    Returns:
        The judge's scores, NaN where it gave none.

    Raises:
        ConfigError: The run's environment has no console partner.
    """
    if config.env.id != PERSONA_CHAT:
        raise ConfigError(f"env.id: expected {PERSONA_CHAT} to chat, got {config.env.id!r}")
    settings = replace(
        config.env,
        partner="console",
        partner_options={"show_persona": True},
        max_turns=config.env.max_turns or MANY_TURNS,
        on_judge_failure="nan",
    )
    module, _, name = PERSONA_CHAT.rpartition(":")
    importlib.import_module(module)
    arguments = keyword_arguments(replace(config, env=settings), personas)
    env = gym.make(name, disable_env_checker=True, **arguments)
    policy = target.policy
    generator = torch.Generator(policy.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    speaker = target.speaker or PolicySpeaker(policy, target.sampler)
    speaker.start(1, generator)
    scores: list[float] = []
    click.echo("You speak first. An empty line ends the conversation.", err=True)
    try:
        observation, info = env.reset(seed=seed, options={"persona": persona} if persona else None)
        over = not observation["message"]
        with policy.merged():
            while not over:
                turn = speaker.reply([observation["instruction"]], [observation["message"]], [True], generator)[0]
                if turn is None:
                    click.echo("(the conversation has filled the model's context)", err=True)
                    break
                click.echo(f"persona> {turn.text}")
                observation, reward, terminated, truncated, info = env.step(turn.text)
                scores.append(float(reward))
                over = terminated or truncated
                if terminated:  # the partner shows verdicts, but gets no turn after the end
                    click.echo(verdict_line(info["verdict"]))
    finally:
        env.close()
    judged = [score for score in scores if math.isfinite(score)]
    if judged:
        click.echo(f"persona consistency {sum(judged) / len(judged):.3f} over {len(judged)} replies", err=True)
    return scores


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """Return a verdict as one line under the reply."""
    score = verdict["status"] if verdict.get("score") is None else f"{verdict['score']:.2f}"
    return f"    ({score}) {verdict.get('rationale', '')}".rstrip()
