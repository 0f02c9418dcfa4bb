"""What the page shows of each image, against timm's own network, the shipped bundle, scikit-learn.

Jobs have one network whose last stage was trained on views, and one that is frozen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from sklearn.metrics.pairwise import cosine_similarity

from tests.conftest import Workspace
from tests.explanation.reading import Shown, read
from tests.explanation.test_explain import paths_of
from tlpipe import graph
from tlpipe.backbones.weights import Weights
from tlpipe.explanation import explain, figures, maps
from tlpipe.explanation.inputs import Inputs, load
from tlpipe.predict import Predictor
from tlpipe.training import linear_probe
from tlpipe.training.model import network_tensors
from tlpipe.training.recipe import Recipe

pytestmark = pytest.mark.slow
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """A page, what it is of, and the features (N, D) of all images."""

    workspace: Workspace
    inputs: Inputs
    shown: Shown
    found: explain.Explained
    features: Floats

    def row(self, pixels: Floats) -> int:
        """Return which image is shown."""
        every = self.inputs.images(range(len(self.inputs.rows))).astype(np.float64)
        return int(np.abs(every - pixels).mean(axis=(1, 2, 3)).argmin())


def made(workspace: Workspace, folder: Any) -> Job:
    paths = paths_of(workspace)
    found = explain.run(paths=paths, folder=folder, images=1000, mistakes=6)
    inputs = load(paths)
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(network_tensors(inputs.model))
    sampling = inputs.data.backbone.preprocessing
    images = inputs.images(range(len(inputs.rows))) / 255.0
    scaled = (images - np.array(sampling.mean)) / np.array(sampling.std)
    with torch.inference_mode():
        features = network.eval()(torch.from_numpy(scaled).permute(0, 3, 1, 2).float())
    return Job(workspace, inputs, read(folder), found, features.double().numpy())


@pytest.fixture(scope="module")
def tuned(explained_job: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return made(explained_job, tmp_path_factory.mktemp("tuned") / "out")


@pytest.fixture(scope="module")
def frozen(frozen_job: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return made(frozen_job, tmp_path_factory.mktemp("frozen") / "out")


@pytest.fixture(params=["tuned", "frozen"])
def job(request: pytest.FixtureRequest) -> Job:
    found: Job = request.getfixturevalue(request.param)
    return found


def test_each_image_has_the_answer_and_the_probability_of_what_ships(job: Job) -> None:
    points, bundle = job.shown.points, job.inputs.bundle
    assert job.inputs.data.open_stages or abs(np.log(bundle.provenance["temperature"])) > 0.1
    photos, predictor = job.workspace.path.parent / "photos", Predictor(bundle, threads=1)
    assert len(points["path"]) == 80
    for n, path in enumerate(points["path"]):
        prediction = predictor.predict(photos / path)
        assert points["labels"][points["answer"][n]] == prediction.label
        shipped = prediction.probabilities[prediction.label]
        assert points["probability"][n] == pytest.approx(shipped, abs=3e-3)
    for row in job.workspace.rows(graph.PATHS["predictions"]):
        place = points["path"].index(row["path"])
        assert points["probability"][place] == pytest.approx(float(row["probability"]), abs=1e-3)


def test_an_image_is_marked_as_seen_where_the_model_was_fitted_on_it(
    tuned: Job, frozen: Job
) -> None:
    for job, fitted in ((tuned, {"train"}), (frozen, {"train", "validation"})):
        points = job.shown.points
        splits = [points["splits"][n] for n in points["split"]]
        assert {"train", "validation", "test"} == set(splits)
        assert points["fitted"] == [split in fitted for split in splits]


def test_typical_images_are_nearest_to_the_mean_of_the_right_answers_of_their_class(
    job: Job,
) -> None:
    shown = [job.row(pictures[0][1]) for _, _, pictures in job.shown.rows["hits"]]
    assert len(shown) == 6
    for label in (0, 1):
        hits = [a.row for a in job.inputs.answers if a.is_right and a.label == label]
        mean = job.features[hits].mean(axis=0, keepdims=True)
        cosines = cosine_similarity(job.features[hits], mean)[:, 0]
        best = np.sort(cosines)[::-1]
        of = [row for row in shown if row in hits]
        assert len(of) == 3
        np.testing.assert_allclose([cosines[hits.index(row)] for row in of], best[:3], atol=2e-5)
        assert best[2] - best[-1] > 1e-4


def test_neighbours_are_the_nearest_images_that_the_model_was_fitted_on(job: Job) -> None:
    inputs, rows = job.inputs, job.shown.rows["neighbours"]
    wrong = sorted(
        (a for a in inputs.answers if a.label != a.predicted), key=lambda a: -a.probability
    )
    assert len(rows) == min(len(wrong), 6) > 0
    splits = {"train", "validation"} if not inputs.data.open_stages else {"train"}
    fitted = [n for n, row in enumerate(inputs.rows) if row.split in splits]
    assert f"the nearest of {len(fitted)} images that the model was fitted on" in job.shown.text
    doubtful = 0
    for answer, (heading, note, pictures) in zip(wrong, rows, strict=False):
        labels = inputs.data.labels
        assert heading.startswith(f"{labels[answer.label]}, answered as {labels[answer.predicted]}")
        assert job.row(pictures[0][1]) == answer.row
        near = [job.row(pixels) for _, pixels in pictures[1:]]
        assert set(near) <= set(fitted)
        assert len(set(near)) == 5
        cosines = cosine_similarity(job.features[[answer.row]], job.features[fitted])[0]
        named = dict(zip(fitted, cosines.tolist(), strict=True))
        best = sorted(named.values(), reverse=True)
        np.testing.assert_allclose([named[row] for row in near], best[:5], atol=2e-4)
        captions = [f"{inputs.rows[row].label}, cosine {named[row]:.2f}" for row in near]
        assert [caption for caption, _ in pictures[1:]] == captions
        is_doubtful = all(inputs.rows[row].label == labels[answer.predicted] for row in near)
        assert ("is the label wrong?" in note) == is_doubtful
        doubtful += is_doubtful
    assert (job.found.asked, job.found.doubtful) == (len(rows), doubtful)
    assert doubtful or not inputs.data.open_stages


def test_heat_maps_stand_under_their_names(tuned: Job) -> None:
    inputs = tuned.inputs
    card, backbone = inputs.model.card, inputs.data.backbone
    weights = Weights(None, "")
    after = maps.trained(backbone, weights, inputs.model)
    assert card.l2 is None  # where train has solved no head, its defaults
    data = inputs.data
    probe = linear_probe.fit(linear_probe.stored(data), data, data.train, Recipe())
    before = maps.pretrained(backbone, weights, (probe.raw(probe.head),))
    target = maps.last_map(after, inputs.images([0]))
    assert target is not None
    told_apart = 0
    for heading, _, pictures in tuned.shown.rows["mistakes"]:
        row = tuned.row(pictures[0][1])
        (answer,) = (a for a in inputs.answers if a.row == row)
        image = inputs.images([row])
        named, called = inputs.data.labels[answer.label], inputs.data.labels[answer.predicted]
        assert heading.startswith(f"{named}, answered as {called}")

        def laid(network: maps.Network, label: int, image: Any = image) -> Floats:
            heat = maps.grad_cam(network, target, image, np.array([label]))
            return figures.overlay(image[0], heat[0]).astype(np.float64)

        expected = [
            laid(before, answer.predicted),
            laid(after, answer.predicted),
            laid(after, answer.label),
        ]
        captions = [caption.partition(";")[0] for caption, _ in pictures[1:]]
        said = [f"before: for {called}", f"after: for {called}", f"after: for {named}, the label"]
        assert captions == said
        apart = np.array(
            [[np.abs(pixels - one).mean() for one in expected] for _, pixels in pictures[1:]]
        )
        assert apart.diagonal().max() < 4  # of 255, by JPEG
        told_apart += bool((apart + 99 * np.eye(3)).min() > 8)
    assert told_apart > 0
