"""The policy class of a run: the one that its settings name, or one chosen again every so often.

Learns nothing and changes no weight. The choice is in the run's metrics, where a resumed run reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig
from ppg_agents.credit import Mask, PolicyClass
from ppg_agents.distributed import Alone, Workers
from ppg_agents.horizon.choice import by_label, choose, named
from ppg_agents.policy.policy import Policy
from ppg_agents.terminal.progress import say
from ppg_agents.trajectory import Trajectory


class Planner:
    """The policy class of a run.

    With ``auto`` a run takes, every so often, the shortest class that one batch shows to point where full planning
    points (see `horizon.choice.choose`). The run also learns from that batch.

    Attributes:
        current: The class in use.
    """

    def __init__(self, config: TrainConfig, turns: int | None, workers: Workers | None = None) -> None:
        """Start with the settings' class.

        Args:
            config: The settings.
            turns: Of every conversation, None if open.
            workers: The processes that learn together.

        Raises:
            ConfigError: A class that does not fit the number of turns, or ``auto`` with split weights.
        """
        self._config, self._workers = config, workers or Alone()
        self._auto = config.policy_class == "auto"
        self.current = PolicyClass() if config.policy_class == "auto" else config.policy_class
        configured = {"policy_class": (self.current,), "auto.classes": config.auto.classes}
        for setting, classes in configured.items():
            try:
                for one in by_label(classes).values():
                    one.check(turns)
            except ValueError as error:
                raise ConfigError(f"{setting}: {error}") from error
        if self._auto and self._workers.sharded:
            raise ConfigError("policy class 'auto' needs whole weights on every process; name a class, or use ddp")

    def mask(self, n: int) -> Mask:
        """Return the class in use for conversations of n turns, [n, n]."""
        return self.current.mask(n)

    def remember(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Go on with the last choice in a run's metrics."""
        for line in metrics:
            if line.get("horizon_class"):
                self.current = named(str(line["horizon_class"]), self._config.auto.classes)

    def review(self, trajectories: Sequence[Trajectory], policy: Policy, iteration: int) -> dict[str, Any]:
        """Choose again when it is time, from conversations of the current policy.

        Args:
            trajectories: This process's share of the batch.
            policy: The policy that learns; it stays as it is.
            iteration: From 0.

        Returns:
            The choice to log (see ``Choice.metrics``); empty when it is not time, or with a single persona.
        """
        if not self._auto or iteration % self._config.auto.every:
            return {}
        everything, choice = self._workers.gather(list(trajectories)), None
        if len({trajectory.persona for trajectory in everything}) < 2:
            return {}
        if self._workers.main:
            choice = choose(
                everything,
                policy,
                self._config.auto.classes,
                self.current,
                np.random.default_rng([self._config.seed, iteration]),
                cosine=self._config.auto.cosine,
                discount=self._config.discount,
                temperature=self._config.sampling.temperature,
            )
            say(f"iteration {iteration + 1}: {choice.reason}")
        chosen = self._workers.gather([(choice.policy_class, dict(choice.metrics()))] if choice else [])
        metrics: dict[str, Any]
        self.current, metrics = chosen[0]
        return metrics
