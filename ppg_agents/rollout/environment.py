"""Make the environment of a run, through Gymnasium's API alone.

PersonaChat-v0 gets the run's domain, personas, partner and judge as keyword arguments; any other registered
environment gets ``env.kwargs`` and nothing else. Plain text observations are wrapped (`text_observation`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig
from ppg_agents.rollout.text_observation import TextObservation, TextObservations, is_text
from ppg_agents.runs.run import RunError

TRAIN, HELD_OUT = "train", "held-out"


def keyword_arguments(config: TrainConfig, personas: str) -> dict[str, Any]:
    """Return the arguments of ``gym.make`` besides the id.

    Args:
        config: The run's settings.
        personas: ``train``, ``held-out`` or a path; held-out adds ``env.held_out_kwargs``.

    Raises:
        ConfigError: A path for an environment other than PersonaChat-v0, which would not read it.
    """
    env = config.env
    given: dict[str, Any] = {}
    if not env.is_persona_chat and personas not in (TRAIN, HELD_OUT):
        raise ConfigError(
            f"personas: expected {TRAIN} or {HELD_OUT} with env.id = {env.id!r}, got {personas!r}; "
            "pass the environment its own file with env.kwargs"
        )
    if env.is_persona_chat:
        given = {
            "domain": config.domain,
            "personas": personas,
            "partner": env.partner,
            "partner_options": env.partner_options,
            "judge": env.judge,
            "judge_options": env.judge_options,
            "on_judge_failure": env.on_judge_failure,
            "max_failure_rate": env.max_failure_rate,
            "max_partner_failure_rate": env.max_partner_failure_rate,
        }
        if env.max_turns is not None:
            given["max_turns"] = env.max_turns
    return given | env.kwargs | (env.held_out_kwargs if personas == HELD_OUT else {})


class ConversationError(RunError):
    """The environment cannot go on: its judge or partner fails too often, a server is gone, or a budget is used up."""


@contextmanager
def _conversation_errors() -> Iterator[None]:
    """Turn an environment's RuntimeErrors into ConversationErrors."""
    try:
        yield
    except RuntimeError as error:
        raise ConversationError(str(error)) from error


@runtime_checkable
class Planned(Protocol):
    """An environment that says how many turns a conversation is planned to have."""

    max_turns: int | None


@runtime_checkable
class Metered(Protocol):
    """An environment that counts its requests to servers."""

    def usage(self) -> dict[str, Any]:
        """Return the counts so far."""


class Conversations(gym.vector.VectorWrapper):
    """The environment as the learner sees it: one kind of error, and the reachable reward from the last reset."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.reset_info: dict[str, Any] = {}

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and remember the info unless only some conversations were reset.

        Raises:
            ConversationError: The environment raised a RuntimeError.
        """
        partial = "reset_mask" in (options or {})
        with _conversation_errors():
            observations, info = self.env.reset(seed=seed, options=options)
        self.reset_info = self.reset_info if partial else info
        return observations, info

    def step(self, actions: Any) -> Any:
        """Step.

        Raises:
            ConversationError: The environment raised a RuntimeError.
        """
        with _conversation_errors():
            return self.env.step(actions)

    def usage(self) -> dict[str, Any]:
        """Return the counts of requests to servers, by partner and judge; empty without servers."""
        env = self.env.unwrapped
        return env.usage() if isinstance(env, Metered) else {}

    def reachable(self) -> NDArray[np.float64]:
        """Return the best mean reward per turn that each conversation can reach, NaN where unknown, [N]."""
        values: NDArray[np.float64] = np.full(self.num_envs, np.nan)
        if "reachable" in self.reset_info:
            values[:] = self.reset_info["reachable"]
        return values


class OneConversation(gym.Wrapper[Any, Any, Any, Any]):
    """A single environment that raises ConversationErrors, as `Conversations` does."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; raises a ConversationError for a RuntimeError of the environment."""
        with _conversation_errors():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Step; raises a ConversationError for a RuntimeError of the environment."""
        with _conversation_errors():
            return self.env.step(action)


def make_env(config: TrainConfig, personas: str) -> OneConversation:
    """Return one conversation, stepped at its own pace; see `make_envs` for its observations.

    Raises:
        ConfigError: The environment cannot be made: its module, its id or its arguments; or it holds no conversations.
    """
    name, given = _registered(config, personas)
    with _making(config):
        env = gym.make(name, **{**given, "disable_env_checker": True})
    if _shows_plain_text(config, env.observation_space, env.action_space):
        env = TextObservation(env, config.env.instruction)
    return OneConversation(env)


def _registered(config: TrainConfig, personas: str) -> tuple[str, dict[str, Any]]:
    """Import the environment's module; return the registered name and the keyword arguments."""
    module, _, name = config.env.id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"env.id: expected a registered environment, got {config.env.id!r}: {error}"
        raise ConfigError(message) from error
    return name, keyword_arguments(config, personas)


@contextmanager
def _making(config: TrainConfig) -> Iterator[None]:
    """Blame the setting when an environment cannot be made.

    Raises:
        ConfigError: Gymnasium does not know the id, or the environment does not take an argument.
    """
    try:
        yield
    except gym.error.Error as error:
        todo = "" if ":" in config.env.id else f"; for one in another package, name its module: MODULE:{config.env.id}"
        message = f"env.id: expected a registered environment, got {config.env.id!r}: {str(error).rstrip('.')}{todo}"
        raise ConfigError(message) from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        named = ", ".join(config.env.kwargs) or "none"
        raise ConfigError(f"env.kwargs: expected arguments of {config.env.id}, got {named}: {error}") from error


def _shows_plain_text(config: TrainConfig, shown: gym.Space[Any], heard: gym.Space[Any]) -> bool:
    """Return whether an environment shows plain text, which needs a wrapper for the policy to read it.

    Args:
        config: The run's settings.
        shown: The space of an observation.
        heard: The space of an action.

    Raises:
        ConfigError: It holds no conversations, or has its own instruction besides ``env.instruction``.
    """
    keys = list(shown.spaces) if isinstance(shown, gym.spaces.Dict) else []
    plain = is_text(shown)
    if not plain and not {"instruction", "message"} <= set(keys):
        raise ConfigError(
            "env.id: expected an environment of conversations, whose observations are a text, or a dict with "
            f"'instruction' and 'message', got {config.env.id!r} with {f'the keys {keys}' if keys else shown}; "
            "put a wrapper around it"
        )
    if heard.dtype is not None and not is_text(heard):  # a user's own text space may have no dtype
        raise ConfigError(
            f"env.id: expected an environment whose actions are strings, got {config.env.id!r} with {heard}; "
            "put a wrapper around it"
        )
    if config.env.instruction and not plain:
        raise ConfigError(
            "env.instruction: expected only for observations of plain text, got one beside "
            f"{config.env.id!r}, which gives its own instruction; leave it out"
        )
    return plain


def make_envs(config: TrainConfig, num_envs: int, personas: str) -> Conversations:
    """Return ``num_envs`` conversations in lockstep that wait for a reset when they end.

    Observations are ``{"instruction": [N], "message": [N]}``; plain text is the message below ``env.instruction``.

    Raises:
        ConfigError: The environment cannot be made: its module, its id or its arguments; or it holds no conversations.
    """
    name, given = _registered(config, personas)
    with _making(config):
        if gym.spec(name).vector_entry_point is not None:
            envs = gym.make_vec(name, num_envs=num_envs, **given)
        else:  # Gymnasium's checker rejects NaN, the reward of an unjudged turn
            vector = {"autoreset_mode": AutoresetMode.DISABLED}
            given["disable_env_checker"] = True
            envs = gym.make_vec(name, num_envs, "sync", vector, **given)
    if _shows_plain_text(config, envs.single_observation_space, envs.single_action_space):
        envs = TextObservations(envs, config.env.instruction)
    return Conversations(envs)


def planned_turns(envs: VectorEnv[Any, Any, Any], config: TrainConfig) -> int | None:
    """Return the planned number of turns of a conversation, None if the environment does not say.

    Read from ``env.max_turns``, the environment's attribute ``max_turns``, or its spec's step limit.
    """
    inner = envs.unwrapped
    # SyncVectorEnv does not pass on the attributes of what it holds
    single = inner.envs[0].unwrapped if isinstance(inner, SyncVectorEnv) else inner
    limits = (
        config.env.max_turns,
        config.env.kwargs.get("max_turns"),
        single.max_turns if isinstance(single, Planned) else None,
        envs.spec.max_episode_steps if envs.spec else None,
    )
    return next((int(limit) for limit in limits if limit), None)
