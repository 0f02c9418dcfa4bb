"""What README.md and docs/ say of commands, parameters, files and codes is what there is."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

import tlpipe
from tests.conftest import ROOT
from tlpipe import cli
from tlpipe.graph import PATHS, STAGES
from tlpipe.project import models

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]


def code(page: Path) -> Iterator[str]:
    """Yield the lines of a page's code: fenced, indented by four, or in backticks."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def keys(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(f"{prefix}.{name}", field.annotation)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_of_a_page_exist(page: Path) -> None:
    for line in code(page):
        for name, rest in re.findall(r"(?<![\w/-])tlpipe ([a-z][a-z-]*)([^#|`&]*)", line):
            assert name in COMMANDS, f"{page.name}: {line}"
            opts = (o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts))
            known = {"--help", *opts}
            assert {*re.findall(r"--[a-z-]+", rest)} <= known, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_of_a_page_exist(page: Path) -> None:
    known = {key for name, model in models().items() for key in keys(name, model)}
    stages = "|".join(STAGES)
    for line in code(page):
        for key in re.findall(rf"(?<![\w./-])(?:{stages})(?:\.[a-z]\w*)+", line):
            if not re.search(r"\.(csv|json|py|_\w+)$", key):
                assert key in known, f"{page.name}: {line}"


def test_every_code_of_a_rejected_file_stands_in_the_table() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## Rejected files")[2], re.MULTILINE)
    assert rows == sorted(reject_codes())


def reject_codes() -> set[str]:
    """Return the codes that the source gives to ``ImageError`` and ``Reject``."""
    found = set()
    for path in (ROOT / "tlpipe").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                given[node.targets[0].id] = node.value
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                at = {"ImageError": 0, "Reject": 1}.get(node.func.id)
                if at is not None:
                    code = node.args[at]
                    code = given.get(code.id, code) if isinstance(code, ast.Name) else code
                    branches = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
                    found |= {str(one.value) for one in branches if isinstance(one, ast.Constant)}
    return found


def test_the_table_of_stages_names_what_they_write() -> None:
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    named = {stage: set(re.findall(r"`([^`]+)`", files)) for stage, files in rows}
    assert list(named) == list(STAGES)
    for stage, found in STAGES.items():
        written = {PATHS[name].removeprefix(f"artifacts/{stage}/") for name in found.writes}
        assert {name.rstrip("/") for name in named[stage]} == written


def test_the_map_of_modules_names_each_package_and_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = {p.parent.name for p in (ROOT / "tlpipe").glob("*/__init__.py")}
    rows = dict(re.findall(r"^\| `tlpipe/(\w+)/` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE))
    assert packages <= set(rows) <= packages | {"template"}
    for package, verbs in rows.items():
        for verb in re.findall(r"`(\w+)`", verbs):
            assert (ROOT / "tlpipe" / package / f"{verb}.py").is_file(), verb
    for stage in STAGES.values():
        _, package, verb = stage.module.split(".")
        assert f"`{verb}`" in rows[package]


@pytest.mark.parametrize("page", PAGES[:3], ids=lambda page: page.name)
def test_files_that_a_page_beside_the_site_names_are_there(page: Path) -> None:
    """Links of the site's own pages are checked when it is built."""
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    named = re.findall(r"`((?:tlpipe|tests|docs|benchmarks|flows)/[\w./]*)`", text)
    assert [path for path in {*links, *named} if not (ROOT / path).exists()] == []


def test_modules_that_the_architecture_names_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 20
    assert [
        path for path in named if not any((top / path).exists() for top in (ROOT, ROOT / "tlpipe"))
    ] == []


def test_the_readme_is_short_and_holds_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    for command in ("make run", "make test"):
        assert any(line.startswith(f"    {command} ") for line in lines)


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//")
    for page in tmp_path.rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name
    reference = (tmp_path / "reference" / "parameters.html").read_text(encoding="utf-8")
    assert "register.gate.max_accuracy_drop" in reference
    commands = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    python = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    for name in tlpipe.__all__:
        assert f'<h2 id="tlpipe{name.lower()}">tlpipe.{name}<' in python
    assert "Predictor.predict<" in python
    assert "``" not in python
    for name, words in {
        "notebook": "From a folder of photographs",
        "contributing": "Documentation",
        "changelog": "Changes",
    }.items():
        text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert words.lower() in text.lower(), name
    # Of a page that is opened as a file, a script can be read and JSON cannot.
    assert "var __index" in (tmp_path / "search" / "search_index.js").read_text(encoding="utf-8")
    shown = {name for name, command in COMMANDS.items() if not command.hidden}
    assert {name for name in COMMANDS if f">tlpipe {name}<" in commands} == shown
