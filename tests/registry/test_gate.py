"""The rules of the gate that take a test split of their own; the others are in test_promotion."""

from pathlib import Path

import pytest

from tests.conftest import Workspace
from tlpipe.data import ingest
from tlpipe.data.manifest import load_manifest, load_split, save_manifest
from tlpipe.metrics import scores
from tlpipe.onnx_export import bundle as bundles
from tlpipe.registry import gate


def judge(artifacts: Path, manifest: Path, **bounds: float) -> gate.Decision:
    folder = artifacts / "ingest"
    return gate.judge(
        bundles.load(artifacts / "export/bundle"),
        None,
        names=("2", None),
        measured=gate.Measured(folder / "pixels", manifest, artifacts / "split/split.csv"),
        source=ingest.Params(source="none"),
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
