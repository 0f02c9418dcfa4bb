"""What the tests stand on when another copy of them runs beside."""

import subprocess
import sys

import pytest

from tests.conftest import (
    ROOT,
    Workspace,
    copy_repository,
    free_port,
    processes_in,
    wait_until,
)


def test_no_two_processes_are_given_one_port() -> None:
    first = free_port()
    program = (
        "import sys; from tests.conftest import free_port; "
        "free_port(range(*map(int, sys.argv[1:])))"
    )
    asked = [sys.executable, "-c", program, str(first), str(first + 1)]
    failed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert f"no port of range({first}, {first + 1}) is free" in failed.stderr
    with pytest.raises(AssertionError, match="is free"):
        free_port(range(first, first + 1))


def test_processes_are_told_by_their_folder(empty: Workspace) -> None:
    here = subprocess.Popen(["sleep", "1800"], cwd=empty.path)
    elsewhere = subprocess.Popen(["sleep", "1800"], cwd="/")
    try:
        wait_until(lambda: processes_in(empty.path, "sleep"), process=here)
        assert processes_in(empty.path, "sleep") == [here.pid]
    finally:
        for process in (here, elsewhere):
            process.kill()
            process.wait()


def test_a_command_in_this_process_ends_as_the_command_does(empty: Workspace) -> None:
    empty.replace("params.yaml", "seed: 0", "seed: x")
    apart, here = empty.run("tlpipe", "split", code=3), empty.call("split", code=3)
    assert (apart.stdout, apart.stderr) == (here.stdout, here.stderr)
    assert "split.seed is 'x'" in here.stderr


def test_a_copy_is_a_clean_repository_of_the_same_commit(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = copy_repository(tmp_path_factory.mktemp("other") / "copy", {})
    for copy in (workspace, other):
        assert copy.run("git", "status", "--porcelain").stdout == ""
    heads = [copy.run("git", "rev-parse", "HEAD").stdout for copy in (workspace, other)]
    assert heads[0] == heads[1]
    workspace.replace("params.yaml", "seed: 0", "seed: 1")
    assert other.run("git", "status", "--porcelain").stdout == ""
