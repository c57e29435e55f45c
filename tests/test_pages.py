"""What the documentation points at is there: names in the text, links, pictures, arguments, the README's tree.

A table behind ``<!-- test: signature MODULE:CLASS -->`` has the arguments and defaults of that class.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from ppg_agents import agents
from ppg_agents.commands import main as commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "envs/**/README.md")
    for path in ROOT.glob(pattern)
)
FOREIGN = {"--latency", "--enable-lora", "--max-lora-rank", "--port", "--logprobs-mode"}  # of vLLM, of a script
MOST_BYTES = 300_000
ORDER = [
    *("What it is", "Two commands", "What the picture means", "Ten lines of Python", "An 8B model", "What is where"),
    *("Results", "How to cite", "License"),
]


def arguments(name: str) -> dict[str, Any]:
    """Return argument -> default of a class; ``required`` where it has none."""
    module, _, attribute = name.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if dataclasses.is_dataclass(cls):
        found = {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(cls)
        }
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


def test_the_tree_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree, top = text.partition("## What is where\n\n```\n")[2].partition("```")[0], ""
    assert tree
    for line in tree.splitlines():
        top = line.split()[0] if not line.startswith(" ") else top
        for name in re.findall(r"[\w*/]+\.py", line):
            assert list((ROOT / top).rglob(name)), f"no {name} in {top}"
        for name in re.findall(r"(?<![\w.])(\w+)/", line.partition("  ")[0] or line.strip().partition("  ")[0]):
            assert any(path.is_dir() for path in ROOT.rglob(name)), f"no folder {name}"


def test_every_page_is_in_the_index_and_every_agent_in_its_table() -> None:
    index = set(re.findall(r"^- \[[^\]]*\]\((\S+)\)", prose("docs/README.md"), re.MULTILINE))
    assert index == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    table = prose("docs/agents.md").partition("## By name")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == set(agents.METHODS)
