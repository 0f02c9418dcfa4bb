"""Set up fine-tuning: the classifier with its head solved, and what feeds it."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tlpipe import allocator
from tlpipe.backbones.backbone import load_network
from tlpipe.backbones.device import training_device
from tlpipe.backbones.weights import Weights
from tlpipe.code_digest import of_modules, versions
from tlpipe.data import pixels as packed
from tlpipe.errors import ArtifactError, ParamsError, TrainingError
from tlpipe.held_out import HeldOut
from tlpipe.training import batchnorm, distributed, linear_probe, loop, signals
from tlpipe.training import head as heads
from tlpipe.training.batches import Feed, Photos, StoredActivations, batches
from tlpipe.training.checkpoint import Checkpoints
from tlpipe.training.classifier import Classifier, build, open_part
from tlpipe.training.dataset import Dataset, Examples
from tlpipe.training.model import Learned
from tlpipe.training.recipe import Recipe
from tlpipe.training.task import Task, autocast, predict

_log = logging.getLogger(__name__)
# All code that has a part in the weights: a training resumes only where it is what it was.
_CODE = (
    "tlpipe.data.chunks",
    "tlpipe.data.folds",
    "tlpipe.data.images",
    "tlpipe.data.pixels",
    "tlpipe.backbones.augment",
    "tlpipe.backbones.backbone",
    "tlpipe.backbones.stages",
    "tlpipe.backbones.weights",
    *(
        f"tlpipe.training.{name}"
        for name in (
            *("batches", "batchnorm", "classifier", "dataset", "distributed", "head"),
            *("linear_probe", "loop", "optimiser", "recipe", "schedule", "task", "tuning"),
        )
    ),
    "tlpipe.seeds",
)
_PACKAGES = ("numpy", "scipy", "timm", "torch", "torchvision")
_BLOCK = 64
# Digits differ by more than twice as much, photographs of hands a little more, of insects less.
_SHIFT = 0.1


def tune(
    data: Dataset,
    pixels: Path,
    checkpoints: Path,
    recipe: Recipe,
    record: Callable[[Sequence[heads.Step]], None],
) -> Learned:
    """Solve the head where it is linear, then train all that is open from there.

    ``record`` is given the start and every epoch so far, after each.

    Raises:
        Interrupted: somebody asked to stop; the next call resumes from there.
        TrainingError: training cannot go on.
    """
    with signals.out_of_memory_explained(recipe), distributed.process_group() as (rank, count):
        _check_shares(len(data.train), recipe, count)
        task, l2 = prepare(data, pixels, recipe, rank, count)
        digest = digest_of(data, recipe, task)
        check_same(digest, rank)
        kept = Checkpoints(checkpoints, digest)
        epochs = loop.fine_tune(task, recipe, kept, lambda epochs: record(_steps(epochs)))
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


def check_same(digest: str, rank: int) -> None:
    """Check that all processes train the same.

    Raises:
        TrainingError: this one does not train what the first one does.
    """
    if (first := distributed.broadcast(digest)) != digest:
        raise TrainingError(
            f"process {rank} has other data, parameters or code than process 0 (digests "
            f"{digest[:12]} and {first[:12]}); expected the same in all. Copy params.yaml and the "
            f"outputs of embed to every machine, and install the same versions there."
        )


def _check_shares(images: int, recipe: Recipe, count: int) -> None:
    """Check that every process has an image in every step.

    Raises:
        ParamsError: steps are too small.
    """
    size = recipe.batch_size_for(images)
    if (least := images // -(-images // size)) < count:
        raise ParamsError(
            f"train.batch_size is {size}; {images} training images are steps of {least} and more, "
            f"too few for {count} processes. Raise it to at least {2 * count}, or start fewer."
        )


def prepare(
    data: Dataset, pixels: Path, recipe: Recipe, rank: int = 0, count: int = 1
) -> tuple[Task, float | None]:
    """Return what is trained with its head solved, and the l2 that was picked for that.

    A head with hidden units is left as it was drawn, and has none. Of several processes only the
    first one's weights are right; ``loop.Training.begin`` gives them to the others.

    Raises:
        ParamsError: ``batch_norm`` is set and no open layer is one.
    """
    allocator.keep_freed()
    torch.set_num_threads(data.activations.origin.threads)
    device = training_device(distributed.local_rank())
    classifier = _start(data, recipe).eval().to(device)
    classifier.to(memory_format=torch.channels_last)
    feed = _feed(data, pixels, device)
    l2 = None
    if rank == 0:
        choose_batch_stats(classifier, feed, data.train, recipe)
        l2 = _solve_head(classifier, feed, data, recipe)
    l2, classifier.uses_batch_stats = distributed.broadcast((l2, classifier.uses_batch_stats))
    if not classifier.uses_batch_stats:
        batchnorm.fold(classifier.stages, feed.plain(data.train.rows[:2]))
    elif count > 1:
        batchnorm.synchronise(classifier, device)
    task = Task(
        classifier=classifier,
        feed=feed,
        train=data.train,
        validation=data.validation,
        classes=len(data.labels),
        device=device,
        rank=rank,
        world_size=count,
    )
    return task, l2


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


def choose_batch_stats(classifier: Classifier, feed: Feed, train: Examples, recipe: Recipe) -> None:
    """Choose pretrained or batch statistics for the open BatchNorm layers.

    Pretrained statistics misjudge images of another kind; those of few images are worse than those
    of a million, where the images are alike. So they are estimated anew over the training images,
    and kept where ``batch_norm`` says so or where spreads differ by more than e^``_SHIFT``.

    Raises:
        ParamsError: ``batch_norm`` is set and no open layer is one.
    """
    if recipe.batch_norm != "auto" and not classifier.batch_norms:
        raise ParamsError(
            f"train.batch_norm is {recipe.batch_norm}; no open stage has a BatchNorm layer. Take "
            f"it out of params.yaml."
        )
    if recipe.batch_norm == "pretrained" or not classifier.batch_norms:
        return
    pretrained = copy.deepcopy(classifier.stages.state_dict())
    order = batches(train, size=_BLOCK, seed=recipe.seed, epoch=-1, weights=None)
    shift = classifier.adapt(feed.plain(train.rows[places]) for places in order)
    batch_stats = recipe.batch_norm == "batch" or shift > _SHIFT
    whose = "of these images" if batch_stats else "as pretrained"
    _log.info("BatchNorm: statistics %s, where spreads differ by e^%.2f", whose, shift)
    if not batch_stats:
        classifier.stages.load_state_dict(pretrained)
        classifier.uses_batch_stats = False


def _solve_head(classifier: Classifier, feed: Feed, data: Dataset, recipe: Recipe) -> float | None:
    """Standardise features as the open stages give them, solve the head, return its l2.

    A head with hidden units is not solved, and has none.
    """
    is_changed = classifier.uses_batch_stats or recipe.reinitialise
    read = _computed(classifier, feed) if is_changed else linear_probe.stored(data)
    if recipe.hidden:
        classifier.standardise(heads.standardisation(read(data.train.rows, True)))
        return None
    found = linear_probe.fit(read, data, data.train, recipe)
    classifier.standardise(found.standard)
    classifier.solve(found.head)
    return found.best.l2


def _computed(classifier: Classifier, feed: Feed) -> linear_probe.Read:
    """Return what computes features with the open stages as they are."""

    def read(rows: npt.NDArray[np.int64], every_view: bool) -> Iterator[heads.Floats]:  # noqa: ARG001
        classifier.eval()
        for start in range(0, len(rows), _BLOCK):
            with torch.inference_mode(), autocast(classifier.mean.device):
                features = classifier.stages(feed.plain(rows[start : start + _BLOCK]))
            yield features.cpu().double().numpy()  # in this order: MPS has no float64

    return read


def _held_out(task: Task) -> HeldOut:
    """Return what the trained classifier answers for the validation split."""
    rows, labels = task.validation.rows, task.validation.labels
    logits = torch.cat(list(predict(task, task.classifier, rows))).float().numpy()
    return HeldOut(rows, labels, logits, np.zeros_like(rows))


def _steps(epochs: Sequence[loop.Epoch]) -> list[heads.Step]:
    return [
        heads.Step(
            epoch.train_loss,
            epoch.validation.loss,
            epoch.validation.accuracy,
        )
        for epoch in epochs
    ]


def digest_of(data: Dataset, recipe: Recipe, task: Task) -> str:
    """Return a sha256 of all that the weights depend on, step by step."""
    parts = [
        data.digest,
        recipe.model_dump_json(exclude={"checkpoint_minutes"}),
        f"{task.device.type} {task.world_size}",
        of_modules(*_CODE),
        str(versions(*_PACKAGES)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
