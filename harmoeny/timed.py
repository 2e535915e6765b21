"""HarMoEny by time: every batch is planned such that the slowest rank is predicted to be fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np

from harmoeny.balance import choose_shares, plan_by_time
from harmoeny.choices import Fetch, Knowledge
from harmoeny.cost import NO_LINKS, ExpertCost
from harmoeny.demand import Demand, hold_expected
from harmoeny.following import accuracy, expect_alike, reliable
from harmoeny.head_start import HeadStart
from harmoeny.lines import Stages
from harmoeny.moves import move_sources
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement, even_room
from harmoeny.places import PlaceCosts, choose_host, spare_copies
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.predict import Costs, machine_costs
from harmoeny.settle import placements_for, renew_copies
from harmoeny.trace import RoutingTrace
from harmoeny.weighed import Chosen
from harmoeny.worth import TRIAL_S

#: What a new placement has to gain, as a share of a layer's time, unless it needs fewer fetches.
_LEAST_GAIN = 0.01
#: Batches that a new placement is expected to serve, over which its copies are spread.
_SERVED_BATCHES = 128
#: Batches that the first new placement follows: one that it is derived from, and two in which it has to pay.
_FEWEST_BATCHES = 3
#: What copies ahead of the gate have to gain, as a share of a layer's time.
_LEAST_GAIN_AHEAD = 0.05
#: Share of what it gains in the batches that it is derived from that it has to gain in the latest, too.
_LEAST_KEPT = 0.5
#: Batches from which a cache begins to learn, where it has not seen them one by one.
_REMEMBERED = 32
#: What a plan reckons with in any case, and all that :attr:`HarMoEny.costs` may have.
_NEEDED_COSTS = tuple(name for name in Costs._fields if name not in Costs._field_defaults)
_COST_NAMES = tuple(dict.fromkeys((*Costs._fields, *PlaceCosts._fields)))


class _Planned(NamedTuple):
    """The latest plan of ranks with fewer slots than experts; all but ``counts`` are ``[num_experts, world_size]``."""

    counts: IntArray
    executed: IntArray
    fetch: BoolArray
    host: BoolArray


@dataclass(kw_only=True)
class HarMoEny(Policy):
    """HarMoEny's two ideas (arXiv 2506.12417), decided by predicted time in place of counted tokens.

    In every batch, assignments move from ranks that would be late to ranks that would wait, which fetch the experts
    that they lack; a fetch is made where the layer is predicted to end sooner with it. Time is that of the slowest
    rank through dispatch, computation and combine, so an expert may also be brought to several ranks only to leave
    tokens where they are, and nothing moves where nothing is gained. See :mod:`harmoeny.balance` and
    :mod:`harmoeny.predict`. The paper's own rule is :class:`harmoeny.rebalance.TokenHarMoEny`.

    Between batches, homes are swapped, and free slots get copies of hot experts, where that would have made the latest
    batch faster by more than its copies cost. What is tried comes from the batches before the latest, so that hot
    experts which move from batch to batch move no weights.

    Attributes:
        fetch: ``peer``: an expert comes from its home rank or from host memory, whichever is sooner there; ``async``
            and ``sync``: always from host memory; ``none``: every expert is resident everywhere.
        spare_slots: room for experts on every rank, beside those that it holds at the start.
        num_stages: stages, whose exchanges are behind each other's products; null: as many as are predicted
            to be fastest, for every layer and batch.
        overlap: whether exchange and computation may overlap, by stages or by executing a rank's own rows
            while the others are on their way; only where rows travel while ranks compute.
        spread: whether hot experts may be brought to all ranks.
        head_start: whether a rank executes some of its own rows while counts travel and the plan is made, where it
            holds experts with many of them. See :mod:`harmoeny.head_start`.
        settle: whether placements follow what earlier batches needed.
        ahead: whether spare slots of the next layer get what it is predicted to need, while a layer is executed.
        interval: batches between two new placements of a layer.
        window: latest batches that they follow.
        host: whether ranks that hold fewer experts than are at home there (``num_slots``) may execute some on their
            hosts, where these have threads for it and end sooner than a fetch would. See :mod:`harmoeny.places`.
        costs: seconds by the names of :class:`harmoeny.cost.ExpertCost`, in place of those that calibration gives.
    """

    name: ClassVar[str] = "harmoeny"
    description: ClassVar[str] = "moves tokens and weights in every batch such that the slowest rank is soonest ready"
    baseline: ClassVar[bool] = False
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT, Knowledge.HISTORY, Knowledge.LOOKAHEAD})

    chooses_stages: ClassVar[bool] = True

    num_stages: int | None = None
    fetch: str = Fetch.PEER.value
    spare_slots: int = 0
    overlap: bool = True
    spread: bool = True
    head_start: bool = True
    settle: bool = True
    ahead: bool = True
    interval: int = 8
    window: int = 8
    host: bool = True
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: The costs that plans reckon with, by name and in order; None until all are known. No option.
        self._known: tuple[Costs, FloatArray] | None = None
        #: Between ranks, as calibrated. No option.
        self._links = NO_LINKS
        #: Per layer, what follows what where that is reliable, and how well it predicts. No options.
        self._following: list[FloatArray | None] = []
        self._accuracy: dict[str, float] = {}
        if all(name in self.costs for name in _NEEDED_COSTS):
            costs = Costs(**{name: float(value) for name, value in self.costs.items() if name in Costs._fields})
            costs = costs if self.fetch == Fetch.PEER else costs._replace(peer_fetch_s=0.0)
            if costs.node_ranks == 0:  # all links are alike
                costs = costs._replace(inside_share=1.0, network_share=1.0)
            self._known = costs, np.array(costs, dtype=np.float64)
        #: Of ranks with few slots: what every layer's next batch is expected to need, which ranks fetched in its latest
        #: one, and the latest plan. No options.
        self._demands: list[Demand] = []
        self._fetching: dict[int, BoolArray] = {}
        self._planned: _Planned | None = None
        #: What decides between fetches and hosts. No option.
        self._places = PlaceCosts(**{name: float(self.costs.get(name, 0.0)) for name in PlaceCosts._fields})

    @property
    def history_window(self) -> int:
        """Batches that placements follow, or that a cache remembers."""
        return max(self.window, _REMEMBERED) if self.caches else self.window

    @property
    def caches(self) -> bool:
        """Whether ranks may have fewer slots than experts whose home they are."""
        return self.num_slots is not None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a cost of another name, below 0, or no time at all for a token or a fetch; an interval or window
                that is too small.
        """
        super().validate()
        if self.spare_slots < 0:
            raise ValueError(f"spare_slots: {self.spare_slots}, must be at least 0")
        if self.spare_slots and self.fetch == Fetch.NONE:
            raise ValueError(f"spare_slots: {self.spare_slots}, must be 0 with fetch=none, where every expert has room")
        if self.spare_slots and self.num_slots is not None:
            raise ValueError(f"spare_slots: {self.spare_slots}, must be 0 with num_slots={self.num_slots}")
        if self.interval < 1:
            raise ValueError(f"interval: {self.interval}, must be at least 1")
        if self.window < 2:
            raise ValueError(f"window: {self.window}, must be at least 2: the latest batch and those before it")
        for name, value in self.costs.items():
            if name not in _COST_NAMES:
                raise ValueError(f"costs.{name}: {value}, must be one of {', '.join(_COST_NAMES)}")
            positive = name in ("token_s", "fetch_s", "tile_tokens", "idle_speedup")
            if not 0 <= value < float("inf") or (positive and value == 0):
                raise ValueError(f"costs.{name}: {value}, must be a number {'above' if positive else 'of at least'} 0")

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the machine's costs, where they were not set."""
        costs = machine_costs(cost)._asdict()
        if cost.host_token_s > 0:
            costs |= {name: float(getattr(cost, name)) for name in PlaceCosts._fields if name not in costs}
        calibrated = replace(self, costs=costs | self.costs, overlap=self.overlap and cost.overlaps)
        calibrated._links = cost.links
        return calibrated

    @property
    def calibration_batches(self) -> int:
        """Batches that say what follows what, where there are slots to look ahead with."""
        return 4 if self.ahead and self.spare_slots > 0 else 0

    def fitted(self, trace: RoutingTrace, num_experts: int, world_size: int) -> Self:
        """Return the policy with what follows what, which is needed only to look ahead."""
        fitted = replace(self)
        fitted._links = self._links
        if self.ahead and (self.room(num_experts, world_size) or 0) * world_size > num_experts:
            fitted._following, fitted._accuracy = reliable(trace, num_experts), accuracy(trace, num_experts)
        return fitted

    def fit_report(self) -> dict[str, float]:
        """Return the accuracy on tokens that the prediction was not fitted to."""
        return self._accuracy

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Plan ``counts`` (int64 ``[world_size, num_experts]``).

        Raises:
            ValueError: a cost was neither set nor calibrated.
        """
        _, costs = self._costs()
        room, resident, small = self._as_if_there(placement)
        tokens, fetches, how, num_stages, overlapped, predicted_s = plan_by_time(
            counts, placement.home, resident, room, costs, *self._links, self.overlap, self._staged(small), self.spread
        )
        fetch, from_peer = fetches[0], fetches[1]  # not unpacked: that takes longer
        halved = fetches[2] if len(fetches) > 2 else None
        groups = [range(len(counts))] if overlapped else None
        if not small:
            stages = senders = None
            if num_stages > 0:
                end = len(fetch) + num_stages + 1
                stages, how = Stages(how[: len(fetch)], how[len(fetch) : end]), how[end:]
            if len(how) > 0:
                senders = how
            return Plan(tokens, fetch, from_peer, groups, predicted_s, stages=stages, senders=senders, halved=halved)
        executed = tokens.sum(axis=0)
        host = self._on_host(executed, placement)
        fetch = (executed > 0) & ~placement.resident & ~host
        self._planned = _Planned(counts, executed, fetch, host)
        from_peer = from_peer & ~placement.at_home
        halved = None if halved is None else halved & fetch & from_peer
        return Plan(tokens, fetch, from_peer, None if host.any() else groups, host=host, halved=halved)

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]`` of the plan."""
        return np.ascontiguousarray(self.choose(counts, placement).shares.T)

    def choose(self, counts: IntArray, placement: Placement) -> Chosen:
        """Return who executes how much of ``counts`` (int64 ``[world_size, num_experts]``).

        Raises:
            ValueError: a cost was neither set nor calibrated.
        """
        costs, _ = self._costs()
        room, resident, small = self._as_if_there(placement)
        chosen: Chosen = choose_shares(
            counts, placement.home, resident, room, costs, self._links, self.overlap, self._staged(small), self.spread
        )
        return chosen

    def _staged(self, small: bool) -> bool:
        """Whether plans may have stages, which ranks that hold less than their homes execute together."""
        return self.overlap and self.num_stages is None and not small

    def _as_if_there(self, placement: Placement) -> tuple[int, BoolArray, bool]:
        """Return a rank's room and what it holds, and whether a rank holds less than what is at home there.

        Then who executes what is decided as if that were there.
        """
        if self.num_slots is None:
            return self.room(*placement.resident.shape) or 0, placement.resident, False
        if placement.holds_homes:
            return self.num_slots, placement.resident, False
        return 0, placement.resident | placement.at_home, True

    def update_placement(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Place a layer anew where that would have paid in every batch of the latest half of the window.

        What is tried is derived from the half before. So routing that changes from batch to batch moves no weights,
        and does not fill slots that its own fetches need.

        Args:
            layer: MoE layer in order of execution.
            history: int64 ``[world_size, num_experts]`` per earlier batch, oldest first.
            placement: the present residency.
        """
        later = len(history) - _FEWEST_BATCHES
        if not self.settle or self.fetch == Fetch.NONE or later < 0 or later % self.interval:
            return None
        if not placement.holds_homes:
            return None  # what is held follows the batches already
        costs, _ = self._costs()
        known = history[-min(self.window, len(history)) :]
        middle = len(known) // 2
        earlier, latest = known[:middle], known[middle:]
        now_s, now_fetches = self._predicted(latest, placement)
        best, best_s = None, np.inf
        for candidate in placements_for(np.mean(earlier, axis=0), placement, self._num_slots(placement), costs):
            copied = candidate.resident & ~placement.resident
            ready_s = move_sources(copied, placement.resident, placement.home, costs, self._links).ready_s
            copied_s = float(ready_s.max()) / _SERVED_BATCHES
            then_s, fetches = self._predicted(latest, candidate)
            then_s = then_s + copied_s
            # What is fetched in every batch keeps links busy, and processors where these copy: once is better.
            least_gain = 0.0 if fetches < now_fetches else _LEAST_GAIN
            if then_s.sum() >= min(best_s, now_s.sum() * (1 - least_gain)) or (then_s >= now_s).any():
                continue
            # Where hot experts move, one that fits the earlier batches may suit the latest by chance.
            gained_s = self._predicted(earlier, placement)[0] - self._predicted(earlier, candidate)[0]
            if (now_s - then_s).mean() >= _LEAST_KEPT * gained_s.mean():
                best, best_s = candidate, then_s.sum()
        return best

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement | None:
        """Give spare slots of the next layer to what it is predicted to need most, where that is predicted to pay.

        No more is copied than the host's link brings while the layer's mean rank computes and exchanges.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
            following: the present residency of the next layer.
        """
        then = self._following[layer] if layer < len(self._following) else None
        if then is None:
            return None
        costs, _ = self._costs()
        mean_s = counts.sum() * (costs.token_s + 2 * costs.exchange_token_s) / len(counts)
        most = int(mean_s / costs.fetch_s)
        if most == 0:
            return None
        expected = expect_alike(counts, then)
        resident = renew_copies(expected, following, self._num_slots(following), most, costs)
        if np.array_equal(resident, following.resident):
            return None
        changed = Placement(following.home, resident)
        whole = np.rint(expected).astype(np.int64)
        now_s, then_s = (self.choose(whole, placement).predicted_s for placement in (following, changed))
        return changed if then_s < now_s * (1 - _LEAST_GAIN_AHEAD) else None

    def _predicted(self, batches: Sequence[IntArray], placement: Placement) -> tuple[FloatArray, int]:
        """Return float64 ``[num_batches]``, how long each would take, and how many fetches there would be in all.

        Times are with what a batch's plan takes beyond the shortest.
        """
        times, num_fetches = [], 0
        for counts in batches:
            chosen = self.choose(counts, placement)
            fetches = int(((chosen.shares.T > 0) & ~placement.resident).sum())
            times.append(chosen.predicted_s + (fetches > 0) * TRIAL_S * counts.size)
            num_fetches += fetches
        return np.array(times), num_fetches

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:
        """Keep, on ranks with fewer slots than experts, what the next batch is expected to need most.

        What was fetched is there already. Others are copied in while the link would be idle. See
        :class:`harmoeny.demand.Demand`.

        Args:
            layer: MoE layer in order of execution.
            history: int64 ``[world_size, num_experts]`` per batch, oldest first, with the one that was planned.
            placement: the residency that it was planned from.
        """
        if self.num_slots is None or placement.holds_homes:
            return None
        if self._planned is None or self._planned.counts is not history[-1]:
            self.plan(history[-1], placement)
        assert self._planned is not None
        _, executed, fetch, host = self._planned
        self._demands += [Demand() for _ in range(len(self._demands), layer + 1)]
        demand = self._demands[layer]
        shares = demand.expect(history, self.history_window)
        self._fetching[layer] = np.any(fetch, axis=0)
        idle = 1.0 - np.mean([self._fetching[i] for i in range(layer + 1)], axis=0)
        copies = spare_copies(executed, placement.resident, host, self._places, idle, len(history) + layer)
        held = hold_expected(
            shares, demand.num_assignments, placement.resident, fetch, placement.at_home, self.num_slots, copies
        )
        return placement.with_residents(held)

    def _on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return bool ``[num_experts, world_size]``, what of ``executed``, of that shape, hosts execute."""
        if not self.host:
            return np.zeros_like(placement.resident)
        return choose_host(executed, placement.resident, self._places)

    def begin_early(self, placement: Placement) -> HeadStart | None:
        """Return how much a rank executes while counts travel and the plan is made: about as long as that takes.

        Nothing where a rank may lack what is at home there, which would have to be fetched first, or holds everything;
        and nothing where exchanging takes no time that is known.

        Args:
            placement: the present residency of the layer.
        """
        if not self.head_start or self.fetch == Fetch.NONE or self._known is None:
            return None
        costs, _ = self._known
        if placement.world_size == 1 or costs.exchange_latency_s == 0 or not placement.holds_homes:
            return None
        return HeadStart.of(costs.exchange_latency_s + TRIAL_S * placement.resident.size, costs)

    def room(self, num_experts: int, world_size: int) -> int | None:
        """Return the experts that a rank has room for in a layer."""
        if self.num_slots is not None or self.spare_slots == 0:
            return self.num_slots
        return even_room(num_experts, world_size, self.spare_slots)

    def _num_slots(self, placement: Placement) -> IntArray:
        """Return int64 ``[world_size]``, the slots of every rank: never fewer than the experts whose home it is."""
        homes = np.bincount(placement.home, minlength=placement.world_size)
        room = self.room(placement.num_experts, placement.world_size)
        return homes if room is None else np.maximum(homes, room)

    def _costs(self) -> tuple[Costs, FloatArray]:
        if self._known is None:
            missing = next(name for name in _NEEDED_COSTS if name not in self.costs)
            raise ValueError(f"costs.{missing}: missing, must be calibrated before planning (HarMoEny.calibrated)")
        return self._known
