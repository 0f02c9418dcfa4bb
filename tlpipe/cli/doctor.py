"""Command ``doctor``: whether this machine, this environment and this project fit together."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from tlpipe.cli.stages import ParamsFile
from tlpipe.cli.tables import printable
from tlpipe.errors import TlpipeError

_FEW_GB, _TOO_FEW_GB = 5.0, 0.5  # the environment has 7 GB, a project of 2,500 photographs 1 GB
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, and what to do about it where it is not as it should be."""

    what: str
    status: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


def doctor(params: ParamsFile = None) -> None:
    """Check the environment: packages, runtime, GPU, disk, project, registry; say what to do."""
    from rich.console import Console
    from rich.markup import escape

    console, statuses = Console(soft_wrap=True, highlight=False), []
    for finding in examine(params):
        statuses.append(finding.status)
        colour = {"ok": "green", "warning": "yellow", "error": "red"}[finding.status]
        text = escape(printable(finding.found))
        console.print(f"[{colour}]{finding.status:<8}[/{colour}] {finding.what:<11} {text}")
        if finding.advice:
            console.print(f"{'':<20} -> {escape(printable(finding.advice))}")
    if "error" in statuses:
        raise typer.Exit(1)


def examine(params: Path | None) -> Iterator[Finding]:
    """Yield what is found, one thing after the other; nothing is written."""
    from tlpipe import files
    from tlpipe.project import Project

    project = Project.near(params)
    folder, is_project = project.folder, project.exists()
    yield _system(platform.system(), platform.release())
    yield _python()
    yield from _packages(folder)
    installed = {name: text for name in _RUNTIMES if (text := _version(name))}
    yield runtime(installed)
    yield _gpu(installed)
    yield _disk("disk", folder)
    yield _cache(files.cache_folder("tlpipe"))
    yield _program("git", "models will not say which commit they were made from")
    yield _dvc()
    if is_project:
        yield _project(folder)
        yield _checked("parameters", project.params.name, project.sections)
        yield _checked("lock", "states the code that is installed", project.check_generated)
    else:
        yield Finding("project", "warning", f"{folder} is in none", "'tlpipe init' makes one")
    yield _registry(folder)


def _project(folder: Path) -> Finding:
    """Say whether stages can write into a project, and whether DVC can run them."""
    from tlpipe.versioning import dvc_root

    if not os.access(folder, os.W_OK):
        text = f"{folder} cannot be written, so no stage can run in it"
        return Finding("project", "error", text, "let your user write there, or copy it")
    has_git = any((path / ".git").exists() for path in (folder, *folder.parents))
    root = dvc_root(folder)
    if root is None:
        init = "dvc init" if (folder / ".git").exists() else "dvc init --subdir"
        advice = init if has_git else "git init, then dvc init; without Git: dvc init --no-scm"
        return Finding("project", "error", f"{folder} is in no repository of DVC", advice)
    config = root / ".dvc" / "config"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if not has_git and not re.search(r"no_scm\s*=\s*true", text, re.IGNORECASE):
        text = f"{folder} is in no Git repository, which DVC expects"
        return Finding("project", "error", text, "git init, or: dvc config core.no_scm true")
    return Finding("project", "ok", str(folder))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _system(name: str, release: str) -> Finding:
    if name == "Windows":
        advice = "install it in WSL, the Windows subsystem for Linux, and run it there"
        return Finding("system", "error", f"{name} {release}, where tlpipe does not run", advice)
    return Finding("system", "ok", f"{name} {release}, {os.cpu_count()} processor cores")


def _python() -> Finding:
    from importlib.metadata import metadata

    from packaging.specifiers import SpecifierSet

    found, package = platform.python_version(), metadata("tlpipe")
    needed = package["Requires-Python"]
    shown = f"Python {found} ({sys.executable}), tlpipe {package['Version']}"
    if not SpecifierSet(needed).contains(found):
        return Finding("python", "error", f"{shown}; expected {needed}", "make a new venv")
    return Finding("python", "ok", shown)


def _packages(folder: Path) -> Iterator[Finding]:
    """Compare with what the extra ``pipeline`` asks for, and with the project's constraints."""
    advice = "pip install -c constraints.txt 'tlpipe[pipeline]', where models are to be trained"
    if find_spec("torch") is None:
        text = "those that answer (predict, serve, verify), not those that train"
        yield Finding("packages", "warning", text, advice)
        return
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    from tlpipe import versioning
    from tlpipe.sources.paths import some

    asked = [Requirement(line) for line in requires("tlpipe") or ()]
    needed = [one for one in asked if not one.marker or one.marker.evaluate({"extra": "pipeline"})]
    found = {one: _version(one.name) for one in needed}
    missing = sorted({one.name for one, text in found.items() if not text})
    wrong = sorted(
        f"{one.name} {text} ({one.specifier})"
        for one, text in found.items()
        if text and not one.specifier.contains(text, prereleases=True)
    )
    if missing:
        text = f"{len(missing)} that training needs are not installed: {some(missing, 5)}"
        yield Finding("packages", "warning", text, advice)
    if wrong:
        text = f"{len(wrong)} of versions that do not work: {some(wrong, 5)}"
        yield Finding("packages", "error", text, advice)
    if other := versioning.other_versions(folder):
        text, _, advice = other.partition(" Other versions")
        yield Finding("packages", "warning", text, f"Other versions{advice}")
    if not (missing or wrong or other):
        pins = folder / versioning.CONSTRAINTS
        how = f"as {pins} pins them" if pins.is_file() else "of versions that work"
        yield Finding("packages", "ok", f"all {len(needed)} that training needs, {how}")


def runtime(installed: Mapping[str, str]) -> Finding:
    """Say which ONNX Runtime is installed, and that both cannot be: they hold the same files."""
    shown = " and ".join(f"{name} {text}" for name, text in installed.items())
    if not installed:
        advice = "pip install 'tlpipe[cpu]', or 'tlpipe[gpu]' with an NVIDIA GPU"
        return Finding("runtime", "error", "no ONNX Runtime is installed", advice)
    if len(installed) > 1:
        text = f"{shown} are both installed, and each overwrites files of the other"
        advice = f"pip uninstall {' '.join(installed)}, then pip install one of them"
        return Finding("runtime", "error", text, advice)
    try:
        import onnxruntime
    except ImportError as error:
        text = f"{shown} cannot be imported: {error}"
        advice = f"pip uninstall {' '.join(_RUNTIMES)}, then pip install one of them"
        return Finding("runtime", "error", text, advice)
    known = onnxruntime.get_available_providers()
    names = ", ".join(name.removesuffix("ExecutionProvider") for name in known)
    return Finding("runtime", "ok", f"{shown}, execution providers: {names}")


def _gpu(installed: Mapping[str, str]) -> Finding:
    """Say which GPU the driver shows, and whether ONNX Runtime and torch can use it."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not (found := _output(*query)):
        return Finding("GPU", "ok", "no NVIDIA GPU; the processor computes")
    shown = "; ".join(found.splitlines())
    if "onnxruntime-gpu" not in installed:
        advice = "pip uninstall onnxruntime, pip install 'tlpipe[gpu]'"
        return Finding("GPU", "warning", f"{shown}; ONNX Runtime does not use it", advice)
    if find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            text, advice = f"{shown}; torch {torch.__version__} does not see it", "install another"
            return Finding("GPU", "warning", text, f"{advice} build of torch or a newer driver")
    return Finding("GPU", "ok", shown)


def _cache(folder: Path) -> Finding:
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        text = f"{there} cannot be written, where exported networks are kept"
        return Finding("cache", "error", text, "set XDG_CACHE_HOME to a folder that can")
    return _disk("cache", folder)


def _existing(folder: Path) -> Path:
    """Return a folder, or what of its parents is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _disk(what: str, folder: Path) -> Finding:
    there = _existing(folder)
    free = shutil.disk_usage(there).free / 1e9
    text = f"{free:,.1f} GB free for {folder}"
    if free >= _FEW_GB:
        return Finding(what, "ok", text)
    status: Literal["warning", "error"] = "warning" if free >= _TOO_FEW_GB else "error"
    return Finding(what, status, text, f"make room: {_FEW_GB:g} GB are enough for most projects")


def _program(name: str, why: str) -> Finding:
    if found := _output(name, "--version"):
        return Finding(name, "ok", found.splitlines()[0].removeprefix(f"{name} version "))
    return Finding(name, "warning", f"not there, and {why}", f"install {name}")


def _output(*command: str) -> str:
    """Return what a program prints, or nothing where there is none or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _dvc() -> Finding:
    if found := _version("dvc"):
        return Finding("dvc", "ok", found)
    return Finding("dvc", "warning", "not there, and it runs the stages", "pip install dvc")


def _checked(what: str, found: str, check: Callable[[], object]) -> Finding:
    """Return the error that a check raises, as a finding; its message says what to do."""
    try:
        check()
    except TlpipeError as error:
        return Finding(what, "error", str(error))
    return Finding(what, "ok", found)


def _registry(folder: Path) -> Finding:
    """Say whether the registry answers, how many models it has, and as whom one is known there."""
    if find_spec("mlflow") is None:
        advice = "pip install 'tlpipe[tracking]', or answer from a bundle's folder"
        return Finding("registry", "warning", "mlflow is not installed", advice)
    from tlpipe import versioning
    from tlpipe.registry import tracking

    account = os.environ.get("MLFLOW_TRACKING_USERNAME") or (
        "the owner of MLFLOW_TRACKING_TOKEN" if "MLFLOW_TRACKING_TOKEN" in os.environ else ""
    )
    who = f"you are {versioning.user()}{f', with the account of {account}' if account else ''}"
    if not tracking.is_there(folder):
        return Finding("registry", "ok", f"none yet, 'tlpipe run' makes it; {who}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        with tracking.connection(folder) as client:
            names = tracking.model_names(client)
            place = versioning.without_credentials(client.tracking_uri).partition("?")[0]
    except TlpipeError as error:
        return Finding("registry", "error", str(error))
    known = f"{len(names)} models" if len(names) != 1 else f"1 model ({names[0]})"
    return Finding("registry", "ok", f"{place}, {known}; {who}")
