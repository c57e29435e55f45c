"""Check an installed wheel in a clean environment: every domain plays, nothing heavy is there, all is quick.

Usage: python smoke.py PPG_AGENT, where PPG_AGENT is a ppg-agent with the extra [agents]. Standard library and
the environment alone; not part of the packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

ALONE = {"ppg-gym", "gymnasium", "numpy", "cloudpickle", "farama-notifications", "typing-extensions"}
TOOLS = {"pip", "setuptools", "wheel"}
IMPORT_LIMIT, HELP_LIMIT = 0.5, 1.0  # seconds


def expect(truth: bool, what: str) -> None:
    """Raise with the message unless it is true."""
    if not truth:
        raise RuntimeError(f"expected {what}")


def installed_alone() -> str:
    """Look at what is installed: the environment's needs, no learner's."""
    names = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()} - TOOLS
    expect(names == ALONE, f"{sorted(ALONE)} installed, got {sorted(names)}")
    for name in ("torch", "envs", "tests", "scripts"):
        expect(importlib.util.find_spec(name) is None, f"no module {name}")
    return ", ".join(sorted(names))


def from_the_wheel() -> str:
    """Look at where package and data come from: the clean environment, not a source tree."""
    import ppg_gym
    from ppg_gym.domain.loading import folder

    places = [Path(str(ppg_gym.__file__)), *(Path(str(folder(name))) for name in domains())]
    expect(all(place.is_relative_to(sys.prefix) for place in places), f"files in {sys.prefix}, got {places}")
    return f"{len(places)} places"


def domains() -> tuple[str, ...]:
    """Return the names of the embedded domains."""
    from ppg_gym.domain.loading import DOMAINS

    return DOMAINS


def episode(domain: str) -> str:
    """Play one conversation with ``gym.make`` and two with ``gym.make_vec``."""
    import gymnasium as gym

    env = gym.make("ppg_gym:PersonaChat-v0", domain=domain)
    observation, _ = env.reset(seed=0)
    rewards: list[float] = []
    ended = False
    while not ended:
        expect(env.observation_space.contains(observation), "an observation out of the space")
        observation, reward, terminated, truncated, info = env.step(f"I say {len(rewards)} things about me.")
        rewards.append(float(reward))
        ended = terminated or truncated
        expect(info["verdict"]["status"] == "scored", f"a scored reply, got {info['verdict']}")
    expect(all(0.0 <= reward <= 1.0 for reward in rewards), f"rewards in [0, 1], got {rewards}")
    envs = gym.make_vec("PersonaChat-v0", num_envs=2, domain=domain)
    envs.reset(seed=0)
    envs.step(("Hello.", "Good day."))
    return f"{len(rewards)} turns"


def quick(command: list[str], limit: float) -> str:
    """Run a program three times; the shortest run must be under the limit, in seconds."""
    runs = []
    for _ in range(3):
        start, used = time.perf_counter(), cpu_of_children()
        subprocess.run(command, check=True, capture_output=True)
        runs.append((time.perf_counter() - start, cpu_of_children() - used))
    wall, cpu = min(runs)
    figures = f"{wall:.2f} s, of which {cpu:.2f} s computing"
    expect(wall < limit, f"less than {limit} s, got {figures}; on a busy machine, run it again when it is idle")
    return f"{figures}; limit {limit} s"


def cpu_of_children() -> float:
    """Return the seconds of computing that finished child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(program: str) -> int:
    """Run every check, say how each went, and return the exit code."""
    warnings.simplefilter("error")
    checks: dict[str, Callable[[], str]] = {
        "installed alone": installed_alone,
        "from the wheel": from_the_wheel,
        **{f"domain {name}": partial(episode, name) for name in domains()},
        "import ppg_gym": partial(quick, [sys.executable, "-c", "import ppg_gym"], IMPORT_LIMIT),
        "ppg-agent --help": partial(quick, [program, "--help"], HELP_LIMIT),
    }
    failed = 0
    for name, check in checks.items():
        try:
            print(f"ok      {name}: {check()}")
        except Exception:
            failed += 1
            print(f"FAILED  {name}")
            traceback.print_exc(file=sys.stdout)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
