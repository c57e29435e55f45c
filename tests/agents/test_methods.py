"""The table of methods: readable without torch, and every function that a row names is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ppg_agents.agents import METHODS, agents
from ppg_agents.agents.methods import RANGES, SETTINGS, Method, resolve
from ppg_agents.agents.settings import LearnerSettings

FUNCTIONS = ("loss", "pair_loss", "advantage", "critic", "keep", "bounds", "check")


def test_listing_checking_and_describing_need_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from ppg_agents.agents import METHODS, agents
from ppg_agents.config import TrainConfig
from ppg_agents.inspect import method
assert "ppg" in agents()
for name, row in METHODS.items():
    row.fill(name, {})
    row.check_settings(name, {})
    method.note(TrainConfig(agent=name))
print(len(METHODS))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(len(METHODS)), done.stderr


@pytest.mark.parametrize("name", METHODS)
def test_every_function_that_a_row_names_is_there(name: str) -> None:
    references = [getattr(METHODS[name], part) for part in FUNCTIONS]
    assert all(callable(resolve(reference)) for reference in references if reference)
    assert METHODS[name].takes <= SETTINGS.keys()


def test_every_setting_that_a_method_may_ignore_is_one_with_that_default() -> None:
    settings = vars(LearnerSettings())
    assert {key: settings[key] for key in SETTINGS if key != "baseline"} == {
        key: default for key, (default, _) in SETTINGS.items() if key != "baseline"
    }
    assert set(RANGES) <= {option for method in METHODS.values() for option in method.options}


def test_a_row_of_your_own_holds_its_functions() -> None:
    assert resolve(len) is len
    assert resolve("ppg_agents.losses:aggregate").__name__ == "aggregate"
    with pytest.raises(ValueError, match=r"expected an option of 'mine' \(tau\), got 'tua'; did you mean 'tau'"):
        Method({"tau": 1.0}, loss=len).fill("mine", {"tua": 2.0})
    assert set(METHODS) <= set(agents())
