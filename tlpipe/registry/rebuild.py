"""Command ``rebuild``: make a bundle once more, from its commit and its data alone.

Where images were placed earlier is part of what it was made from. The commit's ``splits.csv`` says
so; where it does not, since that was committed later or never, the split table of the run does.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tlpipe import bundle as bundles
from tlpipe import files, graph, versioning
from tlpipe.bundle import Bundle
from tlpipe.data import manifest
from tlpipe.data.manifest import Assignment, Placements, load_split
from tlpipe.errors import ArtifactError, RegistryError
from tlpipe.registry import Registered, moves, publishing, tracking
from tlpipe.runtime import THREADS
from tlpipe.versioning import dvc_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Origin:
    """Where a version comes from: its commit of a repository, and the folder in there."""

    repository: str
    commit: str
    folder: str


@dataclass(frozen=True)
class _Split:
    """The split table that a run keeps, and the parameters that it was drawn by."""

    table: list[Assignment]
    drawn_by: str


@dataclass(frozen=True)
class _Known:
    """What is known of what is to be made again; ``bundle`` and ``split`` where they are there."""

    name: str
    digest: str
    tags: Mapping[str, str]
    bundle: Bundle | None
    split: _Split | None
    threads: str | None


def run(
    *,
    model: Registered | Path,
    repository: str | None,
    keep: Path | None,
    workspace: Path,
    confirm: Callable[[str], bool],
    with_credentials: bool = False,
) -> tuple[str, str]:
    """Rebuild a registered version or a folder's bundle; return what it is, and its digest.

    Nothing that was computed before is used: the cache is an empty one, the data come from the DVC
    remote. The code that runs is that of a commit which the registry or the bundle names; so it is
    only looked for in this project's repository, its origin, or ``repository``, and runs only if
    ``confirm`` says so, who is told what would run.

    Args:
        model: of a folder, its commit is taken to have the project where this one has it.
        repository: what to clone, where it is not this project's.
        keep: a folder for the bundle.
        workspace: a folder of this project.
        confirm: gets what would run, and answers whether it may.
        with_credentials: whether the clone gets this project's ``.dvc/config.local`` while the data
            are pulled, which may hold keys: the clone's own ``.dvc/config`` says to whom they go.

    Raises:
        ArtifactError: what came out differs, or it could not be built.
        RegistryError: there is no such version, it does not say where it comes from or names a
            folder outside of its repository, or nobody confirmed.
    """
    known = _of_folder(model, workspace) if isinstance(model, Path) else _stored(model, workspace)
    _check_is_trained(known)
    origin = _origin(known, repository, workspace)
    with TemporaryDirectory() as name:
        clone = Path(name, "clone")
        inside = _check_out(origin, clone)
        shown = versioning.without_credentials(origin.repository)
        what = f"the code of {shown}, commit {_shown(clone)}"
        if not confirm(what):
            raise RegistryError(
                f"{model} was not rebuilt: that runs {what}. Look at it, then confirm with --yes."
            )
        local = _local_config(workspace) if with_credentials else None
        found = _build(known.split, clone, inside, local, known.threads)
        if found.digest != known.digest:
            why = _differences(found, known.bundle) if known.bundle else "not the same"
            raise ArtifactError(
                f"{model} was rebuilt with the digest {found.digest[:16]}..., expected "
                f"{known.digest[:16]}...: {why}."
            )
        if keep is not None:
            with files.replacing_folder(keep) as folder:
                files.copy_folder(found.folder, folder)
    return known.name, found.digest


def _stored(model: Registered, workspace: Path) -> _Known:
    """Return what the registry knows of a version."""
    with tracking.connection(workspace) as client:
        version = tracking.find_version(client, model.name, model.which)
        bundle = None
        try:
            bundle = tracking.bundle_of(client, version)
        except (ArtifactError, RegistryError) as error:
            _log.warning("the stored bundle is lost, its digest is known: %s", error)
        split = _split_of(client, version, bundle)
        threads = _threads(bundle)
        if bundle is None and version.run_id:
            threads = client.get_run(version.run_id).data.params.get("threads")
    name, digest = f"{version.name} version {version.version}", version.tags.get(moves.BUNDLE_TAG)
    return _Known(name, digest or "", version.tags, bundle, split, threads)


def _threads(bundle: Bundle | None) -> str | None:
    """Return with how many threads a bundle was computed, if that is known."""
    found = bundle.provenance.get("origin", {}).get("threads") if bundle is not None else None
    return None if found is None else str(found)


def _of_folder(folder: Path, workspace: Path) -> _Known:
    """Return what a bundle's folder says itself."""
    bundle = bundles.load(folder)
    threads = _threads(bundle)
    _log.info("a bundle has no split table: images are placed as the commit places them")
    where = {"tlpipe.git_folder": versioning.describe(workspace).get("tlpipe.git_folder", "")}
    return _Known(str(folder), bundle.digest, where, bundle, None, threads)


def _check_is_trained(known: _Known) -> None:
    """Check that a version came out of the stages, and of no other versions.

    Raises:
        RegistryError: it is an ensemble.
    """
    made_of = known.tags.get(publishing.MEMBERS_TAG, "")
    if known.bundle is not None and bundles.members(known.bundle.provenance):
        made_of = bundles.describe(known.bundle.provenance)
    if made_of:
        raise RegistryError(
            f"{known.name} was made of other versions and of no commit: {made_of}; expected one "
            f"that was trained. Rebuild those, and make it anew: 'tlpipe ensemble'."
        )


def _origin(known: _Known, repository: str | None, workspace: Path) -> _Origin:
    """Return the commit at which the bundle was exported, and where that is.

    The version's tag names the commit at which it was registered, which may be a later one.
    """
    tags, name = known.tags, known.name
    commit = tags.get("tlpipe.git_commit")
    if known.bundle is not None:
        commit = known.bundle.provenance.get("git_commit") or commit
    if not commit:
        raise RegistryError(f"{name} was not made in a Git repository, so it cannot be rebuilt.")
    if not versioning.is_commit(commit):
        # Bundles of before say " and changes".
        made_from = re.sub(" and changes$", " with uncommitted changes", commit)
        raise RegistryError(
            f"{name} was made from {made_from.strip()}: it cannot be rebuilt. Commit, then make "
            f"one that can: 'dvc repro --force --single-item export', 'tlpipe run'."
        )
    here = versioning.repository_with(workspace, commit) or versioning.origin_of(workspace)
    if not (source := repository or here):
        said = tags.get("tlpipe.git_remote", "")
        raise RegistryError(
            f"{name} was made from the commit {commit}, which is not in this project, and this has "
            f"no origin; it names {versioning.without_credentials(said) or 'none'}, whose "
            f"code is not run for that alone. Name one that you trust with --repository."
        )
    folder = tags.get("tlpipe.git_folder", "")
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise RegistryError(
            f"{name} says that it was made in the folder {folder!r}; expected one inside of its "
            f"repository. Somebody changed the tag tlpipe.git_folder: put it right."
        )
    return _Origin(source, commit, folder)


def _split_of(
    client: "MlflowClient", version: "ModelVersion", known: Bundle | None
) -> _Split | None:
    """Return the split table that the version's run keeps, None where it keeps none.

    Raises:
        ArtifactError: it is not the one that the bundle was made with.
    """
    table, report = (
        tracking.artifact(client, version.run_id, place)
        for place in (tracking.SPLIT, publishing.SPLIT_REPORT)
    )
    if table is None or report is None:
        _log.info("the run keeps no split table: images are placed as the commit places them")
        return None
    made_with = known.provenance.get("split_sha256") if known else None
    if made_with not in (None, found := files.sha256(table)):
        raise ArtifactError(
            f"{tracking.SPLIT} of the run of {version.name} version {version.version} has the "
            f"sha256 {found}; the bundle was made with {made_with}. Somebody changed it: put it "
            f"back, or register the version anew."
        )
    return _Split(load_split(table), manifest.drawn_by(files.read_json(report)["params"]))


def _check_out(origin: _Origin, clone: Path) -> Path:
    """Clone, check out, and return the folder that it was made in; none of its code runs.

    Raises:
        ArtifactError: there is no such commit.
        RegistryError: the folder is none, or a link that leads out of the clone.
    """
    _log.info("cloning %s", versioning.without_credentials(origin.repository))
    _step("git", "clone", "-q", "--no-checkout", "--", origin.repository, str(clone), folder=Path())
    hooks = ("-c", "core.hooksPath=/dev/null")
    _step("git", *hooks, "checkout", "-q", "--detach", origin.commit, folder=clone)
    inside = (clone / origin.folder).resolve()
    if not (inside.is_dir() and inside.is_relative_to(clone.resolve())):
        raise RegistryError(
            f"the commit {origin.commit} has no folder {origin.folder!r}, or it leads out of the "
            f"repository; expected the one that the version was made in."
        )
    for folder in (inside, *inside.parents):
        if (folder / ".dvc").is_symlink():  # its content would be changed
            raise RegistryError(f".dvc is a link in the commit {origin.commit}; expected a folder.")
        if folder == clone.resolve():
            break
    root = dvc_root(inside)
    if root is None or not root.is_relative_to(clone.resolve()):
        raise RegistryError(
            f"the folder {origin.folder!r} of the commit {origin.commit} lies in no DVC "
            f"repository, so nothing in it can be built; expected the one of a project."
        )
    return inside


def _local_config(workspace: Path) -> Path:
    """Return the file in which DVC keeps the project's own addresses and keys.

    Raises:
        RegistryError: there is none to give.
    """
    path = (dvc_root(workspace) or workspace) / ".dvc" / "config.local"
    if not path.is_file():
        raise RegistryError(
            f"{path} is missing, so --with-credentials has nothing to give. Leave it out, or "
            f"write addresses and keys there: 'dvc remote modify --local'."
        )
    return path


def _shown(clone: Path) -> str:
    """Return a commit's short name, date, author and subject."""
    form = "--format=%h of %as by %an: %s"
    return subprocess.run(
        ["git", "log", "-1", form], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()


def _build(
    split: _Split | None, clone: Path, inside: Path, local: Path | None, threads: str | None
) -> Bundle:
    """Pull the data, place images as they were, reproduce up to the bundle.

    ``local``: addresses and keys of remotes, for the pull alone; what runs then is the clone's own
    code. ``threads``: how many it was made with, if known.
    """
    given = (dvc_root(inside) or inside) / ".dvc" / "config.local"
    given.unlink(missing_ok=True)
    if local is not None:
        shutil.copy(local, given)
    empty_cache = ("dvc", "cache", "dir", "--local", str(clone / "cache"))
    _step(*empty_cache, folder=inside)
    listed = ["git", "ls-files", "-z", "--", "*.dvc"]
    tracked = subprocess.run(listed, cwd=inside, capture_output=True, text=True, check=True)
    if names := tracked.stdout.split("\0")[:-1]:
        _log.info("pulling the data: %s", ", ".join(names))
        try:
            _step("dvc", "pull", "-q", "--", *names, folder=inside)
        except ArtifactError as error:
            advice = "--with-credentials lets it use this project's .dvc/config.local"
            raise ArtifactError(f"{error} If addresses or keys were missing: {advice}.") from None
    if local is not None:
        given.unlink()
        _step(*empty_cache, folder=inside)
    if split is not None:
        _place(split, inside)
    _step("dvc", "repro", "-q", "export", folder=inside, threads=threads)
    return bundles.load(inside / graph.PATHS["bundle"])


def _place(split: _Split, inside: Path) -> None:
    """Let the clone place images as the split table does, unless its commit does so already."""
    placements = inside / graph.PATHS["placements"]
    try:
        if manifest.gives(placements, split.drawn_by, split.table):
            return
        why = "does not place all images as they were"
    except ArtifactError as error:
        why = f"cannot be used: {error}"
    _log.info("%s of the commit %s; the run's split table is taken", placements.name, why)
    manifest.save_placements(placements, Placements(split.drawn_by, manifest.of_table(split.table)))


def _step(*command: str, folder: Path, threads: str | None = None) -> None:
    """Run a command with the code of the clone, its output to be seen."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(folder.resolve())}
    env.pop("MLFLOW_TRACKING_URI", None)  # nothing that is rebuilt is to be seen there
    if threads is not None:
        env[THREADS] = threads
    if subprocess.run(command, cwd=folder, env=env, stdout=sys.stderr).returncode:
        raise ArtifactError(f"{' '.join(command)} failed, see above; nothing was rebuilt.")


def _differences(found: Bundle, known: Bundle) -> str:
    """Say which files are other ones, and which packages of other versions."""
    names = sorted(found.hashes.keys() | known.hashes.keys())
    other = [name for name in names if found.hashes.get(name) != known.hashes.get(name)]
    old, new = known.provenance["packages"], found.provenance["packages"]
    packages = [
        f"{name} {old.get(name)} then, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    why = f"packages differ: {', '.join(packages)}" if packages else "packages are the same"
    return f"{', '.join(other)} came out different; {why}"
