"""Command ``sweep``: plan the cells, let the flow do them, say what came out."""

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tlpipe import graph, params
from tlpipe.cells import LOGS
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.params import Section
from tlpipe.project import models
from tlpipe.registry import sweeps
from tlpipe.runtime import usable_cores
from tlpipe.sweep import cell as work
from tlpipe.sweep import experiments, grid, report, state
from tlpipe.sweep import search as searches
from tlpipe.sweep.grid import Asked, Cell
from tlpipe.sweep.search import Range
from tlpipe.sweep.state import Pin

STAGES = state.STAGES
_START_S = 60.0  # of Ray and its workers, which import torch
_UNITS = {"h": 3600, "m": 60, "s": 1}
PACKAGES = ("ray", "prefect_ray", "optuna")


def check_installed() -> None:
    """Check that the packages of the extra are here.

    Raises:
        ParamsError: one is missing.
    """
    from importlib.util import find_spec

    if missing := [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]:
        raise ParamsError(
            f"a sweep needs {', '.join(missing)}, not installed here; expected the extra 'sweep'. "
            f"Install it: pip install 'tlpipe[sweep]'."
        )


def read_budget(text: str) -> float:
    """Return the seconds of a budget such as '30m' or '1h30m'.

    Raises:
        ParamsError: it has another form.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds:
        raise ParamsError(f"--budget is {text!r}; expected a time such as 90s, 30m or 1h30m.")
    return seconds


def is_address(text: str) -> bool:
    """Return whether a text is an address of Ray."""
    return re.fullmatch(r"(ray://)?[\w.\-]+:\d+|(ray://)?\[[\w:]+\]:\d+", text) is not None


def cells(asked: Asked, ranges: Sequence[Range]) -> list[Cell]:
    """Return the cells of the project in the current folder; of a search, one that it starts from.

    Raises:
        ParamsError: a value is wrong.
    """
    content = params.read_yaml(Path(graph.PARAMS))
    known = models()
    for name in known:  # the project's own parameters first, whatever the sweep sets
        params.validate(Path(graph.PARAMS), known[name], content.get(name) or {}, prefix=name)
    found = grid.cells(asked, content, known)
    if not ranges:
        return found
    is_tuned = "fit_on" not in found[0].content["train"]
    if is_tuned and "metric" not in found[0].content["train"]:
        # Trials go by the loss, so the epoch that is kept does.
        settings = {**asked.settings, "train.metric": ("loss",)}
        found = grid.cells(replace(asked, settings=settings), content, known)
    if len(found) != 1:
        raise ParamsError(
            f"--search goes over one setting of all else, and {len(found)} were given; expected "
            f"one value each in --freeze, --images, --backbones and --set, and --seeds 1."
        )
    if twice := {each.key for each in ranges} & found[0].values.keys():
        raise ParamsError(f"{sorted(twice)[0]} is in --set and in --search; expected one of them.")
    for each in ranges:
        for end in each.choices or (each.low, each.high):
            one = grid.cell({**found[0].values, each.key: end}, content, known, seed=0)
            if each.key not in one.values:
                raise ParamsError(
                    f"--search {each.key} has no effect at --freeze "
                    f"{found[0].values['embed.freeze']}. Take it out, or open more."
                )
    return found


def plan(
    found: Sequence[Cell],
    ranges: Sequence[Range],
    trials: int,
    name: str,
    pin: Pin,
    *,
    deadline: float | None,
    address: str | None,
    budget: float = 0.0,
) -> dict[str, Any]:
    """Write the plan, and let MLflow have the run of the sweep; return the plan.

    The images are read and split. ``name``: of MLflow's experiment; ``deadline``: in seconds since
    1970, after which nothing is to be at work; ``budget``: its seconds in all; ``address``: of a
    running Ray.

    Raises:
        ParamsError: more images are asked for than there are, or there is no commit.
    """
    content, known = params.read_yaml(Path(graph.PARAMS)), models()
    seen = state.seen(Path())
    labels = _labels(content, known)
    available, classes = len(labels), len({*labels})
    found = grid.with_all(found, available, content, known)
    for cell in found:
        if cell.images is not None and not classes <= cell.images <= available:
            raise ParamsError(
                f"--images has {cell.images}; the training split has {available} images of "
                f"{classes} classes, each of which needs one. Give numbers between, or all."
            )
        batch = (cell.content["train"] or {}).get("batch_size")
        if batch is not None and batch > (cell.images or available):
            raise ParamsError(
                f"train.batch_size is {batch}, and --images has {cell.images or available}; "
                f"expected no step larger than all training images. Lower train.batch_size."
            )
    baseline, tree = experiments.baseline(Path())
    planned = [state.entry(cell, Path(), known, pin) for cell in found]
    threads, search = max(cell.threads for cell in planned), None
    if ranges:
        search = {
            "ranges": [asdict(each) for each in ranges],
            "trials": trials,
            "values": dict(found[0].values),
            "content": content,
            "weights_sha256": planned[0].weights_sha256,
        }
        digest = state.digest({"ranges": search["ranges"]}, {"cell": planned[0].id})
    else:
        digest = state.digest({"cells": sorted(cell.id for cell in planned)})
    work.forget(Path(), planned)
    made: dict[str, Any] = {
        "id": digest,
        "baseline": baseline,
        "tree": tree,
        "train_images": available,
        "threads": threads,
        "cores": max(threads, usable_cores()),
        "seen": seen,
        "deadline": deadline,
        "budget": budget,
        # Seconds of a budget that are left for cells; some go by until Ray has started.
        "room": None if deadline is None else deadline - time.time() - _START_S,
        "address": address,
        "cells": [] if ranges else [asdict(cell) for cell in planned],
        "search": search,
    }
    done = searches.cells(made) if ranges else planned
    experiments.renew(Path(), done, baseline, tree)
    if ranges:
        made["todo"] = searches.todo(made)
    else:
        todo = [n for n, cell in enumerate(planned) if state.measured(Path(), cell.id) is None]
        # Those that a budget has stopped come last.
        made["todo"] = sorted(
            todo, key=lambda n: state.expected_of_stopped(Path(), planned[n].id) > 0
        )
    words = {"cells": str(trials if ranges else len(planned)), "commit": baseline}
    words |= {each.key: _range(each) for each in ranges}
    made["run"] = sweeps.begin(Path(), name, digest, words)
    state.save_plan(Path(), made)
    return made


def _labels(content: Mapping[str, Any], known: Mapping[str, type[Section]]) -> list[str]:
    """Return the labels of all images that can train, whatever split.images says."""
    section = dict(content.get("split") or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(graph.PATHS["split"])
        if section.pop("images", None) is not None:
            section.pop("images_seed", None)
            checked = params.validate(Path(graph.PARAMS), known["split"], section, prefix="split")
            path = work.split_in(Path(folder), Path(graph.PATHS["manifest"]), checked)["split"]
        table = load_split(path)
    return [table[row].label for row in rows_of(table, "train")]


def describe(made: Mapping[str, Any]) -> str:
    """Return how much there is to do, in words."""
    todo = len(made["todo"])
    if made["search"] is not None:
        left = max(todo - 1, 0)
        return f"{made['search']['trials']} trials, {left} of them to do, then the best on test"
    return f"{len(made['cells'])} cells, {todo} of them to do"


def _range(found: Range) -> str:
    if found.choices:
        return ", ".join(map(str, found.choices))
    return f"{found.low} to {found.high}"


def finish(made: Mapping[str, Any]) -> report.Found:
    """Write the table and the picture, complete MLflow's runs; return what was found.

    Raises:
        ArtifactError: nothing came to an end yet.
    """
    work.clear(Path())
    found = report.collect(Path(), made)
    if not found.done:
        sweeps.end(Path(), made["run"], (), is_whole=False)
        raise ArtifactError(
            f"nothing of the sweep came to an end; what was said lies in {LOGS}. Give the same "
            f"command again, with more --budget if it had one."
        )
    report.save(Path(), found)
    sweeps.record(Path(), made["run"], map(work.of_mlflow, found.records))
    sweeps.end(Path(), made["run"], (report.TABLE, report.PICTURE), is_whole=not found.left)
    return found
