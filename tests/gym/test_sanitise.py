"""Sanitising: nothing of a chat format survives in any spelling, ordinary text does, and it settles at once."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_gym.sanitise import CUT, has_reasoning, holds_control, plain, without_reasoning

TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_7|>",
    "<s>", "</s>", "<S>", "< / s >", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>", "<end_of_turn>",
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<tool_call>", "</tool_call>", "<tool_response>", "<think>",
    "<｜begin▁of▁sentence｜>", "<｜User｜>", "＜|im_end|＞", "<|ｉｍ_ｅｎｄ|>", "<|im\u200b_end|>", "<\u2060s>",
    "</think>", "[IN\u00adST]", "<|START_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "<extra_id_0>",
    "<unused42>", "<0x0A>", '<|"|>', "<|turn>", "<turn|>", "<|channel|>", "⟨|im_end|⟩", "<│im_end│>", "<system>",
    "</assistant>", "<im_start>", "<\ufe0fs>", "[gMASK]",
]  # fmt: skip
KEPT = [
    "I <3 cats, a < b and b > c.", "x | y", "[sic] he [laughs] said «system» and 《user》",
    "Tom's café, naïve façade – 50 %", "line one\nline two\tend",
    "¿Cómo estás? 私は看護師です。 Здравствуйте 🙂", "if (a[0] < b[1]) { c |= d >> 2; }",
]  # fmt: skip
nasty = st.lists(
    st.one_of(
        st.sampled_from([*TOKENS, *(t[: len(t) // 2] for t in TOKENS), *(t[len(t) // 2 :] for t in TOKENS)]),
        st.sampled_from(["<", ">", "|", "[", "]", "/", "s", "\u0338", "\u200d", "\u202e", "\x00", "\x85", "\u2028"]),
        st.sampled_from(["\ud800", "\U000e0041", "\ufdfa", "\u1112\u1161", "\\", '"', "e\u0301", " ", "\n", "word"]),
        st.text(max_size=4),
    ),
    max_size=24,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_a_control_token_goes_and_what_stands_around_it_stays(token: str) -> None:
    assert holds_control(f"a {token} b")
    assert plain(f"a{token}b", 99) == "ab"
    head, tail = token[: len(token) // 2], token[len(token) // 2 :]
    assert plain(f"a{head}{token}{tail}b", 99) == "ab"
    assert plain(f"a{head}<|x|>{tail}b", 99) == "ab"


@pytest.mark.parametrize("text", KEPT)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert plain(text, 99) == text
    assert not holds_control(text)


def test_invisible_and_control_characters_go_and_letters_are_composed() -> None:
    assert plain("a\u202eb\u2066c\u200bd\ufeffe\x1b[31mf\x07\x9bg\U000e0041h\ud800i", 99) == "abcde[31mfghi"
    assert plain("one\r\ntwo\rthree\u2028four\x85five", 99) == "one\ntwo\nthree\nfour\nfive"
    assert plain("cafe\u0301", 99) == "caf\u00e9"
    assert plain("\u3164\u2800 \u115f", 99) == ""


@given(nasty, st.integers(min_value=5, max_value=60))
@settings(max_examples=200, deadline=None)
def test_the_result_is_clean_short_and_settled(text: str, limit: int) -> None:
    clean = plain(text, limit)
    assert plain(clean, limit) == clean
    assert not holds_control(clean)
    assert len(clean) <= limit
    assert unicodedata.is_normalized("NFC", clean)
    assert not [c for c in clean if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"]
    clean.encode("utf-8")


def test_a_cut_is_marked_and_inside_the_limit() -> None:
    assert plain("word " * 10, 14) == "word word" + CUT
    assert plain("x" * 14, 14) == "x" * 14
    assert plain("a" + "\u200b" * 1000, 14) == "a" + CUT  # not read to its end
    with pytest.raises(ValueError, match="expected a limit of more than 4 characters, got 4"):
        plain("x", 4)


@pytest.mark.parametrize(
    "hostile", ["<s" * 4000 + ">" * 4000, "<|" * 8000, "[" * 8000 + "]" * 8000, "<" + "\u0338" * 8000]
)
def test_a_hostile_text_costs_little(hostile: str) -> None:
    start = time.perf_counter()
    assert not holds_control(plain(hostile, 16_000))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>hm</think>Yes.", "Yes."),
        ("<thinking>\nhm\n</thinking>\n\nYes.", "Yes."),
        ("A <reasoning>x</reasoning> b", "A  b"),
        ("[THINK]x[/THINK]Yes.", "Yes."),
        ("<THINK>a<think>b</think>c</think>Yes.", "Yes."),
        ("Yes. <think>and then", "Yes."),
        ("it began before</think>Yes.", "Yes."),
        ("<thi<think>x</think>nk>y</think>Yes.", "Yes."),
        ("<th\u200bink>x</th\u200bink>Yes.", "Yes."),
        ("<think>", ""),
        (" I think so. ", " I think so. "),
    ],
)
def test_reasoning_is_taken_out(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer
    assert has_reasoning(text) == (text != answer)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "[THINK]", "a", "\u200b", " "])).map("".join)
)
def test_no_tag_of_a_reasoning_block_survives(text: str) -> None:
    answer = without_reasoning(text)
    assert not has_reasoning(answer)
    assert without_reasoning(answer) == answer
