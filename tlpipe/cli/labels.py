"""The command that people decide on labels with."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tlpipe import files, graph
from tlpipe.cli.stages import ParamsFile, enter, sections, with_registered_weights
from tlpipe.errors import ParamsError
from tlpipe.sources.decisions import NAME

if TYPE_CHECKING:
    from tlpipe.data import ingest
    from tlpipe.labelling.proposals import Reading
    from tlpipe.params import Section

_PATHS = ("manifest", "pixels", "duplicates", "rejects", "data_report", "split", "activations")
_OF_ANSWERS = ("label_issues", "model", "held_out", "predictions")


def add(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(label)


def label(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Unlabelled images, to label the most useful ones next. (default: "
            "ingest.unlabelled)"
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="To begin without a project: the classes of the folder."
        ),
    ] = None,
    every: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="After so many labels, what is most useful is computed anew."
        ),
    ] = 10,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 0,
    params: ParamsFile = None,
) -> None:
    """Correct labels and label new images, with keys, on a page in the browser of this machine."""
    if classes is not None:
        _label_folder(folder, classes, every, port, params)
        return
    from tlpipe import versioning
    from tlpipe.data import ingest
    from tlpipe.labelling import label
    from tlpipe.labelling.table import Table

    given = None if folder is None else Path(folder).absolute()
    project = enter(params)
    for stage in ("ingest", "embed"):
        project.check_code(stage)
    found = sections(project)
    section = cast(ingest.Params, found["ingest"])
    address = _unlabelled(section, given)
    path = Path(section.decisions or NAME)
    reading = None
    if address is not None:
        reading = _reading(address, Path("artifacts", "label"), found)
    made = label.run(
        paths={name: Path(graph.PATHS[name]) for name in (*_PATHS, *_OF_ANSWERS)},
        params=section,
        table=Table(path, versioning.user()),
        unlabelled=reading,
        every=every,
        port=port,
        title=project.folder.name,
    )
    _say(made, path)
    wanted = {"decisions": str(path), **({"unlabelled": address} if made["added"] else {})}
    missing = {key: value for key, value in wanted.items() if getattr(section, key) != value}
    if made and missing:
        keys = ", ".join(f"ingest.{key}: {value}" for key, value in missing.items())
        print(f"to apply them: {keys}, in params.yaml; commit {path}; then tlpipe run")
    elif made:
        print(f"next: commit {path}; tlpipe run")


def _label_folder(
    folder: str | None, classes: str, every: int, port: int, params: Path | None
) -> None:
    """Label a folder that belongs to no project yet."""
    from tlpipe import versioning
    from tlpipe.backbones import embed, sampling
    from tlpipe.data import ingest
    from tlpipe.labelling import label
    from tlpipe.labelling.table import Table
    from tlpipe.project import Project

    named = label.check_classes(classes)
    if folder is None:
        raise ParamsError(
            "--classes names the classes of a folder that belongs to no project, and no folder was "
            "named; expected 'tlpipe label FOLDER --classes A,B'."
        )
    if params is not None or Project.near().exists():
        raise ParamsError(
            f"--classes is {classes!r}, and a project has the classes of its source. Take it out, "
            f"or run it outside of a project."
        )
    if not Path(folder).is_dir():
        raise ParamsError(f"{folder} is no folder; expected one of images to label.")
    network = embed.Params()
    section = sampling.resolve(ingest.Params(source=folder), network.backbone)
    place = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()[:16]
    kept = files.cache_folder("tlpipe") / "label" / place
    table = Path(folder, NAME)
    with files.writing_cache(kept):
        kept.mkdir(parents=True, exist_ok=True)
    made = label.run_unlabelled(
        unlabelled=_reading(folder, kept, {"ingest": section, "embed": network}),
        classes=named,
        table=Table(table, versioning.user()),
        every=every,
        port=port,
    )
    _say(made, table)
    if made["added"]:
        print(f"next: tlpipe init NAME --source {folder}, which reads {table}")


def _unlabelled(section: "ingest.Params", given: Path | None) -> str | None:
    """Return the folder of unlabelled images as params.yaml names it, or is to name it.

    Raises:
        ParamsError: there is none of that name, or the project has another one.
    """
    stated = section.unlabelled
    if given is None:
        return stated
    if not given.is_dir():
        raise ParamsError(f"{given} is no folder; expected one of images to label.")
    if stated is not None and Path(stated).resolve() != given.resolve():
        raise ParamsError(
            f"{given} is not ingest.unlabelled, which is {stated}; a project has one folder of "
            f"unlabelled images. Add the images there, or change ingest.unlabelled in params.yaml."
        )
    here = Path.cwd()
    inside = given.relative_to(here).as_posix() if given.is_relative_to(here) else str(given)
    return stated or inside


def _reading(address: str, kept: Path, found: "dict[str, Section]") -> "Reading":
    from tlpipe.backbones import embed
    from tlpipe.data import ingest
    from tlpipe.labelling.proposals import Reading

    frozen = with_registered_weights(cast(embed.Params, found["embed"]))
    return Reading(address, kept, cast(ingest.Params, found["ingest"]), frozen)


def _say(made: "Counter[str]", path: Path) -> None:
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(made.items()))
    print(f"{path}: {said or 'nothing decided'}")
