"""A run as one HTML page: the data goes in as JSON, and the page's own script builds everything from it.

The page uses no network, and its content security policy enforces that: it allows only the script and the style sheet
whose hashes it lists. No text from a run ever becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ppg_agents.config import settings as configs
from ppg_agents.config.parsing import flatten
from ppg_agents.config.settings import TrainConfig
from ppg_agents.credit import PolicyClass
from ppg_agents.horizon.choice import default_candidates, named
from ppg_agents.inspect import method, tokens
from ppg_agents.inspect.sample import pairs
from ppg_agents.inspect.source import Conversation, HeldOut, Source, read, status
from ppg_agents.inspect.text import right_to_left, script_json
from ppg_agents.inspect.tokens import Vocabulary
from ppg_agents.runs.curve import WATCHED, watched_points
from ppg_agents.runs.files import replace, writing

SCRIPTS = (
    *("dom.js", "charts.js", "conversation.js", "state.js", "overview.js", "pairs.js", "filters.js", "browse.js"),
    "page.js",  # last: it starts the page
)
MOST_PAIRS = 50
LOG_PROB_SCALE = 1000
"""The page stores log-probs as whole numbers, in minus thousandths of a nat."""


def write_page(path: Path, out: Path | None = None, *, conversations: int, tokenizer: str | None = None) -> Path:
    """Write the page of a run or of a file of trajectories.

    Args:
        path: The run folder or the file.
        out: Where to write the page; default ``report.html`` in the run folder, or beside the file, named after it.
        conversations: The most to show; see `sample.sample`.
        tokenizer: ``tiny``, a run or a folder with the tokenizer to use; default the run's own.

    Returns:
        The page's path.

    Raises:
        RunError: The path is neither a run nor a file of trajectories, or the page cannot be written.
        ValueError: A line is damaged, or ``tokenizer`` names a place without one.
    """
    source = read(path, conversations)
    out = out or (path / "report.html" if source.config else path.with_suffix(".html"))
    text = html(data(source, tokenizer))
    with writing(out, "{todo}, or change --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, text)
    return out


def html(content: Mapping[str, Any]) -> str:
    """Return the page that shows what `data` returned."""
    files = resources.files("ppg_agents.inspect")
    style = files.joinpath("page.css").read_text(encoding="utf-8")
    scripts = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f"(() => {{\n'use strict';\n{scripts}\n}})();"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": script_json(content)}
    template = files.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: inserted text is not scanned


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def data(source: Source, tokenizer: str | None = None) -> dict[str, Any]:
    """Return everything the page shows as plain JSON; `text.shown` still has to make its texts visible.

    Raises:
        ValueError: ``tokenizer`` names a place without one.
    """
    config, notes = source.config, list(source.notes)
    vocabulary = _vocabulary(source, tokenizer, notes)
    shown, held_out = source.all, source.held_out
    learned_with = own_classes(config, source.metrics, [c.iteration for c in shown])
    n = max(source.turns, *(c.turns or 0 for c in learned_with), 1)
    compared = classes(learned_with, n)
    position = {rows: i for i, rows in enumerate(compared)}
    index = {planning: position[counted(planning, n)] for planning in set(learned_with)}
    read_by_agent = config is not None and method.reads_credit(config)
    return {
        "name": source.name,
        "about": about(config),
        "kind": "run" if config else "file",
        "offline": source.offline,
        "facts": facts(config),
        "settings": [[k, str(value)] for k, value in (flatten(configs.to_dict(config)) if config else {}).items()],
        "notes": notes,
        "counts": {
            "conversations": source.counts.conversations,
            "turns": source.counts.turns,
            "truncated": source.counts.truncated,
            "empty": source.counts.empty,
            "statuses": source.counts.statuses.most_common(),
            "partners": source.counts.partners.most_common(),
        },
        "n": n,
        "discount": config.discount if config else 1.0,
        "baseline": method.baseline(config) if config else None,
        "agent_note": method.note(config) if config else "",
        "classes": [{"label": planning.label, **asdict(rows)} for rows, planning in compared.items()],
        "auto": read_by_agent and config is not None and config.policy_class == "auto",
        "own": index[learned_with[-1]] if read_by_agent else None,
        "tokens": vocabulary.texts if vocabulary else None,
        "control": sorted(vocabulary.control) if vocabulary else [],
        "metrics": _metrics(source),
        "watched": [{"name": WATCHED[key], "points": points} for key, points in watched_points(source.metrics).items()],
        "evaluations": evaluations(source.evaluations),
        "conversations": [
            {**_conversation(c, vocabulary), "own": index[planning] if read_by_agent else None}
            for c, planning in zip(shown, learned_with, strict=False)
        ],
        "pairs": held_out_pairs(source) or early_and_late(source.shown)[:MOST_PAIRS],
        "changes": changes(held_out) if held_out else None,
    }


def held_out_pairs(source: Source) -> list[tuple[int, int]]:
    """Return the positions of the held-out pairs among all conversations."""
    first = len(source.shown)
    return [(first + 2 * k, first + 2 * k + 1) for k in range(len(source.held_out.pairs if source.held_out else ()))]


def changes(held_out: HeldOut) -> dict[str, Any]:
    """Return how the held-out pairs changed: how many there are, the mean change, how many rose, fell or stayed."""
    change = np.round(held_out.changes, 9)
    return {
        "pairs": len(change),
        "mean": float(change.mean()) if len(change) else None,
        "up": int((change > 0).sum()),
        "same": int((change == 0).sum()),
        "down": int((change < 0).sum()),
    }


def early_and_late(shown: Sequence[Conversation]) -> list[tuple[int, int]]:
    """Return the first and last conversation of every persona met at different times, farthest apart first."""
    return pairs([(c.trajectory.persona, _time(c)) for c in shown])


def _time(conversation: Conversation) -> int:
    if conversation.iteration is not None:
        return conversation.iteration
    return max((turn.policy_version for turn in conversation.trajectory.turns), default=0)


def own_classes(
    config: TrainConfig | None, metrics: Sequence[Mapping[str, Any]], iterations: Sequence[int | None]
) -> list[PolicyClass]:
    """Return the policy class used to learn from each conversation, and at the end the run's last one.

    Args:
        config: The settings; None means full planning.
        metrics: Hold the choices of a run with the policy class ``auto``.
        iterations: One per conversation.
    """
    if config is None:
        return [PolicyClass()] * (len(iterations) + 1)
    if config.policy_class != "auto":
        return [config.policy_class] * (len(iterations) + 1)
    chosen = {
        int(m["iteration"]): named(str(m["horizon_class"]), config.auto.classes)
        for m in metrics
        if m.get("horizon_class")
    }
    classes = []
    for iteration in (*iterations, max(chosen, default=0)):
        before = [i for i in chosen if i <= (iteration or 0)]
        classes.append(chosen[max(before)] if before else PolicyClass())
    return classes


@dataclass(frozen=True)
class Counted:
    """What counts for each of n replies, without storing an n × n mask; turns from 0.

    Attributes:
        ends: R_t ends before ``ends[t]``.
        weights: ``weights[t][d]`` is the weight of reward t + d, up to ``ends[t]``; None if each counts once.
    """

    ends: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...] | None = None


def classes(own: Sequence[PolicyClass], n: int) -> dict[Counted, PolicyClass]:
    """Return the policy classes to compare, including those in use; full planning comes last.

    If no segment class is in use, one of two halves is added.
    """
    halves = [PolicyClass("segment", segments=((n + 1) // 2, n // 2))] if n > 3 else []
    distinct: dict[Counted, PolicyClass] = {}
    for planning in (*own, *default_candidates(n), *(halves if not any(c.segments for c in own) else ())):
        distinct.setdefault(counted(planning, n), planning)
    last = counted(PolicyClass("full"), n)
    return dict(
        sorted(distinct.items(), key=lambda item: (item[0] == last, item[1].steps(n) is None, sum(item[0].ends)))
    )


def counted(planning: PolicyClass, n: int) -> Counted:
    """Return what a policy class counts for each of n replies.

    Raises:
        ValueError: It is made for another number of turns, or its function cannot be loaded.
    """
    k = planning.steps(n)
    if k is not None:
        return Counted(tuple(min(t + k, n) for t in range(n)))
    if planning.segments is not None:
        planning.check(n)
        return Counted(tuple(int(end) for end in np.repeat(np.cumsum(planning.segments), planning.segments)))
    mask = planning.mask(n)
    ends = [int(max(np.flatnonzero(row), default=t - 1)) + 1 for t, row in enumerate(mask)]
    weights = tuple(tuple(map(float, mask[t, t:end])) for t, end in enumerate(ends))
    return Counted(tuple(ends), weights if any(w != 1 for row in weights for w in row) else None)


def facts(config: TrainConfig | None) -> list[tuple[str, str]]:
    """Return the settings that a reader wants to know."""
    if config is None:
        return []
    env, files = config.env, ", ".join(Path(file).name for file in config.offline.files)
    played = [("Partner", env.partner), ("Judge", env.judge)] if env.is_persona_chat else []
    played.append(("Temperature", f"{config.sampling.temperature:g}"))
    where = ("Domain" if env.is_persona_chat else "Environment", config.world)
    return [
        ("Dialogues", files) if files else where,
        ("Policy class", config.label if method.reads_credit(config) else "no credit is read"),
        ("Model", config.model),
        ("Learner", config.agent),
        *([] if files else [("Conversations per step", str(config.batch)), *played]),
        ("Discount", f"{config.discount:g}"),
        ("Baseline", method.baseline(config) or ("the agent's own" if method.reads_credit(config) else "none")),
        ("Learning rate", f"{config.learning_rate:g}, {config.schedule}"),
        ("Seed", str(config.seed)),
    ]


def about(config: TrainConfig | None) -> list[str]:
    """Return what goes beside the page's title: the world, the agent unless it is the default one, the policy class."""
    if config is None:
        return []
    (_, where), (_, planning), *_ = facts(config)
    return [where, *([config.learner] if config.learner else []), planning]


def _vocabulary(source: Source, named: str | None, notes: list[str]) -> Vocabulary | None:
    ids = {i for c in source.all for i in c.trajectory.token_ids()}
    place = tokens.folder(source, named)
    if not ids:
        return None
    if place is None:
        why = "the run has no checkpoint" if source.config else "a file names no model; give --tokenizer"
        notes.append(f"Tokens are shown as numbers: {why}.")
        return None
    return tokens.read(place, ids)


def _metrics(source: Source) -> dict[str, Any]:
    key = "weighted_token_log_prob" if source.offline else "consistency"
    points = [(m["iteration"], m[key]) for m in source.metrics if m.get(key) is not None]
    lost = [(m["iteration"], m["judge_failures"]) for m in source.metrics if m.get("judge_failures")]
    return {"key": key, "points": points, "lost": lost}


def evaluations(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return held-out results in order of iteration, each with its name as ``when``."""
    results = [{"when": when, **result} for when, result in stored.items() if isinstance(result, Mapping)]
    return sorted(results, key=lambda result: (int(result.get("iteration") or 0), result["when"] != "before"))


def _conversation(conversation: Conversation, vocabulary: Vocabulary | None) -> dict[str, Any]:
    trajectory = conversation.trajectory
    return {
        "number": conversation.number,
        "held": conversation.held_out,
        "iteration": conversation.iteration,
        "persona": trajectory.persona,
        "instruction": trajectory.instruction,
        "domain": trajectory.domain,
        "partner": trajectory.partner_status,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "turns": [
            {
                "message": str(turn.message),
                "reply": str(turn.reply),
                "prompt": turn.prompt_ids,
                "tokens": turn.token_ids,
                "logs": [round(-LOG_PROB_SCALE * p) if np.isfinite(p) else None for p in turn.log_probs],
                "inline": _reads_the_same(turn.token_ids, str(turn.reply), vocabulary),
                "reward": turn.reward,
                "status": status(turn),
                "kind": str(turn.verdict.get("kind") or ""),
                "why": str(turn.verdict.get("rationale") or ""),
                "version": turn.policy_version,
            }
            for turn in trajectory.turns
        ],
    }


def _reads_the_same(ids: Sequence[int], reply: str, vocabulary: Vocabulary | None) -> bool:
    """Return whether the tokens, joined, spell the reply and can be shown in its place."""
    if vocabulary is None or right_to_left(reply):
        return False
    return "".join(vocabulary.texts[i] for i in ids if i not in vocabulary.control).strip() == reply.strip()
