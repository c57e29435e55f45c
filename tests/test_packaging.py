"""What is installed: two packages and their data, whether from a wheel or from the source tree."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED_AS = {"envs": "ppg_gym/domains", "ppg_gym": "ppg_gym", "ppg_agents": "ppg_agents"}


def run(*command: str, cwd: Path) -> str:
    """Run a program; return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def files() -> set[str]:
    """Return every file of the two packages and their data, by its path once installed."""
    return {
        f"{installed}/{path.relative_to(ROOT / top).as_posix()}"
        for top, installed in INSTALLED_AS.items()
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build a wheel from a copy of the source tree; a warning of the build is a failure."""
    source = tmp_path_factory.mktemp("source")
    for top in INSTALLED_AS:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    flags = ("--verbose", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist")
    output = run(sys.executable, "-m", "pip", "wheel", *flags, ".", cwd=source)
    assert "Warning" not in output, output
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files()
    assert {"ppg_gym/py.typed", "ppg_agents/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"ppg_gym", "ppg_agents"}


def test_the_wheel_carries_licence_and_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "ppg-agent = ppg_agents.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_embedded_model_is_small(wheel: zipfile.ZipFile) -> None:
    model = [info for info in wheel.infolist() if info.filename.startswith("ppg_agents/models/tiny/")]
    assert 0 < sum(info.file_size for info in model) <= 8 * 2**20


def test_every_package_is_listed() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("ppg_gym", "ppg_agents")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages | {"ppg_gym.domains"}


def test_the_installed_package_finds_its_data(tmp_path: Path) -> None:
    code = """
from importlib.resources import files
from importlib.util import find_spec
for name in ("chatting", "education", "therapy"):
    assert (files("ppg_gym.domains") / name / "domain.toml").is_file(), name
assert (files("ppg_agents.models.tiny") / "config.json").is_file()
assert find_spec("envs") is None
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_the_environment_alone_needs_gymnasium_and_numpy() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"gymnasium", "numpy"}
    assert {"agents", "sb3", "vllm", "llm", "dev"} <= set(EXTRAS)


def constraints() -> dict[str, str]:
    """Return name -> version; the file may hold exact public versions and nothing else."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [tuple(line.split("==")) for line in lines if line and not line.startswith("#")]
    assert all(name == canonicalize_name(name) and set(version) <= set("0123456789.") for name, version in pins)
    assert len(dict(pins)) == len(pins)
    return dict(pins)


@pytest.mark.parametrize("extra", [None, "agents", "dev", "bench", "sb3", "trl", "ray", "llm", "tensorboard"])
def test_every_direct_requirement_is_pinned_to_a_version_that_it_allows(extra: str | None) -> None:
    pins = constraints()
    for line in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_everything_that_make_installs_is_pinned() -> None:
    extras = (EXTRAS[extra] for extra in ("agents", "llm", "sb3", "bench", "tensorboard", "dev"))
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    waiting = [Requirement(line) for line in lines]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in seen:
            continue
        seen.add(key)
        for need in map(Requirement, importlib.metadata.requires(wanted.name) or ()):
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                waiting.append(need)
    # torch itself pins the CUDA packages of its builds.
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-")) and name != "triton"}
    assert names - set(constraints()) == set()
