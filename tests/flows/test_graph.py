"""Stages run by DVC in process groups of their own: real repositories, no Prefect."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows import graph
from tests.conftest import Workspace


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A DVC repository: a, then b and c side by side, then d."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "params.yaml").write_text("a: 1\n")
    sleep = "sleep 2 && date +%s.%N > {0}.txt"
    stages = {
        "d": {"cmd": "cat b.txt c.txt > d.txt", "deps": ["b.txt", "c.txt"], "outs": ["d.txt"]},
        "a": {"cmd": "echo a > a.txt", "params": ["a"], "outs": ["a.txt"]},
        "b": {"cmd": sleep.format("b"), "deps": ["a.txt"], "outs": ["b.txt"]},
        "c": {"cmd": sleep.format("c"), "deps": ["a.txt"], "outs": [{"c.txt": {"cache": True}}]},
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    workspace = Workspace(root)
    workspace.run("git", "init", "-q")
    workspace.run("dvc", "init", "-q")
    return workspace


def change(repository: Workspace, **commands: str) -> None:
    content = yaml.safe_load((repository.path / "dvc.yaml").read_text())
    for stage, command in commands.items():
        content["stages"][stage]["cmd"] = command
    (repository.path / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_the_graph_comes_in_an_order_that_can_run(repository: Workspace) -> None:
    stages = graph.read(repository.path)
    assert {stage.name: stage.upstream for stage in stages} == {
        "a": (),
        "b": ("a",),
        "c": ("a",),
        "d": ("b", "c"),
    }
    assert [stage.name for stage in stages][0::3] == ["a", "d"]


def test_dvc_s_own_words_become_outcomes(repository: Workspace) -> None:
    runner = graph.Runner(repository.path, timeout_s=60)
    lines: list[str] = []
    assert runner.reproduce("a", lines.append) is graph.Outcome.COMPLETED
    assert "> echo a > a.txt" in lines
    assert runner.reproduce("a", lines.append) is graph.Outcome.CACHED
    repository.replace("params.yaml", "a: 1", "a: 2")
    assert runner.reproduce("a", lines.append) is graph.Outcome.COMPLETED
    repository.replace("params.yaml", "a: 2", "a: 1")
    assert runner.reproduce("a", lines.append) is graph.Outcome.RESTORED
    assert (repository.path / "a.txt").read_text() == "a\n"


def test_a_failed_stage_says_why_in_one_line(repository: Workspace) -> None:
    runner = graph.Runner(repository.path, timeout_s=60)
    change(repository, a="echo 'tlpipe: no such thing' >&2; exit 4")
    with pytest.raises(graph.StageError, match=r"^a: no such thing$"):
        runner.reproduce("a", lambda _: None)
    change(repository, a="exit 4")
    with pytest.raises(graph.StageError, match=r"^a: failed to reproduce 'a'.*exited with 4"):
        runner.reproduce("a", lambda _: None)


def descendants(marker: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if marker in (process.info["cmdline"] or [])
    ]


# It ignores SIGTERM and has a child of its own, as a stage with loader workers would.
STUBBORN = "trap '' TERM; sleep 4321 & sleep 4321"


def test_a_timeout_ends_the_whole_process_group(
    repository: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "GRACE_S", 1.0)
    change(repository, a=STUBBORN)
    runner = graph.Runner(repository.path, timeout_s=3)
    with pytest.raises(graph.StageError, match="a took longer than 3 s and was ended"):
        runner.reproduce("a", lambda _: None)
    assert not descendants("4321")
    change(repository, a="echo a > a.txt")
    assert runner.reproduce("a", lambda _: None) is graph.Outcome.COMPLETED


def test_closing_ends_what_runs_and_starts_nothing(
    repository: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "GRACE_S", 1.0)
    change(repository, a=STUBBORN)
    runner = graph.Runner(repository.path, timeout_s=60)
    errors: list[Exception] = []

    def reproduce() -> None:
        try:
            runner.reproduce("a", lambda _: None)
        except graph.StageError as error:
            errors.append(error)

    thread = threading.Thread(target=reproduce)
    thread.start()
    deadline = time.monotonic() + 30
    while len(descendants("4321")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    runner.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["a was ended with the flow"]
    assert not descendants("4321")
    with pytest.raises(graph.StageError, match="was not started"):
        runner.reproduce("b", lambda _: None)


@pytest.mark.fault("O03")
def test_one_flow_at_a_time_also_while_an_orphan_runs(repository: Workspace) -> None:
    with (
        graph.exclusive(repository.path),
        pytest.raises(graph.BusyError, match=r"another flow works in .*: process \d+\. One at"),
        graph.exclusive(repository.path),
    ):
        pass
    # A flow that is killed leaves its stage behind, which keeps the lock until it ends.
    program = (
        "import sys, pathlib\nfrom flows import graph\nroot = pathlib.Path(sys.argv[1])\n"
        "with graph.exclusive(root) as lock:\n"
        "    runner = graph.Runner(root, timeout_s=60, inherit=(lock,))\n"
        "    runner.reproduce('a', print)\n"
    )
    change(repository, a="sleep 4322; echo a > a.txt")
    flow = subprocess.Popen(
        [sys.executable, "-c", program, str(repository.path)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not descendants("4322"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    flow.kill()
    flow.wait()
    with pytest.raises(graph.BusyError), graph.exclusive(repository.path):
        pass
    for pid in descendants("4322"):
        psutil.Process(pid).kill()
    while True:
        try:
            with graph.exclusive(repository.path):
                break
        except graph.BusyError:
            assert time.monotonic() < deadline + 30
            time.sleep(0.1)
