"""Command ``pretrain``: train the backbone on images without labels, and say what that was worth.

What it is worth is the gain of a linear probe on the project's own labelled images, cross-validated
as in ``advise``. Images of validation and test are never trained on.
"""

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.backbones import embed
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.weights import PRETRAINED_ON, REGISTERED
from tlpipe.code_digest import of_modules, versions
from tlpipe.data import charts
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling, read_square
from tlpipe.data.manifest import image_key, load_manifest, load_split
from tlpipe.errors import ArtifactError, DataError, ImageError, ParamsError
from tlpipe.progress import track
from tlpipe.resampling import paired_difference, share_interval
from tlpipe.sources import listing
from tlpipe.sources.storage import Storage
from tlpipe.training import advise, model
from tlpipe.training.checkpoint import Checkpoints
from tlpipe.training.linear_probe import FOLDS, Floats
from tlpipe.training.model import Dataset
from tlpipe.training.transferability import CONFIDENCE, Sample, held_out_misses

if TYPE_CHECKING:
    from torch import nn

    from tlpipe.training.batches import Photos
    from tlpipe.training.self_supervised import State

_log = logging.getLogger(__name__)
WEIGHTS = "backbone.safetensors"
_OWN = "the project's training split"
# Beside the folder: what is not finished.
_CHECKPOINTS, _UNPACKED, _LOCK = ".pretrain", ".pretrain.images", ".pretrain.lock"
_PROBED = 1000  # images of linear probes
_BATCH, _LEAST, _BLOCK = 64, 2, 16
# Of random weights, and of trained ones, which large steps would undo.
_LR_RANDOM, _LR_TRAINED = 1e-3, 1e-4
_MIN_CROP_AREA, _COLOUR_JITTER = 0.3, 0.5  # of views, which vary more than keeps a label
_COLLAPSED = 0.1  # spread of projections
_CODE = tuple(
    f"tlpipe.{name}"
    for name in (
        *("runtime", "data.images", "data.pixels", "backbones.augment", "backbones.backbone"),
        *("training.batches", "training.recipe", "training.self_supervised", "training.pretrain"),
    )
)
_PACKAGES = ("numpy", "pillow", "timm", "torch", "torchvision")


@dataclass(frozen=True)
class Images:
    """The images that are trained on: ``rows`` (N,) of ``squares``, (S, S, 3) uint8 each.

    ``sha256`` names them by content; ``held_out``: files left out since they validate or test;
    ``repeated``: files that are another one's copy; ``rejected``: files of each reason.
    """

    source: str
    squares: packed.Chunks
    rows: npt.NDArray[np.int64]
    sha256: str
    held_out: int = 0
    repeated: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return what JSON holds of them."""
        return {
            "source": self.source,
            "images": len(self.rows),
            "sha256": self.sha256,
            "held_out": self.held_out,
            "repeated": self.repeated,
            "rejected": dict(self.rejected),
        }


@dataclass(frozen=True)
class Gain:
    """Accuracies of linear probes before and after, and their paired difference.

    All as ``resampling`` gives them. ``of``: which ``images``, and how many, were answered.
    """

    of: str
    images: int
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, float]


@dataclass(frozen=True)
class Pretrained:
    """What came out: the ``sha256`` of the file of weights, and what it is worth.

    ``gains``: on labelled training and validation images, then on those of validation alone, which
    were not trained on.
    """

    sha256: str
    gains: tuple[Gain, ...]
    is_collapsed: bool

    @property
    def is_worth_it(self) -> bool:
        """Whether there is a gain beyond chance that unseen images do not speak against."""
        changes = [gain.change for gain in self.gains]
        return not self.is_collapsed and changes[0]["low"] > 0 and changes[-1]["value"] > 0

    @property
    def verdict(self) -> str:
        """Say whether to use it."""
        if self.is_collapsed:
            return "collapsed: all images look alike to it; keep the weights there are"
        if self.is_worth_it:
            return "a gain for a linear probe"
        if self.gains[0].change["high"] < 0:
            return "a loss for a linear probe: keep the weights there are"
        return "no gain that can be told from chance: keep the weights there are"


def run(
    *,
    manifest: Path,
    activations: Path,
    pixels: Path,
    split: Path,
    folder: Path,
    source: str | None,
    params: embed.Params,
    epochs: int,
    batch_size: int | None,
) -> Pretrained:
    """Train on images without labels; write the weights, ``report.json`` and ``pretrain.png``.

    ``source``: a folder, an archive or an address of images, None for the project's own training
    images; ``params``: of ``embed``, whose flips and rotations are those of views; ``batch_size``:
    None for 64, or as many images as there are.

    Raises:
        ArtifactError: activations, pixels and split table are of different data.
        DataError: there are too few images, or too few labelled ones to hold any out.
        Interrupted: somebody asked to stop; the same command resumes.
        ParamsError: a batch is larger than the images are many.
        TrainingError: training cannot go on, or another one runs in this folder.
        WeightsError: the weights to begin from are missing.
    """
    data = model.load_dataset(activations, split)
    own = packed.load(pixels)
    if own.data_sha256 != data.activations.origin.data_sha256:
        raise ArtifactError(
            f"{pixels} holds other images than {activations} is of. Run 'tlpipe run'."
        )
    _check_embedded(data, params)
    sample = advise.choose_sample(data, max(_PROBED, FOLDS * len(data.labels)))
    unpacked = folder.with_name(_UNPACKED)
    with files.locked(folder.with_name(_LOCK), "a pretraining"):
        shutil.rmtree(unpacked, ignore_errors=True)
        try:
            if source is None:
                keys = data.activations.keys[data.train.rows].astype(">u8")
                images = Images(_OWN, own.array, data.train.rows, _named(keys))
            else:
                unpacked.mkdir(parents=True)
                kept_out = _held_out(manifest, split)
                images = _images_of(source, own.sampling, kept_out, unpacked)
            size = _batch_size(batch_size, len(images.rows))
            return _pretrain(
                data, own.array, images, sample, folder, params.augmentation, epochs, size
            )
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)


def _check_embedded(data: Dataset, params: embed.Params) -> None:
    """Check that the activations are of the network and the weights that ``embed`` names now.

    Raises:
        ArtifactError: they are of others.
    """
    origin = data.activations.origin
    is_registered = params.weights.startswith(REGISTERED)
    same = is_registered == origin.weights.startswith(REGISTERED)
    if (
        origin.backbone != params.backbone
        or not same
        or (not is_registered and origin.weights != params.weights)
    ):
        raise ArtifactError(
            f"the activations are of {origin.backbone}, weights {origin.weights}; embed names "
            f"{params.backbone}, weights {params.weights}. Run 'dvc repro embed'."
        )


def _pretrain(
    data: Dataset,
    squares: packed.Chunks,
    images: Images,
    sample: Sample,
    folder: Path,
    augmentation: Augmentation,
    epochs: int,
    batch_size: int,
) -> Pretrained:
    import torch
    from safetensors.torch import save

    from tlpipe import runtime
    from tlpipe.backbones.backbone import load_network
    from tlpipe.training import self_supervised, tuning
    from tlpipe.training.batches import Photos

    origin, backbone = data.activations.origin, data.backbone
    recipe = self_supervised.Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=_LR_TRAINED if origin.weights_sha256 else _LR_RANDOM,
        augmentation=augmentation.model_copy(
            update={"min_crop_area": _MIN_CROP_AREA, "colour_jitter": _COLOUR_JITTER}
        ),
    )
    runtime.keep_freed()
    torch.set_num_threads(origin.threads)
    device = tuning.training_device(0)
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    network = load_network(backbone, weights).to(device)
    labelled = Photos(squares, device, origin.preprocessing, recipe.augmentation)
    feed = labelled
    if images.squares is not squares:
        feed = Photos(images.squares, device, origin.preprocessing, recipe.augmentation)
    made_from = {
        "backbone": backbone.name,
        "weights": origin.weights,
        "weights_sha256": origin.weights_sha256,
        "images": images.content(),
        "recipe": recipe.content(),
        "device": device.type,
        "threads": origin.threads,
        "code": of_modules(*_CODE),
        "packages": versions(*_PACKAGES),
    }
    _log.info(
        "pretraining %s, from weights %s, on %s images of %s: %s epochs in batches of %s",
        *(backbone.name, origin.weights, f"{len(images.rows):,}", images.source),
        *(epochs, batch_size),
    )
    digest = hashlib.sha256(files.json_bytes(made_from)).hexdigest()
    checkpoints = Checkpoints(folder.with_name(_CHECKPOINTS), digest)
    before = _features(network, labelled, sample.examples.rows)
    training = self_supervised.Training(network, feed, images.rows, recipe, device, checkpoints)
    state = training.run()
    after = _features(network, labelled, sample.examples.rows)
    began = PurePath(origin.weights).name
    said = f"{len(images.rows):,} images of {images.source} without labels, from {began}"
    content = save(model.own_names(network.cpu().state_dict()), {PRETRAINED_ON: said})
    found = Pretrained(
        sha256=hashlib.sha256(content).hexdigest(),
        gains=_gains(data, sample, before, after),
        is_collapsed=state.spreads[-1] < _COLLAPSED,
    )
    report = made_from | {
        "sha256": found.sha256,
        "losses": state.losses,
        "spreads": state.spreads,
        "probe": [asdict(gain) for gain in found.gains],
        "is_collapsed": found.is_collapsed,
        "verdict": found.verdict,
    }
    with files.replacing_folder(folder) as new:
        files.write_bytes(new / WEIGHTS, content)
        files.write_json(new / "report.json", report)
        _draw(new / "pretrain.png", state, found.gains)
    checkpoints.clear()
    return found


def _named(keys: npt.NDArray[np.uint64]) -> str:
    """Return a digest of images, by their keys in any order."""
    return hashlib.sha256(np.sort(keys).astype(">u8").tobytes()).hexdigest()


def _held_out(manifest: Path, split: Path) -> set[str]:
    """Return the sha256 of each file of the project that is not trained on."""
    table = zip(load_manifest(manifest), load_split(split), strict=True)
    return {entry.sha256 for entry, placed in table if placed.split != "train"}


def _images_of(source: str, sampling: Sampling, held_out: set[str], folder: Path) -> Images:
    """Decode the images of a source into a folder, each once, those held out left out.

    Raises:
        DataError: there is no such source, or no image of it is left.
    """
    writer = packed.ChunkWriter(folder, (sampling.short_side_px,) * 2 + (3,), "|u1")
    seen: set[str] = set()
    keys: list[bytes] = []
    left_out = repeated = 0
    rejected: Counter[str] = Counter()
    with _opened(source) as (storage, names):
        for name in track(names, total=len(names), description="images"):
            try:
                content = storage.read(name)
                sha256 = hashlib.sha256(content).hexdigest()
                if sha256 in held_out or sha256 in seen:
                    left_out += sha256 in held_out
                    repeated += sha256 in seen
                    continue
                square, _ = read_square(content, sampling)
            except ImageError as error:
                if error.reason == "out_of_memory":
                    raise
                rejected[error.reason] += 1
                continue
            seen.add(sha256)
            keys.append(image_key(sha256, ""))
            writer.append(keys[-1], square)
    writer.close()
    for count, why in (
        (left_out, "are those that the project validates or tests with, or leaves out itself"),
        (repeated, "are another one's copy, byte by byte"),
        (rejected.total(), f"cannot be used: {dict(rejected)}"),
    ):
        if count:
            _log.info("%s of %s images of %s left out: they %s", count, len(names), source, why)
    if len(keys) < _LEAST:
        raise DataError(
            f"{source} has {len(keys)} images to train on, of {len(names)}; {left_out} are held "
            f"out by the project, {rejected.total()} cannot be used; expected at least {_LEAST}. "
            f"Add images, or name another source."
        )
    row = (sampling.short_side_px,) * 2 + (3,)
    return Images(
        source=PurePath(source).name or source,
        squares=packed.Chunks(folder, writer.names, row, "|u1"),
        rows=np.arange(len(keys)),
        sha256=_named(np.frombuffer(b"".join(keys), ">u8")),
        held_out=left_out,
        repeated=repeated,
        rejected=dict(sorted(rejected.items())),
    )


@contextmanager
def _opened(source: str) -> Iterator[tuple[Storage, list[str]]]:
    """Open a source of images without labels.

    Raises:
        DataError: as ``listing.unlabelled``, of what was named on the command line.
    """
    try:
        with listing.unlabelled(source) as found:
            yield found
    except DataError as error:
        said = str(error).replace("ingest.source ", "").replace("Change it in params.yaml", "")
        raise DataError(said.rstrip(". ") + ".") from None


def _batch_size(asked: int | None, images: int) -> int:
    """Return how many images a step takes.

    Raises:
        ParamsError: more are asked for than there are.
    """
    if asked is None:
        return min(_BATCH, images)
    if asked > images:
        raise ParamsError(
            f"--batch-size is {asked}; there are {images} images to train on. Lower it."
        )
    return asked


def _features(network: "nn.Module", feed: "Photos", rows: npt.NDArray[np.int64]) -> Floats:
    """Return what a network gives for images as they are, (N, D)."""
    import torch

    network.eval()
    blocks = []
    starts = range(0, len(rows), _BLOCK)
    for start in track(starts, total=len(starts), description="images of the probe"):
        with torch.inference_mode():
            blocks.append(network(feed.plain(rows[start : start + _BLOCK])).cpu().double().numpy())
    return np.concatenate(blocks)


def _gains(data: Dataset, sample: Sample, before: Floats, after: Floats) -> tuple[Gain, ...]:
    """Return what linear probes gain on all labelled images, then on those of validation."""
    import scipy.optimize  # noqa: F401 - loads SciPy's BLAS: only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        right = [~held_out_misses(features, sample)[0] for features in (before, after)]
    groups, rows = sample.groups[sample.held], sample.examples.rows[sample.held]
    parts = {"training and validation": np.ones(len(rows), bool)}
    is_validation = np.isin(rows, data.validation.rows)
    if is_validation.any():
        parts["validation"] = is_validation
    return tuple(
        Gain(
            of=name,
            images=int(chosen.sum()),
            before=share_interval(right[0][chosen].astype(float), groups[chosen], CONFIDENCE),
            after=share_interval(right[1][chosen].astype(float), groups[chosen], CONFIDENCE),
            change=paired_difference(
                right[0][chosen], right[1][chosen], groups[chosen].astype(str).tolist(), CONFIDENCE
            ),
        )
        for name, chosen in parts.items()
    )


def _draw(path: Path, state: "State", gains: Sequence[Gain]) -> None:
    """Draw the loss and the spread over epochs, and what linear probes make of it."""
    figure = charts.new_figure(12, 4.2)
    left, middle, right = figure.subplots(1, 3)
    epochs = np.arange(1, len(state.losses) + 1)
    left.plot(epochs, state.losses)
    left.set_ylabel("loss (nats)")
    left.set_title("Finding the other view")
    middle.plot(epochs, state.spreads)
    middle.axhline(_COLLAPSED, color="gray", linestyle=":", label="collapsed below")
    middle.set_ylim(0, 1.05)
    middle.set_ylabel("spread of projections")
    middle.set_title("Whether images stay apart")
    middle.legend(loc="lower right")
    for axes in (left, middle):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for number, (name, shown) in enumerate((("before", "before"), ("after", "after"))):
        rows = [getattr(gain, name) for gain in gains]
        places = np.arange(len(gains)) + 0.2 * (2 * number - 1)
        spread = charts.error_bars(rows, "value")
        right.errorbar(
            places, [row["value"] for row in rows], spread, fmt="o", capsize=4, label=shown
        )
    right.set_xticks(np.arange(len(gains)), [f"{gain.of}\n({gain.images})" for gain in gains])
    right.set_xlim(-0.6, len(gains) - 0.4)
    right.set_ylim(0, 1.02)
    right.set_ylabel("accuracy of a linear probe")
    right.set_title("What it is worth")
    right.legend(loc="lower right")
    charts.save_figure(figure, path)
