"""Losses: golden values, padding, micro-batches, masked tokens, refusals."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from ppg_agents.losses import (
    Aggregation,
    aggregate,
    batch_units,
    broadcast_credit,
    partial_policy_gradient,
    turn_token_mask,
)

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

# Two conversations: turn 0 of two tokens and turn 1 of one, then turn 0 of three tokens.
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
TURN = torch.tensor([[-1, 0, 0, 9, 1], [0, 0, 0, -1, -1]])
LOG_PROBS = torch.tensor([[-9.0, -1.0, -2.0, -9.0, -4.0], [-1.0, -1.0, -4.0, -9.0, -9.0]], dtype=torch.float64)
CREDIT = torch.tensor([[1.0, 0.5], [2.0, 0.0]], dtype=torch.float64)


def loss_and_gradient(
    log_probs: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    credit: Tensor,
    aggregation: Aggregation,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    leaf = log_probs.clone().requires_grad_()
    loss = partial_policy_gradient(
        leaf,
        token_mask,
        turn_index,
        credit,
        aggregation=aggregation,
        constant=7.0 if aggregation == "constant" else None,
        batch_size=batch_size,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [  # per-token losses: turn (0,0): 1, 2; turn (0,1): 2; turn (1,0): 2, 2, 8
        ("sum", 17 / 2),
        ("constant", 17 / (2 * 7)),
        ("token_mean", 17 / 6),
        ("sequence_mean", (5 / 3 + 12 / 3) / 2),
        ("turn_mean", (3 / 2 + 2 + 12 / 3) / 3),
    ],
)
def test_values_by_hand(aggregation: Aggregation, expected: float) -> None:
    loss, _ = loss_and_gradient(LOG_PROBS, MASK, TURN, CREDIT, aggregation)
    assert loss.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("sum", 5 / 2), ("token_mean", 5 / 3), ("sequence_mean", 5 / 3), ("turn_mean", (3 / 2 + 2) / 2)],
)
def test_a_conversation_without_tokens_counts_for_sum_only(aggregation: Aggregation, expected: float) -> None:
    mask = MASK & torch.tensor([[True], [False]])
    loss, _ = loss_and_gradient(LOG_PROBS, mask, TURN, CREDIT, aggregation)
    assert loss.item() == pytest.approx(expected, abs=1e-15)


def test_gradient_by_hand() -> None:
    _, gradient = loss_and_gradient(LOG_PROBS, MASK, TURN, CREDIT, "sum")
    assert gradient.tolist() == [[0, -0.5, -0.5, 0, -0.25], [-1, -1, -1, 0, 0]]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_changes_nothing(aggregation: Aggregation) -> None:
    loss, gradient = loss_and_gradient(LOG_PROBS, MASK, TURN, CREDIT, aggregation)
    pad = torch.full((2, 3), float("nan"), dtype=torch.float64)
    padded = loss_and_gradient(
        torch.cat([LOG_PROBS, pad], 1),
        torch.nn.functional.pad(MASK, (0, 3)),
        torch.nn.functional.pad(TURN, (0, 3), value=1),
        torch.cat([CREDIT, pad], 1),
        aggregation,
    )
    torch.testing.assert_close(padded[0], loss, rtol=0, atol=1e-15)
    torch.testing.assert_close(padded[1][:, :5], gradient, rtol=0, atol=1e-15)
    assert not padded[1][:, 5:].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(aggregation: Aggregation) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    mask = torch.rand(7, 12, generator=generator) < 0.6
    mask[3] = False
    turn = torch.randint(0, 4, (7, 12), generator=generator)
    credit = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    loss, gradient = loss_and_gradient(log_probs, mask, turn, credit, aggregation)
    size = batch_units(mask, turn, aggregation)
    parts = [
        loss_and_gradient(log_probs[rows], mask[rows], turn[rows], credit[rows], aggregation, size)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_invalid_turn_enters_no_mean(aggregation: Aggregation) -> None:
    valid = torch.tensor([[True, False], [True, True]])
    mask = turn_token_mask(MASK, TURN, valid)
    assert mask.tolist() == [[False, True, True, False, False], [True, True, True, False, False]]
    loss, gradient = loss_and_gradient(LOG_PROBS, mask, TURN, CREDIT * valid, aggregation)
    absent = MASK.clone()
    absent[0, 4] = False
    expected = loss_and_gradient(LOG_PROBS, absent, TURN, CREDIT, aggregation)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert gradient[0, 4] == 0


def test_credit_carries_no_gradient() -> None:
    credit = CREDIT.clone().requires_grad_()
    leaf = LOG_PROBS.clone().requires_grad_()
    partial_policy_gradient(leaf, MASK, TURN, credit).backward()  # type: ignore[no-untyped-call]
    assert credit.grad is None


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_learn_from_is_zero(aggregation: Aggregation) -> None:
    loss, gradient = loss_and_gradient(LOG_PROBS, torch.zeros_like(MASK), TURN, CREDIT, aggregation)
    assert loss == 0
    assert not gradient.any()


def test_offline_loss_is_minus_the_objective_and_falls_when_likelihood_rises() -> None:
    loss = partial_policy_gradient(LOG_PROBS, MASK, TURN, CREDIT)
    objective = (1.0 * (-1 - 2) + 0.5 * -4 + 2.0 * (-1 - 1 - 4)) / 2
    assert loss.item() == pytest.approx(-objective, abs=1e-15)
    assert partial_policy_gradient(LOG_PROBS / 2, MASK, TURN, CREDIT) < loss


def test_broadcast_credit_by_hand() -> None:
    assert broadcast_credit(CREDIT, MASK, TURN).tolist() == [[0, 1, 1, 0, 0.5], [2, 2, 2, 0, 0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"log_probs": LOG_PROBS[:, :4]},
            r"floating log_probs of token_mask's shape \[2, 5\], got .* \[2, 4\]",
        ),
        ({"log_probs": LOG_PROBS.long()}, r"floating log_probs .* got torch.int64"),
        ({"token_mask": MASK.long()}, r"boolean token_mask \[B, L\], got torch.int64"),
        ({"turn_index": TURN.double()}, r"integer turn_index .* got torch.float64"),
        ({"turn_index": TURN + 1}, r"turn indices in \[0, 2\), the turns of credit, got 2 at \[0, 4\]"),
        ({"turn_index": TURN - 1}, r"got -1 at \[0, 1\]"),
        ({"credit": CREDIT[:1]}, r"credit of shape \[2, n\], got \[1, 2\]"),
        ({"credit": CREDIT.long()}, r"floating credit, got torch.int64"),
        ({"credit": CREDIT / torch.tensor([1.0, 0.0])}, r"finite credit, got inf at \[0, 1\]"),
        ({"aggregation": "mean"}, r"the aggregation to be one of sum, constant, .* got 'mean'"),
        ({"aggregation": "constant"}, r"constant > 0 for 'constant' only, got None"),
        ({"constant": 3.0}, r"constant > 0 for 'constant' only, got 3.0 for 'sum'"),
        ({"aggregation": "constant", "constant": -1.0}, r"constant > 0"),
        ({"aggregation": "token_mean", "batch_size": 2}, r"batch_size >= 6, the units of 'token_mean'"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"log_probs": LOG_PROBS, "token_mask": MASK, "turn_index": TURN, "credit": CREDIT}
    with pytest.raises(ValueError, match=message):
        partial_policy_gradient(**(arguments | changed))  # type: ignore[arg-type]


def test_turn_token_mask_and_aggregate_refuse_too() -> None:
    with pytest.raises(ValueError, match=r"boolean valid, got torch.float64"):
        turn_token_mask(MASK, TURN, CREDIT)
    with pytest.raises(ValueError, match=r"the turns of valid, got 1 at \[0, 4\]"):
        turn_token_mask(MASK, TURN, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"floating per_token"):
        aggregate(LOG_PROBS[:1], MASK, TURN)
