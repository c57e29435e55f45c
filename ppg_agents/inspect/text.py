"""Makes models' texts safe to show: nothing in them stays invisible, and nothing becomes markup.

Pure functions over text. The wording is left alone.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Default_Ignorable_Code_Point outside the category Cf, and the blank braille pattern.
_IGNORABLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
# Starts markup, a link, a mention, a formula or an emoji's name in some Markdown reader; below, at a line's start.
_MARKUP = re.compile(r"[\\`*_\[\]()|~$#!@{}^]|:(?=\S)|(?<=www)\.", re.IGNORECASE)
_OPENERS = frozenset("-+=")
_ITEM = re.compile(r"(\d{1,9})[.)](?=\s|$)")
_ADDRESS = re.compile(r"(?<=[\w.+-])\\@(?=\w)")
_ENTITIES: dict[str, str | int | None] = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_IN_SCRIPT: dict[str, str | int | None] = {character: f"\\u{ord(character):04x}" for character in "<>&"}


def visible(text: str) -> str:
    r"""Return a text with every invisible character spelled out: a right-to-left override becomes ``⟨U+202E⟩``.

    That covers control characters (except line break and tab), format characters (zero-width, bidirectional, tags,
    soft hyphen), variation selectors, lone surrogates, private and unassigned characters. Joiners and selectors stay
    where they form an emoji. ``\r\n`` counts as a line break.
    """
    text = text.replace("\r\n", "\n")
    if text.isprintable() and _IGNORABLE.isdisjoint(text):
        return text
    return "".join(
        character if _seen(character) or _in_emoji(text, i) else f"⟨U+{ord(character):04X}⟩"
        for i, character in enumerate(text)
    )


def _seen(character: str) -> bool:
    if character in "\n\t" or unicodedata.category(character) == "Zs":
        return True
    return character.isprintable() and character not in _IGNORABLE


def _in_emoji(text: str, i: int) -> bool:
    """Return whether the character at i is part of an emoji: its selector, or the joiner between two pictures."""
    before = unicodedata.category(text[i - 1]) if i else ""
    if text[i] == "\ufe0f":
        return before == "So"
    after = unicodedata.category(text[i + 1]) if i + 1 < len(text) else ""
    return text[i] == "\u200d" and after == "So" and (before in ("So", "Sk") or text[i - 1] == "\ufe0f")


def right_to_left(text: str) -> bool:
    """Return whether any of the text runs from right to left."""
    return any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in text)


def shown(value: Any) -> Any:
    """Return plain JSON in which every text is `visible` and every number that is not finite is None."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {visible(str(key)): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return visible(str(value))


def script_json(value: Any) -> str:
    """Return JSON that is safe inside a ``<script>`` element: ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(shown(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(str.maketrans(_IN_SCRIPT))


def markdown(text: str) -> str:
    """Return Markdown, for inside a line or cell, that reads like the text: no HTML, link or emphasis starts in it."""
    line = " ".join(visible(text).split()).translate(str.maketrans(_ENTITIES))
    return _ADDRESS.sub("`@`", _MARKUP.sub(r"\\\g<0>", line))


def markdown_line(text: str) -> str:
    """Return `markdown` that is safe at the start of a line too: no list, quote or rule starts in it."""
    line = markdown(text)
    item = _ITEM.match(line)
    if item:
        return f"{item[1]}\\{line[item.end(1) :]}"
    return f"\\{line}" if line[:1] in _OPENERS else line
