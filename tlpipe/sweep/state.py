"""What a sweep keeps in its project: the plan, and a record of each cell that is done.

A cell is named by a digest of all that determines its result: its parameters, the images and where
they are placed, the code of its stages and the versions of their packages. So a cell that is done
is found again by whatever sweep asks for it, and one of other code or other images is another one.
Files are written under temporary names: what a killed process left half-written does not count.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from tlpipe import cells, code_digest, files, graph, params
from tlpipe.backbones import embed
from tlpipe.cells import FOLDER, PLAN
from tlpipe.errors import ArtifactError
from tlpipe.params import Section
from tlpipe.project import code
from tlpipe.runtime import usable_cores
from tlpipe.sweep import grid
from tlpipe.sweep.grid import Cell

STAGES = ("ingest", "split", "embed", "train")  # what a cell is made by
_FORMAT = 2  # of records
_LONGER = 1.5  # than until it was stopped is what a cell is thought to take
_LONGEST_NAME = 80  # before the digits that make it unique
_MEASURED_BY = "tlpipe.sweep.measure"
# Without effect on what comes out.
_ASIDE = {"train": {"checkpoint_minutes"}, "embed": {"max_gib"}}

Pin = Callable[[embed.Params], embed.Params]


@dataclass(frozen=True)
class Entry:
    """A cell of a plan.

    Attributes:
        id: the digest that names it.
        frozen: a digest of what its activations are made from.
        ingested: a digest of what its pixels are made from; empty: they are the project's own.
        name: of its experiment.
        weights_sha256: of registered weights, as they were when the sweep began.
        threads: to compute with.
    """

    id: str
    frozen: str
    ingested: str
    name: str
    weights_sha256: str | None
    threads: int
    level: str
    option: str
    images: int | None
    seed: int
    values: Mapping[str, Any]
    content: Mapping[str, Any]

    def sections(self, models: Mapping[str, type[Section]]) -> dict[str, Section]:
        """Return the parameters that its stages run with."""
        found = grid.resolved(self.content, models)
        update = {"threads": self.threads, "weights_sha256": self.weights_sha256}
        found["embed"] = found["embed"].model_copy(update=update)
        return found


def entry(cell: Cell, root: Path, models: Mapping[str, type[Section]], pin: Pin) -> Entry:
    """Name a cell of a project whose images are read and split.

    ``pin``: gives the parameters of embed the hash of weights that are registered.
    """
    found = grid.resolved(cell.content, models)
    frozen = pin(cast(embed.Params, found["embed"]))
    threads = usable_cores() if frozen.threads == "auto" else frozen.threads
    found["embed"] = frozen.model_copy(update={"threads": threads})
    data = {name: _sha256(root / graph.PATHS[name]) for name in ("manifest", "placements")}
    weights = Path(frozen.weights)
    if weights.is_file():
        data["weights"] = files.sha256(weights)
    own = grid.resolved(_own_backbone(cell.content, root), models)["ingest"]
    is_own = own == found["ingest"]
    parts = {name: _part(name, found[name]) for name in STAGES}
    name = re.sub(r"[^A-Za-z0-9_]+", "-", f"{cell.level}-{cell.images or 'all'}-{cell.seed}")
    own_digest = digest(parts, data, code_digest.of_closure(_MEASURED_BY), _FORMAT)
    return Entry(
        id=own_digest,
        # What its folder is taken away by, when data or code are others.
        frozen=f"{_source(parts, data)}-"
        + digest({key: parts[key] for key in ("ingest", "embed")}, data),
        ingested="" if is_own else digest({"ingest": parts["ingest"]}, data),
        name=f"{name.strip('-')[:_LONGEST_NAME]}-{own_digest[:8]}",
        weights_sha256=frozen.weights_sha256,
        threads=threads,
        level=cell.level,
        option=cell.option,
        images=cell.images,
        seed=cell.seed,
        values=dict(cell.values),
        content=dict(cell.content),
    )


def _source(parts: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """Return 8 digits that name data and code, whatever the parameters of a cell are."""
    code_of = {key: parts[key]["code"] for key in ("ingest", "embed")}
    return digest(code_of, {key: data[key] for key in ("manifest", "placements")})[:8]


def _own_backbone(content: Mapping[str, Any], root: Path) -> Mapping[str, Any]:
    """Return parameters with the backbone that the project itself has."""
    own = params.read_yaml(root / graph.PARAMS).get("embed") or {}
    return {**content, "embed": own}


def seen(root: Path) -> dict[str, str]:
    """Return digests of what cells read of a project, and of what they state of its ``ingest``.

    All of it is to stay as it is while a sweep is at work.
    """
    content = params.read_yaml(root / graph.PARAMS)
    lock = root / "dvc.lock"
    known = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    paths = [Path(graph.PATHS[name]) for name in ("manifest", "placements")]
    paths.append(Path(graph.PATHS["pixels"], "index.json"))
    return {
        **{str(path): _sha256(root / path) for path in paths},
        graph.PARAMS: digest(content.get("ingest"), (content.get("embed") or {}).get("backbone")),
        lock.name: digest((known.get("stages") or {}).get("ingest")),
    }


def check_unchanged(root: Path, plan: Mapping[str, Any]) -> None:
    """Check that all that cells read is what it was when the plan named them.

    Raises:
        ArtifactError: it is not.
    """
    now = seen(root)
    if changed := [name for name, found in plan["seen"].items() if now[name] != found]:
        raise ArtifactError(
            f"{', '.join(changed)} changed while the sweep was at work; expected the images and "
            f"the split that its cells are named by. Give the same command again when what "
            f"changes them has ended."
        )


def _sha256(path: Path) -> str:
    return files.sha256(path) if path.exists() else ""


def _part(stage: str, section: Section) -> dict[str, Any]:
    known = section.model_dump(mode="json", exclude=_ASIDE.get(stage, set()))
    return {"params": known, "code": code(stage)}


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits that name what JSON holds."""
    return hashlib.sha256(b"".join(map(files.json_bytes, parts))).hexdigest()[:32]


def record(root: Path, cell: str) -> Path:
    """Return where the record of a cell lies."""
    return root / FOLDER / "cells" / f"{cell}.json"


def load(root: Path, cell: str) -> dict[str, Any] | None:
    """Return the record of a cell that is done, or None."""
    try:
        return files.read_json(record(root, cell))
    except ArtifactError:
        return None


def measured(root: Path, cell: str) -> dict[str, Any] | None:
    """Return the record of a cell that is done and was measured on test, as no trial is."""
    found = load(root, cell)
    return found if found is not None and "test" in found else None


def expected_of_stopped(root: Path, cell: str) -> float:
    """Return the seconds that a cell is thought to take which a budget stopped; 0: none did."""
    try:
        return _LONGER * float(files.read_json(cells.stopped(root, cell))["seconds"])
    except ArtifactError:
        return 0.0


def save_plan(root: Path, plan: Mapping[str, Any]) -> None:
    """Write what the flow reads."""
    files.write_json(root / PLAN, plan)


def entries(plan: Mapping[str, Any]) -> list[Entry]:
    """Return the cells of a plan."""
    return [Entry(**found) for found in plan["cells"]]
