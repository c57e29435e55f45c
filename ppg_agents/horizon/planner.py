"""Which policy class a run plans with: the one that its settings name, or the one chosen anew from time to time.

Says how far ahead; learns nothing and changes no weight. What was chosen is in the run's metrics, and a run that is
continued reads it there.
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

    With the policy class ``auto`` a run takes, from time to time, the shortest class whose direction one batch shows
    to be full planning's (see `horizon_choice.choose`). The batch that decides is learned from as well.

    Attributes:
        current: The class in use; with a class that the settings name, it is that one.
    """

    def __init__(self, config: TrainConfig, turns: int | None, workers: Workers | None = None) -> None:
        """Begin with the settings' class.

        Args:
            config: The settings.
            turns: In every conversation, None where that is open.
            workers: The processes that learn together.

        Raises:
            ConfigError: A class that does not serve the number of turns, or ``auto`` with split weights.
        """
        self._config, self._workers = config, workers or Alone()
        self._auto = config.policy_class == "auto"
        self.current = PolicyClass() if config.policy_class == "auto" else config.policy_class
        wanted = {"policy_class": (self.current,), "auto.classes": config.auto.classes}
        for setting, classes in wanted.items():
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
        """Take up the choice of a run that is continued."""
        for line in metrics:
            if line.get("horizon_class"):
                self.current = named(str(line["horizon_class"]), self._config.auto.classes)

    def review(self, trajectories: Sequence[Trajectory], policy: Policy, iteration: int) -> dict[str, Any]:
        """Choose anew when it is time, from conversations of the policy as it is now.

        Args:
            trajectories: This process's share of the batch.
            policy: Who is learning; left as it is.
            iteration: From 0.

        Returns:
            What to log of the choice (see ``Choice.metrics``); empty when it is not time, or with one persona alone.
        """
        if not self._auto or iteration % self._config.auto.every:
            return {}
        everything, found = self._workers.gather(list(trajectories)), None
        if len({trajectory.persona for trajectory in everything}) < 2:
            return {}
        if self._workers.main:
            found = choose(
                everything,
                policy,
                self._config.auto.classes,
                self.current,
                np.random.default_rng([self._config.seed, iteration]),
                cosine=self._config.auto.cosine,
                discount=self._config.discount,
                temperature=self._config.sampling.temperature,
            )
            say(f"iteration {iteration + 1}: {found.reason}")
        chosen = self._workers.gather([(found.policy_class, dict(found.metrics()))] if found else [])
        metrics: dict[str, Any]
        self.current, metrics = chosen[0]
        return metrics
