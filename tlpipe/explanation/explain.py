"""Command ``explain``: a look inside the last trained model.

It shows what the first layer responds to, what excites channels of each stage, where in an image
the answer comes from, which training images a mistake is like, and all images as a map.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from tlpipe import files
from tlpipe.backbones.weights import Weights
from tlpipe.data.images import Pixels
from tlpipe.data.manifest import evenly
from tlpipe.explanation import channels, embedding, figures, maps, page
from tlpipe.explanation.figures import Figure, Picture, Row
from tlpipe.explanation.inputs import Answer, Inputs, Paths, load
from tlpipe.explanation.maps import Network, Target
from tlpipe.progress import meter
from tlpipe.training import linear_probe
from tlpipe.training.recipe import Recipe

_log = logging.getLogger(__name__)
Ints = npt.NDArray[np.int64]
PLOTS, PAGE = "plots", "index.html"
_CHANNELS, _PATCHES, _MOST_STAGES = 4, 6, 12
_FILTERS = 64
_NEIGHBOURS = 5
_MOST_POINTS = 10_000
_BLOCK = 4096


@dataclass(frozen=True)
class Explained:
    """What was shown: how many mistakes of how many, and how many a label may be wrong of.

    ``bundle``: the digest of the bundle whose answers these are.
    """

    mistakes: int
    all_mistakes: int
    tested: int
    doubtful: int
    is_changed: bool
    bundle: str


@dataclass(frozen=True)
class _Networks:
    """The trained network and, where fine-tuning has changed it, the one before.

    ``target``: the operation that heat maps are of, None where there is none.
    """

    after: Network
    before: Network | None
    target: Target | None


def run(
    *, paths: Paths, folder: Path, images: int, mistakes: int, recipe: Recipe | None = None
) -> Explained:
    """Write galleries and a page into a folder, all or nothing.

    Args:
        paths: what the stages have written.
        folder: gets ``plots/`` and ``index.html``.
        images: training images that are looked at for what excites channels, at most; where stages
            were fine-tuned also the images of the map.
        mistakes: how many are explained, at most, and as many typical hits.
        recipe: how a linear probe is fitted, to compare fine-tuning with.

    Raises:
        ArtifactError: something is missing, or is of another run than the rest.
        WeightsError: the pretrained weights are not here.
    """
    inputs = load(paths)
    networks = _load_networks(inputs, recipe or Recipe())
    chosen = _choose(inputs, networks.after, images, mistakes)
    heat = _heat_maps(inputs, networks, chosen)
    near, doubtful = _neighbours(inputs, chosen)
    shown = [*heat, near, _filters(networks), *_channels(inputs, networks, images)]
    points = _points(inputs, networks.after, chosen)
    found = Explained(
        mistakes=len(chosen.wrong),
        all_mistakes=sum(answer.label != answer.predicted for answer in inputs.answers),
        tested=len(inputs.answers),
        doubtful=doubtful,
        is_changed=networks.before is not None,
        bundle=inputs.bundle.digest,
    )
    with files.replacing_folder(folder) as new:
        (new / PLOTS).mkdir()
        for figure in shown:
            if figure.rows:
                figures.draw(new / PLOTS, figure)
        page.draw_map(new / PLOTS / "map.png", points)
        files.write_bytes(new / PAGE, page.write(_about(inputs, found), shown, points))
    return found


def _about(inputs: Inputs, found: Explained) -> str:
    """Return a sentence on what is explained."""
    opened = inputs.data.open_stages if found.is_changed else 0
    tuned = f"the last {opened} of its stages fine-tuned" if opened else "as pretrained"
    right = found.tested - found.all_mistakes
    return (
        f"{inputs.data.backbone.name}, {tuned}, with a head for {len(inputs.data.labels):,} "
        f"classes. It is right on {right:,} of {found.tested:,} test images. "
        f"Bundle {found.bundle[:16]}."
    )


def _load_networks(inputs: Inputs, recipe: Recipe) -> _Networks:
    card, backbone = inputs.model.card, inputs.data.backbone
    weights = backbone.find_weights(card.origin.weights, card.origin.weights_sha256)
    after = maps.trained(backbone, weights, inputs.model)
    target = maps.last_map(after, backbone.preprocessing.crop_px)
    before = None
    if inputs.data.open_stages:
        before = _before(inputs, weights, after, recipe)
    return _Networks(after, before, target)


def _before(inputs: Inputs, weights: Weights, after: Network, recipe: Recipe) -> Network | None:
    """Return the pretrained network with a linear probe, None where nothing has changed since."""
    data = inputs.data
    unfitted = maps.pretrained(data.backbone, weights, inputs.model.head)
    pairs = zip(after.stages.values(), unfitted.stages.values(), strict=True)
    if all(
        bool((tensor == other).all())
        for stage, same in pairs
        for tensor, other in zip(stage.parameters(), same.parameters(), strict=True)
    ):
        return None
    _log.info("fitting a linear probe on the pretrained features, to compare fine-tuning with")
    probe = linear_probe.fit(linear_probe.stored(data), data, data.train, recipe)
    return maps.pretrained(data.backbone, weights, (probe.raw(probe.head),))


@dataclass(frozen=True)
class _Chosen:
    """The mistakes and hits that are shown, and the features of images of rows (N,), in order."""

    wrong: Sequence[Answer]
    right: Sequence[Answer]
    rows: Ints
    features: npt.NDArray[np.float32]
    total: int

    def of(self, answers: Iterable[Answer]) -> npt.NDArray[np.float32]:
        """Return the features of some test images."""
        return self.features[np.searchsorted(self.rows, [answer.row for answer in answers])]


def _choose(inputs: Inputs, network: Network, images: int, mistakes: int) -> _Chosen:
    """Choose the most confident mistakes, and hits in the middle of their classes."""
    data, labels = inputs.data, set(inputs.data.labels)
    known = [number for number, row in enumerate(inputs.rows) if row.label in labels]
    most = images if data.open_stages else _MOST_POINTS
    # Of few images some have to be test images, or there would be no hit.
    tested = evenly([answer.row for answer in inputs.answers], -(-most // 4))
    wrong = [answer for answer in inputs.answers if answer.label != answer.predicted]
    worst = sorted(wrong, key=lambda answer: -answer.probability)[:mistakes]
    left = sorted(set(known) - set(tested))
    others = evenly(left, max(most - len(tested), 1))
    rows = np.unique([*others, *tested, *(answer.row for answer in worst)]).astype(np.int64)
    with meter("features of images", total=len(rows)) as shown:
        found = embedding.features(network, data, inputs.squares, rows, shown)
    there = set(rows.tolist())
    hits = [a for a in inputs.answers if a.label == a.predicted and a.row in there]
    chosen = _Chosen(worst, (), rows, found, len(known))
    typical = _typical(hits, chosen.of(hits), mistakes)
    return _Chosen(worst, typical, rows, found, len(known))


def _typical(hits: Sequence[Answer], found: npt.NDArray[np.float32], count: int) -> list[Answer]:
    """Return the hits nearest to the mean of the hits of their class, from each class in turn."""
    by_class: dict[int, list[Answer]] = {}
    labels = np.array([answer.label for answer in hits], np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        centre = found[places].mean(axis=0, keepdims=True)
        order = embedding.nearest(centre, [found[places]], len(places)).positions[0]
        by_class[int(label)] = [hits[places[n]] for n in order]
    turns = max(map(len, by_class.values()), default=0)
    taken = [some[turn] for turn in range(turns) for some in by_class.values() if turn < len(some)]
    return sorted(taken[:count], key=lambda answer: answer.label)


def _heat_maps(inputs: Inputs, networks: _Networks, chosen: _Chosen) -> list[Figure]:
    """Return the figures of where answers come from, on mistakes and on hits."""
    changed = networks.before is not None
    if changed:
        compared = (
            "Before: the pretrained network with a linear probe on top. After: fine-tuned. Each "
            "map is scaled to its own brightest place."
        )
    elif inputs.data.open_stages:
        compared = (
            "No epoch of fine-tuning was better than the pretrained weights, which were kept: so "
            "there is no picture of before."
        )
    else:
        compared = (
            "All stages are frozen: the network is as it was pretrained, and only its head was "
            "trained. So there is no picture of before."
        )
    reading = (
        "Grad-CAM: the brighter a place, the more of the evidence for a class comes from there; "
        f"grey places count for nothing or speak against it. {compared}"
    )
    figures_of = []
    for name, title, some, of_all in (
        ("mistakes", "Where the most confident mistakes come from", chosen.wrong, "mistakes"),
        ("hits", "Where right answers come from: typical images of each class", chosen.right, ""),
    ):
        if networks.target is None:
            why = f"{inputs.data.backbone.name} has no map of places on which its answers depend."
            figures_of.append(Figure(name, title, f"No heat maps: {why}"))
        elif not some:
            why = "no test image was answered wrongly" if of_all else "no answer was right"
            figures_of.append(Figure(name, title, f"There are none: {why}."))
        else:
            rows = _heat_rows(inputs, networks, networks.target, some)
            figures_of.append(Figure(name, title, reading, rows))
    return figures_of


def _heat_rows(
    inputs: Inputs, networks: _Networks, target: Target, answers: Sequence[Answer]
) -> list[Row]:
    labels = inputs.data.labels
    seen = _seen(inputs, [answer.row for answer in answers])
    predicted = np.array([answer.predicted for answer in answers], np.int64)
    truth = np.array([answer.label for answer in answers], np.int64)
    passes: list[tuple[Network, Ints]] = [(networks.after, predicted), (networks.after, truth)]
    if networks.before is not None:
        passes.append((networks.before, predicted))
    with meter("heat maps", total=len(passes) * len(answers)) as shown:
        found = []
        for network, classes in passes:
            blocks = []
            for batch in channels.batches(len(answers)):
                blocks.append(maps.grad_cam(network, target, seen[batch], classes[batch]))
                shown.advance(len(blocks[-1]))
            found.append(np.concatenate(blocks))
    earlier = _answers_of(networks.before, seen) if networks.before is not None else None
    rows = []
    for n, answer in enumerate(answers):
        named, called = labels[answer.label], labels[answer.predicted]
        tuned = "after: for" if earlier is not None else "for"
        pictures = [Picture(seen[n], f"the image: {named}")]
        if earlier is not None:
            said = labels[int(earlier[n])]
            caption = f"before: for {called}; its answer: {said}"
            pictures.append(Picture(figures.overlay(seen[n], found[2][n]), caption))
        pictures.append(Picture(figures.overlay(seen[n], found[0][n]), f"{tuned} {called}"))
        if answer.label != answer.predicted:
            caption = f"{tuned} {named}, the label"
            pictures.append(Picture(figures.overlay(seen[n], found[1][n]), caption))
        rows.append(Row(_described(answer, labels), pictures, answer.path))
    return rows


def _described(answer: Answer, labels: Sequence[str]) -> str:
    if answer.label == answer.predicted:
        return f"{labels[answer.label]}, answered with probability {answer.probability:.2f}"
    return (
        f"{labels[answer.label]}, answered as {labels[answer.predicted]} with probability "
        f"{answer.probability:.2f}"
    )


def _answers_of(network: Network, images: Pixels) -> Ints:
    found = []
    for batch in channels.batches(len(images)):
        *_, (_, features) = network.stage_results(images[batch])
        found.append(embedding.answers(network, features.numpy())[0])
    return np.concatenate(found)


def _seen(inputs: Inputs, rows: Sequence[int]) -> Pixels:
    """Return images as the network sees them, (N, S, S, 3)."""
    return channels.middle(inputs.squares, rows, inputs.data.backbone.preprocessing.crop_px)


def _neighbours(inputs: Inputs, chosen: _Chosen) -> tuple[Figure, int]:
    """Return the training images nearest to mistakes, and how many labels that puts in doubt."""
    data, labels = inputs.data, inputs.data.labels
    title = "Training images that each mistake is most like"
    if not chosen.wrong:
        why = "There are none: no test image was answered wrongly."
        return Figure("neighbours", title, why), 0
    if data.open_stages:
        is_train = np.isin(chosen.rows, data.train.rows)
        others = chosen.rows[is_train]
        blocks: Iterable[npt.NDArray[np.float32]] = [chosen.features[is_train]]
    else:
        others = data.train.rows
        blocks = _stored(inputs, others)
    found = embedding.nearest(chosen.of(chosen.wrong), blocks, _NEIGHBOURS)
    number = {label: n for n, label in enumerate(labels)}
    rows, doubtful = [], 0
    for answer, positions, cosines in zip(
        chosen.wrong, found.positions, found.cosines, strict=True
    ):
        near = others[positions].tolist()
        of = [number[inputs.rows[row].label] for row in near]
        note, is_doubtful = _hint(answer, of, labels)
        doubtful += is_doubtful
        seen = _seen(inputs, [answer.row, *near])
        pictures = [Picture(seen[0], f"the mistake: {labels[answer.label]}")]
        pictures += [
            Picture(image, f"{labels[label]}, cosine {cosine:.2f}")
            for image, label, cosine in zip(seen[1:], of, cosines, strict=True)
        ]
        if answer.row in inputs.issues:
            note += f" audit suggests {labels[inputs.issues[answer.row]]}."
        rows.append(Row(_described(answer, labels), pictures, f"{note} {answer.path}"))
    total = len(data.train)
    among = f"{len(others):,} of {total:,}" if len(others) < total else f"{total:,}"
    reading = (
        f"Beside each mistake stand the nearest of {among} training images, by the cosine between "
        f"features (1: the same direction). Where all of them carry the label that was answered, "
        f"the mistake's own label may be wrong: look at the image."
    )
    return Figure("neighbours", title, reading, rows), doubtful


def _stored(inputs: Inputs, rows: Ints) -> Iterator[npt.NDArray[np.float32]]:
    features = inputs.data.activations.features
    for start in range(0, len(rows), _BLOCK):
        yield features[rows[start : start + _BLOCK]].astype(np.float32)
        features.unmap()


def _hint(answer: Answer, near: Sequence[int], labels: Sequence[str]) -> tuple[str, bool]:
    """Say what the labels of the nearest images speak for, and whether against the label."""
    as_answered, as_labelled = near.count(answer.predicted), near.count(answer.label)
    said = (
        f"{as_answered} of the {len(near)} nearest are labelled {labels[answer.predicted]}, and "
        f"{as_labelled} are labelled {labels[answer.label]}"
    )
    if near and as_answered == len(near):
        return f"{said}: is the label wrong?", True
    if 2 * as_labelled > len(near):
        return f"{said}: the label fits, the answer does not.", False
    return f"{said}.", False


def _channels(inputs: Inputs, networks: _Networks, images: int) -> list[Figure]:
    """Return a figure for each stage: channels that tell classes apart, and what excites them."""
    data = inputs.data
    order = np.argsort(data.train.rows, kind="stable")
    places = np.array(evenly(order.tolist(), images), np.int64)
    rows, crop_px = data.train.rows[places], data.backbone.preprocessing.crop_px
    with meter("images through stages", total=len(rows)) as shown:
        found = channels.find(
            networks.after,
            inputs.squares,
            crop_px,
            rows,
            data.train.labels[places],
            data.groups,
            classes=len(data.labels),
            channels=_CHANNELS,
            shown=_PATCHES,
            meter=shown,
        )
    fields = maps.receptive_fields(networks.after, crop_px)
    names = list(found)
    last = len(names) - 1
    return [
        _stage(inputs, names[n], n + 1, found[names[n]], fields[names[n]], len(rows))
        for n in [*evenly(range(last), _MOST_STAGES - 1), last]
    ]


def _stage(
    inputs: Inputs,
    name: str,
    number: int,
    found: Sequence[channels.Channel],
    field: maps.Field | None,
    looked_at: int,
) -> Figure:
    labels, crop_px = inputs.data.labels, inputs.data.backbone.preprocessing.crop_px
    rows = []
    for channel in found:
        images = _seen(inputs, [excited.row for excited in channel.excited])
        pictures = [
            Picture(
                figures.enlarged(channels.patch(image, excited, field, figures.MARK)),
                f"{inputs.rows[excited.row].label}, {excited.value:.3g}",
            )
            for image, excited in zip(images, channel.excited, strict=True)
        ]
        heading = f"channel {channel.number}: strongest on {labels[channel.label]}"
        note = (
            f"the class explains {channel.selectivity:.0%} of the variance of its strongest "
            f"response to an image"
        )
        rows.append(Row(heading, pictures, note))
    if field is not None and channels.is_patch(field, crop_px):
        what = (
            f"Each patch is all that a place of this stage sees: {field.size} of {crop_px} pixels "
            f"a side, less at the image's edge."
        )
    elif found[0].excited[0].places > 1:
        what = (
            "A place of this stage sees most of the image, so that is shown whole, with a box "
            "where the channel gave most."
        )
    else:
        what = "This stage gives one value a channel for the whole image."
    reading = (
        f"The channels that tell classes apart best, and the training images (of {looked_at:,} "
        f"that were looked at) that excite each most, with their labels and what the channel "
        f"gave. {what}"
    )
    title = f"Stage {number}, {name}: what excites its channels"
    return Figure(f"stage-{number:02d}-{name}", title, reading, rows, is_folded=True)


def _filters(networks: _Networks) -> Figure:
    """Return the filters of the first convolution that sees colours."""
    title = "What the first layer responds to"
    after = _first_convolution(networks.after)
    if after is None:
        return Figure("filters", title, "No filters: the network begins with no convolution.")
    weight = after.weight.detach().numpy()
    largest = np.argsort(-np.linalg.norm(weight.reshape(len(weight), -1), axis=1), kind="stable")
    chosen = np.sort(largest[:_FILTERS])
    rows = [("as trained", weight)]
    said = ""
    if networks.before is not None:
        before = _first_convolution(networks.before)
        assert before is not None
        other = before.weight.detach().numpy()
        if np.array_equal(other, weight):
            said = " Fine-tuning has left them as they were pretrained."
        else:
            rows = [("before fine-tuning", other), ("after fine-tuning", weight)]
    side = weight.shape[-1]
    reading = (
        f"Each square is a filter of {side} x {side} pixels: the picture that it responds to most. "
        f"Stripes are edges of that direction, plain colours are contrasts of colour; grey counts "
        f"for nothing.{said}"
    )
    if len(chosen) < len(weight):
        reading += f" The {len(chosen)} strongest of {len(weight)}."
    return Figure(
        "filters",
        title,
        reading,
        [
            Row(
                name,
                [
                    Picture(figures.enlarged(image), f"filter {number}")
                    for number, image in zip(chosen, figures.filters(some[chosen]), strict=True)
                ],
            )
            for name, some in rows
        ],
    )


def _first_convolution(network: Network) -> nn.Conv2d | None:
    for stage in network.stages.values():
        for module in stage.modules():
            if isinstance(module, nn.Conv2d) and module.weight.shape[1] == 3:
                return module
    return None


def _points(inputs: Inputs, network: Network, chosen: _Chosen) -> page.Points:
    """Return the map of images: where each lies, and what is known of it."""
    rows = chosen.rows
    number = {label: n for n, label in enumerate(inputs.data.labels)}
    predicted, logits = embedding.answers(network, chosen.features)
    logits = logits / np.float32(inputs.bundle.provenance["temperature"])
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (shifted / shifted.sum(axis=1, keepdims=True)).max(axis=1)
    shipped = {answer.row: answer for answer in inputs.answers}
    for place, row in enumerate(rows.tolist()):
        if row in shipped:  # what ships counts, down to its rounding
            predicted[place] = shipped[row].predicted
            probabilities[place] = shipped[row].probability
    return page.Points(
        labels=inputs.data.labels,
        places=embedding.place(chosen.features),
        paths=[inputs.rows[row].path for row in rows],
        splits=[inputs.rows[row].split for row in rows],
        label=[number[inputs.rows[row].label] for row in rows],
        answer=predicted.tolist(),
        probability=probabilities.tolist(),
        suggested=[inputs.issues.get(row, -1) for row in rows.tolist()],
        squares=inputs.squares,
        rows=rows,
        total=chosen.total,
    )
