"""Each cell as an experiment of DVC, as ``dvc exp run`` would leave it.

An experiment is a commit below ``refs/exps/`` whose parent is the commit that the project is at:
the parameters of the cell, and a ``dvc.lock`` that states what its stages read and wrote. What they
wrote goes into DVC's cache. DVC itself hashes, fills its cache and writes the entries; only the
stages are not started by it, since each would import torch anew.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tlpipe import graph
from tlpipe.errors import ParamsError
from tlpipe.sweep.grid import SECTIONS
from tlpipe.sweep.state import STAGES, Entry

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo

_LOCK = "dvc.lock"
_SPLITS = graph.PATHS["placements"]
# Of whoever has told Git no name.
_SOMEBODY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "tlpipe"), ("EMAIL", "tlpipe@localhost"))
}


def baseline(root: Path) -> tuple[str, str]:
    """Return the commit that experiments hang on, and the tree of the project as it is now.

    Raises:
        ParamsError: the project is in no Git repository, or that has no commit.
    """
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        raise ParamsError(
            f"{root} has no commit of Git; a sweep keeps its cells as experiments of DVC, which "
            f"hang on one. Make it: git init && git add . && git commit."
        ) from None
    with _index(root, commit) as env:
        _git(root, "add", "--update", env=env)
        return commit, _git(root, "write-tree", env=env)


def save(root: Path, cell: Entry, places: Mapping[str, Path], commit: str, tree: str) -> str:
    """Make the experiment of a cell; return its commit.

    ``places``: where what its stages wrote lies, by the names of ``graph.PATHS``, where that is not
    the project itself. ``commit``, ``tree``: of ``baseline``.
    """
    lock = {"schema": "2.0", "stages": _entries(root, cell, places)}
    texts = {
        graph.PARAMS: _params(root, cell),
        _LOCK: yaml.safe_dump(lock, sort_keys=False),
        _SPLITS: places["placements"].read_text(encoding="utf-8"),
        **{name: (root / name).read_text(encoding="utf-8") for name in (graph.FILE, graph.LOCK)},
    }
    prefix = _git(root, "rev-parse", "--show-prefix")
    with _index(root, tree) as env:
        for name, text in texts.items():
            blob = _git(root, "hash-object", "-w", "--stdin", text=text)
            place = f"100644,{blob},{prefix}{name}"
            _git(root, "update-index", "--add", "--cacheinfo", place, env=env)
        made = _git(root, "write-tree", env=env)
    message = f"tlpipe sweep: {cell.name}"
    known = {**_SOMEBODY, **os.environ}
    with_parent = ("commit-tree", made, "-p", commit, "-m", message)
    experiment = _git(root, *with_parent, env=known if not _has_name(root) else None)
    _git(root, "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/{cell.name}", experiment)
    return experiment


def _params(root: Path, cell: Entry) -> str:
    """Return params.yaml with what the cell changes; comments stay."""
    from dvc.utils.serialize import modify_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, graph.PARAMS)
        path.write_bytes((root / graph.PARAMS).read_bytes())
        with modify_yaml(str(path)) as content:
            for name in SECTIONS:
                wanted, section = cell.content[name], content.get(name) or {}
                content[name] = section
                for key in [key for key in section if key not in wanted]:
                    del section[key]
                for key, value in wanted.items():
                    if key not in section or section[key] != value:
                        section[key] = value
        return path.read_text(encoding="utf-8")


def _entries(root: Path, cell: Entry, places: Mapping[str, Path]) -> dict[str, Any]:
    """Return what dvc.lock states of the cell's stages."""
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile

    written = {graph.PATHS[name]: path for name, path in places.items()}
    known = yaml.safe_load((root / _LOCK).read_text(encoding="utf-8"))["stages"]
    found = {}
    with Repo(str(root)) as repo:
        for name in STAGES:
            stage = repo.stage.load_one(str(root / graph.FILE), name)
            for item in (*stage.deps, *stage.outs):
                if not isinstance(item, ParamsDependency):
                    _state(repo, item, written.get(item.def_path), known)
                elif Path(item.fs_path).name == graph.PARAMS:
                    item.fill_values(_values(cell.content, item.params))
                else:
                    item.save()
            found[name] = yaml.safe_load(yaml.safe_dump(_plain(to_single_stage_lockfile(stage))))
    return found


def _plain(value: Any) -> Any:
    """Return mappings and lists of DVC as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _values(content: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """Return the values of keys such as 'train' and 'embed.backbone'."""
    found = {}
    for key in keys:
        section, _, name = key.partition(".")
        found[key] = content[section][name] if name else content[section]
    return found


def _state(repo: "Repo", item: "Output", path: Path | None, known: Mapping[str, Any]) -> None:
    """Let a dependency or output state what a cell has read or written, and cache that.

    What the cell has not made itself is as the project's own dvc.lock states it.
    """
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta
    from dvc_data.hashfile.transfer import transfer

    if path is None:
        for stage in known.values():
            for row in (*stage.get("deps", ()), *stage.get("outs", ())):
                if row["path"] == item.def_path:
                    item.hash_info = HashInfo(item.hash_name, row[item.hash_name])
                    item.meta = Meta.from_dict(row)
                    return
    odb = repo.cache.local
    staged, meta, made = build(odb, str(path or item.fs_path), repo.fs, item.hash_name)
    item.meta, item.hash_info = meta, made.hash_info
    if path is not None and getattr(item, "use_cache", True):
        transfer(staged, odb, {made.hash_info}, shallow=False)


class _index:  # noqa: N801 - used as a function
    """A Git index of its own, filled with a tree."""

    def __init__(self, root: Path, tree: str) -> None:
        self._root, self._tree = root, tree
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> dict[str, str]:
        env = {**os.environ, "GIT_INDEX_FILE": str(Path(self._folder.name, "index"))}
        _git(self._root, "read-tree", self._tree, env=env)
        return env

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _has_name(root: Path) -> bool:
    command = ["git", "var", "GIT_COMMITTER_IDENT"]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def _git(
    root: Path, *arguments: str, text: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    found = subprocess.run(
        ["git", *arguments],
        cwd=root,
        input=text,
        env=env,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    return found.stdout.strip()
