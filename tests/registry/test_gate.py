"""The rules of the gate: the change of accuracy against closed forms, and unknown numbers."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.conftest import Workspace
from tlpipe.data import ingest
from tlpipe.data.manifest import load_manifest, load_split, save_manifest
from tlpipe.metrics import scores
from tlpipe.onnx_export import bundle as bundles
from tlpipe.registry import gate
from tlpipe.resampling import paired_difference

IMAGES = 200


def decided(images: int, losses: int, gains: int, loss: float) -> gate.Rule:
    """Judge a candidate that is wrong on so many of the champion's hits, and the other way."""
    both = np.ones((2, images), bool)
    both[1, :losses] = False
    both[0, losses : losses + gains] = False
    groups = [str(number) for number in range(images)]
    return gate._change(paired_difference(both[0], both[1], groups, 0.95), loss)


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05, 1.0])
def test_who_loses_no_more_than_allowed_and_not_beyond_chance_passes(loss: float) -> None:
    """Exactly as much as allowed is allowed, also where it is no whole number in binary."""
    for losses in range(13):
        for gains in range(13):
            rule = decided(IMAGES, losses, gains, loss)
            is_little = losses - gains <= round(loss * IMAGES)
            # Of images that changed, half are lost if nothing but chance decides.
            changed = losses + gains
            chance = (
                stats.binomtest(losses, changed, alternative="greater").pvalue if changed else 1
            )
            if chance > 0.05:
                assert rule.passed == is_little, (losses, gains, rule)
            elif chance < 0.005:
                assert not rule.passed, (losses, gains, rule)


@pytest.mark.xfail(strict=True, reason="issue 15: there is no third verdict, 'cannot tell'")
def test_models_that_are_alike_are_hardly_ever_called_worse() -> None:
    """Of two that differ on 12 of 200 images by chance, each loses three more in a fifth of draws.

    The share follows from the binomial distribution, without a random number.
    """
    changed = 12
    refused = sum(
        stats.binom.pmf(losses, changed, 0.5)
        for losses in range(changed + 1)
        if not decided(IMAGES, losses, changed - losses, 0.01).passed
    )
    assert refused <= 0.05, refused


def judge(artifacts: Path, manifest: Path, **bounds: float) -> gate.Decision:
    folder = artifacts / "ingest"
    return gate.judge(
        bundles.load(artifacts / "export/bundle"),
        None,
        names=("2", None),
        measured=gate.Measured(folder / "pixels", manifest, artifacts / "split/split.csv"),
        source=ingest.Params(source="none"),
        held_out=artifacts / "train/model/held_out.safetensors",
        signature=None,
        bounds=gate.Bounds(**bounds),
    )


@pytest.mark.fault("M02")
def test_an_unknown_calibration_error_is_within_no_bound(
    main_job: Workspace, tmp_path: Path
) -> None:
    artifacts = main_job.path / "artifacts"
    known = judge(artifacts, artifacts / "ingest/manifest.csv", calibration_error=1.0)
    assert known.numbers["calibration_error"] >= 0
    assert known.passed

    # All test images are parts of one photo.
    entries = load_manifest(artifacts / "ingest/manifest.csv")
    tested = [row.split == "test" for row in load_split(artifacts / "split/split.csv")]
    save_manifest(
        tmp_path / "manifest.csv",
        [
            entry._replace(group="photo") if is_test else entry
            for entry, is_test in zip(entries, tested, strict=True)
        ],
    )
    refused = judge(artifacts, tmp_path / "manifest.csv", calibration_error=1.0)
    assert refused.numbers["calibration_error"] is None
    assert not refused.passed
    assert refused.reasons == (
        f"calibration_error {scores.UNKNOWN}, expected at most 1.0000; test on images of two "
        f"groups or more, or set register.gate.calibration_error to null"
    )
    assert refused.content()["numbers"]["calibration_error"] is None
