"""One MoE layer on one rank beside nothing but its grouped matrix products, at prefill and decode sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baselines.static_ep import StaticEP
from harmoeny.models.moe_stack import MoEStack
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import LayerExperts, swiglu
from harmoeny.runtime.start import start_rank
from harmoeny.timed import HarMoEny
from results_schema.printing import print_anything
from scripts.gpu_check.interleave import compare, interleave
from scripts.gpu_check.shapes import Measurement, Shape, parse_measurement

PRODUCTS = "products"


def measure(asked: Measurement) -> dict[str, Any]:
    """Measure the layer under HarMoEny and static EP; sizes by name, then actions by name."""
    shape, device = asked.shape, asked.device
    stack = MoEStack(
        num_experts=shape.num_experts, top_k=shape.top_k, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, gated=True, dtype=shape.dtype, vocab_size=1,
    )  # fmt: skip
    experts = stack.build(0).experts
    engine = start_rank(experts, Communicator(device), record=False)
    systems = [engine.build_system(p.name, p.calibrated(engine.memory.cost)) for p in (HarMoEny(), StaticEP())]
    found: dict[str, Any] = {}
    for size, num_tokens in (("prefill", shape.layer_tokens), ("decode", shape.decode_sequences)):
        hidden, ids, weights = _tokens(shape, num_tokens, device, asked.dtype)

        layer = partial(engine.forward, 0, hidden, ids, weights)
        actions: dict[str, Callable[[], Tensor]] = {system.name: layer for system in systems}
        prepare = {system.name: partial(engine.use, system) for system in systems}
        actions[PRODUCTS] = grouped_products(experts[0], hidden, ids)
        found[size] = {"num_tokens": num_tokens} | compare(interleave(actions, device, asked.rounds, prepare), PRODUCTS)
    engine.close()
    return found


def _tokens(shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens and even routing: hidden ``[num_tokens, H]``, ids and weights ``[num_tokens, top_k]``."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(device, dtype)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
    weights, ids = torch.softmax(scores, dim=1).topk(shape.top_k, dim=1)
    return hidden, ids.to(device), weights.to(device, dtype)


def grouped_products(experts: LayerExperts, hidden: Tensor, expert_ids: Tensor) -> Callable[[], Tensor]:
    """Return what multiplies the rows of a layer with gated experts, sorted beforehand, and does nothing else.

    One grouped product per matrix where PyTorch has one kernel for it, else one product per expert.
    """
    device, dtype = hidden.device, hidden.dtype
    order = expert_ids.flatten().argsort(stable=True)
    rows = hidden[order // expert_ids.shape[1]]
    counts = torch.bincount(expert_ids.flatten(), minlength=experts.num_experts)
    gate_up, down = (experts.weights[name].to(device) for name in ("gate_up", "down"))
    if has_grouped_kernel(device, dtype):
        ends = counts.cumsum(0).to(torch.int32)
        product = torch.nn.functional.grouped_mm

        def run() -> Tensor:
            middle = swiglu(product(rows, gate_up.transpose(1, 2), offs=ends))
            return product(middle, down.transpose(1, 2), offs=ends)

        return run
    parts = [(e, part) for e, part in enumerate(torch.split(rows, counts.tolist())) if len(part)]

    def run_one_by_one() -> Tensor:
        return torch.cat([swiglu(part @ gate_up[e].t()) @ down[e].t() for e, part in parts])

    return run_one_by_one


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies groups of rows in one kernel there: bf16 on compute capability 9.0 and above."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


def main() -> None:
    """Measure and write."""
    print_anything()
    asked = parse_measurement("scripts.gpu_check.layer", __doc__)
    with torch.inference_mode():
        found = measure(asked)
    asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
