"""Progress of a point on rank 0: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PointProgress:
    """Counts forward passes; silent on ranks other than 0."""

    def __init__(self, label: str, total: int, *, enabled: bool) -> None:
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        self._label = label
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> PointProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def step(self, text: str) -> None:
        """Name what happens now."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._label}: {text}")
        elif self._enabled:
            self._console.print(f"{self._label}: {text}", highlight=False)

    def advance(self) -> None:
        """Count one forward pass."""
        if self._bar is not None:
            self._bar.advance(self._task)
