"""Show how far long work has come: a bar in a terminal, a line now and then in a log file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
EVERY_S = 30.0  # how often a log file gets a line
_log = logging.getLogger(__name__)


def track(items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
    """Yield the items behind a progress bar on standard error."""
    with meter(description, total=total) as shown:
        for item in items:
            yield item
            shown.advance(1)


def duration(seconds: float) -> str:
    """Return a duration in words.

    Examples:
        >>> duration(0.24), duration(75), duration(7380)
        ('0.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


class Meter:
    """A progress bar, or lines in the log: what is done of how much, how fast, the time left."""

    def __init__(self, progress: "Progress | None", description: str, total: int, done: int):
        """Take the bars of a terminal, or None where there is no terminal."""
        self._progress = progress
        self._description = description
        self._total, self._done, self._first = total, done, done
        self._start = self._said = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """Go on by so many; ``note`` stands behind the bar."""
        self._done += count
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], advance=count, note=note)
        elif (now := time.monotonic()) >= self._said + EVERY_S:
            self._said = now
            speed = (self._done - self._first) / (now - self._start)
            left = duration((self._total - self._done) / speed) if speed else "unknown"
            about = f", {note}" if note else ""
            _log.info(
                "%s: %s of %s, %.3g a second, %s left%s",
                *(self._description, f"{self._done:,}", f"{self._total:,}", speed, left, about),
            )


@contextmanager
def meter(description: str, *, total: int, done: int = 0) -> Iterator[Meter]:
    """Show on standard error how far work is, with what is done in a second and the time left."""
    if not sys.stderr.isatty():
        yield Meter(None, description, total, done)
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
        yield Meter(progress, description, total, done)
