from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from baselines.libra import Libra, import_experts, share_remote
from harmoeny.following import transitions
from harmoeny.placement import IntArray, Placement, place
from harmoeny.runtime.layer.residency import Residency
from harmoeny.trace import RoutingTrace
from tests.harmoeny.runtime.cases import random_experts, start
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import batches, examples


def shifting_trace(num_tokens: int, num_experts: int, num_layers: int, seed: int = 0) -> RoutingTrace:
    """In every layer a token goes to the expert after its last one."""
    first = np.random.default_rng(seed).integers(0, num_experts, (num_tokens, 1))
    return RoutingTrace([(first + layer) % num_experts for layer in range(num_layers)], [0] * num_layers)


def test_what_always_follows_is_predicted_exactly() -> None:
    policy = Libra().fitted(shifting_trace(1000, 6, 3), 6, 3)
    assert policy.fit_report() == {"predicted_experts": 1.0, "predicted_load": pytest.approx(1.0)}
    then = policy.following[0]
    assert then is not None
    np.testing.assert_allclose(then, np.roll(np.eye(6), 1, axis=1))


def test_chance_is_predicted_by_chance() -> None:
    rng = np.random.default_rng(0)
    trace = RoutingTrace([rng.integers(0, 8, (8000, 1)) for _ in range(3)], [0, 0, 0])
    report = Libra().fitted(trace, 8, 2).fit_report()
    assert report["predicted_experts"] == pytest.approx(1 / 8, abs=0.03)
    assert report["predicted_load"] > 0.95, "loads are even, which is easily said"


def test_nothing_is_predicted_across_stacks_and_unseen_experts_are_average() -> None:
    trace = RoutingTrace([np.array([[0], [0], [1]]), np.array([[1], [0], [1]]), np.array([[0]])], [0, 0, 1])
    first, second = transitions(trace, 3)
    assert second is None
    assert first is not None
    np.testing.assert_allclose(first, np.array([[0.5, 0.5, 0], [0, 1, 0], [1 / 3, 2 / 3, 0]]), atol=1e-6)


def test_own_tokens_come_first_then_the_most_loaded_rank_is_relieved() -> None:
    home = np.array([0, 0, 1, 2])
    expected = np.array([[90.0, 0, 0, 0], [60, 50, 0, 0], [30, 20, 5, 0]])
    own = import_experts(expected, home, 1, 1.0)
    assert np.flatnonzero(own[:, 1]).tolist() == [0, 2]
    assert np.flatnonzero(own[:, 2]).tolist() == [0, 3]
    # Rank 0 has 250 of 255: of expert 0, its hottest, 125 go to rank 2, which has none. Then expert 1 (70) is hotter.
    relief = import_experts(expected, home, 1, 0.0)
    assert relief.tolist() == [[True, False, True], [True, True, False], [False, True, False], [False, False, True]]


@examples(200)
@given(batch=batches())
def test_local_assignments_stay_and_the_rest_goes_to_holders(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = Libra().plan(counts, placement)
    plan.validate(counts, placement)
    assert not plan.fetch.any()
    stays = plan.tokens[np.arange(len(counts)), :, np.arange(len(counts))]
    assert (stays[placement.resident.T] == counts[placement.resident.T]).all()


def test_remote_assignments_even_the_loads_out() -> None:
    counts = np.array([[0, 0], [0, 0], [1000, 0], [1000, 40]], dtype=np.int64)
    resident = np.array([[True, True, False, False], [False, True, False, False]])
    load = share_remote(counts, np.array([0, 1]), resident).sum(axis=(0, 1))
    assert load.sum() == 2040
    assert abs(int(load[0]) - int(load[1])) <= 2040 // 4 // 128
    at_home = share_remote(counts, np.array([0, 1]), np.array([[True, False, False, False], resident[1].tolist()]))
    assert at_home.sum(axis=(0, 1)).tolist() == [2000, 40, 0, 0]


def test_the_next_layer_is_placed_by_this_layers_counts_and_never_by_its_own() -> None:
    policy = Libra(spare_slots=1, own_share=0.0).fitted(shifting_trace(1000, 4, 2), 4, 2)
    placements = [place("contiguous", 4, 2) for _ in range(2)]
    residency = Residency(policy, placements)
    counts = np.array([[0, 800, 0, 0], [0, 800, 0, 0]], dtype=np.int64)  # expert 2 will be hot: home is rank 1
    changed = residency.look_ahead(0, counts)
    assert changed is not None
    assert changed.resident[2].tolist() == [True, True]
    assert residency.placements[1] is changed
    assert residency.placements[0] is placements[0]
    assert residency.look_ahead(1, counts) is None, "no layer follows"
    assert Libra().look_ahead(0, counts, changed) is None, "nothing was fitted"


def test_copies_are_counted_in_the_layer_that_they_are_for() -> None:
    policy = Libra(spare_slots=1, own_share=0.0).fitted(shifting_trace(1000, 4, 3), 4, 2)
    layers = [random_experts(4, seed=layer) for layer in range(3)]

    def rank_main(comm: ThreadCommunicator) -> list[int]:
        engine = start(layers, comm)
        engine.use(engine.build_system("x", policy))
        engine.recorder.begin_iteration()
        for layer in range(3):
            ids = torch.full((40, 1), (1 + layer) % 4)  # all tokens go to expert 1, then 2, then 3
            engine.recorder.begin_layer(layer)
            engine.forward(layer, torch.randn(40, layers[0].hidden_size), ids, torch.ones(40, 1))
        engine.finish()
        fetches = [times.marks.fetch.num_host_fetches for times in engine.recorder.collect()]
        engine.close()
        return fetches

    # Experts 2 and 3 live on rank 1, so rank 0 imports them, for layers 1 and 2.
    assert run_threads(2, rank_main) == [[0, 1, 1], [0, 0, 0]]


def test_memory_is_that_of_the_spare_slots() -> None:
    assert Libra(spare_slots=3).room(8, 4) == 5
    assert replace(Libra(), num_slots=2).room(8, 4) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spare_slots": -1}, "spare_slots: -1, must be at least 0"),
        ({"own_share": 1.5}, "own_share: 1.5, must be between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Libra(**options).validate()  # type: ignore[arg-type]
