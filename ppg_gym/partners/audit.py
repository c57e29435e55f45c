"""What can be wrong with a line that a language model says as the partner.

Pure functions over text: no model, no random number, no state. A line is checked and never repaired, except that the
speaker's own label in front of it ("Therapist: …") is not counted as part of it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from ppg_gym.conversation import Conversation
from ppg_gym.sanitise import has_reasoning, holds_control, plain

FAULTS = (
    "leaked_reasoning",
    "empty",
    "too_long",
    "meta",
    "speaks_for_both",
    "role_flip",
    "early_farewell",
    "repetition",
)
LONGEST = 16_000  # characters that are checked
WINDOW = 6  # the partner's own lines that a new one may not repeat
ALIKE = 0.8  # two lines that share at least this much of their words, in order, count as the same
TIMES = 3  # a sentence that comes this often in one line is a loop
SHORT = 12  # words; a shorter line is a repetition only when it is word for word the same


@dataclass(frozen=True)
class Roles:
    """Who speaks to whom.

    Attributes:
        own: Labels of the partner, in any case: "therapist".
        other: Labels of the policy's role: "patient", or the persona's name.
        kinds: Nouns of the policy's role, which the partner never calls itself; names do not belong here.
        names: The persona's names, which the partner never calls itself.
        flips: Regular expressions for what only the policy's role says about itself.
    """

    own: tuple[str, ...]
    other: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    flips: tuple[str, ...] = ()


def audit(line: str, conversation: Conversation, roles: Roles, max_words: int = 120) -> str:
    """Return what is wrong with a partner's next line: one of :data:`FAULTS`, or ``ok``.

    Stage directions ("(nods)") are fine as long as something is said beside them. A line of the partner is always
    followed by a reply, so every farewell comes too early, and so does a word that stands for the end of a conversation
    ("STOP", "<END>"), glued to the line or not.

    Args:
        line: The line as the model gave it.
        conversation: The conversation before the line.
        roles: Who speaks to whom.
        max_words: Most words of a line.
    """
    if has_reasoning(line) or _PLANNING.search(line):
        return "leaked_reasoning"
    if stops(line):
        return "early_farewell"
    if holds_control(line) and plain(line, LONGEST) not in line:  # a token at the end alone is harmless
        return "speaks_for_both"
    if _HALF_TOKEN.search(line[-_TAIL:]):
        return "meta"
    spoken = own_words(line, roles).translate(_APOSTROPHES)
    if not _speaks(spoken):
        return "empty"
    if len(spoken.split()) > max_words or len(spoken) > 12 * max_words:
        return "too_long"
    if any(pattern.search(spoken) for pattern in _META):
        return "meta"
    if fault := _voices(spoken, roles):
        return fault
    unquoted = _QUOTED.sub('""', spoken)
    if _flips(unquoted, roles):
        return "role_flip"
    if any(_farewell(sentence) for sentence in _sentences(unquoted)):
        return "early_farewell"
    return "repetition" if _repeats(spoken, conversation) else "ok"


def stops(line: str) -> bool:
    """Return whether a line ends with, or consists of, a sign that the conversation is over.

    Such a sign is a stop word in brackets, stars or number signs, in any case ("<END>", "[end of conversation]",
    "###STOP###"), or one in capitals that stands alone, behind a sign of punctuation, or glued to a word.
    """
    tail = line.strip()[-_TAIL:]  # more is never needed, and the patterns take long over a long row of signs
    text = _TRAILING_TOKENS.sub("", tail).rstrip(" \t\n\"'”’")
    if _MARKED_STOP.search(text):
        return True
    bare = _BARE_STOP.search(text)
    return bare is not None and bare["stop"].isupper()


def own_words(line: str, roles: Roles) -> str:
    """Return a line as plain text, without the speaker's own label and without quotes around the whole."""
    text = _patterns(roles).own_label.sub("", plain(line, LONGEST).strip(), count=1).strip()
    for left, right in ('""', "“”"):
        inside = text[1:-1]
        if text[:1] == left and text[-1:] == right and inside and not {left, right} & set(inside):
            text = inside.strip()
    return text


_TAIL = 120
_MEETING = r"(?:conversation|conv|chat|session|dialog(?:ue)?|lesson|class|scene|discussion|interview|transcript|turn)"
_STOP = (
    rf"(?:(?:the[\s_-]+)?{_MEETING}[\s_-]+(?:is[\s_-]+|has[\s_-]+)?)?"
    r"(?:stop|end|ends|ended|over|done|exit|quit|finish|finished|terminate|terminated|eos|eot|eoc|eom|bye|goodbye)"
    rf"(?:[\s_-]+(?:of[\s_-]+)?(?:the[\s_-]+)?{_MEETING})?"
)
_MARKED_STOP = re.compile(
    rf"(?:<+[\s|/]*|\[+[\s/]*|\{{+\s*|\(+\s*|\*+\s*|#+\s*|=+\s*|-{{2,}}\s*|_{{2,}}){_STOP}"
    r"[\s.!]*(?:[|/\s]*>+|\]+|\}+|\)+|\*+|#+|=+|-{2,}|_{2,})[.!]*$",
    re.IGNORECASE,
)
_BARE_STOP = re.compile(
    rf"(?:^|[^\w\s'’]\s*|\n|(?-i:(?<=[a-z0-9à-ÿ])))(?P<stop>{_STOP}(?:\W+{_STOP})*)[.!]*$", re.IGNORECASE
)
_TRAILING_TOKENS = re.compile(r"(?:\s*<\|[^<>\n]{0,40}\|?>?|\s*</?s>)+$")
_HALF_TOKEN = re.compile(r"<\|\w*\|?\s*$")
_APOSTROPHES = str.maketrans("‘’", "''")
_WORD = re.compile(r"(?<!\w)[^\W\d_]+")
_FEW = 8  # tokens; in a shorter line, signs between the words prove nothing
_DIRECTIONS = re.compile(r"\*[^*\n]+\*|\([^()\n]+\)|\[[^\[\]\n]+\]")
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w))+'(?!\w)")
# A sentence may be glued to the next: "Nice!Goodbye."
_SENTENCE = re.compile(r"(?<=[.!?…])[\"”)*]*\s+|(?<=[!?…])(?=[^\W\d_])|(?<=[a-z][.])(?=[A-Z])|\n+")

# A model that plans aloud talks about the user, or about what it has to reply.
_PLANNING = re.compile(
    r"<\|channel\|>\s*(?:analysis|commentary)|^\W*(?:(?:okay|ok|alright|hmm|so|well)[,.…]*\s+)?(?:"
    r"the user\b|we (?:need|have|should) to (?:respond|reply|answer|produce|write|continue|play)\b"
    r"|i (?:need|have|should|must) (?:to )?(?:respond|reply|write|continue|play|act|stay in character)\b"
    r"|let me (?:think about (?:how|what) to|craft|draft|write) \b|(?:analysis|thinking|reasoning|thought)\s*:)",
    re.IGNORECASE,
)
_A_MODEL = r"(?:ai|a\.i\.|artificial intelligence|language model|chat ?bot|virtual assistant|computer program)"
_META = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\bas an? (?:large )?{_A_MODEL}(?:\s*[,.;!]|\s+(?:language|model|assistant|chat ?bot|system)\b|\s+i\b)",
        rf"\bi(?:'m| am) (?:just |only |actually |not )?(?:an? )?(?:large )?{_A_MODEL}"
        r"(?:\s*[,.;!?]|\s*$|\s+(?:language|model|assistant|chat ?bot|system|and|so|but|without|trained|here)\b)",
        r"\b(?:system|original|given) prompt\b|\bmy (?:programming|training data|knowledge cut-?off)\b",
        r"\bi (?:was|'ve been|have been|am|was being) (?:instructed|prompted|asked|programmed|told) to"
        r" (?:play|act|respond|reply|speak|roleplay|role-play|stay|portray)\b",
        r"\b(?:stay|staying|remain|break|breaking) (?:in|out of) (?:character|role)\b|\bout of character\b",
        r"\b(?:the|these|those|my|your) instructions? (?:say|says|state|states|above|given|tell|require)\b",
        r"\b(?:please |now )?(?:respond|reply|answer|continue|write) (?:only )?(?:as|in the (?:voice|role) of) "
        r"(?:the |an? )?(?:[A-Z]\w+|therapist|patient|teacher|student|partner|character|persona)\b",
        r"\b(?:respond|answer|reply) in the space provided\b|\b(?:submit|enter|post) your response\b",
        r"\bword count\b|\bend of (?:the )?(?:response|transcript)\b",
        r"\b(?:score|rating|verdict|reward) (?:of|for|on) (?:this|that|the|your) (?:reply|response|turn|persona)\b"
        r"|\bconsistency score\b|\bpersona (?:description|instruction|profile|consistency)s?\b",
        r"^\W*(?:sure|certainly|of course|okay)\b[^.?\n]{0,20}\bhere(?:'s| is) (?:the|my|a|an) "
        r"[^.!?\n]{0,30}\b(?:response|reply|line|message|turn)\b",
        r"^\W*here(?:'s| is) (?:the|my|a) [^.!?\n]{0,30}\b(?:response|reply|line|message|turn)\b[^.!?\n]{0,30}:",
        r"[\[<{][^\]>}\n]*\b(?:name|insert|placeholder|your response)\b[^\]>}\n]*[\]>}]",
        r"[(\[*]\s*note\s*:",
    )
)

_TITLE = r"(?:'s?\s+(?:response|reply|line|turn|answer|message))?\s*(?:\([^)\n]*\))?[\s*_]*:"
_OPENERS = r"[\s(\[*_\"“>#-]*"
_ALWAYS_OWN = ("assistant",)
_ALWAYS_OTHER = ("user", "human")


@dataclass(frozen=True)
class _Patterns:
    own_label: re.Pattern[str]
    starts_as_other: re.Pattern[str]
    second_voice: re.Pattern[str]
    claims: tuple[re.Pattern[str], ...]


@functools.lru_cache(maxsize=4096)
def _patterns(roles: Roles) -> _Patterns:
    own = _any((*roles.own, *_ALWAYS_OWN))
    other = _any((*roles.other, *_ALWAYS_OTHER))
    claims = []
    if roles.kinds:
        kind = _any(roles.kinds)
        claims += [
            rf"\bas (?:a|an|your|the) (?:\w+ )?{kind}\b(?:\s*,)?\s+(?:i|my)\b",
            rf"\bi(?:'m| am) (?:just |only )?(?:a|an|your|the) (?:\w+ )?{kind}\b(?! of\b)",
        ]
        role = _any(roles.own)
        claims += [
            rf"^\W*{role},\s",
            rf"\b(?:thank you|thanks|yes|no|okay|ok|sure|hello|hi|good (?:morning|afternoon|evening)|please|sorry),?"
            rf" {role}\b\s*(?:[,.!?]|$)",
            rf"^[^,\n]*,\s+{role}[.!?]*$",
        ]
    if roles.names:
        name = _any(roles.names)
        claims += [rf"\bmy name(?:'s| is) {name}\b", rf"^\W*(?:\w+[,!]? ){{0,2}}i(?:'m| am) {name}\b(?!'s)"]
    return _Patterns(
        own_label=re.compile(rf"^{_OPENERS}{own}{_TITLE}[\s*_]*", re.IGNORECASE),
        starts_as_other=re.compile(rf"^{_OPENERS}{other}{_TITLE}", re.IGNORECASE),
        second_voice=re.compile(rf"(?:\n|[.!?…]){_OPENERS}(?:{own}|{other}){_TITLE}", re.IGNORECASE),
        claims=tuple(re.compile(text, re.IGNORECASE) for text in (*claims, *roles.flips)),
    )


def _any(words: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")"


def _speaks(line: str) -> bool:
    """Return whether there are words besides stage directions, and not mostly rows of signs."""
    words = _DIRECTIONS.sub("", line)
    tokens = words.split()
    signs = sum(not any(map(str.isalnum, token)) for token in tokens)
    return _WORD.search(words) is not None and 2 * signs <= max(len(tokens), _FEW)


def _voices(line: str, roles: Roles) -> str:
    """Return the fault of a line that has somebody else's label in it, or ""."""
    patterns = _patterns(roles)
    if patterns.second_voice.search(line):
        return "speaks_for_both"
    return "role_flip" if patterns.starts_as_other.search(line) else ""


def _flips(unquoted: str, roles: Roles) -> bool:
    claims = _patterns(roles).claims
    return any(claim.search(sentence) for sentence in _sentences(unquoted) for claim in claims)


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE.split(text) if sentence]


_NICE = r"(?:great|good|nice|wonderful|lovely|pleasant|fantastic|beautiful|safe|restful|peaceful)"
_LEAVING = re.compile(
    r"^\W*(?:(?:well|ok|okay|alright|all right|so|and|then|for now|thank you|thanks)\b[^\w]*)*(?:"
    r"(?:good[- ]?bye|bye(?:[- ]bye)?|farewell|so long)(?:\s+(?:for now|then|and)\b.*|\s*[,.!…—-].*|\s+\w+\s*[.!]*)?$"
    r"|(?:i(?:'ll| will|'d love to| hope to)?|we(?:'ll| will)?)?\s*(?:see|talk to|catch|speak to) you(?: again)?\s+"
    r"(?:soon|later|tomorrow|then|around|next \w+|(?:in|at) (?:our|the|your) next \w+|on \w+day|this \w+)"
    r"\s*(?:[,;.!…—-].*)?$"
    r"|(?:let's |let us |please )?(?:keep|stay) in touch\W*$|best wishes\b[^?]*$"
    r"|(?:i |i'm |i am |we )?look(?:ing)? forward to"
    r" (?:our next|seeing you|(?:talking|speaking) (?:to|with) you)\b[^?]*$"
    r"|until (?:next time|then|we meet again|our next)\b[^?]*$"
    r"|take (?:good )?care(?: of yourself)?(?:\s*[,!.]|\s+and\b|$)[^?]*$"
    rf"|(?:have|enjoy) (?:an? |the )?(?:very )?(?:{_NICE}|amazing|rest)\b[^?]*"
    r"\b(?:day|evening|night|week|weekend|afternoon|morning|time)\b[^?]*$"
    r"|(?:class|session|lesson) (?:is )?(?:dismissed|adjourned|over)\b"
    r"|(?:that's|that is|that will be|that'll be) (?:all|it|enough) (?:(?:the time )?(?:we have )?(?:for )?)?"
    r"(?:today|now)\W*$"
    r")",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\b(?:let's|let us|we (?:can|should|could|will|must|need to|have to)|i(?:'d like| would like| want| have| need)"
    r" to|it's time to|time to)\s+(?:\w+ ){0,2}?(?:end|stop|close|conclude|finish|wrap up|adjourn)\b"
    r"(?: up)?\s*(?:(?:the|our|this|today's|things|it)\b\s*)?(?:(?:session|lesson|class|conversation|chat|discussion)\b"
    r"|(?:here|there|(?:for )?(?:today|now)|up)\b)(?! (?:with|by|on|of)\b)"
    r"|\b(?:our|the) (?:time|session|lesson|class|hour) (?:is|has come) (?:up|over|to an end|at an end)\b(?!\?)"
    r"|\bwe(?:'re| are| have) (?:run |running )?out of time\b"
    r"|\b(?:it's been|it was|it has been) (?:so |really |very )?(?:a )?(?:real )?"
    rf"(?:{_NICE}|pleasure|delight)(?: to)? (?:talk(?:ing)?|chat(?:ting)?|speak(?:ing)?) (?:to|with) you\b"
    r"|,\s*(?:good[- ]?bye|bye)\s*[!.]*$",
    re.IGNORECASE,
)


def _farewell(sentence: str) -> bool:
    """Return whether a sentence says goodbye or closes the meeting; talking about goodbyes does neither."""
    return bool(_LEAVING.search(sentence) or _CLOSING.search(sentence))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _repeats(line: str, conversation: Conversation) -> bool:
    """Return whether a line repeats what the partner said lately, what the policy has just said, or itself."""
    words = _words(line)
    sentences = Counter(" ".join(_words(sentence)) for sentence in _sentences(line))
    if any(times >= (TIMES if " " in sentence else 3 * TIMES) for sentence, times in sentences.items()):
        return True
    lately = [earlier.text for earlier in conversation.lines if earlier.speaker == "partner"][-WINDOW:]
    if any(_alike(words, _words(text)) for text in lately):
        return True
    heard = _words(conversation.lines[-1].text) if conversation.lines else []
    return len(heard) >= SHORT // 2 and _alike(words, heard)


def _alike(first: list[str], second: list[str]) -> bool:
    if first == second:
        return True
    if min(len(first), len(second)) < SHORT:
        return False
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE
