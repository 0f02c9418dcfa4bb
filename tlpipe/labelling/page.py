"""The page: shows queues of images in the browser and saves what a person decides with keys.

====================================  ==========================================================
``GET /TOKEN/``                       the page, ``page.js`` and ``page.css`` beside it
``GET /TOKEN/state``                  classes, and how many images of each queue are left
``GET /TOKEN/queue/NAME``             a queue's questions with what was decided
``GET /TOKEN/image/KEY``              an image as it is stored, PNG
``POST /TOKEN/decide``                ``{queue, item, action, label}`` -> what was saved
``POST /TOKEN/undo``                  ``{decision}``, as it was shown -> what is left
====================================  ==========================================================

Whoever has no token sees nothing. The address of the page counts, too, so that no other site can
make a browser send requests here, or read answers (DNS rebinding): the header Host, and of what
changes something Origin. No path of a request is ever opened.
"""

import hashlib
import io
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from tlpipe.errors import TlpipeError
from tlpipe.labelling import table as labels
from tlpipe.labelling.queues import TITLES, Item, Queue
from tlpipe.labelling.table import Table, TakenError, decided
from tlpipe.sources.decisions import Decision

_log = logging.getLogger(__name__)
_STATIC = Path(__file__).with_name("static")
_FILES = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_MOST_BYTES = 65_536
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
DROP, KEEP, CLASS = "drop", "keep", "class"


class _Asked(BaseModel):
    """What a page sends: ``label`` where the action is a class, ``decision`` to undo one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    queue: str = ""
    item: str = ""
    action: str = ""
    label: str = ""
    decision: str = ""


class AskedError(Exception):
    """What is asked for does not exist; the message says what is expected."""


class SavedError(Exception):
    """It was saved, and something else went wrong then."""


class Session:
    """What is shown and decided while the command runs."""

    def __init__(
        self,
        table: Table,
        queues: Sequence[Queue],
        classes: Sequence[str],
        *,
        title: str,
        read_only: str = "",
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what to ask.

        ``read_only``: why nothing can be saved, empty where it can; ``after``: called when
        something was saved.
        """
        self._queues = {queue.name: queue for queue in queues}
        every = {queue.name: queue.every or queue.items for queue in queues}
        self._items = {(name, item.key): item for name in every for item in every[name]}
        self._images = {i.key: i for items in every.values() for item in items for i in item.images}
        self._table, self._classes, self._title = table, tuple(classes), title
        self._read_only, self._after = read_only, after
        self._decisions: dict[str, frozenset[Decision]] = {}  # as they were shown

    def state(self) -> dict[str, Any]:
        """Return the classes and the queues with how many questions are left in each."""
        rows = decided(self._table.load().rows)
        return {
            "title": self._title,
            "classes": self._classes,
            "read_only": self._read_only,
            "queues": [
                {
                    "name": queue.name,
                    "title": TITLES[queue.name],
                    "note": queue.note,
                    "left": queue.left(rows),
                    "listed": bool(queue.every),  # a part of them, the next ones
                    # What the page compares to see that the order is another one.
                    "order": hash(tuple(item.key for item in queue.items)) & 0xFFFFFFFF,
                }
                for queue in self._queues.values()
            ],
        }

    def questions(self, name: str) -> list[dict[str, Any]]:
        """Return a queue's questions in their order.

        Raises:
            KeyError: there is no such queue.
        """
        rows = decided(self._table.load().rows)
        return [
            {
                "key": item.key,
                "why": item.why,
                "suggested": item.suggested,
                "can_keep": item.can_keep,
                "images": [
                    {"key": image.key, "path": image.subject.path, "label": image.label}
                    for image in item.images
                ],
                "decision": self._shown(item, rows),
            }
            for item in self._queues[name].items
        ]

    def image(self, key: str) -> bytes | None:
        """Return an image as PNG; None where there is none of that key."""
        found = self._images.get(key)
        if found is None:
            return None
        content = io.BytesIO()
        Image.fromarray(found.pixels()).save(content, "PNG", compress_level=1)
        return content.getvalue()

    def decide(self, queue: str, key: str, action: str, label: str) -> dict[str, Any]:
        """Save a decision; it is on disk when this returns.

        Raises:
            AskedError: there is no such question, action or class.
            SavedError: it was saved, and something else went wrong then.
            TakenError: it was decided already.
        """
        item = self._item(queue, key)
        if action not in (CLASS, DROP, KEEP) or (action == CLASS) != bool(label):
            raise AskedError(f"the action is {action!r}; expected {CLASS}, {DROP} or {KEEP}")
        if action == CLASS and label not in self._classes:
            raise AskedError(f"{label!r} is no class here")
        if action == KEEP and not item.can_keep:
            raise AskedError("this cannot stay as it is: name its class, or drop it")
        # An image is kept under the label that it is shown with, which may be a corrected one.
        made = self._table.decide(
            [(one.subject, one.label if action == KEEP else label) for one in item.images]
        )
        with _saved():
            self._after()
            return {"decision": self._said(made), **self.state()}

    def undo(self, decision: str) -> dict[str, Any]:
        """Delete the rows of a decision as it was shown.

        Raises:
            AskedError: none of that name was shown.
            SavedError: it was undone, and something else went wrong then.
            TakenError: it does not stand any more.
        """
        if (rows := self._decisions.get(decision)) is None:
            raise AskedError("there is no such decision: load the page again")
        self._table.undo(rows)
        with _saved():
            self._after()
            return self.state()

    def _item(self, queue: str, key: str) -> Item:
        if (found := self._items.get((queue, key))) is None:
            raise AskedError("there is no such image in this queue: load the page again")
        return found

    def _shown(
        self, item: Item, rows: Mapping[labels.Image, Sequence[Decision]]
    ) -> dict[str, str] | None:
        """Return the last decision on a question as the page shows it, if it is settled."""
        if not (found := item.decision(rows)):
            return None
        last = max((row.at, row.by) for row in found)
        there = [row for one in item.subjects for row in rows.get(one.image, ())]
        return self._said([row for row in there if (row.at, row.by) == last])

    def _said(self, rows: Sequence[Decision]) -> dict[str, str]:
        """Return a decision as the page shows it; ``id`` is of these rows alone."""
        name = hashlib.sha256(ascii(sorted(rows)).encode()).hexdigest()[:24]
        self._decisions[name] = frozenset(rows)
        # The same bytes in the unlabelled folder follow those in the source.
        named = [row for row in rows if row.was] or rows
        what = " / ".join(dict.fromkeys(row.what for row in named))
        return {"id": name, "what": what, "by": rows[0].by, "at": rows[0].at}


@contextmanager
def _saved() -> Iterator[None]:
    """Make of errors, now that something is saved, such as say so."""
    try:
        yield
    except (TlpipeError, OSError) as error:
        raise SavedError(str(error)) from error


def create_app(session: Session, token: str, port: int) -> FastAPI:
    """Return the application, for pages that are opened at this port of 127.0.0.1."""
    app = FastAPI(title="tlpipe label", docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Any]) -> Response:
        response = _refused(request, hosts, token) or await answer(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    # Not by a parameter of the path: the middleware has compared it in constant time.
    @app.get("/{_}/state")
    def state() -> Any:
        return _answered(session.state)

    @app.get("/{_}/queue/{name}")
    def queue(name: str) -> dict[str, Any]:
        try:
            return {"items": _answered(lambda: session.questions(name))}
        except KeyError:
            raise HTTPException(404, "there is no such queue") from None

    @app.get("/{_}/image/{key}")
    def image(key: str) -> Response:
        content = session.image(key)
        if content is None:
            raise HTTPException(404, "there is no such image")
        # So that the next image is there at once; the key is of its content.
        kept = {"Cache-Control": "private, max-age=3600"}
        return Response(content, media_type="image/png", headers=kept)

    @app.post("/{_}/decide")
    async def decide(request: Request) -> Any:
        asked = await _asked(request)
        values = (asked.queue, asked.item, asked.action, asked.label)
        return await run_in_threadpool(lambda: _answered(lambda: session.decide(*values)))

    @app.post("/{_}/undo")
    async def undo(request: Request) -> Any:
        asked = await _asked(request)
        return await run_in_threadpool(lambda: _answered(lambda: session.undo(asked.decision)))

    @app.get("/{_}/{name:path}")
    def file(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "there is no such page")
        path = _STATIC / _FILES[name]
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix])

    return app


def _refused(request: Request, hosts: set[str], token: str) -> Response | None:
    """Return why a request is not answered, or None."""
    host = request.headers.get("host", "")
    if host not in hosts:
        return _plain(403, "this page is not served under that name")
    given = request.url.path.split("/")[1].encode()
    if not secrets.compare_digest(given, token.encode()):
        return _plain(403, "the address lacks the token: open the one that 'tlpipe label' printed")
    if request.method == "POST":
        if request.headers.get("origin") != f"http://{host}":
            return _plain(403, "what changes something is taken from this page alone")
        if request.headers.get("content-type") != "application/json":
            return _plain(415, "expected JSON")
    return None


def _plain(code: int, text: str) -> Response:
    return Response(json.dumps({"detail": text}), code, media_type="application/json")


async def _asked(request: Request) -> _Asked:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise HTTPException(413, "that is too long")
    try:
        return _Asked.model_validate_json(bytes(body))
    except ValidationError:
        raise HTTPException(400, "expected queue, item, action, label or decision") from None


def _answered(call: Callable[[], Any]) -> Any:
    """Return what a call gives; its errors become answers."""
    try:
        return call()
    except AskedError as error:
        raise HTTPException(400, str(error)) from None
    except TakenError as error:
        raise HTTPException(409, str(error)) from None
    except SavedError as error:
        _log.warning("%s", error)
        raise HTTPException(500, f"it was saved, and then: {error}") from None
    except (TlpipeError, OSError) as error:
        _log.warning("%s", error)
        raise HTTPException(500, f"nothing was saved: {error}") from None
