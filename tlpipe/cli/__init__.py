"""The command line: one command a stage, and those that people use beside the graph.

Nothing heavy is imported before a command needs it, so that ``--help`` and errors are quick.
"""

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tlpipe.cli import doctor, labels, models, projects, stages, sweeps
from tlpipe.cli.tables import printable
from tlpipe.errors import ArtifactError, TlpipeError

_FORBIDDEN = (
    "expected a folder that may be read and written. Change its permissions, or work in another one"
)
_NO_FOLDER = "expected a folder, or nothing, there. Name another place"
_FULL = "the disk is full, or your share of it. Free some of it, and run it again"
_NO_LOCKS = "this file system cannot lock files. Work in a folder of another one"
# What the system may say of a place that a user named, and what is to be done.
_PLACES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_FOLDER),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    errno.ENOLCK: _NO_LOCKS,
    errno.ENAMETOOLONG: "expected a name that the system can hold. Name a shorter one",
}

app = typer.Typer(
    help="From labelled images to a classifier in production: reproducible, measured, served.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (projects, labels, sweeps, stages, models):
    part.add(app)
app.command()(doctor.doctor)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"tlpipe {version('tlpipe')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run a command; an error ends in one line and its own exit code."""
    # No network unless asked for: these are read when the packages are imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("tlpipe").setLevel(logging.INFO)
    try:
        app()
    except TlpipeError as error:
        print(f"tlpipe: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            print("tlpipe: the current folder was deleted. Go to another one.", file=sys.stderr)
            raise SystemExit(ArtifactError.exit_code) from None
        advice = _PLACES.get(error.errno or 0)
        if advice is None or (error.filename is None and advice not in (_FULL, _NO_LOCKS)):
            raise
        where = f"{printable(str(error.filename)[:200])}: " if error.filename else ""
        print(f"tlpipe: {where}{error.strerror}; {advice}.", file=sys.stderr)
        raise SystemExit(ArtifactError.exit_code) from None


def _is_nowhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


class _Printable(logging.Formatter):
    """Messages may quote names of files, and what others wrote into a registry."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))
