"""Stable-baselines3's PPO, A2C and DQN, which choose among given replies; the other agents write theirs.

The library does the learning. This module makes its environments, scores all candidates with one network, and
evaluates the result like any other agent. These agents are not an `Agent`: they have no tokens, only a candidate's
index. The same: environment, partner, judge, personas, the seeds of the held-out conversations, the unit of the budget
(a judged turn, one step) and the summary. Different: the replies come from a bank, so the agents learn nothing about
wording and can only say what the bank offers. `Uniform` shows what choosing blindly from the bank scores: that is where
these agents start, not at the untrained language model's score.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor, nn

from ppg_agents.config.settings import EnvSettings, EvaluationSettings
from ppg_agents.evaluate import Evaluation, summarise
from ppg_agents.nearest import did_you_mean, not_one_of
from ppg_agents.rollout.environment import HELD_OUT, TRAIN
from ppg_agents.rollout.metrics import check_partner
from ppg_agents.trajectory import Trajectory, Turn

ENVIRONMENT = "ppg_gym:ReplySelection-v0"
SCHEMA = "ppg-sb3/1"
MODEL, RECORD = "model.zip", "sb3.json"
CURVE = 1000  # judged turns per point

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"sb3-ppo": PPO, "sb3-a2c": A2C, "sb3-dqn": DQN}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sb3-ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-3},
    "sb3-a2c": {"n_steps": 8},
    "sb3-dqn": {
        "learning_starts": 500,
        "train_freq": 1,
        "gradient_steps": 2,
        "target_update_interval": 500,
        "exploration_fraction": 0.3,
        "learning_rate": 5e-4,
    },
}


class Chooser(Protocol):
    """What can be evaluated: a stable-baselines3 model, or anything that predicts like one."""

    def predict(self, observation: NDArray[np.float32], *, deterministic: bool) -> tuple[Any, Any]:
        """Return the action and a state, which is ignored."""


class Uniform:
    """Chooses every candidate with the same probability."""

    def __init__(self, candidates: int, seed: int = 0) -> None:
        self._n, self._rng = candidates, np.random.default_rng(seed)

    def predict(self, observation: NDArray[np.float32], *, deterministic: bool = False) -> tuple[Any, Any]:
        """Return a random index."""
        return self._rng.integers(self._n), None


@dataclass(frozen=True)
class Trained:
    """A finished training run.

    Attributes:
        algorithm: ``sb3-ppo``, ``sb3-a2c`` or ``sb3-dqn``.
        folder: Holds the library's zip and the settings.
        judged_turns: Turns played and judged: what was asked for, rounded up to a whole rollout of the library.
        seconds: Time spent learning.
        curve: (judged turns, mean reward since the point before), about every 1,000 turns.
    """

    algorithm: str
    folder: Path
    judged_turns: int
    seconds: float
    curve: tuple[tuple[int, float], ...]


class CandidateScorer(BaseFeaturesExtractor):  # type: ignore[misc]
    """One small network that scores every candidate: [B, shared + N * each] -> [B, N].

    A candidate's score depends on the shared features and its own, not on its place.
    """

    def __init__(self, observation_space: gym.Space[Any], layout: tuple[int, int, int], width: int = 64) -> None:
        super().__init__(observation_space, layout[1])
        self._shared, self._n, self._each = layout
        self.net = nn.Sequential(nn.Linear(self._shared + self._each, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, observations: Tensor) -> Tensor:
        """Return the scores."""
        shared = observations[:, None, : self._shared].expand(-1, self._n, -1)
        candidates = observations[:, self._shared :].reshape(-1, self._n, self._each)
        scores: Tensor = self.net(torch.cat([shared, candidates], -1)).squeeze(-1)
        return scores


def train_sb3(
    algorithm: str,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    timesteps: int,
    out: str | Path,
    seed: int = 0,
    n_envs: int = 8,
    discount: float = 1.0,
    **algorithm_options: Any,
) -> Trained:
    """Train with the library and save its zip.

    Args:
        algorithm: ``sb3-ppo``, ``sb3-a2c`` or ``sb3-dqn``.
        env_kwargs: Arguments of ``ReplySelection-v0``: PersonaChat-v0's, and ``candidates``, ``bank``, ``features``, …
        timesteps: Judged turns.
        out: Folder for ``model.zip`` and ``sb3.json``; it must not hold a model yet.
        seed: Same seed, same model, on the same machine with the same number of threads.
        n_envs: Conversations side by side.
        discount: Of rewards, per turn: the library's ``gamma``, whose own default of 0.99 is not used.
        **algorithm_options: Options of the library's class, on top of `DEFAULTS`. With your own ``policy_kwargs`` the
            library's network replaces `CandidateScorer`.

    Raises:
        ValueError: Unknown algorithm or option; the message suggests the nearest name.
        FileExistsError: The folder holds a model.
        RuntimeError: The judge gave no score; the agent is saved as it was then.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(not_one_of("the algorithm", algorithm, ALGORITHMS))
    accepted = inspect.signature(ALGORITHMS[algorithm].__init__).parameters
    for option in algorithm_options:
        if option == "gamma":
            raise ValueError(f"expected options of {algorithm} alone, got 'gamma'; set discount, as for every agent")
        if option not in accepted or option in ("self", "policy", "env"):
            raise ValueError(f"expected options that {algorithm} takes, got {option!r}{did_you_mean(option, accepted)}")
    folder = Path(out)
    if (folder / MODEL).exists():
        raise FileExistsError(f"expected a folder without a model, got {folder}; choose another folder")
    given = {"personas": TRAIN, **(env_kwargs or {})}
    options = {"device": "cpu", "gamma": discount, **DEFAULTS[algorithm], **algorithm_options}
    envs = make_vec_env(lambda: gym.make(ENVIRONMENT, disable_env_checker=True, **given), n_envs, seed)
    use_scorer = "policy_kwargs" not in options
    if use_scorer:
        options["policy_kwargs"] = _scoring(algorithm, envs.get_attr("layout")[0])
    model = ALGORITHMS[algorithm]("MlpPolicy", envs, seed=seed, **options)
    if use_scorer:
        _scores_are_logits(model)
    curve, began = _Curve(), time.perf_counter()

    def finish() -> Trained:
        folder.mkdir(parents=True, exist_ok=True)
        seconds = time.perf_counter() - began
        trained = Trained(algorithm, folder, int(model.num_timesteps), seconds, tuple(curve.points))
        model.save(folder / MODEL)
        record = {"schema": SCHEMA, **asdict(trained), "timesteps": timesteps, "seed": seed, "n_envs": n_envs}
        record |= {"folder": str(folder), "env_kwargs": given, "options": options}
        text = json.dumps(record, indent=2, ensure_ascii=False, default=repr)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        return trained

    try:
        model.learn(timesteps, callback=curve)
    except (RuntimeError, KeyboardInterrupt) as stop:
        stop.add_note(f"the agent as it was after {finish().judged_turns} judged turns is in {folder}")
        raise
    finally:
        envs.close()
    return finish()


def load_sb3(folder: str | Path) -> tuple[BaseAlgorithm, dict[str, Any]]:
    """Return what `train_sb3` saved: the library's model and the record of its training.

    The library's zip holds pickles: only load files you trust.

    Raises:
        FileNotFoundError: The folder holds no such record or model.
        ValueError: The record has another schema.
    """
    folder = Path(folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{folder / RECORD}: expected schema {SCHEMA!r}, got {record.get('schema')!r}")
    model = ALGORITHMS[record["algorithm"]].load(folder / MODEL, device="cpu")
    if model.policy_kwargs.get("features_extractor_class") is CandidateScorer:
        _scores_are_logits(model)  # the zip does not record that these layers are frozen
    return model, record


def play_sb3(
    agent: Chooser | str | Path,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    conversations: int = EvaluationSettings.conversations,
    seed: int = EvaluationSettings.seed,
    personas: str = HELD_OUT,
    deterministic: bool = False,
) -> tuple[list[Trajectory], NDArray[np.float64]]:
    """Play the seeded conversations that `ppg_agents.evaluate.play` plays: same personas, same first lines.

    The agent speaks as it did when its training ended, as language models do: PPO and A2C draw a candidate from their
    distribution, DQN takes the best but for its last rate of exploration.

    Args:
        agent: A folder of `train_sb3`, a model, or `Uniform`.
        env_kwargs: As in `train_sb3`; None for those that the folder's agent was trained with.
        conversations: How many, at least 1.
        seed: Seed of the conversations and of the agent's draws.
        personas: ``held-out``, ``train`` or a path.
        deterministic: Whether to take the best candidate instead: what temperature 0 is to a language model.

    Returns:
        The conversations, without tokens and with a reward of NaN for unjudged turns; and for each the value that free
        speech can reach, NaN if unknown.
    """
    given = dict(env_kwargs or {})
    if isinstance(agent, str | Path):
        chooser, record = load_sb3(agent)
        given = given if env_kwargs is not None else record["env_kwargs"]
    else:
        chooser = agent
    given |= {"personas": personas, "on_unjudged": "nan"}
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(conversations)]
    trajectories, reachable = [], []
    with _seeded(chooser, seed), gym.make(ENVIRONMENT, disable_env_checker=True, **given) as env:
        for conversation_seed in seeds:
            trajectory, best = _play_one(env, chooser, conversation_seed, given.get("domain", ""), deterministic)
            trajectories.append(trajectory)
            reachable.append(best)
    check_partner(trajectories, given.get("max_partner_failure_rate", EnvSettings.max_partner_failure_rate))
    return trajectories, np.array(reachable)


def evaluate_sb3(agent: Chooser | str | Path, env_kwargs: Mapping[str, Any] | None = None, **how: Any) -> Evaluation:
    """Return the consistency on held-out personas, with intervals; takes the arguments of `play_sb3`."""
    return summarise(*play_sb3(agent, env_kwargs, **how))


@contextmanager
def _seeded(agent: Chooser, seed: int) -> Iterator[None]:
    """Seed the generators that the library draws from, which are torch's, numpy's and the action space's own."""
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        set_random_seed(seed % 2**32)
        if isinstance(agent, BaseAlgorithm):
            agent.action_space.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)


def _play_one(
    env: gym.Env[Any, Any], agent: Chooser, seed: int, domain: str, deterministic: bool
) -> tuple[Trajectory, float]:
    observation, info = env.reset(seed=seed)
    persona, best = info.get("persona", ""), float(info.get("reachable", np.nan))
    turns, terminated, truncated = [], False, False
    while not (terminated or truncated):
        message = env.get_wrapper_attr("message")
        action, _ = agent.predict(observation, deterministic=deterministic)
        observation, reward, terminated, truncated, info = env.step(action)
        verdict = info.get("verdict", {})
        turns.append(Turn(message, info["reply"], (), (), (), float(reward), verdict, policy_version=-1))
    status = info.get("partner", {}).get("status", "ok")
    instruction = env.get_wrapper_attr("instruction")
    return Trajectory(instruction, persona, domain, seed, tuple(turns), terminated, truncated, status), best


class _Curve(BaseCallback):  # type: ignore[misc]
    """Records the mean reward of about every 1,000 judged turns."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, float]] = []
        self._rewards: list[float] = []

    def _on_step(self) -> bool:
        self._rewards += [float(reward) for reward in self.locals["rewards"]]
        if len(self._rewards) >= CURVE:
            self._close()
        return True

    def _on_training_end(self) -> None:
        if self._rewards:
            self._close()

    def _close(self) -> None:
        self.points.append((int(self.num_timesteps), float(np.mean(self._rewards))))
        self._rewards = []


def _scoring(algorithm: str, layout: tuple[int, int, int]) -> dict[str, Any]:
    """Return the library's options for a network that scores candidates; a critic has its own network."""
    settings: dict[str, Any] = {
        "features_extractor_class": CandidateScorer,
        "features_extractor_kwargs": {"layout": layout},
        "net_arch": [],
    }
    return settings if algorithm == "sb3-dqn" else settings | {"share_features_extractor": False}


def _scores_are_logits(model: BaseAlgorithm) -> None:
    """Fix the last layer of actor or Q-network to the identity, so that the scores are its output."""
    policy = model.policy
    heads = [policy.q_net.q_net[-1], policy.q_net_target.q_net[-1]] if isinstance(model, DQN) else [policy.action_net]
    for head in heads:
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        head.requires_grad_(False)
