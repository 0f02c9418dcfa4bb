"""Advice: the sample, the probes against scikit-learn, the conclusion, the command."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from PIL import Image

from tests.conftest import Workspace
from tests.training.conftest import beside
from tlpipe.backbones import activations
from tlpipe.backbones.activations import Activations, Origin
from tlpipe.backbones.backbone import Backbone, Stage
from tlpipe.data.images import Preprocessing
from tlpipe.data.manifest import load_split
from tlpipe.data.pixels import Chunks
from tlpipe.errors import ArtifactError, DataError, ParamsError
from tlpipe.training.advise import (
    Boundary,
    choose_sample,
    conclude,
    run,
    with_random_weights,
)
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.transferability import LearningCurve


def dataset(train: list[int], validation: list[int], groups: list[str] | None = None) -> Dataset:
    """Return a data set of labels alone, its rows in another order than its images."""
    count = len(train) + len(validation)
    rows = np.random.default_rng(0).permutation(count)
    stages = tuple(Stage(name=f"s{n}", shape=(4, 2, 2), parameters=1) for n in range(9))
    seen = Preprocessing(
        short_side_px=8, interpolation="bilinear", crop_px=8, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    backbone = Backbone(name="tiny", preprocessing=seen, stages=stages, pretrained=None)
    nothing = Activations(
        Chunks(Path(), (), (1,), "<f2"),
        None,
        np.zeros(0, np.uint64),
        Origin.model_construct(threads=1),
    )
    return Dataset(
        activations=nothing,
        backbone=backbone,
        labels=tuple(f"c{n}" for n in range(max([*train, *validation]) + 1)),
        train=Examples(rows[: len(train)], np.array(train)),
        validation=Examples(rows[len(train) :], np.array(validation)),
        groups=tuple(groups or [""] * count),
        split_sha256="",
        digest="",
    )


def alone(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_a_sample_takes_as_many_of_each_class_as_there_are() -> None:
    data = dataset([0] * 100 + [1] * 30 + [2] * 6, [0] * 20 + [1] * 5, alone(161))
    found = choose_sample(data, 60)
    # 6 of the small class, and 27 of both others.
    assert Counter(found.examples.labels.tolist()) == {0: 27, 1: 27, 2: 6}
    assert len(set(found.examples.rows)) == 60
    assert len(choose_sample(data, 1000).examples) == 161
    labels = dict(zip(data.labelled.rows, data.labelled.labels, strict=True))
    assert [labels[row] for row in found.examples.rows] == found.examples.labels.tolist()


def test_groups_stay_in_one_fold() -> None:
    data = dataset([0] * 40 + [1] * 40, [0] * 4 + [1] * 4, [f"g{n // 4}" for n in range(88)])
    found = choose_sample(data, 1000)
    folds = {(group, fold) for group, fold in zip(found.groups, found.folds, strict=True)}
    assert len(folds) == len(set(found.groups)) == 22


def test_fewer_images_than_one_of_each_class_in_each_fold_are_an_error() -> None:
    data = dataset([0, 1, 2] * 5, [0, 1, 2], alone(18))
    with pytest.raises(ParamsError, match=r"--images is 11; 3 classes need 12 at least.* Raise it"):
        choose_sample(data, 11)


@pytest.mark.parametrize("groups", [["a"] * 8 + ["b"] * 8, alone(16)])
def test_images_of_which_none_can_be_held_out_are_an_error(groups: list[str]) -> None:
    labels = [0] * 8 + [1] * 8 if groups[0] == "a" else [0] * 16
    data = dataset(labels[:-2], labels[-2:], groups)
    ordered = [""] * 16
    for row, group in zip(data.labelled.rows, groups, strict=True):
        ordered[row] = group
    with pytest.raises(DataError, match=r"nothing can be held out of 16 .* Add images"):
        choose_sample(replace(data, groups=tuple(ordered)), 1000)


def boundaries(*accuracies: float) -> list[Boundary]:
    spread = [
        {"value": a, "low": a - 0.03, "high": a + 0.03, "confidence": 0.9} for a in accuracies
    ]
    return [Boundary(f"s{n}", accuracy, 0.0) for n, accuracy in enumerate(spread)]


@pytest.mark.parametrize(
    ("images", "gain", "freeze", "place"),
    [
        (30, 0.3, "all", "small data, similar domain: freeze everything"),
        (30, 0.1, "all", "small data, different domain: collect more images"),
        (300, 0.3, "s6", "large data, similar domain: freeze less"),
        (300, 0.1, "s4", "large data, different domain: train everything"),
        (1500, 0.3, "s6", "large data, similar domain"),
        (1500, 0.1, "none", "large data, different domain"),
    ],
)
def test_what_is_frozen_goes_by_images_and_domain(
    images: int, gain: float, freeze: str, place: str
) -> None:
    data = dataset([0, 1] * images, [0, 1], alone(2 * images + 2))
    known = {"value": gain, "low": gain - 0.05, "high": gain + 0.05, "confidence": 0.9}
    found = conclude(data, 1000, boundaries(0.5, 0.9), boundaries(0.6)[0], known, None)
    assert found.freeze == freeze
    assert str(found.place).startswith(place)
    assert found.reasons[0].startswith(f"{2 * images + 2:,} training and validation images of 2")
    # 0.1 or 0.3 of the 0.4 that random weights miss
    assert f"takes away {gain / 0.4:.0%} of the errors" in found.reasons[1]
    assert found.reasons[-1] == "too few images a class for a learning curve: collect more"


def test_the_smallest_class_decides_whether_there_are_enough() -> None:
    known = {"value": 0.3, "low": 0.25, "high": 0.35, "confidence": 0.9}
    data = dataset([0] * 990 + [1] * 10, [0, 1], alone(1002))
    found = conclude(data, 1000, boundaries(0.5, 0.9), boundaries(0.6)[0], known, None)
    assert found.freeze == "all"
    assert "11 to 991 a class, fewer than 20 in one: too few to tune" in found.reasons[0]
    assert found.reasons[0].endswith("the largest one alone has 0.989")


def test_domains_that_cannot_be_told_apart_are_said_to_be() -> None:
    data = dataset([0, 1] * 50, [0, 1], alone(102))
    known = {"value": -0.1, "low": -0.2, "high": 0.0, "confidence": 0.9}
    found = conclude(data, 100, boundaries(0.5, 0.9), boundaries(1.0)[0], known, None)
    assert found.reasons[1].startswith("nobody can tell whether the domain is like")
    low = {**known, "value": 0.04, "low": 0.02, "high": 0.06}
    found = conclude(data, 100, boundaries(0.5, 0.64), boundaries(0.6)[0], low, None)
    assert found.reasons[1].endswith("Wrong labels look the same: see what audit found")


def test_advice_overwrites_nothing_but_advice(tmp_path: Path) -> None:
    notes, advice = tmp_path / "NOTES.md", tmp_path / "advice.json"
    notes.write_text("my notes")
    absent = {
        name: tmp_path / name
        for name in ("activations", "pixels", "split", "leaks_report", "folder")
    }
    with pytest.raises(ArtifactError, match=r"NOTES\.md is not what 'tlpipe advise' writes"):
        run(**absent, recommendation=notes, images=100)
    assert notes.read_text() == "my notes"
    activations.save_advice(
        advice, activations.Advice(freeze="all", backbone="b", weights_sha256="", data_sha256="")
    )
    with pytest.raises(ArtifactError, match=r"index\.json is missing"):
        run(**absent, recommendation=advice, images=100)


@pytest.mark.fault("M28")
def test_of_copies_nothing_is_promised() -> None:
    data = dataset([0, 1] * 50, [0, 1], alone(102))
    known = {"value": 0.2, "low": 0.1, "high": 0.3, "confidence": 0.9}
    copies = "40 of 40 validation images looked at are copies"
    found = conclude(data, 100, boundaries(0.8), boundaries(0.6)[0], known, None, copies)
    assert found.reasons[-1].startswith("cannot tell whether more images would help, and all")
    assert copies in found.reasons[-1]


def test_a_stage_that_is_better_than_the_last_one_is_named() -> None:
    data = dataset([0, 1] * 50, [0, 1], alone(102))
    known = {"value": 0.2, "low": 0.1, "high": 0.3, "confidence": 0.9}
    random = boundaries(0.6)[0]
    said = conclude(data, 100, boundaries(0.5, 0.88, 0.8), random, known, None).reasons
    assert any(reason.startswith("features of s1 separate the classes better") for reason in said)
    said = conclude(data, 100, boundaries(0.5, 0.82, 0.8), random, known, None).reasons
    assert len(said) == 3


def test_a_curve_of_a_few_of_many_images_says_nothing_of_all() -> None:
    data = dataset([0, 1] * 400, [0, 1], alone(802))
    known = {"value": 0.2, "low": 0.1, "high": 0.3, "confidence": 0.9}
    law = np.array([0.9, 0.5, 0.0])
    errors = 0.9 * np.array([10.0, 20, 40]) ** -0.5
    curve = LearningCurve(np.array([10.0, 20, 40]), errors, law, np.tile(law, (50, 1)))
    said = conclude(data, 100, boundaries(0.8), boundaries(0.6)[0], known, curve).reasons[-1]
    assert said.startswith("cannot tell whether more images would help: 401 a class is far beyond")
    few = dataset([0, 1] * 39, [0, 1], alone(80))
    said = conclude(few, 80, boundaries(0.8), boundaries(0.6)[0], known, curve).reasons[-1]
    # 0.9 n^-0.5 = 0.9 * 40^-0.5 - 0.02 at n = 54.2; at 80 it is 4.2 points less.
    assert said == (
        "about 14 more images a class for +2 points (14 to 14); twice as many images would bring "
        "4.2 points (4.2 to 4.2)"
    )


@pytest.mark.slow
def test_the_command_writes_a_picture_and_numbers_of_images_that_may_be_seen(
    prepared: Workspace, tmp_path: Path
) -> None:
    workspace = beside(prepared, tmp_path / "copy")
    said = workspace.call("advise", "--images", "20").stdout
    assert "recommended: embed.freeze: all" in said
    assert "in the lectures' table: small data" in said
    *_, seen, follow = said.splitlines()
    assert seen == "see artifacts/advise/advice.png; advice.json holds what is recommended"
    assert follow.startswith("to follow it: embed.freeze: auto, embed.advice: advice.json;")
    origin = activations.load(workspace.path / "artifacts/embed/activations").origin
    known = (origin.backbone, origin.weights_sha256, origin.data_sha256)
    assert activations.load_advice(workspace.path / "advice.json", *known).freeze == "all"
    report = json.loads((workspace.path / "artifacts/advise/report.json").read_text())
    rows = list(load_split(workspace.path / "artifacts/split/split.csv"))
    assert report["total"] == sum(row.split != "test" for row in rows) < len(rows)
    assert report["looked_at"] <= 20
    assert report["boundaries"][-1]["accuracy"]["value"] > 0.9  # dark and light photos
    with Image.open(workspace.path / "artifacts/advise/advice.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    again = workspace.call("advise", "--images", "20").stdout
    assert again == said
    assert (
        "--images is 7; 2 classes need 8"
        in workspace.call("advise", "--images", "7", code=3).stderr
    )


def test_random_weights_are_the_same_values_in_another_order_for_each_draw() -> None:
    names = ("a", "b", "ids")
    values = (np.arange(64, dtype=np.float32), np.ones((2, 3), np.float32), np.arange(9))
    tensors = [numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True)]
    graph = helper.make_model(helper.make_graph([], "g", [], [], initializer=tensors))
    renamed = helper.make_model(helper.make_graph([], "g", [], [], initializer=tensors))
    renamed.graph.initializer[0].name = "another"

    def drawn(draw: int, of: ModelProto = graph) -> list[list[float]]:
        mixed = with_random_weights(of, draw).graph.initializer
        return [numpy_helper.to_array(tensor).ravel().tolist() for tensor in mixed]

    first, second = drawn(0), drawn(1)
    assert first == drawn(0) == drawn(0, renamed)
    assert first[0] != second[0] != values[0].tolist() != first[0]
    assert sorted(first[0]) == sorted(second[0]) == values[0].tolist()
    assert first[2] == values[2].tolist()


def test_nothing_is_advised_before_there_are_activations(empty: Workspace) -> None:
    assert "artifacts/embed/activations" in empty.call("advise", code=6).stderr
