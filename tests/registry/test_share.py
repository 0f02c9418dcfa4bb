"""tlpipe share: a folder that timm or torchvision, the hub and ONNX Runtime read without tlpipe."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tests.conftest import Workspace, copy_repository
from tlpipe import Predictor, files, graph
from tlpipe.registry import card as cards

ALONE = ("unshare", "--mount", "--map-root-user")
LICENSES = ("--license", "mit", "--data-license", "cc-by-4.0", "--weights-license", "apache-2.0")


def logits_of_card(folder: Path, tmp_path: Path, images: np.ndarray) -> np.ndarray:
    """Run the card's own code in the folder, in a process without tlpipe; return its logits.

    ``images``: (N, 3, S, S) float32, normalised.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "tlpipe" not in code
    assert len([line for line in code.splitlines() if line.startswith("model")]) <= 5
    np.save(tmp_path / "images.npy", images)
    end = (
        "import numpy, torch\n"
        f"images = torch.from_numpy(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        f"numpy.save({str(tmp_path / 'logits.npy')!r}, model(images).detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code + end], cwd=folder, check=True)
    found: np.ndarray = np.load(tmp_path / "logits.npy")
    return found


def onnx_logits(bundle: Path, images: np.ndarray) -> np.ndarray:
    """Return what the bundle's exact graph gives for images (N, S, S, 3) uint8."""
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    found: np.ndarray = session.run(["logits"], {"images": images})[0]
    return found


def test_timm_loads_what_is_shared_and_answers_as_the_bundle_does(
    released: Workspace, tmp_path: Path
) -> None:
    released.call("share", "digits@champion", str(tmp_path / "out"), *LICENSES)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "bundle", "config.json", "model.safetensors"),
    ]
    # timm's own way to read such a folder, with the preprocessing that it finds there.
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    examples = sorted((released.path / "artifacts/evaluate/examples").glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in examples]
    seen = torch.stack([transform(picture) for picture in pictures])
    labels = json.loads((folder / "config.json").read_text())["label_names"]
    assert labels == json.loads((folder / "bundle" / "labels.json").read_text())
    predictor = Predictor(folder / "bundle")
    answers = [labels[number] for number in model(seen).argmax(dim=1).tolist()]
    assert answers == [predictor.predict(path).label for path in examples]
    side = int(seen.shape[-1])
    noise = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    config = model.pretrained_cfg
    normal = ((noise / 255 - config["mean"]) / config["std"]).astype(np.float32)
    found = logits_of_card(folder, tmp_path, normal.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found, onnx_logits(folder / "bundle", noise), atol=1e-4)


def test_the_card_is_what_the_hub_reads_and_names_no_folder(
    released: Workspace, tmp_path: Path
) -> None:
    released.call("share", "digits@1", str(tmp_path / "out"), *LICENSES)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    report = json.loads((released.path / graph.PATHS["report"]).read_text())
    exact = report["precisions"]["fp32"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        name: exact[name]["value"] for name in ("accuracy", "balanced_accuracy", "macro_f1")
    }
    for text in ("cc-by-4.0", "apache-2.0", f"{exact['accuracy']['low']:.3f}", "## Limits"):
        assert text in card.content
    for text in (str(released.path), str(Path.home()), "plots/", "@champion"):
        assert text not in card.content


def test_a_card_longer_than_the_registry_keeps_is_shared_whole(
    released: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "LONGEST", 500)
    released.call("share", "digits@1", str(tmp_path / "out"), *LICENSES)
    content = (tmp_path / "out" / "README.md").read_text()
    assert "model.load_state_dict" in content
    assert "apache-2.0" in content


def test_a_license_that_the_hub_does_not_know_is_another_one_with_a_name(
    released: Workspace, tmp_path: Path
) -> None:
    named = ("--license", "House rules 2", "--data-license", "a|b", "--weights-license", "mit")
    released.call("share", "digits@1", str(tmp_path / "out"), *named)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "House rules 2")
    assert r"a\|b" in card.content
    spelled = ("--license", "Apache-2.0", *LICENSES[2:])
    released.call("share", "digits@1", str(tmp_path / "again"), *spelled)
    assert ModelCard.load(tmp_path / "again" / "README.md").data.license == "apache-2.0"


@pytest.mark.fault("R66")
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("digits@1", "out"), 3, "--license and --data-license and --weights-license not given"),
        (("digits@1", "out", *LICENSES[:4]), 3, "--weights-license not given; nothing was written"),
        (("digits@1", "out", *LICENSES[:5], " "), 3, "--weights-license not given"),
        (("digits@1", "out", *LICENSES[:5], "None"), 3, "--weights-license not given"),
        (("digits@1", "data", *LICENSES), 6, "data is there already; nothing was written"),
        (("digits@9", "out", *LICENSES), 8, "has no version 9 of digits"),
        (("digits", "out", *LICENSES), 3, "such as digits@champion"),
    ],
)
def test_what_cannot_be_shared_is_one_line(
    released: Workspace, words: tuple[str, ...], code: int, message: str
) -> None:
    (line,) = released.call("share", *words, code=code).stderr.splitlines()
    assert message in line
    assert not (released.path / "out").exists()


@pytest.mark.fault("R67")
def test_weights_that_are_not_the_bundle_s_are_not_shared(released: Workspace) -> None:
    """Somebody who can write into the artifacts puts the weights of another training there."""
    from safetensors.numpy import load_file, save_file

    (path,) = released.path.glob("mlartifacts/**/trained/model.safetensors")
    tensors = load_file(path)
    save_file({name: -tensor for name, tensor in tensors.items()}, path)
    (line,) = released.call("share", "digits@1", "out", *LICENSES, code=7).stderr.splitlines()
    assert "what would be shared differs from the trained model" in line
    assert not (released.path / "out").exists()


def test_a_champion_that_was_changed_since_is_not_shared(released: Workspace) -> None:
    released.call("models")  # locations of artifacts are those of its folder from then on
    client = mlflow.MlflowClient(f"sqlite:///{released.path / 'mlflow.db'}")
    client.set_model_version_tag("digits", "1", "tlpipe.bundle", "f" * 64)
    (line,) = released.call(
        "share", "digits@champion", "out", *LICENSES, code=8
    ).stderr.splitlines()
    assert "digits version 1 is not what was put in production" in line
    assert not (released.path / "out").exists()


def test_a_network_with_two_classifiers_cannot_be_loaded_by_others(
    released: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm's distilled transformers have: here it says so of the small one."""
    made = timm.create_model

    def with_two(*words: str, **options: Any) -> Any:
        model = made(*words, **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "classifier": ("fc", "fc_distilled")}
        return model

    monkeypatch.setattr(timm, "create_model", with_two)
    (line,) = released.call("share", "digits@1", "out", *LICENSES, code=5).stderr.splitlines()
    assert "test_resnet has 2 classifiers in timm" in line
    assert not (released.path / "out").exists()


@pytest.mark.slow
def test_torchvision_loads_hidden_units_and_stages_that_were_trained(
    cache_env: dict[str, str], tmp_path: Path
) -> None:
    workspace = copy_repository(tmp_path / "copy", cache_env)
    weights = tmp_path / "of ann" / "mine.pth"
    weights.parent.mkdir()
    torch.save(torchvision.models.get_model("shufflenet_v2_x0_5").state_dict(), weights)
    pinned = {"weights": str(weights), "weights_sha256": files.sha256(weights)}
    workspace.configure("embed", backbone="shufflenet_v2_x0_5", freeze=4, **pinned)
    workspace.configure("train", epochs=1, hidden=[16])
    workspace.configure("export", precisions=[])
    workspace.configure("register", gate={"min_accuracy": 0.0, "min_recall": 0.0})
    workspace.reproduce()
    workspace.call("share", "digits@1", str(tmp_path / "out"), *LICENSES)
    noise = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = ((noise / 255 - mean) / std).astype(np.float32)
    found = logits_of_card(tmp_path / "out", tmp_path, normal.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found, onnx_logits(tmp_path / "out/bundle", noise), atol=1e-4)
    shared = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(b"mine.pth" in content for content in shared)
    assert not any(b"of ann" in content for content in shared)


def test_a_signature_is_shared_beside_its_bundle(released: Workspace, tmp_path: Path) -> None:
    released.make_keys("ann")
    released.call("sign", "digits@1", "--key", "ann.pem")
    released.call("share", "digits@1", str(tmp_path / "out"), *LICENSES)
    found = released.call("verify", str(tmp_path / "out/bundle"), "--key", "ann.pub").stdout
    assert "ann.pub" in found


def test_a_report_of_another_bundle_is_not_shared(released: Workspace) -> None:
    (path,) = released.path.glob("mlartifacts/*/artifacts/report.json")
    path.write_text(path.read_text().replace('"bundle": "', '"bundle": "0'))
    (line,) = released.call("share", "digits@1", "out", *LICENSES, code=6).stderr.splitlines()
    assert "measures another bundle than" in line
    assert not (released.path / "out").exists()


@pytest.mark.fault("E28")
@pytest.mark.parametrize("command", [("download",), ("share", *LICENSES)])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    released: Workspace, tmp_path: Path, command: tuple[str, ...]
) -> None:
    place = tmp_path / "full"
    place.mkdir()
    mount = 'mount -t tmpfs -o size=100k none "$1" && shift && exec "$@"'
    try_ = [*ALONE, "sh", "-c", mount, "sh", str(place), "true"]
    if shutil.which("unshare") is None or subprocess.run(try_, capture_output=True).returncode:
        pytest.skip("this account may not mount")
    name, *options = command
    words = ["tlpipe", name, "digits@1", str(place / "out"), *options]
    then = f"{shlex.join(words)}; echo $?; ls -A {shlex.quote(str(place))}"
    result = released.run(*try_[:-1], "sh", "-c", then)
    assert result.stdout == "6\n"
    line = result.stderr.splitlines()[-1]
    assert line.startswith("tlpipe: ")
    assert line.endswith(
        "No space left on device; the disk is full, or your share of it. Free some of it, and run "
        "it again."
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("params.yaml/out", "File exists; expected a folder, or nothing, there. Name another"),
        ("o" * 300, "File name too long; expected a name that the system can hold. Name a shorter"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(released: Workspace, place: str, message: str) -> None:
    for words in (("download", "digits@1", place), ("share", "digits@1", place, *LICENSES)):
        (line,) = released.call(*words, code=6).stderr.splitlines()
        assert message in line
