import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Workspace
from tlpipe.backbones import activations
from tlpipe.backbones.activations import frozen_stages
from tlpipe.backbones.augment import UNIFORMS, Augmentation, apply, sample
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.embed import Params, check_effects
from tlpipe.backbones.frozen import from_pixels
from tlpipe.backbones.weights import IMAGENET, find
from tlpipe.data import pixels
from tlpipe.errors import ParamsError
from tlpipe.runtime import generator

LITE0 = describe("efficientnet_lite0")


@pytest.mark.parametrize(
    ("freeze", "images", "expected"),
    [
        ("all", 5, 9),
        ("none", 5, 0),
        (0, 5, 0),
        (4, 5, 4),
        (9, 5, 9),
        ("stem", 5, 1),
        ("blocks5", 5, 7),
        ("features", 5, 9),
        ("auto", 19, 9),
        ("auto", 20, 7),
        ("auto", 1000, 0),
    ],
)
def test_levels_are_numbers_of_stages(freeze: str | int, images: int, expected: int) -> None:
    labels = ["rare"] + ["a", "b", "c"] * images
    assert frozen_stages(freeze, LITE0.stages, labels) == expected


def embedded(workspace: Workspace, **settings: object) -> activations.Activations:
    text = (workspace.path / "params.yaml").read_text()
    workspace.configure("embed", **settings)
    workspace.embed()
    (workspace.path / "params.yaml").write_text(text)
    return activations.load(workspace.path / "artifacts/embed" / "activations")


@pytest.fixture
def ingested(empty: Workspace, photos: Path) -> Workspace:
    empty.set_source(photos)
    empty.ingest()
    return empty


def in_torch(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what each stage gives in torch, float32, for images (N, 224, 224, 3) uint8."""
    weights = find(LITE0.name, LITE0.pretrained, IMAGENET, None)
    network = from_pixels(load_network(LITE0, weights), LITE0.preprocessing)
    results, current = {}, torch.from_numpy(np.ascontiguousarray(images))
    with torch.inference_mode():
        for name, stage in network.named_children():
            current = stage(current)
            results[name] = current.numpy()
    return results


def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    """Check that these are the same numbers in float16, but for the order of sums in float32."""
    assert found.dtype == np.float16 and found.shape == expected.shape
    near = 2e-4 * float(expected.std())
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-11, atol=near)


@pytest.fixture
def noisy(empty: Workspace, photos: Path) -> Workspace:
    """Images in which every place and every colour counts."""
    for seed, path in enumerate(sorted(photos.rglob("*.png"))):
        small = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), "u1")
        Image.fromarray(small).resize((280, 240), Image.Resampling.BICUBIC).save(path)
    empty.set_source(photos)
    empty.ingest()
    return empty


@pytest.mark.slow
def test_activations_are_those_of_torch_at_every_boundary(noisy: Workspace) -> None:
    squares = pixels.load(noisy.path / "artifacts/ingest" / "pixels").array[:6]
    expected = in_torch(squares[:, 16:240, 16:240])
    for freeze, boundary in (("stem", "stem"), (4, "blocks2"), ("blocks5", "blocks5")):
        found = embedded(noisy, freeze=freeze)
        assert found.boundary is not None
        assert found.origin.boundary == boundary
        assert len(found.boundary) == len(found.features) == 24
        assert_rounded(found.boundary[:6], expected[boundary][:, None])
        assert_rounded(found.features[:6], expected["features"])
    found = embedded(noisy, freeze="none")
    assert (found.boundary, found.origin.boundary) == (None, "")
    assert_rounded(found.features[:6], expected["features"])


@pytest.mark.slow
def test_views_at_a_boundary_are_those_of_torch(noisy: Workspace) -> None:
    augmentation = Augmentation(colour_jitter=0.3, rotation_degrees=10)
    found = embedded(noisy, freeze="blocks5", views=2, augmentation=augmentation.model_dump())
    assert found.boundary is not None
    squares = pixels.load(noisy.path / "artifacts/ingest" / "pixels").array[:6]
    for view in range(2):
        for row in (0, 5):  # alone, where the stage has batches of eight
            key = int(found.keys[row]).to_bytes(8).hex()
            drawn = sample(augmentation, generator(view, f"view {key}").random((1, UNIFORMS)))
            seen = apply(torch.from_numpy(squares[row : row + 1]), torch.from_numpy(drawn), 224)
            shown = seen.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            assert_rounded(found.boundary[row][1 + view], in_torch(shown)["blocks5"][0])


def rows(found: activations.Activations) -> dict[int, np.ndarray]:
    assert found.boundary is not None
    return {int(key): found.boundary[row] for row, key in enumerate(found.keys)}


@pytest.mark.slow
def test_only_what_is_new_is_computed_and_the_result_is_the_same(
    ingested: Workspace, photos: Path
) -> None:
    ingested.use_small_network()
    ingested.ingest()
    before = rows(embedded(ingested, freeze="layer2", views=1))
    shade = Image.new("RGB", (60, 60), (10, 200, 30))
    shade.save(photos / "dark" / "new.png")
    (photos / "light" / "3.png").unlink()
    ingested.ingest()
    ingested.configure("embed", freeze="layer2", views=1)
    said = ingested.embed()
    assert "23 of 24 images are known already" in said
    after = activations.load(ingested.path / "artifacts/embed" / "activations")
    found = rows(after)
    assert len(found.keys() - before.keys()) == 1
    assert all((before[key] == found[key]).all() for key in found.keys() & before.keys())
    shutil.rmtree(ingested.path / "artifacts/embed" / ".activations")
    shutil.move(ingested.path / "artifacts/embed" / "activations", ingested.path / "first")
    assert "known" not in ingested.embed()
    for part in ("boundary", "features", "index.json", "keys.npy"):
        one, two = (
            ingested.path / "first" / part,
            ingested.path / "artifacts/embed/activations" / part,
        )
        for path in one.iterdir() if one.is_dir() else [one]:
            other = two / path.name if one.is_dir() else two
            assert path.read_bytes() == other.read_bytes(), path
    # Another boundary, or other weights, are another computation.
    ingested.configure("embed", freeze="layer1")
    assert "known" not in ingested.embed()


def test_views_differ_from_image_to_image_and_are_drawn_once(ingested: Workspace) -> None:
    found = embedded(ingested, freeze="all", views=3)
    assert found.boundary is not None and found.boundary.shape == (24, 4, 1280)
    assert (found.boundary[:][:, 0] == found.features[:]).all()
    views = found.boundary[:].astype(np.float32)
    for one in range(4):
        for two in range(one):
            assert np.abs(views[:, one] - views[:, two]).max(axis=1).min() > 1e-3
    shutil.rmtree(ingested.path / "artifacts/embed" / ".activations")
    again = embedded(ingested, freeze="all", views=3)
    assert again.boundary is not None and (again.boundary[:] == found.boundary[:]).all()


def test_too_much_is_an_error_before_it_is_computed(ingested: Workspace) -> None:
    ingested.configure("embed", freeze="stem", views=9, max_gib=0.02)
    said = ingested.embed(code=3).splitlines()[-1]
    assert "the activations of 24 images would take 0.18 GiB; embed.max_gib allows 0.02" in said
    assert re.search(r"By embed.freeze, freeze up to blocks2 \(0.0\d+ GiB\), blocks3 ", said)
    assert "; or freeze none; store fewer embed.views, or raise embed.max_gib." in said
    assert not (ingested.path / "artifacts/embed" / "activations").exists()


def test_the_size_is_said_beforehand(ingested: Workspace) -> None:
    ingested.configure("embed", freeze="blocks5")
    said = ingested.embed().splitlines()
    assert said[0] == ("frozen: 7 of 9 stages, up to blocks5, 2,353,408 of 3,371,008 parameters")
    assert said[1] == "activations of 24 images: 0.49 MiB"
    folder = ingested.path / "artifacts/embed" / "activations"
    size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
    assert size == pytest.approx(0.000478 * 2**30, rel=0.02)


def test_defaults_freeze_everything() -> None:
    assert Params().freeze == "all"


@pytest.mark.fault("T16")
def test_views_and_augmentation_that_nobody_sees_are_errors() -> None:
    turned = Augmentation(rotation_degrees=10)
    with pytest.raises(ParamsError, match=r"embed\.views is 3 and has no effect: embed\.fre"):
        check_effects(Params(freeze="none", views=3), 0)
    with pytest.raises(ParamsError, match=r"embed\.augmentation has no effect: embed\.fre"):
        check_effects(Params(augmentation=turned), 5)
    for count, params in (
        (0, Params(freeze="none", augmentation=turned)),
        (5, Params(views=3, augmentation=turned)),
        (5, Params(augmentation=Augmentation())),
    ):
        check_effects(params, count)


def test_auto_follows_advice_that_was_measured_on_these_images(ingested: Workspace) -> None:
    ingested.use_small_network()
    ingested.ingest()
    ingested.configure("embed", freeze="auto")
    said = ingested.embed()
    assert "embed.freeze is auto, by the number of images; 'tlpipe advise' measures" in said
    folder = ingested.path / "artifacts/embed/activations"
    origin = activations.load(folder).origin
    assert origin.boundary == describe("timm/test_resnet").stages[-1].name  # twelve a class
    advice = activations.Advice(
        freeze="layer2",
        backbone=origin.backbone,
        weights_sha256=origin.weights_sha256,
        data_sha256=origin.data_sha256,
    )
    ingested.configure("embed", advice="advice.json")
    said = ingested.embed(code=6)
    assert "advice.json, which embed.advice names, is missing or damaged; expected what" in said
    activations.save_advice(ingested.path / "advice.json", advice)
    assert "embed.freeze is auto, by advice.json: layer2" in ingested.embed()
    found = activations.load(folder).origin
    assert (found.boundary, found.freeze) == ("layer2", "auto")
    for field in ("backbone", "weights_sha256", "data_sha256"):
        other = advice.model_copy(update={field: "other"})
        activations.save_advice(ingested.path / "advice.json", other)
        said = ingested.embed(code=6)
        assert f"advice.json was measured with another {field} than embed has now" in said
        assert said.rstrip().endswith("run 'tlpipe run', then 'tlpipe advise' again.")


def test_advice_where_freeze_is_not_auto_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"embed\.advice: a\.json has no effect: embed\.freeze"):
        Params(advice="a.json")
    Params(advice="a.json", freeze="auto")
