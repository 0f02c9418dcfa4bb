import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from tests.conftest import Workspace
from tlpipe.bundle import Bundle, load, save
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split
from tlpipe.predict import Predictor


@pytest.mark.parametrize("model", [[], ["--model", "artifacts/export/bundle"]])
def test_it_answers_without_torch(main_job: Workspace, artifacts: Path, model: list[str]) -> None:
    """From the registry's champion, and from a bundle's folder."""
    examples = sorted(str(path) for path in (artifacts / "evaluate" / "examples").iterdir())
    arguments = [*model, *examples]
    program = (
        "import sys\nfrom tlpipe.cli import main\n"
        f"sys.argv = ['tlpipe', 'predict', '--json', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "absent = {'torch', 'torchvision', 'timm'}\n"
        "assert not absent & set(sys.modules), absent & set(sys.modules)\n"
        "assert 'onnxruntime' in sys.modules\n"
    )
    answers = json.loads(main_job.run("python", "-c", program).stdout)
    assert [answer["path"] for answer in answers] == examples
    for answer in answers:
        assert abs(sum(answer["probabilities"].values()) - 1) < 1e-5
        assert answer["probability"] == max(answer["probabilities"].values())
    hits = sum(Path(answer["path"]).stem == answer["label"] for answer in answers)
    assert hits >= 8


def test_the_table_names_image_label_and_failure(main_job: Workspace, artifacts: Path) -> None:
    image = artifacts / "evaluate" / "examples" / "0.png"
    wide = Workspace(main_job.path, {**main_job.env, "COLUMNS": "200"})
    good = wide.call("predict", str(image))
    assert "0.png" in good.stdout
    assert "label" in good.stdout
    mixed = wide.call("predict", "params.yaml", str(image), "none.png", code=4)
    assert "not_image" in mixed.stdout
    assert "unreadable" in mixed.stdout
    assert "0.png" in mixed.stdout


@pytest.mark.fault("D18")
def test_any_file_name_is_answered_for_and_escaped(artifacts: Path, tmp_path: Path) -> None:
    image = (artifacts / "evaluate/examples/0.png").read_bytes()
    names = ["a b.png", os.fsdecode(b"\xff.png"), "\x1b[31mred.png", "new\nline.png", "[bold].png"]
    for name in names:
        (tmp_path / name).write_bytes(image)
    workspace = Workspace(tmp_path, {"COLUMNS": "200"})
    command = ("tlpipe", "predict", "--model", str(artifacts / "export/bundle"))
    answers = json.loads(workspace.run(*command, "--json", *names).stdout)
    assert [answer["path"] for answer in answers] == names
    table = workspace.run(*command, *names).stdout
    assert "\x1b" not in table
    for shown in (r"\udcff.png", r"\x1b[31mred.png", r"new\nline.png", "[bold].png"):
        assert shown in table
    error = workspace.run(*command[:3], "\x1b[31mno", "x.png", code=3).stderr
    assert r"\x1b[31mno names no model" in error


@pytest.mark.fault("P30")
def test_no_package_keeps_what_it_would_tell_its_maker(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime keeps an identifier and events in the user's cache, but where CI is set."""
    for name in ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path / "cache"
    home = Workspace(tmp_path, {"XDG_CACHE_HOME": str(cache), "HOME": str(tmp_path)})
    image = str(artifacts / "evaluate/examples/0.png")
    bundle = str(artifacts / "export/bundle")
    home.call("predict", "--model", bundle, image)
    program = f"import tlpipe; print(tlpipe.Predictor({bundle!r}).predict({image!r}).label)"
    home.run("python", "-c", program)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name.lower()]


@pytest.mark.fault("S38")
def test_a_folder_is_answered_for_by_its_images(
    main_job: Workspace, artifacts: Path, tmp_path: Path
) -> None:
    for name in ("2.png", "1.PNG"):
        (tmp_path / name).write_bytes((artifacts / "evaluate/examples/0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "empty").mkdir()
    model = ("--model", str(artifacts / "export/bundle"))
    (tmp_path / "3.heic").write_bytes(b"\0\0\0\x18ftypheic")
    result = main_job.call("predict", "--json", *model, str(tmp_path), code=4)
    answers = json.loads(result.stdout)
    assert [Path(answer["path"]).name for answer in answers] == ["1.PNG", "2.png", "3.heic"]
    assert "error" in answers[-1]
    left = f"not called as images are: 2 of the 5 in {tmp_path}: empty/, notes.txt"
    assert left in result.stderr
    said = main_job.call("predict", *model, str(tmp_path / "empty"), code=3).stderr
    assert "empty holds no images itself; expected one with images directly in it" in said


def test_without_a_model_it_says_what_to_do(main_job: Workspace, empty: Workspace) -> None:
    result = main_job.call("predict", "--model", "nobody@champion", "x.png", code=8)
    assert "the registry has no model nobody@champion. 'tlpipe run' makes one here" in result.stderr
    result = main_job.call("predict", "--model", "digits@previous", "x.png", code=8)
    assert "the registry has no model digits@previous." in result.stderr
    result = empty.call("predict", "x.png", code=8)
    assert f"there is no registry yet: {empty.path}/mlflow.db is missing" in result.stderr
    result = empty.call("predict", "--model", "nowhere", "x.png", code=3)
    assert "nowhere names no model: there is no such folder; expected NAME@ALIAS" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def doubled(artifacts: Path, tmp_path: Path) -> Bundle:
    """A bundle whose int8 graph is the exact one with twice the temperature, so that it shows."""
    old = load(artifacts / "export" / "bundle")
    other = onnx.load(old.model)
    (tensor,) = (t for t in other.graph.initializer if t.name == "temperature")
    twice = np.float32(2 * numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(twice, "temperature"))
    graphs = {"fp32": old.model.read_bytes(), "int8": other.SerializeToString()}
    save(
        tmp_path / "bundle",
        graphs=graphs,
        labels=old.labels,
        preprocessing=old.preprocessing,
        provenance=old.provenance,
    )
    return load(tmp_path / "bundle")


def test_the_precision_that_was_named_answers(doubled: Bundle, artifacts: Path) -> None:
    image = artifacts / "evaluate" / "examples" / "4.png"
    workspace = Workspace(doubled.folder.parent)
    predict = ("tlpipe", "predict", "--model", "bundle", "--json", str(image))

    def probabilities(*options: str) -> np.ndarray:
        (answer,) = json.loads(workspace.run(*predict, *options).stdout)
        return np.array([answer["probabilities"][label] for label in doubled.labels])

    exact = probabilities()
    assert np.array_equal(probabilities("--precision", "fp32"), exact)
    # The softmax of half the logits: roots of the probabilities, made to sum to 1.
    roots = np.sqrt(exact)
    assert probabilities("--precision", "int8") == pytest.approx(roots / roots.sum(), rel=1e-4)
    error = workspace.run(*predict, "--precision", "fp16", code=3).stderr
    assert "has no graph of the precision fp16; it has fp32, int8." in error
    served = ("tlpipe", "serve", "--model", "bundle", "--precision", "fp16")
    assert "has no graph of the precision fp16" in workspace.run(*served, code=3).stderr


def test_batches_and_threads_do_not_change_answers(artifacts: Path) -> None:
    """One predictor, asked by several threads at once, for one image or for many."""
    bundle = load(artifacts / "export" / "bundle")
    squares = pixels.load(artifacts / "ingest" / "pixels").array[:6]
    alone, shared = Predictor(bundle, threads=1), Predictor(bundle, threads=2)
    logits, probabilities = shared.scores(squares)
    assert logits.shape == probabilities.shape == (6, len(bundle.labels))
    for predictor in (alone, shared):
        singles = np.concatenate([predictor.scores(squares[i : i + 1])[0] for i in range(6)])
        assert singles == pytest.approx(logits, abs=1e-4)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: shared.scores(squares)[0], range(8)))
    assert all(np.array_equal(found, logits) for found in several)


def test_serving_sees_the_pixels_that_were_evaluated(artifacts: Path) -> None:
    """From the file's bytes, the predictor computes what the evaluation read from the store."""
    from tlpipe.sources.listing import opened

    predictor = Predictor(load(artifacts / "export" / "bundle"), threads=2)
    stored = pixels.load(artifacts / "ingest" / "pixels").array
    rows = load_split(artifacts / "split" / "split.csv")
    with opened(str(artifacts.parent / "data" / "digits.yaml")) as source:
        candidates = list(source.candidates())
        for i in range(0, len(rows), 97):
            assert candidates[i].name == rows[i].path
            answer = predictor.predict(source.storage.read(candidates[i].file))
            _, probabilities = predictor.scores(stored[i : i + 1])
            assert answer == predictor.name(probabilities[0])


def test_orientation_is_respected(artifacts: Path) -> None:
    predictor = Predictor(load(artifacts / "export" / "bundle"), threads=2)
    upright = Image.open(artifacts / "evaluate" / "examples" / "4.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, options in (
        (upright, {}),
        (upright.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
    ):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        files.append(predictor.predict(file.getvalue()).probabilities)
    assert np.allclose(list(files[0].values()), list(files[1].values()))
