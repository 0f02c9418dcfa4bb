"""Say which commit and which pipeline state a model comes from."""

import getpass
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

CONSTRAINTS = "constraints.txt"
# What a bundle is made by; ``audit`` only looks, and later stages only judge.
_BEFORE_EXPORT = ("ingest", "split", "embed", "train")
# Written by each run. What ``split`` appends is committed later; split_sha256 of the bundle and the
# run's own split table say what counts of it, and rows of images that are gone do not.
PLACEMENTS = "splits.csv"


def describe(workspace: Path) -> dict[str, str]:
    """Return tags for what is known of the workspace: its commit, where that is, its dvc.lock."""
    tags = {}
    if commit := _git(workspace, "rev-parse", "HEAD"):
        tags["tlpipe.git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["tlpipe.git_changed"] = "true" if _has_changes(workspace) else "false"
    if remote := origin_of(workspace):
        tags["tlpipe.git_remote"] = tags["mlflow.source.git.repoURL"] = without_credentials(remote)
    if folder := _git(workspace, "rev-parse", "--show-prefix"):
        tags["tlpipe.git_folder"] = folder
    lock = workspace / "dvc.lock"
    if lock.is_file():
        tags["tlpipe.dvc_lock_sha256"] = lock_sha256(lock)
    return tags


def other_versions(workspace: Path) -> str:
    """Say which installed packages have other versions than ``constraints.txt`` pins, if any have.

    Packages that are not installed are left out: which are needed depends on what is run.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    path, found = workspace / CONSTRAINTS, []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:  # pip-compile and uv add comments and hashes
            pinned = Requirement(re.sub(r"(^|\s)#.*|\s--hash\S*|\\$", "", line).strip())
        except InvalidRequirement:
            continue
        if pinned.marker is not None and not pinned.marker.evaluate():
            continue
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.version(pinned.name)
            if not pinned.specifier.contains(installed, prereleases=True):
                found.append(f"{pinned.name} {installed} ({pinned.specifier})")
    if not found:
        return ""
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return (
        f"{len(found)} packages are not what {path} pins: {shown}. Other versions may give other "
        f"results. Install the pinned ones: 'make setup', or pip with -c {CONSTRAINTS}."
    )


def of_inputs(workspace: Path) -> dict[str, str]:
    """Return what a bundle says of its origin: the commit, and the hash of all it is made by."""
    commit = _git(workspace, "rev-parse", "HEAD")
    lock = workspace / "dvc.lock"
    return {
        "git_commit": f"{commit} and changes" if _has_changes(workspace) else commit,
        "dvc_lock_sha256": _digest(lock, _BEFORE_EXPORT) if lock.is_file() else "",
    }


def repository_with(workspace: Path, commit: str) -> str:
    """Return the top folder of the workspace's repository if it has a commit, or nothing."""
    if _git(workspace, "cat-file", "-t", commit) != "commit":
        return ""
    return _git(workspace, "rev-parse", "--show-toplevel")


def origin_of(workspace: Path) -> str:
    """Return the address of the workspace's remote ``origin``, or nothing."""
    return _git(workspace, "remote", "get-url", "origin")


def user() -> str:
    """Return who runs this; in a container, it may be somebody without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def without_credentials(address: str) -> str:
    """Return an address, or a text with addresses, without user names and passwords in them."""
    return re.sub(r"//[^/@\s]*@", "//", address)


def lock_sha256(lock: Path) -> str:
    """Return the hash of what ``dvc.lock`` says of every stage before ``register``.

    DVC writes the entry of ``register`` after the stage has ended, so it cannot be part of it.
    """
    return _digest(lock, [name for name in _stages(lock) if name != "register"])


def _digest(lock: Path, names: Iterable[str]) -> str:
    stages = {name: entry for name, entry in _stages(lock).items() if name in names}
    for name, entry in stages.items():
        outs = [out for out in entry.get("outs", ()) if out["path"] != PLACEMENTS]
        stages[name] = {**entry, "outs": outs}
    return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def _stages(lock: Path) -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    return stages


def _has_changes(workspace: Path) -> bool:
    """Return whether a tracked file is not as committed, but for what every run may change.

    That is ``dvc.lock``, and rows that ``split`` has appended to its table.
    """
    status = ("status", "--porcelain", "--untracked-files=no")
    if _git(workspace, *status, "--", ".", ":!dvc.lock", f":!{PLACEMENTS}"):
        return True
    rows = _git(workspace, "diff", "--numstat", "HEAD", "--", PLACEMENTS)  # added, taken away, name
    return bool(rows) and rows.split()[1] != "0"


def _git(workspace: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=workspace, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
