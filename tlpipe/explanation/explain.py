"""Command ``explain``: a look inside the last trained model.

It shows what the first layer responds to, what excites channels of each stage, where in an image
the answer comes from, which training images a mistake is like, and all images as a map.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tlpipe import files
from tlpipe.backbones.weights import Weights
from tlpipe.data.images import Pixels
from tlpipe.data.manifest import evenly
from tlpipe.explanation import BUNDLE, channels, embedding, figures, maps, neighbours, page, sample
from tlpipe.explanation.figures import Figure, Picture, Row
from tlpipe.explanation.inputs import Answer, Inputs, Paths, load
from tlpipe.explanation.maps import Network, Target
from tlpipe.explanation.sample import Sample
from tlpipe.progress import meter
from tlpipe.training import linear_probe
from tlpipe.training.recipe import Recipe

_log = logging.getLogger(__name__)
Ints = npt.NDArray[np.int64]
PLOTS, PAGE = "plots", "index.html"
_CHANNELS, _PATCHES, _MOST_STAGES = 4, 6, 12
_FILTERS = 64
_PROBES = 4  # images that are run to find the map
_NAMED = 3  # classes in a title


@dataclass(frozen=True)
class Explained:
    """What was shown: how many mistakes of how many, and how many a label may be wrong of.

    ``asked``: of how many mistakes there are enough neighbours to say so; ``bundle``: the digest of
    the bundle whose answers these are.
    """

    mistakes: int
    all_mistakes: int
    tested: int
    asked: int
    doubtful: int
    is_changed: bool
    bundle: str


@dataclass(frozen=True)
class _Networks:
    """The trained network and, where training has changed its stages, the one before.

    ``target``: the operation that heat maps are of, None where there is none; ``start``, ``state``:
    what weights it began with, and what has become of them, for people.
    """

    after: Network
    before: Network | None
    target: Target | None
    start: str
    state: str


def run(*, paths: Paths, folder: Path, images: int, mistakes: int) -> Explained:
    """Write galleries and a page into a folder, all or nothing.

    Args:
        paths: what the stages have written.
        folder: gets ``plots/``, ``index.html``, and ``explain.json`` that names the bundle.
        images: training images that are looked at for what excites channels, at most; where stages
            were fine-tuned also the images of the map.
        mistakes: how many are explained, at most, and as many typical right answers.

    Raises:
        ArtifactError: something is missing, or is of another run than the rest.
        WeightsError: the pretrained weights are not here.
    """
    inputs = load(paths)
    networks = _load_networks(inputs)
    chosen = sample.choose(inputs, networks.after, images, mistakes)
    heat = _heat_maps(inputs, networks, chosen)
    near = neighbours.find(inputs, chosen)
    shown = [*heat, near.figure, _filters(networks), *_channels(inputs, networks, images)]
    points = _points(inputs, networks.after, chosen)
    found = Explained(
        mistakes=len(chosen.wrong),
        all_mistakes=sum(not answer.is_right for answer in inputs.answers),
        tested=len(inputs.answers),
        asked=near.asked,
        doubtful=near.doubtful,
        is_changed=networks.before is not None,
        bundle=inputs.bundle.digest,
    )
    with files.replacing_folder(folder) as new:
        (new / PLOTS).mkdir()
        for figure in shown:
            if figure.rows:
                figures.draw(new / PLOTS, figure, inputs.stamp)
        page.draw_map(new / PLOTS / "map.png", points, inputs.stamp)
        files.write_bytes(new / PAGE, page.write(_about(inputs, networks, found), shown, points))
        files.write_json(new / BUNDLE, {"bundle": found.bundle})
    return found


def _about(inputs: Inputs, networks: _Networks, found: Explained) -> str:
    """Return a sentence on what is explained."""
    right = found.tested - found.all_mistakes
    return (
        f"{inputs.data.backbone.name}, {networks.state}, with a head for "
        f"{len(inputs.data.labels):,} classes. It is right on {right:,} of {found.tested:,} test "
        f"images. {inputs.stamp}"
    )


def _load_networks(inputs: Inputs) -> _Networks:
    card, backbone = inputs.model.card, inputs.data.backbone
    weights = backbone.find_weights(card.origin.weights, card.origin.weights_sha256)
    after = maps.trained(backbone, weights, inputs.model)
    probes = evenly([answer.row for answer in inputs.answers], _PROBES)
    target = maps.last_map(after, inputs.images(probes))
    start = "random weights" if weights.path is None else "pretrained weights"
    opened, before = inputs.data.open_stages, None
    state = f"its {start} as they were"
    if opened:
        unfitted = maps.pretrained(backbone, weights, inputs.model.head)
        if change := _change(after, unfitted, card.epoch):
            state = f"the last {opened} of its {len(after.stages)} stages {change}"
            before = _before(inputs, weights)
    return _Networks(after, before, target, start, state)


def _change(after: Network, before: Network, epoch: int) -> str:
    """Say what training has changed in the stages; nothing where that is nothing."""

    def differ(tensors: Callable[[nn.Module], Iterable[Tensor]]) -> bool:
        return any(
            not torch.equal(tensor, other)
            for stage, same in zip(after.stages.values(), before.stages.values(), strict=True)
            for tensor, other in zip(tensors(stage), tensors(same), strict=True)
            if tensor.is_floating_point()  # BatchNorm counts its steps, too
        )

    if differ(nn.Module.parameters):
        return "fine-tuned" if epoch else "re-initialised"
    return "with BatchNorm statistics of these images" if differ(nn.Module.buffers) else ""


def _before(inputs: Inputs, weights: Weights) -> Network:
    """Return the network before training, with a linear probe of the l2 that train has chosen."""
    data, l2 = inputs.data, inputs.model.card.l2
    _log.info("fitting a linear probe on the features from before, to compare with")
    recipe = Recipe() if l2 is None else Recipe(l2=(l2,))
    probe = linear_probe.fit(linear_probe.stored(data), data, data.train, recipe)
    return maps.pretrained(data.backbone, weights, (probe.raw(probe.head),))


def _heat_maps(inputs: Inputs, networks: _Networks, chosen: Sample) -> list[Figure]:
    """Return the figures of where answers come from, on mistakes and on hits."""
    if networks.before is not None:
        compared = (
            f"Before: the network with its {networks.start} and a linear probe on top. After: "
            f"{networks.state}. Each map is scaled to its own brightest place."
        )
    elif inputs.data.open_stages:
        compared = (
            f"No epoch of fine-tuning was better than the {networks.start}, which were kept: so "
            f"there is no picture of before."
        )
    else:
        compared = (
            f"All stages are frozen: the network has its {networks.start}, and only its head was "
            f"trained. So there is no picture of before."
        )
    reading = (
        "Grad-CAM: the brighter a place, the more of the evidence for a class comes from there; "
        f"grey places count for nothing or speak against it. {compared}"
    )
    labels = [inputs.data.labels[n] for n in dict.fromkeys(a.label for a in chosen.right)]
    of = ", ".join(labels[:_NAMED]) + f" and {len(labels) - _NAMED} more" * (len(labels) > _NAMED)
    typical = (
        f"Of each class those nearest to the mean of its right answers, of {chosen.looked_at:,} "
        f"right answers that were looked at; classes of the mistakes come first."
    )
    found = []
    for name, title, some, more, none in (
        (
            "mistakes",
            "Where the most confident mistakes come from",
            chosen.wrong,
            "",
            "no test image was answered wrongly",
        ),
        (
            "hits",
            f"Where right answers come from: typical images of {of}",
            chosen.right,
            f" {typical}",
            "no test image was answered rightly",
        ),
    ):
        if not some:
            title, _, _ = title.partition(":")
            found.append(Figure(name, title, f"There are none: {none}."))
        elif networks.target is None:
            why = f"{inputs.data.backbone.name} has no map of places on which its answers depend."
            found.append(Figure(name, title, f"No heat maps: {why}"))
        else:
            rows = _heat_rows(inputs, networks, networks.target, some)
            found.append(Figure(name, title, reading + more, rows))
    return found


def _heat_rows(
    inputs: Inputs, networks: _Networks, target: Target, answers: Sequence[Answer]
) -> list[Row]:
    labels = inputs.data.labels
    seen = inputs.images([answer.row for answer in answers])
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
        if not answer.is_right:
            caption = f"{tuned} {named}, the label"
            pictures.append(Picture(figures.overlay(seen[n], found[1][n]), caption))
        rows.append(Row(answer.describe(labels), pictures, answer.path))
    return rows


def _answers_of(network: Network, images: Pixels) -> Ints:
    found = []
    for batch in channels.batches(len(images)):
        *_, (_, features) = network.stage_results(images[batch])
        found.append(embedding.answers(network, features.numpy())[0])
    return np.concatenate(found)


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
        images = inputs.images([excited.row for excited in channel.excited])
        pictures = [
            Picture(
                figures.enlarged(channels.patch(image, excited, field, figures.MARK)),
                f"{inputs.rows[excited.row].label}, {excited.value:.3g}",
            )
            for image, excited in zip(images, channel.excited, strict=True)
        ]
        heading = f"channel {channel.number}: strongest on {labels[channel.label]}"
        note = ""
        if channel.selectivity is not None:
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
    told = (
        " Channels are chosen on one half of these images; what the class explains (epsilon "
        "squared) is of the other half."
    )
    if found[0].selectivity is None:
        told = " There are too few images of each class to say how much the class explains."
    reading = (
        f"The channels that tell classes apart best, and the training images (of {looked_at:,} "
        f"that were looked at) that excite each most, with their labels and what the channel "
        f"gave. {what}{told}"
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
            said = " Training has left them as they were."
        else:
            rows = [("before", other), ("after", weight)]
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


def _points(inputs: Inputs, network: Network, chosen: Sample) -> page.Points:
    """Return the map of images: where each lies, and what is known of it."""
    from scipy.special import softmax

    rows, found = chosen.rows[chosen.on_map], chosen.features[chosen.on_map]
    fitted = set(inputs.fitted.rows.tolist())
    number = {label: n for n, label in enumerate(inputs.data.labels)}
    predicted, logits = embedding.answers(network, found)
    logits = logits / np.float32(inputs.bundle.provenance["temperature"])
    probabilities = softmax(logits, axis=1).max(axis=1)
    shipped = {answer.row: answer for answer in inputs.answers}
    for place, row in enumerate(rows.tolist()):
        if row in shipped:  # what ships counts, down to its rounding
            predicted[place] = shipped[row].predicted
            probabilities[place] = shipped[row].probability
    return page.Points(
        labels=inputs.data.labels,
        places=embedding.place(found),
        paths=[inputs.rows[row].path for row in rows],
        splits=[inputs.rows[row].split for row in rows],
        is_fitted=[row in fitted for row in rows.tolist()],
        label=[number[inputs.rows[row].label] for row in rows],
        answer=predicted.tolist(),
        probability=probabilities.tolist(),
        suggested=[inputs.issues.get(row, -1) for row in rows.tolist()],
        squares=inputs.squares,
        rows=rows,
        total=chosen.total,
        tested=len(inputs.answers),
        accuracy=inputs.accuracy,
        issues=len(inputs.issues),
    )
