"""What a newcomer does wrong in the first ten minutes, and what is said: one line, with a way on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppg_gym  # noqa: F401  (registers PersonaChat-v0)
from ppg_agents import building, cli
from ppg_agents.commands import main as commands
from ppg_agents.plotting import new_figure
from ppg_agents.runs.curve import draw_consistency, draw_turns
from ppg_gym.conversation import Conversation
from ppg_gym.domain.cast import personas
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say

SMALL = ("--iterations", "1", "--batch", "2", "--set", "evaluation.conversations=0")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with the usual accidents; no model is loaded and no hub asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PPG_TRACEBACK", raising=False)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("afile").write_text("hello\n")
    Path("empty.json").touch()
    Path("plan.toml").write_text('sizes = [32]\nseeds = [0]\n[settings]\nmodel = "tinny"\n')
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "llama"}')
    Path("runs/quickstart/checkpoints").mkdir(parents=True)
    Path("runs/quickstart/config.toml").write_text("batch = 2\n")
    Path("runs/quickstart/curve.png").write_text("mine")
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ppg_agents.compare.engine.run_here", lambda *_: pytest.fail("a run is started"))
    for package in ("vllm", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)


def _unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("Name or service not known")


CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "domain": (("train", "--domain", "therappy"), "got 'therappy'; did you mean 'therapy'?"),
    "personas": (("train", "--personas", "held_out"), "no such file; did you mean 'held-out'?"),
    "personas, a folder": (("train", "--personas", "full"), "path to a persona file, got 'full': a folder"),
    "run folder in use": (("train", "--out", "full"), "got full with files; empty it, or change --out"),
    "run folder of a run": (("train", "--out", "runs/quickstart"), "go on with --resume runs/quickstart"),
    "run folder, a file": (("train", "--out", "afile"), "got afile, which is a file; change --out"),
    "resume": (("train", "--resume", "quikstart"), "which does not exist; did you mean runs/quickstart?"),
    "offline, missing": (
        ("train", "--offline", "no.json"),
        "no.json: expected a readable file, got No such file or directory; check the path",
    ),
    "offline, empty": (
        ("train", "--offline", "empty.json"),
        "empty.json:1: expected dialogues or personas, got an empty",
    ),
    "offline, no JSON": (("train", "--offline", "afile"), "afile:1: expected a file in one of the formats"),
    "model": (("evaluate", "tinny"), "the hub cannot be reached (Name or service not known); download it"),
    "model, nearest": (("evaluate", "tinny"), "did you mean 'tiny'?"),
    "model, a folder": (("evaluate", "full"), "the folder has no config.json; name one with"),
    "model, no tokenizer": (("evaluate", "broken"), "broken: expected a tokenizer that transformers can load, got"),
    "model, nothing": (("evaluate", ""), "expected 'tiny', a model folder or a hub name, got ''"),
    "model of a comparison": (("compare", "plan.toml", "--out", "new"), "got 'tinny': no such folder, not in the"),
    "model of a figure": (
        ("reproduce", "fig4", "--quick", "--model", "broken/model", "--out", "new"),
        "got 'broken/model': no such folder, not in the local cache",
    ),
    "4 bits": (("train", "--set", "load.quantisation=4bit"), "on a machine with a CUDA device"),
    "vLLM": (("train", "--set", "sampling.backend=vllm"), 'vllm is not installed; run: pip install "ppg-gym[vllm]"'),
    "argument": (("train", "--set", "env.kwargs.maxturns=3"), "got 'maxturns'; did you mean 'max_turns'?"),
    "environment": (("train", "--set", "env.id=Mine-v0"), "name its module: MODULE:Mine-v0"),
    "no conversation": (
        ("train", "--set", "env.id=CartPole-v1"),
        "dict with 'instruction' and 'message', got 'CartPole",
    ),
    "judge's model alone": (("train", "--judge-model", "m"), "give --judge-url too"),
    "resume, elsewhere": (("train", "--resume", "runs/quickstart", "--out", "runs/b"), "leave out --out runs/b"),
    "no endpoint": (("evaluate", "tiny", "--judge", "llm"), "give --judge-url URL and --judge-model NAME"),
    "no partner's model": (("train", "--partner-url", "http://h/v1"), "give --partner-model NAME"),
    "no judge's folder": (("train", "--judge", "nli"), "give --set env.judge_options.model=FOLDER"),
    "judge, no folder": (("judge", "attack", "--judge", "nli"), "give --judge-option model=FOLDER"),
    "judge, no endpoint": (("judge", "attack", "--judge-model", "m"), "give --judge-url too"),
    "judge, no model": (("judge", "attack", "--judge-url", "http://h/v1"), "give --judge-model NAME"),
    "doctor, no endpoint": (("doctor", "--partner-model", "m"), "give --partner-url too"),
    "no folder for the advice": (("horizon", "tiny", "--out", "afile/x"), "afile/x: Not a directory; check the path"),
    "onto itself": (("data", "import", "afile", "--out", "./afile"), "expected a file other than the input files"),
    "persona": (("chat", "tiny", "--persona", "chatting-held-out-7"), "did you mean 'chatting-held-out-"),
    "persona elsewhere": (("chat", "tiny", "--persona", "chatting-train-007"), "which is in personas='train'"),
    "attack, too many": (
        ("judge", "attack", "--personas", "99999"),
        "--personas: expected at most 128, chatting's held-out personas, got 99999",
    ),
    "no folder for the page": (("inspect", "runs/quickstart", "--out", "no/x.html"), "got no/x.html; make no first"),
    "report among the run's own": (
        ("report", "runs/quickstart", "--out", "runs/quickstart"),
        "got runs/quickstart with curve.png, which would be lost; name another folder with --out",
    ),
    "no folder": (("rollout", "tiny", "--out", "no/x.jsonl"), "got no/x.jsonl; make no first"),
    "disk is full": (("rollout", "tiny", "--conversations", "1", "--out", "/dev/full"), "make room on the disk"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, said = CASES[case]
    if "/dev/full" in arguments and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    small = SMALL if arguments[0] == "train" and "--resume" not in arguments else ()
    assert cli.main([*arguments, *small]) in (1, 2)
    lines = capfd.readouterr().err.strip().splitlines()
    assert said in lines[-1], lines[-1]
    assert lines[-1].startswith(("ppg-agent: ", "Error: "))
    assert not any("Traceback" in line for line in lines)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["quickstart"], "nothing is left behind"
    assert not Path("new").exists()


def test_a_folder_that_is_taken_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "load_policy", lambda config: pytest.fail("a model is loaded"))
    assert cli.main(["train", *SMALL, "--out", "full"]) == 1
    monkeypatch.setenv("RANK", "1")  # rank 0 may have made the folder already
    monkeypatch.setattr("ppg_agents.train.train", lambda *_, **__: _raise(ValueError("reached")))
    assert cli.main(["train", *SMALL, "--out", "full"]) == 1
    assert capfd.readouterr().err.endswith("ppg-agent: reached\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "m"),
            "m: Permission denied; make it writable, or name another place",
        ),
        (OSError(28, "No space left on device"), "No space left on device; make room on the disk"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "CUDA out of memory. Tried; in training lower micro_batch",
        ),
        (MemoryError(), "out of memory: MemoryError; in training lower micro_batch_tokens"),
        (
            ModuleNotFoundError("No module named 'numpy'", name="numpy"),
            "numpy is not installed; run: pip install ppg-gym",
        ),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 'run: pip install "ppg-gym[agents]"'),
        (KeyboardInterrupt(), "ppg-agent: stopped"),
    ],
)
def test_errors_of_others_in_one_line(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "run", lambda _: _raise(error))
    assert cli.main([]) in (1, 130)
    shown = capfd.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run", lambda _: _raise(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main([])
    monkeypatch.setenv("PPG_TRACEBACK", "1")
    monkeypatch.setattr(commands, "run", lambda _: _raise(OSError(2, "No such file", "x")))
    with pytest.raises(OSError, match="No such file"):
        cli.main([])


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    assert cli.main(["train"]) == 1
    assert capfd.readouterr().err.startswith("ppg-agent: expected Python 3.11 or newer, got 3.10.13; install one")


def _raise(error: BaseException) -> Any:
    raise error


def _step(*replies: Any, n: int = 0) -> Callable[[], object]:
    """Return a function that plays replies, in n conversations, or in a single one."""

    def play() -> object:
        env = gym.make_vec("PersonaChat-v0", num_envs=n) if n else gym.make("PersonaChat-v0")
        env.reset(seed=0)
        return [env.step(reply) for reply in replies]

    return play


def _reset(**options: Any) -> Callable[[], object]:
    return lambda: gym.make("PersonaChat-v0").reset(options=options)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda: gym.make("PersonaChat-v0", maxturns=3), "got 'maxturns'; did you mean 'max_turns'?"),
        (lambda: gym.make_vec("PersonaChat-v0", num_envs=2, domian="therapy"), "got 'domian'; did you mean 'domain'?"),
        (_reset(personna="a"), "expected options out of persona, got 'personna'; did you mean 'persona'?"),
        (_reset(persona={"instruction": "Be.", "fact": {}}), "got 'fact'; did you mean 'facts'?"),
        (_reset(persona="chatting-held-out-007"), "which is in personas='held-out'"),
        (_reset(persona="chatting-train-07"), "did you mean 'chatting-train-"),
        (_step(3), "expected the action to be a str of at most 16384 characters, got int"),
        (_step(3, n=2), "expected 2 replies, got one int; pass a list with one for each conversation"),
        (
            lambda: gym.make_vec("PersonaChat-v0", num_envs=2).reset(seed="ab"),
            "expected seed to be an integer or 2 of them, got 'ab'",
        ),
        (_step("ab", n=2), "expected 2 replies, got one str; pass a list with one for each conversation"),
    ],
)
def test_the_environment_says_what_it_expects(do: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        do()


def test_a_step_before_reset_or_after_the_end_asks_for_reset() -> None:
    env = gym.make("PersonaChat-v0", max_turns=1)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step("Hi.")
    env.reset(seed=0)
    env.step("Hi.")
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step("Hi.")


def test_a_reply_to_a_line_that_asks_nothing_is_refused_in_words() -> None:
    conversation = Conversation(personas("chatting", "train")[0]).add("partner", "Hello!")
    with pytest.raises(
        ValueError, match="asks about a fact of the persona, got none in it: 'Hello!'; ask about one of"
    ):
        say(reader("chatting"), "truth", conversation, np.random.default_rng(0))


def test_conversations_of_one_turn_are_drawn() -> None:
    """Warnings are errors here: matplotlib takes an array of one row of one for a number."""
    one = json.loads('{"persona_consistency": 0.5, "ci95": [0.4, 0.6], "reachable": null}')
    one |= {"per_turn": [0.5], "per_turn_ci95": [[0.4, 0.6]]}
    left, right = new_figure(11, 4.6).subplots(1, 2)
    draw_turns(left, {"before": one, "after": one})
    draw_consistency(right, [], {"before": one, "after": one})
    assert len(left.patches) == 2
