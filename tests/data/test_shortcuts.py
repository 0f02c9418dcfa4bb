"""Classes that the files tell apart: found on spoiled sets, and not on real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import matthews_corrcoef

from tests.conftest import Workspace
from tlpipe import files
from tlpipe.data import shortcuts
from tlpipe.data.manifest import Entry, load_manifest, save_manifest
from tlpipe.graph import PATHS


def entry(number: int, label: str, **changed: Any) -> Entry:
    """Return an image of a camera whose files are all alike, but for what is changed."""
    like = Entry(
        path=f"{number}.jpg",
        label=label,
        sha256=f"{number:064x}",
        box="",
        file_bytes=int(np.random.default_rng(number).integers(20_000, 25_000)),
        width=640,
        height=480,
        mode="RGB",
        format="JPEG",
        group=f"{number:064x}",
        split="",
        data_version="",
    )
    return like._replace(**changed)


def alike(images: int = 90) -> list[Entry]:
    """Return three classes that nothing but the picture tells."""
    return [entry(number, "abc"[number % 3]) for number in range(images)]


@pytest.mark.fault("L08")
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("bytes", {"file_bytes": 90_000}),
        ("width", {"width": 800}),
        ("height", {"height": 512}),
        ("format", {"format": "PNG"}),
        ("format", {"mode": "L"}),
    ],
)
def test_a_class_that_one_property_tells_is_named(name: str, changed: dict[str, Any]) -> None:
    entries = [one._replace(**changed) if one.label == "b" else one for one in alike()]
    (told,) = shortcuts.find(entries)
    assert (told["label"], told["property"], told["images"]) == ("b", name, 30)
    assert told["right"] == 30
    assert told["wrong"] <= 1  # the largest file of the others has the others for neighbours
    assert f"the files alone tell b by its {name} (30 of 30 images" in shortcuts.warning([told])


def test_bytes_of_files_of_many_sizes_are_compared_by_the_pixel() -> None:
    rng = np.random.default_rng(0)
    entries = []
    for one in alike(300):
        width = int(rng.integers(100, 2000))
        rate = rng.uniform(0.1, 0.2) if one.label == "c" else rng.uniform(0.3, 0.6)
        size: dict[str, Any] = {"width": width, "height": width, "file_bytes": int(rate * width**2)}
        entries.append(one._replace(**size))
    (told,) = shortcuts.find(entries)
    assert (told["label"], told["property"]) == ("c", "bytes per pixel")


def test_the_correlation_is_that_of_an_independent_computation() -> None:
    rng = np.random.default_rng(1)
    entries = alike(600)
    is_large = np.array([(one.label == "a") ^ (rng.random() < 0.05) for one in entries])
    entries = [
        one._replace(width=800 if large else 640)
        for one, large in zip(entries, is_large, strict=True)
    ]
    (told,) = shortcuts.find(entries)
    actual = [one.label == "a" for one in entries]
    # Of two values, the large one is given "a" in each fold, and the small one never.
    assert told["correlation"] == pytest.approx(matthews_corrcoef(actual, is_large), abs=1e-4)
    assert told["right"] == int((is_large & np.array(actual)).sum())


def test_no_class_is_told_where_nothing_does() -> None:
    assert shortcuts.find(alike()) == []
    assert shortcuts.find([entry(1, "a"), entry(2, "b")]) == []
    assert shortcuts.find([]) == []
    assert "no class is told" in shortcuts.describe([])


def test_a_rare_class_is_told_though_the_others_have_thousands() -> None:
    entries = [entry(number, "ab"[number % 2]) for number in range(4000)]
    entries += [entry(4000 + number, "rare", width=1024) for number in range(8)]
    (told,) = shortcuts.find(entries)
    assert (told["label"], told["right"], told["wrong"]) == ("rare", 8, 0)


@pytest.mark.parametrize("name", ["rsscn", "trash", "sign-digits", "hymenoptera/train"])
def test_real_sets_tell_no_class(name: str, shared_data: Callable[[str], Path]) -> None:
    entries = []
    for number, path in enumerate(sorted(shared_data(name).glob("*/*"))):
        with Image.open(path) as image:
            entries.append(
                entry(
                    number,
                    path.parent.name,
                    file_bytes=path.stat().st_size,
                    width=image.width,
                    height=image.height,
                    mode=image.mode,
                    format=image.format,
                )
            )
    assert shortcuts.find(entries) == []


@pytest.mark.fault("L08")
def test_audit_warns_and_writes_the_table(main_job: Workspace, empty: Workspace) -> None:
    empty.take(main_job, "pixels", "split", "activations", "data_report")
    entries = [
        one._replace(width=99) if one.label == "7" else one
        for one in load_manifest(main_job.path / PATHS["manifest"])
    ]
    save_manifest(empty.path / PATHS["manifest"], entries)
    said = empty.call("audit").stderr
    assert "the files alone tell 7 by its width (100 of 100 images, 0 of others)" in said
    (told,) = files.read_json(empty.path / PATHS["shortcuts"])["told"]
    assert (told["label"], told["correlation"]) == ("7", 1)
    assert files.read_json(main_job.path / PATHS["shortcuts"])["told"] == []
