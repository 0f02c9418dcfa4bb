import errno
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tlpipe import files
from tlpipe.errors import ArtifactError, TrainingError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    files.write_json(target, {"old": 1})
    with pytest.raises(ValueError, match="disk"), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise ValueError("disk full")
    assert files.read_json(target) == {"old": 1}
    assert names(tmp_path) == ["report.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with files.replacing_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ValueError, match="disk"), files.replacing_folder(target) as folder:
        (folder / "a").write_text("new")
        raise ValueError("disk full")
    assert (target / "a").read_text() == "old"
    with files.replacing_folder(target) as folder:
        (folder / "b").write_text("new")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["bundle"]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """The inode and content of each file at the time when it is flushed to disk; no folders."""
    found: list[tuple[int, bytes]] = []
    flush = os.fsync

    def noting(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            content = os.pread(descriptor, 100, 0)
            found.append((os.fstat(descriptor).st_ino, content))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return found


def test_what_is_renamed_into_place_was_flushed_before(
    tmp_path: Path, flushed: list[tuple[int, bytes]]
) -> None:
    target = tmp_path / "deeper" / "still" / "a.txt"
    files.write_bytes(target, b"content")
    assert flushed == [(target.stat().st_ino, b"content")]
    flushed.clear()
    folder = tmp_path / "other" / "still" / "folder"
    with files.replacing_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "new").write_text("new")
        os.link(target, temporary / "linked")  # whoever wrote it has flushed it
    assert flushed == [((folder / "inner" / "new").stat().st_ino, b"new")]


def test_a_lock_names_who_holds_it_and_ends_with_its_block(tmp_path: Path) -> None:
    lock = tmp_path / "runs" / "lock"
    with files.locked(lock, "a training"):
        message = rf"a training runs in {tmp_path / 'runs'} already, as process {os.getpid()}; "
        with pytest.raises(TrainingError, match=message), files.locked(lock, "a training"):
            pass
    with files.locked(lock, "a training"):
        assert lock.read_text() == f"{os.getpid()}\n"


def test_a_file_is_linked_or_else_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    files.link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    files.link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"content"
    assert not (tmp_path / "copied").samefile(source)


def test_digests_and_cache_folders_are_those_of_other_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    expected = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert files.sha256(tmp_path / "a") == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder("x") == tmp_path / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as the XDG specification has it
    assert files.cache_folder("x") == Path.home() / ".cache" / "x"


def test_equal_content_gives_equal_bytes() -> None:
    assert files.json_bytes({"b": 1, "a": "é"}) == files.json_bytes({"a": "é", "b": 1})
    with pytest.raises(ValueError, match="Out of range"):
        files.json_bytes({"a": float("nan")})


@pytest.mark.fault("D18")
def test_any_file_name_survives_a_table(tmp_path: Path) -> None:
    names = ["a b", 'quo"te', "new\nline", "return\rhere", "comma,", "🙂", "x" * 250]
    names.append(os.fsdecode(b"\xff\xfe"))
    table = tmp_path / "t.csv"
    files.write_csv(table, ("path", "n"), [(name, 1) for name in names])
    assert [name for name, _ in files.read_csv(table, ("path", "n"))] == names


def test_what_is_missing_or_of_another_kind_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none.json is missing.*Run 'tlpipe run'"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"half.json cannot be read as JSON"):
        files.read_json(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"holds a list; expected a JSON object"):
        files.read_json(tmp_path / "list.json")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match=r"has the columns \['a', 'b'\]; expected \['a'\]"):
        files.read_csv(tmp_path / "t.csv", ("a",))
    (tmp_path / "half.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ArtifactError, match=r"row 2 of .*half.csv has 1 columns; expected 2"):
        list(files.read_csv(tmp_path / "half.csv", ("a", "b")))


# Kills itself before or after one of the calls that put the new folder into place.
KILLED = """
import os, sys
from pathlib import Path
from tlpipe import files

target, step, is_before = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "before"
steps, rename = iter(range(100)), os.rename

def killing(source, goal, **options):
    is_it = next(steps) == step
    if is_it and is_before:
        os.kill(os.getpid(), 9)
    rename(source, goal, **options)
    if is_it:
        os.kill(os.getpid(), 9)

with files.replacing_folder(target) as folder:
    (folder / "new").write_text("new")
    os.rename = killing
"""


@pytest.mark.fault("F02")
@pytest.mark.parametrize(
    ("step", "when", "stands"),
    [(0, "before", "old"), (0, "after", "new"), (1, "before", "new"), (1, "after", "new")],
)
def test_a_kill_between_the_old_folder_and_the_new_loses_neither(
    tmp_path: Path, step: int, when: str, stands: str
) -> None:
    target = tmp_path / "pixels"
    with files.replacing_folder(target) as folder:
        (folder / "old").write_text("old")
    command = (sys.executable, "-c", KILLED, target, str(step), when)
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert any(name.endswith(".partial") for name in names(tmp_path))
    files.recover_folder(target)
    assert names(target) == [stands]
    assert (target / stands).read_text() == stands
    assert names(tmp_path) == ["pixels"]


@pytest.mark.fault("F02")
def test_half_a_folder_is_never_put_into_place(tmp_path: Path) -> None:
    target = tmp_path / "pixels"
    program = (
        "import os, sys; from pathlib import Path; from tlpipe import files\n"
        "with files.replacing_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run((sys.executable, "-c", program, target))
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    files.recover_folder(target)
    assert names(tmp_path) == []


@pytest.mark.fault("F01")
def test_two_writers_of_one_folder_leave_each_other_s_work_alone(tmp_path: Path) -> None:
    target = tmp_path / "activations"
    with files.replacing_folder(target) as folder:
        (folder / "first").write_text("1")
    with files.replacing_folder(target) as slow:
        (slow / "slow").write_text("2")
        with files.replacing_folder(target) as fast:
            (fast / "fast").write_text("3")
        assert names(target) == ["fast"]
        assert names(slow) == ["slow"]
        files.recover_folder(target)
        assert names(slow) == ["slow"]
    assert names(target) == ["slow"]
    assert names(tmp_path) == ["activations"]


@pytest.mark.fault("F01")
def test_a_folder_that_another_writer_puts_there_at_the_last_moment_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "activations"
    rename, steps = os.rename, iter(range(100))

    def slow(source: Path, goal: Path) -> None:
        if next(steps) == 1:  # the old folder is away, the new one not yet there
            target.mkdir()
            (target / "other").write_text("another writer's")
        rename(source, goal)

    for content in ("old", "new"):
        with files.replacing_folder(target) as folder:
            (folder / content).write_text(content)
            if content == "new":
                monkeypatch.setattr(os, "rename", slow)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["activations"]


@pytest.mark.fault("F01")
def test_two_writers_of_one_file_each_write_their_own(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with files.replacing(target) as slow:
        slow.write_text("slow")
        with files.replacing(target) as fast:
            fast.write_text("fast")
        assert target.read_text() == "fast"
    assert target.read_text() == "slow"
    assert names(tmp_path) == ["report.json"]


OTHER = 12 * "0"


@contextmanager
def on_another_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What begins inside writes as if on another host, whose locks this one cannot see."""
    with monkeypatch.context() as patched:
        patched.setattr(files, "HOST_ID", OTHER)
        patched.setattr(fcntl, "flock", lambda *_: None)
        yield


@pytest.mark.fault("F01")
def test_a_file_that_another_host_writes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    with ExitStack() as writer:
        with on_another_host(monkeypatch):
            slow = writer.enter_context(files.replacing(target))
        slow.write_text("slow")
        files.write_bytes(target, b"fast")
        assert (target.read_text(), slow.read_text()) == ("fast", "slow")
    assert target.read_text() == "slow"
    assert names(tmp_path) == ["report.json"]


@pytest.mark.fault("F01")
def test_a_folder_that_another_host_writes_is_left_alone_by_writers_and_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pixels"
    with ExitStack() as writer:
        with on_another_host(monkeypatch):
            slow = writer.enter_context(files.replacing_folder(target))
        (slow / "slow").write_text("slow")
        files.finish_folder(target)
        assert not target.exists()
        with files.replacing_folder(target) as fast:
            (fast / "fast").write_text("fast")
        files.finish_folder(target)
        assert (names(target), names(slow)) == (["fast"], ["slow"])
    assert names(target) == ["slow"]
    assert names(tmp_path) == ["pixels"]


@pytest.mark.fault("F01")
@pytest.mark.parametrize("is_retry", [False, True])
def test_a_writer_whose_folder_a_reader_puts_into_place_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_retry: bool
) -> None:
    target, steps, rename = tmp_path / "pixels", iter(range(100)), os.rename
    finished: list[bool] = []
    with files.replacing_folder(target) as folder:
        (folder / "old").write_text("old")

    def slow(source: Path, goal: Path) -> None:
        step = next(steps)
        if is_retry and step == 1:  # a second writer is faster
            target.mkdir()
            (target / "second").write_text("second")
        if is_retry and step == 2:  # and a third one moves that away
            rename(target, tmp_path / "moved")
        if step == (2 if is_retry else 1):
            with monkeypatch.context() as patched:
                patched.setattr(os, "rename", rename)
                files.finish_folder(target)
            finished.append((target / "new").exists())
        rename(source, goal)

    with files.replacing_folder(target) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(os, "rename", slow)
    assert finished == [True]
    assert names(target) == ["new"]
    assert names(tmp_path) == (["moved", "pixels"] if is_retry else ["pixels"])


def test_a_writer_whose_work_was_removed_says_so_and_the_old_folder_stands(tmp_path: Path) -> None:
    target = tmp_path / "pixels"
    with files.replacing_folder(target) as folder:
        (folder / "old").write_text("old")
    with (
        pytest.raises(FileNotFoundError, match=r"\.partial/new"),
        files.replacing_folder(target) as folder,
    ):
        shutil.rmtree(folder.parent)
    assert names(target) == ["old"]


@pytest.mark.fault("F02")
@pytest.mark.parametrize("is_this_host", [True, False])
@pytest.mark.parametrize(
    ("step", "when", "stands"), [(0, "before", "old"), (0, "after", "new"), (1, "after", "new")]
)
def test_readers_finish_what_any_host_left_and_only_a_writer_of_that_host_removes_it(
    tmp_path: Path, is_this_host: bool, step: int, when: str, stands: str
) -> None:
    target, host = tmp_path / "pixels", files.HOST_ID if is_this_host else OTHER
    with files.replacing_folder(target) as folder:
        (folder / "old").write_text("old")
    program = f"from tlpipe import files; files.HOST_ID = {host!r}\n{KILLED}"
    command = (sys.executable, "-c", program, target, str(step), when)
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left, *_ = names(tmp_path)
    assert left.startswith(f".pixels.{host}-")
    files.finish_folder(target)
    assert names(target) == [stands]
    assert names(tmp_path) == [left, "pixels"]
    with files.replacing_folder(target) as folder:
        (folder / "next").write_text("next")
    assert names(target) == ["next"]
    assert names(tmp_path) == (["pixels"] if is_this_host else [left, "pixels"])


@pytest.mark.fault("F02")
def test_an_interrupt_between_the_old_folder_and_the_new_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, steps, rename = tmp_path / "pixels", iter(range(100)), os.rename
    with files.replacing_folder(target) as folder:
        (folder / "old").write_text("old")

    def interrupted(source: Path, goal: Path) -> None:
        if next(steps) == 1:
            raise KeyboardInterrupt
        rename(source, goal)

    with pytest.raises(KeyboardInterrupt), files.replacing_folder(target) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(os, "rename", interrupted)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["pixels"]


@pytest.mark.fault("F02")
def test_what_is_being_removed_is_never_put_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pixels"
    left = tmp_path / f".pixels.{files.HOST_ID}-{16 * '0'}.partial"
    for folder in (target, left / "old-0", left / "new"):
        folder.mkdir(parents=True)
    remove = shutil.rmtree
    finished: list[bool] = []

    def slow(folder: Path, ignore_errors: bool) -> None:
        target.rename(tmp_path / "moved")  # another writer is about to replace it
        files.finish_folder(target)
        finished.append(target.exists())
        remove(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)
    files.recover_folder(target)
    assert finished == [False]
    assert names(tmp_path) == ["moved"]


def test_a_host_has_one_id_until_it_starts_again_or_has_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = "from tlpipe import files; print(files.HOST_ID)"
    said = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True)
    assert said.stdout.strip() == files.HOST_ID
    found = {files.HOST_ID}
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "another")
        found.add(files._host_id())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda _: True)
        patched.setattr(Path, "read_text", lambda _: "another boot")
        found.add(files._host_id())
    assert len(found) == 3


def test_what_a_killed_writer_left_is_removed_by_the_next_and_no_neighbour_s(
    tmp_path: Path,
) -> None:
    program = (
        "import os, sys; from pathlib import Path; from tlpipe import files\n"
        "with files.replacing(Path(sys.argv[1])) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("report", "report.json"):
        subprocess.run((sys.executable, "-c", program, tmp_path / name))
    assert len(names(tmp_path)) == 2
    files.write_bytes(tmp_path / "report", b"whole")
    left, written = names(tmp_path)
    assert left.startswith(".report.json.") and written == "report"


def test_what_is_written_has_the_permissions_that_the_user_gives_to_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_bytes(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "made").mkdir()
    with files.replacing_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_an_error_inside_is_never_swallowed(tmp_path: Path) -> None:
    for write in (files.replacing, files.replacing_folder):
        for error in (FileNotFoundError, BlockingIOError, OSError):
            with pytest.raises(error), write(tmp_path / "a"):
                raise error
    assert names(tmp_path) == []
