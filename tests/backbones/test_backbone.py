import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tests.conftest import SHARED, Workspace, free_port, server
from tlpipe.backbones import activations
from tlpipe.backbones import weights as pretrained
from tlpipe.backbones.backbone import Backbone, describe, load_network
from tlpipe.backbones.weights import IMAGENET, NONE, Pretrained, Weights
from tlpipe.errors import WeightsError

LITE0 = describe("efficientnet_lite0")


def find_weights(backbone: Backbone, source: str, sha256: str | None) -> Weights:
    return pretrained.find(backbone.name, backbone.pretrained, source, sha256)


@pytest.fixture(scope="module")
def imagenet() -> Weights:
    return find_weights(LITE0, IMAGENET, None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_stages_in_order_are_the_whole_network(imagenet: Weights) -> None:
    network = load_network(LITE0, imagenet)
    assert [name for name, _ in network.named_children()] == [s.name for s in LITE0.stages]
    assert not network.training
    images = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.inference_mode():
        features = images
        for stage in network:
            features = stage(features)
        assert features.shape == (1, 1280)
        assert torch.equal(features, network(images))


def test_the_packaged_weights_are_the_ones_that_recognise_insects(imagenet: Weights) -> None:
    """The mapping of names is right: a wrong one also loads, and recognises nothing."""
    from tlpipe.backbones.frozen import from_pixels
    from tlpipe.data.images import crop_middle, read_square

    folder = SHARED / "data" / "hymenoptera" / "val"
    if not folder.is_dir():
        pytest.skip("the real data hymenoptera is not here")
    assert imagenet.path is not None
    state = torch.load(imagenet.path, weights_only=True)
    network = from_pixels(load_network(LITE0, imagenet), LITE0.preprocessing)
    hits = total = 0
    for name, ours in (("ants", 310), ("bees", 309)):
        for path in sorted((folder / name).iterdir())[:20]:
            square, _ = read_square(path.read_bytes(), LITE0.preprocessing)
            batch = torch.from_numpy(crop_middle(square, 224)[None].copy())
            with torch.inference_mode():
                logits = network(batch) @ state["_fc.weight"].T + state["_fc.bias"]
            hits += int(logits.argmax()) == ours
            total += 1
    assert hits / total >= 0.8


def test_safetensors_are_read_too(imagenet: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    assert imagenet.path is not None
    tensors = torch.load(imagenet.path, weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    network = load_network(LITE0, find_weights(LITE0, str(path), digest(path)))
    expected = load_network(LITE0, imagenet).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@pytest.mark.fault("T10")
def test_a_pickle_payload_is_an_error_and_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "built",)

    for name, content in (("raw.pth", Payload()), ("dict.pth", {"a": Payload()})):
        path = tmp_path / name
        torch.save(content, path)
        with pytest.raises(WeightsError, match=r"hold more than tensors.*nothing in them was run"):
            load_network(LITE0, find_weights(LITE0, str(path), digest(path)))
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WeightsError, match="hold more than tensors"):
        load_network(LITE0, find_weights(LITE0, str(path), digest(path)))
    assert not (tmp_path / "built").exists()


@pytest.mark.fault("T11")
def test_other_bytes_than_the_pinned_ones_are_errors(imagenet: Weights, tmp_path: Path) -> None:
    path = tmp_path / "altered.pth"
    assert imagenet.path is not None
    shutil.copy(imagenet.path, path)
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    expected = rf"altered.pth have the sha256 [0-9a-f]{{64}}; expected {imagenet.sha256}"
    with pytest.raises(WeightsError, match=expected):
        find_weights(LITE0, str(path), imagenet.sha256)


def test_weights_of_another_network_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsError, match="do not fit efficientnet_lite0"):
        load_network(LITE0, find_weights(LITE0, str(path), digest(path)))
    torch.save([torch.zeros(2)], path)
    with pytest.raises(WeightsError, match="no state_dict"):
        load_network(LITE0, find_weights(LITE0, str(path), digest(path)))


@pytest.mark.fault("T10", "T11")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weights: {path}", "embed.weights_sha256 is not set"),
        ("weights: {path}\n  weights_sha256: " + "f" * 64, "have the sha256"),
        ("weights: {path}\n  weights_sha256: {sha256}", "hold more than tensors"),
        ("weights: {path}x\n  weights_sha256: {sha256}", "cannot be read: No such file"),
        ("weights: {path}x", "cannot be read: No such file"),
    ],
)
def test_embed_refuses_in_one_line_and_leaves_nothing(
    empty: Workspace, photos: Path, setting: str, message: str
) -> None:
    path = empty.path / "evil.pth"
    path.write_bytes(pickle.dumps({"a": Path("x")}))
    empty.set_source(photos)
    empty.ingest()
    setting = setting.format(path=path, sha256=digest(path))
    empty.replace("params.yaml", "weights: imagenet", setting)
    result = empty.embed(code=5)
    *_, line = result.splitlines()
    assert line.startswith("tlpipe: ")
    assert message in line
    assert not (empty.path / "a").exists()


def test_a_backbone_is_described_stage_by_stage() -> None:
    """The sizes are those of the networks' papers; classifiers are left out."""
    kib = {stage.name: round(stage.kib, 1) for stage in LITE0.stages}
    assert kib == {
        "stem": 784,
        "blocks0": 392,
        "blocks1": 147,
        "blocks2": 61.2,
        "blocks3": 30.6,
        "blocks4": 42.9,
        "blocks5": 18.4,
        "blocks6": 30.6,
        "features": 2.5,
    }
    resnet = describe("resnet18")
    assert [stage.shape for stage in resnet.stages][-2:] == [(256, 14, 14), (512,)]
    assert resnet.parameters == 11_689_512 - 513 * 1000  # what torchvision states, less the head
    assert (resnet.preprocessing.crop_px, resnet.preprocessing.interpolation) == (224, "bilinear")
    inception = describe("inception_v3").preprocessing
    assert (inception.short_side_px, inception.crop_px) == (342, 299)
    timm = describe("timm/vit_tiny_patch16_224").preprocessing
    assert (timm.short_side_px, timm.mean) == (248, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("number", [1, 2])
def test_larger_lites_come_from_their_packages(number: int) -> None:
    backbone = describe(f"efficientnet_lite{number}")
    network = load_network(backbone, find_weights(backbone, IMAGENET, None))
    side = backbone.preprocessing.crop_px
    assert side == (240, 260)[number - 1]
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 1280)


def test_random_weights_are_the_same_every_time() -> None:
    backbone = describe("mobilenet_v3_small")
    first, second = (
        load_network(backbone, find_weights(backbone, NONE, None)).state_dict() for _ in range(2)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=7)),
        ("googlenet", lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False)),
        ("densenet121", lambda: torchvision.models.densenet121(num_classes=3)),
        ("timm/resnet18", lambda: timm.create_model("resnet18", num_classes=7)),
        ("timm/resnet18", lambda: timm.create_model("resnet18", num_classes=0)),
        ("timm/vit_tiny_patch16_224", lambda: timm.create_model("vit_tiny_patch16_224")),
    ],
)
def test_a_file_of_weights_fits_whatever_its_classifier(
    name: str, builder: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    saved = builder()
    path = tmp_path / "mine.pth"
    torch.save(saved.state_dict(), path)
    backbone = describe(name)
    network = load_network(backbone, find_weights(backbone, str(path), digest(path)))
    expected = saved.state_dict()
    found = {key: tensor for stage in network for key, tensor in stage.state_dict().items()}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert len(found) > 50


def test_weights_that_others_trained_load_into_their_network() -> None:
    path = SHARED / "weights" / "mobilenet_v2-qatdeq-47b54f94.pth"
    if not path.exists():
        pytest.skip("the real weights are not here")
    backbone = describe("mobilenet_v2")
    network = load_network(backbone, find_weights(backbone, str(path), digest(path)))
    stem = next(network.children()).state_dict()["features.0.0.weight"]
    assert torch.equal(stem, torch.load(path, weights_only=True)["features.0.0.weight"])


def test_weights_that_cannot_be_fetched_are_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    here = Pretrained(url=f"http://127.0.0.1:{free_port()}/resnet18-f37072fd.pth")
    with pytest.raises(WeightsError, match=r"weights of mine are not here .* name a file"):
        pretrained.find("mine", here, IMAGENET, None)
    with pytest.raises(WeightsError, match=r"nobody offers pretrained weights of mine"):
        pretrained.find("mine", None, IMAGENET, None)
    absent = Pretrained(package="no_such_package", file="a.pth")
    with pytest.raises(WeightsError, match="expected the package no-such-package"):
        pretrained.find("mine", absent, IMAGENET, None)


def test_weights_are_fetched_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = b"weights"
    (tmp_path / "a.pth").write_bytes(content)
    known = hashlib.sha256(content).hexdigest()
    (tmp_path / f"net-{known[:8]}.pth").write_bytes(content)
    port = free_port()
    command = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    with server(Workspace(tmp_path), *command, ready=f"http://127.0.0.1:{port}/a.pth"):
        here = Pretrained(url=f"http://127.0.0.1:{port}/net-{known[:8]}.pth", sha256=known[:8])
        assert pretrained.find("net", here, IMAGENET, None).sha256 == known
        altered = Pretrained(url=f"http://127.0.0.1:{port}/a.pth", sha256="0" * 8)
        with pytest.raises(WeightsError, match="invalid hash value"):
            pretrained.find("net", altered, IMAGENET, None)
    assert pretrained.find("net", here, IMAGENET, None).sha256 == known  # the server is gone
    assert pretrained.at_hand(altered) is None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, str], Pretrained]:
    """Put a file into a cache of the Hugging Face hub, under the hash that the hub states."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--net"

    def put(content: bytes, stated: str) -> Pretrained:
        snapshot = folder / "snapshots" / ("c" * 40)
        for part in (folder / "refs", folder / "blobs", snapshot):
            part.mkdir(parents=True)
        (folder / "refs" / "main").write_text("c" * 40)
        if stated:
            (folder / "blobs" / stated).write_bytes(content)
            (snapshot / "model.safetensors").symlink_to(folder / "blobs" / stated)
        else:
            (snapshot / "model.safetensors").write_bytes(content)
        return Pretrained(repository="timm/net", file="model.safetensors")

    return put


@pytest.mark.fault("T11")
def test_weights_from_the_hub_are_those_that_it_stated(
    hub: Callable[[bytes, str], Pretrained], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    known = hashlib.sha256(b"weights").hexdigest()
    source = hub(b"weights", known)
    assert pretrained.find("net", source, IMAGENET, None).sha256 == known
    assert f"weights: timm/net at commit {'c' * 40}, sha256 {known}" in caplog.text
    assert "not checked" not in caplog.text
    path = pretrained.at_hand(source)
    assert path is not None
    path.resolve().write_bytes(b"altered")
    with pytest.raises(WeightsError, match=f"have the sha256 [0-9a-f]{{64}}; expected {known}"):
        pretrained.find("net", source, IMAGENET, None)


@pytest.mark.fault("T11")
def test_weights_of_which_nobody_states_the_hash_are_not_called_checked(
    hub: Callable[[bytes, str], Pretrained], caplog: pytest.LogCaptureFixture
) -> None:
    known = hashlib.sha256(b"weights").hexdigest()
    source = hub(b"weights", "")
    assert pretrained.find("net", source, IMAGENET, None).sha256 == known
    assert f"they were not checked. It is {known}: set embed.weights_sha256" in caplog.text
    caplog.clear()
    assert pretrained.find("net", source, IMAGENET, known).sha256 == known
    assert not caplog.text
    with pytest.raises(WeightsError, match=f"have the sha256 {known}; expected {'0' * 64}"):
        pretrained.find("net", source, IMAGENET, "0" * 64)


def test_the_largest_vit_takes_images_of_the_size_of_its_weights() -> None:
    backbone = describe("vit_h_14")
    assert backbone.preprocessing.crop_px == 518
    assert backbone.stages[0].shape == (1 + (518 // 14) ** 2, 1280)
    head = 1281 * 1000
    assert backbone.parameters == 633_470_440 - head  # what torchvision states, less the head


@pytest.mark.slow
def test_a_list_names_what_is_an_error_and_goes_on(empty: Workspace) -> None:
    shown = empty.call("backbones", "timm/vit_[bl]a[sr][eg]*_patch16_sapiens2")
    said = " ".join(shown.stdout.split())
    for name in ("timm/vit_base_patch16_sapiens2: ", "timm/vit_large_patch16_sapiens2: "):
        assert name in said
    assert "expected 3 channels and a square" in said


def test_backbones_lists_stages_and_what_they_give(empty: Workspace) -> None:
    shown = empty.call("backbones", "efficientnet_lite0").stdout
    for text in ("3,371,008 parameters, 224 px", "weights here", "112 x 14 x 14", "42.9"):
        assert text in " ".join(shown.split())
    failed = empty.call("backbones", "no_such*", code=3).stderr
    assert failed.startswith("tlpipe: no backbone matches 'no_such*'")


@pytest.mark.slow
@pytest.mark.fault("T13")
def test_another_backbone_embeds_and_says_what_it_was_trained_on(
    empty: Workspace, photos: Path
) -> None:
    empty.replace("params.yaml", "backbone: efficientnet_lite0", "backbone: resnet18")
    empty.replace("params.yaml", "weights: imagenet", "weights: none")
    empty.set_source(photos, interpolation="bicubic")
    failed = empty.ingest(code=3)
    assert "ingest.interpolation is bicubic; the backbone resnet18 was trained with bili" in failed
    empty.replace("params.yaml", 'interpolation: "bicubic"', "interpolation: auto")
    empty.ingest()
    empty.embed()
    found = activations.load(empty.path / "artifacts/embed" / "activations")
    origin = found.origin
    assert found.features.shape == (24, 512)
    assert (origin.backbone, origin.weights, origin.boundary) == ("resnet18", "none", "layer4")


@pytest.mark.fault("T24")
def test_registered_weights_that_are_gone_name_what_fetches_them() -> None:
    with pytest.raises(WeightsError, match=r"sha256 f{64}, .* cache any more. 'tlpipe embed'"):
        describe("timm/test_resnet").find_weights("models:/digits@1", "f" * 64)
