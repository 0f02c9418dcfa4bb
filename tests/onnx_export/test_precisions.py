"""Graphs beside the exact one: eight bits, half precision, images of any size."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tlpipe.data.images import Preprocessing, crop_middle, read_upright, square
from tlpipe.onnx_export import bundle as bundles
from tlpipe.onnx_export import precisions
from tlpipe.onnx_export.any_size import with_any_size


def test_eight_bits_are_nearly_as_right_and_much_smaller(artifacts: Path) -> None:
    parity = json.loads((artifacts / "export/parity.json").read_text())
    verdict = parity["precisions"]["int8"]
    assert verdict["refused"] == ""
    assert verdict["size"] <= 0.3
    change = verdict["accuracy_change"]
    assert change["value"] >= -0.01
    assert change["low"] <= change["value"] <= change["high"]
    shipped = bundles.load(artifacts / "export/bundle")
    assert set(shipped.graphs) == {"fp32", "int8", "any-size"}
    kinds = {node.op_type for node in onnx.load(shipped.graphs["int8"]).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    report = json.loads((artifacts / "evaluate/report.json").read_text())
    assert abs(report["precisions"]["int8"]["accuracy_change"]["value"]) <= 0.02


def test_every_graph_says_the_same_of_itself(artifacts: Path) -> None:
    shipped = bundles.load(artifacts / "export/bundle")
    said = [
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in shipped.graphs.values()
    ]
    assert all(metadata == said[0] for metadata in said)
    provenance = json.loads(said[0]["tlpipe.provenance"])
    assert len(provenance["git_commit"]) == 40
    assert len(provenance["dvc_lock_sha256"]) == 64
    assert provenance["origin"]["data_sha256"] == shipped.provenance["origin"]["data_sha256"]


def test_what_falls_short_is_refused_with_its_numbers() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 200)
    exact = np.eye(3, dtype=np.float32)[truth]
    other = exact.copy()
    other[:10] = np.roll(other[:10], 1, axis=1)
    verdict = precisions.judge("int8", exact, other, truth, size=0.4, loss=0.01)
    assert "accuracy on 200 validation images differs by -0.0500 (-0.0" in verdict.refused
    assert "expected at least -0.01; its size is 0.40 of fp32's, expected at most 0.3" in (
        verdict.refused
    )
    assert precisions.judge("int8", exact, exact, truth, size=0.28, loss=0.0).refused == ""
    broken = np.full_like(exact, np.nan)
    verdict = precisions.judge("int8", exact, broken, truth, size=0.28, loss=1.0)
    assert verdict.refused == "its logits are not finite"


def test_half_precision_answers_alike(artifacts: Path) -> None:
    path = artifacts / "export/bundle/model.onnx"
    half = precisions.to_fp16(onnx.load(path))
    assert len(half.SerializeToString()) < precisions.MOST_BYTES["fp16"] * path.stat().st_size
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    found, exact = (
        onnxruntime.InferenceSession(source).run(["logits"], {"images": images})[0]
        for source in (half.SerializeToString(), path.read_bytes())
    )
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_of_any_size_are_resized_as_ours(
    interpolation: str, shared_data: Callable[[str], Path]
) -> None:
    """Two hundred photographs of odd sizes, on each pixel."""
    contract = {"short_side_px": 256, "crop_px": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    preprocessing = Preprocessing(interpolation=interpolation, **contract)
    same = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> '
        "rest (uint8[n, 224, 224, 3] images) => (uint8[n, 224, 224, 3] pixels) "
        "{ pixels = Identity (images) }"
    )
    whole = with_any_size(same, preprocessing)
    session = onnxruntime.InferenceSession(whole.SerializeToString())
    paths = sorted(shared_data("hymenoptera").rglob("*.jpg"))[:200]
    sizes, apart = set(), []
    for path in paths:
        image = read_upright(path.read_bytes())[0]
        pixels = np.asarray(image)
        sizes.add(pixels.shape)
        (found,) = session.run(None, {"images": pixels[np.newaxis]})
        ours = crop_middle(np.asarray(square(image, preprocessing)), 224)
        apart.append(np.abs(found[0].astype(int) - ours).max())
    assert len(paths) == 200
    assert len(sizes) > 20
    # Two passes round twice: a pixel in thirty million may come out two levels apart.
    assert sum(levels > 1 for levels in apart) <= 1
    assert max(apart) <= 2
