"""All ways to move rows, between ranks whose memory is this process's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.exchange.dispatch import count_assignments
from harmoeny.runtime.exchange.layout import Layout
from harmoeny.runtime.exchange.movers import Mover, Rows, TorchMover, TritonMover, WindowRows
from harmoeny.runtime.exchange.order import Assignments, Expected, tokens_of
from tests.harmoeny.runtime.exchange.test_fused import (
    DEVICE,
    DTYPES,
    HIDDEN_SIZES,
    NO_TRITON,
    TOP_KS,
    WORLD_SIZES,
    draw_ids,
)
from tests.strategies import examples

pytestmark = [pytest.mark.cuda] if torch.cuda.is_available() else []


def spread(counts: IntArray, rng: np.random.Generator, *, drop: bool) -> IntArray:
    """Any plan's tokens: every source's assignments of an expert go anywhere, some nowhere."""
    kept = rng.integers(0, counts + 1) if drop else counts
    shares = rng.dirichlet(np.full(len(counts), 0.5), size=counts.shape)
    return rng.multinomial(kept, shares)


class ByBlock(TorchMover):
    """As on a CPU."""

    def send(self) -> None:
        self._send_by_block(tokens_of(self.sent.assignment_S, self._rows.assignments.expert_ids_TK.shape[1]))


class ByRow(TorchMover):
    """As on CUDA without Triton."""

    def send(self) -> None:
        self._send_by_row(tokens_of(self.sent.assignment_S, self._rows.assignments.expert_ids_TK.shape[1]))


def as_windows(rows: list[Tensor]) -> WindowRows:
    """What lies in these tensors, by rank."""
    num_rows = np.array([len(own) for own in rows])
    memory = [own.flatten().view(torch.uint8) for own in rows]
    return WindowRows(memory, [own.data_ptr() for own in rows], num_rows, rows[0])


@pytest.mark.parametrize("kind", [ByRow, pytest.param(TritonMover, marks=NO_TRITON)])
@examples(60)
@given(
    world_size=WORLD_SIZES,
    num_experts=st.integers(1, 7),
    top_k=TOP_KS,
    tokens=st.lists(st.sampled_from([0, 1, 2, 9]), min_size=4, max_size=4),
    hidden_size=HIDDEN_SIZES,
    dtype=DTYPES,
    masked=st.sampled_from([0.0, 0.3]),
    drop=st.booleans(),
    reorder=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_movers_move_alike(
    world_size: int, num_experts: int, top_k: int, tokens: list[int], hidden_size: int, dtype: torch.dtype,
    masked: float, drop: bool, reorder: bool, seed: int, kind: Callable[[Rows], Mover],
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ids = [draw_ids(rng, tokens[rank], top_k, num_experts, masked) for rank in range(world_size)]
    hidden = [torch.from_numpy(rng.standard_normal((n, hidden_size))).to(DEVICE, dtype) for n in tokens[:world_size]]
    counts = np.stack([count_assignments(own, num_experts)[0].cpu().numpy() for own in ids])
    plan = spread(counts, rng, drop=drop)
    orders = [
        rng.permutation(np.flatnonzero(plan[:, :, rank].any(axis=0))).tolist() if reorder else None
        for rank in range(world_size)
    ]

    last = rng.random((num_experts, world_size)) < 0.4
    held = np.stack([rng.permutation(num_experts) for _ in range(world_size)]) if reorder else None

    def exchange(kind: Callable[[Rows], Mover], expected: Expected | None) -> list[list[Tensor]]:
        """Return all memory that was written, of one kind a list; first what arrives before it is in order."""
        # What nobody writes keeps a value that tells it.
        targets = [hidden[0].new_full((n, hidden_size), 77) for n in plan.sum(axis=(0, 1))]
        results = [hidden[0].new_full((n, hidden_size), 88) for n in plan.sum(axis=(1, 2))]
        layouts = [Layout.of(plan, rank, orders[rank], expected) for rank in range(world_size)]
        wanted = [Assignments(own, own_counts) for own, own_counts in zip(ids, counts, strict=True)]
        movers = [
            kind(Rows(layout, own, assignments, as_windows(targets), as_windows(results)))
            for layout, own, assignments in zip(layouts, hidden, wanted, strict=True)
        ]
        for mover in movers:
            mover.send()
        arrived = [mover.arrived().clone() for mover in movers]
        for mover, rows in zip(movers, arrived, strict=True):
            mover.bring_back(-rows)
        return [[target.clone() for target in targets], arrived, results, [mover.sent.assignment_S for mover in movers]]

    def assert_equal(first: list[list[Tensor]], second: list[list[Tensor]]) -> None:
        for ours, theirs in zip(first, second, strict=True):
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))

    by_block, by_kind = (exchange(each, Expected(last, held)) for each in (ByBlock, kind))
    assert_equal(by_kind, by_block)
    assert_equal(by_kind[1:], exchange(ByBlock, None)[1:])  # how rows arrive changes nothing else
    for own, result, assignment in zip(hidden, *by_kind[2:], strict=True):
        assert torch.equal(result, -own[assignment // top_k]), "a token's own rows come back to it"


def test_what_is_fetched_arrives_last_and_from_the_most_rows_on() -> None:
    tokens = np.array([[[0, 2], [1, 0], [0, 3], [2, 5], [0, 0]], [[4, 0], [0, 1], [1, 0], [0, 1], [0, 0]]])
    fetched = np.zeros((5, 2), np.bool_)
    fetched[[1, 3], 1] = True
    assert not Layout.of(tokens, 1, [0, 2, 3, 1], Expected(fetched)).regroups
    assert Layout.of(tokens, 1, [0, 2, 1, 3], Expected(fetched)).regroups
    assert Layout.of(tokens, 1, None, Expected(fetched)).regroups
    assert not Layout.of(tokens, 0, None, Expected(fetched)).regroups
    arrived = Layout.of(tokens, 1, None, Expected(fetched)).arrived_ES
    assert arrived.tolist() == [[0, 2], [11, 11], [2, 5], [5, 10], [5, 5]]


def test_rows_arrive_in_the_order_of_the_slots_where_others_know_it() -> None:
    tokens = np.zeros((2, 4, 2), np.int64)
    tokens[:, :, 1] = [[1, 0, 2, 3], [0, 0, 5, 1]]
    held = np.array([[0, 1, 2, 3], [3, 0, 1, 2]])
    fetched = np.zeros((4, 2), np.bool_)
    layout = Layout.of(tokens, 1, [3, 0, 2], Expected(fetched, held))
    assert not layout.regroups
    assert layout.arrived_ES.tolist() == [[4, 5], [5, 5], [5, 7], [0, 3]]
    fetched[3, 1] = True
    assert not Layout.of(tokens, 1, [0, 2, 3], Expected(fetched, held)).regroups
