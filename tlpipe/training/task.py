"""The training task (classifier, data, device), and its metrics on a split."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tlpipe.training import distributed
from tlpipe.training.batches import Feed
from tlpipe.training.classifier import Classifier
from tlpipe.training.dataset import Examples


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where; ``rank`` of ``world_size`` processes."""

    classifier: Classifier
    feed: Feed
    train: Examples
    validation: Examples
    classes: int
    device: torch.device
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Measured:
    """Of one split: the mean loss in nats, and metrics in [0, 1]."""

    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float


def evaluate(task: Task, model: Classifier, examples: Examples) -> Measured:
    """Measure a classifier on images as they are; every process computes its share."""
    loss = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(3, task.classes, dtype=torch.float64)
    own = np.array_split(np.arange(len(examples)), task.world_size)[task.rank]
    done = 0
    for logits in predict(task, model, examples.rows[own]):
        labels = torch.from_numpy(examples.labels[own[done : done + len(logits)]])
        done += len(logits)
        loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        answered = logits.argmax(1)
        of_class = (labels[labels == answered], labels, answered)
        counts += torch.stack([torch.bincount(of, minlength=task.classes) for of in of_class])
    distributed.all_reduce(loss)
    distributed.all_reduce(counts)
    return measured(float(loss), counts.numpy())


def predict(task: Task, model: Classifier, rows: npt.NDArray[np.int64]) -> Iterator[Tensor]:
    """Yield logits (n, C) of images as they are, on the CPU, float32 or wider, batch by batch."""
    model.eval()
    size = 64 if task.device.type == "cuda" else 16
    for start in range(0, len(rows), size):
        with torch.inference_mode(), autocast(task.device):
            logits = model(task.feed.plain(rows[start : start + size])).cpu()
        yield logits.to(torch.promote_types(logits.dtype, torch.float32))


def measured(loss_sum: float, counts: npt.NDArray[np.float64]) -> Measured:
    """Return the metrics; classes without images do not count.

    ``counts``: (3, C), of each class the right answers, the images, and the answers that name it.
    """
    hits, true, answered = counts
    count, present = true.sum(), true > 0
    f1 = 2 * hits[present] / (true + answered)[present]
    return Measured(
        loss=float(loss_sum / count),
        accuracy=float(hits.sum() / count),
        balanced_accuracy=float((hits[present] / true[present]).mean()),
        macro_f1=float(f1.mean()),
    )


def autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast on CUDA, and a context without effect elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
