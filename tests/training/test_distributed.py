"""Several processes that train together, in float64: what is equal but for rounding is equal."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from tests.conftest import Workspace
from tests.training import tiny
from tests.training.conftest import beside
from tlpipe.errors import Interrupted, TrainingError
from tlpipe.graph import PATHS
from tlpipe.training import classifier, trainer, tuning
from tlpipe.training.checkpoint import Checkpoint, Checkpoints, Stop
from tlpipe.training.recipe import Recipe
from tlpipe.training.trainer import Task
from tlpipe.training.tuning import local_rank

LABELS = [0, 0, 0, 1, 1] * 3  # three batches of five, shared out as three and two


class Drawing(nn.Module):
    """Draws a number in every step, as dropout and stochastic depth do."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return x


class Stopping(tiny.Rows):
    """Asks to stop in one step; 0: in none."""

    def __init__(self, inputs: Tensor, stop: Stop, step: int) -> None:
        super().__init__(inputs)
        self._stop, self._step = stop, step

    def augmented(self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Tensor:
        self._stop.requested = len(self.trained) + 1 == self._step
        return super().augmented(rows, uniforms)


def trained(
    folder: Path, options: dict[str, Any], rank: int = 0, count: int = 1, stop_in: int = 0
) -> dict[str, Tensor]:
    """Train; return every tensor that changes, what was drawn and how many steps were taken."""
    options = dict(options)
    batch_stats = options.pop("batch_stats", False)
    processes = {"rank": rank, "world_size": count}
    given = tiny.task(LABELS, dtype=torch.float64, batch_stats=batch_stats, **processes)
    drawing, stop = Drawing(), Stop()
    given.classifier.stages.append(drawing)
    # The first process counts; what others start from must not.
    for tensor in given.classifier.state_dict().values() if rank else ():
        tensor.add_(1)
    if batch_stats and count > 1:
        classifier.synchronise_batch_norms(given.classifier, tiny.CPU)
    feed = Stopping(given.feed.inputs, stop, stop_in)  # type: ignore[attr-defined]
    task = Task(
        **{name: getattr(given, name) for name in Task.__dataclass_fields__} | {"feed": feed}
    )
    recipe = Recipe(
        **{"epochs": 3, "batch_size": 5, "backbone_lr": 0.01, "head_lr": 0.01} | options
    )
    training = trainer.Training(task, recipe, Checkpoints(folder / f"disk {rank}", "digest"))
    training.begin()
    try:
        while not training.is_over:
            training.train_epoch(stop)
            training.end_epoch()
    except Interrupted:
        assert stop_in or count > 1
    tensors = {f"model.{n}": t for n, t in training.model.state_dict().items()}
    if training.ema is not None:
        tensors |= {f"ema.{n}": t for n, t in training.ema.module.state_dict().items()}
    for number, state in training.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{n}": t for n, t in state.items() if t is not None}
    losses = [epoch.validation.loss for epoch in training.state.history]
    more = {"drawn": torch.tensor(drawing.drawn), "losses": torch.tensor(losses)}
    more["steps"] = torch.tensor(len(feed.trained))
    return {n: t.contiguous() for n, t in tensors.items()} | more


def train_share(rank: int, folder: Path, options: dict[str, Any], stops: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    (folder / f"store {stops}").touch()
    store = dist.FileStore(str(folder / f"store {stops}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = trained(folder, options, rank, 2, stops[rank])
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def in_two_processes(function: Callable[..., None], *arguments: object) -> None:
    """Call it with the ranks 0 and 1; forked from a process that has imported torch and no more.

    A fork of this one, in which some test may have computed gradients, could compute none.
    """
    multiprocessing.set_forkserver_preload(["tests.training.tiny", "tlpipe.training.tuning"])
    start_processes(function, arguments, nprocs=2, start_method="forkserver")


def together(
    folder: Path, options: dict[str, Any], stops: tuple[int, int] = (0, 0)
) -> list[dict[str, Tensor]]:
    """Train in two processes; return what each of them comes to."""
    folder.mkdir(exist_ok=True)
    in_two_processes(train_share, folder, options, stops)
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.fault("T20")
@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "sgd"},
        {"optimiser": "sgd", "batch_stats": True, "max_grad_norm": 0.01},
        {"batch_stats": True, "ema_decay": 0.9, "balance": "loss", "weight_decay": 0.1},
        {"unfreeze_epochs": 1, "balance": "sampling", "label_smoothing": 0.0},
    ],
    ids=str,
)
def test_two_processes_learn_what_one_does(options: dict[str, Any], tmp_path: Path) -> None:
    """Over uneven shares, and although the second process starts from other weights."""
    first, second = together(tmp_path, options)
    alone = trained(tmp_path / "alone", options)
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in alone.items():
        if name == "drawn":
            continue
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].double(), tensor.double(), rtol=1e-7, atol=1e-9), name
    assert int(first["steps"]) == 9
    # The first process draws what a single one draws, the second one other masks.
    assert torch.equal(first["drawn"], alone["drawn"])
    assert not (first["drawn"] == second["drawn"]).any()


@pytest.mark.fault("T20")
@pytest.mark.parametrize("mixup", ["mixup", "cutmix"])
def test_both_processes_have_one_model_where_shares_are_mixed(mixup: str, tmp_path: Path) -> None:
    first, second = together(tmp_path, {"mixup": mixup, "batch_stats": True, "ema_decay": 0.9})
    for name in first.keys() - {"drawn"}:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.fault("T01", "T20")
@pytest.mark.parametrize("other_disk", ["nothing", "an older checkpoint"])
def test_the_first_process_s_checkpoint_is_resumed_by_all(other_disk: str, tmp_path: Path) -> None:
    """Without a shared file system; asked to stop is the second process alone."""
    options = {"batch_stats": True, "ema_decay": 0.9, "mixup": "mixup"}
    undisturbed = together(tmp_path / "undisturbed", options)
    stopped = together(tmp_path / "resumed", options, stops=(0, 5))
    assert [int(found["steps"]) for found in stopped] == [5, 5]
    disks = [tmp_path / "resumed" / f"disk {rank}" for rank in (0, 1)]
    assert disks[0].is_dir() and not disks[1].exists()
    if other_disk != "nothing":
        Checkpoints(disks[1], "digest").save(Checkpoint({"epoch": 1}, {"model.x": torch.ones(1)}))
    resumed = together(tmp_path / "resumed", options)
    for found, expected in zip(resumed, undisturbed, strict=True):
        assert int(found["steps"]) == 9 - 5
        for name in expected.keys() - {"drawn", "steps"}:
            assert torch.equal(found[name], expected[name]), name


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_statistics_over_one_process_are_those_of_torch() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).double()
    shared = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).double()
    shared.load_state_dict(plain.state_dict())
    classifier.synchronise_batch_norms(shared, tiny.CPU)
    images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    for _ in range(3):
        expected, found = plain(images), shared(images)
        assert torch.allclose(expected, found, atol=1e-10)
        weights = torch.linspace(0, 1, found.numel(), dtype=torch.float64)
        for network, result in ((plain, expected), (shared, found)):
            network.zero_grad()
            (result.flatten() * weights).sum().backward()
    assert plain.state_dict().keys() == shared.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, shared.state_dict()[name], atol=1e-10), name
    gradients = zip(plain.parameters(), shared.parameters(), strict=True)
    assert all(torch.allclose(tiny.gradient(a), tiny.gradient(b), atol=1e-8) for a, b in gradients)
    shared.eval(), plain.eval()
    assert torch.allclose(plain(images), shared(images), atol=1e-10)


@pytest.mark.usefixtures("group")
def test_statistics_of_bfloat16_are_computed_in_float32() -> None:
    """31 images of 56 x 56 are 97,216 places, which bfloat16 rounds to 97,280."""
    generator = torch.Generator().manual_seed(0)
    images = (3 + torch.randn(31, 2, 56, 56, generator=generator)).bfloat16()
    plain, shared = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))
    classifier.synchronise_batch_norms(shared, tiny.CPU)
    expected = plain(images.float())
    found = shared(images)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-5)
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(shared[0], name), getattr(plain[0], name)
        assert torch.allclose(ours, theirs, rtol=2e-5), name


def differ(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        tuning.check_same("0" * 64 if rank == 0 else "1" * 64, rank)
        said = "nothing"
    except TrainingError as error:
        said = str(error)
    (folder / f"{rank}.txt").write_text(said)
    dist.destroy_process_group()


@pytest.mark.fault("T20")
def test_a_process_that_trains_something_else_is_an_error(tmp_path: Path) -> None:
    in_two_processes(differ, tmp_path)
    assert (tmp_path / "0.txt").read_text() == "nothing"
    said = (tmp_path / "1.txt").read_text()
    assert "process 1 has other data, parameters or code than process 0 (digests 111111" in said
    assert "expected the same in all. Copy params.yaml" in said


def test_the_device_is_by_the_number_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_rank() == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert local_rank() == 0


@pytest.mark.slow
@pytest.mark.fault("T20")
def test_torchrun_trains_what_one_process_trains(prepared: Workspace, tmp_path: Path) -> None:
    """The command itself: one writes, both start from one head and one set of statistics.

    Real networks in float32 part by rounding, on each processor otherwise; how exactly several
    processes learn what one does is asked above, in float64.
    """
    alone, both = (beside(prepared, tmp_path / name) for name in ("one", "two"))
    for workspace in (alone, both):
        workspace.configure("train", epochs=1, batch_size=6, optimiser="sgd", batch_norm="batch")
    alone.run("tlpipe", "train")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = both.run(sys.executable, *torchrun, "-m", "tlpipe", "train").stderr
    assert said.count("BatchNorm: statistics of these images") == 1  # the first one settles it
    one, two = (load_file(w.path / PATHS["model"] / "model.safetensors") for w in (alone, both))
    assert one.keys() == two.keys()
    histories = [workspace.rows(PATHS["history"]) for workspace in (alone, both)]
    starts = [float(history[0]["validation_loss"]) for history in histories]
    assert starts[0] == pytest.approx(starts[1], rel=1e-3)  # before the first step
    means = [name for name in one if name.endswith("running_mean")]
    assert len(means) > 3
    for name in means:
        spread = one[name].std()
        assert (one[name] - two[name]).abs().max() < 0.1 * spread, name
