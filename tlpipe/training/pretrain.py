"""Command ``pretrain``: train the backbone on images without labels, and say what that was worth.

What it is worth is the gain of a linear probe on those of the project's own labelled images that
were not trained on, cross-validated as in ``advise``. Images of validation and test never are.
"""

import copy
import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.backbones import embed
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.weights import NONE, REGISTERED, stating
from tlpipe.code_digest import of_closure, versions
from tlpipe.data import charts, ingest
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling, read_square
from tlpipe.data.manifest import evenly, file_keys, image_key, load_split
from tlpipe.errors import ArtifactError, DataError, ImageError, Interrupted, ParamsError
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
_OWN, _UNSEEN = "the project's training split", "not trained on"
_ESTIMATED = "random weights, with BatchNorm statistics of the images that are trained on"
# Beside the folder: what is not finished.
_CHECKPOINTS, _UNPACKED, _LOCK = ".pretrain", ".pretrain.images", ".pretrain.lock"
_PROBED = 1000  # images of linear probes
_BATCH, _LEAST, _BLOCK = 64, 2, 16
# Of random weights, and of trained ones, which large steps would undo.
_LR_RANDOM, _LR_TRAINED = 1e-3, 1e-4
_MIN_CROP_AREA, _COLOUR_JITTER = 0.3, 0.5  # of views, which vary more than keeps a label
_COLLAPSED = 0.1  # spread of projections
_CODE = ("tlpipe.training.self_supervised", "tlpipe.backbones.backbone", "tlpipe.data.images")
_PACKAGES = ("numpy", "pillow", "timm", "torch", "torchvision")


@dataclass(frozen=True)
class Images:
    """The images that are trained on: ``rows`` (N,) of ``squares``, (S, S, 3) uint8 each.

    ``keys``: (N,) which images these are; ``files``: (N,) of which files; ``decoder``: what made
    pixels of them; ``held_out``: files left out since they validate or test; ``repeated``: files
    that are another one's copy; ``rejected``: files of each reason.
    """

    source: str
    squares: packed.Chunks
    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    files: npt.NDArray[np.uint64]
    decoder: str
    held_out: int = 0
    repeated: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """A digest of which images they are, in their order."""
        return hashlib.sha256(self.keys.astype(">u8").tobytes()).hexdigest()

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

    ``gains``: on labelled training and validation images, then on those of them that were not
    trained on, where there are any, which alone decide.
    """

    sha256: str
    gains: tuple[Gain, ...]
    is_collapsed: bool

    @property
    def unseen(self) -> Gain | None:
        """The gain on labelled images that were not trained on."""
        return next((gain for gain in self.gains if gain.of == _UNSEEN), None)

    @property
    def is_worth_it(self) -> bool:
        """Whether there is a gain beyond chance on images that were not trained on."""
        unseen = self.unseen
        return not self.is_collapsed and unseen is not None and unseen.change["low"] > 0

    @property
    def verdict(self) -> str:
        """Say whether to use it."""
        if self.is_collapsed:
            return "collapsed: all images look alike to it; keep the weights there are"
        if self.unseen is None:
            return (
                "cannot tell what it is worth: of the labelled images looked at, all that a fold "
                "holds out were trained on; keep the weights there are"
            )
        if self.is_worth_it:
            return "a gain for a linear probe, on images that were not trained on"
        if self.unseen.change["high"] < 0:
            return "a loss for a linear probe: keep the weights there are"
        return "no gain that can be told from chance: keep the weights there are"


def run(
    *,
    activations: Path,
    pixels: Path,
    split: Path,
    folder: Path,
    source: str | None,
    params: embed.Params,
    epochs: int,
    batch_size: int | None,
    flip: bool | None = None,
    follow_links: bool = False,
) -> Pretrained:
    """Train on images without labels; write the weights, ``report.json`` and ``pretrain.png``.

    ``source``: a folder, an archive or an address of images, None for the project's own training
    images; ``params``: of ``embed``, whose flips and rotations are those of views, and whose
    ``max_gib`` the images of a source may take; ``batch_size``: None for 64, or as many images as
    there are; ``flip``: whether views are flipped, None as ``params`` says; ``follow_links``: of
    ``ingest``.

    Raises:
        ArtifactError: activations, pixels and split table are of different data.
        DataError: there are too few images, or too few labelled ones to hold any out.
        Interrupted: somebody asked to stop; the same command resumes.
        ParamsError: a batch is larger than the images are many, or these are more than may be
            stored.
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
    augmentation = params.augmentation
    if flip is not None:
        augmentation = augmentation.model_copy(update={"horizontal_flip": flip})
    table = load_split(split)
    of_files = file_keys(table)
    unpacked = folder.with_name(_UNPACKED)
    with files.locked(folder.with_name(_LOCK), "a pretraining"):
        shutil.rmtree(unpacked, ignore_errors=True)
        try:
            if source is None:
                rows = data.train.rows
                keys = data.activations.keys[rows]
                images = Images(_OWN, own.array, rows, keys, of_files[rows], own.decoder)
            else:
                unpacked.mkdir(parents=True)
                kept_out = {row.sha256 for row in table if row.split != "train"}
                with _opened(source, follow_links) as (storage, names):
                    _check_size(source, len(names), own.sampling, params.max_gib)
                    images = _images_of(source, storage, names, own.sampling, kept_out, unpacked)
            size = _batch_size(batch_size, len(images.rows))
            return _pretrain(
                data, own, of_files, images, sample, folder, augmentation, epochs, size
            )
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped; the checkpoint of the training, where it was begun, is kept. Run the "
                "same command to resume."
            ) from None
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)


def _check_embedded(data: Dataset, params: embed.Params) -> None:
    """Check that the activations are of the network and the weights that ``embed`` names now.

    Raises:
        ArtifactError: they are of others.
    """
    origin = data.activations.origin
    name, _, which = params.weights.partition("@")
    same = params.weights == origin.weights
    if name.startswith(REGISTERED) and not which.isdecimal():  # an alias, recorded as a version
        same = name == origin.weights.partition("@")[0]
    if params.weights != NONE:
        same &= params.weights_sha256 in (None, origin.weights_sha256)
    if origin.backbone != params.backbone or not same:
        pinned = f" of sha256 {params.weights_sha256[:8]}" if params.weights_sha256 else ""
        raise ArtifactError(
            f"the activations are of {origin.backbone}, weights {origin.weights} of sha256 "
            f"{origin.weights_sha256[:8] or 'none'}; embed names {params.backbone}, weights "
            f"{params.weights}{pinned}. Run 'dvc repro embed'."
        )


def _pretrain(
    data: Dataset,
    own: packed.PackedPixels,
    of_files: npt.NDArray[np.uint64],
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
    seen = model.with_earlier(origin, images.files)
    labelled = Photos(own.array, device, origin.preprocessing, recipe.augmentation)
    feed = labelled
    if images.squares is not own.array:
        feed = Photos(images.squares, device, origin.preprocessing, recipe.augmentation)
    made_from = {
        "backbone": backbone.name,
        "weights_sha256": origin.weights_sha256,
        "images_sha256": images.sha256,
        "sampling": own.sampling.model_dump(),
        "decoder": images.decoder,
        "preprocessing": origin.preprocessing.model_dump(),
        "recipe": recipe.content(),
        "device": device.type,
        "threads": origin.threads,
        "code": of_closure(*_CODE),
        "packages": versions(*_PACKAGES),
    }
    _log.info(
        "pretraining %s, from weights %s, on %s images of %s: %s epochs in batches of %s",
        *(backbone.name, origin.weights, f"{len(images.rows):,}", images.source),
        *(epochs, batch_size),
    )
    digest = hashlib.sha256(files.json_bytes(made_from)).hexdigest()
    checkpoints = Checkpoints(folder.with_name(_CHECKPOINTS), digest)
    began = None if origin.weights_sha256 else _with_statistics(network, feed, images.rows)
    before = _features(began or network, labelled, sample.examples.rows)
    training = self_supervised.Training(network, feed, images.rows, recipe, device, checkpoints)
    state = training.run()
    after = _features(network, labelled, sample.examples.rows)
    said = (
        f"{len(images.rows):,} images of {images.source} without labels, from "
        f"{model.began_from(origin)}"
    )
    content = save(model.own_names(network.cpu().state_dict()), stating(said, seen))
    is_unseen = ~np.isin(of_files[sample.examples.rows], seen)
    found = Pretrained(
        sha256=hashlib.sha256(content).hexdigest(),
        gains=gains_of(sample, is_unseen, before, after),
        is_collapsed=state.spreads[-1] < _COLLAPSED,
    )
    report = made_from | {
        "weights": origin.weights,
        "pretrained_on": said,
        "images": images.content(),
        "sha256": found.sha256,
        "before": _ESTIMATED if began else "the weights as embed takes them",
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


def _with_statistics(
    network: "nn.Module", feed: "Photos", rows: npt.NDArray[np.int64]
) -> "nn.Module | None":
    """Return a copy whose BatchNorm layers know the images; None where there are no such layers.

    Random weights come with a mean of 0 and a variance of 1, which training replaces whatever else
    it learns: beside such a network everything would be a gain.
    """
    from tlpipe.training.classifier import batch_norms, estimate_statistics

    if not batch_norms(network):
        return None
    _log.info("before: %s", _ESTIMATED)
    estimated, chosen = copy.deepcopy(network), np.array(evenly(rows.tolist(), _PROBED))
    parts = np.array_split(chosen, -(-len(chosen) // _BATCH))
    estimate_statistics(estimated, (feed.plain(part) for part in parts))
    return estimated


def _check_size(source: str, images: int, sampling: Sampling, max_gib: float) -> None:
    """Check before any is read that so many images may be stored.

    Raises:
        ParamsError: they are larger than ``embed.max_gib``.
    """
    size = images * prod(_row(sampling)) / 2**30
    if size > max_gib:
        raise ParamsError(
            f"the {images:,} images of {source} would take {size:.3g} GiB while they are trained "
            f"on; embed.max_gib allows {max_gib:g}. Raise it, or name a folder of fewer."
        )


def _row(sampling: Sampling) -> tuple[int, ...]:
    return (sampling.short_side_px, sampling.short_side_px, 3)


def _images_of(
    source: str,
    storage: Storage,
    names: Sequence[str],
    sampling: Sampling,
    held_out: set[str],
    folder: Path,
) -> Images:
    """Decode the images of a source into a folder, each once, those held out left out.

    Raises:
        DataError: too few of them are left.
    """
    writer = packed.ChunkWriter(folder, _row(sampling), "|u1")
    seen: set[str] = set()
    keys: list[bytes] = []
    left_out = repeated = 0
    rejected: Counter[str] = Counter()
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
    unusable = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
    if rejected["outside_root"]:
        unusable += " (links that lead out of it: ingest.follow_links: true reads them)"
    for count, why in (
        (left_out, "are those that the project validates or tests with, or leaves out itself"),
        (repeated, "are another one's copy, byte by byte"),
        (rejected.total(), f"cannot be used: {unusable}"),
    ):
        if count:
            _log.info("%s of %s images of %s left out: they %s", count, len(names), source, why)
    if len(keys) < _LEAST:
        raise DataError(
            f"{source} has {len(keys)} images to train on, of {len(names)}; {left_out} are held "
            f"out by the project, {rejected.total()} cannot be used{': ' * bool(unusable)}"
            f"{unusable}; expected at least {_LEAST}. Add images, or name another source."
        )
    known = np.frombuffer(b"".join(keys), ">u8").astype(np.uint64)
    return Images(
        source=PurePath(source).name or source,
        squares=packed.Chunks(folder, writer.names, _row(sampling), "|u1"),
        rows=np.arange(len(keys)),
        keys=known,
        files=known,
        decoder=ingest.decoder_name(0.0),
        held_out=left_out,
        repeated=repeated,
        rejected=dict(sorted(rejected.items())),
    )


@contextmanager
def _opened(source: str, follow_links: bool) -> Iterator[tuple[Storage, list[str]]]:
    """Open a source of images without labels.

    Raises:
        DataError: as ``listing.unlabelled``, of what was named on the command line.
    """
    try:
        with listing.unlabelled(source, follow_links=follow_links) as found:
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


def gains_of(
    sample: Sample, is_unseen: npt.NDArray[np.bool_], before: Floats, after: Floats
) -> tuple[Gain, ...]:
    """Return what linear probes gain on all N images of a sample, then on the unseen ones.

    ``is_unseen``: (N,) which were not trained on; ``before``, ``after``: features (N, D).
    """
    import scipy.optimize  # noqa: F401 - loads SciPy's BLAS: only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        right = [~held_out_misses(features, sample)[0] for features in (before, after)]
    groups, unseen = sample.groups[sample.held], is_unseen[sample.held]
    parts = {"training and validation": np.ones(len(groups), bool)}
    if unseen.any():
        parts[_UNSEEN] = unseen
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
    right.set_ylabel(f"accuracy of a linear probe, {CONFIDENCE:.0%} interval")
    right.set_title("What it is worth")
    right.legend(loc="lower right")
    charts.save_figure(figure, path)
