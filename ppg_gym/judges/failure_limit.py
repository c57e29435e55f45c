"""How often a judge or a partner fails, and when that is too often to go on. Counts outcomes; makes none."""

from __future__ import annotations

import math
from collections import Counter, deque

WINDOW, FEW, SHOWN = 1000, 200, 3


class FailureLimit:
    """Raises when too many of the last ``WINDOW`` outcomes are failures.

    Until there are ``FEW`` outcomes, it allows as many failures as among ``FEW``, so that one bad call at the start
    stops nothing.

    Args:
        rate: Largest share of failures allowed, in [0, 1]; 1 switches the limit off.
        option: The name of the rate, for messages.
        failures: What is counted: "replies without a score".
        todo: What to do about it: "repair the judge".
        error: Raised at too many failures.

    Raises:
        ValueError: A rate outside [0, 1].
    """

    def __init__(self, rate: float, option: str, failures: str, todo: str, error: type[RuntimeError]) -> None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"expected {option} to be a number in [0, 1], got {rate!r}")
        self.rate = rate
        self._option, self._failures, self._todo, self._error = option, failures, todo, error
        self._causes: deque[str | None] = deque(maxlen=WINDOW)  # None for a success
        self._examples: dict[str, str] = {}  # cause -> its last example, the newest cause last

    def count(self, cause: str | None, example: str) -> None:
        """Count an outcome: the cause of a failure with an example, or None for a success.

        Raises:
            RuntimeError: There were too many failures; it is of the type given.
        """
        self._causes.append(cause)
        if cause is None:
            return
        self._examples.pop(cause, None)
        self._examples[cause] = example
        if len(self._examples) > SHOWN:
            del self._examples[next(iter(self._examples))]
        failures, counted = sum(each is not None for each in self._causes), len(self._causes)
        if failures > math.floor(self.rate * max(counted, FEW)):
            times = Counter(self._causes)
            shown = (f"{times[why]} × {why} (last: {last})" for why, last in self._examples.items() if times[why])
            raise self._error(
                f"expected at most {self.rate:.0%} of {self._failures}, got {failures} of the last {counted};"
                f" {self._todo}, or raise {self._option}. The last causes: {'; '.join(shown)}"
            )
