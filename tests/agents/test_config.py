"""Settings: precedence, types, names, and that they survive a file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppg_agents import config as configs
from ppg_agents.config import ConfigError, TrainConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iteration": 3}, "unknown setting 'iteration'; did you mean iterations?"),
        ({"lora": {"ranks": 3}}, "unknown setting 'lora.ranks'; did you mean lora.rank?"),
        ({"rank": 3}, "unknown setting 'rank'; did you mean lora.rank?"),
        ({"batch": "x"}, "batch: expected int, got 'x'"),
        ({"batch": True}, "batch: expected int, got True"),
        ({"batch": 2.5}, "batch: expected int, got 2.5"),
        ({"lora": 3}, "lora: expected a table, got 3"),
        ({"segments": 3}, "segments: expected a list of lengths such as [3, 3, 2], got 3"),
        ({"offline": {"files": [1]}}, "offline.files[0]: expected str, got 1"),
        ({"policy_class": "k_step"}, "policy_class: expected full, greedy, k-step 3, segment 3,3,2, a matrix or "),
        ({"policy_class": "k_step"}, "got 'k_step'; did you mean 'k-step 3'?"),
        ({"policy_class": "k-step"}, "policy_class: k-step needs lookahead; write 'k-step 3'"),
        ({"policy_class": "greedy", "lookahead": 2}, "lookahead: belongs to the policy class k-step, got greedy; drop"),
        ({"lookahead": 2, "segments": [2]}, "segments: belongs to the policy class segment, got 2-step; drop "),
        ({"policy_class": "segment", "segments": [3, 0]}, "segments: expected segments[1] to be an integer >= 1"),
        ({"lookahead": 0}, "lookahead: expected lookahead to be an integer >= 1, got 0"),
        ({"policy_class": [[1, 1], [0.5, 1]]}, "policy_class: expected an upper triangular matrix, got 0.5 at row 1"),
        ({"policy_class": [[1, float("inf")], [0, 1]]}, "policy_class: expected finite weights, got inf at row 0"),
        ({"policy_class": [["x"]]}, "policy_class: expected a number or a boolean, got 'x' at row 0, column 0"),
        ({"policy_class": True}, "a matrix or module:function (for a run also auto), got True"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 6, "group": 4}, "batch: expected a multiple of group = 4, got 6"),
        ({"baseline": "leave-one-out", "group": 1}, "group >= 2"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0, got nan"),
        ({"warmup": 1.5}, "warmup: expected a share in [0, 1) or a whole number of steps, got 1.5"),
        ({"warmup": -1}, "warmup: expected a share in [0, 1) or a whole number of steps, got -1"),
        ({"betas": [0.9]}, "betas: expected two numbers in [0, 1) such as [0.9, 0.999], got (0.9,)"),
        ({"betas": [0.9, 1.0]}, "betas: expected two numbers in [0, 1)"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient: expected a finite number of at least 0, got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number of at least 0, got -0.1"),
        ({"reference_kl_every": -1}, "reference_kl_every: expected at least 0, got -1"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature: expected a finite number of at least 0, got -0.1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"max_grad_norm": -0.5}, "max_grad_norm: expected a finite number of at least 0, got -0.5"),
        (
            {"optimizer": "sgd", "betas": [0.9, 0.95]},
            "betas: expected only with the optimizer 'adamw', got [0.9, 0.95]",
        ),
        ({"optimizer": "adam"}, "optimizer: expected one of 'adamw', 'sgd', got 'adam'; did you mean 'adamw'?"),
        ({"offline": {"held_out": 1.0}}, "offline.held_out: expected a share in (0, 1), got 1.0"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.from_dict(settings)


def test_file_then_set_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('batch = 8\nseed = 3\nlearning_rate = 1\n[lora]\nrank = 4\n[env.judge_options]\nmodel = "m"\n')
    overrides = configs.parse_assignments(["lora.alpha=5", "seed=4", "domain=therapy", "batch=16"]) | {"batch": 32}
    config = configs.load(file, overrides)
    assert (config.batch, config.seed, config.lora.rank, config.lora.alpha) == (32, 4, 4, 5)
    assert config.domain == "therapy"
    assert config.env.judge_options == {"model": "m"}
    assert isinstance(config.learning_rate, float)
    assert config.iterations == TrainConfig().iterations


def test_a_fault_of_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("iteration = 3\n")
    with pytest.raises(ConfigError, match=r"run.toml: unknown setting 'iteration'; did you mean iterations\?"):
        configs.load(file, {"batch": 4})
    file.write_text("iterations = 3\n")
    with pytest.raises(ConfigError, match=r"^batch: expected int, got 'x'"):
        configs.load(file, {"batch": "x"})


def test_set_reads_toml_values_and_names_what_is_no_assignment() -> None:
    parsed = configs.parse_assignments(["a=1", "b=1.5", "c=true", "d=[1, 2]", "e=x y", 'f="1"', "g.h=a=b"])
    assert parsed == {"a": 1, "b": 1.5, "c": True, "d": [1, 2], "e": "x y", "f": "1", "g.h": "a=b"}
    with pytest.raises(ConfigError, match="expected key=value"):
        configs.parse_assignments(["lora.rank"])
    with pytest.raises(ConfigError, match="seed: expected a table, got 1"):
        configs.load(None, {"seed": 1, "seed.x": 2})


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"policy_class": "k-step", "lookahead": 3}, "k-step 3"),
        ({"lookahead": 3}, "k-step 3"),
        ({"policy_class": "segment", "segments": [3, 3, 2]}, "segment 3,3,2"),
        ({"segments": [3, 3, 2]}, "segment 3,3,2"),
        ({"policy_class": "auto"}, "auto"),
        ({"policy_class": 3}, "k-step 3"),
        ({}, "full"),
    ],
)
def test_lookahead_and_segments_become_part_of_the_policy_class(older: dict[str, object], newer: str) -> None:
    written = configs.to_dict(configs.from_dict(older))
    assert written["policy_class"] == newer
    assert not {"lookahead", "segments"} & set(written)
    assert configs.differences(configs.from_dict(older), configs.from_dict({"policy_class": newer})) == []


def test_a_flag_s_policy_class_takes_the_place_of_the_file_s_whichever_way_both_are_written(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for older in ('"segment"\nsegments = [3, 3]', '"k-step 5"', '"k-step"'):
        file.write_text(f"policy_class = {older}")
        for flags, label in (({"lookahead": 3}, "3-step"), ({"policy_class": "greedy"}, "greedy")):
            assert configs.load(file, flags).label == label
    with pytest.raises(ConfigError, match=r"run.toml: policy_class: k-step needs lookahead"):
        configs.load(file)


matrices = st.integers(1, 4).flatmap(
    lambda n: hnp.arrays(float, (n, n), elements=st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0])).map(np.triu)
)
named = st.sampled_from(["full", "greedy", "auto", "my.module:masks.discounted"])
lengths = st.lists(st.integers(1, 9), min_size=1).map(lambda sizes: "segment " + ",".join(map(str, sizes)))


@given(planning=named | st.integers(1, 9) | lengths | matrices)
def test_a_policy_class_survives_toml(planning: object) -> None:
    config = configs.from_dict({"policy_class": planning})
    again = configs.from_dict(tomllib.loads(tomli_w.dumps(configs.to_dict(config))))
    assert again == config
    assert hash(again.policy_class) == hash(config.policy_class)
    if isinstance(planning, np.ndarray):
        np.testing.assert_array_equal(again.policy_class.mask(len(planning)), planning)  # type: ignore[union-attr]


@given(
    batch=st.integers(1, 50),
    k=st.one_of(st.none(), st.integers(1, 9)),
    rate=st.floats(1e-6, 1),
    files=st.lists(st.text(min_size=1), max_size=3),
    options=st.dictionaries(st.text(min_size=1), st.one_of(st.integers(0, 9), st.text(), st.booleans())),
)
def test_settings_survive_toml(
    batch: int, k: int | None, rate: float, files: list[str], options: dict[str, object]
) -> None:
    settings = {"batch": batch, "group": 1, "baseline": "none", "learning_rate": rate}
    settings |= {"offline": {"files": files}, "env": {"partner_options": options}}
    config = configs.from_dict(settings | ({} if k is None else {"policy_class": "k-step", "lookahead": k}))
    again = configs.from_dict(tomllib.loads(tomli_w.dumps(configs.to_dict(config))))
    assert again == config


def test_differences_name_the_field_and_forgive_what_may_change() -> None:
    before = TrainConfig()
    raised = {"judge_options": {"max_calls": 9}, "max_failure_rate": 0.5}
    after = configs.from_dict({"iterations": 7, "out": "x", "lora": {"rank": 3}, "seed": 9, "env": raised})
    assert configs.differences(before, after) == ["lora.rank: was 16, got 3", "seed: was 0, got 9"]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        configs.load(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("a = ")
    with pytest.raises(ConfigError, match=r"broken\.toml: expected TOML"):
        configs.load(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    "unread", [{"kl_coefficient": 0.5}, {"importance": "turn"}, {"baseline": "leave-one-out", "group": 2}]
)
def test_what_logged_dialogues_would_ignore_is_refused(unread: dict[str, object]) -> None:
    logged = {"offline": {"files": ["talks.jsonl"]}}
    with pytest.raises(ConfigError, match=rf"{next(iter(unread))}: logged dialogues are learned from without it, got"):
        configs.from_dict({**logged, **unread})
    assert configs.from_dict({**logged, "baseline": "none"}).baseline == "none"
