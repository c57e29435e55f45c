"""Words, phrases and their scope; and what is understood of a conversation is understood once and for all."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, UNASKED, load
from ppg_gym.domain.parsing import MOST_LIKE, spoken, words
from ppg_gym.domain.reading import REPEAT_WINDOW, Track, instruction_sentences, reader
from ppg_gym.domain.saying import say
from ppg_gym.partners.scripted import ScriptedPartner


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm a NURSE!", ["i", "am", "a", "nurse", "!"]),
        ("It’s what I‘d do…", ["it", "is", "what", "i", "would", "do", ".", ".", "."]),
        ("we don't, can't, won't", ["we", "do", "not", ",", "can", "not", ",", "will", "not"]),
        ("the cat's dish, that's it", ["the", "cat", "dish", ",", "that", "is", "it"]),
        ("Ｎｕｒｓｅ café na\u200bme\ufeff", ["nurse", "cafe", "name"]),
        ("tea–or coffee — both\n7pm", ["tea", "\u2013", "or", "coffee", "\u2014", "both", "\n", "7", "pm"]),
        ("日本語 🙂 a_b", ["日本語", "a", "b"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@settings(deadline=None)
@given(st.text(max_size=80))
def test_words_survive_any_text_and_are_stable(text: str) -> None:
    found = spoken(text)
    assert spoken(" ".join(found)) == found or not text.isascii()


def claims(domain: str, text: str) -> set[tuple[str, bool]]:
    """Return (value, negated) of what a text claims outside questions."""
    return {(c.value, c.negated) for c in reader(domain).parse(text).claims if not c.asked}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am a nurse", {("nurse", False)}),
        ("I am not a nurse", {("nurse", True)}),
        ("not a pilot but a nurse", {("pilot", True), ("nurse", False)}),
        ("no pilot, no baker, a nurse", {("pilot", True), ("baker", True), ("nurse", False)}),
        ("neither a pilot nor a baker", {("pilot", True), ("baker", True)}),
        ("I am not a pilot or a baker", {("pilot", True), ("baker", True)}),
        ("no, I am a nurse", {("nurse", False)}),
        ("no it is tea", {("tea", False)}),
        ("I can't live without tea", {("tea", False)}),
        ("a cat instead of a dog", {("cat", False), ("dog", True)}),
        ("my brother is a pilot and a baker", set()),
        ("my brother is a pilot and I am a nurse", {("nurse", False)}),
        ("I used to be a pilot and a baker, now a nurse", {("nurse", False)}),
        ("I want to be a pilot", set()),
        ("well, are you a nurse?", set()),
        ("I'm a nurse, and you?", {("nurse", False)}),
        ("nurse?", set()),
        ("I have no pet", {("", True)}),
        ("I do not like pets", set()),
    ],
)
def test_scope(text: str, expected: set[tuple[str, bool]]) -> None:
    assert claims("chatting", text) == expected


def test_everyday_words_claim_only_when_asked_or_named_with_their_topic() -> None:
    parse = reader("chatting").parse
    assert [c.passing for c in parse("I rock the baby").claims] == [True]
    assert [c.passing for c in parse("My music is rock").claims] == [False]


def test_the_same_words_over_and_over_are_gibberish() -> None:
    parse = reader("chatting").parse
    assert parse("nurse " * MOST_LIKE).known == 0.0
    assert parse("tea or coffee, tea").known == 1.0


def test_copying_needs_a_sentence_that_addresses_the_reader() -> None:
    instruction = "Play Al. You work as a nurse. It began with the fire! Is it your cat? Answer as Al."
    assert instruction_sentences(instruction) == ("you work as a nurse", "is it your cat")


def test_repeating_looks_back_a_window(hand_made: dict[str, Persona]) -> None:
    read, persona = reader("chatting"), hand_made["chatting"]
    heard, said = read.parse("Where do you live?"), read.parse("I am a nurse.")
    others = tuple(f"line {i}" for i in range(REPEAT_WINDOW - 1))
    near = Track(0, "open", replies=(said.text, *others))
    far = Track(0, "open", replies=(said.text, "one more", *others))
    assert read.read(near, persona, heard, said).kind == "repeating"
    assert read.read(far, persona, heard, said).kind == "off_topic"
    assert read.read(near, persona, read.parse("What is your job?"), said).kind == "truth"  # asked again, told again


@pytest.mark.parametrize("domain", DOMAINS)
def test_reading_turn_by_turn_equals_reading_at_once(domain: str) -> None:
    read, rng = reader(domain), np.random.default_rng(3)
    partner, kinds = ScriptedPartner(domain), list(load(domain).mix)
    conversation = Conversation(personas(domain, "train")[0])
    for _ in range(20):
        conversation = conversation.add("partner", partner.speak([conversation], [rng])[0].text)
        before = read.track(conversation)
        conversation = conversation.add("policy", say(read, kinds[int(rng.integers(len(kinds)))], conversation, rng))
        after = read.track(conversation)
        assert after.readings[:-1] == before.readings
    fresh = Conversation(conversation.persona, conversation.lines)
    assert read.track(fresh) == read.track(conversation)
    assert len(after.readings) == len(after.replies) == len(after.asked) == 20


def test_a_reader_is_one_per_process_also_through_pickle_and_copy() -> None:
    read = reader("therapy")
    assert pickle.loads(pickle.dumps(read)) is read
    assert copy.deepcopy(read) is read


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DOMAINS), st.lists(st.sampled_from(load("therapy").options["common_words"]), max_size=12))
def test_plain_words_never_contradict(domain: str, said: list[str]) -> None:
    persona = personas(domain, "train")[0]
    read = reader(domain)
    reading = read.read(
        Track(0, load(domain).table.states[0]), persona, read.parse("Hello."), read.parse(" ".join(said))
    )
    assert reading.kind in (UNASKED, *load(domain).table.kinds)
    named = {claim.slot for claim in read.parse(" ".join(said)).claims}
    assert reading.kind != "slip" or named
