from typing import Any

import pytest

from tests.conftest import ROOT, Workspace
from tlpipe import params
from tlpipe.errors import ParamsError
from tlpipe.project import models
from tlpipe.sweep import grid, search, sweep
from tlpipe.sweep.grid import Asked, Cell, cells
from tlpipe.sweep.search import Range


def content(**changes: dict[str, Any]) -> dict[str, Any]:
    found = params.read_yaml(ROOT / "params.yaml")
    for section, values in changes.items():
        found[section] = found[section] | values
    return found


def of(asked: Asked, **changes: dict[str, Any]) -> list[Cell]:
    return cells(asked, content(**changes), models())


def test_cells_are_all_combinations_with_whole_grids_of_each_seed() -> None:
    found = of(Asked(("all", "none"), (50, None), seeds=2))
    # With all images and nothing to train step by step, a seed changes nothing.
    assert [(cell.level, cell.images, cell.seed) for cell in found] == [
        ("all", 50, 0),
        ("all", None, 0),
        ("none", 50, 0),
        ("none", None, 0),
        ("all", 50, 1),
        ("none", 50, 1),
        ("none", None, 1),
    ]
    assert [cell.option[:8] for cell in found[::2]] == [
        "option 1",
        "option 2",
        "option 1",
        "option 2",
    ]


def test_a_cell_holds_what_its_stages_run_with() -> None:
    frozen, tuned = of(Asked(("all", "none"), (50,), settings={"train.epochs": (3,)}))
    assert frozen.content["split"]["images"] == tuned.content["split"]["images"] == 50
    assert frozen.content["embed"]["freeze"] == "all"
    # Validation is what is chosen by; where steps are taken it never trains anyway.
    assert frozen.content["train"]["fit_on"] == "train"
    assert "fit_on" not in tuned.content["train"]
    assert tuned.content["train"]["epochs"] == 3
    assert frozen.content["train"]["epochs"] == 10  # as params.yaml has it: the default
    assert (frozen.level, tuned.level) == ("all", "none")
    own = content()
    assert {name: tuned.content[name] for name in ("ingest", "register")} == {
        name: own[name] for name in ("ingest", "register")
    }


def test_what_params_yaml_says_without_effect_at_a_level_is_left_out_there() -> None:
    frozen, tuned = of(Asked(("all", "none"), (None,)), train={"epochs": 4, "mixup": "mixup"})
    assert {"epochs", "mixup"} & frozen.content["train"].keys() == set()
    assert tuned.content["train"] == {"epochs": 4, "mixup": "mixup"}


def test_a_seed_picks_images_and_steps() -> None:
    found = of(Asked(("all", "none"), (50,), seeds=3))
    assert [cell.content["split"].get("images_seed", 0) for cell in found] == [0, 0, 1, 1, 2, 2]
    tuned = [cell for cell in found if cell.level == "none"]
    assert [cell.content["train"].get("seed", 0) for cell in tuned] == [0, 1, 2]


WRONG = [
    (["--freeze", "all,all"], "--freeze has all twice; expected each value once"),
    (["--freeze", "all,,none"], "--freeze is 'all,,none'; expected values with commas between"),
    (["--freeze", "half"], "embed.freeze is 'half'; expected all, none, auto, a number of stages"),
    (["--freeze", "auto"], "--freeze has auto, which is one of the other levels"),
    (["--images", "50,many"], "--images has 'many'; expected numbers of training images"),
    (["--images", "0"], "--images has '0'; expected numbers of training images"),
    (["--backbones", "resnet"], "embed.backbone is 'resnet'; no backbone has that name"),
    (["--set", "epochs=3"], "--set epochs=3 names no key of params.yaml"),
    (["--set", "register.name=a,b"], "a sweep varies keys of embed and train"),
    (["--set", "train.seed=1,2"], "sets train.seed, which has another place: --seeds"),
    (["--set", "train.epochs=3,x"], "train.epochs is 'x'; it must be a valid integer"),
    (["--set", "train.epoch=3,4"], "train.epoch is no known key; did you mean train.epochs?"),
    (["--set", "train.epochs=3", "--set", "train.epochs=4"], "--set train.epochs stands twice"),
    (
        ["--freeze", "all", "--set", "train.epochs=3"],
        "--set train.epochs has no effect at --freeze",
    ),
    (["--search", "train.head_lr=1e-2..1e-4"], "is no range; expected LOW..HIGH"),
    (["--search", "train.head_lr=1e-2"], "is no range; expected LOW..HIGH"),
    (["--search", "embed.views=1..3"], "the search is over keys of train"),
    (["--search", "train.head_lr=-1..1", "--freeze", "none"], "train.head_lr is -1; it must be"),
    (["--search", "train.head_lr=1e-4..1e-2", "--freeze", "all"], "has no effect at --freeze all"),
    (["--search", "train.epochs=1..3", "--freeze", "all,none"], "one value each in --freeze"),
    (["--budget", "soon"], "--budget is 'soon'; expected a time such as 90s, 30m or 1h30m"),
    (["--address", "the cluster"], "--address is 'the cluster'; expected that of a running Ray"),
]


@pytest.mark.fault("O06")
@pytest.mark.parametrize(("options", "said"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_options_are_one_line_before_anything_runs(
    workspace: Workspace, options: list[str], said: str
) -> None:
    pytest.importorskip("ray")
    result = workspace.call("sweep", *options, code=3)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (workspace.path / "artifacts").exists()


@pytest.mark.parametrize("option", ["--seeds", "--trials"])
def test_numbers_out_of_range_are_the_command_line_s_own_error(
    workspace: Workspace, option: str
) -> None:
    workspace.call("sweep", option, "0", code=2)


def test_without_the_extra_one_line_says_what_to_install(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PACKAGES", ("ray_of_nobody",))
    said = workspace.call("sweep", code=3).stderr
    assert "a sweep needs ray-of-nobody, not installed here" in said
    assert "pip install 'tlpipe[sweep]'" in said


def test_budgets_are_times() -> None:
    assert [sweep.read_budget(text) for text in ("90s", "30m", "1h30m", "1.5m")] == [
        90,
        1800,
        5400,
        90,
    ]


def test_values_are_read_as_params_yaml_reads_them() -> None:
    assert grid.read_setting("train.hidden=[256],[64,32]") == ("train.hidden", ([256], [64, 32]))
    assert grid.read_setting("train.head_lr=1e-3,2e-3") == ("train.head_lr", (0.001, 0.002))
    assert grid.read_setting("train.optimiser=sgd,adamw")[1] == ("sgd", "adamw")
    assert grid.read_freeze("all,4,none") == ("all", 4, "none")


def test_ranges_over_powers_are_searched_by_powers() -> None:
    assert search.read_range("train.head_lr=1e-4..1e-2") == Range("train.head_lr", 1e-4, 1e-2)
    assert search.read_range("train.head_lr=1e-4..1e-2").is_logarithmic
    assert not search.read_range("train.label_smoothing=0..0.2").is_logarithmic
    assert not search.read_range("train.epochs=2..9").is_logarithmic
    found = search.read_range("train.optimiser=adamw,sgd")
    assert (found.low, found.choices) == (None, ("adamw", "sgd"))


def test_a_key_without_values_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"--set train\.epochs is ''; expected values"):
        grid.read_setting("train.epochs=")
