"""Compiles the Triton kernel for GPUs that need not be there; run in a process of its own, without the interpreter."""

from __future__ import annotations

import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmoeny.runtime.kernels.triton_kernel import grouped_linear


def compile_for(capability: int, dtype: str, *, bias: bool) -> str:
    """Returns the assembly."""
    pointers = dict.fromkeys(("rows", "matrices", "bias", "out"), f"*{dtype}") | {"ends": "*i32"}
    constants = {
        "NUM_IN": 768,
        "HAS_BIAS": bias, "SLOTS": 128, "PRECISION": "ieee", "UPCAST": False, "TILE_ROWS": 64, "TILE_OUT": 64,
        "TILE_IN": 32, "stride_in": 1, **({} if bias else {"bias": None}),
    }  # fmt: skip
    names = list(inspect.signature(grouped_linear.fn).parameters)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(grouped_linear, signature, {(names.index(k),): v for k, v in constants.items()})
    assembly: str = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return assembly


if __name__ == "__main__":
    assert "mma" in compile_for(90, "bf16", bias=True), "tensor cores are used"
    assert "fma" in compile_for(80, "fp32", bias=False)
    print("compiled")
