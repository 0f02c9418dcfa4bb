"""Checkpoints that are damaged, foreign or without room, and what is said where memory is short."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tlpipe.errors import TrainingError
from tlpipe.training.checkpoint import Checkpoint, Checkpoints, out_of_memory_explained
from tlpipe.training.recipe import Recipe
from tlpipe.training.tuning import less_memory


def made(number: int) -> Checkpoint:
    return Checkpoint({"number": number}, {"weight": torch.full((100, 100), float(number))})


@pytest.fixture
def filled(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, "digest")
    for number in range(1, 5):
        checkpoints.save(made(number))
    return checkpoints


def own(tmp_path: Path) -> Path:
    (folder,) = tmp_path.glob("*-digest")
    return folder


def newest(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.newest()
    if found is None:
        return None
    assert (found.tensors["weight"] == found.state["number"]).all()
    return int(found.state["number"])


def test_the_last_two_are_kept(filled: Checkpoints, tmp_path: Path) -> None:
    names = [f"{n:06d}{suffix}" for n in (3, 4) for suffix in (".json", ".safetensors")]
    assert sorted(path.name for path in own(tmp_path).iterdir()) == names
    assert newest(filled) == 4


@pytest.mark.fault("T02")
@pytest.mark.parametrize("left", ["000005.safetensors", ".000005.safetensors.1.partial"])
def test_one_that_was_not_finished_does_not_count(
    filled: Checkpoints, tmp_path: Path, left: str
) -> None:
    (own(tmp_path) / left).write_bytes((own(tmp_path) / "000004.safetensors").read_bytes()[:1000])
    assert newest(filled) == 4
    filled.save(made(5))
    assert newest(filled) == 5


@pytest.mark.fault("T05")
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_flipped_bit_is_found_and_the_one_before_is_used(
    filled: Checkpoints, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = own(tmp_path) / f"000004{suffix}"
    content = path.read_bytes()
    for place in range(0, len(content), max(len(content) // 50, 1)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        # A blank may be another blank: what was saved is then still what is read.
        found = newest(filled)
        assert found == 3 or (suffix == ".json" and found == 4), place
    assert "000004.json is damaged" in caplog.text


@pytest.mark.fault("T09")
def test_order_is_that_of_numbers_whatever_the_clock_said(
    filled: Checkpoints, tmp_path: Path
) -> None:
    import os

    for path in own(tmp_path).glob("000004*"):
        os.utime(path, (0, 0))
    assert newest(filled) == 4
    filled.save(made(5))
    assert sorted(path.stem for path in own(tmp_path).glob("*.json")) == ["000004", "000005"]


@pytest.mark.fault("T06")
def test_those_of_another_training_are_said_and_left(
    filled: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Checkpoints(tmp_path, "other")
    assert newest(other) is None
    assert "are of other data, parameters, threads or code; starting from the beg" in caplog.text
    other.save(made(1))
    assert newest(Checkpoints(tmp_path, "digest")) == 4
    other.clear()
    assert newest(Checkpoints(tmp_path, "digest")) == 4
    assert "taken away" not in caplog.text
    filled.clear()
    assert not tmp_path.exists()


@pytest.mark.fault("T06")
def test_of_many_unfinished_trainings_the_first_begun_is_taken_away_and_said(
    filled: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        Checkpoints(tmp_path, f"{number}").save(made(number))
    assert newest(Checkpoints(tmp_path, "digest")) == 4
    Checkpoints(tmp_path, "3").save(made(3))
    assert f"{tmp_path}/000001-digest are taken away: 3 other unfinished" in caplog.text
    assert newest(Checkpoints(tmp_path, "digest")) is None
    assert [newest(Checkpoints(tmp_path, str(number))) for number in range(4)] == [0, 1, 2, 3]


@pytest.mark.fault("T05")
def test_a_disk_that_does_not_answer_is_no_damage(filled: Checkpoints, tmp_path: Path) -> None:
    path = own(tmp_path) / "000004.json"
    path.unlink()
    path.mkdir()  # as EIO or a stale handle: an OSError that is not about the content
    with pytest.raises(TrainingError, match=r"000004\.json cannot be read: Is a directory; exp"):
        filled.newest()
    path.rmdir()
    assert newest(filled) == 3


FULL = """
import resource, sys
from pathlib import Path
from tests.training.test_checkpoint import made
from tlpipe.training.checkpoint import Checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
Checkpoints(Path(sys.argv[1]), "digest").save(made(5))
"""


@pytest.mark.fault("T04")
def test_without_room_the_old_one_stays(filled: Checkpoints, tmp_path: Path) -> None:
    """The system itself refuses to write more than 20 kB; the checkpoint has 40."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "TrainingError" in result.stderr and "cannot be written" in result.stderr
    assert "The one before it is intact" in result.stderr
    assert newest(filled) == 4
    names = [f"{n:06d}{suffix}" for n in (3, 4) for suffix in (".json", ".safetensors")]
    assert sorted(path.name for path in own(tmp_path).iterdir()) == names


@pytest.mark.fault("T08")
@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        (Recipe(), r"Lower train\.batch_size, now 32, or freeze more in embed\.freeze\."),
        (
            Recipe(batch_size=7),
            r"Lower train\.batch_size, now 7, or freeze more in embed\.freeze\.",
        ),
        (Recipe(batch_size=1), r"kept\. Freeze more in embed\.freeze\."),
    ],
)
def test_short_memory_is_explained(recipe: Recipe, advice: str) -> None:
    remedy = less_memory(recipe)
    said = r"^there is not enough memory to train \(.*can't allocate memory.*\); the last check.*"
    with pytest.raises(TrainingError, match=said + advice), out_of_memory_explained(remedy):
        torch.empty(2**50, dtype=torch.uint8)  # a pebibyte
    with pytest.raises(TrainingError, match=advice), out_of_memory_explained(remedy):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(TrainingError, match=advice), out_of_memory_explained(remedy):
        bytearray(2**60)


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        out_of_memory_explained(""),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)
