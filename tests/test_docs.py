"""The documentation is real: its examples run, its commands run or are parsed whole, its links and pictures are there.

What is done with a fenced block, by its language:

- ``python`` runs, each in a namespace of its own. A block that stands word for word in a file of ``examples/`` is left
  to the tests of the examples.
- ``bash``, ``console`` (lines that begin with ``$``) and every other block or indented line that begins with a known
  program: each command is parsed by its own parser (click's, argparse's, accelerate's), ``make`` targets and extras of
  ``pip install`` are looked up. A program that nobody here can check is an error.
- ``toml`` is read.

A comment in front of a block changes that: ``<!-- test: run -->`` runs its commands, small, in the page's folder;
``file NAME`` writes the block there first; ``continues`` keeps the last block's namespace; ``output`` compares the
block with what the last Python block printed; ``signature MODULE:CLASS`` compares a table with the arguments and
defaults of a class.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import glob
import importlib
import inspect
import io
import json
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch

from ppg_agents import agents, cli, commands, runs
from ppg_agents import config as configs
from ppg_gym.domain import DOMAINS
from ppg_gym.judges import JUDGES
from ppg_gym.partners import PARTNERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "envs/**/README.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = ("ppg-agent", "python", "make", "pip", "accelerate", "vllm", ".ci/run", ".venv/bin/python")
GRAMMAR = ("done", "for", "export", "do", "then", "{", "}")
VLLM = {"serve", "--enable-lora", "--max-lora-rank", "--port"}  # run for real in tests/vllm
FOREIGN = {"--logprobs-mode", "--enable-lora", "--port", "--latency", *VLLM}  # flags of others that the text names
MOST_BYTES = 300_000
ORDER = [
    *("What it is", "Two commands", "What the picture means", "Ten lines of Python", "An 8B model", "What is where"),
    *("Results", "How to cite", "License"),
]

_TRAIN = "--iterations 1 --batch 4 --set threads=1 --set sampling.max_new_tokens=8 --set evaluation.conversations=0"
SMALL = {  # what is appended to a command that runs, so that it takes seconds
    "train": _TRAIN.split(),
    "resume": ["--iterations", "2"],
    "evaluate": ["--conversations", "2"],
    "rollout": ["--conversations", "2"],
    "horizon": ["--conversations", "2", "--set", "sampling.max_new_tokens=8"],
    "attack": ["--personas", "1"],
}


class Block(NamedTuple):
    """A block of a page: the line of its text, its language ("indented" without a fence), its mark and its text."""

    page: str
    line: int
    language: str
    mark: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return all blocks of a page, fenced and indented, in order."""
    found: list[Block] = []
    mark, fence, start, shown, held = "", "", 0, 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        opened = re.match(r"```(\w*)\s*$", line)
        if fence and line.startswith("```"):
            found.append(Block(page, start, fence, mark, "\n".join(held) + "\n"))
            mark, fence, held = "", "", []
        elif fence:
            held.append(line)
        elif opened:
            fence, start = opened[1] or "text", number + 1
        elif said := re.match(r"<!-- test: (.+) -->$", line):
            mark = said[1]
        elif line.startswith("    ") and line.split()[0] in (*PROGRAMS, "for"):
            found.append(Block(page, number, "indented", "", line.strip() + "\n"))
            shown = number
        elif line.startswith("    ") and shown == number - 1:  # a line of the loop, or the rest of the command
            found[-1] = found[-1]._replace(text=found[-1].text + line.strip() + "\n")
            shown = number
        elif line.strip():
            mark = ""
    assert not fence, f"{page}:{start}: a block without an end"
    return found


def split(text: str) -> Iterator[list[str]]:
    """Yield every command of shell text as words, also those in ``$(…)``; ``…`` stands for flags named elsewhere."""
    text = re.sub(r"\$\(\(.*?\)\)", "0", re.sub(r"\\\n\s*", " ", text))
    for nested in re.findall(r"\$\(([^()]*)\)", text):
        yield from split(nested)
    for line in re.sub(r"\$\([^()]*\)", "SUBSTITUTED", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|") or not word:
                words.append(word)
                continue
            while words and (words[0] in GRAMMAR[3:] or re.match(r"[A-Z_]+=", words[0])):
                words.pop(0)
            if words and words[0] not in GRAMMAR:
                yield [word for word in words if word != "…"]
            words = []


def shell(block: Block) -> list[list[str]]:
    """Return the commands of a block, none where it holds none."""
    lines = block.text.splitlines()
    if block.language == "console":
        return [command for line in lines if line.startswith("$ ") for command in split(line[2:])]
    if block.language in ("bash", "sh", "indented"):
        return list(split(block.text))
    known = [line for line in lines if line.startswith(tuple(f"{name} " for name in PROGRAMS))]
    return [command for line in known for command in split(line)] if block.language == "text" else []


def find(words: Sequence[str]) -> tuple[click.Command, click.Context]:
    """Parse the words after ``ppg-agent`` down to the last command, running nothing."""
    command: click.Command = commands.cli
    context = command.make_context("ppg-agent", list(words))
    while isinstance(command, click.Group):
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None
        command, context = inner, inner.make_context(str(name), rest, parent=context)
    return command, context


class Parsed(Exception):  # noqa: N818 (no error: all that was asked for)
    """A script's command line was taken."""


def parse_script(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script parse its own command line, and stop it there."""
    genuine = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(genuine(self, args, namespace))

    module, script = (words[1], None) if words[0] == "-m" else ("", ROOT / words[0])
    arguments = list(words[2 if module else 1 :])
    if module == "pytest":
        assert all((ROOT / path).exists() for path in arguments)
        return
    assert module or (script and script.is_file()), f"no script {words[0]}"
    if script and not arguments:
        compile(script.read_text(encoding="utf-8"), script, "exec")
        return
    with monkeypatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script or module), *arguments])
        importlib.import_module(module).main() if module else runpy.run_path(str(script), run_name="__main__")
        raise AssertionError("it does not parse its command line")


def check_options(judge: str, options: Any) -> None:
    """Check the names of a judge's options."""
    from ppg_gym.judges import llm, nli
    from ppg_gym.llm.settings import ClientSettings

    known = {
        "facts": set[str](),
        "learned": {"path"},
        "nli": set(nli._KNOWN),
        "llm": {f.name for cls in (llm.JudgeOptions, ClientSettings) for f in dataclasses.fields(cls)},
    }
    assert set(options) <= known.get(judge, set(options)), f"{judge}: {options}"


def parse_agent(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Parse a command line of ``ppg-agent``: flags and choices, names, and every setting."""
    command, context = find(words)
    given = context.params
    named = {"domain": DOMAINS, "judge": JUDGES, "partner": PARTNERS, "agent": agents.agents()}
    for option, known in named.items():
        assert given.get(option) in (None, *known) or ":" in given[option], f"{option} {given[option]!r}"
    if command.name in ("validate", "rescore", "attack") and "options" in given:
        assert given["name"] in (None, *JUDGES)
        name = given["name"] or ("llm" if given["urls"] else "facts")
        check_options(name, configs.parse_assignments(given["options"]))
    if command.name != "train" or given["file"] or given["resume"] is not None:
        configs.load(None, configs.parse_assignments(given.get("assignments") or ()))
        return
    seen: list[configs.TrainConfig] = []

    def stub(config: configs.TrainConfig, place: Path, *, resume: bool) -> Any:
        seen.append(config)
        return SimpleNamespace(folder=place)

    with monkeypatch.context() as patch:
        patch.setattr("ppg_agents.train.train", stub)
        patch.setattr(runs, "check_new", lambda place: None)
        patch.chdir(folder)
        command.invoke(context)
    if seen[0].env.judge in ("llm", "nli", "learned"):
        check_options(seen[0].env.judge, seen[0].env.judge_options)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Parse one command by whatever knows it."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python" and rest[:2] == ["-m", "ppg_agents.cli"]:
        program, rest = "ppg-agent", rest[2:]
    if program == "ppg-agent":
        parse_agent(rest, monkeypatch, folder)
    elif program == "python":
        parse_script(rest, monkeypatch)
    elif program == "make":
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, setting, _ = word.partition("=")
            pattern = rf"^{name} [:?]?=" if setting else rf"^{name}:"
            assert re.search(pattern, text, re.MULTILINE), f"no {word} in the Makefile"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        for word in rest[1:] if rest[0] == "install" else ():
            match = re.fullmatch(r"(-e|\.|[a-z-]+)(?:\[([a-z0-9,]+)\])?", word)
            assert match, word
            assert not match[2] or match[1] not in (".", "ppg-gym") or set(match[2].split(",")) <= set(extras), word
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        taken = launch_command_parser().parse_args(rest[1:])
        assert (rest[0], taken.module, taken.training_script) == ("launch", True, "ppg_agents.cli")
        parse_agent(taken.training_script_args, monkeypatch, folder)
    elif program == "vllm":
        assert {word for word in rest if word.startswith("--")} | {rest[0]} <= VLLM
    else:
        assert (ROOT / program).is_file(), f"{program}: a command that is neither run nor parsed"


def arguments(name: str) -> dict[str, Any]:
    """Return argument -> default of a class; ``required`` where it has none."""
    module, _, attribute = name.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if dataclasses.is_dataclass(cls):
        found = {f.name: f.default for f in dataclasses.fields(cls)}
        return {k: "required" if v is dataclasses.MISSING else v for k, v in found.items() if k != "whose"}
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "env"]
    return {p.name: "required" if p.default is p.empty else p.default for p in named}


def tables(page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (class, argument -> default) of every table that is marked with one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in re.findall(r"<!-- test: signature (\S+) -->\n((?:\|.*\n)+)", text):
        head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
        at = head.index("default")
        said = {row[0].strip("`"): row[at].strip("`") for row in rows}
        yield name, {k: v if v == "required" else ast.literal_eval(v) for k, v in said.items()}


def lesson(number: int) -> dict[str, Any]:
    """Return a judged dialogue in the consistent-LLMs format."""
    talk = [text for i in range(3) for text in (f"Teacher: Question {i}?\n", f"Student: Answer {i}, with maps.\n")]
    return {
        "task_name": "Education",
        "P1": "",
        "P2": f"As student {number} I like maps.",
        "conversation": [list(pair) for pair in enumerate(talk)],
        "pturn": 1,
        "eval_prompt_consistency": [[1, "It fits. NO"], [3, "It does not. YES"], [5, "NO"]],
        "P2_prompt_consistency_score": 2 / 3,
    }


def given(page: str) -> dict[str, Any]:
    """Return what the blocks of a page take as there."""
    if page == "docs/alternatives.md":
        token_mask = torch.tensor([[False, True, True, False, True], [False, True, False, True, True]])
        turn_index = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
        log_probs = torch.full((2, 5), -1.0, requires_grad=True)
        return {
            "token_mask": token_mask,
            "turn_index": turn_index,
            "valid": torch.ones(2, 2, dtype=torch.bool),
            "credit": torch.tensor([[1.0, 0.5], [0.0, 0.5]], dtype=torch.float64),
            "groups": [0, 0],
            "log_probs": log_probs,
            "sampling_log_probs": log_probs.detach() - 0.1,
        }
    if page == "docs/horizon.md":
        from ppg_agents import evaluate, horizon_choice

        config = configs.load(None, {"sampling.max_new_tokens": 8, "env.max_turns": 2})
        policy, sampler = evaluate.load_target("tiny", config)
        played, _ = evaluate.play(policy, sampler, config, personas="train", conversations=4, seed=0)
        classes = horizon_choice.default_candidates(2)
        known = {"horizon_choice": horizon_choice, "trajectories": played, "policy": policy, "classes": classes}
        return {**known, "previous": classes[-1], "rng": np.random.default_rng(0)}
    return {}


def run(words: list[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command of a page, small."""
    words = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    small = SMALL.get(words[2] if words[1] == "judge" else words[1], [])
    small = [*small, *(SMALL["resume"] if "--resume" in words else [])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        assert words[0] == "ppg-agent", f"{page}: only ppg-agent's commands are run, got {words}"
        code = cli.main([*words[1:], *small])
    assert code == 0, f"{page}: {' '.join(words)}: {said.getvalue()[-2000:]}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Go to a folder that looks like a source tree with logged dialogues in it; forget the modules that come of it."""
    for name in ("examples", "scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dialogues").mkdir()
    logged = json.dumps([lesson(number) for number in range(6)])
    (tmp_path / "dialogues" / "example.json").write_text(logged, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ppg_agents.train.curve", lambda *_, **__: None)  # its own tests draw it
    threads, before = torch.get_num_threads(), set(sys.modules)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(block: Block, folder: Path) -> None:
    """Write a block as the file that it is; a package's entry points as an installer does."""
    name = block.mark.split()[1]
    (folder / name).write_text(block.text, encoding="utf-8")
    if name == "pyproject.toml":
        project = tomllib.loads(block.text)["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
        groups = project["entry-points"].items()
        lines = [line for g, names in groups for line in (f"[{g}]", *(f"{k} = {v}" for k, v in names.items()))]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    importlib.invalidate_caches()


RUNNING = [page for page in PAGES if any(b.language == "python" or b.mark == "run" for b in blocks(page))]


@pytest.mark.parametrize("page", RUNNING)
def test_examples_run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    found = blocks(page)
    for block in found:
        if block.mark.startswith("file "):
            write(block, place)
    space: dict[str, Any] = {}
    printed = ""
    for block in found:
        if block.mark == "run":
            for words in shell(block):
                run(words, page, monkeypatch)
        elif block.mark == "output":
            assert printed == block.text, f"{page}:{block.line}: prints\n{printed}"
        elif block.language == "python" and not block.mark.startswith("file ") and block.text not in examples:
            if block.mark != "continues":
                space = {"__name__": "documentation", **given(page)}
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, space)
            printed = out.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_parsed_whole(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        if block.language == "toml":
            tomllib.loads(block.text)
        for words in shell(block) if block.mark != "run" else ():
            try:
                check(words, monkeypatch, tmp_path)
            except (AssertionError, click.ClickException, ValueError, SystemExit) as error:
                raise AssertionError(f"{page}:{block.line}: {' '.join(words)}: {error}") from error


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def flags(command: click.Command) -> set[str]:
    """Return the flags of a command and all below it."""
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    own = {flag for parameter in command.params for flag in parameter.opts}
    return own.union({"--help", "--version"}, *map(flags, inner))


@pytest.mark.parametrize("page", PAGES)
def test_what_the_text_names_is_there(page: str) -> None:
    known = flags(commands.cli) | FOREIGN
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        words = span.split()
        if words[0] == "ppg-agent":
            command: click.Command = commands.cli
            rest = words[1:]
            while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
                options = [command.commands.get(name) for name in rest[0].split("|")]
                assert None not in options, f"{page}: {span}"
                command, rest = next(filter(None, options)), rest[1:]
            assert {word for word in rest if word.startswith("--")} <= flags(command), f"{page}: {span}"
        elif words[0].startswith("--"):
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, f"{page}: {span}"
        elif words[0] in ("make", "pip") and len(words) > 1:
            check(shlex.split(span), pytest.MonkeyPatch(), ROOT)
        elif path := re.fullmatch(r"(?:python )?((?:docs|examples|ppg_\w+|scripts|tests)/[\w./*-]+).*", span):
            assert list(ROOT.glob(path[1].rstrip("/"))), f"{page}: {span}"
        elif name := re.fullmatch(r"(ppg_(?:gym|agents)(?:\.\w+)+)(?:\(.*\))?", span):
            pkgutil.resolve_name(name[1])  # raises when there is no such module or name


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page}: no {target}"
        assert not anchor or anchor in anchors(there), f"{page}: no heading {target}"
        if picture:
            assert there.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", target
            assert there.stat().st_size <= MOST_BYTES, target


def test_the_pictures_of_the_idea_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["idea_figures.py", "--steps", "2", "--out", str(tmp_path)])
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / "scripts/idea_figures.py"), run_name="__main__")
    assert all((ROOT / "docs" / path.name).is_file() for path in tmp_path.glob("*.png"))


def test_every_picture_is_shown() -> None:
    text = "".join(prose(page) for page in PAGES)
    assert [path.name for path in (ROOT / "docs").glob("*.png") if path.name not in text] == []


@pytest.mark.parametrize(("name", "said"), [pair for page in PAGES for pair in tables(page)])
def test_tables_of_arguments_are_the_code_s(name: str, said: dict[str, Any]) -> None:
    assert said == arguments(name)


def test_the_readme_answers_in_order_and_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", prose("README.md"), re.MULTILINE) == ORDER
    assert len(text.splitlines()) <= 260
    tree = text.partition("## What is where\n\n```\n")[2].partition("```")[0]
    top = ""
    for line in tree.splitlines():
        top = line.split()[0] if not line.startswith(" ") else top
        for name in re.findall(r"[\w*/]+\.py", line):
            assert list((ROOT / top).rglob(name)), f"no {name} in {top}"


def test_every_page_is_in_the_index_and_every_agent_in_its_table() -> None:
    index = set(re.findall(r"^- \[[^\]]*\]\((\S+)\)", prose("docs/README.md"), re.MULTILINE))
    assert index == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    table = prose("docs/agents.md").partition("## By name")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == {"ppg", *agents.ALTERNATIVES}
