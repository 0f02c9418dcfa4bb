import hashlib
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Workspace


def error_of(empty: Workspace, content: str) -> str:
    """Run a stage on a params.yaml and return the one line of the error."""
    (empty.path / "params.yaml").write_text(content)
    before = empty.names()
    result = empty.call("split", code=3)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tlpipe: ")
    assert empty.names() == before
    return lines[0].removeprefix("tlpipe: ")


def changed(section: str, key: str, value: object) -> str:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content.setdefault(section, {})[key] = value
    return yaml.safe_dump(content)


@pytest.mark.fault("P01")
@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("split", "test", "0.2", "split.test is '0.2'; it must be a valid number"),
        ("split", "test", 1.2, "split.test is 1.2; it must be less than 0.5"),
        ("split", "test", -0.1, "split.test is -0.1; it must be greater than 0"),
        ("split", "test", 0, "split.test is 0; it must be greater than 0"),
        ("split", "test", float("nan"), "split.test is nan; it must be a finite number"),
        ("split", "test", float("inf"), "split.test is inf; it must be a finite number"),
        ("split", "seed", 1.5, "split.seed is 1.5; it must be a valid integer"),
        ("split", "seed", True, "split.seed is True; it must be a valid integer"),
        ("ingest", "box_margin", -0.1, "ingest.box_margin is -0.1; it must be greater than or"),
        ("ingest", "box_margin", 2.5, "ingest.box_margin is 2.5; it must be less than or equal"),
        ("ingest", "background", "", "ingest.background is ''; .*at least 1 character"),
        ("ingest", "max_rejected", 1.1, "ingest.max_rejected is 1.1; it must be less than or"),
        ("audit", "folds", 1, "audit.folds is 1; it must be greater than or equal to 2"),
        ("audit", "l2", 0, "audit.l2 is 0; it must be greater than 0"),
        (
            "audit",
            "label_issues",
            241,
            "audit.label_issues is 241; it must be less than or equal to 240",
        ),
        ("audit", "sheet_images", 0, "audit.sheet_images is 0; it must be greater than or equal"),
        ("embed", "threads", "two", "embed.threads is 'two'; it must be 'auto', or a valid int"),
        ("ingest", "short_side_px", 8, "ingest.short_side_px is 8; it must be 'auto', or greater"),
        ("embed", "threads", 0, "embed.threads is 0; it must be 'auto', or greater than"),
        ("train", "l2", [0.1, -1], "train.l2.1 is -1; it must be greater than 0"),
        ("train", "l2", [], r"train.l2 is \[\]; .*at least 1 item"),
        ("register", "name", "a/b", "register.name is 'a/b'"),
        ("register", "name", "a?b", "register.name is 'a\\?b'"),
        (
            "register",
            "name",
            "a-history",
            "register.name is .*, and without -history last, which is for what keeps the moves",
        ),
        ("ingest", "source", "", "ingest.source is ''; .*at least 1 character"),
    ],
)
def test_a_wrong_value_is_an_error_by_its_whole_path(
    empty: Workspace, section: str, key: str, value: object, expected: str
) -> None:
    line = error_of(empty, changed(section, key, value))
    assert re.match(expected, line)
    assert line.endswith("Change it in params.yaml.")


@pytest.mark.fault("P02")
def test_an_unknown_key_is_an_error_with_the_nearest(empty: Workspace) -> None:
    line = error_of(empty, changed("train", "max_iteration", 3))
    assert line.startswith(
        "train.max_iteration is no known key; did you mean train.max_iterations?"
    )
    line = error_of(empty, changed("trian", "max_iterations", 3))
    assert line.startswith("trian is no known key; did you mean train?")
    line = error_of(empty, changed("register", "gate", {"acuracy": 0.9}))
    assert line.startswith(
        "register.gate.acuracy is no known key; did you mean register.gate.min_accuracy?"
    )


@pytest.mark.fault("P03")
def test_a_key_that_stands_twice_is_an_error(empty: Workspace) -> None:
    assert "line 2: the key 'split' stands twice" in error_of(empty, "split: {}\nsplit: {}\n")
    line = error_of(empty, "split:\n  seed: 1\n  seed: 2\n")
    assert "line 3: the key 'seed' stands twice" in line


@pytest.mark.fault("P03")
def test_no_object_is_built_from_yaml(empty: Workspace) -> None:
    line = error_of(empty, "split: !!python/object/apply:os.system ['touch built']\n")
    assert "could not determine a constructor" in line
    assert not (empty.path / "built").exists()


def test_a_key_that_is_no_word_is_an_error(empty: Workspace) -> None:
    assert "a key is no plain word" in error_of(empty, "split:\n  ? [1]\n  : 2\n")


def test_numbers_are_read_as_dvc_reads_them(empty: Workspace) -> None:
    line = error_of(empty, "ingest:\n  source: x\nexport:\n  parity_tolerance: 2e+1\n")
    assert line.startswith("export.parity_tolerance is 20.0; it must be less than or equal to 0.1")


@pytest.mark.fault("P04", "T13")
def test_what_makes_no_sense_is_an_error_before_any_work(empty: Workspace) -> None:
    line = error_of(empty, changed("train", "max_iterations", 0))
    assert line.startswith("train.max_iterations is 0; it must be greater than or equal to 1")
    line = error_of(empty, changed("train", "epochs", 0))
    assert line.startswith("train.epochs is 0; it must be greater than or equal to 1")
    line = error_of(empty, changed("ingest", "short_side_px", 128))
    assert line == (
        "ingest.short_side_px is 128; the backbone efficientnet_lite0 was trained with 256. "
        "Set ingest.short_side_px: auto in params.yaml, or take it out."
    )


@pytest.mark.parametrize("asked", ["0", "257", "two", ""])
def test_threads_that_cannot_be_are_an_error(empty: Workspace, asked: str) -> None:
    changed_threads = changed("embed", "threads", "auto")
    workspace = Workspace(empty.path, {**empty.env, "TLPIPE_THREADS": asked})
    line = error_of(workspace, changed_threads)
    assert line == (
        f"TLPIPE_THREADS is {asked!r}; expected a number from 1 to 256. Change or unset it."
    )


@pytest.mark.fault("P01")
def test_messages_name_keys_that_exist(empty: Workspace) -> None:
    line = error_of(empty, changed("embed", "freeze", 1.5))
    assert line.startswith("embed.freeze is 1.5; it must be")
    line = error_of(empty, changed("train", "hidden", 64))
    assert line.startswith("train.hidden is 64; it must be a list. Change it in")
    for section, key, twice in (
        ("export", "precisions", "int8"),
        ("train", "l2", 0.1),
        ("evaluate", "columns", "format"),
    ):
        line = error_of(empty, changed(section, key, [twice, twice]))
        assert line.startswith(f"{section}.{key} is ['{twice}', ") or f"{twice}]" in line
        assert f"{twice} stands twice. Change it in params.yaml." in line


@pytest.mark.fault("P04")
@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (
            "embed",
            {"weights": "none", "weights_sha256": "f" * 64},
            f"embed.weights_sha256: {'f' * 64} has no effect: embed.weights is none.",
        ),
        (
            "split",
            {"folds": 5, "test": 0.3, "validation": 0.1},
            "split.validation: 0.1, split.test: 0.3 have no effect: split.folds is 5, of which",
        ),
        (
            "export",
            {"precisions": [], "calibration_images": 32, "max_accuracy_drop": 0.1},
            "export.calibration_images: 32, export.max_accuracy_drop: 0.1 have no effect: "
            "export.precisions is []",
        ),
        (
            "train",
            {"reinitialise": 1},
            "train.reinitialise is 1; 0 stages are open, since embed.freeze is all; expected at",
        ),
    ],
)
def test_options_that_cannot_count_are_errors_before_any_work(
    empty: Workspace, section: str, values: dict[str, object], expected: str
) -> None:
    empty.configure(section, **values)
    line = error_of(empty, (empty.path / "params.yaml").read_text())
    assert line.startswith(expected)


@pytest.mark.fault("T10")
def test_weights_are_looked_for_before_any_work(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos)
    empty.configure("evaluate", ood=str(photos))
    empty.configure("embed", weights="weights.pth")
    said = empty.call("check", code=5).stderr
    assert "embed.weights is weights.pth, which cannot be read: No such file" in said
    (empty.path / "weights.pth").write_bytes(b"weights")
    found = hashlib.sha256(b"weights").hexdigest()
    said = empty.call("check", code=5).stderr
    assert "embed.weights_sha256 is not set; a file of weights is read only with its" in said
    assert f"It is {found}: set embed.weights_sha256 to that" in said
    empty.configure("embed", weights_sha256=found)
    said = empty.call("check").stdout
    images = sum(path.is_file() for path in photos.rglob("*"))
    assert f"\n{images:,} images out of distribution: {photos}\n" in said


def test_packages_of_other_versions_than_pinned_are_said(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos)
    empty.configure("evaluate", ood=str(photos))
    installed = {name: metadata.version(name) for name in ("numpy", "pillow")}
    lines = [
        "# what pip-compile writes",
        f"numpy=={installed['numpy']} \\",
        "    --hash=sha256:00",
        "    # via tlpipe",
        "pillow==1.0",
        "torch==0.1 ; python_full_version < '3.10'",
        "no-such-package==1",
    ]
    (empty.path / "constraints.txt").write_text("\n".join(lines))
    said = empty.call("check").stdout
    assert (
        f"1 packages are not what constraints.txt pins: pillow {installed['pillow']} (==1.0)"
        in said
    )
    (empty.path / "constraints.txt").write_text(lines[1])
    line, _ = empty.call("check").stdout.splitlines()
    assert line == "24 images in 2 classes: dark 12, light 12"


@pytest.mark.fault("T17")
def test_a_cache_that_cannot_be_written_is_one_line(empty: Workspace, photos: Path) -> None:
    (empty.path / "file").touch()
    cache = str(empty.path / "file" / "cache")
    stuck = Workspace(empty.path, {**empty.env, "XDG_CACHE_HOME": cache})
    stuck.set_source(photos)
    (line,) = stuck.call("check", code=6).stderr.splitlines()
    assert line.startswith(f"tlpipe: the cache {cache}/tlpipe/backbones cannot be written: Not a d")
    assert line.endswith("Set XDG_CACHE_HOME to one.")


@pytest.mark.fault("P05")
def test_unknown_names_are_errors_with_what_there_is(empty: Workspace) -> None:
    line = error_of(empty, changed("embed", "backbone", "resnet51"))
    assert line.startswith("embed.backbone is 'resnet51'; no backbone has that name, did you mean ")
    assert "resnet50" in line
    line = error_of(empty, changed("embed", "freeze", "blocks9"))
    assert (
        "embed.freeze is 'blocks9'; expected all, none, auto, a number of stages from 0 to 9"
        in line
    )
    assert "or the last stage to freeze: stem, blocks0, blocks1, " in line
    line = error_of(empty, changed("embed", "freeze", 10))
    assert "embed.freeze is 10; expected all, none, auto, a number of stages from 0 to 9" in line


def test_what_is_no_mapping_is_an_error(empty: Workspace) -> None:
    assert "holds a list; expected sections" in error_of(empty, "- a\n")
    assert error_of(empty, "ingest: [1]\n").startswith("ingest is [1]; it must be")
    assert "params.yaml: line 2:" in error_of(empty, "split: [1\n")
    (empty.path / "params.yaml").unlink()
    result = empty.call("split", code=3)
    assert f"{empty.path} is in no project: there is no params.yaml in it or above" in result.stderr
    result = empty.call("split", "--params", "params.yaml", code=3)
    assert "params.yaml is missing" in result.stderr


def test_an_error_in_a_later_section_stops_the_first_stage(workspace: Workspace) -> None:
    workspace.replace("params.yaml", "name: digits", "nmae: digits")
    result = workspace.run("dvc", "repro", code=None)
    assert result.returncode != 0
    assert "register.nmae is no known key; did you mean register.name?" in result.stderr
    assert not (workspace.path / "artifacts" / "ingest" / "manifest.csv").exists()


def test_editors_get_the_schema_of_the_models() -> None:
    printed = subprocess.run(["tlpipe", "schema"], capture_output=True, check=True).stdout
    committed = ROOT / "params.schema.json"
    assert committed.read_bytes() == printed, "run: tlpipe schema > params.schema.json"
    first = (ROOT / "params.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=params.schema.json"
    sections = json.loads(printed)["properties"]
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) == set(sections)


@pytest.mark.fault("P28")
def test_a_word_that_yaml_reads_as_true_or_false_is_explained(empty: Workspace) -> None:
    path = empty.path / "params.yaml"
    path.write_text(re.sub(r"\n  freeze: .*", "\n  freeze: No", path.read_text()))
    said = empty.call("check", code=3).stderr
    assert "embed.freeze is False (YAML reads No, off and false so: put quotes around" in said


@pytest.mark.fault("P28")
def test_a_word_that_is_like_no_key_is_not_guessed(empty: Workspace) -> None:
    empty.configure("train", rate=0.1)
    said = empty.call("check", code=3).stderr
    assert "train.rate is no known key; " in said
    assert "did you mean" not in said
