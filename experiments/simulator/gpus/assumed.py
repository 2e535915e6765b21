"""Published results of which some sizes are not known, simulated with sizes that are assumed: hints, no validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from baselines.eps_moe import EpsMoE
from baselines.static_ep import StaticEP
from baselines.ultraep import UltraEP
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedLayer, SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.model_work import LayerShape
from experiments.simulator.topology import Topology
from harmoeny.hardware import Hardware
from harmoeny.placement import IntArray
from harmoeny.policy import Policy

_DEEPSEEK_V2 = LayerShape(160, 5120, 1536, 6)
_DEEPSEEK_V3 = LayerShape(256, 7168, 2048, 8)

#: UltraEP (arXiv 2606.04101): 64 ranks, 256 experts, top-8, 8k tokens per rank. Largest over mean load of the ranks
#: before balancing, and after it, the same for all; throughput to that with forced balance, and to that without
#: balancing, of the whole deployment.
_ULTRAEP = "ultraep", "64 H200; experts of DeepSeek-V3; log-normal popularity, the same on all ranks; 2 slots; no plan"
_ULTRAEP_PROFILE, _ULTRAEP_RANKS, _ULTRAEP_TOKENS = "hgx_h200_x8_nodes", 64, 8192
_ULTRAEP_IMBALANCE, _ULTRAEP_BALANCED = (1.51, 2.01, 3.03), 1.01
_ULTRAEP_SHARE, _ULTRAEP_GAIN = 0.943, 1.49

#: EPS-MoE (arXiv 2410.12247): a layer of DeepSeek-V2 on 8 H800 by m, with one stage and with two.
_EPS = "eps_moe", "m are the tokens of a GPU; even routing"
_EPS_PROFILE, _EPS_RANKS = "dgx_h800", 8

#: The profiles that are needed.
PROFILES = (_ULTRAEP_PROFILE, _EPS_PROFILE)


def compare_assumed(hardware: Mapping[str, Hardware], eps_layers: pd.DataFrame) -> pd.DataFrame:
    """Simulate what was published with sizes that are assumed.

    Args:
        hardware: the profiles named in :data:`PROFILES`.
        eps_layers: m, num_stages, layer_s, as published.

    Returns:
        One row per figure: system, case, assumed, published, simulated.
    """
    rows = [*_ultraep(hardware[_ULTRAEP_PROFILE]), *_eps(hardware[_EPS_PROFILE], eps_layers)]
    return pd.DataFrame(rows, columns=["system", "case", "assumed", "published", "simulated"])


def _ultraep(hardware: Hardware) -> Iterator[tuple[Any, ...]]:
    name, assumed = _ULTRAEP
    even_s = _layer_s(_layer(StaticEP(), hardware, _DEEPSEEK_V3, _popular_counts(1.0)))
    for imbalance in _ULTRAEP_IMBALANCE:
        counts = _popular_counts(imbalance)
        balanced = _layer(UltraEP(), hardware, _DEEPSEEK_V3, counts)
        static_s = _layer_s(_layer(StaticEP(), hardware, _DEEPSEEK_V3, counts))
        executed = balanced.columns["executed_tokens"]
        case = f"imbalance {imbalance:g}"
        yield name, f"{case}: afterwards", assumed, _ULTRAEP_BALANCED, executed.max() / executed.mean()
        yield name, f"{case}: share of balanced", assumed, _ULTRAEP_SHARE, even_s / _layer_s(balanced)
        yield name, f"{case}: gain", assumed, _ULTRAEP_GAIN, static_s / _layer_s(balanced)


def _eps(hardware: Hardware, published: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    name, assumed = _EPS
    shape = _DEEPSEEK_V2
    for m, rows in published.groupby("m"):
        layer_s = rows.set_index("num_stages")["layer_s"]
        per_expert = int(str(m)) * shape.top_k / shape.num_experts
        counts = np.full((_EPS_RANKS, shape.num_experts), round(per_expert), dtype=np.int64)
        one_s, two_s = (_layer_s(_layer(EpsMoE(num_stages=n), hardware, shape, counts)) for n in (1, 2))
        yield name, f"m = {m}: two stages to one, time", assumed, layer_s[2] / layer_s[1], two_s / one_s
        yield name, f"m = {m}: one stage, ms", assumed, layer_s[1] * 1e3, one_s * 1e3


def _popular_counts(imbalance: float) -> IntArray:
    """Return int64 ``[64, num_experts]``: popularity so uneven that the ranks' loads have this largest over mean."""
    num_experts = _DEEPSEEK_V3.num_experts
    drawn = np.random.default_rng(0).standard_normal(num_experts)
    num_assignments = _ULTRAEP_TOKENS * _DEEPSEEK_V3.top_k

    def shares(spread: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        weights = np.exp(spread * drawn)
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def excess(spread: float) -> float:
        loads = shares(spread).reshape(_ULTRAEP_RANKS, -1).sum(axis=1)
        return float(loads.max() * _ULTRAEP_RANKS - imbalance)

    spread = 0.0 if imbalance == 1 else float(brentq(excess, 0.0, 5.0))
    own = np.rint(shares(spread) * num_assignments).astype(np.int64)
    return np.tile(own, (_ULTRAEP_RANKS, 1))


def _layer(policy: Policy, hardware: Hardware, shape: LayerShape, counts: IntArray) -> SimulatedLayer:
    """Return a layer of so many assignments (int64 ``[world_size, num_experts]``) whose plan takes no time."""
    work = shape.work(int(counts[0].sum()) // shape.top_k)
    cost = CostModel(hardware, Topology(hardware, len(counts)), work, SoftwareCost(plan_s=0.0))
    return SimulatedSystem(policy.calibrated(cost.expert), cost).run([counts]).layers[0]


def _layer_s(layer: SimulatedLayer) -> float:
    return float((layer.boundary_s[-1] - layer.boundary_s[0]).max())
