"""Pretraining without labels: what is trained on, what comes out, interruptions, bad input."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import Workspace, copy_repository
from tlpipe import files
from tlpipe.training import pretrain, self_supervised
from tlpipe.training.pretrain import Gain, Pretrained

MADE = Path("artifacts/pretrain")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A small network with random weights on pictures of noise, smooth and rough ones."""
    path = tmp_path_factory.mktemp("pretrain")
    random = np.random.default_rng(0)
    for label, size in (("rough", 32), ("smooth", 4)):
        (path / "photos" / label).mkdir(parents=True)
        for number in range(14):
            noise = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(path / "photos" / label / f"{number}.png")
    workspace = copy_repository(path / "copy", cache_env)
    workspace.set_source(path / "photos")
    workspace.use_small_network()
    workspace.configure("embed", freeze="none", threads=1)
    workspace.reproduce("embed")
    return workspace


@pytest.fixture
def project(embedded: Workspace) -> Workspace:
    """The embedded project, without what was pretrained before."""
    for path in (embedded.path / "artifacts").glob("*pretrain*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return embedded


def of_split(project: Workspace, *splits: str) -> int:
    return sum(row["split"] in splits for row in project.rows("artifacts/split/split.csv"))


def report(project: Workspace) -> dict[str, object]:
    found: dict[str, object] = json.loads((project.path / MADE / "report.json").read_text())
    return found


def test_the_weights_are_the_networks_own_and_embed_says_what_they_are(
    project: Workspace,
) -> None:
    done = project.call("pretrain", "--epochs", "2", "--batch-size", "8")
    count = of_split(project, "train")
    assert f"from weights none, on {count} images of the project's training split" in done.stderr
    assert "epoch 2 of 2: loss" in done.stderr
    weights = project.path / MADE / pretrain.WEIGHTS
    tensors = load_file(weights)
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(tensors)  # strictly: each is there
    torch.manual_seed(0)
    random = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert not torch.equal(tensors["layer4.0.conv1.weight"], random["layer4.0.conv1.weight"])
    found = report(project)
    assert found["sha256"] == files.sha256(weights)
    assert found["images"]["images"] == count  # type: ignore[index]
    probes = found["probe"]
    assert [probe["of"] for probe in probes] == ["training and validation", "validation"]  # type: ignore[attr-defined]
    first = weights.read_bytes()
    project.call("pretrain", "--epochs", "2", "--batch-size", "8")
    assert weights.read_bytes() == first

    params = (project.path / "params.yaml").read_text()
    shutil.copyfile(weights, project.path / "mine.safetensors")
    project.configure("embed", weights="mine.safetensors", weights_sha256=found["sha256"])
    try:
        said = project.call("pretrain", code=6).stderr
        assert "embed names timm/test_resnet, weights mine.safetensors. Run 'dvc repro" in said
        project.embed()
        index = json.loads((project.path / "artifacts/embed/activations/index.json").read_text())
        said = f"{count} images of the project's training split without labels, from none"
        assert index["origin"]["pretrained_on"] == said
    finally:
        (project.path / "params.yaml").write_text(params)
        project.embed()


@pytest.mark.fault("T21")
def test_of_a_folder_held_out_images_copies_and_broken_files_are_left_out(
    project: Workspace, tmp_path: Path
) -> None:
    for photo in (project.path.parent / "photos").rglob("*.png"):
        shutil.copyfile(photo, tmp_path / f"{photo.parent.name}-{photo.name}")
    random = np.random.default_rng(1)
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "n.png")
    shutil.copyfile(tmp_path / "n.png", tmp_path / "o.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = project.call("pretrain", str(tmp_path), "--epochs", "1")
    held_out = 28 - of_split(project, "train")
    assert held_out > 0
    found = report(project)["images"]
    assert isinstance(found, dict)
    assert found["source"] == tmp_path.name
    assert (found["held_out"], found["repeated"]) == (held_out, 1)
    assert sum(found["rejected"].values()) == 1
    assert found["images"] == 28 - held_out + 1
    assert f"{held_out} of 31 images of {tmp_path} left out: they are those" in done.stderr
    assert {path.name for path in (project.path / "artifacts").glob(".pretrain*")} == {
        ".pretrain.lock"
    }


@pytest.mark.fault("T22")
def test_stopped_it_resumes_as_if_it_had_not_been(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", "--epochs", "2", "--batch-size", "8")
    project.call(*command)
    whole = (project.path / MADE / pretrain.WEIGHTS).read_bytes()
    shutil.rmtree(project.path / MADE)
    steps = 0

    def stopping(*given: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)  # type: ignore[arg-type]

    loss = self_supervised.nt_xent
    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "nt_xent", stopping)
        said = project.call(*command, code=130).stderr
    assert "stopped before epoch 1 of 2, step 3 of" in said
    assert "Run the same command to resume" in said
    assert not (project.path / MADE).exists()
    assert "resumed from the checkpoint at epoch 1 of 2, step 3" in project.call(*command).stderr
    assert (project.path / MADE / pretrain.WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--batch-size", "1"), 2, "equal to 2"),
        (("--batch-size", "1000"), 3, "--batch-size is 1000; there are"),
        (("--epochs", "0"), 2, "equal to 1"),
        (("nowhere",), 4, "nowhere does not exist; expected a folder, a zip or tar archive"),
        (("flows",), 4, "flows holds no images; expected files that end in"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    project: Workspace, words: tuple[str, ...], code: int, message: str
) -> None:
    assert message in " ".join(project.call("pretrain", *words, code=code).stderr.split())
    assert not (project.path / MADE).exists()


def gain(low: float, value: float, high: float) -> Gain:
    change = {"low": low, "value": value, "high": high, "confidence": 0.9}
    return Gain("", 10, change, change, change)


@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("gains", "is_collapsed", "verdict"),
    [
        ([gain(0.01, 0.1, 0.2)], False, "a gain for"),
        ([gain(0.01, 0.1, 0.2), gain(-0.1, -0.01, 0.1)], False, "no gain that can be told"),
        ([gain(-0.01, 0.1, 0.2)], False, "no gain that can be told"),
        ([gain(-0.2, -0.1, -0.01)], False, "a loss for"),
        ([gain(0.01, 0.1, 0.2)], True, "collapsed:"),
    ],
)
def test_only_a_gain_beyond_chance_is_recommended(
    gains: list[Gain], is_collapsed: bool, verdict: str
) -> None:
    found = Pretrained("", tuple(gains), is_collapsed)
    assert found.verdict.startswith(verdict)
    assert found.is_worth_it == verdict.startswith("a gain")
