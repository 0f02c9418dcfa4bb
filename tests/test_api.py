"""The Python API: what ``tlpipe.__all__`` names, and every example in a docstring."""

import doctest
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tlpipe
from tests.conftest import ROOT, SHARED, Workspace
from tlpipe import bundle as bundles
from tlpipe.errors import ArtifactError, ParamsError

EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "tlpipe").rglob("*.py"))
    if re.search(r"^ +>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_module_are_right(
    name: str, main_job: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of a project that has run, with its bundle and one of its images."""
    monkeypatch.chdir(main_job.path)
    module = importlib.import_module(name)
    given: dict[str, Any] = {
        "bundle": bundles.load(main_job.path / "artifacts/export/bundle"),
        "image": (main_job.path / "artifacts/evaluate/examples/0.png").read_bytes(),
    }
    found = doctest.testmod(module, extraglobs=given, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_api_is_what_is_named_and_costs_nothing_before() -> None:
    assert tlpipe.__all__ == sorted(tlpipe.__all__)
    for name in tlpipe.__all__:
        assert getattr(tlpipe, name).__doc__, name
    assert tlpipe.__version__ == version("tlpipe")
    with pytest.raises(AttributeError, match="module 'tlpipe' has no attribute 'Pipeline'"):
        tlpipe.Pipeline  # noqa: B018
    program = "import sys, tlpipe; print(sorted(n for n in sys.modules if n.startswith('tlpipe.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_run_from_python_says_what_was_registered(
    main_job: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in main_job.environment().items():
        monkeypatch.setenv(name, value)
    receipt = tlpipe.Project(main_job.path).run()
    assert (receipt["name"], receipt["version"]) == ("digits", "1")
    assert receipt["bundle"] == tlpipe.load_bundle(main_job.path / "artifacts/export/bundle").digest
    assert "Stage 'register' didn't change, skipping" in capsys.readouterr().out


def test_what_fails_from_python_says_why(empty: Workspace, tmp_path: Path) -> None:
    empty.replace("params.yaml", "  source: data/digits.yaml ", "  source: nowhere ")
    empty.call("upgrade")
    with pytest.raises(ArtifactError, match="nowhere"):
        tlpipe.Project(empty.path).run()
    (tmp_path / "no project").mkdir()
    with pytest.raises(ParamsError, match=r"no project is no project: it has no params\.yaml"):
        tlpipe.Project(tmp_path / "no project").run()


@pytest.mark.fault("P27")
@pytest.mark.parametrize("wrong", [np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (8, 8)), ["x"]])
def test_what_python_code_gives_wrongly_is_no_damaged_image(artifacts: Path, wrong: Any) -> None:
    folder = artifacts / "export/bundle"
    predictor = tlpipe.Predictor(str(folder), threads=1)
    kind = type(wrong).__name__
    with pytest.raises(ParamsError, match=rf"expected the bytes of one .*its path; got {kind}\."):
        predictor.predict(wrong)
    with pytest.raises(ParamsError, match=f"expected a bundle, such as load_bundle.*got {kind}"):
        tlpipe.Predictor(wrong)
    with pytest.raises(ParamsError, match=f"expected NAME@ALIAS, .*got {kind}"):
        tlpipe.load_bundle(wrong)
    with pytest.raises(ParamsError, match=f"expected a project's folder; got {kind}"):
        tlpipe.load_bundle("digits@champion", wrong)


def test_python_code_may_give_paths(main_job: Workspace, artifacts: Path, tmp_path: Path) -> None:
    predictor = tlpipe.Predictor(artifacts / "export/bundle", threads=1)
    image = artifacts / "evaluate/examples/0.png"
    given: list[bytes | Path | str] = [image, str(image), image.read_bytes()]
    assert len({predictor.predict(one).label for one in given}) == 1
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        predictor.predict("none.png")
    found = tlpipe.load_bundle("digits@champion", str(main_job.path))
    assert found.digest == predictor.bundle.digest
    with pytest.raises(ParamsError, match=r"digits@champion is no folder of a bundle"):
        tlpipe.Predictor("digits@champion")
    with pytest.raises(ParamsError, match=r"nowhere is no folder; expected that of a project"):
        tlpipe.Project(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, cache_env: dict[str, str]) -> None:
    """From a folder of photographs to answers over HTTP, in an empty folder."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    environment = Workspace(tmp_path, {**cache_env, "PYTHONPATH": str(ROOT)}).environment()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=None, resources=resources).execute(env=environment)
    texts = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    ]
    assert any("promotion" in text and "the first one" in text for text in texts)
    assert texts[-1].startswith("200 ")
    assert str(SHARED) not in str(notebook)
