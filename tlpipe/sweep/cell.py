"""One cell of a sweep: split, embed, train and measure; then its experiment, record and run."""

import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tlpipe import cells, files, graph
from tlpipe.backbones import activations as stored
from tlpipe.backbones import embed
from tlpipe.cells import FOLDER
from tlpipe.data import ingest, split
from tlpipe.errors import ArtifactError, DataError, TlpipeError
from tlpipe.params import Section
from tlpipe.progress import duration
from tlpipe.project import models
from tlpipe.registry import sweeps
from tlpipe.resampling import share_interval
from tlpipe.sweep import experiments, measure, state
from tlpipe.sweep.state import Entry
from tlpipe.training import model as trained_models
from tlpipe.training import train
from tlpipe.training.model import Dataset, Model, Step

_log = logging.getLogger(__name__)
CONFIDENCE = 0.95
MEASURED = "trained weights in float32, on stored activations"
_WORK, _FROZEN, _INGESTED = FOLDER / "work", FOLDER / "frozen", FOLDER / "ingested"
_OF_INGEST = ("manifest", "rejects", "duplicates", "pixels", "data_report")
_OF_SPLIT = ("split", "split_report", "placements")
_OF_TRAIN = ("model", "history", "train_metrics")
_TURN = ".waiting"  # of processes that want what one of them makes

Live = Callable[[Sequence[Step]], None]


def run(root: Path, number: int, deadline: float | None) -> tuple[str, str]:
    """Do a cell of the plan that lies in the project; return how it ended, and a line about it."""
    os.chdir(root)
    plan = cells.plan(Path())
    with _logged(Path(), cells.title(plan, number)):
        try:
            state.check_unchanged(Path(), plan)
            if plan["search"] is not None:
                from tlpipe.sweep import search

                return search.run(plan, number, deadline)
            return _run(plan, state.entries(plan)[number], deadline)
        except TlpipeError as error:
            return "Failed", " ".join(str(error).split())


def _run(plan: Mapping[str, Any], cell: Entry, deadline: float | None) -> tuple[str, str]:
    known = state.measured(Path(), cell.id)
    if known is None and (needed := too_long(expected(plan, cell), deadline)):
        return "Left", needed
    record = known or compute(plan, cell)
    sweeps.record(Path(), plan["run"], [of_mlflow(record)])
    accuracy = record["test"]
    said = (
        f"test accuracy {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})"
    )
    return ("Completed" if known is None else "Cached"), said


def too_long(seconds: float, deadline: float | None) -> str:
    """Say how long work is expected to take, if it would not end in time; else nothing."""
    if deadline is None or time.time() + seconds <= deadline:
        return ""
    return f"it would take some {duration(seconds)}" if seconds else "the time was up"


def expected(plan: Mapping[str, Any], cell: Entry) -> float:
    """Return the seconds that a cell will take, as far as those of its level tell; 0: nothing does.

    More images take longer, in proportion at most. What is done once for a level does not count.
    """
    whole = plan["train_images"]
    same, most = [], []
    for other in state.entries(plan):
        record = state.load(Path(), other.id) if other.level == cell.level else None
        if record is not None and other.images == cell.images:
            same.append(record["seconds"])
        elif record is not None:
            more = (cell.images or whole) / (other.images or whole)
            most.append(record["seconds"] * max(more, 1.0))
    known = sum(same) / len(same) if same else min(most, default=0.0)
    return max(float(known), state.expected_of_stopped(Path(), cell.id))


def compute(plan: Mapping[str, Any], cell: Entry, live: Live | None = None) -> dict[str, Any]:
    """Train and measure a cell; leave its experiment and its record, which is returned.

    ``live``: is given the epochs so far; without it, the test images are measured, too.

    Raises:
        ArtifactError: the data are not those that the cell is named by.
        TlpipeError: a stage fails.
    """
    work = _WORK / cell.id
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.monotonic()
    try:
        found = cell.sections(models())
        places = {name: work / Path(graph.PATHS[name]).name for name in (*_OF_SPLIT, *_OF_TRAIN)}
        places |= _ingested(plan, cell, found) | _frozen(plan, cell, found)
        importlib.import_module("dvc.repo")  # once for each worker, as what imports torch
        if "fit_on" not in cell.content["train"]:
            importlib.import_module("tlpipe.training.tuning")
        once, began = time.monotonic() - began, time.monotonic()
        record = _trained(cell, found, places, live)
        state.check_unchanged(Path(), plan)
        record |= experiments.save(Path(), cell, places, plan["baseline"], plan["tree"])
        record |= {"seconds": time.monotonic() - began, "seconds_once": once}
        state.check_unchanged(Path(), plan)
        files.write_json(state.record(Path(), cell.id), record)
        return record
    except BaseException:
        if plan["deadline"] is not None and time.time() >= plan["deadline"]:
            cells.note_stopped(Path(), cell.id, time.monotonic() - began)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clear(root: Path) -> None:
    """Take away what killed processes have left half-done."""
    shutil.rmtree(root / _WORK, ignore_errors=True)


def forget(root: Path, planned: Sequence[Entry]) -> None:
    """Take away activations of other data or other code than those of planned cells."""
    sources = {cell.frozen.partition("-")[0] for cell in planned}
    for folder in (root / _FROZEN).glob("*"):
        if folder.name.partition("-")[0] not in sources:
            shutil.rmtree(folder, ignore_errors=True)


def _trained(
    cell: Entry, found: Mapping[str, Section], places: Mapping[str, Path], live: Live | None
) -> dict[str, Any]:
    """Split, train and measure; return what the record says of it."""
    seen = {name: places.get(name, Path(graph.PATHS[name])) for name in ("manifest", "pixels")}
    split_in(places["split"].parent, seen["manifest"], found["split"])
    train.run(
        activations=places["activations"],
        pixels=seen["pixels"],
        split=places["split"],
        model=places["model"],
        history=places["history"],
        train_metrics=places["train_metrics"],
        params=cast(train.Params, found["train"]),
        live=live,
    )
    record: dict[str, Any] = {
        "id": cell.id,
        "name": cell.name,
        "level": cell.level,
        "option": cell.option,
        "seed": cell.seed,
        "values": dict(cell.values),
        "measured": MEASURED,
        "validation": files.read_json(places["train_metrics"]),
    }
    if live is None:
        data = trained_models.load_dataset(places["activations"], places["split"])
        trained = trained_models.load(places["model"])
        validation, test = (
            tested(data, trained, places["split"], seen["pixels"], part)
            for part in ("validation", "test")
        )
        record |= {"validation_accuracy": validation["value"], "test": test}
    return record


def split_in(folder: Path, manifest: Path, section: Section) -> dict[str, Path]:
    """Split into files of a folder, where images stay as the project places them; return those."""
    places = {name: folder / Path(graph.PATHS[name]).name for name in _OF_SPLIT}
    if (known := Path(graph.PATHS["placements"])).exists():
        shutil.copyfile(known, places["placements"])
    split.run(manifest=manifest, **places, params=cast(split.Params, section))
    return places


def tested(data: Dataset, trained: Model, table: Path, pixels: Path, part: str) -> dict[str, Any]:
    """Return the accuracy on one split's images with its interval, and which are right."""
    examples = measure.examples_of(data, table, part)
    hits = measure.hits(data, trained, pixels, examples)
    groups = [data.groups[row] for row in examples.rows]
    return {
        **share_interval(hits, groups, CONFIDENCE),
        "images": len(hits),
        "hits": "".join("01"[hit] for hit in hits.tolist()),
        "groups": groups,
    }


def of_mlflow(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what MLflow's run of a cell holds."""
    test, validation = record.get("test"), record["validation"]
    metrics = {f"train_{key}" if key == "images" else key: validation[key] for key in validation}
    if test is not None:
        # One measure for all: that of training counts by class where train.balance is set.
        metrics["validation_accuracy"] = record["validation_accuracy"]
        metrics |= {"test_accuracy": test["value"], "test_images": test["images"]}
        metrics |= {f"test_accuracy_{end}": test[end] for end in ("low", "high")}
    return {
        "id": record["id"],
        "name": record["name"],
        "params": {**record["values"], "seed": record["seed"], "measured": record["measured"]},
        "metrics": {key: float(value) for key, value in metrics.items() if value is not None},
        "tags": {
            "tlpipe.dvc_experiment": record["name"],
            "tlpipe.level": record["level"],
            "tlpipe.option": record["option"],
        },
        "status": "FINISHED",
    }


def _ingested(
    plan: Mapping[str, Any], cell: Entry, found: Mapping[str, Section]
) -> dict[str, Path]:
    """Return where images lie as another backbone wants them; nothing where it wants the same.

    Raises:
        DataError: the source has other images than the project has read.
    """
    if not cell.ingested:
        return {}
    folder = _INGESTED / cell.ingested
    places = {name: folder / Path(graph.PATHS[name]).name for name in _OF_INGEST}
    with files.in_turn(folder / _TURN):
        if not (folder / "done").exists():
            from tlpipe import versioning

            version = versioning.data_version(Path())
            own = Path(graph.PATHS["pixels"], "index.json")
            if version != files.read_json(own)["data_version"]:
                raise DataError(
                    "the source has other images than the project has read, which the sweep is "
                    "named by; expected the same. Give the same command again."
                )
            ingest.run(**places, params=cast(ingest.Params, found["ingest"]), data_version=version)
            state.check_unchanged(Path(), plan)
            files.write_bytes(folder / "done", b"")
    return places


def _frozen(plan: Mapping[str, Any], cell: Entry, found: Mapping[str, Section]) -> dict[str, Path]:
    """Return where the activations of a cell's boundary lie, which are computed once."""
    folder = _FROZEN / cell.frozen
    places = _ingested(plan, cell, found)
    activations = folder / Path(graph.PATHS["activations"]).name
    with files.in_turn(folder / _TURN):
        try:
            stored.load(activations)
        except ArtifactError:
            own = Path(graph.PATHS["activations"])
            if own.exists() and not cell.ingested:  # embed itself compares what they are of
                stored.keep(own, activations.with_name(embed.KEPT))
            embed.run(
                manifest=places.get("manifest", Path(graph.PATHS["manifest"])),
                pixels=places.get("pixels", Path(graph.PATHS["pixels"])),
                activations=activations,
                params=cast(embed.Params, found["embed"]),
            )
    return {"activations": activations}


@contextmanager
def _logged(root: Path, name: str) -> Iterator[None]:
    """Write what is said meanwhile into a file of the cell's, not between the lines of others."""
    path = root / cells.LOGS / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tlpipe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        handler.close()
