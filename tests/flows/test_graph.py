"""Stages run by DVC in process groups of their own: real repositories, no Prefect."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.repo import Repo

from tests.conftest import PATIENCE_S, Workspace, processes_in, wait_until
from tlpipe import graph

# Each of two waits until the other is there, which it never is when one runs after the other.
MEET = "touch {0}.begun; until test -e {1}.begun; do sleep 0.1; done; cat a.txt > {0}.txt"
SLEEP = f"sleep {PATIENCE_S}"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A DVC repository: a, then b and c side by side, then d."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "params.yaml").write_text("a: 1\n")
    stages = {
        "d": {"cmd": "cat b.txt c.txt > d.txt", "deps": ["b.txt", "c.txt"], "outs": ["d.txt"]},
        "a": {"cmd": "echo a > a.txt", "params": ["a"], "outs": ["a.txt"]},
        "b": {"cmd": MEET.format("b", "c"), "deps": ["a.txt"], "outs": ["b.txt"]},
        "c": {
            "cmd": MEET.format("c", "b"),
            "deps": ["a.txt"],
            "outs": [{"c.txt": {"cache": True}}],
        },
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


def test_stages_of_every_form_wait_for_what_they_read(repository: Workspace) -> None:
    """Of a user: in a loop, in another folder, by a parameter, through another file."""
    inner = repository.path / "inner"
    inner.mkdir()
    (repository.path / "params.yaml").write_text("a: 1\nread: a.txt\n")
    content = yaml.safe_load((repository.path / "dvc.yaml").read_text())
    content["stages"] |= {
        "loop": {"foreach": ["b", "c"], "do": {"cmd": "true", "deps": ["${item}.txt"]}},
        "away": {"cmd": "true", "wdir": "inner", "deps": ["../d.txt"]},
        "named": {"cmd": "true", "deps": ["${read}"]},
        "last": {"cmd": "true", "deps": ["inner/e.txt"]},
    }
    (repository.path / "dvc.yaml").write_text(yaml.safe_dump(content))
    other = {"e": {"cmd": "true", "deps": ["../a.txt"], "outs": ["e.txt"]}}
    (inner / "dvc.yaml").write_text(yaml.safe_dump({"stages": other}))
    upstream = {stage.name: stage.upstream for stage in graph.read(repository.path)}
    assert {name: found for name, found in upstream.items() if name not in "abcd"} == {
        "loop@b": ("b",),
        "loop@c": ("c",),
        "away": ("d",),
        "named": ("a",),
        "last": ("a",),
    }


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


def sleeping(repository: Workspace) -> list[int]:
    return processes_in(repository.path, "sleep")


def test_stages_that_need_one_another_s_presence_run_side_by_side(repository: Workspace) -> None:
    runner = graph.Runner(repository.path, timeout_s=PATIENCE_S)
    runner.reproduce("a", lambda _: None)
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda stage: runner.reproduce(stage, lambda _: None), "bc")
        assert list(outcomes) == [graph.Outcome.COMPLETED] * 2


# It ignores SIGTERM and has a child of its own, as a stage with loader workers would.
STUBBORN = f"trap '' TERM; {SLEEP} & {SLEEP}"


def test_a_timeout_ends_the_whole_process_group(
    repository: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far it has come by then; the next test begins from a known point."""
    monkeypatch.setattr(graph, "GRACE_S", 1.0)
    change(repository, a=STUBBORN)
    runner = graph.Runner(repository.path, timeout_s=3)
    with pytest.raises(graph.StageError, match="a took longer than 3 s and was ended"):
        runner.reproduce("a", lambda _: None)
    assert not sleeping(repository)
    change(repository, a="echo a > a.txt")
    runner = graph.Runner(repository.path, timeout_s=PATIENCE_S)
    assert runner.reproduce("a", lambda _: None) is graph.Outcome.COMPLETED


def test_closing_ends_what_runs_and_starts_nothing(
    repository: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "GRACE_S", 1.0)
    change(repository, a=STUBBORN)
    runner = graph.Runner(repository.path, timeout_s=PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(runner.reproduce, "a", lambda _: None)
        wait_until(lambda: len(sleeping(repository)) == 2)
        runner.close()
        with pytest.raises(graph.StageError, match=r"^a was ended with the flow$"):
            running.result(PATIENCE_S)
    assert not sleeping(repository)
    with pytest.raises(graph.StageError, match="was not started"):
        runner.reproduce("b", lambda _: None)


# It has something to save when it is asked to end, as training has.
SAVING = (
    "import pathlib, signal, sys, time\n"
    "def save(*_):\n"
    "    time.sleep(1)\n"
    "    pathlib.Path('saved.txt').touch()\n"
    "    sys.exit(1)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "pathlib.Path('begun.txt').touch()\n"
    f"time.sleep({PATIENCE_S})\n"
)


@pytest.mark.xfail(
    strict=True, reason="issue 19: the group is killed as soon as dvc, its leader, has ended"
)
def test_a_stage_that_is_ended_has_time_to_save(repository: Workspace) -> None:
    (repository.path / "saving.py").write_text(SAVING)
    change(repository, a=f"{shlex.quote(sys.executable)} saving.py")
    runner = graph.Runner(repository.path, timeout_s=PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(runner.reproduce, "a", lambda _: None)
        wait_until((repository.path / "begun.txt").exists)
        runner.close()
        assert isinstance(running.exception(PATIENCE_S), graph.StageError)
    assert (repository.path / "saved.txt").exists()


@pytest.mark.fault("O03")
def test_one_flow_at_a_time_also_while_an_orphan_runs(repository: Workspace) -> None:
    with (
        graph.exclusive(repository.path),
        pytest.raises(graph.BusyError, match=rf"another flow works in .*: process {os.getpid()}\."),
        graph.exclusive(repository.path),
    ):
        pass
    # A flow that is killed leaves its stage behind, which keeps the lock until it ends.
    program = (
        "import sys, pathlib\nfrom tlpipe import graph\nroot = pathlib.Path(sys.argv[1])\n"
        "with graph.exclusive(root) as lock:\n"
        f"    runner = graph.Runner(root, timeout_s={PATIENCE_S}, inherit=(lock,))\n"
        "    runner.reproduce('a', print)\n"
    )
    change(repository, a=f"{SLEEP}; echo a > a.txt")
    flow = subprocess.Popen(
        [sys.executable, "-c", program, str(repository.path)], stdout=subprocess.DEVNULL
    )
    wait_until(lambda: sleeping(repository), process=flow)
    flow.kill()
    flow.wait()
    with pytest.raises(graph.BusyError), graph.exclusive(repository.path):
        pass
    for pid in sleeping(repository):
        psutil.Process(pid).send_signal(signal.SIGKILL)

    def is_free() -> bool:
        try:
            with graph.exclusive(repository.path):
                return True
        except graph.BusyError:
            return False

    wait_until(is_free)


@pytest.mark.fault("E23")
def test_a_flow_below_a_repository_makes_none_of_its_own(repository: Workspace) -> None:
    inner = repository.path / "inner"
    inner.mkdir()
    shutil.copy(repository.path / "dvc.yaml", inner)
    with graph.exclusive(inner), graph.exclusive(repository.path):
        assert Repo.find_root(str(inner)) == str(repository.path)


def test_a_folder_without_a_pipeline_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), graph.exclusive(tmp_path):
        graph.read(tmp_path)
    assert list(tmp_path.iterdir()) == []
