"""The NLI judge: a sequence classifier trained on natural language inference looks for contradictions.

Every sentence of the persona (or every recent line it said) is a premise, the reply is the hypothesis, and the
likeliest contradiction counts (as in Dialogue NLI, Welleck et al., arXiv 1811.00671, where persona sentences are the
premises). The model runs in this process; code that comes with a model is never run. What only *looks* consistent to
such a model (silence, copies, repetitions) is scored by rule first.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.parsing import spoken
from ppg_gym.extras import need
from ppg_gym.judges.rules import apply_rules, persona_sentences
from ppg_gym.nearest import refuse_unknown
from ppg_gym.options import one_of, whole, wrong

METRICS = ("prompt-to-line", "line-to-line", "both")
SCALES = ("graded", "binary")
_WHOSE = "judge_options"
_DEFAULTS: dict[str, Any] = {
    "model": None, "device": None, "batch_size": 32, "metric": METRICS[0], "scale": SCALES[0], "max_premises": 64,
    "window": 8,
}  # fmt: skip
_OFFSET = frozenset(("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "mpnet", "longformer"))
"""Model types whose positions start after the padding index, which leaves two fewer for tokens."""

_GIVE = "give a classifier that is trained on natural language inference"
_PROBE_SECONDS = 10.0

Pair = tuple[str, str]


class _Classifier(NamedTuple):
    """A loaded model.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        contradiction: Index of the label.
        limit: Most tokens of a pair.
        device: Where the model is.
    """

    model: Any
    tokenizer: Any
    contradiction: int
    limit: int
    device: Any


class _Finding(NamedTuple):
    """What the model says about one pair: the contradiction's probability, and whether no label is likelier."""

    probability: float
    likeliest: bool


class NLIJudge:
    """Judges by contradiction: 1 less the probability of the likeliest one.

    Options: ``model`` (a folder or a name on the Hugging Face hub, required), ``device`` (None: cuda where there is
    one, else cpu), ``batch_size`` (32 pairs), ``metric`` (``prompt-to-line``: against every sentence of the persona;
    ``line-to-line``: against the persona's earlier lines; ``both``), ``scale`` (``graded``; ``binary``: 0 when
    contradiction is the likeliest label for any premise, else 1), ``max_premises`` (64 sentences of a longer persona:
    those that share most words with the reply, rare words counting more), ``window`` (8 earlier lines that a reply is
    compared with).

    Args:
        domain: Name of the domain; the judge is the same in all of them.
        options: See above.

    Raises:
        ValueError: An option is not what it should be, or the model is no NLI classifier.
        ModuleNotFoundError: torch or transformers is missing.
    """

    waits = False

    def __init__(self, domain: str, options: Mapping[str, Any]) -> None:
        refuse_unknown(_WHOSE, options, _DEFAULTS)
        chosen = {**_DEFAULTS, **options}
        for name, known in (("metric", METRICS), ("scale", SCALES)):
            one_of(_WHOSE, name, chosen[name], known)
        for name in ("batch_size", "max_premises", "window"):
            whole(_WHOSE, name, chosen[name])
        if not isinstance(chosen["model"], str) or not chosen["model"]:
            raise wrong(_WHOSE, "model", "a folder or the name of a model on the hub", chosen["model"])
        if chosen["device"] is not None and not isinstance(chosen["device"], str):
            raise wrong(_WHOSE, "device", "a text or None", chosen["device"])
        self.domain = domain
        self._metric, self._scale = chosen["metric"], chosen["scale"]
        self._batch_size, self._max_premises = chosen["batch_size"], chosen["max_premises"]
        self._window = chosen["window"]
        self._classifier = _load(chosen["model"], chosen["device"])

    def check(self, persona: Persona) -> None:
        """Refuse a persona that gives no premise.

        Raises:
            ValueError: The instruction holds no sentence about the persona.
        """
        if self._metric != "line-to-line" and not persona_sentences(persona.instruction):
            raise ValueError(
                f"the nli judge expected a persona with at least one sentence, persona {persona.id!r} has none;"
                ' write its instruction, or judge with metric="line-to-line"'
            )

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation; all their pairs go through the model together."""
        verdicts, open_ = apply_rules(conversations)
        premises = {i: self._premises(conversations[i]) for i in open_}
        pieces = {i: self._pieces(conversations[i].lines[-1].text) for i in open_}
        pairs = {i: [(premise, piece) for premise in premises[i] for piece in pieces[i]] for i in open_}
        findings = self._classify(sorted({pair for group in pairs.values() for pair in group}))
        for i in open_:
            verdicts[i] = self._verdict([(pair, findings[pair]) for pair in pairs[i]])
        return [verdict for verdict in verdicts if verdict is not None]

    def _premises(self, conversation: Conversation) -> list[str]:
        """Return what the newest reply is compared with."""
        chosen: list[str] = []
        if self._metric != "line-to-line":
            chosen += self._nearest(persona_sentences(conversation.persona.instruction), conversation.lines[-1].text)
        if self._metric != "prompt-to-line":
            chosen += [line for line in conversation.said()[-1 - self._window : -1] if spoken(line)]
        return list(dict.fromkeys(chosen))

    def _nearest(self, sentences: Sequence[str], reply: str) -> Sequence[str]:
        if len(sentences) <= self._max_premises:
            return sentences
        words = [set(spoken(sentence)) for sentence in sentences]
        common = Counter(word for sentence in words for word in sentence)
        reply_words = set(spoken(reply))
        shared = [sum(1 / common[word] for word in reply_words & sentence) for sentence in words]
        order = sorted(range(len(sentences)), key=lambda i: -shared[i])[: self._max_premises]
        return [sentences[i] for i in sorted(order)]

    def _pieces(self, reply: str) -> list[str]:
        """Return the reply, or halves of it until each fits into half of the model's length."""
        words = reply.split()
        tokens = self._classifier.tokenizer(reply, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) <= self._classifier.limit // 2:
            return [reply]
        if len(words) < 2:  # one endless word: its characters are halved
            return self._pieces(reply[: len(reply) // 2]) + self._pieces(reply[len(reply) // 2 :])
        half = len(words) // 2
        return self._pieces(" ".join(words[:half])) + self._pieces(" ".join(words[half:]))

    def _classify(self, pairs: Sequence[Pair]) -> dict[Pair, _Finding]:
        """Return what the model says about every pair; pairs of similar length share a batch, to save padding."""
        torch = need("torch", "nli")
        model, tokenizer, contradiction, limit, device = self._classifier
        order = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        findings: dict[Pair, _Finding] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            encoded = tokenizer(
                [premise for premise, _ in batch],
                [reply for _, reply in batch],
                truncation="only_first",
                max_length=limit,
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                logits = model(**encoded.to(device)).logits.float()
            probabilities = logits.softmax(-1)[:, contradiction].tolist()
            likeliest = (logits.argmax(-1) == contradiction).tolist()
            findings.update(zip(batch, map(_Finding, probabilities, likeliest), strict=True))
        return findings

    def _verdict(self, findings: Sequence[tuple[Pair, _Finding]]) -> Verdict:
        if not findings:
            return Verdict("scored", 1.0, "There is no earlier line that the reply could contradict.")
        if not all(math.isfinite(finding.probability) for _, finding in findings):
            return Verdict("error", None, "The NLI model gave logits that are not finite.")
        (premise, _), worst = max(findings, key=lambda item: item[1].probability)
        score = 1.0 - worst.probability
        if self._scale == "binary":
            score = 0.0 if any(finding.likeliest for _, finding in findings) else 1.0
        quoted = premise if len(premise) <= 80 else premise[:79] + "…"
        why = f"The likeliest contradiction ({worst.probability:.2f}) is with {quoted.rstrip('.!?')!r}."
        return Verdict("scored", min(max(score, 0.0), 1.0), why)


@functools.lru_cache(maxsize=4)
def _load(name: str, device: str | None) -> _Classifier:
    torch = need("torch", "nli")
    transformers = need("transformers", "nli")
    where = f"judge_options['model'] = {name!r}"
    if Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists():
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            got = "no config.json in it" if folder.is_dir() else "no such folder"
            raise ValueError(f"{where}: expected a folder with a Hugging Face model, got {got}; check the path")
        name = str(folder)
    else:
        name = _on_hub(name, where)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        contradiction = _contradiction(config.id2label or {}, where)
        if not any("ForSequenceClassification" in kind for kind in config.architectures or ()):
            raise ValueError(f"{where}: expected a sequence classifier, got {config.architectures}; {_GIVE}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ImportError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: expected a model that transformers can load, got {type(error).__name__}: {first};"
            " give the folder of a downloaded NLI classifier, or a name on the hub with network access"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[:3]
        raise ValueError(f"{where}: expected weights for the whole classifier, got none for {missing}; {_GIVE}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    positions -= 2 if config.model_type in _OFFSET else 0
    limit = min(positions, int(tokenizer.model_max_length))
    return _Classifier(model.eval().to(place), tokenizer, contradiction, limit, place)


def _on_hub(name: str, where: str) -> str:
    """Return the hub's name, or the cached folder when the hub does not answer.

    The hub is asked once, with a short timeout; transformers itself would try each file for most of a minute.
    """
    hub = need("huggingface_hub", "nli")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_PROBE_SECONDS)
    except Exception as error:  # what a failed connection raises differs between versions of the hub's client
        malformed = isinstance(error, hub.errors.HFValidationError)
        cached = None if malformed else hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: expected a folder, or a name on the hub that can be reached, got {type(error).__name__}:"
            f" {first}; give the folder of a downloaded NLI classifier"
        ) from error
    return name


def _contradiction(id2label: Mapping[Any, str], where: str) -> int:
    """Return the index of the contradiction label.

    Raises:
        ValueError: The labels are not those of natural language inference.
    """
    names = {int(index): re.sub(r"[^a-z]", "", str(label).lower()) for index, label in id2label.items()}
    places = [index for index, name in names.items() if name in ("contradiction", "contradicts", "contradictory")]
    if len(places) != 1 or not any(name in ("entailment", "entails", "entailed") for name in names.values()):
        raise ValueError(
            f"{where}: expected labels named contradiction and entailment in the config's id2label, got"
            f" {list(id2label.values())}; {_GIVE}, or write its label names into config.json"
        )
    return places[0]
