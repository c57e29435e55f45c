"""Utterance: any Unicode string up to a length."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
from gymnasium.spaces import Dict
from gymnasium.spaces.utils import flatten_space
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_gym.spaces import Utterance


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_contained_up_to_the_length(text: str) -> None:
    assert Utterance(40).contains(text)
    assert (len(text) <= 8) == Utterance(8).contains(text)


@pytest.mark.parametrize("thing", [None, 3, b"bytes", ["list"], 1.0])
def test_nothing_but_a_string_is_contained(thing: object) -> None:
    assert thing not in Utterance()


def test_samples_are_contained_seeded_and_short_enough() -> None:
    for length in (1, 3, 4096):
        space, twin = Utterance(length, seed=5), Utterance(length, seed=5)
        samples = [space.sample() for _ in range(50)]
        assert all(sample in space for sample in samples)
        assert samples == [twin.sample() for _ in range(50)]
        assert len(set(samples)) > 1
    assert {len(Utterance(2, seed=i).sample()) for i in range(50)} == {0, 1, 2}


def test_equality_hash_repr_and_copies() -> None:
    assert Utterance(5) == Utterance(5, seed=1) != Utterance(6)
    assert hash(Utterance(5)) == hash(Utterance(5))
    assert repr(Utterance(5)) == "Utterance(5)"
    for again in (copy.deepcopy(Utterance(5)), pickle.loads(pickle.dumps(Utterance(5)))):
        assert again == Utterance(5)
        assert again.sample() in again


def test_strings_serialise_as_they_are() -> None:
    space, texts = Utterance(), ["", "héllo\n", "日本語🙂"]
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(texts)))) == texts
    nested = Dict({"a": Utterance(9)})
    assert nested.from_jsonable(nested.to_jsonable([{"a": "x"}])) == [{"a": "x"}]


def test_gymnasium_batches_it_to_a_tuple_and_does_not_flatten_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched = batch_space(Dict({"a": Utterance(9)}), 2)
    assert batched.contains({"a": ("x", "y")})
    assert batched.contains(batched.sample())
    assert not Utterance().is_np_flattenable
    with pytest.raises(NotImplementedError):
        flatten_space(Utterance())


@pytest.mark.parametrize("length", [0, -1, 2.5, "9"])
def test_a_length_that_is_none_is_refused(length: object) -> None:
    with pytest.raises(ValueError, match="expected max_length to be a positive integer"):
        Utterance(length)  # type: ignore[arg-type]


def test_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected no mask"):
        Utterance().sample(mask=1)
