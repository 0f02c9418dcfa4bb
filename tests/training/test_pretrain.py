"""Pretraining without labels: what is trained on, what comes out, interruptions, bad input."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.conftest import Workspace, copy_repository
from tlpipe import files
from tlpipe.backbones import augment, weights
from tlpipe.backbones.augment import Augmentation
from tlpipe.training import pretrain, self_supervised
from tlpipe.training.batches import Photos
from tlpipe.training.model import Examples
from tlpipe.training.pretrain import Gain, Pretrained
from tlpipe.training.transferability import Sample

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
    images = of_split(project, "train")
    assert f"from weights none, on {images} images of the project's training split" in done.stderr
    assert "epoch 2 of 2: loss" in done.stderr
    made = project.path / MADE / pretrain.WEIGHTS
    tensors = load_file(made)
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(tensors)  # strictly: each is there
    torch.manual_seed(0)
    random = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert not torch.equal(tensors["layer4.0.conv1.weight"], random["layer4.0.conv1.weight"])
    found = report(project)
    assert found["sha256"] == files.sha256(made)
    assert found["images"]["images"] == images  # type: ignore[index]
    probes = found["probe"]
    assert [probe["of"] for probe in probes] == ["training and validation", "not trained on"]  # type: ignore[attr-defined]
    assert probes[1]["images"] == of_split(project, "validation")  # type: ignore[index]
    first = made.read_bytes()
    project.call("pretrain", "--epochs", "2", "--batch-size", "8")
    assert made.read_bytes() == first

    params = (project.path / "params.yaml").read_text()
    shutil.copyfile(made, project.path / "mine.safetensors")
    project.configure("embed", weights="mine.safetensors", weights_sha256=found["sha256"])
    try:
        said = project.call("pretrain", code=6).stderr
        assert "embed names timm/test_resnet, weights mine.safetensors of sha256" in said
        assert said.rstrip().endswith("Run 'dvc repro embed'.")
        project.embed()
        index = json.loads((project.path / "artifacts/embed/activations/index.json").read_text())
        said = f"{images} images of the project's training split without labels, from none"
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


def stopping_at(step: int) -> Callable[..., torch.Tensor]:
    """Return the loss, which asks to stop in that step."""
    steps, loss = count(1), self_supervised.nt_xent

    def stopping(*given: torch.Tensor) -> torch.Tensor:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)  # type: ignore[arg-type]

    return stopping


@pytest.mark.fault("T22")
def test_stopped_it_resumes_as_if_it_had_not_been(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", "--epochs", "2", "--batch-size", "8")
    project.call(*command)
    whole = (project.path / MADE / pretrain.WEIGHTS).read_bytes()
    shutil.rmtree(project.path / MADE)
    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "nt_xent", stopping_at(2))
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


def gain(low: float, value: float, high: float, of: str = "not trained on") -> Gain:
    change = {"low": low, "value": value, "high": high, "confidence": 0.9}
    return Gain(of, 10, change, change, change)


SEEN = gain(0.01, 0.1, 0.2, "training and validation")


@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("gains", "is_collapsed", "verdict"),
    [
        ([gain(0.01, 0.1, 0.2)], False, "a gain for"),
        ([SEEN, gain(-0.1, 0.05, 0.1)], False, "no gain that can be told"),
        ([SEEN, gain(-0.2, -0.1, -0.01)], False, "a loss for"),
        ([SEEN], False, "cannot tell"),
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


def test_a_gain_is_what_the_features_after_have_more_on_all_and_on_unseen_images() -> None:
    random = np.random.default_rng(0)
    labels = np.tile([0, 1], 20)
    noise = random.normal(size=(40, 3))
    telling = np.column_stack([noise[:, :2], 10.0 * labels])
    examples = Examples(np.arange(40), labels)
    sample = Sample(examples, np.arange(40), np.arange(40) // 2 % 4, 2)
    is_unseen = np.arange(40) < 12
    for before, after, sign in ((noise, telling, 1), (telling, noise, -1)):
        everything, unseen = pretrain.gains_of(sample, is_unseen, before, after)
        assert (everything.of, everything.images) == ("training and validation", 40)
        assert (unseen.of, unseen.images) == ("not trained on", 12)
        for found in (everything, unseen):
            best, worst = (found.after, found.before)[::sign]
            assert best["value"] == 1 > worst["value"]
            assert found.change["value"] == pytest.approx(sign * (1 - worst["value"]))
    assert len(pretrain.gains_of(sample, np.zeros(40, bool), noise, telling)) == 1


def test_before_has_the_statistics_of_the_images_where_weights_are_random(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        number
        for number, row in enumerate(project.rows("artifacts/split/split.csv"))
        if row["split"] == "train"
    ]
    means: list[tuple[torch.Tensor, torch.Tensor]] = []
    features = pretrain._features

    def watched(network: nn.Module, feed: Photos, *given: object) -> object:
        norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        known = norm.running_mean
        assert known is not None
        inputs: list[torch.Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, taken: inputs.append(taken[0]))
        with torch.inference_mode():
            network.eval()(feed.plain(np.array(rows)))
        hook.remove()
        means.append((known.clone(), inputs[0].mean((0, 2, 3))))
        return features(network, feed, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "_features", watched)
    said = project.call("pretrain", "--epochs", "1").stderr
    (before, expected), (after, _) = means
    torch.testing.assert_close(before, expected)
    assert not torch.allclose(after, expected, rtol=0.1)  # what few steps of training make of it
    assert "before: random weights, with BatchNorm statistics of the images" in said
    assert str(report(project)["before"]).startswith("random weights, with BatchNorm stat")


def test_views_are_cropped_and_coloured_and_flipped_as_asked(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Augmentation] = []
    sample = augment.sample

    def watched(augmentation: Augmentation, uniforms: npt.NDArray[np.float64]) -> object:
        asked.append(augmentation)
        return sample(augmentation, uniforms)

    monkeypatch.setattr(augment, "sample", watched)
    project.call("pretrain", "--epochs", "1")
    project.call("pretrain", "--epochs", "1", "--no-flip")
    known = {"min_crop_area": 0.3, "rotation_degrees": 0.0, "colour_jitter": 0.5}
    assert asked[0].model_dump() == known | {"horizontal_flip": True}
    assert asked[-1].model_dump() == known | {"horizontal_flip": False}
    recipe = report(project)["recipe"]
    assert recipe["augmentation"] == asked[-1].model_dump()  # type: ignore[index]


@pytest.mark.slow
def test_random_weights_take_larger_steps_than_trained_ones_and_say_what_they_began_from(
    project: Workspace,
) -> None:
    project.call("pretrain", "--epochs", "1")
    first = report(project)
    assert first["recipe"]["lr"] == 1e-3  # type: ignore[index]
    shutil.copyfile(project.path / MADE / pretrain.WEIGHTS, project.path / "first.safetensors")
    params = (project.path / "params.yaml").read_text()
    pinned = {"weights": "first.safetensors", "weights_sha256": first["sha256"]}
    project.configure("embed", **pinned)
    try:
        project.embed()
        project.call("pretrain", "--epochs", "1")
        second = report(project)
        assert second["recipe"]["lr"] == 1e-4  # type: ignore[index]
        assert second["before"] == "the weights as embed takes them"
        chain = f"from first.safetensors ({first['pretrained_on']})"
        assert str(second["pretrained_on"]).endswith(chain)
        assert str(first["pretrained_on"]).endswith("without labels, from none")
        seen = weights.images_of(project.path / MADE / pretrain.WEIGHTS)
        assert seen is not None and len(seen) == of_split(project, "train")
        # The same file name with other bytes is another file.
        project.configure("embed", weights_sha256="0" * 64)
        assert (
            "of sha256 00000000. Run 'dvc repro embed'" in project.call("pretrain", code=6).stderr
        )
    finally:
        (project.path / "params.yaml").write_text(params)
        project.embed()


@pytest.mark.fault("T23")
def test_a_collapse_is_recognised(project: Workspace, tmp_path: Path) -> None:
    for side in range(64, 72):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")  # black, in any light
    done = project.call("pretrain", str(tmp_path), "--epochs", "1")
    assert "collapsed: all images look alike" in done.stdout
    assert report(project)["is_collapsed"] is True


@pytest.mark.slow
@pytest.mark.fault("T22")
def test_an_experiment_meanwhile_takes_no_checkpoint_away(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", "--epochs", "3", "--batch-size", "8")
    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "nt_xent", stopping_at(2))
        project.call(*command, code=130)
    project.call("pretrain", "--epochs", "1")
    assert "resumed from the checkpoint at epoch 1 of 3, step 3" in project.call(*command).stderr


@pytest.mark.fault("T22")
def test_stopped_while_images_are_read_or_probed_it_is_one_line(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    photos = str(project.path.parent / "photos")
    for name in ("read_square", "_features"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, name, interrupted)
            said = project.call("pretrain", photos, "--epochs", "1", code=130).stderr
        assert said.rstrip().endswith("Run the same command to resume.")
        assert not (project.path / "artifacts/.pretrain.images").exists()


def test_links_are_followed_as_ingest_does_and_named_where_not(
    project: Workspace, tmp_path: Path
) -> None:
    random = np.random.default_rng(2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "links").mkdir()
    for number in range(4):
        photo = tmp_path / "photos" / f"{number}.png"
        noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo)
        (tmp_path / "links" / photo.name).symlink_to(photo)
    command = ("pretrain", str(tmp_path / "links"), "--epochs", "1")
    said = " ".join(project.call(*command, code=4).stderr.split())
    assert "4 cannot be used: outside_root 4 (links that lead out of it: ingest.follow_l" in said
    params = (project.path / "params.yaml").read_text()
    project.configure("ingest", follow_links=True)
    try:
        project.call(*command)
    finally:
        (project.path / "params.yaml").write_text(params)
    assert report(project)["images"]["images"] == 4  # type: ignore[index]


def test_what_would_fill_the_disk_is_refused_before_it_is_read(
    project: Workspace, tmp_path: Path
) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"never read")
    params = (project.path / "params.yaml").read_text()
    project.configure("embed", max_gib=1e-4)
    try:
        said = project.call("pretrain", str(tmp_path), code=3).stderr
    finally:
        (project.path / "params.yaml").write_text(params)
    assert f"the 9 images of {tmp_path} would take" in said
    assert "embed.max_gib allows 0.0001. Raise it" in said


@pytest.mark.parametrize(
    ("named", "sha256", "is_same"),
    [
        ("models:/digits@champion", None, True),
        ("models:/digits@2", None, True),
        ("models:/digits@champion", "a" * 64, True),
        ("models:/digits@champion", "b" * 64, False),
        ("models:/digits@3", None, False),
        ("models:/letters@champion", None, False),
        ("imagenet", None, False),
    ],
)
def test_activations_of_another_registered_model_are_stale(
    project: Workspace, named: str, sha256: str | None, is_same: bool
) -> None:
    index = project.path / "artifacts/embed/activations/index.json"
    params, content = (project.path / "params.yaml").read_text(), index.read_bytes()
    origin = json.loads(content)
    origin["origin"] |= {"weights": "models:/digits@2", "weights_sha256": "a" * 64}
    index.write_text(json.dumps(origin))
    project.configure("embed", weights=named, weights_sha256=sha256)
    try:
        said = project.call("pretrain", code=5 if is_same else 6).stderr
    finally:
        (project.path / "params.yaml").write_text(params)
        index.write_bytes(content)
    assert ("Run 'dvc repro embed'." in said) != is_same
    assert ("not in this machine's cache" in said) == is_same


def test_no_image_is_alone_in_its_batch(
    project: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: list[int] = []
    loss = self_supervised.nt_xent

    def watched(first: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(first))
        return loss(first, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(self_supervised, "nt_xent", watched)
    random = np.random.default_rng(3)
    for number in range(5):
        noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    project.call("pretrain", str(tmp_path), "--epochs", "1", "--batch-size", "2")
    assert sizes == [2, 3]


@pytest.mark.slow
@pytest.mark.fault("T26")
def test_held_out_images_that_the_weights_have_seen_are_counted(project: Workspace) -> None:
    """A split that was drawn anew after pretraining mixes what was trained on into the test."""
    project.call("pretrain", "--epochs", "1")
    shutil.copyfile(project.path / MADE / pretrain.WEIGHTS, project.path / "seen.safetensors")
    params = (project.path / "params.yaml").read_text()
    table = project.path / "artifacts/split/split.csv"
    drawn = table.read_bytes()
    project.configure("embed", weights="seen.safetensors", weights_sha256=report(project)["sha256"])
    try:
        project.embed()
        project.call("audit")
        leaks = project.path / "artifacts/audit/leaks.json"
        before = json.loads(leaks.read_text())["pretrained"]
        assert before["test"]["seen"] == before["validation"]["seen"] == 0
        assert before["train"]["seen"] == before["train"]["images"] == of_split(project, "train")
        lines = drawn.decode().splitlines()
        row = next(number for number, line in enumerate(lines) if ",train," in line)
        lines[row] = lines[row].replace(",train,", ",test,")
        table.write_text("\n".join(lines) + "\n")
        said = project.call("audit").stderr
        after = json.loads(leaks.read_text())["pretrained"]
        assert after["test"]["seen"] == 1
        tested = after["test"]["images"]
        assert f"the weights were pretrained on 0 of {after['validation']['images']}" in said
        assert f"and 1 of {tested} test images" in " ".join(said.split())
        assert "accuracy may promise too much" in said
    finally:
        table.write_bytes(drawn)
        (project.path / "params.yaml").write_text(params)
        project.embed()
