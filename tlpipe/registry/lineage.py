"""Say which commit and which pipeline state a registered model comes from."""

import hashlib
import json
import subprocess
from pathlib import Path

import yaml


def describe(workspace: Path) -> dict[str, str]:
    """Return tags for what is known of the workspace: git commit, uncommitted changes, dvc.lock."""
    tags = {}
    if commit := _git(workspace, "rev-parse", "HEAD"):
        changes = _git(workspace, "status", "--porcelain", "--untracked-files=no")
        tags["tlpipe.git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["tlpipe.git_changed"] = "true" if changes else "false"
    lock = workspace / "dvc.lock"
    if lock.is_file():
        tags["tlpipe.dvc_lock_sha256"] = lock_sha256(lock)
    return tags


def lock_sha256(lock: Path) -> str:
    """Return the hash of what ``dvc.lock`` says of every stage before ``register``.

    DVC writes the entry of ``register`` after the stage has ended, so it cannot be part of it.
    """
    content = yaml.safe_load(lock.read_text(encoding="utf-8"))
    stages = {name: entry for name, entry in content["stages"].items() if name != "register"}
    return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def _git(workspace: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=workspace, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
