"""What a run says on standard error: lines, and the progress of a point as a bar on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """Print one line of information on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


class _Hidden:
    """Whether this process shows no progress: one of several, whose lines and bars would run into each other."""

    progress = False


def hide_progress() -> None:
    """Show no progress of points from now on."""
    _Hidden.progress = True


class PointProgress:
    """Counts the forward passes of a point: a bar on a terminal, a line per message elsewhere."""

    def __init__(self, title: str, total: int, *, enabled: bool) -> None:
        """Prepare the bar.

        Args:
            title: what the point is called.
            total: number of passes.
            enabled: say anything at all; off on ranks other than 0.
        """
        console = Console(stderr=True)
        enabled = enabled and not _Hidden.progress
        self._enabled = enabled
        self._bar: Progress | None = None
        self._title = title
        if enabled:
            # Numba takes long to import, which other lines need not wait for.
            from harmoeny.compiled import on_compiling

            on_compiling(lambda: self.say("compiling for this machine, once, which may take a minute or two"))
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn(self._title.replace("{", "{{").replace("}", "}}"), markup=False),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task("", total=total)

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

    def say(self, text: str) -> None:
        """Name what happens now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif self._enabled:
            say(f"{self._title}: {text}")

    def expect(self, passes: int) -> None:
        """Count on further passes."""
        if self._bar is not None:
            (task,) = self._bar.tasks
            self._bar.update(self._task, total=(task.total or 0) + passes)

    def advance(self) -> None:
        """Count one forward pass."""
        if self._bar is not None:
            self._bar.advance(self._task)


def tidy_terminal() -> None:
    """Show the cursor again and begin a new line, after a rank was stopped with its bar on the screen."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.show_cursor()
        console.line()
