"""Keys of params.yaml that a later version names otherwise, leaves out or gives other defaults."""

import pytest
import yaml

from tlpipe import upgrade
from tlpipe.errors import ParamsError
from tlpipe.upgrade import NewDefault, Removed, Renamed, migrate

TEXT = """\
# How flowers are told apart.
ingest:
  source: data   # mine

train:
  rate: 1e-3   # how fast
  # Long enough:
  epochs: 10
  layers:
    - "last"    # only

# What is good enough.
register:
  gate: {loss: 0.05, min_recall: 0.50}
audit:   # as it is
"""


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        upgrade,
        "CHANGES",
        (
            ("0.2", Renamed("train.rate", "learning_rate")),
            ("0.2", Removed("train.layers", "all that is open is trained")),
            ("0.2", NewDefault("train.seed", 0)),
            ("0.2", NewDefault("train.epochs", 5)),
            ("0.3", Renamed("train.learning_rate", "lr")),
            ("0.3", Renamed("register.gate.loss", "max_accuracy_drop")),
            ("0.3", Removed("register.gate.min_recall", "recall is shown, not judged")),
            ("0.3", NewDefault("register.gate.images", 20)),
            ("0.3", NewDefault("audit.limits", {"low": 1e-4, "high": None})),
            ("0.3", NewDefault("split.by.day", True)),
            ("0.4", NewDefault("split.seed", 0)),
        ),
    )


@pytest.mark.fault("P06")
@pytest.mark.parametrize("text", ["audit:\n  folds: 3\n", "audit: {folds: 3}\n"])
def test_the_only_key_of_a_section_is_taken_out_and_the_section_stays(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    removed = ("0.2", Removed("audit.folds", "they are as many as there are"))
    monkeypatch.setattr(upgrade, "CHANGES", (removed,))
    new, (said,) = migrate(text, "0.1.0", until="0.2")
    assert yaml.safe_load(new) in ({"audit": None}, {"audit": {}})
    assert said.startswith("audit.folds: 3 is taken out")


@pytest.mark.fault("P06")
def test_keys_are_changed_from_version_to_version_and_nothing_else_is(changes: None) -> None:
    text, said = migrate(TEXT, "0.1.0", until="0.3.1")
    assert (
        text
        == """\
# How flowers are told apart.
ingest:
  source: data   # mine

train:
  seed: 0
  lr: 1e-3   # how fast
  # Long enough:
  epochs: 10

# What is good enough.
register:
  gate: {images: 20, max_accuracy_drop: 0.05}
audit:   # as it is
  limits:
    low: 0.0001
    high: null

split:
  by:
    day: true
"""
    )
    assert said == [
        "train.rate is named train.learning_rate (tlpipe 0.2)",
        'train.layers: - "last" is taken out: all that is open is trained (tlpipe 0.2)',
        "train.seed: 0 is written out: it was the default, and is no more (tlpipe 0.2)",
        "train.learning_rate is named train.lr (tlpipe 0.3)",
        "register.gate.loss is named register.gate.max_accuracy_drop (tlpipe 0.3)",
        "register.gate.min_recall: 0.50 is taken out: recall is shown, not judged (tlpipe 0.3)",
        "register.gate.images: 20 is written out: it was the default, and is no more (tlpipe 0.3)",
        "audit.limits: {'low': 0.0001, 'high': None} is written out: it was the default, and is no "
        "more (tlpipe 0.3)",
        "split.by.day: True is written out: it was the default, and is no more (tlpipe 0.3)",
    ]
    assert migrate(text, "0.1.0", until="0.3.1") == (text, [])


def test_a_version_s_own_changes_are_not_made_again(changes: None) -> None:
    text, _ = migrate(TEXT, "0.2.0", until="0.3")
    assert "rate: 1e-3" in text and "layers:" in text and "max_accuracy_drop" in text
    assert migrate(TEXT, "0.1.0", until="0.1.9") == (TEXT, [])


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("a: {b: 1, c: 2, d: 3}\n", "a.b", "a: {c: 2, d: 3}\n"),
        ("a: {b: 1, c: 2, d: 3}\n", "a.c", "a: {b: 1, d: 3}\n"),
        ("a: {b: 1, c: 2, d: 3}\n", "a.d", "a: {b: 1, c: 2}\n"),
        ("a: {b: 1}  # so\n", "a.b", "a: {}  # so\n"),
        ("a:\n  b: |\n    long\n\n  # said of c\n  c: 1", "a.b", "a:\n\n  # said of c\n  c: 1"),
        ("a:\n  b:\n    - {x: [1,\n        2]}\nc: 1\n", "a.b", "a:\nc: 1\n"),
        ("a:\n  b: 1", "a.b", "a:\n"),
    ],
)
def test_a_key_is_taken_out_with_its_value_alone(text: str, key: str, expected: str) -> None:
    assert upgrade._without(text, key) == expected
    assert yaml.safe_load(expected) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a:\n  b: 1.5\n"),
        ("# alone\n", "# alone\n\na:\n  b: 1.5\n"),
        ("a:", "a:\n  b: 1.5\n"),
        ("a: ~  # nothing\nc: 1\n", "a:   # nothing\n  b: 1.5\nc: 1\n"),
        ("a: {}\n", "a: {b: 1.5}\n"),
        ("a:\n    # on c\n    c: 1\n", "a:\n    # on c\n    b: 1.5\n    c: 1\n"),
        ("c: 1", "c: 1\n\na:\n  b: 1.5\n"),
    ],
)
def test_a_key_is_written_into_its_section(text: str, expected: str) -> None:
    new = upgrade._with(text, "a.b", 1.5)
    assert new == expected
    assert yaml.safe_load(new)["a"]["b"] == 1.5


def test_a_key_under_both_names_is_an_error(changes: None) -> None:
    text = "train:\n  rate: 1\n  learning_rate: 2\n"
    with pytest.raises(ParamsError, match=r"train\.rate and train\.learning_rate, which is its"):
        migrate(text, "0.1.0", until="0.2")


def test_what_is_no_yaml_is_an_error(changes: None) -> None:
    with pytest.raises(ParamsError, match=r"is no plain YAML: .* line 1"):
        migrate("train: [", "0.1.0", until="0.2")


@pytest.mark.fault("P07")
@pytest.mark.parametrize(
    "text",
    [
        "train:\n  x: 1\n...\n",  # a section would come after the end
        "{train: {x: 1}}\n",
        "{}\n",
        "train: &same\n  x: 1\nsplit: *same\n",  # two sections, one mapping
        "split: 3\n",
        "ingest: &same {seed: 0}\nsplit:\n  <<: *same\n",  # it is there, by another way
    ],
)
def test_a_layout_that_a_change_would_break_is_an_error(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "CHANGES", (("0.2", NewDefault("split.seed", 1)),))
    with pytest.raises(ParamsError, match=r"cannot be changed .*split\.seed: 1.* by hand"):
        migrate(text, "0.1", until="0.2")
    assert migrate("split: {seed: 3}", "0.1", until="0.2") == ("split: {seed: 3}", [])


def test_a_pre_release_has_the_changes_of_its_release(changes: None) -> None:
    assert migrate(TEXT, "0.1.0", until="0.2.dev1") == migrate(TEXT, "0.1.0", until="0.2")
    assert migrate(TEXT, "0.2.0rc1", until="0.2.0") == (TEXT, [])
