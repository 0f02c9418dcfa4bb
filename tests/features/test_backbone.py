import hashlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Workspace
from tlpipe.errors import WeightsError
from tlpipe.features.backbone import BACKBONES, IMAGENET, Weights, find_weights, load_network

LITE0 = BACKBONES["efficientnet_lite0"]


@pytest.fixture(scope="module")
def imagenet() -> Weights:
    return find_weights(LITE0, IMAGENET, None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_stages_in_order_are_the_whole_network(imagenet: Weights) -> None:
    network = load_network(LITE0, imagenet)
    assert tuple(name for name, _ in network.named_children()) == LITE0.stages
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
    from tests.conftest import SHARED
    from tlpipe.data.images import crop_middle, read_square
    from tlpipe.features.frozen import with_normalisation

    folder = SHARED / "data" / "hymenoptera" / "val"
    if not folder.is_dir():
        pytest.skip("the real data hymenoptera is not here")
    state = torch.load(imagenet.path, weights_only=True)
    network = with_normalisation(load_network(LITE0, imagenet), LITE0.preprocessing)
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
    tensors = torch.load(imagenet.path, weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    network = load_network(LITE0, find_weights(LITE0, str(path), digest(path)))
    expected = load_network(LITE0, imagenet).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@pytest.mark.fault("T10")
def test_a_pickle_payload_is_refused_and_not_run(tmp_path: Path) -> None:
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
def test_other_bytes_than_the_pinned_ones_are_refused(imagenet: Weights, tmp_path: Path) -> None:
    path = tmp_path / "altered.pth"
    shutil.copy(imagenet.path, path)
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    expected = rf"altered.pth have the sha256 [0-9a-f]{{64}}; expected {imagenet.sha256}"
    with pytest.raises(WeightsError, match=expected):
        find_weights(LITE0, str(path), imagenet.sha256)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
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
    result = empty.run("tlpipe", "embed", "--pixels", "out/pixels", "--activations", "a", code=5)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("exporting")]
    assert line.startswith("tlpipe: ")
    assert message in line
    assert not (empty.path / "a").exists()
