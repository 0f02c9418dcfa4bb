"""One command a stage: it checks which code is installed, and calls the stage's ``run``.

Before stand what most commands begin with: their options, the project, its parameters.
"""

import importlib
import inspect
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tlpipe import files, graph
from tlpipe.cli.tables import printable
from tlpipe.explanation import BUNDLE, FOLDER
from tlpipe.progress import duration
from tlpipe.registry import FORMS

if TYPE_CHECKING:
    from tlpipe.backbones.embed import Params as EmbedParams
    from tlpipe.evaluation.evaluate import Params as EvaluateParams
    from tlpipe.params import Section
    from tlpipe.project import Project


ParamsFile = Annotated[
    Path | None,
    typer.Option(
        "--params", help="The params.yaml of a project. (default: that of the current folder's)"
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MODEL = f"{FORMS}."
_log = logging.getLogger("tlpipe")
_PANEL = "Stages of the graph ('tlpipe run' and 'dvc repro' run them)"


def enter(params: Path | None) -> "Project":
    """Go to the folder of a project: paths in its parameters count from there.

    Raises:
        ParamsError: there is no project.
    """
    from tlpipe.project import Project

    project = Project.find(params)
    os.chdir(project.folder)
    return project


def sections(project: "Project") -> "dict[str, Section]":
    """Read every section, also those of other stages: an error is found before any work.

    What is auto because another section decides it has its value in what is returned.

    Raises:
        ParamsError: a section, or two of them together, cannot be.
    """
    from tlpipe.backbones import embed, sampling
    from tlpipe.data import ingest
    from tlpipe.training import train

    found = project.sections()
    found["embed"] = frozen = embed.with_threads(cast(embed.Params, found["embed"]))
    open_stages = embed.check_freeze(frozen)
    if open_stages is not None:
        train.check_effects(cast(train.Params, found["train"]), frozen.freeze, open_stages)
    found["ingest"] = sampling.resolve(cast(ingest.Params, found["ingest"]), frozen.backbone)
    return found


def model_name(project: "Project") -> str:
    """Return the name that the project registers its models under."""
    from tlpipe.registry import register

    return cast(register.Params, project.sections()["register"]).name


def add(app: typer.Typer) -> None:
    """Add a command for each stage."""
    for name, stage in graph.STAGES.items():
        app.command(name, help=stage.does, rich_help_panel=_PANEL)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def command(params: ParamsFile = None) -> None:
        project = enter(params)
        project.check_code(name)
        project.check_watched(name)
        start = time.monotonic()
        found = sections(project)
        with ExitStack() as stack:
            more = _MORE[name](found, stack) if name in _MORE else {}
            run(name, **({"params": found[name]} | more))
        _log.info("%s took %s", name, duration(time.monotonic() - start))

    return command


def run(name: str, **given: Any) -> None:
    """Call a stage's ``run`` in the current folder, a project's.

    ``given``: its arguments that are no paths. Paths are those of ``graph.PATHS``, by their names;
    so are the fields of a data class of paths.
    """
    called = function(name)
    paths: dict[str, Any] = {}
    for argument, declared in inspect.signature(called, eval_str=True).parameters.items():
        kind = declared.annotation
        if kind in (Path, Path | None) and argument in graph.PATHS:
            paths[argument] = Path(graph.PATHS[argument])
        elif is_dataclass(kind) and all(field.name in graph.PATHS for field in fields(kind)):
            known = {field.name: Path(graph.PATHS[field.name]) for field in fields(kind)}
            paths[argument] = kind(**known)  # type: ignore[operator]
    called(**paths, **given)


def function(name: str) -> Callable[..., None]:
    """Return a stage's ``run``."""
    return cast(Callable[..., None], importlib.import_module(graph.STAGES[name].module).run)


def _ingest(found: "dict[str, Section]", _: ExitStack) -> dict[str, Any]:
    from tlpipe import versioning
    from tlpipe.data import ingest
    from tlpipe.sources import listing

    section = cast(ingest.Params, found["ingest"])
    if versioning.dvc_root(Path()) is not None:
        for key, address in ingest.addresses(section).items():
            listing.check_written_out(address, key)
    for path in versioning.readable_but_hidden(Path()):
        _log.warning(
            "%s can be read now, but .dvcignore hides it: DVC does not see it change. Run 'tlpipe "
            "check --hide'",
            path,
        )
    return {"data_version": versioning.data_version(Path())}


def _embed(found: "dict[str, Section]", _: ExitStack) -> dict[str, Any]:
    from tlpipe.backbones import embed

    return {"params": with_registered_weights(cast(embed.Params, found["embed"]))}


def _train(found: "dict[str, Section]", stack: ExitStack) -> dict[str, Any]:
    from tlpipe.registry import register, tracking

    name = cast(register.Params, found["register"]).name
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun numbers the processes it starts
    if is_first:
        _say_what_changed(name)
    is_live = is_first and "MLFLOW_TRACKING_URI" in os.environ
    live = stack.enter_context(tracking.live_run(Path(), name)) if is_live else None
    return {"is_first": is_first, "live": live}


def _export(*_: object) -> dict[str, Any]:
    return {"workspace": Path()}


def _evaluate(found: "dict[str, Section]", stack: ExitStack) -> dict[str, Any]:
    stack.callback(_remove_old_galleries)
    return {"params": with_ood_that_fits(found)}


def _register(found: "dict[str, Section]", stack: ExitStack) -> dict[str, Any]:
    stack.callback(_remove_old_galleries)  # DVC may have taken all before from its run cache
    return {"workspace": Path(), "source": found["ingest"]}


def _remove_old_galleries() -> None:
    """Remove the galleries of ``explain`` that are of another bundle than the report.

    'dvc plots show' would draw them beside its plots.
    """
    folder, report = Path(FOLDER), Path(graph.PATHS["report"])
    plots, of = folder / "plots", folder / BUNDLE
    if not (plots.is_dir() and report.exists()):
        return
    known = files.read_json(of).get("bundle") if of.exists() else None
    if known != files.read_json(report)["bundle"]:
        shutil.rmtree(plots)
        _log.warning("removed %s, which was of another model; 'tlpipe explain' draws anew", plots)


_MORE: dict[str, Callable[["dict[str, Section]", ExitStack], dict[str, Any]]] = {
    "ingest": _ingest,
    "embed": _embed,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
    "register": _register,
}


def with_ood_that_fits(sections: "dict[str, Section]") -> "EvaluateParams":
    """Return the parameters of ``evaluate`` for the source that ``ingest`` reads."""
    from tlpipe.data import ingest
    from tlpipe.evaluation import evaluate

    source = cast(ingest.Params, sections["ingest"]).source
    return evaluate.with_ood_that_fits(cast(evaluate.Params, sections["evaluate"]), source)


def with_registered_weights(section: "EmbedParams") -> "EmbedParams":
    """Fetch the weights of a registered model, if they are of one, and pin which was found."""
    from tlpipe.backbones import weights
    from tlpipe.errors import ParamsError, WeightsError
    from tlpipe.registry import registered, tracking
    from tlpipe.training import model as models

    if not section.weights.startswith(weights.REGISTERED):
        return section
    try:
        model = registered(section.weights)
    except ParamsError as error:
        raise ParamsError(f"embed.weights: {error}") from None
    folder, split, version = tracking.fetch_model(Path(), model)
    sha256 = models.keep_weights(folder, section.backbone, split)
    if split is None:
        _log.warning(
            "the run of %s has no %s, which says what images it was trained on: whether those of "
            "the test split here are among them cannot be told",
            *(model, tracking.SPLIT),
        )
    if section.weights_sha256 not in (None, sha256):
        raise WeightsError(
            f"{section.weights} has the sha256 {sha256}; embed.weights_sha256 is "
            f"{section.weights_sha256}. The alias has moved: change one of them in params.yaml."
        )
    named = f"{weights.REGISTERED}{model.name}@{version}"
    if section.weights_sha256 is None and model.which != version:
        _log.warning(
            "embed.weights is %s, which is version %s now, and may be another one in the next run: "
            "set embed.weights_sha256 to %s",
            *(section.weights, version, sha256),
        )
    return section.model_copy(update={"weights": named, "weights_sha256": sha256})


def _say_what_changed(name: str) -> None:
    """Say which classes were taken away or added since the model in production was trained."""
    from tlpipe.data.manifest import load_split
    from tlpipe.registry import gate, moves, tracking

    if (known := tracking.champion_labels(Path(), name)) is None:
        return
    labels = {row.label for row in load_split(Path(graph.PATHS["split"])) if row.split == "train"}
    if what := printable(gate.label_changes(known, labels)):
        _log.warning("the classes differ from those of %s@%s: %s", name, moves.CHAMPION, what)
