"""The LLM judge: what is asked, how strictly the answer is read, what each answer scores, and every way to fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.judges import framing, verdicts
from ppg_gym.judges.llm import LLMJudge
from ppg_gym.llm.chat import Answer, BudgetError, Counts, Request
from ppg_gym.llm.loopback import Loopback

PROSE = Persona("prose", "I am Ann, a night nurse.\nYou grew up by the sea and never learned to swim.", name="Ann")


class FakeChat:
    """Answers by a function of the request and notes what it was asked."""

    def __init__(self, answer: Callable[[Request], Answer | str], structured: bool = True) -> None:
        self.counts = Counts()
        self.asked: list[Request] = []
        self.probes = self.flying = self.peak = 0
        self._answer, self._structured = answer, structured

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        self.counts.calls += 1
        self.flying += 1
        self.peak = max(self.peak, self.flying)
        try:
            await asyncio.sleep(0.001)
            answer = self._answer(request)
        finally:
            self.flying -= 1
        return Answer("ok", answer, finish="stop") if isinstance(answer, str) else answer

    async def structured(self) -> bool:
        self.probes += 1
        return self._structured


def says(**changes: Any) -> str:
    base = {"rationale": "It fits.", "contradicts": False, "addresses_judge": False, "says_something": True}
    own = {"touched", "conflicting_lines", "grade"} & changes.keys()
    if own:
        del base["contradicts"]
    return json.dumps(base | changes)


def talk(*replies: str, persona: Persona = PROSE) -> Conversation:
    conversation = Conversation(persona)
    for number, reply in enumerate(replies):
        conversation = conversation.add("partner", f"Question {number}?").add("policy", reply)
    return conversation


def judged(answer: str | Answer | Callable[[Request], Answer | str], *replies: str, **options: Any) -> Verdict:
    judge = LLMJudge("chatting", options, FakeChat(answer if callable(answer) else lambda _: answer))
    return judge.judge([talk(*(replies or ("I work nights at the hospital.",)))])[0]


GRADED, LINES, QA = {"scale": "graded"}, {"metric": "line-to-line"}, {"metric": "qa"}
TWO = ("I work nights at the hospital.", "I work in the daytime only.")


@pytest.mark.parametrize(
    ("options", "answer", "score", "kind"),
    [
        ({}, says(), 1.0, "consistent"),
        ({}, says(contradicts=True), 0.0, "contradiction"),
        ({}, says(addresses_judge=True), 0.0, "meta"),
        ({}, says(says_something=False), 0.0, "empty"),
        (GRADED, says(grade=1), 0.0, "contradiction"),
        (GRADED, says(grade=2), 0.25, "contradiction"),
        (GRADED, says(grade=3), 0.5, "unclear"),
        (GRADED, says(grade=4), 0.75, "consistent"),
        (GRADED, says(grade=5), 1.0, "consistent"),
        (GRADED, says(grade=5, addresses_judge=True), 0.0, "meta"),
        (LINES, says(conflicting_lines=[]), 1.0, "consistent"),
        (LINES, says(conflicting_lines=[2]), 0.0, "contradiction"),
        (LINES, says(conflicting_lines=[], says_something=False), 0.0, "empty"),
        (LINES | GRADED, says(conflicting_lines=[2], grade=2), 0.25, "contradiction"),
        (LINES | GRADED, says(conflicting_lines=[], grade=4), 0.75, "consistent"),
    ],
)
def test_an_answer_scores_what_is_stated(options: dict[str, Any], answer: str, score: float, kind: str) -> None:
    verdict = judged(answer, *TWO, **options)
    assert verdict == Verdict("scored", score, "It fits.", kind, answer)


@pytest.mark.parametrize("scale", verdicts.SCALES)
def test_a_first_line_has_nothing_to_contradict_but_can_be_a_trick(scale: str) -> None:
    extra = {"grade": 2} if scale == "graded" else {}
    verdict = judged(says(conflicting_lines=[], **extra), **LINES, scale=scale)
    assert (verdict.score, verdict.kind) == (1.0, "first_line")
    trick = judged(says(conflicting_lines=[], addresses_judge=True, **extra), **LINES, scale=scale)
    assert (trick.score, trick.kind) == (0.0, "meta")
    assert judged(says(conflicting_lines=[2], **extra), **LINES, scale=scale).status == "unparsed"


WRONG = {
    "no JSON": "YES",
    "a word and no object": "NO, it does not contradict.",
    "prose before": "The verdict: " + says(),
    "prose after": says() + " I hope this helps.",
    "a quoted object in prose": f"The reply holds `{says()}`, a trick.",
    "two objects": says() + "\n" + says(contradicts=True),
    "two fences": f"```json\n{says()}\n```\n```json\n{says()}\n```",
    "a list": f"[{says()}]",
    "a key missing": json.dumps({"rationale": "", "contradicts": False, "addresses_judge": False}),
    "a key too many": says(score=1),
    "another key's spelling": says().replace("contradicts", "Contradicts"),
    "a key twice": says()[:-1] + ', "contradicts": true}',
    "text for a truth value": says(contradicts="false"),
    "a number for a truth value": says(contradicts=0),
    "null for a truth value": says(contradicts=None),
    "NaN": says().replace("false", "NaN"),
    "Python": says().replace("false", "False"),
    "single quotes": says().replace('"', "'"),
    "cut": says()[:-5],
    "deep": "[" * 100_000,
    "empty": "",
    "only reasoning": f"<think>{says()}</think>",
    "unclosed reasoning": f"<think>{says()}",
    "a number for the reason": says(rationale=1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("structured", [True, False])
def test_anything_else_is_unparsed_with_the_raw_text(wrong: str, structured: bool) -> None:
    chat = FakeChat(lambda _: wrong, structured)
    verdict = LLMJudge("chatting", {"retries": 1}, chat).judge([talk("I work nights.")])[0]
    assert (verdict.status, verdict.score) == ("unparsed", None)
    assert verdict.raw == f"{wrong}\n-----\n{wrong}"
    assert "(2 of 2 answers)" in verdict.rationale
    assert len(verdict.rationale) < 400


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (GRADED, says(grade=0)),
        (GRADED, says(grade=6)),
        (GRADED, says(grade=4.0)),
        (GRADED, says(grade="5")),
        (GRADED, says(grade=True)),
        (GRADED, says()),
        (LINES, says(conflicting_lines=[1])),  # the partner's
        (LINES, says(conflicting_lines=[4])),  # the reply itself
        (LINES, says(conflicting_lines=[99])),
        (LINES, says(conflicting_lines=["2"])),
        (LINES, says(conflicting_lines=[True])),
        (LINES, says(conflicting_lines=2)),
        (LINES | GRADED, says(conflicting_lines=[2], grade=5)),
        (LINES | GRADED, says(conflicting_lines=[], grade=1)),
    ],
)
def test_an_answer_that_names_what_is_not_there_is_unparsed(options: dict[str, Any], wrong: str) -> None:
    assert judged(wrong, *TWO, retries=0, **options).status == "unparsed"


@pytest.mark.parametrize(
    "right",
    [f"  {says()}\n", f"```json\n{says()}\n```", f"```\n{says()}\n```", f"<think>[1] {{}} hm</think>\n{says()}",
     f"it is so\n</think>\n```json\n{says()}\n```", says(rationale="It has a <think> in it. {}")],
)  # fmt: skip
def test_a_fence_and_reasoning_before_the_object_are_let_pass(right: str) -> None:
    assert judged(right).score == 1.0


def test_a_truncated_answer_is_unparsed_even_when_it_reads_well() -> None:
    verdict = judged(Answer("ok", says(), finish="length"), retries=0)
    assert (verdict.status, verdict.raw) == ("unparsed", says())
    assert "cut off at max_tokens" in verdict.rationale


@pytest.mark.parametrize("status", ["timeout", "refused", "error"])
def test_a_failed_call_is_its_own_status_and_is_not_repeated(status: Any) -> None:
    chat = FakeChat(lambda _: Answer(status, reason="Why it <|im_end|>failed."))
    verdict = LLMJudge("chatting", {}, chat).judge([talk("I work nights.")])[0]
    assert verdict == Verdict(status, None, "Why it failed.")
    assert len(chat.asked) == 1


def test_an_answer_that_can_not_be_read_is_asked_for_anew_as_another_sample() -> None:
    chat = FakeChat(lambda request: says() if request.sample == 2 else "hm")
    verdict = LLMJudge("chatting", {}, chat).judge([talk("I work nights.")])[0]
    assert (verdict.score, verdict.raw) == (1.0, f"hm\n-----\nhm\n-----\n{says()}")
    assert [(r.sample, r.temperature, r.seed) for r in chat.asked] == [(0, 0.0, None), (1, 0.7, 1), (2, 0.7, 2)]
    assert len({json.dumps(r.messages) for r in chat.asked}) == 1


@pytest.mark.parametrize(
    ("options", "answers", "score", "agreeing"),
    [
        ({}, [says(), says(contradicts=True), says()], 1.0, 2),
        ({}, [says(), says(contradicts=True), says(says_something=False)], 0.0, 2),
        (GRADED, [says(grade=5), says(grade=2), says(grade=1)], 0.25, 1),
        (GRADED, [says(grade=4)] * 3, 0.75, 3),
    ],
)
def test_several_samples_give_their_median(
    options: dict[str, Any], answers: list[str], score: float, agreeing: int
) -> None:
    verdict = judged(lambda request: answers[request.sample], samples=3, **options)
    assert verdict.score == score
    assert verdict.rationale == f"{agreeing} of 3 samples agree: It fits."
    assert verdict.raw == "\n-----\n".join(answers)


def test_every_sample_has_to_be_read() -> None:
    chat = FakeChat(lambda request: "hm" if request.sample % 3 == 1 else says())
    verdict = LLMJudge("chatting", {"samples": 3, "retries": 1}, chat).judge([talk("I work nights.")])[0]
    assert verdict.status == "unparsed"
    assert sorted(request.sample for request in chat.asked) == [0, 1, 2, 4]
    assert {request.temperature for request in chat.asked} == {0.7}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("", "silence"),
        ("... \u200b?!", "silence"),
        ("<|im_end|>", "meta"),
        ("<s>[INST] <|i\u200bm_end|> </s>!", "meta"),
        ("You GREW up by the sea, and never learned to swim", "copying"),
        ("I have worked there for ten years.", "repeating"),
    ],
)
def test_what_a_rule_settles_costs_no_call(reply: str, kind: str) -> None:
    chat = FakeChat(lambda _: says())
    before = ("I have worked there for ten years.", "Yes.")
    verdict = LLMJudge("chatting", {}, chat).judge([talk(*before, reply)])[0]
    assert (verdict.score, verdict.kind, verdict.raw) == (0.0, kind, "")
    assert chat.asked == []
    assert LLMJudge("chatting", {}, chat).judge([talk(*before, "Yes.")])[0].score == 1.0  # a short line may come again


def test_conversations_are_asked_about_at_once_and_fail_alone() -> None:
    def answer(request: Request) -> Answer | str:
        text = framing.parse(request.messages)["reply"]["text"]
        if text == "Reply 7 .":
            return Answer("timeout", reason="Slow.")
        return "hm" if text == "Reply 9 ." else says()

    chat = FakeChat(answer)
    verdict = LLMJudge("chatting", {}, chat).judge([talk(f"Reply {number} .") for number in range(50)])
    assert chat.peak == 50
    assert {i: v.status for i, v in enumerate(verdict) if v.score is None} == {7: "timeout", 9: "unparsed"}


def test_an_exhausted_budget_is_raised_and_nothing_goes_on_behind_it() -> None:
    def answer(request: Request) -> str:
        if framing.parse(request.messages)["reply"]["text"] == "Reply 3 .":
            raise BudgetError("1000 calls are used up")
        return "hm"

    chat = FakeChat(answer)
    judge = LLMJudge("chatting", {"retries": 50}, chat)
    with pytest.raises(BudgetError, match="used up"):
        judge.judge([talk(f"Reply {number} .") for number in range(8)])
    assert chat.flying == 0
    assert len(chat.asked) <= 3 * 8


def test_the_question_holds_the_texts_as_data_and_names_every_key() -> None:
    chat = FakeChat(lambda _: says())
    LLMJudge("therapy", {"history": 3, "max_tokens": 77}, chat).judge([talk("One.", "Two <|im_end|>.", "Three.")])
    (request,) = chat.asked
    assert framing.parse(request.messages) == {
        "persona": PROSE.instruction,
        "history": [
            {"line": 3, "speaker": "partner", "text": "Question 1?"},
            {"line": 4, "speaker": "persona", "text": "Two ."},
            {"line": 5, "speaker": "partner", "text": "Question 2?"},
        ],
        "reply": {"line": 6, "text": "Three."},
    }
    assert (request.temperature, request.max_tokens, request.seed) == (0.0, 77, None)
    assert "therapist" in request.messages[0]["content"]
    for metric, scale in [(m, s) for m in verdicts.METRICS for s in verdicts.SCALES if (m, s) != ("qa", "graded")]:
        shape, task = verdicts.schema(metric, scale), verdicts.task(metric, scale, "")
        assert set(shape["properties"]) == set(shape["required"])
        assert next(iter(shape["properties"])) == "rationale"
        assert all(f"`{key}`" in task for key in shape["properties"])


@pytest.mark.parametrize(("metric", "scale"), [("prompt-to-line", "binary"), ("prompt-to-line", "graded")])
def test_without_history_the_line_is_judged_alone(metric: str, scale: str) -> None:
    """The same line after other lines, earlier or later, is the same question: its score depends on nothing else."""
    chat = FakeChat(lambda _: says() if scale == "binary" else says(grade=4))
    options = {"history": 0, "metric": metric, "scale": scale}
    judge = LLMJudge("therapy", options, chat)
    judge.judge([talk("I am fine."), talk("One.", "Two.", "I am fine."), talk("Other words.", "I am fine.")])
    one, *others = (request.messages for request in chat.asked)
    assert [one] * 2 == others
    assert framing.parse(one) == {"persona": PROSE.instruction, "reply": {"text": "I am fine."}}
    assert "`history`" not in one[0]["content"]
    assert "What was said before it is not shown" in one[0]["content"]


def test_the_prompt_speaks_of_history_only_where_it_is_shown() -> None:
    for metric in ("prompt-to-line", "qa"):
        assert "`history`" in verdicts.task(metric, "binary", "")
        assert "`history`" not in verdicts.task(metric, "binary", "", history=False)
        assert "{after}" not in verdicts.task(metric, "binary", "")


@pytest.mark.parametrize(
    ("option", "honoured", "sent", "probes"),
    [("auto", True, True, 1), ("auto", False, False, 1), ("always", False, True, 0), ("never", True, False, 0)],
)
def test_the_schema_goes_to_a_server_that_honours_it(option: str, honoured: bool, sent: bool, probes: int) -> None:
    chat = FakeChat(lambda _: says(), honoured)
    LLMJudge("chatting", {"schema": option}, chat).judge([talk("I work nights.")])
    assert (chat.asked[0].schema == verdicts.schema("prompt-to-line", "binary")) == sent
    assert (chat.asked[0].schema is None) == (not sent)
    assert chat.probes == probes


PAIRS = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in (1, 2, 3)]


def interview(*touched: tuple[int, bool]) -> Callable[[Request], str]:
    def answer(request: Request) -> str:
        if "questions" in framing.parse(request.messages):
            return says(touched=[{"question": number, "agrees": agrees} for number, agrees in touched])
        return json.dumps({"questions": PAIRS})

    return answer


@pytest.mark.parametrize(
    ("touched", "score", "kind"),
    [
        ([(1, True), (3, True)], 1.0, "consistent"),
        ([(2, False)], 0.0, "contradiction"),
        ([(1, True), (2, False), (3, True)], 2 / 3, "contradiction"),
        ([], 0.5, "untouched"),
    ],
)
def test_qa_scores_the_share_of_touched_questions_that_agree(
    touched: list[tuple[int, bool]], score: float, kind: str
) -> None:
    verdict = judged(interview(*touched), **QA)
    assert (verdict.score, verdict.kind) == (score, kind)
    assert judged(interview(*touched), **QA, untouched=0.5 if touched else 0.25).score == (score if touched else 0.25)


@pytest.mark.parametrize("touched", [[(0, True)], [(4, True)], [(1, True), (1, True)], [(1, True), (1, False)]])
def test_qa_answers_about_questions_that_do_not_exist_are_unparsed(touched: list[tuple[int, bool]]) -> None:
    assert judged(interview(*touched), **QA, retries=0).status == "unparsed"


def test_questions_are_made_once_per_persona_and_shown_with_their_answers() -> None:
    chat = FakeChat(interview((1, True)))
    judge = LLMJudge("chatting", QA | {"questions": 3}, chat)
    other = Persona("other", "I am Bo, a baker.")
    for _ in range(2):
        judge.judge([talk("One."), talk("Two."), talk("Three.", persona=other), talk("")])
    asked = [framing.parse(request.messages) for request in chat.asked]
    made = [fields for fields in asked if fields.keys() == {"persona"}]
    assert [fields["persona"] for fields in made] == [PROSE.instruction, other.instruction]
    assert len(asked) == 2 + 2 * 3
    assert asked[-1]["questions"] == [{"number": i, **pair} for i, pair in enumerate(PAIRS, start=1)]
    assert "persona" not in asked[-1]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer("refused", reason="No."), "refused"),
        ("1. Who are you?", "unparsed"),
        (json.dumps({"questions": []}), "unparsed"),
        (json.dumps({"questions": PAIRS[:2] + PAIRS[:1]}), "unparsed"),
        (json.dumps({"questions": [*PAIRS, {"question": "Four?", "answer": "4"}]}), "unparsed"),
        (json.dumps({"questions": [{"question": "Why?", "answer": "<s>"}]}), "unparsed"),
    ],
)
def test_without_questions_only_that_persona_has_no_verdict(answer: Answer | str, status: str) -> None:
    good = interview((1, True))

    def reply(request: Request) -> Answer | str:
        return answer if framing.parse(request.messages).get("persona") == "I am Bo, a baker." else good(request)

    judge = LLMJudge("chatting", QA | {"questions": 3, "retries": 0}, FakeChat(reply))
    conversations = [talk("One."), talk("Two.", persona=Persona("other", "I am Bo, a baker.")), talk("Three.")]
    verdict = judge.judge(conversations)
    assert [v.status for v in verdict] == ["scored", status, "scored"]
    assert verdict[1].rationale.startswith("No questions about the persona: ")
    assert verdict[1].raw == (answer if isinstance(answer, str) else "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrik": "qa"}, "expected judge_options out of .*, got 'metrik'; did you mean 'metric'"),
        ({"metric": "line_to_line"}, r"\['metric'\]: expected one of .*did you mean 'line-to-line'"),
        ({"samples": 2}, r"\['samples'\]: expected an odd number, got 2"),
        ({"samples": True}, "whole number of at least 1, got True"),
        ({"samples": 3, "temperature": 0}, "several samples, which would all be the same"),
        ({"temperature": "hot"}, r"expected a number in \[0, 2\]"),
        ({"untouched": float("nan")}, r"expected a number in \[0, 1\], got nan"),
        ({"metric": "qa", "scale": "graded"}, "which is a share"),
        ({"metric": "line-to-line", "history": 1}, "at least 2 for the metric 'line-to-line'"),
    ],
)
def test_an_option_that_is_wrong_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMJudge("chatting", options, FakeChat(lambda _: says()))


def test_a_persona_needs_a_description_that_fits() -> None:
    judge = LLMJudge("chatting", {"max_chars": 100}, FakeChat(lambda _: says()))
    judge.check(PROSE)
    with pytest.raises(ValueError, match="expected an instruction that describes persona 'x', got none"):
        judge.check(Persona("x", " <s>\u200b "))
    with pytest.raises(ValueError, match=r"at most 100 characters for persona 'x', got 101; raise .*'max_chars'"):
        judge.check(Persona("x", "a" * 101))
    with pytest.raises(ValueError, match="ends with a line of the policy"):
        judge.judge([Conversation(PROSE).add("partner", "Hello?")])


def test_a_rationale_is_short_and_harmless() -> None:
    verdict = judged(says(rationale="It fits.\n<|im_end|>\u202e" + "very " * 200))
    assert len(verdict.rationale) <= verdicts.RATIONALE
    assert verdict.rationale.startswith("It fits. very very")
    assert judged(says(rationale=" ")).rationale == "The model gave no reason."


def test_it_works_over_http() -> None:
    def answer(body: dict[str, Any]) -> str:
        return says(contradicts="swim" in framing.parse(body["messages"])["reply"]["text"])

    with Loopback(answer) as server:
        options = {"base_url": server.url, "model": "loopback", "cache": False, "schema": "never"}
        judge = LLMJudge("chatting", options)
        verdict = judge.judge([talk("I work nights."), talk("I love to swim.")])
        judge.close()
    assert [v.score for v in verdict] == [1.0, 0.0]
    assert judge.chat.counts.calls == 2
