import json
import random
import shutil
from pathlib import Path

import pytest

from tlpipe.errors import ArtifactError
from tlpipe.onnx_export import bundle as bundles


@pytest.fixture
def copied(artifacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts / "export" / "bundle", tmp_path / "bundle"))


def test_a_bundle_reads_back_whole(copied: Path) -> None:
    bundle = bundles.load(copied)
    assert bundle.labels == tuple("0123456789")
    assert bundle.preprocessing.crop_px == 224
    assert bundle.provenance["origin"]["threads"] == 2
    assert len(bundle.digest) == 64


def test_a_flipped_bit_anywhere_is_refused(copied: Path) -> None:
    source = random.Random(0)
    for name in ("model.onnx", "labels.json", "preprocessing.json", "provenance.json"):
        path = copied / name
        for _ in range(5):
            content = bytearray(path.read_bytes())
            position = source.randrange(len(content))
            content[position] ^= 1 << source.randrange(8)
            intact, _ = path.read_bytes(), path.write_bytes(content)
            with pytest.raises(ArtifactError, match=rf"{name} has the sha256 .* was altered"):
                bundles.load(copied)
            path.write_bytes(intact)


@pytest.mark.fault("R08")
def test_permuted_labels_are_refused(copied: Path) -> None:
    labels = json.loads((copied / "labels.json").read_text())
    (copied / "labels.json").write_text(json.dumps(labels[::-1], indent=2) + "\n")
    with pytest.raises(ArtifactError, match=r"labels.json has the sha256"):
        bundles.load(copied)


def test_a_missing_or_extra_file_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "extra.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"holds .*extra.bin.*; expected labels.json"):
        bundles.load(copied)
    (copied / "extra.bin").unlink()
    (copied / "labels.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds model.any-size.onnx, .*; expected labels.json"):
        bundles.load(copied)
    with pytest.raises(ArtifactError, match=r"is no bundle: SHA256SUMS cannot be read"):
        bundles.load(tmp_path / "nowhere")
