"""The one thing that a system under test must provide: a policy that turns counts into a plan."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from harmoeny.choices import PLAN_EXECUTOR, Fetch, Knowledge, WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.head_start import HeadStart
from harmoeny.placement import PLACEMENTS, BoolArray, IntArray, Placement, even_room, place, with_slot
from harmoeny.plan import Plan, even_shares, home_executed, home_tokens, plan_from_tokens, tokens_of_shares
from harmoeny.trace import RoutingTrace

#: An import path: module, colon, name.
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(kw_only=True)
class Policy(ABC):
    """A policy: deterministic, the same on every rank.

    A subclass is a keyword-only dataclass whose fields are its configuration: they become the options
    ``systems.<name>.<field>`` of the command line. It must not read a clock, a global or unseeded randomness.

    Attributes:
        placement: where experts live before any batch: ``contiguous`` or ``round_robin``.
        fetch: how a rank gets at weights that it does not hold: ``async`` (from host memory, behind computation),
            ``sync`` (from host memory, computation waits), ``peer`` (from the expert's home rank) or ``none`` (every
            expert is resident everywhere, so nothing is ever fetched).
        num_slots: experts that a rank has room for in device memory, per layer; null: as many as it holds at the start.
        work_order: when a rank executes fetched experts: ``covered`` (as soon as their weights are predicted to be
            there) or ``paper`` (after the two residents with the most tokens).
        num_stages: stages (:attr:`Plan.stages`), into which what every rank executes is divided; 1:
            all rows are exchanged at once; null, which few systems know: as many as are predicted to pay.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    #: False for a policy that may drop assignments.
    exact: ClassVar[bool] = True
    #: False for our own systems, which the others are compared with.
    baseline: ClassVar[bool] = True
    #: True for a bound that no system reaches under the others' memory: drawn as a line, never ranked.
    bound: ClassVar[bool] = False
    #: True for a system whose ranks are to hold a part of their experts only, and then the run says how many:
    #: ``system=all`` leaves it out.
    small_memory: ClassVar[bool] = False
    #: Whether plans may be divided into stages: not those that group their sources, or fill up buffers.
    can_stage: ClassVar[bool] = True
    #: Whether the policy may decide by itself how many stages its plans have.
    chooses_stages: ClassVar[bool] = False
    #: What the policy may see of the routing; it is given nothing else (:func:`check_knowledge`).
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    placement: str = "contiguous"
    fetch: str = Fetch.ASYNC.value
    num_slots: int | None = None
    work_order: str = WorkOrder.COVERED.value
    num_stages: int | None = 1

    @property
    def history_window(self) -> int:
        """Latest batches that :meth:`update_placement` reads; older ones are forgotten."""
        return 1

    @property
    def caches(self) -> bool:
        """Whether a rank may hold fewer experts than are at home there: the others are in its host's memory."""
        return False

    @property
    def needs_host(self) -> bool:
        """Whether plans may let a rank's host execute experts (:attr:`Plan.host`)."""
        return False

    @property
    def executor(self) -> str:
        """What carries the plans out: ``plan``, the runtime's own way, or the import path of another executor.

        An import path is ``package.module:ClassName``. The class extends
        :class:`harmoeny.runtime.layer.executor.Executor` and reads this policy's options from its planner. A policy
        names it in a class variable, or in a property where it depends on options.
        """
        return PLAN_EXECUTOR

    def validate(self) -> None:
        """Check the configuration before any worker starts.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement: {self.placement!r}, must be one of {', '.join(PLACEMENTS)}")
        if self.fetch not in tuple(Fetch):
            raise ValueError(f"fetch: {self.fetch!r}, must be one of {', '.join(Fetch)}")
        if self.work_order not in tuple(WorkOrder):
            raise ValueError(f"work_order: {self.work_order!r}, must be one of {', '.join(WorkOrder)}")
        if self.num_slots is not None and self.num_slots < 1:
            raise ValueError(f"num_slots: {self.num_slots}, must be at least 1, or null for as many as a rank holds")
        if self.fetch == Fetch.NONE and self.num_slots is not None:
            raise ValueError(f"num_slots: {self.num_slots}, must be null with fetch=none, where every expert has room")
        self._validate_stages()
        if self.executor != PLAN_EXECUTOR and not _IMPORT_PATH.fullmatch(self.executor):
            raise ValueError(
                f"executor: {self.executor!r}, must be {PLAN_EXECUTOR} or an import path, as package.module:ClassName"
            )
        check_knowledge(self)

    def _validate_stages(self) -> None:
        if self.num_stages is None and not self.chooses_stages:
            raise ValueError("num_stages: null, must be a number of at least 1")
        if self.num_stages is not None and self.num_stages < 1:
            or_null = ", or null" if self.chooses_stages else ""
            raise ValueError(f"num_stages: {self.num_stages}, must be at least 1{or_null}")
        if self.num_stages != 1 and not self.can_stage:
            raise ValueError(f"num_stages: {self.num_stages}, must be 1: how this system exchanges rows is fixed")

    def validate_ranks(self, num_experts: int, world_size: int) -> None:  # noqa: B027
        """Check that the system can run a model on so many ranks, before any worker starts.

        Raises:
            ValueError: a field of the run's configuration, its value and what is allowed.
        """

    def calibrated(self, cost: ExpertCost) -> Self:  # noqa: ARG002  (for policies that have a cost model)
        """Return the policy with what it left open filled in from the machine's costs."""
        return self

    @property
    def calibration_batches(self) -> int:
        """Batches whose routing :meth:`fitted` wants to see before the measured ones."""
        return 0

    def fitted(self, trace: RoutingTrace, num_experts: int, world_size: int) -> Self:  # noqa: ARG002
        """Return the policy with what it derives from the routing of :attr:`calibration_batches` batches."""
        return self

    def fit_report(self) -> dict[str, float]:
        """Return figures on what :meth:`fitted` found, by name, for the manifest."""
        return {}

    def fingerprint(self) -> str:
        """Return a digest of the files that the policy reads beside its options; empty: none.

        A finished run is measured again where another digest is found than when it ended.
        """
        return ""

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:  # noqa: ARG002
        """Return a MoE layer's residency before the first batch; of a cache, the first experts that have a slot."""
        placement = place(self.placement, num_experts, world_size)
        if self.fetch == Fetch.NONE:
            placement = Placement(home=placement.home, resident=np.ones_like(placement.resident))
        if self.caches and self.num_slots is not None:
            return Placement(placement.home, with_slot(placement.resident, self.num_slots))
        return placement

    def room(self, num_experts: int, world_size: int) -> int | None:  # noqa: ARG002  (for policies with spare slots)
        """Return the experts that a rank has room for in a layer; None: as many as it holds at the start."""
        return self.num_slots

    def with_spare_slots(self, spare_slots: int, num_experts: int, world_size: int) -> Self:
        """Return the policy with room for an even share of a layer's experts and so many more, on every rank.

        What it does with the room is its own: slots for replicas or for what is fetched, or nothing.
        """
        return replace(self, num_slots=even_room(num_experts, world_size, spare_slots))

    def update_placement(
        self,
        layer: int,  # noqa: ARG002
        history: Sequence[IntArray],  # noqa: ARG002
        placement: Placement,  # noqa: ARG002
    ) -> Placement | None:
        """Return a new residency for a MoE layer, or None to keep it; asked before every batch is planned.

        Moving the weights that a rank does not hold yet is part of the measured batch.

        Args:
            layer: MoE layer in order of execution.
            history: int64 ``[world_size, num_experts]`` per earlier batch of this system, oldest first. Its length is
                the number of batches; only the latest :attr:`history_window` can be read.
            placement: the present residency.
        """
        return None

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Return what a layer's ranks hold after a batch, or None for what they held before; asked once it is planned.

        What the slots hold by then stays, the rest is copied in behind the layers that follow.

        Args:
            layer: MoE layer in order of execution.
            history: int64 ``[world_size, num_experts]`` per batch, as :meth:`update_placement` has it, and behind them
                the batch itself.
            placement: the residency that the batch was planned from.
        """
        return None

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement | None:  # noqa: ARG002
        """Return a new residency for the layer that follows, or None to keep it; asked once a layer is planned.

        What it is derived from is a prediction: the gate of the layer that follows has not seen the batch. Weights are
        copied behind the work of the layer, and execution always follows the gate.

        Args:
            layer: the layer that was planned; there is one after it.
            counts: int64 ``[world_size, num_experts]``, its counts.
            following: the present residency of the layer after it.
        """
        return None

    def begin_early(self, placement: Placement) -> HeadStart | None:  # noqa: ARG002
        """Return how much a rank executes of its own rows while counts travel and the plan is made; None: nothing.

        What it executes is taken out of the batch before :meth:`plan` sees it; see :mod:`harmoeny.head_start`.

        Args:
            placement: the present residency of the layer; every rank must have slots for what it holds there.
        """
        return None

    def place_shared(self, num_tokens: IntArray, load: IntArray, num_shared: int) -> IntArray:  # noqa: ARG002
        """Decide which rank executes the shared experts of whose tokens; asked once the routed ones are planned.

        Every rank holds them, so any may. Without this, each rank executes those of its own tokens.

        Args:
            num_tokens: int64 ``[world_size]``, tokens per source rank.
            load: int64 ``[world_size]``, routed assignments that every rank executes.
            num_shared: shared experts per token, at least 1, which all go the same way.

        Returns:
            int64 ``[world_size(src), world_size(dst)]``, tokens; the sums over dst are ``num_tokens``.
        """
        return np.diag(num_tokens)

    @abstractmethod
    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Decide where every assignment is executed.

        Args:
            counts: int64 ``[world_size, num_experts]``, C-contiguous, assignments per source rank and expert.
            placement: the experts that every rank holds.

        Returns:
            A plan that keeps the invariants of :meth:`Plan.validate`.
        """


@dataclass(kw_only=True)
class BlindPolicy(Policy):
    """A policy that decides where experts are, and does not see the batch.

    How a batch is executed follows from the placement: its counts reach no method of a subclass.
    """

    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY})

    @abstractmethod
    def serving(self, placement: Placement) -> BoolArray | None:
        """Return bool ``[num_experts, world_size]``, the ranks that share every expert's assignments evenly.

        None: the home ranks alone, which takes less time to plan.

        Args:
            placement: the experts that every rank holds, which are at least those.
        """

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Share ``counts`` (int64 ``[world_size, num_experts]``) evenly over the serving ranks, own ranks first."""
        if self.serving(placement) is None:
            return Plan(tokens=home_tokens(counts, placement.home), fetch=np.zeros_like(placement.resident))
        return plan_from_tokens(tokens_of_shares(counts, self.executed(counts, placement)), placement)

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``: even shares of the serving ranks."""
        serving = self.serving(placement)
        shares: IntArray = home_executed(counts, placement) if serving is None else even_shares(counts, serving)
        return shares


def places_anew(policy: Policy) -> bool:
    """Return whether a policy ever changes its placements between batches."""
    return type(policy).update_placement is not Policy.update_placement


def moves_shared(policy: type[Policy]) -> bool:
    """Return whether a policy ever sends a token's shared expert to another rank: it does nothing for other models."""
    return policy.place_shared is not Policy.place_shared


def check_knowledge(policy: Policy) -> None:
    """Refuse a policy that asks for more of the routing than it says it knows.

    Raises:
        ValueError: ``knows`` lacks what a method that the policy overrides would see.
    """
    cls = type(policy)
    blind = all(getattr(cls, name, None) is vars(BlindPolicy)[name] for name in ("plan", "executed"))
    learns = places_anew(policy) or cls.retain is not Policy.retain or policy.calibration_batches > 0
    for needed, asks, way in (
        (Knowledge.EXACT, not blind, "plans for itself (BlindPolicy leaves that to the runtime)"),
        (Knowledge.EXACT, moves_shared(cls), "places shared experts by the batch's loads"),
        (Knowledge.HISTORY, learns, "learns from earlier batches"),
        (Knowledge.LOOKAHEAD, cls.look_ahead is not Policy.look_ahead, "places experts ahead of the gate"),
    ):
        if asks and needed not in policy.knows:
            known = ", ".join(sorted(policy.knows)) or "nothing"
            raise ValueError(f"knows: {known}, must have {needed} for {policy.name}, which {way}")
