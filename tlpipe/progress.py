"""Show how far long work has come; print nothing where nobody watches a terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def track(items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
    """Yield the items behind a progress bar on standard error."""
    with meter(description, total=total) as shown:
        for item in items:
            yield item
            shown.advance(1)


class Meter:
    """A progress bar, or nothing."""

    def __init__(self, progress: "Progress | None") -> None:
        """Take the bars of a terminal."""
        self._progress = progress

    def advance(self, count: int, note: str = "") -> None:
        """Go on by so many; ``note`` stands behind the bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], advance=count, note=note)


@contextmanager
def meter(description: str, *, total: int, done: int = 0) -> Iterator[Meter]:
    """Show a progress bar on standard error, with what is done in a second and the time left."""
    if not sys.stderr.isatty():
        yield Meter(None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task(description, total=total, completed=done, note="")
        yield Meter(progress)
