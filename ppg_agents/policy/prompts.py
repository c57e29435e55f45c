"""How a conversation becomes text for a chat model: the pieces of its chat template around the content.

The template is rendered once, with placeholders, and cut into the text around the instruction and the
partner's messages, so that a conversation is one growing token sequence. A template for which that would
be wrong is exchanged for its training variant or refused with the reason. Nothing here touches weights or
samples anything.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

log = logging.getLogger(__name__)

REASONING = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What opens and closes the reasoning part of a reply, in the families that have one."""

_INSTRUCTION = "zqINSTRUCTIONqz"
_ADVICE = (
    "pass chat_template= with a variant of the template that keeps every earlier token as it is, "
    "or template_options= that switch the rewriting off"
)
_DEFAULTS: dict[str, Any] = {
    "enable_thinking": False,
    "strftime_now": lambda form: date(2024, 7, 26).strftime(form),
}
"""Variables of every template: no reasoning, and one date in place of today's, so that a run can be repeated."""


@dataclass(frozen=True)
class PromptFormat:
    """The text of a chat template around what is said.

    Attributes:
        opening: Text before the instruction, between it and the first message, and after that message, up
            to and including the prompt of the first reply.
        alone: Text before and after the instruction when the first message is empty.
        bare: Text before and after the first message when the instruction is empty: there is no system message then,
            or the one that the template puts in by itself.
        between: Text from just after a reply's end-of-turn token to the partner's message, and from there
            up to and including the prompt of the next reply.
        lead: What a reply without reasoning starts with: white space, an empty reasoning block, or nothing.
        end_of_turn: The control token that closes a reply.
        control: Matches every control token, so that it can be broken up inside content.
        reasoning: What opens and closes the reasoning part of a reply; None when the model has none.
        reasons: Whether the prompt of a reply leaves the reasoning open.
    """

    opening: tuple[str, str, str]
    alone: tuple[str, str]
    bare: tuple[str, str]
    between: tuple[str, str]
    lead: str
    end_of_turn: str
    control: re.Pattern[str] | None
    reasoning: tuple[str, str] | None = None
    reasons: bool = False

    def first(self, instruction: str, message: str) -> str:
        """Return the text from the start of the conversation to the first reply."""
        instruction, message = self.plain(instruction), self.plain(message)
        if not instruction:
            return message.join(self.bare)
        if not message:
            return instruction.join(self.alone)
        before, middle, after = self.opening
        return f"{before}{instruction}{middle}{message}{after}"

    def next(self, message: str) -> str:
        """Return the text between a reply's end-of-turn token and the next reply."""
        before, after = self.between
        return f"{before}{self.plain(message)}{after}"

    def plain(self, content: str) -> str:
        """Return ``content`` without surrounding white space and without a readable control token.

        A control token inside content is broken up by a space after its first character.
        """
        content = content.strip()
        if self.control is None or not self.control.search(content):
            return content
        content = self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", content)
        while self.control.search(content):
            content = self.control.sub("", content)
        return content

    def control_free(self, text: str) -> str:
        """Return ``text`` without control tokens."""
        return text if self.control is None else self.control.sub("", text)

    def heard(self, reply: str) -> str:
        """Return what the partner hears of a reply: all but its reasoning, closed or not."""
        if self.reasoning is None:
            return reply
        opens, closes = self.reasoning
        _, closed, speech = reply.rpartition(closes)
        if not closed and self.reasons:
            return ""
        speech, unclosed, _ = speech.partition(opens)
        return speech.strip() if closed or unclosed else speech


def trainable_format(tokenizer: Any, options: Mapping[str, Any] | None = None) -> PromptFormat:
    """Derive the prompt format; a template that cannot be trained on gives way to TRL's training variant.

    The variant becomes the tokenizer's chat template, is logged, and is saved with the tokenizer, so that the
    trained model is prompted later as it was trained.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: Extra variables for the template.

    Raises:
        ValueError: See `prompt_format`; and there is no variant, it fails in the same way, or TRL, which brings
            them, is not installed.
    """
    try:
        return prompt_format(tokenizer, options)
    except ValueError as reason:
        own = tokenizer.chat_template
        if not own:
            raise
        if importlib.util.find_spec("trl") is None:
            raise ValueError(
                f"{reason}; or pip install trl, which brings training variants of known templates"
            ) from None
        from trl import chat_template_utils

        try:
            variant = chat_template_utils.get_training_chat_template(tokenizer)
        except ValueError:
            raise reason from None
        if variant is None:
            raise
        tokenizer.chat_template = variant
        try:
            form = prompt_format(tokenizer, options)
        except ValueError as still:
            tokenizer.chat_template = own
            raise ValueError(f"{still} (so it is in TRL's training variant of the template)") from None
        title = next(name for name, text in vars(chat_template_utils).items() if text == variant)
        log.warning("chat template exchanged for TRL's %s; because: %s", title, reason)
        return form


def prompt_format(tokenizer: Any, options: Mapping[str, Any] | None = None) -> PromptFormat:
    """Derive the prompt format from a tokenizer's chat template and check that it can be trained on.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: Extra variables for the template, such as ``{"enable_thinking": True}``; reasoning is off
            without that, and a template that prints the date prints 26 July 2024.

    Returns:
        The format. If the template has no system role, the instruction goes to the top of the first message.

    Raises:
        ValueError: The tokenizer has no chat template; the template fails on a plain conversation, rewrites
            earlier turns (is not prefix-preserving), does not show what it is given, or does not close a
            reply with a control token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("expected a tokenizer with a chat template, got none; pass chat_template=")
    variables = {**_DEFAULTS, **(options or {})}

    def render(messages: Sequence[Mapping[str, str]], generation: bool = True) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **variables
        )
        return str(text)

    system = _has_system_role(render)
    special, added = _control_tokens(tokenizer)
    try:
        prompts, closed = _renderings(render, system, _replied)
        alone = render(_conversation(0, system, _replied, opening=""))
        bare = render([{"role": "user", "content": _said(1)}])
    except Exception as error:
        raise ValueError(
            f"expected a chat template that renders user and assistant turns in alternation, got "
            f"{type(error).__name__}: {error}; pass chat_template="
        ) from error

    reasoning = _reasoning(tokenizer, added + special)
    lead = _lead(prompts, reasoning)
    gap = _gap(prompts, closed, lambda turn: lead + _replied(turn))
    opened = _left_open(prompts[0], reasoning)
    if reasoning and (opened or reasoning[1] in lead or variables["enable_thinking"]):

        def thought(turn: int) -> str:
            return f"{reasoning[0]}\nzqTHOUGHT{turn}qz\n{reasoning[1]}\n\n{_replied(turn)}"

        with_thoughts = _renderings(render, system, thought)
        if _gap(*with_thoughts, lambda turn: thought(turn).removeprefix(opened)) != gap:
            raise ValueError(f"expected the same text after a reply with and without reasoning; {_ADVICE}")

    end_of_turn = next((t for t in special + added if gap.lstrip().startswith(t)), None)
    if end_of_turn is None or not closed[len(prompts[0] + lead + _replied(1)) :].lstrip().startswith(end_of_turn):
        raise ValueError(
            f"expected the chat template to close a reply with a control token (the end-of-turn that is "
            f"trained), got {gap[:40]!r} after a reply; {_ADVICE}"
        )
    before, middle, after = _split(prompts[0], _INSTRUCTION, _said(1))
    head, tail = _split(gap.lstrip()[len(end_of_turn) :], _said(2))
    skeleton = "".join((before, middle, after, head, tail, end_of_turn, *(reasoning or ())))
    control = special + [token for token in added if token in skeleton] + list(reasoning or ())
    pattern = "|".join(re.escape(token) for token in sorted(set(control), key=len, reverse=True))
    first, last = _split(alone, _INSTRUCTION)
    start, rest = _split(bare, _said(1))
    return PromptFormat(
        opening=(before, middle, after),
        alone=(first, last),
        bare=(start, rest),
        between=(head, tail),
        lead=lead,
        end_of_turn=end_of_turn,
        control=re.compile(pattern) if pattern else None,
        reasoning=reasoning,
        reasons=bool(opened),
    )


def _said(turn: int) -> str:
    return f"zqMESSAGE{turn}qz"


def _replied(turn: int) -> str:
    return f"zqREPLY{turn}qz"


def _conversation(
    replies: int, system: bool, reply: Callable[[int], str], opening: str | None = None
) -> list[dict[str, str]]:
    """Return a conversation that waits for its next reply."""
    opening = _said(1) if opening is None else opening
    messages = [{"role": "system", "content": _INSTRUCTION}] if system else []
    messages.append({"role": "user", "content": opening if system else f"{_INSTRUCTION}\n\n{opening}"})
    for turn in range(1, replies + 1):
        messages.append({"role": "assistant", "content": reply(turn)})
        messages.append({"role": "user", "content": _said(turn + 1)})
    return messages


def _renderings(render: Any, system: bool, reply: Callable[[int], str]) -> tuple[list[str], str]:
    """Return conversations of 0, 1 and 2 replies, each up to the next reply, and one that ends with a reply."""
    prompts = [render(_conversation(n, system, reply)) for n in range(3)]
    return prompts, render(_conversation(1, system, reply)[:-1], False)


def _gap(prompts: Sequence[str], closed: str, reply: Callable[[int], str]) -> str:
    """Return the text from a reply to the next one; raise unless it is the same everywhere, after what was there."""
    for turn in (1, 2):
        _require_prefix(prompts[turn - 1] + reply(turn), prompts[turn])
    _require_prefix(prompts[0] + reply(1), closed)
    gaps = [prompts[turn][len(prompts[turn - 1] + reply(turn)) :] for turn in (1, 2)]
    if gaps[0].replace(_said(2), _said(3)) != gaps[1]:
        raise ValueError(f"expected the same text between any two replies, got {gaps}; {_ADVICE}")
    return gaps[0]


def _reasoning(tokenizer: Any, tokens: Sequence[str]) -> tuple[str, str] | None:
    """Return the reasoning markers that the chat template writes, or that are tokens of their own."""
    template = str(tokenizer.chat_template)
    written = [pair for pair in REASONING if pair[1] in template]
    return next(iter(written + [pair for pair in REASONING if set(pair) <= set(tokens)]), None)


def _lead(prompts: Sequence[str], reasoning: tuple[str, str] | None) -> str:
    """Return what the template puts in front of a reply by itself; anything but an empty frame is a rewrite."""
    lead, found, _ = prompts[1][len(prompts[0]) :].partition(_replied(1))
    frame = lead
    for marker in reasoning or ():
        frame = frame.replace(marker, "")
    return lead if found and prompts[1].startswith(prompts[0]) and not frame.strip() else ""


def _left_open(prompt: str, reasoning: tuple[str, str] | None) -> str:
    """Return the end of a prompt from where it opens the reasoning of the reply, if it does."""
    if reasoning is None:
        return ""
    _, opens, rest = prompt.rpartition(reasoning[0])
    return opens + rest if opens and not rest.strip() else ""


def _has_system_role(render: Any) -> bool:
    """Return whether the template shows a system message (some raise on it, some drop it)."""
    try:
        return _INSTRUCTION in render(_conversation(0, True, _replied))
    except Exception:
        return False


def _control_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens, and the other added tokens that hold visible characters; longest first."""
    tokens = list(tokenizer.added_tokens_decoder.values())
    special = {t.content for t in tokens if t.special} | set(tokenizer.all_special_tokens)
    other = {t.content for t in tokens if not t.special and len(t.content.strip()) > 1}
    return sorted(special, key=len, reverse=True), sorted(other - special, key=len, reverse=True)


def _require_prefix(prefix: str, text: str) -> None:
    """Raise unless ``text`` goes on from ``prefix``, showing where they part."""
    if text.startswith(prefix):
        return
    at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))
    raise ValueError(
        f"expected a prefix-preserving chat template, got one that rewrites an earlier turn: "
        f"{prefix[max(0, at - 20) : at + 40]!r} becomes {text[max(0, at - 20) : at + 40]!r}; {_ADVICE}"
    )


def _split(text: str, *placeholders: str) -> list[str]:
    """Cut ``text`` at placeholders that must appear once each, in order."""
    pieces = []
    for placeholder in placeholders:
        if text.count(placeholder) != 1:
            raise ValueError(
                f"expected the chat template to show the instruction and every message once, in order, got "
                f"{text!r}; pass chat_template="
            )
        piece, text = text.split(placeholder)
        pieces.append(piece)
    return [*pieces, text]
