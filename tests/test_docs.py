"""What the documentation tells a reader to type is real: its examples run, its commands run or are parsed whole.

What is done with a fenced block, by its language:

- ``python`` runs, each in a namespace of its own. A block that stands word for word in a file of ``examples/`` is left
  to the tests of the examples.
- ``bash``, ``console`` (lines that begin with ``$``) and every other block or indented line that begins with a known
  program: each command is parsed by its own parser (click's, argparse's, accelerate's), ``make`` targets and extras of
  ``pip install`` are looked up. A program that nobody here can check is an error.
- ``toml`` is read.

A comment in front of a block changes that: ``<!-- test: run -->`` runs its commands, small, in the page's folder;
``file NAME`` writes the block there first; ``continues`` keeps the last block's namespace; ``output`` compares the
block with what the last Python block printed. Names, links, pictures and tables: ``test_pages.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import importlib
import io
import json
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

from ppg_agents import agents, cli
from ppg_agents import config as configs
from ppg_agents.commands import main as commands
from ppg_agents.runs import run as runs
from ppg_gym.domain.loading import DOMAINS
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


def inline(page: str) -> Iterator[list[str]]:
    """Yield the commands of make and pip that stand in the running text."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from map(shlex.split, re.findall(r"(?<!`)`((?:make|pip) [^`\n]+)`(?!`)", prose))


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
        "nli": set(nli._DEFAULTS),
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
    if seen[0].env.judge in ("llm", "nli"):
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
        from ppg_agents import evaluate
        from ppg_agents.horizon import choice as horizon_choice

        config = configs.load(None, {"sampling.max_new_tokens": 8, "env.max_turns": 2})
        policy, sampler, _ = evaluate.load_target("tiny", config)
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
    for words in inline(page):
        check(words, monkeypatch, ROOT)
