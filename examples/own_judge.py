"""A judge of your own, named as "package.module:Class": the facts judge, with a price on long replies.

    python examples/own_judge.py
    PYTHONPATH=examples ppg-agent train --judge own_judge:BriefJudge      # train against it

Prints a conversation: a brief truth, a wordy one, and a reply that this judge can not read. That verdict has no score,
and the reward is NaN, never 0. No torch; seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

import ppg_gym  # noqa: F401 (registers the environments)
from ppg_gym import Conversation, Persona, Verdict
from ppg_gym.judges.facts import FactsJudge


class BriefJudge:
    """Scores by the facts; every word above ``words`` costs a tenth."""

    def __init__(self, domain: str, options: Mapping[str, Any]) -> None:
        if unknown := set(options) - {"words"}:
            raise ValueError(f"expected judge_options of the brief judge to be 'words' alone, got {sorted(unknown)}")
        self._facts, self._words = FactsJudge(domain), int(options.get("words", 8))

    def check(self, persona: Persona) -> None:
        """Raise a ValueError for a persona that can not be judged."""
        self._facts.check(persona)

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation, on its newest line."""
        verdicts = self._facts.judge(conversations)
        return [self._one(talk.lines[-1].text, facts) for talk, facts in zip(conversations, verdicts, strict=True)]

    def _one(self, reply: str, facts: Verdict) -> Verdict:
        if not reply.isascii():
            return Verdict("refused", None, "This judge reads plain English alone.")
        words = len(reply.split())
        cost = 0.1 * max(0, words - self._words)
        score = max(0.0, (facts.score or 0.0) - cost)
        return Verdict("scored", score, f"{facts.rationale} {words} words cost {cost:.1f}.", facts.kind)


if __name__ == "__main__":
    env = gym.make(
        "PersonaChat-v0",
        judge="own_judge:BriefJudge",
        judge_options={"words": 6},
        on_judge_failure="nan",  # or "raise", the default, or "truncate"
        render_mode="ansi",
        disable_env_checker=True,  # it takes NaN for a mistake
    )
    env.reset(seed=0)
    replies = ["I work as a painter.", "I play judo, and judo is what I play on Sundays.", "私は麺が好きです。"]
    rewards = [env.step(reply)[1] for reply in replies]
    print(env.render())
    print("rewards:", rewards)
