"""Which graphs beside the exact one ship."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grimp
import numpy as np
import onnx
import pytest
from scipy.stats import binomtest

from tests.export.conftest import Family, run_export, verdicts
from tlpipe import held_out as held_outs
from tlpipe.export import bundle as bundles
from tlpipe.export import export, graph, parity, precisions
from tlpipe.export.precisions import Verdict
from tlpipe.held_out import HeldOut


def test_what_ships_is_what_the_report_does_not_refuse(every_precision: Path) -> None:
    shipped = bundles.load(every_precision / "bundle")
    found = verdicts(every_precision)
    assert set(found) == {"fp16", "int8"}
    kept = {name for name, verdict in found.items() if not verdict["reason"]}
    assert set(shipped.graphs) == {"fp32", "any-size"} | kept
    exact = shipped.graphs["fp32"].stat().st_size
    head = onnx.load(shipped.graphs["fp32"]).graph.initializer
    last = sum(t.ByteSize() for t in head if t.name in ("head.0.weight", "head.0.bias"))
    assert last > 4 * 10 * 1280
    for name in kept:
        size = shipped.graphs[name].stat().st_size
        assert found[name]["size"] == pytest.approx((size - last) / (exact - last))
        assert found[name]["size"] <= precisions.MOST_BYTES[name]
        change = found[name]["accuracy_change"]
        assert change["low"] <= change["value"] <= change["high"]


def test_every_graph_says_the_same_of_itself(every_precision: Path) -> None:
    shipped = bundles.load(every_precision / "bundle")
    said = [
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in shipped.graphs.values()
    ]
    assert len(said) == 4
    assert all(metadata == said[0] for metadata in said)
    provenance = json.loads(said[0]["tlpipe.provenance"])
    assert provenance["temperature"] == shipped.provenance["temperature"]
    assert provenance["origin"]["data_sha256"] == shipped.provenance["origin"]["data_sha256"]


@pytest.mark.fault("E07")
def test_candidates_are_those_that_were_asked_for(family: Callable[[str], Family]) -> None:
    """Also half precision on a machine without a GPU; equal inputs give equal bytes."""
    given = family("resnet18")
    whole = given.graph

    def made(*names: str) -> dict[str, bytes]:
        params = export.Params(precisions=names, **({"calibration_images": 2} if names else {}))
        found = export._candidates(whole, given.sample(), params, 2)
        return {name: model.SerializeToString(deterministic=True) for name, model in found}

    first = made("fp16", "int8")
    assert list(first) == ["fp16", "int8"]
    assert made("fp16") == {"fp16": first["fp16"]}
    assert made() == {}


@pytest.mark.fault("E07")
def test_nothing_in_export_can_see_a_gpu() -> None:
    closure = grimp.build_graph("tlpipe").find_upstream_modules("tlpipe.export.export")
    assert "tlpipe.export.parity" in closure
    assert "tlpipe.backbones.device" not in closure


@pytest.mark.fault("E07")
def test_many_classes_ship_in_eight_bits_too(family: Callable[[str], Family]) -> None:
    """The last layer stays exact: with 4,000 classes it alone would be above the bound on size."""
    given = family("timm/mobilenetv3_small_050")
    weight, bias = given.model.head[-1]
    wide = np.resize(weight, (4000, weight.shape[1])), np.resize(bias, 4000)
    whole = graph.classifier(given.backbone, given.weights, replace(given.model, head=(wide,)))
    exact = whole.SerializeToString()
    images = given.sample()
    logits = parity.logits(parity.in_onnx(exact, 1), images, "")
    rows = np.arange(len(logits))
    held = HeldOut(rows, logits.argmax(axis=1), logits, np.zeros_like(rows))
    params = export.Params(calibration_images=4, max_accuracy_drop=0.99)
    made = []

    def finish(model: onnx.ModelProto) -> bytes:
        made.append(model.SerializeToString())
        return made[-1]

    _, checks = export._lower_precisions(
        whole,
        exact,
        finish,
        held,
        images=images,
        fitted=images,
        threads=1,
        params=params,
    )
    assert len(made[0]) > precisions.MOST_BYTES["int8"] * len(exact)
    assert checks["int8"]["size"] < precisions.MOST_BYTES["int8"]
    assert "size" not in checks["int8"]["reason"]


def eye(truth: np.ndarray) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[truth]


def judge(exact: np.ndarray, other: np.ndarray, truth: np.ndarray, **values: object) -> Verdict:
    given = {"groups": [""] * len(truth), "size": 0.28, "max_drop": 0.01} | values
    return precisions.judge("int8", exact, other, truth, **given)  # type: ignore[arg-type]


def test_what_falls_short_is_an_error_with_its_numbers() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 200)
    exact = eye(truth)
    other = exact.copy()
    other[:10] = np.roll(other[:10], 1, axis=1)
    verdict = judge(exact, other, truth, size=0.4)
    assert "accuracy on 200 held-out images differs by -0.0500 (-0.0" in verdict.reason
    assert "at least -0.01; its size without the last layer is 0.4000 of" in verdict.reason
    assert verdict.reason.endswith("fp32's, expected at most 0.35")
    assert judge(exact, exact, truth, max_drop=0.0).reason == ""
    broken = np.full_like(exact, np.nan)
    assert judge(exact, broken, truth, max_drop=0.999999).reason.startswith(
        "its logits are not finite; its accuracy on 200 held-out images differs by -1.0000"
    )


def test_what_few_images_cannot_tell_is_said() -> None:
    """All of n agree: Wilson's interval rules out one per cent of changes from n = 381 on."""
    for images, can_tell in ((50, False), (380, False), (381, True)):
        truth = np.arange(images) % 3
        low = binomtest(images, images).proportion_ci(method="wilson").low
        verdict = judge(eye(truth), eye(truth), truth)
        assert verdict.agreement["low"] == pytest.approx(low)
        assert verdict.can_tell == can_tell == (low >= 0.99)
        assert verdict.reason == ""
        assert "the same answer for 100.0%" in str(verdict)
        assert ("too few images" in str(verdict)) != can_tell
    truth = np.arange(1000) % 3
    other = eye(truth)
    other[:15] = np.roll(other[:15], 1, axis=1)
    assert judge(eye(truth), other, truth, max_drop=0.03).agreement["value"] == 0.985


def test_images_of_one_group_are_drawn_together() -> None:
    """Twenty wrong copies of one photo say as much as one: the interval is as wide as one's."""
    truth = np.zeros(200, np.int64)
    exact = eye(truth)
    other = exact.copy()
    other[:20] = np.roll(other[:20], 1, axis=1)
    alone = judge(exact, other, truth).accuracy_change
    copies = [f"photo {i // 20}" for i in range(200)]
    together = judge(exact, other, truth, groups=copies).accuracy_change
    assert alone["value"] == together["value"] == pytest.approx(-0.1)
    for change, wrong, images in ((alone, 20, 200), (together, 1, 10)):
        # Newcombe (1998), without correlation: Wilson's intervals of what was lost and of nothing.
        lost, gained = (
            binomtest(count, images).proportion_ci(method="wilson") for count in (wrong, 0)
        )
        low = -0.1 - np.hypot(lost.high - 0.1, gained.low)
        high = -0.1 + np.hypot(0.1 - lost.low, gained.high)
        assert (change["low"], change["high"]) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.fault("E07")
def test_last_bits_do_not_decide() -> None:
    """Images between two classes count in part, so that a last bit moves no image as a whole."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 400)
    exact = random.normal(0, 1, (400, 3)).astype(np.float32)
    exact[:200] = np.float32(1)  # every class is as good
    here, there = exact.copy(), exact.copy()
    here[np.arange(200), truth[:200]] += 1e-6
    there[np.arange(200), truth[:200]] -= 1e-6
    counted = [(logits.argmax(axis=1) == truth).mean() for logits in (here, there)]
    assert counted[0] - counted[1] > 0.4
    judged = [judge(exact, logits, truth).accuracy_change["value"] for logits in (here, there)]
    assert judged[0] == pytest.approx(judged[1], abs=1e-4)
    assert judged[0] == pytest.approx(0, abs=1e-4)


def test_a_hit_is_whole_outside_of_a_tie() -> None:
    logits = np.array([[2, 0, 0], [0, 2, 0], [1, 1, 0], [1.05, 1, 0], [0.9, 1, 0]], np.float32)
    found = precisions.hits(logits, np.zeros(5, np.int64), 0.1)
    assert found == pytest.approx([1, 0, 0.5, 0.75, 0], abs=1e-6)
    assert precisions.hits(np.ones((1, 2), np.float32), np.zeros(1, np.int64), 0.0) == 0.5


def test_fold_heads_answer_for_their_own_fold() -> None:
    taken = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    first = (np.array([[1, 2], [3, 4]], np.float32), np.array([0, 10], np.float32))
    second = (np.array([[5, 6], [7, 8]], np.float32), np.array([1, 1], np.float32))
    folds, nothing = np.array([0, 1, 1]), np.zeros((3, 2), np.float32)
    held = HeldOut(np.arange(3), np.zeros(3, np.int64), nothing, folds, [first, second])
    found = precisions.out_of_fold_logits(held, taken, None)
    assert found.tolist() == [[1, 13], [7, 9], [23, 31]]
    doubled = precisions.out_of_fold_logits(held, taken, lambda w, b: (2 * w, b))
    assert doubled.tolist() == [[2, 16], [13, 17], [45, 61]]


@pytest.mark.slow
def test_a_lower_precision_is_checked_by_heads_that_have_not_seen_the_images(
    artifacts: Path, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    """Heads of the folds that name every class wrong: the shipped head itself would pass."""
    shutil.copytree(artifacts / "train/model", tmp_path / "train/model")
    for name in ("ingest", "split"):
        (tmp_path / name).symlink_to(artifacts / name)
    path = tmp_path / "train/model/held_out.safetensors"
    held = held_outs.load(path)
    wrong = [(np.roll(weight, 1, axis=0), np.roll(bias, 1)) for weight, bias in held.heads]
    held_outs.save(path, replace(held, heads=wrong))
    folder = run_export(tmp_path, tmp_path / "out", cache_env, precisions=["int8"])
    (verdict,) = verdicts(folder).values()
    assert verdict["accuracy_change"]["value"] < -0.7
    assert "its accuracy on 203 held-out images differs by -0." in verdict["reason"]
    assert set(bundles.load(folder / "bundle").graphs) == {"fp32", "any-size"}
