"""What sweepers that run a part of a grid have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class PartSweeper(BasicSweeper):
    """Hydra's own sweeper, which runs the jobs that a subclass chooses of the grid."""

    @abstractmethod
    def jobs(self, overrides: Sequence[Override]) -> list[list[str]]:
        """Return the jobs of the grid that these overrides, parsed, span."""

    def split_arguments(  # type: ignore[override]  # it is no static method here
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return the jobs in batches."""
        return [list(chunk) for chunk in self.split_overrides_to_chunks(self.jobs(overrides), max_batch_size)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose nothing: all points were composed and checked before the sweep begins (`sweep_callback`)."""
