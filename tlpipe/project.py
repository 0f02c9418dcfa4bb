"""A project: the folder of a params.yaml, where everything in it lies, and which code runs it.

``tlpipe.lock.yaml`` states, for each stage, a digest of its code and the versions of the packages
that change what it writes. DVC compares these like parameters, so another code runs a stage again,
and every stage compares them before it runs: what is installed may be another version.
"""

import importlib
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tlpipe import code_digest, files, graph, params, upgrade
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.params import Section

_LOCK_HEAD = """\
# Written by tlpipe: which code, and which versions of other packages, the stages run with. Commit
# it. A stage does not run with others; 'tlpipe upgrade' accepts those that are installed.
"""
_SAME = {"onnxruntime-gpu": "onnxruntime"}  # the same code, for other devices


@dataclass(frozen=True)
class Upgrade:
    """What the installed tlpipe would change in a project; paths are relative to its folder.

    Attributes:
        changed: the files that would be other ones, and their texts.
        bases: what tlpipe itself writes, the user's edits aside.
        conflicts: the files in which both changed the same lines, and where those begin.
        migrations: what happens to the keys of params.yaml, a line each.
        again: the stages that run again, and why.
    """

    changed: dict[str, str]
    bases: dict[str, str]
    conflicts: dict[str, list[int]]
    migrations: list[str]
    again: dict[str, str]

    def followers(self) -> list[str]:
        """Return the stages that read what those write, at any depth: they may run again."""
        changing = set(self.again)
        for name, stage in graph.STAGES.items():
            if any({*stage.reads} & {*graph.STAGES[other].writes} for other in changing):
                changing.add(name)
        return [name for name in graph.STAGES if name in changing and name not in self.again]


class Project:
    """A project's folder, such as ``tlpipe init`` makes.

    Attributes:
        folder: absolute, without links.
        params: its file of parameters, in that folder.

    Example:
        >>> project = Project(".")
        >>> project.path("bundle").relative_to(project.folder).as_posix()
        'artifacts/export/bundle'
    """

    def __init__(self, folder: Path | str) -> None:
        """Take a folder, which need not be a project yet.

        Raises:
            ParamsError: there is no such folder.
        """
        if not isinstance(folder, (str, Path)):
            raise ParamsError(f"expected a project's folder; got {type(folder).__name__}.")
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise ParamsError(
                f"{self.folder} is no folder; expected that of a project. 'tlpipe init' makes one."
            )
        self.params = self.folder / graph.PARAMS  # it may be a link

    @classmethod
    def find(cls, params: Path | None = None) -> "Project":
        """Return the project of a file of parameters, or that which the current folder is in.

        Raises:
            ParamsError: there is none.
        """
        if params is not None:
            if not params.is_file():
                raise ParamsError(f"{params} is missing; name the params.yaml of a project.")
            if params.name != graph.PARAMS:
                raise ParamsError(
                    f"--params is {params}; expected a file named {graph.PARAMS}, which is the one "
                    f"that DVC reads in a project's folder."
                )
            if not cls(params.parent).exists():
                raise ParamsError(_of_others(params))
            return cls(params.parent)
        here = Path.cwd()
        found = [folder for folder in (here, *here.parents) if (folder / graph.PARAMS).is_file()]
        for folder in found:
            if cls(folder).exists():
                return cls(folder)
        what = (
            _of_others(found[0] / graph.PARAMS)
            if found
            else (f"{here} is in no project: there is no {graph.PARAMS} in it or above it.")
        )
        raise ParamsError(f"{what} Go to a project's folder, or make one: 'tlpipe init'.")

    @classmethod
    def near(cls, params: Path | None = None) -> "Project":
        """Return the project as ``find`` does, or the current folder where there is none."""
        try:
            return cls.find(params)
        except ParamsError:
            if params is not None:
                raise
            return cls(Path.cwd())

    def exists(self) -> bool:
        """Return whether tlpipe's parameters are in the folder: DVC has the same name for its own.

        The lock says so, what tlpipe wrote last, or the first line of ``dvc.yaml``.
        """
        return self.params.is_file() and (
            (self.folder / graph.LOCK).exists()
            or (self.folder / upgrade.BASES).is_dir()
            or upgrade.is_written(self.folder / graph.FILE)
        )

    def path(self, name: str) -> Path:
        """Return where an output of a stage lies, by its name in ``graph.PATHS``."""
        return self.folder / graph.PATHS[name]

    def run(self) -> dict[str, Any]:
        """Do what ``tlpipe run`` does, and print what it says; return what was registered.

        That is what ``artifacts/register/receipt.json`` holds: ``name``, ``version``, ``bundle``
        (its digest), ``accuracy`` (``value``, ``low``, ``high``, ``confidence``) and more.

        Raises:
            ParamsError: the folder is no project.
            ArtifactError: a stage failed; the message is the line in which it said why.
        """
        if not self.params.is_file():
            raise ParamsError(f"{self.folder} is no project: it has no {graph.PARAMS}.")
        if not self.exists():
            raise ParamsError(_of_others(self.params))
        lines = []
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "tlpipe", "run", "--params", str(self.params)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                print(lines[-1])  # a notebook shows what this process writes, not its children
        if process.returncode:
            raise ArtifactError(graph.reason("tlpipe run", lines, process.returncode))
        return dict(files.read_json(self.path("receipt")))

    def sections(self) -> dict[str, Section]:
        """Read every section of params.yaml, each against its stage's own model.

        Raises:
            ParamsError: a key is unknown, or a value does not fit.
        """
        return params.load(_from_here(self.params), models())

    def check_compared(self) -> None:
        """Check that params.yaml names all that DVC compares: it runs nothing where a name is gone.

        Raises:
            ParamsError: a section, or a key that decides for another one, is missing.
        """
        content = params.parse(params.read_text(self.params), _from_here(self.params))
        for name, stage in graph.STAGES.items():
            for key in (name, *stage.decided_by):
                section, _, field = key.partition(".")
                found = content.get(section)
                if section in content and (not field or field in (found or {})):
                    continue
                default = models()[section].model_fields[field].default if field else "{}"
                raise ParamsError(
                    f"{key} is missing in {_from_here(self.params)}: it has its default, but DVC "
                    f"compares what is written, and runs nothing without. Write '{field or key}: "
                    f"{default}'{f' in the section {section}' if field else ''}."
                )

    def check_code(self, stage: str) -> None:
        """Check that a stage would run the code that the lock states.

        Raises:
            ArtifactError: there is no lock, it states other code or other versions, or an upgrade
                left a conflict.
        """
        upgrade.check_settled(self.folder)
        if why := _difference(self._stated().get(stage, {}), code(stage)):
            raise ArtifactError(
                f"{stage} was not run: {graph.LOCK} states {why}. Install what it states, or "
                f"accept what is installed: 'tlpipe upgrade'."
            )

    def check_watched(self, stage: str) -> None:
        """Check that DVC watches each optional source of a stage; outside of DVC there is none.

        Raises:
            ArtifactError: dvc.yaml lacks a dependency.
        """
        stages = _entries(upgrade.text(self.folder / graph.FILE) or "")
        named = self._optional_sources() if graph.STAGES[stage].optional_sources else {}
        for source in graph.STAGES[stage].optional_sources:
            path = named.get(source)
            if stage in stages and path and not graph.watches(stages[stage], source, path):
                raise ArtifactError(
                    f"{stage} was not run: {source} is {path}, and {stage} in {graph.FILE} does "
                    f"not depend on that, so DVC would not see it change. Write the dependency: "
                    f"'tlpipe upgrade'."
                )

    def check_generated(self) -> None:
        """Check that the project is as 'tlpipe upgrade' would leave it.

        Raises:
            ArtifactError: it is not.
        """
        found = self.plan()
        if others := self._other_sources() if {*found.changed} == {graph.FILE} else []:
            raise ArtifactError(
                f"{graph.FILE} in {self.folder} has other dependencies than {graph.PARAMS} names: "
                f"{' and '.join(others)} now. Write those: 'tlpipe upgrade', or 'tlpipe run'."
            )
        if found.changed:
            stages: dict[str, list[str]] = {}
            for name, why in found.again.items():
                stages.setdefault(why, []).append(name)
            whys = "; ".join(f"{', '.join(names)}: {why}" for why, names in stages.items())
            raise ArtifactError(
                f"{' and '.join(found.changed)} in {self.folder} would be written otherwise by the "
                f"tlpipe that is installed{f' ({whys})' if whys else ''}. Accept that: 'tlpipe "
                f"upgrade' ('--dry-run' shows what runs again), or install what the lock states."
            )

    def _optional_sources(self) -> dict[str, str]:
        return _optional(params.parse(params.read_text(self.params), self.params))

    def _other_sources(self) -> list[str]:
        """Return what optional sources are where dvc.yaml was written for others."""
        named = self._optional_sources()
        now = _entries(graph.generated(named))
        before = _entries(upgrade.text(self.folder / upgrade.base(graph.FILE)) or "")
        return [
            f"{source} is {named.get(source, 'null')}"
            for stage, found in graph.STAGES.items()
            if stage in before and before[stage] != now[stage]
            for source in found.optional_sources
        ]

    def _stated(self) -> dict[str, Any]:
        """Return what the lock states of each stage.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        path = self.folder / graph.LOCK
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return {name: dict(stage) for name, stage in content["stages"].items()}
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; 'tlpipe upgrade' writes it.") from None
        except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError):
            raise ArtifactError(f"{path} is damaged; 'tlpipe upgrade' writes it anew.") from None

    def is_source(self) -> bool:
        """Return whether this is the repository that the installed code lies in."""
        return Path(__file__).resolve().parents[1] == self.folder

    def is_current(self) -> bool:
        """Return whether the lock states the version and the code that are installed.

        A comment in it, or another order, states nothing else.
        """
        return _sections(upgrade.text(self.folder / graph.LOCK) or "") == _sections(lock())

    def plan(self) -> Upgrade:
        """Return what the installed tlpipe would change; write nothing.

        Raises:
            ArtifactError: a file has the marks of an earlier conflict, or the project is not known
                to be of this version or an earlier one.
            ParamsError: params.yaml is no YAML, or has a key under its old and its new name.
        """
        name = _from_here(self.params)
        old = params.read_text(name)
        new, said = upgrade.migrate(old, self._version(), until=version("tlpipe"))
        bases = {graph.FILE: dvc_yaml(params.parse(new, name))}
        if upgrade.is_of_init(self.folder):
            bases |= upgrade.texts()
        merged = {path: upgrade.merged(self.folder, path, text) for path, text in bases.items()}
        texts = {**({graph.PARAMS: new} if new != old else {}), **merged}
        if not self.is_current():
            texts[graph.LOCK] = lock()
        return Upgrade(
            changed={
                path: text
                for path, text in texts.items()
                if text is not None and text != upgrade.text(self._at(path))
            },
            bases=bases,
            conflicts={
                path: lines
                for path, text in merged.items()
                if (lines := upgrade.conflicts(text or ""))
            },
            migrations=said,
            again=self._again(old, new, merged[graph.FILE] or ""),
        )

    def generate(self) -> Upgrade:
        """Write what the installed tlpipe would change, and return it.

        The lock comes last, and not at all where there are conflicts: no stage of tlpipe runs
        before they are settled.
        """
        found = self.plan()
        for path, text in found.changed.items():
            if path != graph.LOCK:
                upgrade.write(self._at(path), text)
        # That of dvc.yaml last: alone, it would say that this is no project of 'init'.
        for path, text in reversed(found.bases.items()):
            upgrade.write(self.folder / upgrade.base(path), text)
        if graph.LOCK in found.changed and not found.conflicts:
            upgrade.write(self.folder / graph.LOCK, found.changed[graph.LOCK])
        return found

    def _at(self, path: str) -> Path:
        return self.params if path == graph.PARAMS else self.folder / path

    def _version(self) -> str:
        """Return the version that the project is of: what the lock names, of two the older one.

        Raises:
            ArtifactError: it is not known, or a later one than is installed.
        """
        from packaging.version import Version

        here = version("tlpipe")
        path = self.folder / graph.LOCK
        # Not by the YAML parser: after a merge of branches by Git it may be none.
        names = re.findall(r"^tlpipe: *['\"]?([^\s'\"]+)", upgrade.text(path) or "", re.MULTILINE)
        if not names and not upgrade.CHANGES:
            return here
        try:
            found: str = min(names, key=Version)
        except ValueError:  # none, or no version
            raise ArtifactError(
                f"{path} does not say which version of tlpipe the project is of, by which "
                f"params.yaml is upgraded. Get it back from Git, or write 'tlpipe: VERSION' there."
            ) from None
        if Version(found) > Version(here):
            raise ArtifactError(
                f"{path} is of tlpipe {found}, and {here} is installed. Install {found}, or one "
                f"after it."
            )
        return found

    def _again(self, old: str, new: str, dvc: str) -> dict[str, str]:
        """Return the stages that run again, and why: their code, parameters, entry in dvc.yaml."""
        try:
            stated = self._stated()
        except ArtifactError:  # missing or damaged: it is written anew
            stated = {}
        files = {
            f"its section of {graph.PARAMS}": (_sections(old), _sections(new)),
            f"its entry in {graph.FILE}": (
                _entries(upgrade.text(self.folder / graph.FILE) or ""),
                _entries(dvc),
            ),
        }
        found = {}
        for name in graph.STAGES:
            parts = [
                _difference(stated[name], code(name))
                if name in stated
                else f"{graph.LOCK} does not state its code"
            ]
            parts += [
                what
                for what, (before, after) in files.items()
                if before and after and before.get(name) != after.get(name)
            ]
            if why := "; ".join(filter(None, parts)):
                found[name] = why
        return found


def _from_here(path: Path) -> Path:
    """Return a path as messages name it: relative, where it lies in the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _of_others(path: Path) -> str:
    return (
        f"{path} is of something else than tlpipe: beside it there is no {graph.LOCK}, no "
        f"{upgrade.BASES}/, and no {graph.FILE} that begins with '{graph.MARK}'."
    )


def _sections(text: str) -> dict[str, Any]:
    """Return what a YAML file holds by its first keys; nothing where it is damaged."""
    try:
        return params.parse(text, Path())
    except ParamsError:
        return {}


def _entries(text: str) -> dict[str, Any]:
    """Return what a ``dvc.yaml`` says of each stage, but for what it is for."""
    stages = _sections(text).get("stages")
    return {
        name: {key: value for key, value in stage.items() if key != "desc"}
        for name, stage in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(stage, dict)
    }


def dvc_yaml(content: Mapping[str, Any]) -> str:
    """Return what tlpipe writes into ``dvc.yaml``, for what params.yaml holds."""
    return graph.generated(_optional(content))


def _optional(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what the parameters name that may name a source, by their names."""
    found = {}
    for source in (one for stage in graph.STAGES.values() for one in stage.optional_sources):
        name, key = source.split(".")
        section = content.get(name)
        path = section.get(key) if isinstance(section, dict) else None
        if path is not None:
            found[source] = str(path)
    return found


def models() -> dict[str, type[Section]]:
    """Return the model of each stage's section."""
    return {
        name: importlib.import_module(stage.module).Params for name, stage in graph.STAGES.items()
    }


def code(stage: str) -> dict[str, str]:
    """Return what the lock states of a stage: a digest of its code, and versions of packages."""
    found = graph.STAGES[stage]
    names = [*found.libraries, *(other for other, name in _SAME.items() if name in found.libraries)]
    packages = code_digest.versions(*names)
    # The build for another device is the same version.
    known = {_SAME.get(name, name): text.partition("+")[0] for name, text in packages.items()}
    return {
        "code": code_digest.of_closure(found.module, *found.decided_in),
        **dict(sorted(known.items())),
    }


def lock() -> str:
    """Return the content of tlpipe.lock.yaml for the code that is installed."""
    content = {"tlpipe": version("tlpipe"), "stages": {name: code(name) for name in graph.STAGES}}
    return _LOCK_HEAD + yaml.safe_dump(content, sort_keys=False)


def _difference(stated: Mapping[str, str], installed: Mapping[str, str]) -> str:
    parts = []
    for name in sorted({*stated, *installed}):
        there, here = stated.get(name, "none"), installed.get(name, "none")
        if there != here:
            of = f"code of tlpipe, {there}" if name == "code" else f"{name} {there}"
            parts.append(f"{of}, and {here} is installed")
    return "; ".join(parts)
