"""What systems have in common whose hosts compute experts by what that costs on the machine."""

from __future__ import annotations

from copy import copy
from typing import ClassVar, Self

from harmoeny.cost import ExpertCost
from harmoeny.places import PlaceCosts


class WithHost:
    """Part of a policy: its hosts compute, and it knows what that costs once it is calibrated."""

    name: ClassVar[str]

    _costs: PlaceCosts | None = None

    @property
    def needs_host(self) -> bool:
        """True."""
        return True

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the machine's costs in place of the authors' constants."""
        calibrated = copy(self)
        calibrated._costs = PlaceCosts.of(cost)
        return calibrated

    def costs(self) -> PlaceCosts:
        """Return the machine's costs.

        Raises:
            ValueError: the policy was not calibrated.
        """
        if self._costs is None:
            raise ValueError(f"{self.name}: must be calibrated before planning")
        return self._costs
