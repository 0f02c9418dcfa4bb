"""The cells of a sweep as a flow sees them: which there are, and the work on one of them.

A flow knows the graph and not the stages, so what does the work is imported when it begins, in the
process that does it. That process may serve many cells, and imports torch, DVC and MLflow once.
"""

import importlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.errors import TrainingError

FOLDER = Path("artifacts", "sweep")
PLAN = FOLDER / "plan.json"
LOGS = FOLDER / "logs"
_LOCK = FOLDER / ".lock"


@dataclass(frozen=True)
class Outcome:
    """How the work on a cell ended.

    Attributes:
        name: one of 'Completed', 'Cached' (it was done before), 'Pruned', 'Left' (no time for it)
            and 'Failed'.
        said: a line for people, with the seconds that the work took.
    """

    name: str
    said: str


def plan(workspace: Path) -> dict[str, Any]:
    """Return what ``tlpipe sweep`` has planned; 'cells' are in the order of their work.

    Raises:
        ArtifactError: there is no plan.
    """
    return files.read_json(workspace / PLAN)


def exclusive(workspace: Path) -> AbstractContextManager[int]:
    """Hold the workspace for one sweep; gives the lock's file descriptor, for its flow to inherit.

    Raises:
        TrainingError: another sweep holds it.
    """

    def error(process: str) -> TrainingError:
        return TrainingError(
            f"another sweep works in {workspace.resolve()}, as process {process or '?'}; expected "
            f"one at a time. Wait for it, or stop it."
        )

    return files.exclusive(workspace / _LOCK, error)


def work(workspace: Path, number: int, deadline: float | None) -> Outcome:
    """Do the cell of this number of the plan, or the next trial of a search.

    ``deadline``: seconds since 1970 after which nothing is to be at work; None: there is none.
    """
    began = time.monotonic()
    cell = importlib.import_module("tlpipe.sweep.cell")
    name, said = cell.run(workspace, number, deadline)
    return Outcome(name, f"{said}; {time.monotonic() - began:.2f} s")


def stopped(workspace: Path, cell: str) -> Path:
    """Return where it is written how long a cell has worked which a budget stopped."""
    return workspace / FOLDER / "stopped" / f"{cell}.json"


def note_stopped(workspace: Path, cell: str, seconds: float) -> None:
    """Write how long a cell had worked when it was stopped: it takes longer than that."""
    files.write_json(stopped(workspace, cell), {"seconds": seconds})


def last_said(workspace: Path, since: float) -> str:
    """Return the last line that a cell at work has written; nothing where there is none.

    ``since``: when the work began, in seconds since 1970; older lines are of other sweeps.
    """
    times = {path: path.stat().st_mtime for path in (workspace / LOGS).glob("*.log")}
    newest = max(times, key=lambda path: times[path], default=None)
    if newest is None or times[newest] < since:
        return ""
    lines = newest.read_text(encoding="utf-8").splitlines()
    return f"{newest.stem}: {lines[-1].partition(' ')[2]}" if lines else ""


def title(plan: Mapping[str, Any], number: int) -> str:
    """Return the name that a cell's task has."""
    cells = plan["cells"]
    if plan["search"] is None:
        return str(cells[number]["name"])
    return f"trial-{number}" if number < plan["search"]["trials"] else "best"
