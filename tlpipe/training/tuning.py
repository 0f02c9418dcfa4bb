"""Set up fine-tuning: the processes that share it, a classifier with its head solved, its feed.

Processes are those that ``torchrun`` starts; each has a device of its own.
"""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tlpipe import runtime
from tlpipe.backbones.backbone import load_network
from tlpipe.backbones.weights import Weights
from tlpipe.code_digest import of_modules, versions
from tlpipe.data import pixels as packed
from tlpipe.errors import ArtifactError, ParamsError, TrainingError
from tlpipe.held_out import HeldOut
from tlpipe.training import checkpoint, distributed, linear_probe, trainer
from tlpipe.training.batches import Feed, Photos, StoredActivations, batches
from tlpipe.training.checkpoint import Checkpoints
from tlpipe.training.classifier import (
    Classifier,
    build,
    fold_batch_norms,
    open_part,
    restore,
    synchronise_batch_norms,
)
from tlpipe.training.model import Dataset, Examples, Learned, Model, Step
from tlpipe.training.recipe import Recipe
from tlpipe.training.trainer import Task, autocast, predict

_log = logging.getLogger(__name__)
# All code that has a part in the weights: a training resumes only where it is what it was.
_CODE = (
    "tlpipe.resampling",
    "tlpipe.data.images",
    "tlpipe.data.pixels",
    "tlpipe.backbones.augment",
    "tlpipe.backbones.backbone",
    "tlpipe.backbones.batchnorm",
    "tlpipe.backbones.stages",
    "tlpipe.backbones.weights",
    *(
        f"tlpipe.training.{name}"
        for name in (
            *("batches", "classifier", "distributed", "linear_probe", "model"),
            *("recipe", "trainer", "tuning"),
        )
    ),
    "tlpipe.runtime",
)
_PACKAGES = ("numpy", "scipy", "timm", "torch", "torchvision")
_BLOCK = 64
# The others wait while the first one solves the head. torchrun ends all where one has died.
_TIMEOUT = timedelta(hours=2)
# Digits differ by more than twice as much, photographs of hands a little more, of insects less.
_SHIFT = 0.1


def tune(
    data: Dataset,
    pixels: Path,
    checkpoints: Path,
    recipe: Recipe,
    record: Callable[[Sequence[Step]], None],
) -> tuple[Learned, Checkpoints]:
    """Solve the head where it is linear, then train all that is open from there.

    ``record`` is given the start and every epoch so far, after each. Returns: what was learned, and
    the checkpoints, to be cleared once it is saved.

    Raises:
        Interrupted: somebody asked to stop; the next call resumes from there.
        TrainingError: training cannot go on.
    """
    with (
        checkpoint.out_of_memory_explained(less_memory(recipe)),
        process_group() as (rank, count),
    ):
        _check_shares(len(data.train), recipe, count)
        task, l2 = prepare(data, pixels, recipe, rank, count)
        digest = digest_of(data, recipe, task)
        check_same(digest, rank)
        kept = Checkpoints(checkpoints, digest)
        epochs = trainer.fine_tune(task, recipe, kept, record)
        best = trainer.best_of(epochs, recipe)
        tensors = task.classifier.stages.state_dict()
        learned = Learned(
            stages={name: tensor.cpu().numpy() for name, tensor in tensors.items()},
            head=task.classifier.folded_head(),
            l2=l2,
            epoch=best,
            first=0,
            steps=epochs,
            kept=epochs[best],
            held_out=_held_out(task),
        )
        return learned, kept


def less_memory(recipe: Recipe) -> str:
    """Say what to change where memory is short."""
    size = recipe.batch_size_for(10**9)
    smaller = f"Lower train.batch_size, now {size}, or freeze" if size > 1 else "Freeze"
    return f"{smaller} more in embed.freeze."


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the process group, if there is one; yield this process's rank and the world size."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


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
    first one's weights are right; ``trainer.Training.begin`` gives them to the others.

    Raises:
        ParamsError: ``batch_norm`` is set and no open layer is one.
    """
    runtime.keep_freed()
    torch.set_num_threads(data.activations.origin.threads)
    device = training_device(local_rank())
    classifier = _start(data, recipe).eval().to(device)
    classifier.to(memory_format=torch.channels_last)
    feed = _feed(data, pixels, device)
    l2 = None
    if rank == 0:
        choose_batch_stats(classifier, feed, data.train, recipe)
        l2 = _solve_head(classifier, feed, data, recipe)
    l2, classifier.uses_batch_stats = distributed.broadcast((l2, classifier.uses_batch_stats))
    if not classifier.uses_batch_stats:
        fold_batch_norms(classifier.stages, feed.plain(data.train.rows[:2]))
    elif count > 1:
        synchronise_batch_norms(classifier, device)
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


def local_rank() -> int:
    """Return this process's number among those on this machine; torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def training_device(rank: int) -> torch.device:
    """Return the device of one of the processes on this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
            f"{pixels} holds other images than the activations are of. Run 'tlpipe run'."
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
        classifier.standardise(linear_probe.standardisation(read(data.train.rows, True)))
        return None
    found = linear_probe.fit(read, data, data.train, recipe)
    classifier.standardise(found.standard)
    classifier.solve(found.head)
    return found.best.l2


def _computed(classifier: Classifier, feed: Feed) -> linear_probe.Read:
    """Return what computes features with the open stages as they are."""

    def read(rows: npt.NDArray[np.int64], every_view: bool) -> Iterator[linear_probe.Floats]:  # noqa: ARG001
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


def answers(
    data: Dataset, model: Model, pixels: Path, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return what a fine-tuned model answers for images: logits (N, C)."""
    torch.set_num_threads(data.activations.origin.threads)
    device = training_device(local_rank())
    origin, backbone = data.activations.origin, data.backbone
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    classifier = restore(backbone, weights, model).to(device)
    classifier.to(memory_format=torch.channels_last)
    task = Task(
        classifier=classifier,
        feed=_feed(data, pixels, device),
        train=data.train,
        validation=data.validation,
        classes=len(data.labels),
        device=device,
    )
    return torch.cat(list(predict(task, classifier, rows))).float().numpy()


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
