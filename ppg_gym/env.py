"""``PersonaChat-v0``: the policy plays a persona, a partner talks to it, a judge rewards every reply."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Dict

from ppg_gym.conversation import Conversation
from ppg_gym.nearest import refuse_unknown
from ppg_gym.partners import Said
from ppg_gym.simulator import MAX_CHARS, Outcome, Simulator
from ppg_gym.spaces import Utterance

Observation = dict[str, Any]


class PersonaChatEnv(gym.Env[Observation, str]):
    """One conversation at a time.

    Observation: ``{"instruction": str, "message": str}``, the role-play instruction and the partner's newest
    line. Action: the reply, a string; judge and partner get its first 16,384 characters. Reward: the
    judge's score in [0, 1], NaN when it gave none. The conversation terminates at its planned end and is truncated when
    judge or partner fail. Where the partner gave no opening line (``info["partner"]["status"]`` of ``reset``), the
    message is empty and the first step truncates without a verdict.

    ``reset(options={"persona": …})`` takes a persona's id, a :class:`~ppg_gym.conversation.Persona` or a dict of its
    fields; without it, one is drawn.

    Args:
        domain: ``chatting``, ``education``, ``therapy``, or the path of your own.
        personas: ``train``, ``held-out``, or a path to a persona file.
        partner: ``scripted``, ``llm``, ``console``, or your own as ``package.module:Class``.
        partner_options: Plain options of the partner.
        judge: ``facts``, ``llm``, ``nli``, or your own as ``package.module:Class``.
        judge_options: Plain options of the judge.
        max_turns: Turns per conversation; None for the domain's own length.
        on_judge_failure: ``raise``, ``nan`` (the reward is NaN) or ``truncate`` (NaN, and the conversation ends).
        max_failure_rate: Largest share of replies, of the last 1,000, that the judge may leave without a score; 1 for
            no limit.
        max_partner_failure_rate: Largest share of the partner's lines, of the last 1,000, that may be missing; 1 for no
            limit.
        render_mode: None or ``ansi``.
        **unknown: Takes nothing; it is here so that the message for a mistyped argument can offer the right one.

    Raises:
        ValueError: An argument is unknown (the message offers the nearest one), or not what it should be.
        ModuleNotFoundError: The partner or judge needs an extra that is not installed.
    """

    metadata = {  # noqa: RUF012 (as Gymnasium declares it)
        "render_modes": ["ansi"],
        "render_fps": 1,
    }

    def __init__(
        self,
        domain: str = "chatting",
        personas: str = "train",
        partner: str = "scripted",
        partner_options: Mapping[str, Any] | None = None,
        judge: str = "facts",
        judge_options: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        on_judge_failure: str = "raise",
        max_failure_rate: float = 0.05,
        max_partner_failure_rate: float = 0.05,
        render_mode: str | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            known = [name for name in inspect.signature(PersonaChatEnv).parameters if name != "unknown"]
            refuse_unknown("keyword arguments", unknown, known)
        if render_mode not in (None, "ansi"):
            raise ValueError(f"expected render_mode None or 'ansi', got {render_mode!r}")
        self.simulator = Simulator(
            domain,
            personas,
            partner,
            partner_options,
            judge,
            judge_options,
            max_turns,
            on_judge_failure,
            max_failure_rate,
            max_partner_failure_rate,
        )
        self.max_turns = self.simulator.max_turns
        self.usage = self.simulator.usage
        self.render_mode = render_mode
        self.observation_space = Dict({"instruction": Utterance(MAX_CHARS), "message": Utterance(MAX_CHARS)})
        self.action_space = Utterance(MAX_CHARS)
        self._conversation: Conversation | None = None
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a conversation; see the class for ``options``.

        Raises:
            ValueError: An unknown option, or no such persona; the message offers the nearest name.
        """
        super().reset(seed=seed)
        refuse_unknown("options", options or {}, ("persona",))
        persona = self.simulator.persona((options or {}).get("persona"), self.np_random)
        self._conversation, opening = self.simulator.open([persona], [self.np_random])[0]
        self._over = False
        info = start_info(self._conversation, opening, self.simulator.reachable)
        return observe(self._conversation, opening.text), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Play one reply.

        Raises:
            ValueError: The action is not a string.
            JudgeError: The judge gave no score and ``on_judge_failure`` is ``raise``.
            FailureRateError: The judge left too many replies without a score.
            PartnerFailureRateError: Too many of the partner's lines were missing.
            RuntimeError: There is no conversation, or it is over.
        """
        check_reply(action)
        if self._conversation is None or self._over:
            raise RuntimeError("expected a conversation that is not over; call reset() first")
        (outcome,) = self.simulator.turn([self._conversation], [action], [self.np_random])
        self._conversation = outcome.conversation
        self._over = outcome.terminated or outcome.truncated
        return (
            observe(outcome.conversation, outcome.message),
            outcome.reward,
            outcome.terminated,
            outcome.truncated,
            turn_info(outcome),
        )

    def render(self) -> str | None:
        """Return the conversation so far, each reply with its verdict (``ansi``), else None."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render mode; make the environment with render_mode='ansi'")
            return None
        return "" if self._conversation is None else transcript(self._conversation)

    def close(self) -> None:
        """Close the connections of judge and partner."""
        self.simulator.close()


def check_reply(action: object) -> None:
    """Raise a ValueError unless an action is a string; a longer one than ``MAX_CHARS`` is heard up to there."""
    if not isinstance(action, str):
        raise ValueError(
            f"expected the action to be a str of at most {MAX_CHARS} characters, got {type(action).__name__}"
        )


def observe(conversation: Conversation, message: str) -> Observation:
    """Return what the policy sees."""
    return {"instruction": conversation.persona.instruction, "message": message}


def start_info(conversation: Conversation, opening: Said, reachable: float) -> dict[str, Any]:
    """Return ``reset``'s info; ``reachable`` is the twin's best mean reward per turn, NaN where unknown."""
    partner = partner_info(opening.status, opening.reason)
    return {"turn": 0, "persona": conversation.persona.id, "reachable": reachable, "partner": partner}


def turn_info(outcome: Outcome) -> dict[str, Any]:
    """Return ``step``'s info."""
    return {
        "turn": len(outcome.conversation.verdicts),
        "persona": outcome.conversation.persona.id,
        "verdict": outcome.verdict.to_dict(),
        "partner": partner_info(outcome.partner_status, outcome.partner_reason),
    }


def partner_info(status: str, reason: str) -> dict[str, str]:
    """Return ``info["partner"]``; a fault comes with its reason, if the partner gives one."""
    return {"status": status, "reason": reason} if reason else {"status": status}


def transcript(conversation: Conversation) -> str:
    """Return a conversation as text: one line per utterance, the verdict under each reply."""
    rows = [f"[{conversation.persona.instruction}]"]
    verdicts = iter(conversation.verdicts)
    name = conversation.persona.name or "persona"
    for line in conversation.lines:
        rows.append(f"{'partner' if line.speaker == 'partner' else name}: {line.text}")
        if line.speaker == "policy" and (verdict := next(verdicts, None)) is not None:
            score = verdict.status if verdict.score is None else f"{verdict.score:.2f}"
            rows.append(f"    ({score}) {verdict.rationale}")
    return "\n".join(rows)
