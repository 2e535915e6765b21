"""Which experts are resident where, for one system, as its policy changes that from batch to batch."""

from __future__ import annotations

from copy import deepcopy

from harmoeny.history import History
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy, check_knowledge, places_anew
from harmoeny.shared import routed_counts


class Residency:
    """The present placements of a system, and the batches that its policy may learn from.

    Attributes:
        placements: the present residency per MoE layer.
        changes: whether the policy ever changes it.
    """

    def __init__(self, policy: Policy, placements: list[Placement]) -> None:
        """Begin with no batch seen.

        Args:
            policy: may change the placements, of which it sees the routed experts.
            placements: residency per MoE layer before the first batch; updated.

        Raises:
            ValueError: the policy asks for more than it says it knows.
        """
        check_knowledge(policy)
        self.placements = placements
        # A single rank that holds every expert has no other placement.
        free = any(p.world_size > 1 or not p.resident.all() for p in placements)
        self._learns = free and places_anew(policy)
        self._looks_ahead = free and type(policy).look_ahead is not Policy.look_ahead
        self._retains = free and type(policy).retain is not Policy.retain
        self.changes = self._learns or self._looks_ahead or self._retains
        self._policy = policy
        self._first_placements = list(placements)
        self.reset()

    def reset(self) -> None:
        """Forget all batches and return to the placements of the beginning."""
        self.placements[:] = self._first_placements
        self._history = [History(self._policy.history_window) for _ in self.placements]

    def rehearse(self, num_batches: int) -> None:
        """Let a copy of the policy see so many batches like the latest of the first layer, and forget it.

        What a policy does only now and then is compiled, or its machine code loaded, before batches are timed.
        """
        if not self._learns or not self._history[0]:
            return
        policy, history = deepcopy(self._policy), History(self._policy.history_window)
        counts, placement = self._history[0][-1], self.placements[0].routed
        for _ in range(num_batches):
            placement = policy.update_placement(0, history, placement) or placement
            policy.plan(counts, placement)
            history.append(counts)

    def update(self, layer: int, counts: IntArray) -> Placement | None:
        """Let the policy change a layer before a batch is planned, and remember the batch for the next time.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``, the batch, which the policy does not see yet.

        Returns:
            The new placement, or None where nothing changed.
        """
        changed, placement = None, self.placements[layer]
        if self._learns:
            changed = self._policy.update_placement(layer, self._history[layer], placement.routed)
        if self._learns or self._retains:
            self._history[layer].append(routed_counts(counts, placement))
        return self._place(layer, changed)

    def retain(self, layer: int) -> Placement | None:
        """Let the policy choose a layer's residents after the batch that was planned; return them, or None.

        Args:
            layer: MoE layer in order of execution.
        """
        if not self._retains:
            return None
        return self._place(layer, self._policy.retain(layer, self._history[layer], self.placements[layer].routed))

    def look_ahead(self, layer: int, counts: IntArray) -> Placement | None:
        """Let the policy change the layer after the one that was planned; return its new placement, or None.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
        """
        if not self._looks_ahead or layer + 1 == len(self.placements):
            return None
        seen = routed_counts(counts, self.placements[layer])
        return self._place(layer + 1, self._policy.look_ahead(layer, seen, self.placements[layer + 1].routed))

    def _place(self, layer: int, routed: Placement | None) -> Placement | None:
        """Take over what a policy made of a layer's routed experts; return the placement of all, or None."""
        if routed is None:
            return None
        self.placements[layer] = routed.with_shared(self.placements[layer].num_shared)
        return self.placements[layer]
