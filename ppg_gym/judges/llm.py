"""The LLM judge: a chat model says whether a reply is consistent, from framed data, in an answer that is read strictly.

The metrics follow Abdulhai et al., "Consistently Simulating Human Personas with Multi-Turn Reinforcement Learning"
(arXiv 2511.00222). A call that fails or an answer that cannot be read is never a number.

Some replies score 0 by rule and cost no call: control tokens alone (kind ``meta``), and what
:mod:`ppg_gym.judges.rules` calls silence, copying and repeating.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ppg_gym.conversation import Conversation, Line, Persona, Status, Verdict
from ppg_gym.domain import loading as domains
from ppg_gym.judges import framing, questions, verdicts
from ppg_gym.judges.rules import rule_verdict
from ppg_gym.llm import background
from ppg_gym.llm.chat import Chat, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.settings import ClientSettings
from ppg_gym.llm.sharing import lease, release
from ppg_gym.nearest import refuse_unknown
from ppg_gym.options import number, one_of, whole, wrong
from ppg_gym.sanitise import holds_control, plain

WARM = 0.7  # temperature for several samples, and for a new try after an answer that could not be read
BETWEEN = "\n-----\n"  # stands between several answers in `Verdict.raw`

T = TypeVar("T")


@dataclass(frozen=True)
class JudgeOptions:
    """The judge's own options; the client's are :class:`~ppg_gym.llm.settings.ClientSettings`.

    Attributes:
        metric: ``prompt-to-line`` (the reply does not contradict the persona's description), ``line-to-line`` (it does
            not contradict the persona's earlier lines that are shown; a first line has none, so it scores 1 unless it
            is a trick, with the kind ``first_line``), or ``qa`` (of the questions about the persona that the reply
            touches, the share that it answers in agreement).
        scale: ``binary``, or ``graded``: 1 to 5, scored (grade - 1) / 4. ``qa`` is a share and has no grades.
        samples: Odd number of answers per reply. The score is their median: for ``binary`` the majority, for
            ``graded`` one of the grades, which a single gullible sample cannot move. Every sample has to be readable.
        retries: Most new samples for an answer that cannot be read.
        history: Most earlier lines shown, of both speakers. 0: the model sees the line alone, and neither its place
            in the conversation nor a word about lines before it.
        max_chars: Most characters of each text; longer ones are cut with a mark.
        temperature: None: 0 for one sample, else ``WARM``.
        max_tokens: Most tokens of an answer.
        max_rationale: Most characters of the rationale, sent as ``maxLength`` in the schema: keeps a talkative model
            within ``max_tokens`` where the server honours it (vLLM does; OpenAI refuses the keyword). None: not sent.
        schema: Whether the JSON schema goes to the server: ``always``, ``never``, or ``auto`` (if it honours schemas).
        questions: For ``qa``: most questions per persona.
        untouched: For ``qa``: the score of a reply that touches no question, with the kind ``untouched``. Its share
            would be 0/0. A score of 1 would pay for never saying anything about oneself, 0 would punish a greeting;
            the middle keeps the order: a fact told truly, no fact, a contradiction.

    Raises:
        ValueError: A value of the wrong type or range.
    """

    metric: str = "prompt-to-line"
    scale: str = "binary"
    samples: int = 1
    retries: int = 2
    history: int = 12
    max_chars: int = 8000
    temperature: float | None = None
    max_tokens: int = 400
    max_rationale: int | None = None
    schema: str = "auto"
    questions: int = 8
    untouched: float = 0.5

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            one_of(_WHOSE, name, getattr(self, name), known)
        least = {"samples": 1, "retries": 0, "history": 0, "max_chars": 100, "max_tokens": 16, "questions": 1}
        for name, at_least in least.items():
            whole(_WHOSE, name, getattr(self, name), at_least)
        if self.max_rationale is not None:
            whole(_WHOSE, "max_rationale", self.max_rationale)
        if self.samples % 2 == 0:
            raise wrong(_WHOSE, "samples", "an odd number", self.samples)
        number(_WHOSE, "untouched", self.untouched, 1)
        if self.temperature is not None:
            number(_WHOSE, "temperature", self.temperature, 2)
        if self.samples > 1 and self.temperature == 0:
            raise wrong(_WHOSE, "temperature", "a number above 0 for several samples, which would all be the same", 0)
        if self.metric == "qa" and self.scale != "binary":
            raise wrong(_WHOSE, "scale", "'binary' for the metric 'qa', which is a share", self.scale)
        if self.metric == "line-to-line" and self.history < 2:
            raise wrong(_WHOSE, "history", "at least 2 for the metric 'line-to-line'", self.history)


_WHOSE = "judge_options"
_CHOICES = {"metric": verdicts.METRICS, "scale": verdicts.SCALES, "schema": ("auto", "always", "never")}
_NAMES = tuple(field.name for field in dataclasses.fields(JudgeOptions))


class _Case(NamedTuple):
    """All that is needed to judge one reply."""

    messages: framing.Messages
    own_lines: tuple[int, ...]  # numbers of the persona's earlier lines shown
    questions: int


class _Read(NamedTuple, Generic[T]):
    """What was read from an answer, or the status and the reason why nothing was."""

    value: T | None
    texts: tuple[str, ...]
    status: Status = "scored"
    reason: str = ""


class LLMJudge:
    """Judges by asking a chat model; all conversations of a call are asked about at once.

    Args:
        domain: Name of a domain; the model is told its scenario.
        options: The client's settings and :class:`JudgeOptions`.
        chat: The chat model to ask; None for a client made from the settings, which are needed only then.

    Attributes:
        chat: The chat model; its ``counts`` tell what judging has cost.
        options: The judge's options.

    Raises:
        ValueError: An option is unknown, missing or not what it should be.
    """

    waits = True

    def __init__(self, domain: str, options: Mapping[str, Any], chat: Chat | None = None) -> None:
        if chat is None or "base_url" in options:
            settings, rest = ClientSettings.take(options, _WHOSE, _NAMES)
        else:
            rest = dict(options)
            refuse_unknown(_WHOSE, rest, _NAMES)
        self.options = chosen = JudgeOptions(**rest)
        self._task = verdicts.task(
            chosen.metric, chosen.scale, domains.load(domain).scenario, history=chosen.history > 0
        )
        self._shape = verdicts.schema(chosen.metric, chosen.scale, chosen.max_rationale)
        self._question_shape = questions.schema(chosen.questions)
        self._questions: dict[str, tuple[questions.Question, ...]] = {}
        self._without_questions: dict[str, Verdict] = {}  # instructions that no readable questions came of
        self._own_client: ChatClient | None = None
        if chat is None:
            chat = self._own_client = lease(settings)
        self.chat: Chat = chat

    def check(self, persona: Persona) -> None:
        """Refuse a persona without a description, or with one that does not fit into a prompt.

        Raises:
            ValueError: The instruction is empty once sanitised, or longer than ``max_chars``.
        """
        limit = self.options.max_chars
        if not plain(persona.instruction, limit):
            raise ValueError(f"the LLM judge expected an instruction that describes persona {persona.id!r}, got none")
        if len(persona.instruction) > limit:
            raise ValueError(
                f"the LLM judge expected an instruction of at most {limit} characters for persona {persona.id!r}, got"
                f" {len(persona.instruction)}; raise judge_options['max_chars']"
            )

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation; a failed call costs the other conversations nothing.

        Raises:
            ValueError: A conversation does not end with a line of the policy.
            BudgetError: The budget is used up.
            EndpointError: No endpoint can serve the model.
        """
        for conversation in conversations:
            if not conversation.lines or conversation.lines[-1].speaker != "policy":
                raise ValueError("expected a conversation that ends with a line of the policy, got one that does not")
        return background.run(self._judge(conversations))

    def close(self) -> None:
        """Give the client back, once; a chat that was passed in is left to its owner."""
        client, self._own_client = self._own_client, None
        if client is not None:
            release(client)

    async def _judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        ruled = [by_rule(conversation) for conversation in conversations]
        left = [i for i, verdict in enumerate(ruled) if verdict is None]
        failed: dict[str, Verdict] = {}
        if self.options.metric == "qa":
            new = dict.fromkeys(conversations[i].persona.instruction for i in left)
            known = self._questions.keys() | self._without_questions.keys()
            new = {instruction: None for instruction in new if instruction not in known}
            made = await _all([self._make_questions(instruction) for instruction in new])
            failed = {instruction: verdict for instruction, verdict in zip(new, made, strict=True) if verdict}
            failed |= self._without_questions
        asked = [i for i in left if conversations[i].persona.instruction not in failed]
        given = dict(zip(asked, await _all([self._ask(conversations[i]) for i in asked]), strict=True))
        return [
            ruled[i] or given.get(i) or failed[conversation.persona.instruction]
            for i, conversation in enumerate(conversations)
        ]

    async def _ask(self, conversation: Conversation) -> Verdict:
        case = self._case(conversation)
        samples = await _all([self._sample(case, number) for number in range(self.options.samples)])
        return _together(samples)

    def _case(self, conversation: Conversation) -> _Case:
        *earlier, reply = enumerate(conversation.lines, start=1)
        shown = earlier[len(earlier) - self.options.history :] if self.options.history < len(earlier) else earlier
        made: tuple[questions.Question, ...] = ()
        fields: dict[str, Any] = {}
        if self.options.metric == "prompt-to-line":
            fields["persona"] = conversation.persona.instruction
        elif self.options.metric == "qa":
            made = self._questions[conversation.persona.instruction]
            fields["questions"] = [{"number": i, **q._asdict()} for i, q in enumerate(made, start=1)]
        if self.options.history:
            fields["history"] = [
                {"line": i, "speaker": "persona" if line.speaker == "policy" else "partner", "text": line.text}
                for i, line in shown
            ]
            fields["reply"] = {"line": reply[0], "text": reply[1].text}
        else:
            fields["reply"] = {"text": reply[1].text}
        own_lines = tuple(i for i, line in shown if line.speaker == "policy")
        return _Case(framing.frame(fields, self._task, self.options.max_chars), own_lines, len(made))

    async def _sample(self, case: _Case, number: int) -> _Read[verdicts.Opinion]:
        def read(text: str, finish: str) -> verdicts.Opinion:
            answer = verdicts.read(text, finish, self._shape)
            return verdicts.opinion(answer, case.own_lines, case.questions, self.options.untouched)

        temperature = self.options.temperature
        if temperature is None:
            temperature = WARM if self.options.samples > 1 else 0.0
        request = Request(case.messages, temperature, self.options.max_tokens, sample=number)
        return await self._until_read(request, self._shape, read)

    async def _make_questions(self, instruction: str) -> Verdict | None:
        """Make the questions about a persona; if that fails, return the verdict that all its replies get."""
        chosen, shape = self.options, self._question_shape
        request = Request(
            questions.messages(instruction, chosen.questions, chosen.max_chars),
            max_tokens=chosen.questions * questions.MAX_TOKENS,
        )
        made = await self._until_read(request, shape, lambda text, finish: questions.read(text, finish, shape))
        if made.value is None:
            why = f"No questions about the persona: {made.reason}"
            verdict = Verdict(made.status, None, why, raw=BETWEEN.join(made.texts))
            if made.status in ("unparsed", "refused"):  # the same question would be answered the same way
                self._without_questions[instruction] = verdict
            return verdict
        self._questions[instruction] = made.value
        return None

    async def _until_read(self, request: Request, shape: Mapping[str, Any], read: Callable[[str, str], T]) -> _Read[T]:
        """Ask until an answer can be read, up to ``retries`` more times.

        Failed calls are repeated by the client. An answer that was cut off is not asked for again: the client has given
        it all the room there is.
        """
        schema = self.options.schema
        if schema == "always" or (schema == "auto" and await self.chat.structured()):
            request = dataclasses.replace(request, schema=shape)
        texts: list[str] = []
        reason = ""
        for attempt in range(1 + self.options.retries):
            # Numbers that no other sample of this question has: the cache would else give the same answer again.
            sample = request.sample + attempt * self.options.samples
            temperature = max(request.temperature, WARM) if attempt else request.temperature
            seed = sample if temperature else None
            answer = await self.chat.ask(
                dataclasses.replace(request, sample=sample, temperature=temperature, seed=seed)
            )
            if answer.status != "ok":
                return _Read(None, tuple(texts), answer.status, plain(answer.reason, verdicts.RATIONALE))
            texts.append(answer.text)
            try:
                return _Read(read(answer.text, answer.finish), tuple(texts))
            except verdicts.UnparsedError as error:
                reason = f"{error} ({attempt + 1} of {1 + self.options.retries} answers)"
            if answer.finish == "length":
                break
        return _Read(None, tuple(texts), "unparsed", reason)


def by_rule(conversation: Conversation) -> Verdict | None:
    """Return the verdict on a newest line that needs no model, else None; see the module's docstring."""
    reply = conversation.lines[-1].text
    text = plain(reply, max(len(reply), 100))
    if holds_control(reply) and not any(char.isalnum() for char in text):
        return Verdict("scored", 0.0, "The reply holds control tokens and nothing else.", "meta")
    return rule_verdict(Conversation(conversation.persona, (*conversation.lines[:-1], Line("policy", text))))


def _together(samples: Sequence[_Read[verdicts.Opinion]]) -> Verdict:
    """Return the verdict of all samples: their median, or the first failure if there is one."""
    raw = BETWEEN.join(text for sample in samples for text in sample.texts)
    opinions = [sample.value for sample in samples if sample.value is not None]
    if len(opinions) < len(samples):
        lost = next(sample for sample in samples if sample.value is None)
        return Verdict(lost.status, None, lost.reason, raw=raw)
    score = statistics.median(opinion.score for opinion in opinions)
    agreeing = [opinion for opinion in opinions if opinion.score == score]
    kind = statistics.mode(opinion.kind for opinion in agreeing)
    why = next(opinion.rationale for opinion in agreeing if opinion.kind == kind) or "The model gave no reason."
    if len(opinions) > 1:
        why = f"{len(agreeing)} of {len(opinions)} samples agree: {why}"
    return Verdict("scored", score, why, kind, raw)


async def _all(work: Sequence[Awaitable[T]]) -> list[T]:
    """Return all results; when one raises, cancel the others and wait for them first."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
