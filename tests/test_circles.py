"""No import circles: what a module needs at import stands below it.

Imports inside functions and under ``TYPE_CHECKING`` do not count. ``from package import name`` counts as an import of
the module ``package.name`` where there is one, else of the package's ``__init__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, those in blocks and classes too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def imports(package: str) -> dict[str, list[str]]:
    """Return, for every module of a package, the modules of the package that it imports."""
    paths = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, list[str]] = {}
    for name, path in paths.items():
        needed: dict[str, None] = {}
        for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                needed |= dict.fromkeys(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: expected an absolute import"
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                needed |= dict.fromkeys(full if full in paths else str(node.module) for full in whole)
        graph[name] = [other for other in needed if other in paths]
    return graph


def circle(graph: Mapping[str, list[str]]) -> list[str]:
    """Return the modules of one circle, the first again at the end; empty when there is none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in graph[name]:
            if met := follow(other, [*path, name]):
                return met
        done.add(name)
        return []

    return next((met for name in graph if (met := follow(name, []))), [])


def test_a_circle_is_seen() -> None:
    assert circle({"a": ["b", "c"], "b": [], "c": ["d"], "d": ["e"], "e": ["c"]}) == ["c", "d", "e", "c"]
    assert circle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []


@pytest.mark.parametrize("package", ["ppg_gym", "ppg_agents"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    graph = imports(package)
    assert sum(map(len, graph.values())) > len(graph)
    met = circle(graph)
    assert not met, "expected no import circle, got\n  " + "\n  imports ".join(met)
