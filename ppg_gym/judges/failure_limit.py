"""How often a judge fails, and when that is too often to go on. Counts verdicts; makes none."""

from __future__ import annotations

import math
from collections import Counter, deque

from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.judges import FailureRateError

WINDOW, FEW, SHOWN = 1000, 200, 3


class FailureLimit:
    """Stops the environment when too many of the last ``WINDOW`` replies have no score.

    Until ``FEW`` replies have been judged, it allows as many failures as among ``FEW``, so that one bad call at the
    start stops nothing.

    Args:
        rate: Largest share of failures allowed, in [0, 1]; 1 switches the limit off.

    Raises:
        ValueError: A rate outside [0, 1].
    """

    def __init__(self, rate: float) -> None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"expected max_failure_rate to be a number in [0, 1], got {rate!r}")
        self.rate = rate
        self._causes: deque[str | None] = deque(maxlen=WINDOW)  # None for a scored reply
        self._examples: dict[str, str] = {}  # cause -> its last reply, the newest cause last

    def count(self, conversation: Conversation, verdict: Verdict) -> None:
        """Count the verdict on the newest line of a conversation.

        Raises:
            FailureRateError: There were too many failures.
        """
        if verdict.score is not None:
            self._causes.append(None)
            return
        cause = f"[{verdict.status}] {verdict.rationale or 'no reason given'}"
        self._causes.append(cause)
        self._examples.pop(cause, None)
        self._examples[cause] = f"persona {conversation.persona.id}, reply {conversation.lines[-1].text[:80]!r}"
        if len(self._examples) > SHOWN:
            del self._examples[next(iter(self._examples))]
        failures, judged = sum(each is not None for each in self._causes), len(self._causes)
        if failures > math.floor(self.rate * max(judged, FEW)):
            times = Counter(self._causes)
            shown = (f"{times[why]} × {why} (last: {reply})" for why, reply in self._examples.items() if times[why])
            raise FailureRateError(
                f"expected at most {self.rate:.0%} of replies without a score, got {failures} of the last {judged};"
                f" repair the judge, or raise max_failure_rate. The last causes: {'; '.join(shown)}"
            )
