"""What is installed, and where: the constraints, the Makefile, the Dockerfile."""

import json
import re
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import PATIENCE_S, ROOT, Workspace, answers, free_port, server

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def install_steps(target: str) -> list[str]:
    """Return the target's own RUN lines that install Python packages, and those of its base."""
    stages = re.split(r"^FROM (?:\S+) AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    bodies = dict(zip(stages[1::2], stages[2::2], strict=True))
    steps = []
    for body in (bodies["base"], bodies[target]):
        for line in re.findall(r"^RUN (.*)$", body, re.MULTILINE):
            steps += [step.strip() for step in line.split("&&") if "pip install" in step]
    return [re.sub(r"--mount=\S+\s+", "", step) for step in steps]


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str], Workspace]:
    """Run a target's steps by hand, in a fresh folder and a fresh virtual environment."""

    def run(target: str) -> Workspace:
        app, environment = tmp_path / "app", tmp_path / "venv"
        app.mkdir()
        for names in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
            copied = [str(ROOT / name) for name in names.split()]
            subprocess.run(["cp", "-r", *copied, str(app)], check=True)
        venv.create(environment, with_pip=True)
        path = f"{environment / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        workspace = Workspace(app, {"VIRTUAL_ENV": str(environment)})
        for step in install_steps(target):
            step = step.replace("--compile-bytecode ", "")  # the longest part, for one start
            workspace.run("bash", "-c", f"PATH={path!r}; {step}")
        return workspace

    return run


def test_dockerfile_has_steps_to_run() -> None:
    serve, pipeline = install_steps("serve"), install_steps("pipeline")
    assert serve[0] == pipeline[0] == "pip install --no-cache-dir uv==0.13.8"
    assert "'.[serve,cpu]'" in serve[1]
    assert "'.[pipeline,gpu]'" in pipeline[1]
    assert len(serve) == len(pipeline) == 2


def needed(extra: str) -> set[str]:
    """Return what a target's extra installs, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = [Requirement(f"tlpipe[{extra}]")]
    while waiting:
        asked = waiting.pop()
        for line in metadata.requires(asked.name) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            is_wanted = marker is None or any(
                marker.evaluate({"extra": name}) for name in asked.extras | {""}
            )
            name = canonicalize_name(requirement.name)
            if is_wanted and (name not in found or requirement.extras):
                found.add(name)
                with suppress(metadata.PackageNotFoundError):  # the other runtime
                    if requirement.name != "tlpipe":
                        metadata.requires(requirement.name)
                        waiting.append(requirement)
    return found


def test_what_the_serve_target_asks_for_has_no_training_in_it() -> None:
    """The slow tests install both targets; this one reads what they would."""
    serve, pipeline = needed("serve,cpu"), needed("pipeline,gpu")
    assert {"onnxruntime", "numpy", "pillow", "fastapi", "uvicorn"} <= serve
    unwanted = {"torch", "timm", "mlflow", "dvc", "prefect", "scikit-learn", "onnxruntime-gpu"}
    assert not unwanted & serve
    assert unwanted <= pipeline
    assert "onnxruntime" not in pipeline


def test_serving_imports_without_what_its_target_lacks() -> None:
    there = needed("serve,cpu") | {"tlpipe"}
    blocked = sorted(
        top
        for top, names in metadata.packages_distributions().items()
        if not there & {str(canonicalize_name(name)) for name in names}
    )
    assert {"torch", "mlflow", "scipy"} <= set(blocked)
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "from tlpipe import cli\n"
        "from tlpipe.serving import serve\n"
        "from tlpipe import predict\n"
        "from tlpipe.runtime import open_session\n"
        "import onnxruntime"
    )
    Workspace(ROOT).run("python", "-c", program)


@pytest.mark.slow
def test_the_serve_target_answers_without_torch(
    build: Callable[[str], Workspace], artifacts: Path
) -> None:
    app = build("serve")
    python = str(Path(app.env["VIRTUAL_ENV"]) / "bin" / "python")
    listed = json.loads(app.run(python, "-m", "pip", "list", "--format", "json").stdout)
    names = {package["name"].lower() for package in listed}
    assert {"onnxruntime", "numpy", "pillow", "fastapi", "uvicorn"} <= names
    unwanted = {"torch", "timm", "mlflow", "dvc", "prefect", "scikit-learn", "onnxruntime-gpu"}
    assert not unwanted & names
    packages = next((Path(app.env["VIRTUAL_ENV"]) / "lib").glob("python*/site-packages"))
    tooling = {"pip", "setuptools", "uv"}
    size = sum(
        path.stat().st_size
        for path in packages.rglob("*")
        if path.is_file() and path.relative_to(packages).parts[0] not in tooling
    )
    assert size < 300e6
    command = [python, "-m", "tlpipe", "serve", "--model", str(artifacts / "export/bundle")]
    port = free_port()
    ready = f"http://127.0.0.1:{port}/v2/health/ready"
    with server(app, *command, "--port", str(port), ready=ready):
        assert answers(ready)


@pytest.mark.slow
def test_the_pipeline_target_has_what_the_stages_import(
    build: Callable[[str], Workspace],
) -> None:
    app = build("pipeline")
    python = str(Path(app.env["VIRTUAL_ENV"]) / "bin" / "python")
    needed = "torch, torchvision, timm, onnx, onnxscript, onnxruntime, mlflow.onnx, dvc, prefect"
    stages = "tlpipe.training.train, tlpipe.registry.register, tlpipe.cli"
    program = f"import {needed}, scipy.optimize, matplotlib.figure, mlxtend.data, {stages}"
    app.run(python, "-W", "ignore", "-c", program)
    listed = json.loads(app.run(python, "-m", "pip", "list", "--format", "json").stdout)
    names = {package["name"].lower() for package in listed}
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names


def test_one_runtime_is_installed_and_everything_is_as_pinned() -> None:
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
    assert len({"onnxruntime", "onnxruntime-gpu"} & set(installed)) == 1
    pins = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "torchvision", "timm", "mlflow", "dvc", "prefect", "onnx", "pillow"):
        assert f"{name}=={installed[name]}\n" in pins


def test_make_ui_shows_the_registry(main_job: Workspace) -> None:
    """The recipe's own command, in a workspace that has run."""
    port = free_port()
    printed = subprocess.run(
        ["make", "-n", "ui", f"PORT={port}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (recipe,) = [line for line in printed.splitlines() if line.startswith("tlpipe ui ")]
    env = {**main_job.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://127.0.0.1:{port}"
    with server(Workspace(main_job.path, env), *recipe.split(), ready=f"{address}/health"):
        assert answers(f"{address}/")
        found = f"{address}/api/2.0/mlflow/registered-models/alias?name=digits&alias=champion"
        with urllib.request.urlopen(found, timeout=PATIENCE_S) as response:
            version = json.loads(response.read())["model_version"]
        assert version["version"] == "1"
        artifact = f"{address}/get-artifact?run_uuid={version['run_id']}&path=plots/confusion.png"
        with urllib.request.urlopen(artifact, timeout=PATIENCE_S) as response:
            assert response.read(8) == b"\x89PNG\r\n\x1a\n"


def test_ui_shows_no_other_registry_than_the_one_in_use(empty: Workspace) -> None:
    elsewhere = Workspace(empty.path, {**empty.env, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    said = elsewhere.run("tlpipe", "ui", code=8).stderr
    assert "MLFLOW_TRACKING_URI names http://127.0.0.1:9, not this folder's registry" in said
    assert not (empty.path / "mlflow.db").exists()


def test_constraints_are_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.+!]+( ; [^:@/]+)?", line), line


def test_the_makefile_finds_the_runtime_and_refuses_other_pythons(tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (
        shown.count("'.[pipeline,serve,dev,cpu]'") + shown.count("'.[pipeline,serve,dev,gpu]'") == 2
    )
    asked = subprocess.run(
        ["make", "-n", "-B", "setup", "RUNTIME=gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'.[pipeline,serve,dev,gpu]'" in asked
    old = tmp_path / "python3.9"
    old.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c "
        '"import sys; sys.version_info = (3, 9); exec(\\"\\"\\"$2\\"\\"\\")"\n'
    )
    old.chmod(0o755)
    failed = subprocess.run(
        ["make", "-B", "setup", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode != 0
    assert "tlpipe needs Python 3.11 to 3.13" in failed.stderr
