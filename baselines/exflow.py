"""ExFlow: static expert parallelism with experts placed by the affinity between consecutive layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from baselines.kit.affinity import count_crossings, place_by_affinity
from baselines.static_ep import StaticEP
from harmoeny.choices import Fetch, Knowledge
from harmoeny.following import count_pairs
from harmoeny.placement import IntArray, Placement
from harmoeny.placement import place as place_evenly
from harmoeny.trace import RoutingTrace
from results_schema.atomic import write_text


@dataclass(frozen=True)
class AffinityFit:
    """A fitted placement, plain data.

    Attributes:
        num_experts: experts per layer.
        world_size: number of ranks.
        stacks: per MoE layer, the stack that it belongs to.
        home: per MoE layer, every expert's rank.
        num_pairs: pairs of assignments of one token to consecutive layers of a stack, in the calibration batches.
        crossings: pairs among them on different ranks.
        crossings_before: the same under the placement that :attr:`ExFlow.placement` names.
        lower_bound: no placement has fewer; 0 where the placement was fitted to other batches.
    """

    num_experts: int
    world_size: int
    stacks: list[int]
    home: list[list[int]]
    num_pairs: int
    crossings: int
    crossings_before: int
    lower_bound: int

    @property
    def gap(self) -> float:
        """How much of the crossings might be avoidable: 0 is proven best, 1 is nothing proven."""
        return (self.crossings - self.lower_bound) / self.crossings if self.crossings else 0.0


@dataclass(kw_only=True)
class ExFlow(StaticEP):
    """Placement by inter-layer expert affinity (Yao et al., arXiv 2401.08383), then static parallelism.

    :meth:`fitted` minimises, over the calibration batches, how often a token's experts in consecutive layers are on
    different ranks, while every rank holds as many experts of each layer as without it. The search ends by the nodes
    that it looks at and never by a clock, so the same batches give the same placement. One rank fits, and the others
    get the fitted policy, which is plain data, by pickle.

    Attributes:
        node_limit: of every integer programme (branch and bound); once it is reached, the best placement so far is
            used. 0: no integer programme, only sweeps.
        placement_file: JSON file with a fitted placement: read if it exists, else written; null: fit in every run.
    """

    name: ClassVar[str] = "exflow"
    description: ClassVar[str] = "static, experts placed by their affinity between consecutive layers"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY})

    node_limit: int = 1
    placement_file: str | None = None

    def __post_init__(self) -> None:
        #: What :meth:`fitted` found; no option.
        self.fit: AffinityFit | None = None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a negative node limit.
        """
        super().validate()
        if self.node_limit < 0:
            raise ValueError(f"node_limit: {self.node_limit}, must be at least 0")

    @property
    def calibration_batches(self) -> int:
        """Batches that say what follows what."""
        return 4

    def fitted(self, trace: RoutingTrace, num_experts: int, world_size: int) -> Self:
        """Return the policy with the placement from ``placement_file``, or from the trace.

        Raises:
            ValueError: a placement file that cannot be used.
        """
        fitted = replace(self)
        path = None if self.placement_file is None else Path(self.placement_file)
        if path is not None and path.exists():
            fitted.fit = self._on(trace, _read(path, num_experts, world_size, list(trace.stacks)))
            return fitted
        fitted.fit = self._fit(trace, num_experts, world_size)
        if path is not None:
            _write(path, fitted.fit)
        return fitted

    def fingerprint(self) -> str:
        """Digest the placement file."""
        path = None if self.placement_file is None else Path(self.placement_file)
        return "" if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def fit_report(self) -> dict[str, float]:
        """Return the crossings in the calibration batches, before and after, and what is proven of them."""
        if self.fit is None:
            return {}
        names = ("num_pairs", "crossings", "crossings_before", "lower_bound", "gap")
        return {name: float(getattr(self.fit, name)) for name in names}

    def _on(self, trace: RoutingTrace, other: AffinityFit) -> AffinityFit:
        """Return a placement that was fitted to other batches, with what it comes to on these."""
        evenly = place_evenly(self.placement, other.num_experts, other.world_size).home
        num_pairs = crossings = crossings_before = 0
        for layers, pairs in _stacks(trace, other.num_experts):
            num_pairs += sum(int(p.sum()) for p in pairs)
            crossings += count_crossings(pairs, [np.array(other.home[layer]) for layer in layers])
            crossings_before += count_crossings(pairs, [evenly] * len(layers))
        return replace(
            other, num_pairs=num_pairs, crossings=crossings, crossings_before=crossings_before, lower_bound=0
        )

    def _fit(self, trace: RoutingTrace, num_experts: int, world_size: int) -> AffinityFit:
        evenly = place_evenly(self.placement, num_experts, world_size).home
        sizes = np.bincount(evenly, minlength=world_size).astype(np.int64)
        home = [evenly] * len(trace.stacks)
        num_pairs = crossings = crossings_before = lower_bound = 0
        stacks = list(_stacks(trace, num_experts))
        for layers, pairs in stacks:
            solution = place_by_affinity(pairs, sizes, self.node_limit)
            for layer, ranks in zip(layers, solution.ranks, strict=True):
                home[layer] = ranks
            num_pairs += sum(int(p.sum()) for p in pairs)
            crossings += solution.crossings
            crossings_before += count_crossings(pairs, [evenly] * len(layers))
            lower_bound += solution.lower_bound
        return AffinityFit(
            num_experts=num_experts,
            world_size=world_size,
            stacks=list(trace.stacks),
            home=[ranks.tolist() for ranks in home],
            num_pairs=num_pairs,
            crossings=crossings,
            crossings_before=crossings_before,
            lower_bound=lower_bound,
        )

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        """Return the fitted placement of a layer; before :meth:`fitted`, that of ``placement``."""
        placement = super().place(layer, num_experts, world_size)
        if self.fit is None:
            return placement
        home = np.array(self.fit.home[layer], dtype=np.int64)
        if self.fetch == Fetch.NONE:
            return Placement(home=home, resident=placement.resident)
        return Placement.from_home(home, world_size)


def _stacks(trace: RoutingTrace, num_experts: int) -> Iterator[tuple[list[int], list[IntArray]]]:
    """Yield every stack's MoE layers, and the pairs of experts in each two that follow each other."""
    for stack in sorted(set(trace.stacks)):
        layers = [i for i, own in enumerate(trace.stacks) if own == stack]
        pairs = [
            count_pairs(trace.expert_ids[first], trace.expert_ids[second], num_experts)
            for first, second in pairwise(layers)
        ]
        yield layers, pairs


def _write(path: Path, fit: AffinityFit) -> None:
    write_text(path, json.dumps(asdict(fit) | {"gap": fit.gap}) + "\n")


def _read(path: Path, num_experts: int, world_size: int, stacks: list[int]) -> AffinityFit:
    wanted = {"num_experts": num_experts, "world_size": world_size, "stacks": stacks}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("gap")
        fit = AffinityFit(**content)
        homes = [Placement.from_home(np.array(home, dtype=np.int64), fit.world_size) for home in fit.home]
        for placement in homes:
            placement.validate()
        if len(homes) != len(fit.stacks) or any(p.num_experts != fit.num_experts for p in homes):
            raise ValueError("its homes are not one per layer and expert")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"placement_file: {str(path)!r}, must be a file that ExFlow wrote ({error})") from error
    for name, value in wanted.items():
        if getattr(fit, name) != value:
            raise ValueError(
                f"placement_file: {str(path)!r} is for {name}={getattr(fit, name)}, must be for {name}={value}; "
                "name another file, or delete it to fit anew"
            )
    return fit
