"""Training and embedding on a GPU: ``python benchmarks/gpu.py [--backbone NAME] [--batch 256]``.

Images per second and share of the chip's peak: tlpipe's step against timm's and torchvision's
training loops, which decode photographs in worker processes, and a loop tuned by hand whose images
lie on the GPU; and the frozen forward against a bare compiled one. Weights are random and pictures
are made: neither changes what a step costs. Measured in turns. It runs on a CPU too, to see that it
does: ``--batch 4 --images 60 --steps 2``.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tlpipe.backbones.backbone import describe
from tlpipe.backbones.forward import open_forward
from tlpipe.backbones.weights import Weights
from tlpipe.data import pixels
from tlpipe.graph import PATHS
from tlpipe.project import Project
from tlpipe.training import model as datasets
from tlpipe.training import trainer, tuning
from tlpipe.training.batches import batches
from tlpipe.training.recipe import Recipe
from tlpipe.training.tuning import training_device

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 10
ROUNDS = 3
SIDE = 224
Step = Callable[[], object]


@dataclass(frozen=True)
class Given:
    """What was asked for; ``photos`` holds class folders, ``work`` what tlpipe made of them."""

    backbone: str
    batch: int
    steps: int
    workers: int
    device: torch.device
    photos: Path
    work: Path


def make_photographs(folder: Path, images: int) -> None:
    """Write JPEGs of 500 x 375 that cost as much to decode as photographs do."""
    random = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = folder / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def prepare(given: Given) -> None:
    """Run the stages up to ``embed``, with nothing frozen."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    seen = describe(given.backbone).preprocessing
    sampling = {"short_side_px": seen.short_side_px, "interpolation": seen.interpolation}
    params["ingest"] |= {"source": str(given.photos)} | sampling
    params["embed"] |= {"backbone": given.backbone, "weights": "none", "freeze": "none"}
    (given.work / "params.yaml").write_text(yaml.safe_dump(params))
    Project(given.work).generate()
    for stage in ("ingest", "split", "embed"):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "tlpipe", stage]
        subprocess.run(words, cwd=given.work, check=True, env=environment)


def repeated(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever."""
    while True:
        yield from loader


def with_timm(given: Given) -> Step:
    """Return a step of timm's train.py with its defaults, as its documentation starts it."""
    model = timm.create_model(given.backbone.removeprefix("timm/"), num_classes=CLASSES)
    model.to(given.device).train()
    loader = create_loader(
        create_dataset("", root=str(given.photos)),
        input_size=(3, SIDE, SIDE),
        batch_size=given.batch,
        is_training=True,
        use_prefetcher=given.device.type == "cuda",
        num_workers=given.workers,
        device=given.device,
    )
    optimiser = create_optimizer_v2(model, "sgd", lr=0.05, momentum=0.9, weight_decay=2e-5)
    loss = LabelSmoothingCrossEntropy(0.1)
    source = repeated(loader)

    def step() -> None:
        images, labels = next(source)
        found = loss(model(images.to(given.device)), labels.to(given.device))
        optimiser.zero_grad()
        found.backward()
        optimiser.step()

    return step


def with_torchvision(given: Given) -> Step:
    """Return a step of torchvision's references/classification/train.py with its defaults."""
    model = torchvision.models.get_model(given.backbone, num_classes=CLASSES)
    model.to(given.device).train()
    shown = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.ToPureTensor(),
        ]
    )
    images = torchvision.datasets.ImageFolder(str(given.photos), shown)
    pinned = given.device.type == "cuda"
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        images, given.batch, shuffle=True, num_workers=given.workers, pin_memory=pinned
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss = nn.CrossEntropyLoss()
    source = repeated(loader)

    def step() -> float:
        pictures, labels = next(source)
        pictures = pictures.to(given.device, non_blocking=True)
        labels = labels.to(given.device, non_blocking=True)
        found = loss(model(pictures), labels)
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        return float(found.detach())

    return step


def by_hand(given: Given) -> Step:
    """Return a step with all that is known to help: compiled, bf16, images on the GPU."""
    model = torchvision.models.get_model(given.backbone, num_classes=CLASSES)
    model.to(given.device, memory_format=torch.channels_last).train()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model)
    squares = pixels.load(given.work / PATHS["pixels"]).array
    resident = torch.from_numpy(squares[range(len(squares))]).to(given.device)
    labels = torch.arange(len(resident), device=given.device) % CLASSES
    on_gpu = given.device.type == "cuda"
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    mean = torch.tensor([0.485, 0.456, 0.406], device=given.device).reshape(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225], device=given.device).reshape(3, 1, 1) * 255

    def step() -> None:
        rows = torch.randint(len(resident), (given.batch,), device=given.device)
        top, left = torch.randint(resident.shape[1] - SIDE + 1, (2,)).tolist()
        cut = resident[rows, top : top + SIDE, left : left + SIDE].permute(0, 3, 1, 2)
        if torch.rand(()) < 0.5:
            cut = cut.flip(3)
        pictures = ((cut - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(given.device.type, torch.bfloat16, enabled=on_gpu):
            found = nn.functional.cross_entropy(compiled(pictures), labels[rows])
        optimiser.zero_grad()
        found.backward()
        optimiser.step()

    return step


def with_tlpipe(given: Given, batch_norm: str) -> Step:
    """Return a step of ours, with the stages as ``train`` opens them."""
    epochs = 10**6  # enough to compile
    recipe = Recipe.model_validate(
        {"epochs": epochs, "batch": given.batch, "batch_norm": batch_norm}
    )
    data = datasets.load_dataset(given.work / PATHS["activations"], given.work / PATHS["split"])
    task, _ = tuning.prepare(data, given.work / PATHS["pixels"], recipe)
    training = trainer.Training(task, recipe, None)
    training.model.open_last(len(training.model.stages))
    training.set_learning_rates(0.01)

    def orders() -> Iterator[np.ndarray]:
        for epoch in count():
            drawn = batches(data.train, size=len(data.train), seed=0, epoch=epoch, weights=None)[0]
            yield np.resize(drawn, given.batch)

    source, number = orders(), count()
    return lambda: training.take_step(next(source), next(number))


def forwards(given: Given) -> tuple[Step, Step]:
    """Return what embeds a batch: ours, and a bare compiled forward on what lies there already."""
    backbone = describe(given.backbone)
    ours = open_forward(backbone, Weights(None, ""), [backbone.stages[-1].name], threads=2)
    side = backbone.preprocessing.crop_px
    squares = pixels.load(given.work / PATHS["pixels"]).array
    pictures = np.resize(
        squares[range(min(len(squares), given.batch))], (given.batch, *squares.shape[1:])
    )
    pictures = np.ascontiguousarray(pictures[:, :side, :side])
    model = torchvision.models.get_model(given.backbone, num_classes=CLASSES).eval()
    model.to(given.device, memory_format=torch.channels_last)
    compiled: Callable[[Tensor], Tensor] = torch.compile(model)
    there = torch.from_numpy(pictures).to(given.device).permute(0, 3, 1, 2)
    on_gpu = given.device.type == "cuda"

    def bare() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(given.device.type, torch.bfloat16, enabled=on_gpu),
        ):
            compiled(there.float() / 255)

    def own() -> None:
        for start in range(0, given.batch, ours.batch):
            ours.compute(pictures[start : start + ours.batch])

    return own, bare


def speeds(given: Given, *tasks: Step) -> list[float]:
    """Run steps in turns; return the median images per second of each."""

    def wait() -> None:
        if given.device.type == "cuda":
            torch.cuda.synchronize()

    found: list[list[float]] = [[] for _ in tasks]
    for _ in range(ROUNDS):
        for task, rates in zip(tasks, found, strict=True):
            for _ in range(max(given.steps // 4, 1)):
                task()
            wait()
            start = time.perf_counter()
            for _ in range(given.steps):
                task()
            wait()
            rates.append(given.steps * given.batch / (time.perf_counter() - start))
    return [statistics.median(rates) for rates in found]


def flops(backbone: str) -> float:
    """Return the floating-point operations of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        torchvision.models.get_model(backbone)(torch.zeros(1, 3, SIDE, SIDE))
    return float(counter.get_total_flops())


def main() -> None:
    """Print the tables."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="resnet50", help="One of torchvision's.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peak", type=float, default=989, help="Dense bf16 TFLOP/s of the chip.")
    asked = parser.parse_args()
    device = training_device(0)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    title = f"{asked.backbone}, {SIDE} px, batch {asked.batch}, {chip}, torch {torch.__version__}"
    table = Table("what", "images/s", "share of peak", "tlpipe is", "goal", "reached", title=title)
    with tempfile.TemporaryDirectory() as name:
        photos, work = Path(name, "photos"), Path(name, "work")
        work.mkdir()
        make_photographs(photos, asked.images)
        given = Given(asked.backbone, asked.batch, asked.steps, asked.workers, device, photos, work)
        prepare(given)
        tasks = {
            "tlpipe, statistics kept (photographs)": (with_tlpipe(given, "pretrained"), None),
            "tlpipe, statistics of batches": (with_tlpipe(given, "batch"), None),
            "timm's loop": (with_timm(given), 2.0),
            "torchvision's loop": (with_torchvision(given), 2.0),
            "tuned by hand, images on the device": (by_hand(given), 1.2),
        }
        found = speeds(given, *(task for task, _ in tasks.values()))
        work_of_a_step = 3 * flops(given.backbone)  # backward counts twice
        for (what, (_, goal)), speed in zip(tasks.items(), found, strict=True):
            share = f"{speed * work_of_a_step / asked.peak / 1e12:.1%}"
            ratio = found[0] / speed
            reached = ("", "") if goal is None else (f">= {goal:g}", _yes(ratio >= goal))
            table.add_row(what, f"{speed:.0f}", share, f"{ratio:.2f} x", *reached)
        own, bare = speeds(given, *forwards(given))
        share = f"{own * flops(given.backbone) / asked.peak / 1e12:.1%}"
        goal_cells = (f"{bare / own:.2f} x slower", "<= 1.3", _yes(bare / own <= 1.3))
        table.add_row("frozen forward, of a bare compiled one", f"{own:.0f}", share, *goal_cells)
    Console(width=110).print(table)


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


if __name__ == "__main__":
    main()
