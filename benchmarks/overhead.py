"""What the pipeline costs beside its work: ``python benchmarks/overhead.py``.

Runs the main job in a clean clone: cold, with the frozen part exported, with nothing to do, under
DVC, under Prefect and as bare commands, and prints each figure beside its bound. CPU seconds are
user + system of all processes; peak memory is the largest single process.
"""

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from costs import measure, total
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def prefect_server(env: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run a Prefect server; yield the environment of its clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    api = f"http://127.0.0.1:{port}/api"
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{api}/health", timeout=2):
                    break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the Prefect server did not start") from None
                time.sleep(0.2)
        yield {**env, "PREFECT_API_URL": api}
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Measure and print the table."""
    table = Table("what", "measured", "at most", "holds")
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_"))},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "XDG_CACHE_HOME": str(Path(scratch, "cache")),
            "PREFECT_HOME": str(Path(scratch, "prefect")),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

        def row(what: str, value: float, unit: str, bound: float) -> None:
            holds = "yes" if value <= bound else "NO"
            table.add_row(what, f"{value:.2f} {unit}", f"{bound:g} {unit}", holds)

        cold = measure(["dvc", "repro"], clone, env)
        row("cold dvc repro, frozen part not yet exported, CPU", cold.cpu_s, "s", 120)

        digits = clone / "data" / "digits.yaml"
        digits.write_text(digits.read_text().replace("seed: 0", "seed: 1"))
        stages = yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]
        order = ["ingest", "split", "embed", "audit", "train", "export", "evaluate", "register"]
        by_stage = {
            name: measure(["dvc", "repro", "--single-item", name], clone, env) for name in order
        }
        warm = total(list(by_stage.values()))
        row("the same, frozen part exported (other images), CPU", warm.cpu_s, "s", 60)

        idle = measure(["dvc", "repro"], clone, env)
        row("dvc repro with nothing to do, wall", idle.wall_s, "s", 3)
        with prefect_server(env) as client:
            flow = measure([sys.executable, "-P", "flows/pipeline.py"], clone, client)
        row("the Prefect flow with nothing to do, server up, wall", flow.wall_s, "s", 12)

        usage = measure(["tlpipe", "--help"], clone, env)
        row("tlpipe --help, CPU", usage.cpu_s, "s", 0.6)
        params = clone / "params.yaml"
        good = params.read_text()
        params.write_text(good.replace("max_iterations", "max_iteration"))
        split = shlex.split(stages["split"]["cmd"])
        error = measure(split, clone, env, code=3)
        params.write_text(good)
        row("an error in params.yaml, CPU", error.cpu_s, "s", 0.6)
        peak = max(cold.peak_mb, warm.peak_mb) / 1000
        row("peak memory of any stage", peak, "GB", 1.5)

        bare = total([measure(shlex.split(stages[name]["cmd"]), clone, env) for name in order])
    console = Console()
    console.print(table)
    console.print(
        f"DVC against the {len(order)} commands alone: {warm.cpu_s / bare.cpu_s:.2f} times the CPU "
        f"({warm.cpu_s:.1f} s, {bare.cpu_s:.1f} s)"
    )
    for name, cost in by_stage.items():
        console.print(f"  {name:10} {cost.cpu_s:6.1f} s CPU   {cost.peak_mb / 1000:.2f} GB")


if __name__ == "__main__":
    main()
