from collections import Counter

from tests.conftest import Workspace


def test_the_textures_are_split_by_region(empty: Workspace) -> None:
    (empty.path / "textures.yaml").write_text("package: skimage\npatch_px: 32\n")
    empty.set_source("textures.yaml")
    assert "672 images in 3 classes, 0 rejected" in empty.ingest()
    columns: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
    rows = empty.rows("artifacts/ingest/manifest.csv")
    for row in rows:
        columns[row["split"]].add(int(row["path"].split("-")[1].split(".")[0]))
    assert max(columns["train"]) + 1 < min(columns["validation"])
    assert max(columns["validation"]) + 1 < min(columns["test"])
    counts = Counter((row["label"], row["split"]) for row in rows)
    assert counts["gravel", "train"] == 128
    assert counts["brick", "validation"] == counts["grass", "test"] == 48


def test_a_mistyped_built_in_is_an_error(empty: Workspace) -> None:
    (empty.path / "textures.yaml").write_text("package: skimage\npatch_px: 300\n")
    empty.set_source("textures.yaml")
    assert "patch_px is 300; it must be less than or equal to 64" in empty.ingest(code=3)
    empty.replace("params.yaml", "source: textures.yaml ", "source: texture.yaml ")
    assert "the built-in data sets are data/digits.yaml and data/textures" in empty.ingest(code=4)
