"""Set up fine-tuning: the classifier with its head solved, and what feeds it."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tlpipe import allocator, files
from tlpipe.data import pixels as packed
from tlpipe.errors import ArtifactError
from tlpipe.features.backbone import load_network
from tlpipe.features.device import training_device
from tlpipe.features.weights import Weights
from tlpipe.held_out import HeldOut
from tlpipe.learning import endings, loop, norms, probe, processes
from tlpipe.learning import head as heads
from tlpipe.learning.batches import Feed, Photos, StoredActivations, batches
from tlpipe.learning.checkpoint import Checkpoints
from tlpipe.learning.classifier import Classifier, build, open_part
from tlpipe.learning.dataset import Dataset, Numbers
from tlpipe.learning.model import Learned
from tlpipe.learning.recipe import Recipe
from tlpipe.learning.task import Task, autocast

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy")
_BLOCK = 64
# Digits differ by more than twice as much, photographs of hands a little more, of insects less.
_SHIFT = 0.1


def tune(
    data: Dataset,
    pixels: Path,
    checkpoints: Path,
    recipe: Recipe,
    note: Callable[[Sequence[heads.Step]], None],
) -> Learned:
    """Solve the head where it is linear, then train all that is open from there.

    ``note`` is given the start and every epoch so far, after each.

    Raises:
        Interrupted: somebody asked to stop; the next call goes on from there.
        TrainingError: training cannot go on.
    """
    with endings.explained(recipe), processes.joined() as (rank, count):
        task, l2 = prepare(data, pixels, recipe, rank, count)
        kept = Checkpoints(checkpoints, _digest(data, recipe, task))
        epochs = loop.fine_tune(task, recipe, kept, lambda epochs: note(_steps(epochs)))
        best = loop.best_of(epochs, recipe)
        tensors = task.classifier.stages.state_dict()
        return Learned(
            stages={name: tensor.cpu().numpy() for name, tensor in tensors.items()},
            head=task.classifier.folded_head(),
            l2=l2,
            epoch=best.epoch,
            first=0,
            steps=_steps(epochs),
            kept=_steps([best])[0],
            held_out=_held_out(task),
        )


def prepare(
    data: Dataset, pixels: Path, recipe: Recipe, rank: int = 0, count: int = 1
) -> tuple[Task, float | None]:
    """Return what is trained with its head solved, and the l2 that was picked for that.

    A head with hidden units is left as it was drawn, and has none.
    """
    allocator.keep_freed()
    torch.set_num_threads(data.activations.origin.threads)
    device = training_device(rank)
    classifier = _start(data, recipe).eval().to(device)
    classifier.to(memory_format=torch.channels_last)
    feed = _feed(data, pixels, device)
    l2 = _solve_head(classifier, feed, data, recipe)
    if not classifier.trains_by_batch:
        norms.fold(classifier.stages, feed.plain(data.train.rows[:2]))
    elif count > 1:
        norms.share_statistics(classifier)
    task = Task(
        classifier=classifier,
        feed=feed,
        train=data.train,
        validation=data.validation,
        classes=len(data.labels),
        rates=recipe.rates(data.backbone.name),
        device=device,
        rank=rank,
        processes=count,
    )
    return task, None if recipe.hidden else l2


def _start(data: Dataset, recipe: Recipe) -> Classifier:
    """Return the open stages with their weights, and a head that is drawn with the seed."""
    origin, backbone = data.activations.origin, data.backbone
    source = backbone.find_weights(origin.weights, origin.weights_sha256)
    stages = open_part(backbone, source, origin.boundary)
    if recipe.reinitialise:
        drawn = load_network(backbone, Weights(None, ""), seed=recipe.seed)
        for name, stage in list(drawn.named_children())[-recipe.reinitialise :]:
            stages.set_submodule(name, stage)
    width = backbone.stages[-1].shape[0]
    return build(stages, width, recipe.hidden, len(data.labels), recipe.seed)


def _feed(data: Dataset, pixels: Path, device: torch.device) -> Feed:
    found, origin = data.activations, data.activations.origin
    if origin.boundary:
        stored = found.features if found.boundary is None else found.boundary
        return StoredActivations(stored, device, has_views=found.boundary is not None)
    images = packed.load(pixels)
    if images.data_sha256 != origin.data_sha256:
        raise ArtifactError(
            f"{pixels} holds other images than the activations are of. Run 'dvc repro'."
        )
    return Photos(images.array, device, origin.preprocessing, origin.augmentation)


def _solve_head(classifier: Classifier, feed: Feed, data: Dataset, recipe: Recipe) -> float:
    """Settle which statistics BatchNorm goes by, solve the head for them, return its l2.

    Pretrained statistics misjudge images of another kind; those of few images are worse than those
    of a million, where the images are alike.
    """
    by_batch = False
    if recipe.batch_norm != "pretrained" and classifier.batch_norms:
        pretrained = copy.deepcopy(classifier.stages.state_dict())
        order = batches(data.train, size=_BLOCK, seed=recipe.seed, epoch=-1, weights=None)
        shift = classifier.adapt(feed.plain(data.train.rows[places]) for places in order)
        by_batch = recipe.batch_norm == "batch" or shift > _SHIFT
        whose = "of these images" if by_batch else "as pretrained"
        _log.info("BatchNorm: statistics %s, where spreads differ by e^%.2f", whose, shift)
        if not by_batch:
            classifier.stages.load_state_dict(pretrained)
            classifier.trains_by_batch = False
    read = _computed(classifier, feed) if by_batch or recipe.reinitialise else probe.stored(data)
    found = probe.fit(read, data, data.train, recipe)
    classifier.standardise(found.standard)
    if not recipe.hidden:
        classifier.solve(found.head)
    return found.best.l2


def _computed(classifier: Classifier, feed: Feed) -> probe.Read:
    """Return what computes features with the open stages as they are."""

    def read(rows: Numbers, every_view: bool) -> Iterator[heads.Floats]:  # noqa: ARG001
        classifier.eval()
        for start in range(0, len(rows), _BLOCK):
            with torch.inference_mode(), autocast(classifier.mean.device):
                features = classifier.stages(feed.plain(rows[start : start + _BLOCK]))
            yield features.double().cpu().numpy()

    return read


def _held_out(task: Task) -> HeldOut:
    """Return what the trained classifier answers for the validation split."""
    rows, labels = task.validation.rows, task.validation.labels
    task.classifier.eval()
    logits = []
    for start in range(0, len(rows), _BLOCK):
        with torch.inference_mode(), autocast(task.device):
            found = task.classifier(task.feed.plain(rows[start : start + _BLOCK]))
        logits.append(found.float().cpu().numpy())
    return HeldOut(rows, labels, np.concatenate(logits), np.zeros_like(rows))


def _steps(epochs: Sequence[loop.Epoch]) -> list[heads.Step]:
    return [
        heads.Step(
            epoch.train_loss,
            epoch.validation.loss,
            epoch.validation.accuracy,
        )
        for epoch in epochs
    ]


def _digest(data: Dataset, recipe: Recipe, task: Task) -> str:
    """Name all that the weights depend on, step by step."""
    folders = (Path(__file__).parent, Path(__file__).parent.with_name("features"))
    code = [files.sha256(path) for folder in folders for path in sorted(folder.glob("*.py"))]
    parts = [
        data.digest,
        recipe.model_dump_json(exclude={"checkpoint_minutes"}),
        f"{task.device.type} {task.processes}",
        *(f"{package} {version(package)}" for package in _PACKAGES),
        *code,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
