import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.conftest import ROOT, Workspace
from tlpipe import files, held_out
from tlpipe.data.manifest import load_split, rows_of, save_split
from tlpipe.errors import ParamsError
from tlpipe.graph import PATHS
from tlpipe.training import train
from tlpipe.training.recipe import Recipe
from tlpipe.training.train import check_effects


def test_the_model_holds_what_was_learned(main_job: Workspace) -> None:
    folder = main_job.path / "artifacts" / "train" / "model"
    names = ["held_out.safetensors", "model.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
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


def test_the_history_is_the_path_of_l2_and_the_least_loss_is_chosen(main_job: Workspace) -> None:
    with (main_job.path / "artifacts/train/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    card = json.loads((main_job.path / "artifacts/train/model/model.json").read_text())
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    losses = [float(row["validation_loss"]) for row in rows]
    l2s = sorted(Recipe().l2, reverse=True)
    assert [float(row["l2"]) for row in rows] == pytest.approx(l2s[: len(rows)])
    assert card["l2"] == l2s[int(np.argmin(losses))]
    assert card["validation_loss"] == pytest.approx(min(losses), abs=1e-6)
    # A weaker l2 always fits the training images better.
    fitted = [float(row["train_loss"]) for row in rows]
    assert fitted == sorted(fitted, reverse=True)


def test_a_probe_can_be_kept_off_validation(main_job: Workspace, tmp_path: Path) -> None:
    """Other labels of validation images change no weight then, and are what is held out."""
    known = load_split(main_job.path / PATHS["split"])
    rows = rows_of(known, "validation")
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        known[row] = known[row]._replace(label=known[other].label)
    given = {"as it is": main_job.path / PATHS["split"], "mixed": tmp_path / "split.csv"}
    save_split(given["mixed"], known)
    heads = {}
    for name, split in given.items():
        for fit_on in ("train", "train_and_validation"):
            folder = tmp_path / f"{name} {fit_on}"
            train.run(
                activations=main_job.path / PATHS["activations"],
                pixels=main_job.path / PATHS["pixels"],
                split=split,
                model=folder / "model",
                history=folder / "history.csv",
                train_metrics=folder / "metrics.json",
                params=train.Params(l2=(0.1,), fit_on=fit_on),
            )
            heads[name, fit_on] = load_file(folder / "model/model.safetensors")["head.0.weight"]
    np.testing.assert_array_equal(heads["as it is", "train"], heads["mixed", "train"])
    both = "train_and_validation"
    assert not np.array_equal(heads["as it is", both], heads["mixed", both])
    folder = tmp_path / "as it is train"
    kept = held_out.load(folder / "model" / held_out.NAME)
    assert kept.rows.tolist() == rows
    metrics = files.read_json(folder / "metrics.json")
    hits = kept.logits.argmax(axis=1) == kept.labels
    assert metrics["validation_accuracy"] == pytest.approx(hits.mean())
    assert metrics["images"] == len(rows_of(known, "train"))
    card = files.read_json(folder / "model/model.json")
    assert card["validation_accuracy"] == metrics["validation_accuracy"]


def test_activations_and_split_of_different_data_are_errors(
    main_job: Workspace, empty: Workspace
) -> None:
    empty.take(main_job, "activations", "pixels")
    split = PATHS["split"]
    rows = (main_job.path / split).read_text().splitlines()
    (empty.path / split).parent.mkdir()
    (empty.path / split).write_text("\n".join(rows[:-1]) + "\n")
    result = empty.call("train", code=6)
    assert f"holds 1000 images and {split} 999; expected the same images" in result.stderr
    assert not (empty.path / PATHS["model"]).exists()


def test_activations_are_half_precision_and_mapped(main_job: Workspace) -> None:
    from tlpipe.backbones.activations import load

    found = load(main_job.path / "artifacts/embed/activations")
    assert (found.features.shape, found.features.dtype) == ((1000, 1280), np.dtype(np.float16))
    view = found.features[0].base
    assert view is not None and isinstance(view.base, np.memmap)
    assert found.boundary is None
    assert found.origin.boundary == "features"
    assert found.origin.provider == "CPUExecutionProvider"


def pipeline(workspace: Workspace, photos: Path, freeze: str, **train: object) -> dict[str, Any]:
    """Run the graph up to export; return the model's card."""
    workspace.set_source(photos)
    workspace.configure("embed", freeze=freeze)
    workspace.configure("train", **train)
    workspace.run("dvc", "repro", "--quiet", "export")
    parity = json.loads((workspace.path / "artifacts/export/parity.json").read_text())
    assert parity["same_top1"] == parity["images"] > 0
    card: dict[str, Any]
    card = json.loads((workspace.path / "artifacts/train/model/model.json").read_text())
    assert card["validation_accuracy"] == 1.0
    assert card["trainable_parameters"] + card["frozen_parameters"] >= 3_371_008
    # The model has not trained on validation, so its own answers there are what is held out.
    held = held_out.load(workspace.path / "artifacts/train/model/held_out.safetensors")
    table = workspace.rows("artifacts/split/split.csv")
    assert held.rows.tolist() == [i for i, row in enumerate(table) if row["split"] == "validation"]
    assert [card["labels"][label] for label in held.labels] == [
        table[row]["label"] for row in held.rows
    ]
    hits = held.logits.argmax(axis=1) == held.labels
    assert hits.mean() == pytest.approx(card["validation_accuracy"]) and not held.heads
    return card


@pytest.mark.slow
def test_nothing_frozen_trains_the_whole_network(workspace: Workspace, photos: Path) -> None:
    card = pipeline(workspace, photos, "none", epochs=1, batch_size=8, batch_norm="pretrained")
    assert card["origin"]["boundary"] == ""
    assert (card["trainable_parameters"], card["frozen_parameters"]) == (3_371_008 + 2 * 1281, 0)
    assert [row["step"] for row in workspace.rows("artifacts/train/history.csv")] == ["0", "1"]
    tensors = load_file(workspace.path / "artifacts/train/model/model.safetensors")
    assert sum(t.size for n, t in tensors.items() if n.endswith("weight")) > 3_300_000


@pytest.mark.slow
def test_last_stages_forgotten_and_hidden_units(workspace: Workspace, photos: Path) -> None:
    options = {"epochs": 4, "batch_size": 8, "hidden": [16], "reinitialise": 1, "metric": "loss"}
    card = pipeline(workspace, photos, "blocks5", **options)
    assert card["l2"] is None
    assert card["trainable_parameters"] + card["frozen_parameters"] == 3_371_008 + 20_530
    tensors = load_file(workspace.path / "artifacts/train/model/model.safetensors")
    shapes = {n: t.shape for n, t in tensors.items() if n.startswith("head.")}
    assert shapes["head.0.weight"] == (16, 1280) and shapes["head.1.weight"] == (2, 16)
    # Another recipe runs neither ingest nor embed again.
    workspace.configure("train", epochs=3)
    status = workspace.run("dvc", "status").stdout
    assert "train:" in status and "embed:" not in status and "ingest:" not in status


# (what is open, what is set, how the message begins)
WITHOUT_EFFECT: list[tuple[int, dict[str, Any], str]] = [
    *(
        (0, {name: value}, f"train.{name}: {value} has no effect: embed.freeze is all, which")
        for name, value in {
            "epochs": 20,
            "batch_size": 8,
            "optimiser": "sgd",
            "head_lr": 0.1,
            "backbone_lr": 0.1,
            "layer_decay": 0.5,
            "batch_norm": "batch",
            "warmup": 0.2,
            "weight_decay": 0.0,
            "max_grad_norm": 5.0,
            "label_smoothing": 0.0,
            "mixup": "mixup",
            "mixup_alpha": 0.5,
            "ema_decay": 0.9,
            "metric": "loss",
            "patience": 3,
            "unfreeze_epochs": 1,
            "checkpoint_minutes": 1.0,
            "seed": 3,
        }.items()
    ),
    (
        0,
        {"ema_decay": 0.9, "epochs": 20},
        "train.epochs: 20, train.ema_decay: 0.9 have no effect: emb",
    ),
    (0, {"hidden": (8,), "backbone_lr": 0.1}, "train.backbone_lr: 0.1 has no effect: embed.freeze"),
    (0, {"hidden": (8,), "batch_norm": "batch"}, "train.batch_norm: batch has no effect: embed.f"),
    (1, {"hidden": (8,), "max_iterations": 9}, "train.max_iterations: 9 has no effect: a head wi"),
    (1, {"hidden": (8,), "l2": (0.5,)}, r"train.l2: \[0.5\] has no effect: a head"),
    (
        1,
        {"layer_decay": 0.5},
        "train.layer_decay: 0.5 has no effect: embed.freeze is none, wh",
    ),
    (2, {"layer_decay": 0.5, "backbone_lr": 0}, "train.layer_decay: 0.5 has no effect: train.back"),
    (2, {"mixup_alpha": 0.5}, "train.mixup_alpha: 0.5 has no effect: train.mixup is none"),
    (
        2,
        {"mixup": "mixup", "batch_size": 1},
        "train.mixup: mixup has no effect: train.batch_size is 1, so there",
    ),
    (2, {"patience": 10}, "train.patience: 10 has no effect: train.epochs is 10, which ends"),
    (2, {"unfreeze_epochs": 10}, "train.unfreeze_epochs: 10 has no effect: train.epochs is 10, w"),
]


@pytest.mark.fault("T16")
@pytest.mark.parametrize(("open_stages", "options", "said"), WITHOUT_EFFECT, ids=str)
def test_an_option_that_can_have_no_effect_is_named(
    open_stages: int, options: dict[str, Any], said: str
) -> None:
    freeze = "none" if open_stages else "all"
    with pytest.raises(ParamsError, match=f"^{said}.*Take it out, or change that.$"):
        check_effects(Recipe(**options), freeze, open_stages)


@pytest.mark.parametrize(
    ("open_stages", "options"),
    [
        (0, {}),
        (0, {"balance": "loss", "l2": (0.5,), "max_iterations": 9}),
        (0, {"balance": "sampling", "epochs": 10, "label_smoothing": 0.1}),  # the defaults
        (0, {"hidden": (8,), "epochs": 20, "patience": 3, "mixup": "mixup", "mixup_alpha": 1.0}),
        (1, {"backbone_lr": 0.1, "l2": (0.5,), "unfreeze_epochs": 9}),
        (2, {"layer_decay": 0.5, "patience": 9, "metric": "loss", "batch_norm": "batch"}),
    ],
    ids=str,
)
def test_what_has_an_effect_is_taken(open_stages: int, options: dict[str, Any]) -> None:
    check_effects(Recipe(**options), "all", open_stages)


def test_where_images_decide_what_is_open_an_option_without_effect_is_only_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pipeline must not end on the night on which a class gets its thousandth image."""
    check_effects(Recipe(label_smoothing=0.0), "auto", 0)
    (line,) = caplog.messages
    assert line.startswith("train.label_smoothing: 0.0 has no effect: embed.freeze is auto, which")
    # What the freeze level does not decide stays an error.
    with pytest.raises(
        ParamsError, match=r"train.mixup_alpha: 0.5 has no effect: train.mixup is none"
    ):
        check_effects(Recipe(mixup_alpha=0.5), "auto", 2)


def test_every_option_is_known_to_the_refusals() -> None:
    """A new option belongs in one of both lists."""
    without = {name for stages, options, _ in WITHOUT_EFFECT if not stages for name in options}
    with_effect = {"l2", "max_iterations", "balance", "hidden", "reinitialise", "fit_on"}
    assert without | with_effect == set(Recipe.model_fields)


def test_the_shipped_params_are_taken() -> None:
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["train"]
    for open_stages in (0, 1, 5):
        check_effects(Recipe(**section), "all", open_stages)


@pytest.mark.fault("P04")
def test_what_cannot_be_trained_is_an_error(main_job: Workspace, empty: Workspace) -> None:
    empty.configure("train", reinitialise=1)
    empty.take(main_job, "activations", "pixels", "split")
    command = ("tlpipe", "train")
    said = empty.run(*command, code=3).stderr
    assert "train.reinitialise is 1; 0 stages are open, since embed.freeze is all; expe" in said
    empty.configure("train", reinitialise=0, batch_size=597, hidden=[8])
    said = empty.run(*command, code=3).stderr
    assert "train.batch_size is 597; there are 596 training images." in said
    empty.configure("train", batch_size=8, mixup="cutmix")
    said = empty.run(*command, code=3).stderr
    assert "train.mixup is cutmix; what features gives has no height and width to cut" in said


@pytest.mark.fault("T16")
def test_options_without_effect_are_errors_before_any_work(empty: Workspace) -> None:
    empty.configure("train", epochs=20, mixup="mixup")
    said = empty.call("check", code=3).stderr
    assert "train.epochs: 20, train.mixup: mixup have no effect: embed.freeze is all, which" in said
    empty.configure("embed", freeze="auto")  # the number of images decides: nobody knows as yet
    assert "no effect" not in empty.run("tlpipe", "check", code=None).stderr
    empty.configure("embed", freeze="none", views=8)
    assert "embed.views is 8 and has no effect" in empty.call("check", code=3).stderr


def test_hidden_units_learn_on_frozen_features(main_job: Workspace, empty: Workspace) -> None:
    empty.configure("train", hidden=[64], epochs=20)
    empty.take(main_job, "activations", "pixels", "split")
    empty.call("train")
    rows = empty.rows(PATHS["history"])
    assert float(rows[0]["validation_accuracy"]) < 0.3
    card = json.loads((empty.path / PATHS["model"] / "model.json").read_text())
    assert card["validation_accuracy"] > 0.85
