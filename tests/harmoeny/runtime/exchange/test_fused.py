"""Fused passes over rows against PyTorch's calls and against loops: in Triton's interpreter, or on the device."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.head_start import HeadStart
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.by_slot import NO_SLOT, rows_by_slot, sum_by_token
from harmoeny.runtime.exchange.early import EarlyRows, early_by_slot
from harmoeny.runtime.exchange.gather import Gathering, add_rows, gather_rows, weighted_sum
from harmoeny.runtime.exchange.order import Assignments, Sent
from tests.harmoeny.runtime.cases import random_tokens
from tests.harmoeny.test_head_start import head_starts
from tests.strategies import examples

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is not installed")
pytestmark = [NO_TRITON, pytest.mark.cuda] if ON_CUDA else [NO_TRITON]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
#: On a device every combination is compiled, so there are few. Rows are of 2 bytes up to several tiles, and of whole
#: vectors or not.
HIDDEN_SIZES = st.sampled_from([21, 1032] if ON_CUDA else [1, 3, 8, 21, 64, 1025])
TOP_KS = st.just(3) if ON_CUDA else st.integers(1, 5)
WORLD_SIZES = st.just(4) if ON_CUDA else st.sampled_from([1, 2, 4])


def draw_ids(rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int, masked: float) -> Tensor:
    ids = rng.integers(0, num_experts, (num_tokens, top_k))
    ids[rng.random(ids.shape) < masked] = -1
    return torch.from_numpy(ids).to(DEVICE)


@examples(60)
@given(
    num_tokens=st.sampled_from([0, 1, 6]), top_k=TOP_KS, hidden_size=HIDDEN_SIZES, dtype=DTYPES,
    drop=st.booleans(), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_results_add_up(
    num_tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype, drop: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    assignment = rng.permutation(num_tokens * top_k)
    assignment = assignment[: rng.integers(0, len(assignment) + 1)] if drop else assignment
    row = np.full(num_tokens * top_k, -1)
    row[assignment] = np.arange(len(assignment))
    t = random_tokens(seed, num_tokens, 8, top_k, dtype=dtype)
    weights = t.weights.to(DEVICE)
    # Behind the results lies what is no number.
    rows = torch.from_numpy(rng.standard_normal((len(assignment), hidden_size))).to(DEVICE, dtype)
    more = torch.cat([rows, torch.full_like(rows[:1], torch.nan)]) if len(rows) else rows
    found = fused.add_up(more, weights, torch.from_numpy(row.reshape(t.ids.shape)).to(DEVICE), len(rows))
    torch.testing.assert_close(found, weighted_sum(rows, weights, Sent(torch.from_numpy(assignment).to(DEVICE))))
    wanted = torch.zeros(num_tokens, hidden_size, dtype=torch.float64)
    for number, a in enumerate(assignment):
        wanted[a // top_k] += t.weights.double().reshape(-1)[a] * rows[number].cpu().double()
    atol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-2, atol=atol)
    # Onto others; those of tokens without results, which may be no numbers, stay what they are.
    onto = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(DEVICE, dtype)
    onto[torch.from_numpy((row.reshape(t.ids.shape) < 0).all(axis=1))] = torch.nan
    before = onto.cpu().double()
    added = fused.add_up(more, weights, torch.from_numpy(row.reshape(t.ids.shape)).to(DEVICE), len(rows), onto)
    assert added is onto
    torch.testing.assert_close(onto.cpu().double(), before + wanted, rtol=1e-2, atol=atol, equal_nan=True)
    # Some of the rows later than the others.
    sent = Sent(torch.from_numpy(assignment).to(DEVICE), torch.from_numpy(row.reshape(t.ids.shape)).to(DEVICE))
    bounds = np.sort(rng.integers(0, len(rows) + 1, 4)).tolist()
    later = [slice(*bounds[:2]), slice(*bounds[2:])]
    absent = rows.clone()
    for part in later:
        absent[part] = torch.nan
    found = add_rows(rows, weights, sent, weighted_sum(absent, weights, sent, later), later)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-2, atol=2 * atol)  # rounded twice


@examples(60)
@given(
    num_tokens=st.sampled_from([0, 1, 5, 700]), top_k=TOP_KS, num_experts=st.integers(1, 6),
    masked=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_assignments_are_counted_and_numbered(
    num_tokens: int, top_k: int, num_experts: int, masked: float, seed: int
) -> None:
    ids = draw_ids(np.random.default_rng(seed), num_tokens, top_k, num_experts, masked)
    numbers, counts = fused.number_assignments(ids, num_experts)
    seen = [0] * num_experts
    for expert, number in zip(ids.flatten().tolist(), numbers.flatten().tolist(), strict=True):
        if expert >= 0:
            assert number == seen[expert]
            seen[expert] += 1
    assert counts.tolist() == seen


@examples(60)
@given(
    num_tokens=st.sampled_from([1, 5, 300]), top_k=TOP_KS, num_experts=st.integers(1, 6),
    spare=st.integers(0, 2), masked=st.sampled_from([0.0, 0.3, 1.0]), hidden_size=HIDDEN_SIZES, dtype=DTYPES,
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_rows_by_slot_are_those_of_a_sort(
    num_tokens: int, top_k: int, num_experts: int, spare: int, masked: float, hidden_size: int, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ids = draw_ids(rng, num_tokens, top_k, num_experts, masked)
    hidden = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(DEVICE, dtype)
    num_slots = num_experts + spare
    slots = rng.permutation(num_slots)[:num_experts]
    slot_of = torch.tensor([NO_SLOT, *slots.tolist()], dtype=torch.int32, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_available", lambda _: False)
        wanted = rows_by_slot(hidden, ids, slot_of, num_slots)
        patch.setattr(fused, "is_available", lambda _: True)
        found = rows_by_slot(hidden, ids, slot_of, num_slots)
    assert torch.equal(found.row_TK, wanted.row_TK)
    assert torch.equal(found.ends, wanted.ends)
    executed = int(wanted.ends[-1])
    assert torch.equal(found.rows_RH[:executed], wanted.rows_RH[:executed])


@examples(60)
@given(
    num_tokens=st.sampled_from([1, 5, 12]), top_k=TOP_KS, num_experts=st.integers(1, 6),
    masked=st.sampled_from([0.0, 0.3, 1.0]), hidden_size=HIDDEN_SIZES, dtype=DTYPES, seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_as_many_rows_as_there_are_at_most_are_enough(
    num_tokens: int, top_k: int, num_experts: int, masked: float, hidden_size: int, dtype: torch.dtype, seed: int
) -> None:
    """What comes of the rows behind them is no number, and is added to nothing."""
    rng = np.random.default_rng(seed)
    ids = draw_ids(rng, num_tokens, top_k, num_experts, masked)
    hidden = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(DEVICE, dtype)
    slots = rng.permutation(num_experts)
    slot_of = torch.tensor([NO_SLOT, *slots.tolist()], dtype=torch.int32, device=DEVICE)
    executed = int((ids >= 0).sum())
    weights, sums, rows = torch.rand(ids.shape, device=DEVICE).to(dtype), [], []
    for fused_too in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "is_available", lambda _, there=fused_too: there)
            few = rows_by_slot(hidden, ids, slot_of, num_experts, most_rows=executed)
            assert int(few.ends[-1]) == executed
            assert len(few.rows_RH) <= executed + 1
            rows.append(few.rows_RH[:executed])
            results = few.rows_RH.clone()
            results[executed:] = torch.nan
            sums.append(sum_by_token(results, weights, few.row_TK, onto=torch.ones_like(hidden)))
    assert torch.equal(*rows)
    torch.testing.assert_close(*sums, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@examples(60)
@given(
    num_tokens=st.sampled_from([0, 1, 9]), top_k=TOP_KS, num_experts=st.integers(1, 6),
    world_size=WORLD_SIZES, masked=st.sampled_from([0.0, 0.3]), hidden_size=HIDDEN_SIZES, dtype=DTYPES,
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_rows_are_gathered_in_the_order_of_a_sort(
    num_tokens: int, top_k: int, num_experts: int, world_size: int, masked: float, hidden_size: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ids = draw_ids(rng, num_tokens, top_k, num_experts, masked)
    hidden = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(DEVICE, dtype)
    counts = np.array([int((ids == expert).sum()) for expert in range(num_experts)])
    sent_by_expert = rng.multinomial(rng.integers(0, counts + 1), rng.dirichlet(np.ones(world_size), num_experts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_available", lambda _: False)
        wanted, wanted_sent = gather_rows(hidden, Assignments(ids, counts), sent_by_expert)
        patch.setattr(fused, "is_available", lambda _: True)
        found, found_sent = gather_rows(hidden, Assignments(ids, counts), sent_by_expert)
        in_turn = Gathering(hidden, Assignments(ids, counts), sent_by_expert)
        first = int(rng.integers(0, world_size + 1))
        in_turn.gather(range(first))
        before = int(sent_by_expert[:, :first].sum())
        assert torch.equal(in_turn.rows_SH[:before], wanted[:before])
        in_turn.gather(range(first, world_size))
    assert torch.equal(found, wanted)
    assert torch.equal(in_turn.rows_SH, wanted)
    assert torch.equal(found_sent.assignment_S, wanted_sent.assignment_S)
    assert torch.equal(in_turn.sent.assignment_S, wanted_sent.assignment_S)
    assert found_sent.row_TK is not None
    assert in_turn.sent.row_TK is not None
    assert torch.equal(in_turn.sent.row_TK, found_sent.row_TK)
    row = torch.full((ids.numel(),), -1, device=DEVICE)
    row[wanted_sent.assignment_S] = torch.arange(len(wanted), device=DEVICE)
    assert torch.equal(found_sent.row_TK.flatten(), row)


@examples(60)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=40), shared=st.integers(0, 1), head_start=head_starts,
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_early_rows_are_those_that_pytorchs_calls_choose(
    counts: list[int], shared: int, head_start: HeadStart, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_experts, num_slots = len(counts) + shared, len(counts) + shared + 1
    slots = rng.permutation(num_slots)[:num_experts]
    slots[rng.random(num_experts) < 0.4] = NO_SLOT
    slot_of = torch.tensor([NO_SLOT, *slots.tolist()], dtype=torch.int32, device=DEVICE)
    wanted_ids = rng.permutation(np.repeat(np.arange(-1, len(counts)), [3, *counts]))
    ids = torch.from_numpy(wanted_ids[: len(wanted_ids) // 3 * 3]).view(-1, 3).to(DEVICE)
    if shared:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], num_experts - 1)], dim=1)
    hidden = torch.from_numpy(rng.standard_normal((len(ids), 8))).to(DEVICE, torch.float32)
    numbers, counted = fused.number_assignments(ids, num_experts)

    def divide(numbers: Tensor | None) -> EarlyRows:
        return early_by_slot(hidden, ids, numbers, counted, slot_of, len(counts), num_slots, head_start)

    found = divide(numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_available", lambda _: False)
        wanted = divide(None)
    assert torch.equal(found.early_ids_TK, wanted.early_ids_TK)
    assert torch.equal(found.rest_ids_TK, wanted.rest_ids_TK)
    assert torch.equal(found.by_slot.ends, wanted.by_slot.ends)
    executed = int(wanted.by_slot.ends[-1])
    assert torch.equal(found.by_slot.rows_RH[:executed], wanted.by_slot.rows_RH[:executed])
    is_early = wanted.early_ids_TK >= 0
    assert torch.equal(found.by_slot.row_TK[is_early], wanted.by_slot.row_TK[is_early])
    anew, _ = fused.number_assignments(wanted.rest_ids_TK, num_experts)
    assert found.rest_numbers_TK is not None
    assert torch.equal(found.rest_numbers_TK[wanted.rest_ids_TK >= 0], anew[wanted.rest_ids_TK >= 0])
