"""Each cell as an experiment of DVC, as ``dvc exp run`` would leave it.

An experiment is a commit below ``refs/exps/`` whose parent is the commit that the project is at:
the parameters of the cell, and a ``dvc.lock`` that states what its stages read and wrote. What they
wrote goes into DVC's cache. DVC itself hashes, fills its cache and writes the entries; only the
stages are not started by it, since each would import torch anew.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tlpipe import files, graph
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.sweep import state
from tlpipe.sweep.grid import SECTIONS
from tlpipe.sweep.state import STAGES, Entry

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo

_LOCK = "dvc.lock"
_SPLITS = graph.PATHS["placements"]
_STALE_S = 10.0
# Of whoever has told Git no name.
_SOMEBODY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "tlpipe"), ("EMAIL", "tlpipe@localhost"))
}


def baseline(root: Path) -> tuple[str, str]:
    """Return the commit that experiments hang on, and the tree of the project as it is now.

    Raises:
        ArtifactError: Git fails at what follows.
        ParamsError: Git gives no commit: there is no repository, no Git, or nothing in it.
    """
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD")
    except ArtifactError as error:
        raise ParamsError(
            f"{error} A sweep keeps its cells as experiments of DVC, which hang on a commit of "
            f"Git; expected one. Where there is none, make it: git init && git add . && git "
            f"commit."
        ) from None
    with _index(root, commit) as env:
        _git(root, "add", "--update", env=env)
        return commit, _git(root, "write-tree", env=env)


def save(
    root: Path, cell: Entry, places: Mapping[str, Path], commit: str, tree: str
) -> dict[str, Any]:
    """Make the experiment of a cell; return what its record keeps, to make it again from.

    ``places``: where what its stages wrote lies, by the names of ``graph.PATHS``, where that is not
    the project itself. ``commit``, ``tree``: of ``baseline``.

    Raises:
        ArtifactError: Git fails.
    """
    splits = places["placements"].read_text(encoding="utf-8")
    own = root / _SPLITS
    is_own = own.exists() and own.read_text(encoding="utf-8") == splits
    kept = {"stages": _entries(root, cell, places), "splits": None if is_own else splits}
    return {**kept, **_hang(root, cell, kept, commit, tree)}


def renew(root: Path, found: Iterable[Entry], commit: str, tree: str) -> None:
    """Let cells that are done have their experiments on the project as it is now.

    Where outputs have left DVC's cache, the record is taken away: that cell is computed anew.
    """
    from dvc.repo import Repo

    known = [(cell, kept) for cell in found if (kept := state.load(root, cell.id)) is not None]
    if not known:
        return
    listed = _git(root, "for-each-ref", "--format=%(objectname) %(refname)", _below(commit))
    there = {line.partition(" ")[2]: line.partition(" ")[0] for line in listed.splitlines()}
    with Repo(str(root)) as repo:
        for cell, kept in known:
            if not _has_outputs(root, repo, cell, kept["stages"]):
                state.record(root, cell.id).unlink()
                continue
            now = there.get(f"{_below(commit)}/{cell.name}")
            if (kept["tree"], kept["experiment"]) != (tree, now):
                made = _hang(root, cell, kept, commit, tree)
                files.write_json(state.record(root, cell.id), {**kept, **made})


def _has_outputs(root: Path, repo: "Repo", cell: Entry, stages: Mapping[str, Any]) -> bool:
    """Return whether DVC's cache has what the cell itself has made."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    odb, names = repo.cache.local, STAGES if cell.ingested else STAGES[1:]
    for name in names:
        outs = repo.stage.load_one(str(root / graph.FILE), name).outs
        is_cached = {out.def_path for out in outs if out.use_cache}
        for out in stages[name]["outs"]:
            if out["path"] not in is_cached:
                continue
            oids = [out["md5"]]
            if odb.exists(oids[0]) and oids[0].endswith(".dir"):
                oids += [info.value for _, _, info in Tree.load(odb, HashInfo("md5", oids[0]))]
            if not all(map(odb.exists, oids)):
                return False
    return True


def _hang(
    root: Path, cell: Entry, kept: Mapping[str, Any], commit: str, tree: str
) -> dict[str, str]:
    """Hang the experiment of a cell on a commit; return its own and the tree that it is made of."""
    lock = {"schema": "2.0", "stages": kept["stages"]}
    own = (graph.FILE, graph.LOCK, *(() if kept["splits"] else (_SPLITS,)))
    texts = {
        graph.PARAMS: _params(root, cell),
        _LOCK: yaml.safe_dump(lock, sort_keys=False),
        **({_SPLITS: kept["splits"]} if kept["splits"] else {}),
        **{name: (root / name).read_text(encoding="utf-8") for name in own},
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
    ref = f"{_below(commit)}/{cell.name}"
    lock_of_ref = root / _git(root, "rev-parse", "--git-path", f"{ref}.lock")
    # Git holds it for milliseconds: an old one is of a process that was killed.
    if lock_of_ref.exists() and time.time() - lock_of_ref.stat().st_mtime > _STALE_S:
        lock_of_ref.unlink(missing_ok=True)
    _git(root, "update-ref", ref, experiment)
    return {"experiment": experiment, "tree": tree}


def _below(commit: str) -> str:
    """Return where DVC looks for experiments that hang on a commit."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}"


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
    try:
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
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ArtifactError(
            f"'git {arguments[0]}' failed in {root}: {' '.join(said.split())}."
        ) from None
    return found.stdout.strip()
