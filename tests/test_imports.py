"""Who may import whom: the environment stays light, and the learner knows it through Gymnasium alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "peft", "accelerate", "scipy", "matplotlib")
ENVIRONMENT = ("gymnasium", "numpy", "cloudpickle", "farama_notifications", "typing_extensions")
# `import ppg_gym` registers the environment; the other two read files, for which no environment is needed.
KNOWN_TO_THE_LEARNER = {"ppg_gym", "ppg_gym.data", "ppg_gym.domain.personas"}
# Command lines of the environment's own tools: they know them, and nothing of the learner's but its manners.
FRONT_ENDS = {"ppg_agents.commands.data", "ppg_agents.commands.judge"}
MANNERS = {"ppg_agents.config.settings", "ppg_agents.config.parsing", "ppg_agents.terminal.progress"}


def run(code: str, folder: Path) -> list[str]:
    """Run code in a fresh interpreter, away from the source tree; return the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def as_if_alone(*packages: str) -> str:
    """Return code that blocks every import but these, the standard library and the environment's needs."""
    return f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {(*packages, *ENVIRONMENT)!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Block())
"""


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the syntax tree of every module of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module imports, inside functions and in strings too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0) if "." in module:
                yield module
            case ast.ImportFrom(module=str(module), level=0):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.Constant(value=str(text)) if text.startswith(("ppg_gym.", "ppg_agents.")):
                yield text


def test_making_an_environment_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
import gymnasium as gym
import ppg_gym
gym.make("PersonaChat-v0").reset(seed=0)
gym.make_vec("PersonaChat-v0", num_envs=2).reset(seed=[0, 1])
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run(code, tmp_path) == ["[]"]


def test_every_module_of_the_environment_imports_without_the_extras(tmp_path: Path) -> None:
    names = [name for name, _ in modules("ppg_gym")]
    assert "ppg_gym.env" in names
    code = f"""
import importlib
for name in {[*names, "torch"]!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert run(as_if_alone("ppg_gym") + code, tmp_path) == ["torch"]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from ppg_agents.cli import main
assert main({command!r}) == 0
print([name for name in {(*HEAVY, "gymnasium", "ppg_gym")!r} if name in sys.modules])
"""
    assert run(code, tmp_path)[-1] == "[]"


def test_a_missing_extra_is_one_line_that_names_the_install_command(tmp_path: Path) -> None:
    code = "\nfrom ppg_agents.cli import main\nsys.stderr = sys.stdout\nprint(main(['--help']))"
    message, exit_code = run(as_if_alone("ppg_gym", "ppg_agents") + code, tmp_path)
    assert 'pip install "ppg-gym[agents]"' in message
    assert exit_code == "1"


def test_the_learner_knows_the_environment_through_gymnasium_alone() -> None:
    seen = {(name, other) for name, tree in modules("ppg_agents") for other in imported(tree)}
    ours = {(name, other) for name, other in seen if other.partition(".")[0] == "ppg_gym"}
    assert ours, "the offline learner reads logged dialogues"
    strangers = {(name, other) for name, other in ours if name not in FRONT_ENDS}
    assert {(name, other) for name, other in strangers if other not in KNOWN_TO_THE_LEARNER} == set()


def test_the_front_ends_of_the_environment_s_tools_know_nothing_of_the_learner() -> None:
    seen = {(name, other) for name, tree in modules("ppg_agents") for other in imported(tree) if name in FRONT_ENDS}
    theirs = {(name, other) for name, other in seen if other.partition(".")[0] == "ppg_agents"}
    assert {(name, other) for name, other in theirs if other not in MANNERS} == set()


def test_the_environment_does_not_know_the_learner() -> None:
    seen = {(name, other) for name, tree in modules("ppg_gym") for other in imported(tree)}
    assert {(name, other) for name, other in seen if other.partition(".")[0] == "ppg_agents"} == set()
