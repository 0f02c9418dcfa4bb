"""Questions made by hand, and a page that asks them."""

import hashlib
from pathlib import Path

import numpy as np

from tlpipe.labelling.page import Session
from tlpipe.labelling.queues import DUPLICATES, ISSUES, USEFUL, Item, Queue, Shown
from tlpipe.labelling.table import Subject, Table

CLASSES = ("ant", "bee", "<b>wasp</b>")


def digest(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def shown(number: int, *was: str) -> Shown:
    subject = Subject(digest(number), "", f"{was[0]}/<i>{number}</i>.png", was)
    pixels = np.full((8, 8, 3), 20 * number % 256, np.uint8)
    return Shown(subject, " / ".join(was), lambda: pixels)


def issue(number: int) -> Item:
    return Item((shown(number, "ant"),), "labelled ant (9%), looks like bee (91%)", ("bee",))


def queues(issues: int = 4) -> list[Queue]:
    """Issues 0 to 3 of class ant; 0 and 9 are nearly the same; the bytes of 7 have two labels."""
    pair = Item((shown(0, "ant"), shown(9, "bee")), "nearly the same", ("ant", "bee"))
    same = Item((shown(7, "ant", "bee"),), "the same bytes", ("ant", "bee"), can_keep=False)
    return [Queue(ISSUES, [issue(n) for n in range(issues)]), Queue(DUPLICATES, [pair, same])]


def useful(*numbers: int) -> Queue:
    """Images of an unlabelled folder."""
    return Queue(USEFUL, [Item((shown(number, ""),), "", can_keep=False) for number in numbers])


def table(folder: Path, by: str = "ann") -> Table:
    return Table(folder / "labels.csv", by)


def session(
    folder: Path,
    by: str = "ann",
    *,
    read_only: str = "",
    classes: tuple[str, ...] = CLASSES,
    issues: int = 4,
) -> Session:
    return Session(table(folder, by), queues(issues), classes, title="insects", read_only=read_only)
