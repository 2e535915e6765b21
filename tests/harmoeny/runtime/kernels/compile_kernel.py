"""Compiles the Triton kernels for GPUs that need not be there; run in a process of its own, without the interpreter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmoeny.runtime.exchange import triton_rows
from harmoeny.runtime.kernels.triton_gates import swiglu_rows
from harmoeny.runtime.kernels.triton_kernel import grouped_linear
from harmoeny.runtime.kernels.triton_products import Tiles


def compile_for(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], num_warps: int = 4,
    num_stages: int = 3,
) -> str:  # fmt: skip
    """Returns the assembly; pointers are at multiples of 16 bytes unless the kernel's launch does not look at that."""
    names = list(inspect.signature(kernel.fn).parameters)
    pointers = {name: dtype for name, dtype in pointers.items() if name in names}
    types = dict.fromkeys(names, "i32") | {name: f"*{dtype}" for name, dtype in pointers.items()}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = pointers.keys() - constants.keys() - set(kernel.do_not_specialize_on_alignment)
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    assembly: str = triton.compile(
        source, target=target, options={"num_warps": num_warps, "num_stages": num_stages}
    ).asm["ptx"]
    return assembly


def compile_linear(capability: int, dtype: str, *, bias: bool, tiles: Tiles) -> str:
    pointers = dict.fromkeys(("rows", "matrices", "bias", "out"), dtype) | {"ends": "i32"}
    constants = {
        "NUM_IN": 768,
        "HAS_BIAS": bias, "SLOTS": 128, "PRECISION": "ieee", "UPCAST": False, "TILE_ROWS": tiles.rows,
        "TILE_OUT": tiles.columns, "TILE_IN": tiles.inner, "stride_in": 1, **({} if bias else {"bias": None}),
    }  # fmt: skip
    return compile_for(capability, grouped_linear, pointers, constants, tiles.num_warps, tiles.num_stages)


def compile_rows(capability: int, dtype: str, hidden_size: int, alignment: int) -> list[str]:
    """Returns the assembly of what moves rows of this size, one for each kernel."""
    common = {"NUM_COLUMNS": hidden_size, "TILE_COLUMNS": 1024}
    put = common | {"ALIGNMENT": alignment}
    choice = {"TOP_K": 8, "TILE_K": 8}
    where = {"ids": "i64", "numbers": "i32", "blocks": "i64", "row_of": "i64", "assignment_of": "i64"}
    return [
        compile_for(
            capability, triton_rows.put_tokens, {"hidden": dtype} | where,
            put | choice | {"NUM_RANKS": 6, "TILE_RANKS": 8}, num_warps=1,
        ),
        compile_for(
            capability, triton_rows.spread_tokens,
            {"hidden": dtype, "out": dtype, "group_of": "i32", "ends": "i32"} | where, common | choice, num_warps=1,
        ),
        compile_for(capability, triton_rows.put_rows, {"source": dtype, "blocks": "i64"}, put | {"TILE_ROWS": 4}),
        *(
            compile_for(
                capability, triton_rows.add_up,
                {"rows": dtype, "row_of": "i64", "weights": "fp32", "out": dtype}, common | choice | {"ONTO": onto},
            )
            for onto in (False, True)
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    for roomy in (False, True):
        large = Tiles.choose(4096, 16, torch.bfloat16, roomy=roomy)
        assert "wgmma" in compile_linear(90, "bf16", bias=True, tiles=large), "tensor cores are used"
    assert "fma" in compile_linear(80, "fp32", bias=False, tiles=Tiles.choose(1024, 16, torch.float32))
    for assembly in compile_rows(90, "bf16", 2880, alignment=16) + compile_rows(80, "fp32", 768, alignment=16):
        assert "ld.global.v4" in assembly, "a thread reads 16 bytes at a time"
        assert "st.global.v4" in assembly, "and writes them"
    for assembly in compile_rows(90, "bf16", 2049, alignment=2):
        assert "st.global.v4" not in assembly, "what is not aligned is written piece by piece"
    numbered = {"ids": "i64", "group_of": "i32", "numbers": "i32", "totals": "i32"}
    compile_for(90, triton_rows.number_assignments, numbered, {"MAPPED": True, "TILE": 4096}, num_warps=8)
    counted = numbered | {"totals": "i64"}
    compile_for(90, triton_rows.number_assignments, counted, {"MAPPED": False, "TILE": 1024, "group_of": None})
    chosen = {"counts": "i64", "slot_of": "i32", "early_of": "i64", "ends": "i32"}
    compile_for(90, triton_rows.choose_early, chosen, {"EXPERTS": 256, "AT_ONCE": 16})
    divided = numbered | {"early_of": "i64", "early_ids": "i64", "rest_ids": "i64", "rest_numbers": "i32"}
    compile_for(90, triton_rows.split_early, divided, {"TILE": 1024})
    gate = {"WIDTH": 768, "TILE_ROWS": 8, "TILE_COLUMNS": 256}
    assembly = compile_for(90, swiglu_rows, {"gate_up": "bf16", "out": "bf16"}, gate)
    assert "ld.global.v4" in assembly
    assert "st.global.v4" in assembly
    print("compiled")
