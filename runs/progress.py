"""What the user sees while a run works: bars with time left on a terminal, one line a task elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Observer(Protocol):
    """Hears what happens: a task starts, progresses (0 to 1), ends."""

    def started(self, task: str) -> None: ...

    def progressed(self, task: str, progress: float) -> None: ...

    def finished(self, task: str, seconds: float) -> None: ...


@contextmanager
def observer(console: Console) -> Iterator[Observer]:
    """Bars on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console)
        return
    bars = Bars(console)
    with bars.progress:
        yield bars


class Lines:
    """One line when a task ends; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def started(self, task: str) -> None:
        pass

    def progressed(self, task: str, progress: float) -> None:
        pass

    def finished(self, task: str, seconds: float) -> None:
        self.console.print(f"{task}: done in {seconds:.1f} s" if seconds else f"{task}: done before", highlight=False)


class Bars:
    """A bar with time left for every task under way."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.bars: dict[str, TaskID] = {}

    def started(self, task: str) -> None:
        self.bars[task] = self.progress.add_task(task, total=1.0)

    def progressed(self, task: str, progress: float) -> None:
        self.progress.update(self.bars[task], completed=progress)

    def finished(self, task: str, seconds: float) -> None:
        if task in self.bars:
            self.progress.remove_task(self.bars.pop(task))
        text = f"[green]done[/] {task}" + (f" in {seconds:.1f} s" if seconds else " before")
        self.progress.console.print(text, highlight=False)
