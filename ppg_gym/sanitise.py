"""Make a model's text harmless: take out control tokens, invisible characters and reasoning blocks.

Pure functions over text. A sanitised text is still untrusted: it can no longer end a chat turn or hide what it says,
but it can say anything. Nothing here may judge, score or rewrite what is left.
"""

from __future__ import annotations

import functools
import re
import unicodedata

CUT = " […]"  # ends a text that was longer than its limit
_MOST_PASSES = 20  # tokens nested deeper than this are an attack: the text loses all its brackets
_SLACK = 8  # read at most this many times the limit, so that a huge text costs no more than a long one

# Spelled in the skeleton's letters (see `_skeleton`). No pattern may match a backslash or a comma: a match could then
# reach across two strings of a JSON text, and find a token that neither string holds.
_NAMES = r"""
    s | unk | pad | bos | eos | eot | eod | cls | sep | mask | end | escape | endoftext | nl
  | (?:bos|eos|pad|unk|cls|sep|mask|eop|start_of_turn|end_of_turn|chatbot|user|system)_token
  | (?:start|end)_of_(?:turn|image|audio|text|role|role_type|utterance)
  | (?:start|end)_(?:function_declaration|function_call|function_response|header_id)
  | (?:system|user|assistant|human|model|developer|bot|inst|sys|im_start|im_end)
  | (?:tool|tools|function|functions|tool_call|tool_calls|tool_response|tool_result|tool_results|tool_code
      |tool_output|tool_outputs|function_call|function_calls|function_results|function_response)
  | (?:think|thinking|thought|reasoning)
  | (?:unused|extra_id_|reserved_|sentinel_|special_|control_)_?[0-9]{1,6}
  | 0x[0-9a-f]{2}
"""
_BRACKETED = r"""
    inst | sys | system | system_prompt | available_tools | tool_calls | tool_results | tool_content | args
  | call_id | img | img_break | img_end | audio | begin_audio | prefix | suffix | middle | think
  | bos | eos | pad | unk | cls | sep | mask | gmask | smask
"""
_TOKEN = re.compile(
    rf"""
    < [ \t]* \| [\w \t./:+"'\#*=-]{{0,64}} \|? [ \t]* > | < [ \t]* [\w \t./:+"'\#*=-]{{0,64}} \| [ \t]* >
  | < [ \t]* /? [ \t]* (?:{_NAMES}) [ \t]* /? [ \t]* >
  | <{{2}} [ \t]* /? [ \t]* sys [ \t]* >{{2}}
  | \[ [ \t]* /? [ \t]* (?:{_BRACKETED}) [ \t]* \]
    """,
    re.VERBOSE,
)
_THINKING = re.compile(
    r"< [ \t]* (?P<close>/)? [ \t]* (?:think|thinking|thought|reasoning) [ \t]* >"
    r"| \[ [ \t]* (?P<shut>/)? [ \t]* think [ \t]* \]",
    re.VERBOSE,
)
_BRACKETS = frozenset("<>[]|")
_NEW_LINE = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_ASCII_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
# Unicode's Default_Ignorable_Code_Point outside the category Cf, and the blank braille pattern.
_IGNORABLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0") | frozenset(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000)))
)
# Look-alikes that NFKC does not fold. Quotation marks and title brackets that languages really use are left out.
_LOOKS_LIKE = {
    **dict.fromkeys("⟨❮❬ᐸ˂≺", "<"),
    **dict.fromkeys("⟩❯❭ᐳ˃≻", ">"),
    **dict.fromkeys("│∣ǀ❘┃║￨׀", "|"),
    **dict.fromkeys("⁄∕╱⧸", "/"),
    **dict.fromkeys("▁‗ˍ", "_"),
}


def plain(text: str, limit: int) -> str:
    """Return a model's text without anything that a chat format, a terminal or a reader could trip over.

    Removed: control tokens of the usual chat formats (``<|…|>``, ``<s>``, ``[INST]``, ``<<SYS>>``,
    ``<start_of_turn>``, ``<tool_call>``, ``<think>``, …), also in full-width or look-alike letters; control characters
    except line break and tab; lone surrogates; every invisible character, such as zero-width and bidirectional ones.
    What is left is NFC-normalised and stripped. Removing can join two halves into a new token, so it is repeated until
    nothing is left to remove; calling this again changes nothing.

    Args:
        text: What the model wrote.
        limit: Most characters to return. A longer text ends with :data:`CUT`, inside the limit.

    Raises:
        ValueError: The limit leaves no room for one character and the mark.
    """
    if limit <= len(CUT):
        raise ValueError(f"expected a limit of more than {len(CUT)} characters, got {limit}")
    clean = _clean(text[: limit * _SLACK])
    if len(clean) <= limit and len(text) <= limit * _SLACK:
        return clean
    return (clean[: limit - len(CUT)].rstrip() + CUT).strip()


def holds_control(text: str) -> bool:
    """Return whether a text holds a control token of a chat format, in any spelling."""
    return _TOKEN.search(_skeleton(_visible(text))[0]) is not None


def has_reasoning(text: str) -> bool:
    """Return whether a text holds the tag of a reasoning block, opening or closing."""
    return _THINKING.search(_skeleton(_visible(text))[0]) is not None


def without_reasoning(text: str) -> str:
    """Return a text without its reasoning blocks, stripped.

    ``<think>``, ``<thinking>``, ``<thought>``, ``<reasoning>`` and ``[THINK]`` blocks go with what they hold. A
    block that is never closed goes to the text's end; one that was opened before the text began (its closing
    tag stands alone) goes from the text's beginning. A text without such a tag is returned as it is.
    """
    if not has_reasoning(text):
        return text
    text = _visible(text)
    for _ in range(_MOST_PASSES):
        if not has_reasoning(text):
            return text.strip()
        text = _outside(text)
    skeleton, places = _skeleton(text)
    first = _THINKING.search(skeleton)
    return (text[: places[first.start()]] if first else text).strip()


def after_reasoning(text: str) -> str:
    """Return what follows the reasoning blocks that a text begins with; any other text is returned as it is."""
    rest = without_reasoning(text)
    return rest if rest and text.rstrip().endswith(rest) else text


def _outside(text: str) -> str:
    """Return what stands outside the reasoning blocks, nested ones included."""
    skeleton, places = _skeleton(text)
    kept: list[str] = []
    depth, start = 0, 0
    for tag in _THINKING.finditer(skeleton):
        closes = bool(tag["close"] or tag["shut"])
        if not closes:
            if not depth:
                kept.append(text[start : places[tag.start()]])
            depth += 1
        elif depth:
            depth -= 1
        else:  # closed but never opened: the block began before the text did
            kept = []
        start = places[tag.end()]
    return "".join(kept) if depth else "".join(kept) + text[start:]


def _clean(text: str) -> str:
    text = _visible(text)
    for _ in range(_MOST_PASSES):
        skeleton, places = _skeleton(text)
        kept, start = [], 0
        for token in _TOKEN.finditer(skeleton):
            kept.append(text[start : places[token.start()]])
            start = places[token.end()]
        if not start:  # no token was left
            return text.strip()
        text = _visible("".join(kept) + text[start:])
    return _visible("".join(c for c in text if not _BRACKETS & set(_fold(c)))).strip()


def _visible(text: str) -> str:
    """Return the text in NFC without control and invisible characters; every line break is a newline."""
    if text.isascii():
        return text if text.isprintable() else _ASCII_CONTROL.sub("", _NEW_LINE.sub("\n", text))
    text = _NEW_LINE.sub("\n", text)
    kept = "".join(c for c in text if _shows(c))
    # Drop first: an invisible character between a letter and its accent would keep the two from being composed.
    return unicodedata.normalize("NFC", kept)


@functools.lru_cache(maxsize=8192)
def _shows(char: str) -> bool:
    if char in "\n\t":
        return True
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs") and char not in _IGNORABLE


def _skeleton(text: str) -> tuple[str, range | list[int]]:
    """Return the text as it looks at a glance, and for each of its letters the place in the text.

    Folding may turn one character into several letters, so a match in the skeleton has to be mapped back.
    """
    if text.isascii():
        return text.lower(), range(len(text) + 1)
    letters: list[str] = []
    places: list[int] = []
    for at, char in enumerate(text):
        folded = _fold(char)
        letters.append(folded)
        places += [at] * len(folded)
    return "".join(letters), [*places, len(text)]


@functools.lru_cache(maxsize=8192)
def _fold(char: str) -> str:
    folded = unicodedata.normalize("NFKC", char)
    return "".join(_LOOKS_LIKE.get(c, c) for c in folded).casefold()
