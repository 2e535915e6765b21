"""Kernels against one expert at a time in double precision: all layouts, empty groups, one token, odd sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.choices import KernelName
from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.kernels.alone import find_alone, least_rows_alone
from harmoeny.runtime.kernels.base import Results
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.kernels.triton_products import Tiles
from harmoeny.runtime.memory.experts import LayerExperts, gated_mlp, mlp, swiglu
from harmoeny.runtime.memory.schedule import make_schedule
from harmoeny.runtime.memory.slots import LayerSlots
from tests.conftest import ROOT
from tests.harmoeny.runtime.cases import apply_expert
from tests.strategies import examples

pytestmark = [pytest.mark.cuda] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is not installed")
KERNELS = [KernelName.LOOP, KernelName.GROUPED_MM, pytest.param(KernelName.TRITON, marks=NO_TRITON)]
#: On CUDA, PyTorch has a kernel for BF16 alone.
GROUPED_TYPES = (torch.bfloat16,) if DEVICE.type == "cuda" else tuple(TOLERANCE)


def random_layer(
    num_experts: int, hidden: int, width: int, dtype: torch.dtype, *, gated: bool, bias: bool, transposed: bool
) -> LayerExperts:
    generator = torch.Generator().manual_seed(num_experts + hidden)
    first, rows = ("gate_up", 2 * width) if gated else ("up", width)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)

    weights = {first: draw(num_experts, rows, hidden), "down": draw(num_experts, hidden, width)}
    if transposed:
        weights = {name: w.transpose(1, 2).contiguous() for name, w in weights.items()}
    if bias:
        weights |= {f"{first}_bias": draw(num_experts, rows), "down_bias": draw(num_experts, hidden)}
    function = gated_mlp(swiglu, transposed=transposed) if gated else mlp(torch.relu, transposed=transposed)
    return LayerExperts(weights, function, hidden)


def held(experts: LayerExperts, home: list[int]) -> LayerSlots:
    """Slots that hold these experts."""
    slots = LayerSlots(experts, DEVICE)
    for slot, expert_id in zip(slots.reserve(len(home)), home, strict=True):
        slot.fill(experts.expert(expert_id))
        slot.expert_id = expert_id
    return slots


def compute(
    kernel_name: str, slots: LayerSlots, executed: IntArray, least_rows_alone: int | None = None
) -> tuple[list[tuple[int, slice]], Tensor, Tensor]:
    """Returns the rows of every expert, the rows and the results."""
    kernel = make_kernel(kernel_name, slots, filled=True)
    assert kernel.name == kernel_name
    if least_rows_alone is not None:
        assert isinstance(kernel, GroupedKernel)
        kernel.least_rows_alone = least_rows_alone
    home = [slot.expert_id for slot in slots.slots]
    schedule = make_schedule(executed, home, ExpertCost(1.0, 1.0), grouped=kernel.grouped)
    dtype = slots.weights["down"].dtype
    rows = torch.randn(int(executed.sum()), slots.experts.hidden_size).to(DEVICE, dtype)
    results = Results(rows)
    kernel.begin(schedule)
    parts = []
    for wave in schedule.waves():
        kernel(wave, rows, results)
        parts += [
            (e, slice(start, start + n))
            for e, start, n in zip(wave.expert_ids, wave.starts, wave.num_tokens, strict=True)
        ]
    return parts, rows, results.rows()


def assert_exact(truth: LayerExperts, parts: list[tuple[int, slice]], rows: Tensor, results: Tensor) -> None:
    for expert_id, part in parts:
        for row, result in zip(rows[part].cpu(), results[part].cpu(), strict=True):
            wanted = apply_expert(truth, expert_id, row)
            error = (result.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            assert error <= TOLERANCE[rows.dtype]


def untransposed(experts: LayerExperts) -> LayerExperts:
    weights = {name: w.transpose(1, 2) if w.ndim == 3 else w for name, w in experts.weights.items()}
    return LayerExperts(weights, experts.function, experts.hidden_size)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        *((KernelName.LOOP, dtype) for dtype in TOLERANCE),
        *((KernelName.GROUPED_MM, dtype) for dtype in GROUPED_TYPES),
        *(pytest.param(KernelName.TRITON, dtype, marks=NO_TRITON) for dtype in TOLERANCE),
    ],
)
@pytest.mark.parametrize("layout", ["", "bias", "gated", "gated bias", "transposed", "gated bias transposed"])
@pytest.mark.parametrize(
    ("counts", "sizes"),
    [([[0, 3, 0, 20, 1]], (16, 24)), ([[0, 0, 1, 0, 0]], (8, 8)), ([[7, 0, 2, 0, 5], [0, 4, 0, 1, 0]], (35, 21))],
)
def test_every_layout_is_exact(
    kernel: str, dtype: torch.dtype, layout: str, counts: list[list[int]], sizes: tuple[int, int]
) -> None:
    if kernel == KernelName.GROUPED_MM and any(n * dtype.itemsize % 16 for n in sizes):
        sizes = (32, 16)  # PyTorch's kernel wants rows of whole 16 bytes
    flags = {name: name in layout for name in ("gated", "bias", "transposed")}
    experts = random_layer(6, *sizes, dtype, **flags)
    home = [4, 2, 0, 3, 1]
    parts, rows, results = compute(kernel, held(experts, home), np.array(counts))
    assert sorted(e for e, _ in parts) == sorted(np.nonzero(np.array(counts))[1].tolist())
    assert_exact(untransposed(experts) if flags["transposed"] else experts, parts, rows, results)


@NO_TRITON
@pytest.mark.parametrize("kernel", [KernelName.GROUPED_MM, KernelName.TRITON])
@pytest.mark.parametrize("layout", ["", "gated bias transposed"])
@pytest.mark.parametrize("counts", [[0, 30, 2, 1, 41], [9, 0, 64, 8, 0], [40, 40, 0, 0, 40]])
def test_large_slices_are_multiplied_for_themselves(
    kernel: str, layout: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []
    mm, addmm = torch.mm, torch.addmm

    def count(product: Callable[..., Tensor], rows: Tensor, *others: Tensor, out: Tensor) -> Tensor:
        alone.append(len(rows))
        return product(rows, *others, out=out)

    monkeypatch.setattr(torch, "mm", partial(count, mm))
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b, out: count(partial(addmm, bias), a, b, out=out))
    flags = {name: name in layout for name in ("gated", "bias", "transposed")}
    experts = random_layer(5, 32, 16, torch.bfloat16, **flags)
    parts, rows, results = compute(kernel, held(experts, [4, 2, 0, 3, 1]), np.array([counts]), least_rows_alone=9)
    assert sorted(alone) == sorted(2 * [n for n in counts if n >= 9])
    assert len(parts) == np.count_nonzero(counts)
    assert_exact(untransposed(experts) if flags["transposed"] else experts, parts, rows, results)


@examples(200)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=12), st.integers(1, 600))
def test_what_is_alone_has_most_rows(counts: list[int], least_rows: int) -> None:
    tokens = np.array(counts, dtype=np.int32)
    alone = find_alone(tokens, least_rows)
    large = [slot for slot, n in enumerate(counts) if n >= least_rows]
    num_large = sum(counts[slot] for slot in large)
    assert [slot for slot, _ in alone.parts] == (large if large and 2 * num_large >= sum(counts) else [])
    for slot, part in alone.parts:
        assert (part.start, part.stop) == (sum(counts[:slot]), sum(counts[: slot + 1]))


@pytest.mark.parametrize(("num_multiprocessors", "num_out"), [(32, 1536), (132, 1536), (132, 100), (132, 8192), (1, 1)])
def test_a_slice_alone_fills_the_device_four_times(num_multiprocessors: int, num_out: int) -> None:
    columns, rows = -(-num_out // 256), least_rows_alone(num_multiprocessors, num_out)
    assert -(-rows // 128) * columns >= 4 * num_multiprocessors > (-(-rows // 128) - 1) * columns


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_have_no_results(kernel: str) -> None:
    experts = random_layer(3, 8, 8, torch.bfloat16, gated=True, bias=True, transposed=False)
    parts, _, results = compute(kernel, held(experts, [0, 1, 2]), np.zeros((1, 3), np.int64))
    assert (parts, results.shape) == ([], (0, 8))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_norm_is_applied_to_the_output(kernel: str) -> None:
    experts = random_layer(2, 16, 8, torch.bfloat16, gated=False, bias=False, transposed=False)
    normed = LayerExperts(experts.weights, mlp(torch.relu, norm=lambda out: 2 * out), 16)
    torch.manual_seed(0)
    _, _, plain = compute(kernel, held(experts, [0, 1]), np.array([[3, 4]]))
    torch.manual_seed(0)
    _, _, doubled = compute(kernel, held(normed, [0, 1]), np.array([[3, 4]]))
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.programs
@NO_TRITON
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.harmoeny.runtime.kernels.compile_kernel"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}, cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert ran.stdout == "compiled\n", ran.stderr


@examples(300)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.sampled_from([1, 60, 64, 129, 3072]), st.booleans())
def test_there_is_a_program_for_every_tile_of_every_slot(counts: list[int], num_out: int, roomy: bool) -> None:
    num_rows = sum(counts)
    tiles = Tiles.choose(num_rows, len(counts), torch.bfloat16, roomy=roomy)
    columns, rows = tiles.grid(num_rows, len(counts), num_out)
    assert sum(-(-n // tiles.rows) for n in counts) <= rows <= num_rows // tiles.rows + len(counts)
    assert columns * tiles.columns >= num_out > (columns - 1) * tiles.columns
    assert 16 <= tiles.rows <= 128
    assert tiles.rows.bit_count() == 1


@pytest.mark.parametrize(
    ("name", "filled", "why"),
    [
        ("fastest", True, "must be one of auto, loop, grouped_mm, triton"),
        ("grouped_mm", False, "cannot compute these experts"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, filled: bool, why: str) -> None:
    experts = random_layer(2, 8, 8, torch.float32, gated=False, bias=False, transposed=False)
    with pytest.raises(ValueError, match=rf"^kernel: '{name}', {why}"):
        make_kernel(name, LayerSlots(experts, DEVICE), filled=filled)


def test_experts_that_are_no_mlp_are_computed_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"down": torch.zeros(2, 8, 8, dtype=torch.bfloat16)}
    slots = LayerSlots(LayerExperts(weights, lambda *_: None, 8), torch.device("cuda"))
    assert make_kernel("auto", slots, filled=True).name == KernelName.LOOP


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "wanted"),
    [
        (torch.bfloat16, 16, (9, 0), "grouped_mm"),
        (torch.bfloat16, 16, (8, 0), "triton"),
        (torch.bfloat16, 12, (9, 0), "triton"),
        (torch.float32, 16, (9, 0), "triton"),
        (torch.float16, 16, (10, 0), "triton"),
        (torch.float64, 16, (9, 0), "loop"),
    ],
)
@pytest.mark.parametrize("triton", [True, False])
def test_auto_takes_the_fastest_that_can(
    dtype: torch.dtype, width: int, capability: tuple[int, int], wanted: str, triton: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("harmoeny.runtime.kernels.triton_products.find_spec", lambda _: triton or None)
    experts = random_layer(2, 16, width, dtype, gated=True, bias=False, transposed=False)
    on_cuda, on_cpu = (LayerSlots(experts, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert make_kernel("auto", on_cuda, filled=True).name == ("loop" if wanted == "triton" and not triton else wanted)
    assert make_kernel("auto", on_cpu, filled=True).name == "loop"
