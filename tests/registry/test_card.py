import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlpipe import bundle
from tlpipe.evaluation import metrics
from tlpipe.registry import card

NONE = {"threshold": None, "coverage": None, "accuracy": None}
KNOWN = {"threshold": 0.91, "coverage": 0.6, "accuracy": {"value": 0.99}}


WALLS = {"source": "walls", "images": 50, "auroc": 0.75}


def limits(
    known: dict[str, Any],
    observed: dict[str, Any],
    answered: float | None,
    ood: dict[str, Any] | None = WALLS,
    *,
    is_copied: bool = False,
    noisy: float = 0.4,
) -> str:
    sizes = {"error_rate": 0.02, "confidence": 0.95, "images": 120, "images_needed": 149}
    sizes["is_copied"] = is_copied
    report = {
        "abstention": {**sizes, **known, "observed": observed},
        "ood": ood and {**ood, "answered": answered},
        "robustness": {
            "images": 64,
            "clean": {"accuracy": 0.9},
            "blur": [{"accuracy": max(0.8, noisy)}],
            "noise": [{"accuracy": noisy}],
        },
        "generalisation": {"is_below": False},
    }
    # As it comes from the file.
    return card.limits(json.loads(json.dumps(report)))


def test_a_known_threshold_is_told_with_its_confidence() -> None:
    text = limits(KNOWN, KNOWN, 0.25)
    assert (
        "Answers below a probability of 0.910 should be left to people: above it at most 2.0% of "
        "all answers are wrong, whatever the class, with 95% confidence. It leaves 60% of test "
        "images answered, 99.0% right." in text
    )
    assert "of 50 from walls, 25% were above that probability; AUROC 0.750." in text
    assert "Strong noise costs most: 40.0% right, against 90.0%" in text
    text = limits(KNOWN, KNOWN, 0.25, noisy=0.9)
    assert "None of blur, noise costs anything: 90.0% right on the same 64 images" in text


@pytest.mark.fault("L04")
def test_nothing_is_promised_that_copies_were_measured_on() -> None:
    text = limits(NONE, NONE, None, is_copied=True)
    assert "training has seen copies of the images it would be looked for on." in text
    assert "Above" not in text


def test_unknown_images_that_nobody_named_are_not_made_up() -> None:
    text = limits(KNOWN, KNOWN, None, ood=None)
    assert "how often it gives one nevertheless was not measured (evaluate.ood)." in text
    assert "AUROC" not in text


@pytest.mark.fault("M03")
def test_no_threshold_is_told_in_words() -> None:
    text = limits(NONE, NONE, None)
    assert "No probability is known above which at most 2.0% of answers are wrong" in text
    assert "120 independent images held out are too few, 149 or more are needed." in text
    assert "left to people" not in text
    assert "None" not in text
    assert "told from the test images by their probability with AUROC 0.750" in text


@pytest.mark.fault("M03")
def test_a_threshold_that_was_only_observed_is_told_as_that() -> None:
    nothing = {"threshold": 0.991, "coverage": 0.0, "accuracy": None}
    text = limits(NONE, nothing, None)
    assert "Above 0.991 no more were wrong on images held out, which promises nothing." in text
    assert "It leaves 0% of test images answered." in text


def known(artifacts: Path) -> dict[str, Any]:
    """Return what the stages of the main job report."""
    stages = {
        "report": "evaluate/report.json",
        "speed": "evaluate/speed.json",
        "data_report": "ingest/report.json",
        "split_report": "split/report.json",
        "leaks_report": "audit/leaks.json",
        "shortcuts": "audit/shortcuts.json",
    }
    found = {name: json.loads((artifacts / path).read_text()) for name, path in stages.items()}
    return {**found, "label_issues": {"found": 60}}


@pytest.mark.fault("M02")
def test_an_unknown_calibration_error_is_told_in_words(artifacts: Path) -> None:
    reports = known(artifacts)
    reports["report"]["precisions"]["fp32"]["calibration_error"] = None
    text = card.write("digits", bundle.load(artifacts / "export/bundle"), reports, {})
    (row,) = (line for line in text.splitlines() if "calibration error" in line)
    assert row.split("|")[2].strip() == "unknown, since all test images are of one group"
    assert "- labels that the other images speak against: 60\n" in text


@pytest.mark.fault("M27")
@pytest.mark.parametrize("commit", ["0" * 40, "a repository without a commit"])
def test_what_no_commit_holds_is_not_said_to_come_out_again(artifacts: Path, commit: str) -> None:
    shipped = bundle.load(artifacts / "export/bundle")
    made = replace(shipped, provenance={**shipped.provenance, "git_commit": commit})
    text = card.write("digits", made, known(artifacts), {})
    assert ("tlpipe rebuild digits@champion" in text) is (commit == "0" * 40)


@pytest.mark.fault("L04")
def test_copies_in_train_are_told_beside_the_limits(artifacts: Path) -> None:
    reports, shipped = known(artifacts), bundle.load(artifacts / "export/bundle")
    text = card.write("digits", shipped, reports, {})
    copies = reports["leaks_report"]["splits"]["test"]["copies"]
    assert copies < 5
    assert f"{copies} of 48 test images looked at are rotated, mirrored or sheared" in text
    assert "promises too much" not in text and "pretrained on" not in text
    reports["leaks_report"]["pretrained"] = {"test": {"images": 60, "seen": 7}}
    limits = card.write("digits", shipped, reports, {}).split("## Limits")[1].split("## Data")[0]
    assert "**The accuracy may promise too much:**" in limits
    assert "; the weights were pretrained on 7 of 60 test images." in limits
    reports["leaks_report"]["splits"]["test"] |= {
        "copies": 30,
        "share": 30 / 48,
        "is_above_clean": True,
    }
    reports["leaks_report"]["is_above_clean"] = True
    limits = card.write("digits", shipped, reports, {}).split("## Limits")[1].split("## Data")[0]
    assert "**The accuracy promises too much:**" in limits
    assert "30 of 48 test images looked at are rotated, mirrored or sheared copies" in limits
    assert "clean sets show 5% at most" in limits


@pytest.mark.fault("L08")
def test_a_class_that_its_files_tell_is_told_beside_the_limits(artifacts: Path) -> None:
    reports, shipped = known(artifacts), bundle.load(artifacts / "export/bundle")
    assert "the objects" not in card.write("digits", shipped, reports, {})
    row = {"label": "a|b", "property": "width", "images": 9, "right": 8, "wrong": 1}
    reports["shortcuts"]["told"] = [{**row, "correlation": 0.9}]
    limits = card.write("digits", shipped, reports, {}).split("## Limits")[1].split("## Data")[0]
    assert "**It may know the files, not the objects:**" in limits
    assert r"the files alone tell a\|b by its width (8 of 9 images, 1 of others)" in limits


@pytest.mark.fault("L03")
def test_a_test_accuracy_below_validation_is_the_first_limit(artifacts: Path) -> None:
    report = json.loads((artifacts / "evaluate/report.json").read_text())
    assert "below validation" not in card.limits(report)
    right = np.repeat([True, False], [190, 10])
    groups = [str(number) for number in range(200)]
    report["generalisation"] = metrics.compare_validation(right, groups, ~right, groups, 0.95)
    assert card.limits(report).startswith(
        "- Test accuracy is below validation accuracy beyond chance, so other images may cost "
        "still more: 0.9500 on 200 images held out, 0.0500 on 200 test images: below beyond chance "
        "(-0.9000, 95% interval "
    )
