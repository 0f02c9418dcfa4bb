"""How long work takes, and how far it is where nobody watches a terminal."""

import itertools
import logging

import pytest

from tlpipe import progress


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7380, "2 h 3 min"),
    ],
)
def test_a_duration_is_said_in_words(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def test_a_log_file_gets_a_line_each_half_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An item takes ten seconds: three of them give a line."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr("tlpipe.progress.time.monotonic", lambda: next(seconds))
    with caplog.at_level(logging.INFO, logger="tlpipe"):
        assert list(progress.track("abcdefg", total=7, description="photos")) == [*"abcdefg"]
    assert [record.getMessage() for record in caplog.records] == [
        "photos: 3 of 7, 0.1 a second, 40 s left",
        "photos: 6 of 7, 0.1 a second, 10 s left",
    ]
