"""What a sweep says of what it has found."""

from typing import Any

from tlpipe.sweep import report
from tlpipe.sweep.report import Found, Row


def row(level: str, images: int, validation: float, seeds: int = 1) -> Row:
    test = {"value": validation, "low": validation - 0.1, "high": validation + 0.1}
    shown = tuple(validation for _ in range(seeds))
    return Row(level, "", images, validation, test, shown, f"{level}-{images}")


def best(rows: list[Row], levels: int) -> str:
    return report.conclusion(Found(rows, [], 0, [], levels))[0]


def test_levels_are_compared_where_all_of_them_are_measured() -> None:
    rows = [row("all", 50, 0.7), row("all", 200, 0.9), row("none", 50, 0.8)]
    assert best(rows, 2).startswith("best on validation with 50 training images: freeze none")
    assert best(rows, 3).startswith(
        "best on validation with 50 training images, of 2 of 3 levels: freeze none"
    )
    # They have no number of images in common.
    rows = [row("all", 200, 0.7), row("none", 50, 0.8)]
    assert best(rows, 2).startswith(
        "best on validation with 200 training images, of 1 of 2 levels: freeze all"
    )


def test_means_over_unequal_seeds_are_said() -> None:
    rows = [row("all", 50, 0.7, seeds=3), row("none", 50, 0.8)]
    assert "with 50 training images, over 1 to 3 seeds each: freeze none" in best(rows, 2)


def test_seeds_of_other_test_images_are_left_out() -> None:
    def record(name: str, hits: str, groups: list[str]) -> dict[str, Any]:
        value = hits.count("1") / len(hits)
        test = {"value": value, "hits": hits, "groups": groups}
        return {"name": name, "option": "", "validation_accuracy": 0.5, "test": test}

    found = report._row(
        "all", 8, [record("a", "110", ["x", "y", "z"]), record("b", "1", ["other"])]
    )
    assert (found.seeds, found.experiment) == ((2 / 3,), "a")
