"""What fits on a small device, worked out by hand."""

from __future__ import annotations

import re

import pytest
import torch

from harmoeny.budget import Budget, parse_bytes
from harmoeny.cost import ExpertCost

CPU = torch.device("cpu")


def budget(device_bytes: int, world_size: int = 1) -> Budget:
    """Eight experts of 10 bytes in each of three layers, and 100 bytes beside them."""
    return Budget(
        device_bytes=device_bytes, other_bytes=100, slot_bytes=30, num_layers=3, num_experts=8, world_size=world_size
    )


@pytest.mark.parametrize(
    ("amount", "num_bytes"),
    [(4096, 4096), ("4096", 4096), ("8GiB", 8 * 2**30), ("1.5 MiB", 3 * 2**19), ("2KB", 2000), ("3 TB", 3 * 10**12)],
)
def test_amounts_of_memory(amount: str | int, num_bytes: int) -> None:
    assert parse_bytes(amount) == num_bytes


@pytest.mark.parametrize("amount", ["", "8 apples", "-3GiB", "0", "0.2", "8gib", "GiB", "8 iB", -1])
def test_what_is_no_amount_is_refused(amount: str | int) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"device_memory: {amount!r}, must be a number of bytes, or one with")
    ):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("device_bytes", "num_slots"),
    [(160, 1), (183, 2), (240, 3), (400, 8), (10**6, 8)],  # seven eighths of it, less 100, by 30
)
def test_slots_are_what_is_left(device_bytes: int, num_slots: int) -> None:
    assert budget(device_bytes).num_slots == num_slots


def test_less_than_a_slot_is_refused_with_what_is_enough() -> None:
    with pytest.raises(ValueError, match=r"device_memory: 140 B, must be at least 150 B: 100 B for the weights"):
        budget(140).policy()
    assert budget(149).num_slots == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_rank_with_fewer_slots_than_experts_of_its_own_caches_and_has_a_host(world_size: int) -> None:
    homes = -(-8 // world_size)
    for slots in range(1, 9):
        fits = budget(-(-(100 + 30 * slots) * 8 // 7) + 1, world_size)
        policy = fits.policy()
        policy.validate()
        assert fits.num_slots == slots
        assert policy.room(8, world_size) in ((slots,) if slots != homes else (slots, None))
        assert policy.caches == (slots < homes)
        assert (fits.host_threads(CPU, 1) > 0) == (slots < homes)


def test_what_was_chosen_is_said() -> None:
    cost = ExpertCost(token_s=1e-6, fetch_s=28e-3, host_token_s=1e-4, host_weights_s=7.2e-3, host_trip_s=1e-4)
    said = budget(240).describe(cost, 8)
    assert "3 of 8 experts in each of 3 layers (90 B) beside 100 B of other weights in 240 B" in said
    assert "fetched (28 ms) or computed on the host (7.3 ms for one token, threads: 8)" in said
    assert "all experts of a rank are on its device" in budget(400).describe(cost, 0)
