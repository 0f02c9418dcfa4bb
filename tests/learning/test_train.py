import csv
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import Workspace
from tlpipe import files


def test_the_model_holds_what_was_learned(main_job: Workspace) -> None:
    folder = main_job.path / "artifacts" / "train" / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    tensors = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "head.0.weight": (10, 1280),
        "head.0.bias": (10,),
    }
    card = json.loads((folder / "model.json").read_text())
    assert card["labels"] == [str(digit) for digit in range(10)]
    assert card["origin"]["freeze"] == "all"
    assert card["origin"]["threads"] == 2
    assert card["split_sha256"] == files.sha256(main_job.path / "artifacts/split/split.csv")
    assert card["origin"]["data_sha256"] == files.sha256(
        main_job.path / "artifacts/ingest/manifest.csv"
    )


def test_the_history_falls_to_the_chosen_loss(main_job: Workspace) -> None:
    with (main_job.path / "artifacts/train/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    card = json.loads((main_job.path / "artifacts/train/model/model.json").read_text())
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["validation_loss"]) == pytest.approx(card["validation_loss"], abs=1e-6)


def test_activations_and_split_of_different_data_are_refused(
    main_job: Workspace, empty: Workspace
) -> None:
    split = main_job.path / "artifacts/split/split.csv"
    shorter = empty.path / "split.csv"
    shorter.write_text("\n".join(split.read_text().splitlines()[:-1]) + "\n")
    activations = str(main_job.path / "artifacts/embed/activations")
    pixels = str(main_job.path / "artifacts/ingest/pixels")
    known = ("--activations", activations, "--pixels", pixels, "--split", "split.csv")
    paths = (*known, "--model", "m")
    result = empty.run("tlpipe", "train", *paths, "--history", "h.csv", code=6)
    assert "holds 1000 images and split.csv 999; expected the same images" in result.stderr
    assert not (empty.path / "m").exists()


def test_activations_are_half_precision_and_mapped(main_job: Workspace) -> None:
    from tlpipe.features.activations import load

    found = load(main_job.path / "artifacts/embed/activations")
    assert (found.features.shape, found.features.dtype) == ((1000, 1280), np.float16)
    assert isinstance(found.features[0].base.base, np.memmap)
    assert found.boundary is None
    assert found.origin.boundary == "features"
    assert found.origin.provider == "CPUExecutionProvider"
