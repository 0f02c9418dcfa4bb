"""What commands cost, by the operating system's own accounting."""

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Times in seconds, of a process and all that it started; the largest one's peak memory.

    ``said`` is what the command printed last.
    """

    cpu_s: float
    wall_s: float
    peak_mb: float
    said: str


def measure(
    command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, *, code: int = 0
) -> Cost:
    """Run a command that ends with ``code``; ``env`` is its whole environment, or None for ours."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - started
        if process.returncode != code:
            errors.seek(0)
            ended = f"{shlex.join(command)} ended with {process.returncode}, not {code}"
            raise SystemExit(f"{ended}:\n{errors.read()}")
        output.seek(0)
        lines = output.read().splitlines() or [""]
    return Cost(usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1.024e-3, lines[-1])


def total(costs: Sequence[Cost]) -> Cost:
    """Add times up; memory is the largest."""
    return Cost(
        sum(cost.cpu_s for cost in costs),
        sum(cost.wall_s for cost in costs),
        max(cost.peak_mb for cost in costs),
        costs[-1].said,
    )
