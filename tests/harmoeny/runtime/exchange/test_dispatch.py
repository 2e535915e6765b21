from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.placement import place
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.dispatch import combine, count_assignments, dispatch
from harmoeny.runtime.exchange.gather import weighted_sum
from harmoeny.runtime.exchange.order import Sent
from tests.harmoeny.runtime.cases import RandomPlan, random_tokens
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples


@examples(150)
@given(
    world_size=st.integers(1, 6),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 3),
    token_counts=st.lists(st.sampled_from([0, 1, 7, 20]), min_size=6, max_size=6),
    masked=st.sampled_from([0.0, 0.3]),
    exchange=st.sampled_from(["collective", "put"]),
    drop=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_dispatch_then_combine_is_the_identity_on_what_the_plan_keeps(
    world_size: int, num_experts: int, top_k: int, token_counts: list[int], masked: float, drop: bool, seed: int,
    exchange: str,
) -> None:  # fmt: skip
    top_k = min(top_k, num_experts)
    placement = place("contiguous", num_experts, world_size)

    def rank_main(threads: ThreadCommunicator) -> None:
        comm = open_exchange(threads, exchange)
        t = random_tokens(seed % 2**31 + comm.rank, token_counts[comm.rank], num_experts, top_k, masked=masked)
        counts = comm.gather_counts(count_assignments(t.ids, num_experts)[0])
        plan = RandomPlan(seed, drop=drop).plan(counts, placement)
        rows, dispatched = dispatch(t.hidden, t.ids, counts, plan, comm)

        # What arrives: as many rows per expert as the plan says, and exactly the tokens that were sent.
        assert dispatched.num_executed_E.tolist() == plan.tokens[:, :, comm.rank].sum(axis=0).tolist()
        everyone = comm.gather_objects(t)
        ends = np.cumsum(dispatched.num_executed_E)
        for expert in range(num_experts):
            block = rows[ends[expert] - dispatched.num_executed_E[expert] : ends[expert]]
            candidates = torch.cat([o.hidden[(o.ids == expert).any(dim=1)] for o in everyone])
            for row in block:
                assert (candidates == row).all(dim=1).any(), "a row at an expert that its token did not choose"

        output = combine(rows, t.weights, dispatched)
        kept = torch.zeros(t.ids.numel(), dtype=torch.bool)
        kept[dispatched.sent.assignment_S] = True
        kept = kept.view_as(t.ids)
        for expert in range(num_experts):
            sent = int(plan.tokens[comm.rank, expert].sum())
            assert int((kept & (t.ids == expert)).sum()) == sent
        share = (t.weights * kept).sum(dim=1, keepdim=True)
        torch.testing.assert_close(output, t.hidden * share)
        comm.close()

    run_threads(world_size, rank_main)


def test_counts_leave_out_masked_assignments() -> None:
    ids = torch.tensor([[0, 2], [-1, 2], [3, -1]])
    assert count_assignments(ids, 5)[0].tolist() == [1, 0, 2, 1, 0]
    assert count_assignments(torch.empty(0, 2, dtype=torch.int64), 3)[0].tolist() == [0, 0, 0]


def test_a_result_that_is_no_number_stays_with_its_token() -> None:
    rows = torch.tensor([[float("nan")], [2.0], [3.0]])
    output = weighted_sum(rows, torch.full((4, 2), 0.5), Sent(torch.tensor([2, 0, 7])))
    assert output.isnan().squeeze(1).tolist() == [False, True, False, False]
    assert output[[0, 2, 3], 0].tolist() == [1.0, 0.0, 1.5]
