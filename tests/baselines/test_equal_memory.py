"""``spare_slots``: all systems have the same device memory for experts."""

import numpy as np
import pytest

from experiments.registry import discover
from harmoeny.placement import Placement
from harmoeny.runtime.memory.residents import num_slots_needed
from tests.conftest import Load

GRID = (
    "harmoeny", "harmoeny_tokens", "static_ep", "eplb", "eplb_lp", "lplb", "trtllm_eplb", "flashlb", "metro", "libra",
    "ultraep", "llep", "moonep", "fastermoe", "even_split",
)  # fmt: skip

SYSTEMS = discover("system")[0]


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("spare_slots", [0, 2, 4])
@pytest.mark.parametrize(("num_experts", "world_size"), [(128, 8), (256, 32), (10, 4)])
def test_every_system_has_room_for_an_even_share_and_the_spare_slots(
    name: str, spare_slots: int, num_experts: int, world_size: int
) -> None:
    policy = SYSTEMS[name]().with_spare_slots(spare_slots, num_experts, world_size)
    policy.validate()
    placement = policy.place(0, num_experts, world_size)
    room = num_slots_needed(placement.resident.sum(axis=0), num_experts, policy.room(num_experts, world_size))
    assert room.tolist() == [min(-(-num_experts // world_size) + spare_slots, num_experts)] * world_size


@pytest.mark.parametrize("name", [name for name in GRID if "eplb" in name or name in ("lplb", "flashlb", "metro")])
def test_who_replicates_never_holds_more(name: str) -> None:
    policy = SYSTEMS[name]().with_spare_slots(2, 16, 4)
    counts = np.random.default_rng(0).integers(0, 100, (4, 16)) * np.array([50] + [1] * 15)
    placement: Placement | None = policy.place(0, 16, 4)
    for batch in range(1, 8):
        assert placement is not None
        assert placement.resident.sum(axis=0).max() <= 6
        placement = policy.update_placement(0, [counts] * batch, placement) or placement


def test_a_system_that_holds_all_experts_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"num_slots: \d+, must be null with fetch=none"):
        load("spare_slots=1", "system=[ideal]")
    with pytest.raises(ValueError, match="spare_slots: -1, must be at least 0, or null"):
        load("spare_slots=-1")


def test_a_system_that_ignores_it_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    static = SYSTEMS["static_ep"]
    monkeypatch.setattr(static, "with_spare_slots", lambda self, *_: self)
    wanted = r"spare_slots: 1, must be null with systems\.static_ep, whose ranks hold 4 experts of a layer, not 5"
    with pytest.raises(ValueError, match=wanted):
        load("spare_slots=1", "system=[static_ep]", "world_size=2")


def test_the_memory_of_a_simulated_point_is_equal(load: Load) -> None:
    from experiments.simulator.backend import simulate

    names = "harmoeny,static_ep,eplb,ultraep,moonep,llep"
    point = load(
        "backend=simulator", "hardware=dgx1_v100", "world_size=4", "model=moe_stack", "model.num_experts=16",
        "spare_slots=2", f"system=[{names}]", "rounds=2",
    )  # fmt: skip
    notes = simulate(point).notes
    assert len({notes[name]["device_expert_bytes"] for name in names.split(",")}) == 1
    assert notes["eplb"]["options"]["redundant_experts_per_rank"] == 2
