"""The audit of a partner's line: every fault is found, and honest lines, the scripted partner's among them, pass."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.partners.audit import FAULTS, WINDOW, Roles, audit, own_words
from ppg_gym.partners.scenes import parse, scene
from ppg_gym.partners.scripted import ScriptedPartner

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "consistent-llms"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/consistent-llms beside the project")
SCRIPTED = 100  # conversations per domain
ANNA = Persona("anna", "Play Anna.", name="Anna Berg")
LONG = "Could we look at what happened in the week before you stopped sleeping, one day after the other?"
HEARD = "I lie awake until four and then I get up and clean the whole kitchen again."


def talk(*lines: str) -> Conversation:
    """Return a conversation with these lines; the partner opens."""
    conversation = Conversation(ANNA)
    for number, line in enumerate(lines):
        conversation = conversation.add("policy" if number % 2 else "partner", line)
    return conversation


BAD = {
    "leaked_reasoning": [
        ("therapy", "<think>The patient is guarded.</think>How are you?"),
        ("therapy", "The patient is guarded, so I ask. </think> How are you?"),
        ("therapy", "<think>How do I begin"),
        ("chatting", "Okay, the user wants me to play a friendly person. Hi!"),
        ("education", "We need to respond as the teacher. Roots drink water."),
        ("therapy", "<|channel|>analysis<|message|>She hides it.<|end|>What do you hide?"),
    ],
    "empty": [
        ("chatting", ""), ("chatting", " \n\u200b "), ("therapy", "…"), ("therapy", "*nods slowly*"),
        ("therapy", "(The therapist waits.)"), ("chatting", "________ 2021-10-14T04:15:07. |"),
        ("therapy", "Therapist:"), ("chatting", "Kofi " + "| " * 60),
    ],
    "too_long": [("chatting", "word " * 121), ("chatting", "w" * 2000)],
    "meta": [
        ("chatting", "As an AI language model, I have no pets."), ("chatting", "I’m just an AI, so I do not eat."),
        ("therapy", "I was instructed to play a therapist."), ("therapy", "I will stay in character. How are you?"),
        ("chatting", "Where do you live? Please respond as Anna."), ("chatting", "Where? Submit your response here."),
        ("education", "Sure! Here's the teacher's next line."), ("education", "Okay, here is my reply: Roots drink."),
        ("chatting", "Nice to meet you, [Name]!"), ("therapy", "The score of your reply is high."),
        ("therapy", "How are you?\n(Note: I kept this short.)"), ("education", "My instructions say so."),
    ],
    "speaks_for_both": [
        ("therapy", "How do you feel?\nPatient: Numb."), ("therapy", "How do you feel? Patient: Numb."),
        ("therapy", "Therapist: Hello.\n\n**Patient:** Hi."), ("chatting", "Hi!\nAnna: Hello.\nPartner: Nice."),
        ("education", "Roots drink water.\n\nStudent (echoing): Roots drink water."),
        ("education", "Roots drink.\n(Student's response: I see.)"), ("chatting", "What is your job?\nUser: A nurse."),
        ("therapy", "How are you?<|im_end|>\n<|im_start|>user\nFine."), ("therapy", "Hm. Therapist: How are you?"),
    ],
    "role_flip": [
        ("therapy", "Patient: I can not sleep."), ("chatting", "Anna: I am a nurse."), ("chatting", "User: Hi."),
        ("therapy", "As your patient, I find that hard."), ("therapy", "What do you feel? I feel numb."),
        ("therapy", "Thank you, doctor."), ("therapy", "I've been feeling so overwhelmed lately."),
        ("therapy", "It is about my boss."), ("education", "Teacher, can you explain why?"),
        ("education", "As a visual learner, I like maps."), ("education", "I am your student."),
        ("education", "I learn best with pictures."), ("education", "Could you teach me with songs?"),
        ("education", "Roots drink water, teacher!"), ("chatting", "Hi, I'm Anna. And you?"),
        ("chatting", "My name is Anna Berg."),
    ],
    "early_farewell": [
        ("chatting", "Goodbye!"), ("chatting", "Bye, Anna!"), ("chatting", "Well, bye for now."),
        ("chatting", "That is great. See you soon!"), ("therapy", "Let us end the session here."),
        ("therapy", "I think we should stop here for today."), ("therapy", "Our time is up."),
        ("therapy", "Good work. Take care!"), ("therapy", "Take care of yourself."),
        ("chatting", "It's been lovely talking to you."), ("education", "Class dismissed."),
        ("education", "That is all for today."), ("chatting", "Nice. Have a great day!"),
        ("therapy", "I look forward to our next session."), ("chatting", "I have to go now, bye!"),
        ("chatting", "Goodbye!<END>"), ("chatting", "STOP"), ("chatting", "Nice to hear.STOP"),
        ("chatting", "Nice to hear.Goodbye!"), ("chatting", "What do you do?Bye!"), ("chatting", "I like thatSTOP"),
        ("therapy", "What now? STOP<|endoftext|>"), ("therapy", "I see. [end of conversation]"),
        ("therapy", "What happened?<END>"), ("therapy", "What happened? ###STOP###"), ("therapy", "I see. TERMINATE"),
        ("education", "Roots drink water.\n\nEND OF LESSON"), ("education", "What is 3 + 4? (session ends)"),
        ("education", "What is 3 + 4?</end>"), ("chatting", '"What do you do?" <STOP>'), ("chatting", "DONE"),
    ],
    "repetition": [("therapy", LONG), ("therapy", "I see. " + LONG), ("therapy", HEARD), ("therapy", "Go on. " * 3)],
}  # fmt: skip
GOOD = [
    ("chatting", "What do you do?<|endoftext|>"),
    ("chatting", "Does your cat ever stop?"),
    ("chatting", "When does your WEEKEND end?"),
    ("therapy", "What does the sign STOP mean to you?"),
    ("therapy", "Did you tell him to (please) stop?"),
    ("education", "Where does the sentence end"),
    ("therapy", "How did you say goodbye to your father?"),
    ("therapy", "Saying goodbye is hard."),
    ("therapy", "Who sees you on bad days, and do you see yourself next year?"),
    ("therapy", "How do you take care of yourself when it gets too much?"),
    ("therapy", "What would have to end here for you to feel free?"),
    ("therapy", "Did he end the conversation, or did you?"),
    ("therapy", "I am glad you trust me. I feel your trust."),
    ("therapy", 'You say "I am numb" and "my boss must not know". What is behind it?'),
    ("therapy", "You said ‘I’ve been feeling lost’. Since when?"),
    ("therapy", "On a scale from one to ten, how strong is the fear?"),
    ("therapy", "I sense a mask, a persona that you show at work."),
    ("therapy", "(nods) That sounds heavy."),
    ("therapy", "Have you told a friend, a sister or a doctor?"),
    ("therapy", "We could try a short role-play: you speak, I am your boss."),
    ("therapy", "Some patients find that hard. Is it so for you?"),
    ("education", "When I was at school I learned it with a rhyme. Can you explain it to me?"),
    ("education", "A student once asked me why roots drink water. Why do they?"),
    ("education", "Three times three is nine, and 2 + 2 = 4. What is 3 + 4?"),
    ("education", "Note this: the prompt answer of a nerve is called a reflex."),
    ("education", "Rome fell; it was the end of the class system. What ended it?"),
    ("education", "I would give that answer a nine out of ten, well done!"),
    ("chatting", "Hello!"),
    ("chatting", "I'm a teacher. Do you like your teachers, Anna?"),
    ("chatting", "I work on language models. As an AI researcher I read a lot."),
    ("chatting", "So I am Anna's first friend here?"),
    ("chatting", "Anna, what a lovely name!"),
    ("chatting", "I'll see you then with the cake, you said? How kind!"),
    ("chatting", "Do you have a good day in mind for a swim?"),
    ("chatting", "I miss Goodbye Lenin, such a film. Bye bye birdie too?"),
]


@pytest.mark.parametrize(("fault", "domain", "line"), [(f, *case) for f, cases in BAD.items() for case in cases])
def test_a_fault_is_found(fault: str, domain: str, line: str) -> None:
    before = talk("Good to see you.", "Thanks.", LONG, HEARD)
    assert audit(line, before, scene(domain).roles(ANNA)) == fault


def test_every_fault_has_examples() -> None:
    assert set(BAD) == set(FAULTS)


@pytest.mark.parametrize(("domain", "line"), GOOD)
def test_an_honest_line_passes(domain: str, line: str) -> None:
    before = talk("Good to see you.", "Hello!", LONG, HEARD)
    assert audit(line, before, scene(domain).roles(ANNA)) == "ok"


@pytest.mark.parametrize(
    "line",
    ["Therapist: Hi.", "**Therapist:** Hi.", "*therapist*: Hi.", "Counselor (softly): Hi.", '"Hi."', "Assistant: Hi.",
     "Therapist: “Hi.”", "Hi.<|im_end|>", "\u202eHi."],
)  # fmt: skip
def test_the_own_label_and_quotes_around_the_whole_are_no_words(line: str) -> None:
    roles = scene("therapy").roles(ANNA)
    assert own_words(line, roles) == "Hi."
    assert audit(line, Conversation(ANNA), roles) == "ok"


def test_words_that_are_quoted_in_a_line_keep_their_quotes() -> None:
    roles = scene("therapy").roles(ANNA)
    assert own_words('"Numb" is strong. What is "strong"', roles) == '"Numb" is strong. What is "strong"'


def test_a_line_may_come_back_after_a_while_and_short_ones_may_be_alike() -> None:
    roles = scene("therapy").roles(ANNA)
    later = [line for n in range(WINDOW) for line in (f"Question number {n}?", "Yes.")]
    assert audit(LONG, talk(LONG, HEARD, *later[:-2]), roles) == "repetition"
    assert audit(LONG, talk(LONG, HEARD, *later), roles) == "ok"
    like = talk("You are doing well. How do you cope?", "So.")
    assert audit("You are doing well. How do you feel?", like, roles) == "ok"
    assert audit("Hello!", talk("Hi!", "Hello!"), roles) == "ok"


@pytest.mark.parametrize("name", DOMAINS)
def test_the_scripted_partner_has_no_fault(name: str) -> None:
    domain, partner, read, people = load(name), ScriptedPartner(name), reader(name), personas(name, "held-out")
    for seed in range(SCRIPTED):
        persona, rng = people[seed % len(people)], np.random.default_rng(seed)
        conversation, roles = Conversation(persona), scene(name).roles(persona)
        for _ in range(domain.turns):
            line = partner.speak([conversation], [rng])[0].text
            assert audit(line, conversation, roles) == "ok", line
            conversation = conversation.add("partner", line)
            kinds = domain.mix_in(read.track(conversation).state)
            kind = list(kinds)[int(rng.choice(len(kinds), p=list(kinds.values())))]
            conversation = conversation.add("policy", say(read, kind, conversation, rng))


@given(st.text(max_size=300), st.sampled_from(DOMAINS))
def test_any_text_gets_a_verdict_and_a_good_line_stays_good_as_it_is_shown(line: str, name: str) -> None:
    roles = scene(name).roles(ANNA)
    fault = audit(line, Conversation(ANNA), roles)
    assert fault in {*FAULTS, "ok"}
    if fault == "ok":
        assert audit(own_words(line, roles), Conversation(ANNA), roles) == "ok"


def test_a_hostile_line_takes_no_time() -> None:
    roles = scene("therapy").roles(ANNA)
    for unit in ("[", "\n", '"', "'a", "* ", "well, ", "(", "I feel ", "a.b", "see you ", "<", "Good bye "):
        audit(unit * (20_000 // len(unit)), talk(LONG), roles)
        audit((unit * 1400)[:1400], talk(LONG), roles, max_words=10_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"x\.toml: expected a table \[partner\]"),
        ({"brief": 3}, r"partner\.brief: expected a string"),
        ({"labels": "therapist"}, r"partner\.labels: expected a list of strings"),
        ({"openin": "Hi"}, "did you mean 'opening'"),
        ({"flips": ["("]}, r"partner\.flips: expected regular expressions, got '\('"),
    ],
)
def test_a_broken_scene_is_refused_with_its_place(change: Any, message: str) -> None:
    whole: dict[str, Any] = dict.fromkeys(("role", "counterpart", "brief", "opening", "silence"), "x")
    whole |= {key: [] for key in ("labels", "counterparts", "kinds", "flips")}
    assert parse(whole, "x.toml").role == "x"
    with pytest.raises(ValueError, match=message):
        parse(None if change is None else whole | change, "x.toml")
    with pytest.raises(ValueError, match="missing flips"):
        parse({key: value for key, value in whole.items() if key != "flips"}, "x.toml")


def stored(name: str) -> Counter[str]:
    """Return how often each fault is found in a stored file's partner lines; in chatting, either side is one."""
    domain = name.partition("/")[0]
    found: Counter[str] = Counter()
    for entry in json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")):
        lines = [text.strip() for _, text in entry["conversation"]]
        labels = [line.partition(":")[0] for line in lines[:2]]
        for side in (0, 1) if domain == "chatting" else (0,):
            persona = Persona("x", "x", name=labels[1 - side] if domain == "chatting" else "")
            roles = scene(domain).roles(persona)
            roles = Roles((*roles.own, labels[side]), roles.other, roles.kinds, roles.names, roles.flips)
            conversation = Conversation(persona)
            for number, line in enumerate(lines):
                if number % 2 == side:
                    found[audit(line, conversation, roles)] += 1
                words = line.partition(":")[2].strip()
                conversation = conversation.add("partner" if number % 2 == side else "policy", words)
    return found


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("chatting/llama-8b-sft-ppo-prompt_0_10_56", {"ok": 100}),
        ("chatting/llama3-8b-kto-sft-prompt_0_60_645",
         {"ok": 297, "empty": 144, "too_long": 99, "meta": 50, "repetition": 10}),
        ("chatting/mistral-instruct_0_10_727", {"ok": 984, "early_farewell": 16}),
        ("education/mistral-instruct_0_615", {"ok": 463, "speaks_for_both": 1, "too_long": 1}),
        ("education/mistral-instruct_0_792", {"ok": 956, "speaks_for_both": 1, "too_long": 2, "early_farewell": 1}),
        ("therapy/mistral-instruct_0_261", {"ok": 555, "early_farewell": 63, "repetition": 2}),
        ("therapy/sft_new_lr_Llama-3.1-8B-Instruct_0_444", {"ok": 685}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_stored_lines(name: str, found: dict[str, int]) -> None:
    assert stored(name) == found
