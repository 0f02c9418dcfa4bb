"""What reading data costs: ``python benchmarks/ingest.py [--photos FOLDER] [--many 10000 100000]``.

Times are CPU seconds, user + system of the process and its children; the peer and tlpipe take turns
on the same files in the same run. The many images of the last rows are crops of the photographs.
"""

import argparse
import contextlib
import hashlib
import io
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe.data import duplicates, pixels
from tlpipe.data.images import Sampling, crop_middle, read_square, read_upright, square
from tlpipe.errors import ImageError

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = Sampling(short_side_px=256, interpolation="bicubic")
ROUNDS = 5
# The stage without the command line, which would reject pixels that no backbone was trained on.
STAGE = """
import logging
from pathlib import Path
from tlpipe import params
from tlpipe.data import ingest
logging.basicConfig(level=logging.INFO, format="%(message)s")
names = ("manifest", "rejects", "duplicates", "pixels", "data_report")
outputs = {name: Path(name) for name in names}
section = ingest.Params(**params.read_yaml(Path("params.yaml"))["ingest"])
ingest.run(**outputs, data_version="", params=section)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def cpu_seconds() -> float:
    """Return what this process and its ended children have used so far."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def in_turns(*tasks: Callable[[], object]) -> list[float]:
    """Run the tasks one after the other, several times; return each one's median CPU seconds."""
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(ROUNDS):
        for task, spent in zip(tasks, times, strict=True):
            start = cpu_seconds()
            task()
            spent.append(cpu_seconds() - start)
    return [statistics.median(spent) for spent in times]


def plain(data: bytes) -> np.ndarray:
    """Decode, resize and crop with Pillow, as torchvision's evaluation transforms do."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    side = SAMPLING.short_side_px
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, upper = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(image.crop((left, upper, left + side, upper + side)))


def encoded(image: Image.Image) -> bytes:
    """Return a JPEG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def photographs(folder: Path) -> list[bytes]:
    """Return the folder's JPEGs, or those photographs that scikit-image carries."""
    if folder.is_dir():
        return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [encoded(Image.fromarray(getattr(data, name)())) for name in names]


def resized(photos: Sequence[bytes], size: tuple[int, int], count: int) -> list[bytes]:
    """Return photographs of exactly this size, enlarged or cut where they have another one."""
    found = []
    for data in photos:
        image = Image.open(io.BytesIO(data))
        if image.size == size:
            found.append(data)
        elif image.width > image.height:
            found.append(encoded(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)))
        if len(found) == count:
            break
    return found


def decoding(table: Table, photos: Sequence[bytes]) -> None:
    """Compare one image's way from bytes to pixels."""
    for size, count, goal in (((4000, 3000), 8, 5.0), ((500, 375), 120, 1.1)):
        files = resized(photos, size, count)

        def by_pillow(files: Sequence[bytes] = files) -> object:
            return [plain(data) for data in files]

        def by_tlpipe(files: Sequence[bytes] = files) -> object:
            return [read_square(data, SAMPLING) for data in files]

        peer, ours = in_turns(by_pillow, by_tlpipe)
        row(table, f"{size[0]} x {size[1]} JPEG to pixels, ms", peer, ours, len(files), goal)
    worst = max(
        int(np.abs(plain(data).astype(int) - read_square(data, SAMPLING)[0]).max())
        for data in files
    )
    holds = "yes" if worst <= 1 else "NO"
    table.add_row(
        "largest difference of a 500 x 375 pixel, levels", "", str(worst), "", "<= 1", holds
    )


def safety(table: Table, photos: Sequence[bytes]) -> None:
    """Compare the checks with one full decode."""
    files = resized(photos, (500, 375), 240)

    def decode() -> None:
        for data in files:
            Image.open(io.BytesIO(data)).load()

    squares = [square(read_upright(data)[0], SAMPLING) for data in files]

    def check() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for data in files:
                hashlib.sha256(data).hexdigest()
            small = np.stack([pixels.thumbnail(kept) for kept in squares])
            np.save(Path(folder, "thumbnails.npy"), small)
            thumbnails = pixels.Thumbnails(Path(folder), len(files))
            list(duplicates.near_pairs(thumbnails))
            thumbnails.close()

    full, checks = in_turns(decode, check)
    share = checks / full
    holds = "yes" if share <= 0.25 else "NO"
    name = "hash and duplicates, share of one full decode"
    table.add_row(
        name, per(full, len(files)), per(checks, len(files)), f"{share:.2f}", "<= 0.25", holds
    )


def broken(table: Table, folder: Path) -> None:
    """Read files that are broken on purpose; none may take long."""
    slowest, count = 0.0, 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            start = cpu_seconds()
            with contextlib.suppress(ImageError):
                read_square(data, SAMPLING)
            slowest, count = max(slowest, cpu_seconds() - start), count + 1
    holds = "yes" if slowest <= 2 else "NO"
    table.add_row(f"slowest of {count:,} broken files, s", "", f"{slowest:.3f}", "", "<= 2", holds)


def epoch(table: Table, photos: Sequence[bytes], folder: Path) -> None:
    """Compare reading one epoch of batches."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    files = resized(photos, (500, 375), 240)
    for number, data in enumerate(files):
        target = folder / "epoch" / "ab"[number % 2] / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    writer = pixels.Writer(folder, SAMPLING)
    for number, data in enumerate(files):
        kept = square(read_upright(data)[0], SAMPLING)
        writer.append(number.to_bytes(8), np.asarray(kept), pixels.thumbnail(kept))
    writer.close()
    writer.finish(decoder="", data_sha256="", data_version="")
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    images = datasets.ImageFolder(folder / "epoch", transforms.Compose(steps))
    array = pixels.load(folder).array

    def peer() -> None:
        for _ in DataLoader(images, batch_size=32, shuffle=True, num_workers=2):
            pass

    def ours() -> None:
        order = np.random.default_rng(0).permutation(len(array))
        for start in range(0, len(array), 32):
            batch = crop_middle(array[np.sort(order[start : start + 32])], 224)
            torch.from_numpy(np.ascontiguousarray(batch))

    theirs, mine = in_turns(peer, ours)
    row(table, "one epoch of batches, ms an image", theirs, mine, len(files), 20.0)


def crop(job: tuple[bytes, Path, int, tuple[int, int] | None]) -> None:
    """Write one random part of a photograph, in its own size or in the given one."""
    data, path, seed, size = job
    chance = random.Random(seed)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width = chance.randint(image.width // 5, image.width // 2)
    height = chance.randint(image.height // 5, image.height // 2)
    left, upper = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
    image = image.crop((left, upper, left + width, upper + height))
    path.write_bytes(encoded(image.resize(size) if size else image))


def generate(
    photos: Sequence[bytes],
    folder: Path,
    start: int,
    stop: int,
    size: tuple[int, int] | None = None,
) -> None:
    """Write crops of the photographs into class folders."""
    for label in "0123":
        (folder / label).mkdir(parents=True, exist_ok=True)
    jobs = [
        (photos[n % len(photos)], folder / str(n % len(photos) % 4) / f"{n:06d}.jpg", n, size)
        for n in range(start, stop)
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(crop, jobs, chunksize=200))


def ingest(workspace: Path, source: Path, side: int) -> tuple[float, float]:
    """Run the stage; return its CPU seconds and its peak memory in MB."""
    params = (ROOT / "params.yaml").read_text()
    resizing = f"short_side_px: {side}\n  interpolation: bicubic\n"
    params = params.replace("source: data/digits.yaml ", f"{resizing}  source: {source} ")
    workspace.mkdir(exist_ok=True)
    (workspace / "params.yaml").write_text(params)
    command = [sys.executable, "-c", STAGE]
    start = cpu_seconds()
    # The operating system's figure for a child would begin at what this process holds.
    peak = subprocess.run(command, cwd=workspace, check=True, stdout=subprocess.PIPE).stdout
    return cpu_seconds() - start, int(peak) / 1000


def again(
    table: Table, photos: Sequence[bytes], folder: Path, count: int, size: tuple[int, int]
) -> None:
    """Compare reading anew with reading what was added."""
    generate(photos, folder / "source", 0, count, size)
    time.sleep(3)  # files of this very moment are read again
    first, _ = ingest(folder / "workspace", folder / "source", 256)
    generate(photos, folder / "source", count, count + count // 100, size)
    second, _ = ingest(folder / "workspace", folder / "source", 256)
    share = second / first
    holds = "yes" if share <= 0.05 else "NO"
    name = f"{count:,} JPEGs of {size[0]} x {size[1]}, then 1 % more: CPU s"
    table.add_row(name, f"{first:.1f}", f"{second:.1f}", f"{share:.3f}", "<= 0.05", holds)


def scale(table: Table, photos: Sequence[bytes], folder: Path, counts: Sequence[int]) -> None:
    """Compare small with large sets; stored small, so that a disk can hold them."""
    costs = []
    done = 0
    for count in counts:
        generate(photos, folder / "many", done, count, (500, 375))
        done = count
        cpu, peak = ingest(folder / "workspace", folder / "many", 128)
        shutil.rmtree(folder / "workspace")
        costs.append((cpu / count, peak))
        table.add_row(
            f"{count:,} images at 128 px: CPU ms an image", "", per(cpu, count), "", "", ""
        )
        table.add_row(f"{count:,} images at 128 px: peak memory, MB", "", f"{peak:.0f}", "", "", "")
    for name, position in (("CPU an image", 0), ("peak memory", 1)):
        ratio = costs[-1][position] / costs[0][position]
        holds = "yes" if ratio <= 1.1 else "NO"
        what = f"{name}, {counts[-1]:,} images against {counts[0]:,}"
        table.add_row(what, "", "", f"{ratio:.2f}", "<= 1.10", holds)


def per(seconds: float, count: int) -> str:
    """Return milliseconds an image."""
    return f"{1000 * seconds / count:.3f}"


def row(table: Table, what: str, peer: float, ours: float, count: int, goal: float) -> None:
    """Add one comparison."""
    ratio = peer / ours
    holds = "yes" if ratio >= goal else "NO"
    table.add_row(what, per(peer, count), per(ours, count), f"{ratio:.2f}", f">= {goal:g}", holds)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    hymenoptera = ROOT.parent / "shared" / "data" / "hymenoptera"
    parser.add_argument("--photos", type=Path, default=hymenoptera, help="folder of JPEGs")
    bad = ROOT.parent / "shared" / "data" / "badimages"
    parser.add_argument("--broken", type=Path, default=bad, help="folder of broken images")
    parser.add_argument("--many", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--scratch", type=Path, help="where the many images lie meanwhile")
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    table = Table("what", "peer", "tlpipe", "ratio", "goal", "holds")
    decoding(table, photos)
    safety(table, photos)
    if arguments.broken.is_dir():
        broken(table, arguments.broken)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        epoch(table, photos, Path(scratch))
    small = [data for data in photos if max(Image.open(io.BytesIO(data)).size) <= 640]
    if arguments.many:
        for size, share in (((500, 375), 1.0), ((2000, 1500), 0.3)):
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                again(table, small, Path(scratch), int(arguments.many[0] * share), size)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            scale(table, small, Path(scratch), arguments.many)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
