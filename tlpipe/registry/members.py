"""What an ensemble is made of: registered versions, with what their runs keep."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import bundle as bundles
from tlpipe import held_out
from tlpipe.bundle import Bundle
from tlpipe.data.images import Preprocessing, Sampling
from tlpipe.data.manifest import load_split
from tlpipe.errors import ArtifactError, ParamsError, RegistryError
from tlpipe.held_out import HeldOut
from tlpipe.registry import Registered, moves, tracking, versions
from tlpipe.registry.gate import label_changes, sampling_of
from tlpipe.registry.publishing import Content

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A registered version, and what its run keeps; ``name``: ``NAME@VERSION``."""

    name: str
    bundle: Bundle
    content: Content
    held: HeldOut

    @property
    def preprocessing(self) -> Preprocessing:
        """How it wants images."""
        return self.bundle.preprocessing

    @property
    def sampling(self) -> Sampling:
        """How images were stored that it was trained on."""
        return sampling_of(self.bundle)


def fetch(client: "MlflowClient", model: Registered | Path, name: str, folder: Path) -> Member:
    """Fetch a version with all that its run keeps.

    ``name``: of the model whose versions a bundle's folder is looked for among.

    Raises:
        ArtifactError: the bundle is damaged.
        ParamsError: it is itself made of versions.
        RegistryError: there is no such version, or its run does not keep what is needed.
    """
    if isinstance(model, Path):
        digest = bundles.load(model).digest
        try:
            found = tracking.find_version(client, name, digest)
        except RegistryError:
            raise RegistryError(
                f"{model} is no version of {name}, and a bundle alone does not say what it answers "
                f"for images held out; expected what is registered. Register it: 'tlpipe run', or "
                f"name another."
            ) from None
    else:
        found = tracking.find_version(client, model.name, model.which)
        if model.which == moves.CHAMPION:
            tracking.check_promoted(client, found)
    called = f"{found.name}@{found.version}"
    _log.info("fetching %s", called)
    folder.mkdir()
    content, bundle, _ = versions.fetch(client, found, folder)
    if names := bundles.members(bundle.provenance):
        raise ParamsError(
            f"{called} is itself made of {', '.join(names)}; expected versions that were trained. "
            f"Name those."
        )
    return Member(called, bundle, content, held_out.load(content.model / held_out.NAME))


def check(members: Sequence[Member]) -> None:
    """Check that there are several members, with the same labels.

    Raises:
        ParamsError: there are not.
    """
    if len(members) < 2:
        raise ParamsError(
            f"an ensemble of {members[0].name} alone is {members[0].name}; expected two versions "
            f"or more. Name another: 'tlpipe models' lists them."
        )
    first, *others = members
    known = {first.bundle.digest: first.name}
    for member in others:
        if same := known.get(member.bundle.digest):
            raise ParamsError(
                f"{same} and {member.name} are the same bundle, sha256 "
                f"{member.bundle.digest[:16]}...; expected each once. Take one away."
            )
        known[member.bundle.digest] = member.name
        if member.bundle.labels != first.bundle.labels:
            apart = label_changes(first.bundle.labels, member.bundle.labels) or "another order"
            raise ParamsError(
                f"{member.name} has other labels than {first.name} ({apart}); expected the same in "
                f"the same order. Leave it out, or train it on the same data."
            )


def check_data(members: Sequence[Member], split: Path) -> None:
    """Check that all members were trained on what a split table holds, split as there.

    Groups may differ: whether two images are nearly equal is looked up in squares of the size that
    a backbone wants.

    Raises:
        ArtifactError: a member was trained on other images, labels or splits.
    """
    here = load_split(split)
    facts = [(row.path, row.key, row.label, row.split) for row in here]
    for member in members:
        there = load_split(member.content.split)
        theirs = [(row.path, row.key, row.label, row.split) for row in there]
        if theirs == facts:
            continue
        apart = len({*theirs} ^ {*facts})
        what = f"{apart} rows differ" if apart else "the order differs"
        raise ArtifactError(
            f"{member.name} was trained on other data than {split} holds: of "
            f"{len(theirs)} images there and {len(here)} here, {what} in name, image, label or "
            f"split; expected the same. Leave it out, train it on these, or check out the data of "
            f"all members."
        )


def check_squares(members: Sequence[Member], stored: Sampling, *, is_exact: bool) -> None:
    """Check that what each member wants can be made of the squares that are stored here.

    ``is_exact``: they must be those that it was trained on; otherwise larger ones will do.

    Raises:
        ParamsError: a member was trained on larger squares, or on another range of values.
    """
    for member in members:
        sees = member.sampling
        if (
            sees.short_side_px == stored.short_side_px
            and sees.interpolation != stored.interpolation
        ):
            _log.info(
                "%s was trained on squares that were resized by %s, and is shown those stored "
                "here, by %s; what it answers for these decides its weight",
                *(member.name, sees.interpolation, stored.interpolation),
            )
        is_enough = stored.short_side_px >= sees.short_side_px and not is_exact
        if sees.value_range != stored.value_range or not (is_enough or sees == stored):
            backbone = member.bundle.provenance["origin"]["backbone"]
            expected = "just these" if is_exact else "these, or larger ones to make them of"
            raise ParamsError(
                f"{member.name} was trained on squares of {_described(sees)}, and those stored "
                f"here have {_described(stored)}; expected {expected}. Set embed.backbone: "
                f"{backbone} in params.yaml, run 'dvc repro split', then this again."
            )


def _described(sampling: Sampling) -> str:
    levels = f", values from {sampling.value_range}" if sampling.value_range else ""
    return f"{sampling.short_side_px} px, {sampling.interpolation}{levels}"
