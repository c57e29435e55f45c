"""How often a judge fails, and when that is too often to go on. Counts verdicts; makes none."""

from __future__ import annotations

import math
from collections import deque

from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.judges import FailureRateError

WINDOW, FEW, SHOWN = 1000, 200, 3


class FailureLimit:
    """Stops the environment when too many of the last ``WINDOW`` replies were not scored.

    Until ``FEW`` replies were judged, as many failures are let pass as would be of ``FEW``, so that one bad call at
    the start stops nothing.

    Args:
        rate: Largest share of failures, in [0, 1]; 1 switches the limit off.

    Raises:
        ValueError: A rate outside [0, 1].
    """

    def __init__(self, rate: float) -> None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"expected max_failure_rate to be a number in [0, 1], got {rate!r}")
        self.rate = rate
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self._examples: deque[str] = deque(maxlen=SHOWN)

    def count(self, conversation: Conversation, verdict: Verdict) -> None:
        """Note one verdict on the newest line of a conversation.

        Raises:
            FailureRateError: There were too many failures.
        """
        failed = verdict.score is None
        self._failed.append(failed)
        if not failed:
            return
        reply = conversation.lines[-1].text
        self._examples.append(
            f"[{verdict.status}] persona {conversation.persona.id}, reply {reply[:80]!r}:"
            f" {verdict.rationale or 'no reason given'}"
        )
        failures, judged = sum(self._failed), len(self._failed)
        if failures > math.floor(self.rate * max(judged, FEW)):
            raise FailureRateError(
                f"expected at most {self.rate:.0%} of replies without a score, got {failures} of the last {judged};"
                f" mend the judge, or raise max_failure_rate. The last ones: {'; '.join(self._examples)}"
            )
