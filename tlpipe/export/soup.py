"""A model soup: the weights of several fine-tuned models of one architecture, averaged.

It costs no more to answer than one of them. Weights can be averaged where all began from the same
pretrained ones and have the same stages open and the same head.

Source: Wortsman et al. (2022), Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time, ICML.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.backbones.backbone import describe
from tlpipe.errors import ParamsError
from tlpipe.export import graph, pool
from tlpipe.export.graph import Logits, Sample
from tlpipe.held_out import HeldOut
from tlpipe.training.model import Model


@dataclass(frozen=True)
class Ingredient:
    """A trained model, by its name, and what it answers for images that it has not trained on."""

    name: str
    model: Model
    held: HeldOut


def check(ingredients: Sequence[Ingredient]) -> None:
    """Check that weights can be averaged.

    Raises:
        ParamsError: one was not fine-tuned, or not as the first one was.
    """
    for one in ingredients:
        if one.held.heads:
            raise ParamsError(
                f"{one.name} is a linear probe, and the mean of such weights is no more than the "
                f"mean of what they answer; expected versions that were fine-tuned. Leave --soup "
                f"out: the weights of an ensemble are fitted."
            )
    first, *others = ingredients
    for other in others:
        theirs, ours = _facts(other.model), _facts(first.model)
        if apart := [name for name in ours if theirs[name] != ours[name]]:
            what = "; ".join(f"{name} {theirs[name]} and {ours[name]}" for name in apart)
            raise ParamsError(
                f"the weights of {other.name} and {first.name} cannot be averaged: {what}; "
                f"expected the same. Leave --soup out, or name versions of one architecture."
            )


def _facts(model: Model) -> dict[str, str]:
    """Return what must be the same, in words."""
    origin = model.card.origin
    widths = (model.head[0][0].shape[1], *(weight.shape[0] for weight, _ in model.head))
    return {
        "backbone": origin.backbone,
        "pretrained weights": origin.weights_sha256[:16] or "none",
        "frozen up to": origin.boundary or "nothing",
        "head": " x ".join(map(str, widths)),
    }


def average(ingredients: Sequence[Ingredient], logits: Logits | None = None) -> Model:
    """Return the model of mean weights.

    Whole numbers, such as how many batches BatchNorm has seen, are the first one's.

    ``logits``: what it answers for the images held out, by which its card is written.
    """
    first = ingredients[0].model
    stages = {
        name: _mean([np.asarray(one.model.stages[name]) for one in ingredients])
        for name in first.stages
    }
    layers = zip(*(one.model.head for one in ingredients), strict=True)
    head = tuple(
        (_mean([weight for weight, _ in layer]), _mean([bias for _, bias in layer]))
        for layer in layers
    )
    facts: dict[str, Any] = {"soup": tuple(one.name for one in ingredients)}
    if logits is not None:
        facts |= _measured(logits, ingredients[0].held)
    return Model(first.card.model_copy(update=facts), stages, head)


def _measured(logits: Logits, held: HeldOut) -> dict[str, Any]:
    """Return what a card says of a training, for what was not trained but averaged."""
    return {
        "l2": None,
        "epoch": 0,
        "validation_accuracy": float((logits.argmax(axis=1) == held.labels).mean()),
        "validation_loss": pool.log_loss(pool.log_softmax(logits, 1.0), held.labels),
    }


def _mean(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if arrays[0].dtype.kind != "f":
        return arrays[0]
    total = reduce(np.add, (array.astype(np.float64) for array in arrays))
    mean: npt.NDArray[Any] = (total / len(arrays)).astype(arrays[0].dtype)
    return mean


def greedy(ingredients: Sequence[Ingredient], sample: Sample) -> tuple[list[int], Logits]:
    """Return the numbers of those that make the soup, the best first, and its logits (N, C).

    From the most accurate on images held out on, each is added where the soup is then no less
    accurate there: algorithm 1.

    ``sample``: the images held out, in the order of what the ingredients answer for them.
    """
    hits = [(one.held.logits.argmax(axis=1) == one.held.labels).mean() for one in ingredients]
    order = sorted(range(len(ingredients)), key=lambda number: -hits[number])
    chosen, best = order[:1], hits[order[0]]
    logits = ingredients[order[0]].held.logits
    for number in order[1:]:
        tried = [*chosen, number]
        found = _answers(average([ingredients[one] for one in tried]), sample)
        if (accuracy := (found.argmax(axis=1) == sample.truth).mean()) >= best:
            chosen, best, logits = tried, accuracy, found
    return chosen, logits


def _answers(model: Model, sample: Sample) -> Logits:
    """Return the logits (N, C) of a model for a sample, in ONNX Runtime."""
    origin = model.card.origin
    backbone = describe(origin.backbone)
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    whole = graph.classifier(backbone, weights, model).SerializeToString()
    what = f"the mean of {len(model.card.soup)}"
    return graph.compute_logits(graph.in_onnx(whole, origin.threads), sample, what)
