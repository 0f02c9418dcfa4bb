"""Command ``label``: show people what to correct and what to label next, and save what they decide.

It serves one page on this machine alone, until it is told to stop.
"""

import logging
import secrets
import socket
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import uvicorn

from tlpipe.data import ingest
from tlpipe.errors import ParamsError, ServingError
from tlpipe.labelling import queues as questions
from tlpipe.labelling.page import Session, create_app
from tlpipe.labelling.proposals import Known, Proposals, Reading, known_of, read
from tlpipe.labelling.queues import Queue
from tlpipe.labelling.table import Table
from tlpipe.sources.decisions import UNLABELLED, counts_of

_log = logging.getLogger(__name__)
_HERE = "127.0.0.1"  # nobody else may see the images


def run(
    *,
    paths: Mapping[str, Path],
    params: ingest.Params,
    table: Table,
    unlabelled: Reading | None,
    every: int,
    port: int,
    title: str,
) -> Counter[str]:
    """Serve a project's page; return how many decisions of each kind were made meanwhile.

    Args:
        paths: of what the stages wrote, by names of ``graph.PATHS``.
        params: those of ``ingest``, with nothing left to be decided.
        table: where decisions go.
        unlabelled: a folder of which the most useful images are shown, too.
        every: after so many of these, what is most useful is computed anew.
        port: 0 takes a free one.
        title: of the page.

    Raises:
        ArtifactError: a stage has not run, or the table cannot be read.
        DataError: the folder is missing, or has no image that can be read.
        ServingError: the port is not free.
    """
    with _listen(port) as listener:
        found, classes = questions.of_project(paths, params)
        proposals = None
        if unlabelled is not None:
            known = known_of(paths["activations"], paths["split"], classes)
            proposals = Proposals(read(unlabelled, UNLABELLED), known, table, every)
            found.append(proposals.queue)
        return _serve(table, found, classes, listener, title, proposals)


def run_unlabelled(
    *, unlabelled: Reading, classes: tuple[str, ...], table: Table, every: int, port: int
) -> Counter[str]:
    """Serve the images of a folder that belongs to no project, as ``run`` does.

    Raises:
        ArtifactError: the table cannot be read.
        DataError: the folder is missing, or has no image that can be read.
        ServingError: the port is not free.
    """
    with _listen(port) as listener:
        table.load()
        proposals = Proposals(read(unlabelled, ""), Known.nothing(classes), table, every)
        title = Path(unlabelled.address).name
        return _serve(table, [proposals.queue], classes, listener, title, proposals)


def check_classes(text: str) -> tuple[str, ...]:
    """Return classes that were named with commas between them.

    Raises:
        ParamsError: they are fewer than two, one stands twice or is not printable.
    """
    found = tuple(name.strip() for name in text.split(","))
    said = f"--classes is {text!r}; expected two or more names, as in --classes ants,bees"
    if len(found) < 2 or not all(found):
        raise ParamsError(f"{said}.")
    if twice := [name for number, name in enumerate(found) if name in found[:number]]:
        raise ParamsError(f"{said}; {twice[0]!r} stands twice.")
    if strange := [name for name in found if not name.isprintable()]:
        raise ParamsError(f"{said}; {strange[0]!r} is not printable.")
    return found


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((_HERE, port))
    except OSError as error:
        raise ServingError(
            f"cannot listen on {_HERE}:{port}: {error.strerror}. Name another port with --port, or "
            f"0 for a free one."
        ) from None


def _serve(
    table: Table,
    found: list[Queue],
    classes: tuple[str, ...],
    listener: socket.socket,
    title: str,
    proposals: Proposals | None,
) -> Counter[str]:
    """Serve until somebody stops it."""
    before = {*table.load().rows}
    session = Session(
        table,
        found,
        classes,
        title=title,
        read_only=_read_only(table),
        after=proposals.after if proposals else lambda: None,
    )
    token, port = secrets.token_urlsafe(24), listener.getsockname()[1]
    for queue in session.state()["queues"]:
        print(f"{queue['title']}: {queue['left']} left")
    print(f"open http://{_HERE}:{port}/{token}/ and end with Ctrl-C", flush=True)
    config = uvicorn.Config(create_app(session, token, port), log_level="warning")
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        uvicorn.Server(config).run(sockets=[listener])
    return Counter(counts_of({*table.load().rows} - before))


def _read_only(table: Table) -> str:
    """Say at once why nothing can be saved, if nothing can."""
    try:
        table.check_writable()
    except OSError as error:
        said = f"{table.path} cannot be written: {error.strerror}. Nothing can be decided here"
        _log.warning("%s; make its folder writable, and run it again", said)
        return said
    return ""
