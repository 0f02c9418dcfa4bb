"""Command ``advise``: how much to freeze, and whether the images are enough, before any tuning.

Linear probes answer both, cross-validated on a sample of the training and validation images: at
each boundary of the pretrained network, on the same network with random weights, and on ever fewer
training images. Test images are never looked at.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlpipe import files
from tlpipe.backbones import activations as stored
from tlpipe.backbones import frozen
from tlpipe.data import charts, leaks
from tlpipe.data import pixels as packed
from tlpipe.data.images import crop_middle
from tlpipe.data.manifest import evenly
from tlpipe.errors import ArtifactError, DataError, ParamsError
from tlpipe.progress import Meter, meter
from tlpipe.resampling import (
    ALWAYS_TRAINS,
    group_numbers,
    held_out_folds,
    paired_difference,
    share_interval,
)
from tlpipe.runtime import generator, open_session
from tlpipe.training import linear_probe, model, transferability
from tlpipe.training.linear_probe import FOLDS, Floats, Labels
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.transferability import (
    CONFIDENCE,
    SHARES,
    LearningCurve,
    Sample,
    held_out_misses,
    measure_curve,
)

if TYPE_CHECKING:
    from onnx import ModelProto

_BATCH = 8
_DRAWS = 3  # of random weights; one alone may be better or worse by some points
_THROUGH = 300  # images that go through the network, with pretrained and each of random weights
# Fewer images, or fewer a class, are small data. Of the settings in benchmarks/results/advice.txt
# and accuracy.txt, none with fewer than these gained by opening a stage.
_FEW, _FEW_OF_A_CLASS, _MANY_OF_A_CLASS = 400, 20, 1000
_UNEVEN = 5  # so many times the images of the smallest class
# Similar: pretraining takes away this share of the errors that features of random weights make.
_SIMILAR = 0.5
_WANTED = 0.02  # of accuracy, by more images
_SIZES, _DOMAINS = ("small", "large"), ("different", "similar")
_LECTURES = {
    (False, True): "freeze everything, train the head on saved activations",
    (True, True): "freeze less, fine-tune the last stages",
    (False, False): "collect more images, or take features of an earlier stage",
    (True, False): "train everything, from these weights",
}


@dataclass(frozen=True)
class Boundary:
    """What a linear probe makes of what a stage gives, averaged over its places.

    ``accuracy``: cross-validated, as ``share_interval`` gives it; ``logme``: nats an image.
    """

    name: str
    accuracy: dict[str, float]
    logme: float


@dataclass(frozen=True)
class Advice:
    """What is recommended, and what it follows from.

    Attributes:
        freeze: the value for ``embed.freeze``.
        place: whether the data are large, and whether their domain is like that of pretraining.
        reasons: sentences, the first ones of what is frozen, the last one of the data.
        total: training and validation images there are.
        classes: how many classes.
        looked_at: images of the sample.
        boundaries: of the pretrained network, from the first stage to the last.
        random: of the network with random weights, where it is best: the mean over draws.
        gain: by how much the pretrained features are more accurate than those of random weights,
            as ``paired_difference`` gives it.
        curve: None where classes are too small for one.
    """

    freeze: str
    place: "Place"
    reasons: tuple[str, ...]
    total: int
    classes: int
    looked_at: int
    boundaries: tuple[Boundary, ...]
    random: Boundary
    gain: dict[str, float]
    curve: LearningCurve | None

    @property
    def per_class(self) -> float:
        """The mean number of training and validation images a class."""
        return self.total / self.classes

    def content(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        content = asdict(replace(self, curve=None))
        if self.curve is not None:
            content["curve"] = {
                "images": self.curve.images.tolist(),
                "errors": self.curve.errors.tolist(),
                "law": dict(zip(("scale", "exponent", "floor"), self.curve.law, strict=True)),
            }
        return content


@dataclass(frozen=True)
class Place:
    """A place in the table of small or large data, of a similar or a different domain.

    Source: Karpathy et al., CS231n: Convolutional neural networks for visual recognition, notes on
    transfer learning.
    """

    is_large: bool
    is_similar: bool

    def __str__(self) -> str:
        size, domain = _SIZES[self.is_large], _DOMAINS[self.is_similar]
        return f"{size} data, {domain} domain: {_LECTURES[self.is_large, self.is_similar]}"


def choose_sample(data: Dataset, images: int) -> Sample:
    """Return at most so many training and validation images, as many of each class as there are.

    Raises:
        ParamsError: too few for its classes.
        DataError: none can be held out.
    """
    examples, classes = data.labelled, len(data.labels)
    if images < FOLDS * classes:
        raise ParamsError(
            f"--images is {images}; {classes} classes need {FOLDS * classes} at least, one of each "
            f"in each fold. Raise it."
        )
    counts = np.bincount(examples.labels, minlength=classes)
    most = images // classes
    while most < counts.max() and np.minimum(counts, most + 1).sum() <= images:
        most += 1
    places = np.sort(
        np.concatenate(
            [evenly(np.flatnonzero(examples.labels == n).tolist(), most) for n in range(classes)]
        )
    ).astype(np.int64)
    chosen = Examples(examples.rows[places], examples.labels[places])
    groups = [data.groups[row] for row in chosen.rows]
    folds = held_out_folds([data.labels[n] for n in chosen.labels], groups, FOLDS)
    if (folds == ALWAYS_TRAINS).all() or classes < 2:
        raise DataError(
            f"nothing can be held out of {len(examples)} training and validation images of "
            f"{classes} classes; expected two classes of two independent images each. Add images."
        )
    return Sample(chosen, group_numbers(groups), folds, classes)


def stage_features(
    graph: "ModelProto", data: Dataset, rows: Labels, squares: packed.Chunks, shown: Meter
) -> dict[str, Floats]:
    """Return what each stage gives for images (N, D), averaged over places or tokens."""
    session = open_session(graph.SerializeToString(), threads=data.activations.origin.threads)
    stages = {frozen.output(stage.name): stage for stage in data.backbone.stages}
    names = [output.name for output in session.get_outputs()]
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for start in range(0, len(rows), _BATCH):
        images = squares[rows[start : start + _BATCH]]
        plain = crop_middle(images, data.backbone.preprocessing.crop_px)
        results = session.run(None, {frozen.IMAGES: np.ascontiguousarray(plain)})
        for name, result in zip(names, results, strict=True):
            found[name].append(_averaged(result.astype(np.float64)))
        shown.advance(len(images))
        squares.unmap()
    return {stages[name].name: np.concatenate(blocks) for name, blocks in found.items()}


def _averaged(given: Floats) -> Floats:
    """Return (N, C) of activations (N, C, S, S), (N, S, S, C), (N, T, C) or (N, C)."""
    axes: tuple[int, ...] = (1,) if given.ndim == 3 else ()
    if given.ndim == 4:
        axes = (2, 3) if given.shape[2] == given.shape[3] else (1, 2)
    averaged: Floats = given.mean(axis=axes)
    return averaged


def with_random_weights(graph: "ModelProto", draw: int) -> "ModelProto":
    """Return the graph with the values of each of its tensors in random order.

    So weights are random and of the pretrained distribution, tensor by tensor, and no other network
    has to be exported. The order depends on the draw and on the tensor's place, not on its name.

    Source: Raghu et al. (2019), Transfusion: understanding transfer learning for medical imaging,
    NeurIPS, section 5, Mean Var initialisation, here with all moments.
    """
    from onnx import ModelProto, numpy_helper

    drawn = ModelProto()
    drawn.CopyFrom(graph)
    for place, tensor in enumerate(drawn.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f":
            order = generator(draw, f"random weights {place}")
            mixed = order.permutation(values.ravel()).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(mixed, tensor.name))
    return drawn


def run(
    *,
    activations: Path,
    pixels: Path,
    split: Path,
    leaks_report: Path,
    folder: Path,
    recommendation: Path,
    images: int,
) -> Advice:
    """Look at so many training and validation images; write ``report.json`` and ``advice.png``.

    ``leaks_report``: of ``audit``, if it has run: of images with copies, more ones promise nothing.
    ``recommendation``: a file of the project, which ``embed.freeze: auto`` follows where
    ``embed.advice`` names it.

    Raises:
        ArtifactError: activations, pixels and split table are of different data, or
            ``recommendation`` is a file of another kind.
        DataError: there are too few images to hold any out.
        ParamsError: too few images were asked for, or the weights are random.
        WeightsError: the pretrained weights are missing.
    """
    stored.check_advice_may_lie(recommendation)
    data = model.load_dataset(activations, split)
    if not data.activations.origin.weights_sha256:
        raise ParamsError(
            "embed.weights is none, and advice says what pretrained weights are good for. Name "
            "some, run 'tlpipe run', and ask again."
        )
    squares = packed.load(pixels)
    if squares.data_sha256 != data.activations.origin.data_sha256:
        raise ArtifactError(
            f"{pixels} holds other images than {activations} is of. Run 'tlpipe run'."
        )
    advice = advise(data, squares.array, images, leaks.found_by_audit(leaks_report))
    with files.replacing_folder(folder) as new:
        files.write_json(new / "report.json", advice.content())
        _draw(new / "advice.png", advice)
    origin = data.activations.origin
    stored.save_advice(
        recommendation,
        stored.Advice(
            freeze=advice.freeze,
            backbone=origin.backbone,
            weights_sha256=origin.weights_sha256,
            data_sha256=origin.data_sha256,
        ),
    )
    return advice


def advise(data: Dataset, squares: packed.Chunks, images: int, copies: str = "") -> Advice:
    """Measure boundaries, random weights and a learning curve, and draw the conclusion.

    ``copies``: in words, which ``audit`` has found.
    """
    import scipy.optimize  # noqa: F401 - loads SciPy's BLAS: only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    whole = choose_sample(data, images)
    some = choose_sample(data, min(images, max(_THROUGH, FOLDS * whole.classes)))
    rows = some.examples.rows
    graph = _graph(data)
    passes = 1 + _DRAWS
    with meter("images through networks", total=passes * len(rows)) as shown:
        pretrained, *drawn = (
            stage_features(network, data, rows, squares, shown)
            for network in (graph, *(with_random_weights(graph, n) for n in range(_DRAWS)))
        )
    probes = passes * len(data.backbone.stages) + len(SHARES)
    with threadpool_limits(1), meter("linear probes", total=probes) as shown:
        boundaries, right = _at_boundaries([pretrained], some, shown)
        random, right_at_random = _at_boundaries(drawn, some, shown)
        curve = measure_curve(_features(data, whole.examples.rows), whole, shown)
    best = max(range(len(random)), key=lambda number: random[number].accuracy["value"])
    gain = paired_difference(
        right_at_random[best], right[-1], some.groups[some.held].astype(str).tolist(), CONFIDENCE
    )
    return conclude(data, len(whole.examples), boundaries, random[best], gain, curve, copies)


def conclude(
    data: Dataset,
    looked_at: int,
    boundaries: Sequence[Boundary],
    random: Boundary,
    gain: dict[str, float],
    curve: LearningCurve | None,
    copies: str = "",
) -> Advice:
    """Decide what to freeze, and say why."""
    total, classes = len(data.labelled), len(data.labels)
    counts = np.bincount(data.labelled.labels, minlength=classes)
    smallest = int(counts.min())
    errors = 1 - random.accuracy["value"]
    # Where random weights make no error, pretraining has none to take away.
    taken = [
        min(max(gain[end] / errors, 0.0), 1.0) if errors else 0.0
        for end in ("value", "low", "high")
    ]
    is_large = total >= _FEW and smallest >= _FEW_OF_A_CLASS
    is_many = smallest >= _MANY_OF_A_CLASS
    place = Place(is_large, taken[0] >= _SIMILAR)
    stages = [stage.name for stage in data.backbone.stages]
    count, opened = 0, ""
    if is_large and place.is_similar:
        count, opened = max(len(stages) // 4, 1), "the last quarter of the stages"
    elif is_large and not is_many:
        count = max(len(stages) // 2, 1)
        opened = f"the last half of the stages; all of them take {_MANY_OF_A_CLASS:,} a class"
    elif is_large:
        count, opened = len(stages), "all stages"
    left = len(stages) - count
    freeze = stages[left - 1] if left else stored.NONE
    return Advice(
        freeze=freeze if count else stored.ALL,
        place=place,
        reasons=(
            _of_size(counts, place, opened),
            _of_domain(taken, boundaries[-1], random),
            *_of_boundaries(boundaries),
            _of_copies(copies) if copies else _of_data(curve, total / classes),
        ),
        total=total,
        classes=classes,
        looked_at=looked_at,
        boundaries=tuple(boundaries),
        random=random,
        gain=gain,
        curve=curve,
    )


def _of_size(counts: Labels, place: Place, opened: str) -> str:
    total, smallest, largest = int(counts.sum()), int(counts.min()), int(counts.max())
    said = f"{total:,} training and validation images of {len(counts)} classes"
    each = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    if place.is_large:
        follows = f"at least {_FEW:,}, and {_FEW_OF_A_CLASS} a class: enough to tune {opened}"
    elif total < _FEW:
        follows = f"fewer than {_FEW:,}: too few to tune what would be opened"
    else:
        follows = f"fewer than {_FEW_OF_A_CLASS} in one: too few to tune what would be opened"
    if largest > _UNEVEN * smallest:
        follows += (
            f". Accuracy says little of the smallest class: the largest one alone has "
            f"{largest / total:.3f}"
        )
    return f"{said}, {each} a class, {follows}"


def _of_domain(taken: Sequence[float], last: Boundary, random: Boundary) -> str:
    value, low, high = taken
    measured = (
        f"the accuracy of a linear probe is {last.accuracy['value']:.3f} on pretrained features "
        f"and {random.accuracy['value']:.3f} on those of random weights"
    )
    scores = f"LogME {last.logme:.2f} and {random.logme:.2f}"
    if random.accuracy["value"] == 1:
        return (
            f"nobody can tell whether the domain is like that of pretraining: {measured}, which "
            f"leaves no errors to take away; {scores}"
        )
    unsure = low < _SIMILAR < high
    verdict = ("unlike", "like")[value >= _SIMILAR]
    cause = "" if value >= _SIMILAR else ". Wrong labels look the same: see what audit found"
    return (
        f"the domain is {'probably ' if unsure else ''}{verdict} that of pretraining: {measured}, "
        f"so pretraining takes away {value:.0%} of the errors ({low:.0%} to {high:.0%}); {scores}"
        f"{cause}"
    )


def _of_boundaries(boundaries: Sequence[Boundary]) -> list[str]:
    """Say where an earlier stage separates the classes better than the last one."""
    last, best = boundaries[-1], max(boundaries, key=lambda found: found.accuracy["value"])
    if best.accuracy["low"] <= last.accuracy["value"]:
        return []
    return [
        f"features of {best.name} separate the classes better than those of {last.name}: "
        f"accuracy {best.accuracy['value']:.3f}; what the last stages know is of other images"
    ]


def _of_copies(copies: str) -> str:
    return (
        f"cannot tell whether more images would help, and all accuracies here are too high: "
        f"{copies}. Keep the copies of an original in one group, and ask again; originals are what "
        f"counts"
    )


def _of_data(curve: LearningCurve | None, images: float) -> str:
    """Say what more images would bring, no further than the curve can tell."""
    if curve is None:
        return "too few images a class for a learning curve: collect more"
    if images > transferability.MOST_TIMES * curve.images[-1]:
        return (
            f"cannot tell whether more images would help: {images:,.0f} a class is far beyond the "
            f"{curve.images[-1]:,.0f} that the learning curve ends at; look at more by --images"
        )
    value, low, high = (f"{100 * points:.1f}" for points in curve.gain(images, images))
    doubled = f"twice as many images would bring {value} points ({low} to {high})"
    if needed := curve.more_for(_WANTED, images):
        more, least, most = (f"{max(round(count), 1):,}" for count in needed)
        return (
            f"about {more} more images a class for +{100 * _WANTED:.0f} points ({least} to "
            f"{most}); {doubled}"
        )
    if curve.gain(images, images)[2] < _WANTED:
        return f"more images of this kind would help little: {doubled}"
    return f"cannot tell how many images more for +{100 * _WANTED:.0f} points: {doubled}"


def _graph(data: Dataset) -> "ModelProto":
    """Return the pretrained network, with what every stage gives."""
    origin, backbone = data.activations.origin, data.backbone
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    whole = frozen.whole_graph(backbone, weights)
    return frozen.part(whole, [stage.name for stage in backbone.stages])


def _features(data: Dataset, rows: Labels) -> Floats:
    """Return the stored features (N, D) of images."""
    return np.concatenate(list(linear_probe.stored(data)(rows, False)))


def _at_boundaries(
    draws: Sequence[dict[str, Floats]], sample: Sample, shown: Meter
) -> tuple[list[Boundary], list[Floats]]:
    """Return what probes make of each stage, and how much of each image (H,) is right there.

    ``draws``: what each stage gives, of each network; the means over these are returned.
    """
    boundaries, right = [], []
    for name in draws[0]:
        shares, scores = [], []
        for given in (features[name] for features in draws):
            (misses,) = held_out_misses(given, sample)
            shares.append(~misses)
            scores.append(transferability.logme(given, sample.examples.labels))
            shown.advance(1)
        share: Floats = np.mean(shares, axis=0)
        accuracy = share_interval(share, sample.groups[sample.held], CONFIDENCE)
        boundaries.append(Boundary(name, accuracy, float(np.mean(scores))))
        right.append(share)
    return boundaries, right


def _draw(path: Path, advice: Advice) -> None:
    """Draw accuracy over boundaries, and errors over images with their extrapolation."""
    figure = charts.new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.tick_params(labelsize=11)
    rows = [boundary.accuracy for boundary in advice.boundaries]
    values = np.array([row["value"] for row in rows])
    spread = charts.error_bars(rows, "value")
    places = np.arange(len(rows))
    left.errorbar(places, values, spread, fmt="o-", capsize=3, label="pretrained weights")
    random = advice.random
    left.axhline(
        random.accuracy["value"],
        color="gray",
        linestyle=":",
        label=f"random weights, at their best ({random.name})",
    )
    names = [boundary.name for boundary in advice.boundaries]
    left.set_xticks(places, names, rotation=35 if len(names) < 12 else 90)
    left.set_ylim(0, 1.02)
    left.set_ylabel("accuracy of a linear probe", fontsize=12)
    left.set_xlabel("last stage before the probe", fontsize=12)
    left.set_title("What the stages of the network give", fontsize=13)
    left.legend(loc="lower right", fontsize=11)
    right.set_xlabel("training images a class", fontsize=12)
    right.set_ylabel("accuracy of a linear probe", fontsize=12)
    right.set_title("What more images give", fontsize=13)
    if (curve := advice.curve) is None:
        right.text(0.5, 0.5, "too few images to tell", ha="center", va="center", fontsize=13)
        right.set_axis_off()
    else:
        along = np.geomspace(curve.images[0], 2 * advice.per_class, 60)
        errors = np.array([curve.error(images) for images in along])
        share = f"{CONFIDENCE:.0%} interval"
        right.plot(curve.images, 1 - curve.errors, "o", label="measured")
        right.plot(along, 1 - errors[:, 0], label="power law")
        right.fill_between(along, 1 - errors[:, 2], 1 - errors[:, 1], alpha=0.2, label=share)
        right.axvline(advice.per_class, color="gray", linestyle=":", label="images there are")
        charts.scale_by_logarithm(right)
        ticks = [*curve.images, 2 * advice.per_class]
        right.set_xticks(
            ticks, [f"{images:.2g}" if images < 10 else f"{images:.0f}" for images in ticks]
        )
        right.legend(loc="lower right", fontsize=11, framealpha=1)
    charts.save_figure(figure, path)
