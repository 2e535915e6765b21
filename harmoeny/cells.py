"""Passes over what there is for every rank and expert, of which ranks execute few: fast ones, as plans make many."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled, inlined
from harmoeny.placement import BoolArray, FloatArray, IntArray


@compiled
def totals_of(cells: IntArray | BoolArray) -> IntArray:
    """Return int64 ``[m]``, the sum of every column of int64 or bool ``[n, m]``; of bool, how many are true."""
    num_rows, num_columns = cells.shape
    total: IntArray = np.zeros(num_columns, dtype=np.int64)
    for row in range(num_rows):
        for column in range(num_columns):
            total[column] += cells[row, column]
    return total


@inlined
def executed_by(rank: int, shares: IntArray, found: IntArray) -> int:
    """Find the experts of which a rank executes assignments, in order, and return how many they are.

    Args:
        rank: the rank.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        found: int64 ``[num_experts]``; updated.
    """
    num_experts, number = shares.shape[1], 0
    for block in range(num_experts // 8):  # most ranks execute none of eight in a row
        first = 8 * block
        if (
            shares[rank, first] | shares[rank, first + 1] | shares[rank, first + 2] | shares[rank, first + 3]
            | shares[rank, first + 4] | shares[rank, first + 5] | shares[rank, first + 6] | shares[rank, first + 7]
        ) != 0:  # fmt: skip
            for expert in range(first, first + 8):
                found[number] = expert
                number += shares[rank, expert] != 0
    for expert in range(num_experts // 8 * 8, num_experts):
        found[number] = expert
        number += shares[rank, expert] != 0
    return number


@inlined
def largest_at(values: IntArray | FloatArray) -> int:
    """Return where the first of the largest of ``[n]`` numbers is, n at least 1; as ``argmax``, in half of the time."""
    largest, place = values[0], 0
    for i in range(1, len(values)):
        if values[i] > largest:
            largest, place = values[i], i
    return place


@inlined
def largest(values: IntArray | FloatArray) -> float:
    """Return the largest of ``[n]`` numbers, n at least 1."""
    return float(values[largest_at(values)])


@compiled
def by_expert(cells: IntArray) -> IntArray:
    """Return int64 ``[num_experts, world_size]`` of ``[world_size, num_experts]``: an expert's ranks side by side."""
    world_size, num_experts = cells.shape
    turned: IntArray = np.empty((num_experts, world_size), dtype=np.int64)
    for block in range(world_size // 8):  # as many as a line of the cache has
        first = 8 * block
        for expert in range(num_experts):
            for i in range(8):
                turned[expert, first + i] = cells[first + i, expert]
    for rank in range(world_size // 8 * 8, world_size):
        for expert in range(num_experts):
            turned[expert, rank] = cells[rank, expert]
    return turned
