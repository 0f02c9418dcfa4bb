"""A sweep against the same cells as separate cold runs: ``python benchmarks/sweep.py``.

``--freeze``, ``--images``, ``--seeds`` and ``--epochs`` say which cells; the goal is 4 levels x 4
sizes x 3 seeds. A cold run is a project of its own with the cell's parameters: ``tlpipe init`` and
``tlpipe run``; half of them run before the sweep and half after it. The network's exported graph is
in the user's cache for both. CPU seconds are user + system of all processes, Ray's own too.

What Ray costs is the wall time between the ends of two cells beyond what the work itself took.
"""

import argparse
import ctypes
import itertools
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become our children, and are counted


def cpu_of(commands: Sequence[Sequence[str]], folder: Path, env: Mapping[str, str]) -> float:
    """Run commands one after the other; return the CPU seconds of all that they started."""
    return sum(run(command, folder, env)[0] for command in commands)


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[float, str]:
    """Run a command; return the CPU seconds of all that it started, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {folder}:\n{done.stdout}\n{done.stderr}")
    while True:  # daemons that it left, as they end
        try:
            os.wait()
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def make(folder: Path, env: Mapping[str, str]) -> None:
    """Make a project of the built-in digits, committed."""
    run(["tlpipe", "init", folder.name, "--name", "digits"], folder.parent, env)
    run(["git", "add", "."], folder, env)
    who = ("-c", "user.name=b", "-c", "user.email=b@example.invalid")
    run(["git", *who, "commit", "-qm", "new"], folder, env)


def cold(folder: Path, env: Mapping[str, str], cell: tuple[str, str, int], epochs: int) -> float:
    """Return the CPU seconds of one cell as a project of its own."""
    freeze, images, seed = cell
    make(folder, env)
    params = folder / "params.yaml"
    content = yaml.safe_load(params.read_text())
    content["embed"]["freeze"] = int(freeze) if freeze.isdecimal() else freeze
    if images != "all":
        content["split"] |= {"images": int(images)} | ({"images_seed": seed} if seed else {})
    if freeze != "all":
        content["train"] |= {"epochs": epochs, "seed": seed}
    params.write_text(yaml.safe_dump(content, sort_keys=False))
    return run(["tlpipe", "run"], folder, env)[0]


def overheads(said: str) -> tuple[list[float], float]:
    """Return the seconds between two cells' ends beyond the work, and those of Ray's start.

    ``said``: the lines of the flow.
    """
    moment = r"^(\d\d:\d\d:\d\d\.\d+) \| INFO +\| "
    ends = re.findall(rf"{moment}.*?\d+ of \d+, .*; ([\d.]+) s$", said, re.MULTILINE)
    start, ready = (
        re.search(rf"{moment}.*{line}", said, re.MULTILINE)
        for line in ("Creating a local Ray", "Using Ray cluster")
    )
    assert start and ready

    def seconds(text: str) -> datetime:
        return datetime.strptime(text, "%H:%M:%S.%f")

    between = [
        (seconds(later[0]) - seconds(earlier[0])).total_seconds() - float(later[1])
        for earlier, later in itertools.pairwise(ends)
    ]
    return between, (seconds(ready[1]) - seconds(start[1])).total_seconds()


def main() -> None:
    """Measure both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--freeze", default="all,blocks5,blocks3,none")
    parser.add_argument("--images", default="50,100,200,all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    wanted = list(
        itertools.product(given.freeze.split(","), given.images.split(","), range(given.seeds))
    )
    beside = str(Path(sys.executable).parent)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        env = {**os.environ, "PATH": os.pathsep.join([beside, os.environ["PATH"]])}
        env |= {"XDG_CACHE_HOME": str(home / "cache"), "DVC_SITE_CACHE_DIR": str(home / "dvc")}
        make(home / "first", env)
        run(["dvc", "repro", "embed"], home / "first", env)  # exports the graph
        spent = []
        half = len(wanted) // 2
        for number, cell in enumerate(wanted[:half]):
            spent.append(cold(home / f"cold-{number}", env, cell, given.epochs))
        make(home / "swept", env)
        words = ["--freeze", given.freeze, "--images", given.images, "--seeds", str(given.seeds)]
        options = [*words, "--set", f"train.epochs={given.epochs}"]
        began = time.perf_counter()
        swept, said = run(["tlpipe", "sweep", *options], home / "swept", env)
        wall = time.perf_counter() - began
        for number, cell in enumerate(wanted[half:], start=half):
            spent.append(cold(home / f"cold-{number}", env, cell, given.epochs))
    between, start = overheads(said)
    table = Table("what", "measured", "at most", "holds")
    share, each = swept / sum(spent), sum(between) / max(len(between), 1)
    rows = [
        (f"{len(wanted)} cold runs, CPU", f"{sum(spent):.0f} s", "", ""),
        ("the sweep, CPU", f"{swept:.0f} s", "", ""),
        (
            "the sweep over the cold runs",
            f"{share:.3f}",
            "0.125",
            "yes" if share <= 1 / 8 else "NO",
        ),
        ("Ray's overhead a cell, wall", f"{each:.2f} s", "1.5 s", "yes" if each <= 1.5 else "NO"),
        ("Ray's start, wall", f"{start:.1f} s", "", ""),
        ("the sweep, wall", f"{wall:.0f} s", "", ""),
    ]
    for row in rows:
        table.add_row(*row)
    Console(width=82).print(table)
    grid = f"freeze {given.freeze}, images {given.images}, {given.seeds} seeds"
    print(f"{grid}, {given.epochs} epochs, the built-in digits, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
