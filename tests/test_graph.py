"""One vocabulary: DVC stage = command = section of params.yaml = verb file = Prefect task."""

import ast
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import packages_distributions
from inspect import signature
from pathlib import Path, PurePosixPath

import grimp
import pytest
import yaml

from tests.conftest import ROOT
from tlpipe import code_digest, upgrade
from tlpipe.cli.stages import function
from tlpipe.graph import LOCK, PATHS, STAGES, read
from tlpipe.project import Project, code, lock, models

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NAMES = list(DVC)


def paths(stage: str, *keys: str) -> list[str]:
    entries = [entry for key in keys for entry in DVC[stage].get(key, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def test_one_name_in_every_place() -> None:
    assert list(STAGES) == NAMES
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) == set(NAMES)
    assert {node.name for node in read(ROOT)} == set(NAMES)
    printed = subprocess.run(["tlpipe", "--help"], capture_output=True, text=True, check=True)
    for name, stage in STAGES.items():
        module = stage.module
        assert module.rpartition(".")[2] == name
        assert (ROOT / file_of(module)).is_file()
        assert re.search(rf"^│ {name} ", printed.stdout, re.MULTILINE)
        assert DVC[name]["cmd"] == f"tlpipe {name}"


def test_dvc_yaml_and_the_lock_are_what_is_generated() -> None:
    """In this repository too, whose code they are of: 'tlpipe upgrade' writes them."""
    changed = dict(Project(ROOT).plan().changed)
    if sys.version_info >= (3, 12):  # which takes newer versions of NumPy and SciPy
        changed.pop(LOCK, None)
    assert changed == {}
    assert (ROOT / upgrade.base("dvc.yaml")).read_text() == (ROOT / "dvc.yaml").read_text()
    stated, installed = (
        {name: stage["code"] for name, stage in yaml.safe_load(text)["stages"].items()}
        for text in ((ROOT / LOCK).read_text(), lock())
    )
    assert stated == installed
    text = (ROOT / "dvc.yaml").read_text()
    assert text.count("\n") <= 150
    stages = re.split(r"^  (?=\w)", text.partition("# End of what")[0], flags=re.MULTILINE)[1:]
    assert [stage.partition(":")[0] for stage in stages] == NAMES
    assert max(stage.count("\n") for stage in stages) <= 15


@pytest.mark.parametrize("stage", NAMES)
def test_what_run_reads_and_writes_are_the_deps_and_outs(stage: str) -> None:
    taken = []
    for name, argument in signature(function(stage), eval_str=True).parameters.items():
        if argument.annotation in (Path, Path | None):
            taken.append(name)
        elif is_dataclass(argument.annotation):
            taken += [field.name for field in fields(argument.annotation)]
    found = STAGES[stage]
    assert sorted({*taken} - {"workspace"}) == sorted(found.reads + found.writes)
    assert set(found.kept) | set(found.uncached) | set(found.metrics) <= set(found.writes)
    written = paths(stage, "outs", "metrics", "plots")
    deps = [path for path in paths(stage, "deps") if not path.startswith("${")]
    optional = ["data/textures.yaml"] * ("evaluate.ood" in found.optional_sources)
    assert deps == [*optional, *(PATHS[name] for name in found.reads)]
    assert sorted(written) == sorted(PATHS[name] for name in found.writes)
    for path in written:
        # In Git, where nothing of artifacts is.
        assert path.startswith(f"artifacts/{stage}/") or (stage, path) == ("split", "splits.csv")


def test_every_path_is_written_by_one_stage_or_lies_in_what_one_writes() -> None:
    written = [name for stage in STAGES.values() for name in stage.writes]
    assert len(set(written)) == len(written)
    assert set(PATHS) - set(written) == {"held_out"}
    assert PurePosixPath(PATHS["held_out"]).is_relative_to(PATHS["model"])


@pytest.mark.parametrize("stage", NAMES)
def test_the_lock_s_code_is_the_import_closure(stage: str) -> None:
    graph = grimp.build_graph("tlpipe", exclude_type_checking_imports=True, cache_dir=None)
    module = STAGES[stage].module
    modules = {module, *graph.find_upstream_modules(module)}
    packages = {name.rpartition(".")[0] for name in modules}
    assert code_digest.closure(module) == (modules | packages) - {"tlpipe"}


def test_the_package_itself_holds_nothing_that_a_stage_runs() -> None:
    """Its ``__init__`` is part of no digest: a new public name trains nothing anew."""
    for path in (ROOT / "tlpipe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "tlpipe":
                for alias in node.names:
                    assert f"tlpipe.{alias.name}" in code_digest._modules("tlpipe"), path


@pytest.mark.parametrize("stage", NAMES)
def test_the_section_is_the_stage_s_model(stage: str) -> None:
    assert DVC[stage]["params"] == [
        stage,
        *STAGES[stage].decided_by,
        {"tlpipe.lock.yaml": [f"stages.{stage}"]},
    ]
    model = models()[stage]
    section = yaml.safe_load((ROOT / "params.yaml").read_text())[stage]
    assert set(section) <= set(model.model_fields)


def test_every_dep_is_a_file_an_output_or_the_source() -> None:
    outputs = {path for stage in NAMES for path in paths(stage, "outs", "metrics", "plots")}
    for stage in NAMES:
        for dep in paths(stage, "deps"):
            is_source = dep in ("${ingest.source}", "data/textures.yaml")
            is_output = any(PurePosixPath(dep).is_relative_to(path) for path in outputs)
            assert is_output or is_source or (ROOT / dep).is_file(), dep
    assert [s for s in NAMES if "${ingest.source}" in paths(s, "deps")] == ["ingest"]


def test_byte_code_never_counts(tmp_path: Path) -> None:
    folders = {str(Path(dep).parent) for stage in NAMES for dep in paths(stage, "deps")}
    compiled = [f"{folder}/__pycache__/x.pyc" for folder in sorted(folders)]
    checked = subprocess.run(
        ["dvc", "check-ignore", *compiled], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert checked.stdout.split("\n")[:-1] == compiled


def test_the_order_is_that_of_the_data() -> None:
    upstream = {stage.name: stage.upstream for stage in read(ROOT)}
    assert upstream == {
        "ingest": (),
        "split": ("ingest",),
        "embed": ("ingest",),
        "audit": ("embed", "ingest", "split"),
        "train": ("embed", "ingest", "split"),
        "export": ("ingest", "split", "train"),
        "evaluate": ("audit", "export", "ingest", "split", "train"),
        "register": ("audit", "evaluate", "export", "ingest", "split", "train"),
    }


# Imported by what stages run, and left out of the lock: of all stages, or of one.
NO_BYTES = {
    "fsspec": "fetches what is then digested",
    "huggingface-hub": "fetches what is compared with a digest",
    "joblib": "says how many processes there are",
    "model-signing": "writes beside a bundle",
    "packaging": "compares versions",
    "pydantic": "checks parameters",
    "pydantic-core": "checks parameters",
    "pyyaml": "reads parameters",
    "rich": "draws progress",
    "safetensors": "a format that does not change",
    "threadpoolctl": "limits threads",
}
NOT_USED = {
    "ingest": {
        "matplotlib",  # audit draws
        *("onnxruntime", "torch"),  # of a backbone's network, not of its preprocessing
    },
    "split": {"numpy", "onnxruntime"},  # it draws by digests
    "embed": {"pillow", "pillow-heif", "scipy"},  # it opens no image file
    "audit": {"onnxruntime", "pillow-heif", "timm", "torch", "torchvision"},  # and runs no network
    "train": {"onnx", "onnxruntime", "pillow", "pillow-heif"},
    "export": {"dvc", "pillow-heif"},  # of DVC, its lock file alone
}
# What a library computes with, of those that only it imports.
BEHIND = {"cleanlab": {"scikit-learn"}, "onnxscript": {"onnx-ir"}}


@pytest.mark.fault("E27")
@pytest.mark.parametrize("stage", [name for name in NAMES if name != "register"])
def test_the_lock_s_libraries_are_those_that_a_stage_imports(stage: str) -> None:
    """But for ``register``, which computes nothing: other versions register nothing anew."""
    graph = grimp.build_graph(
        "tlpipe",
        include_external_packages=True,
        exclude_type_checking_imports=True,
        cache_dir=None,
    )
    found = STAGES[stage]
    modules = set[str]().union(*map(code_digest.closure, (found.module, *found.decided_in)))
    imported = set[str]().union(*map(graph.find_modules_directly_imported_by, modules))
    known = packages_distributions()
    named = {
        re.sub(r"[-_.]+", "-", package).lower()
        for module in imported - {"tlpipe"} - sys.stdlib_module_names
        if not module.startswith("tlpipe.")
        for package in known.get(module, [module])
    }
    behind = set[str]().union(*(BEHIND.get(name, set()) for name in found.libraries))
    exporter = {"onnxscript"} if "onnx" in found.libraries else set()
    left_out = NO_BYTES.keys() | NOT_USED.get(stage, set())
    assert {*found.libraries} == (named - left_out) | behind | exporter
    assert NOT_USED.get(stage, set()) <= named


@pytest.mark.fault("E26")
@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("ingest", "tlpipe.backbones.backbone"),  # the sampling where that is auto
        ("ingest", "tlpipe.backbones.sampling"),
        ("embed", "tlpipe.backbones.embed"),  # the threads
        ("embed", "tlpipe.training.model"),  # the weights of a registered model
        ("evaluate", "tlpipe.evaluation.evaluate"),  # whether built-in images fit
    ],
)
def test_what_decides_a_value_before_run_is_code_of_the_stage(
    stage: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = code(stage), code_digest._modules("tlpipe")
    changed = {**known, module: known[module]._replace(digest="other")}
    monkeypatch.setattr(code_digest, "_modules", lambda _: changed)
    assert code(stage)["code"] != before["code"]


def test_the_command_line_decides_no_value_of_a_stage() -> None:
    """Its code is part of no digest."""
    assert {"timm", "torchvision"} <= set(code("ingest"))
    found = {
        path.name: count
        for path in (ROOT / "tlpipe/cli").glob("*.py")
        if (count := path.read_text().count("model_copy("))
    }
    # An option of cross-validate; the digest of weights that embed then reads and compares.
    assert found == {"projects.py": 1, "stages.py": 1}


def test_the_build_of_a_library_for_another_device_is_the_same_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_a_gpu(*packages: str) -> dict[str, str]:
        built = {"torch": "2.9.1+cu128", "onnxruntime-gpu": "1.31.1"}
        return {name: built[name] for name in packages if name in built}

    monkeypatch.setattr(code_digest, "versions", on_a_gpu)
    stated = code("embed")
    del stated["code"]
    assert stated == {"onnxruntime": "1.31.1", "torch": "2.9.1"}
    assert "onnxruntime" not in code("ingest")
