"""What the pipeline costs beside its work: ``python benchmarks/overhead.py [--photos 2500]``.

In projects of ``tlpipe init``: a first registered model of the built-in digits, cold, then with
nothing to do, under Prefect, and stage by stage. Then photographs and small crops, with the frozen
part exported, against a script of ten lines that takes the same network's features and fits
scikit-learn's logistic regression; in turns, best of ``--rounds``. CPU seconds are user + system of
all processes; peak memory is the largest single process. Seconds are of this machine, whose speed
the last line gives.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peers
from costs import Cost, measure, total
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe import graph
from tlpipe.data.manifest import evenly

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
# One picture out of each half of their images.
PHOTOS = ("trash", "rsscn", "hymenoptera/train")
SIZE_PX = (500, 375)
CROPS, CROPS_PX = 424, (80, 80)
CROP_PX = 224  # what the network takes
TABLE = Table("what", "measured", "at most", "holds")


def row(what: str, value: float, unit: str, bound: float) -> None:
    """Add a line to the table."""
    holds = "yes" if value <= bound else "NO"
    TABLE.add_row(what, f"{value:.2f} {unit}", f"{bound:g} {unit}", holds)


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


def write_images(folder: Path, count: int, size_px: tuple[int, int]) -> Path:
    """Write so many images of real photographs' halves, a folder a class; return the folder."""
    found = [path for name in PHOTOS for path in sorted((DATA / name).glob("*/*"))]
    halves = [(path, half) for path in found for half in (0, 1)]
    if len(halves) < count:
        raise SystemExit(f"{DATA} has {len(halves)} halves of photographs; expected {count}")
    for number in evenly(range(len(halves)), count):
        path, half = halves[number]
        with Image.open(path) as photo:
            image = photo.convert("RGB")
        width, height = image.size
        if width >= height:
            box = (half * width // 2, 0, (1 + half) * width // 2, height)
        else:
            box = (0, half * height // 2, width, (1 + half) * height // 2)
        target = folder / path.parent.name / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size_px, box=box).save(target, quality=90)
    return folder


def project(folder: Path, env: dict[str, str], *options: str) -> Cost:
    """Make a project, and return what that costs."""
    return measure(["tlpipe", "init", str(folder), *options], folder.parent, env)


def digits(scratch: Path, env: dict[str, str]) -> None:
    """Measure a first model of the built-in set, and what follows where nothing has changed."""
    home = scratch / "digits"
    first = total([project(home, env), measure(["tlpipe", "run"], home, env)])
    row("init and a first model of the digits, nothing cached, CPU", first.cpu_s, "s", 60)
    idle = measure(["tlpipe", "run"], home, env)
    row("tlpipe run with nothing to do, wall", idle.wall_s, "s", 3)
    with prefect_server(env) as client:
        flow = measure(["tlpipe", "flow"], home, client)
    row("the Prefect flow with nothing to do, server up, wall", flow.wall_s, "s", 12)
    usage = measure(["tlpipe", "--help"], home, env)
    row("tlpipe --help, CPU", usage.cpu_s, "s", 0.3)
    params = home / "params.yaml"
    good = params.read_text()
    params.write_text(good.replace("seed: 0", "sede: 0"))
    error = measure(["tlpipe", "split"], home, env, code=3)
    params.write_text(good)
    row("an error in params.yaml, CPU", error.cpu_s, "s", 0.6)
    row("peak memory of any stage", first.peak_mb / 1000, "GB", 1.5)
    lines = len((home / "dvc.yaml").read_text().splitlines())
    row("dvc.yaml", lines, "lines", 150)
    for name in graph.STAGES:
        cost = measure(["tlpipe", name], home, env)
        TABLE.add_row(f"  {name} alone, CPU", f"{cost.cpu_s:.2f} s", "", "")


def against_script(what: str, images: Path, env: dict[str, str], rounds: int) -> tuple[Cost, Cost]:
    """Return what a registered model costs at best and what the script does, in turns."""
    (network,) = Path(env["XDG_CACHE_HOME"], "tlpipe", "frozen").glob("*.onnx")
    ours, script = [], []
    for number in range(rounds):
        home = images.parent / f"{images.name}-{number}"
        project(home, env, "--source", str(images))
        ours.append(measure(["tlpipe", "run"], home, env))
        command = peers.features_and_regression(network, images, CROP_PX)
        script.append(measure(command, images.parent, env))
    mine, bare = (min(costs, key=lambda cost: cost.cpu_s) for costs in (ours, script))
    row(f"{what}: CPU over that of the script", mine.cpu_s / bare.cpu_s, "x", 2)
    return mine, bare


def yardstick() -> str:
    """Say how fast this machine is now: CPU seconds of a loop of ten million steps in Python."""
    loop = [sys.executable, "-c", "total = 0\nfor number in range(10**7): total += number"]
    seconds = min(measure(loop, ROOT).cpu_s for _ in range(3))
    return f"ten million steps of a loop in Python: {seconds:.2f} CPU s"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--photos", type=int, default=2500, help="how many; 0 for none")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_"))},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "PREFECT_HOME": str(scratch / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        console = Console()
        console.print(yardstick())
        digits(scratch, env)
        if given.photos:
            crops = write_images(scratch / "crops", CROPS, CROPS_PX)
            mine, _ = against_script(f"{CROPS} crops", crops, env, given.rounds)
            row(f"{CROPS} crops to a registered model, CPU", mine.cpu_s, "s", 50)
            photos = write_images(scratch / "photos", given.photos, SIZE_PX)
            mine, _ = against_script(f"{given.photos:,} photographs", photos, env, given.rounds)
            row(f"{given.photos:,} photographs to a registered model, wall", mine.wall_s, "s", 75)
        console.print(TABLE)
        console.print(yardstick())


if __name__ == "__main__":
    main()
