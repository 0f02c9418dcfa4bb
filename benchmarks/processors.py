"""Whether a bundle answers alike on another processor: ``python benchmarks/processors.py BUNDLE``.

The same graphs run here and under an emulator that has no VNNI, AVX-512 or AMX (``qemu-x86_64 -cpu
Haswell``, package qemu-user), for the same images of noise. int8 that saturates without VNNI shows
as logits that are far apart; rounding shows in the last digits. An image takes the emulator about
ten seconds.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tlpipe import bundle
from tlpipe.bundle import ANY_SIZE

ANSWER = """
import sys
import numpy as np
import onnxruntime
images, logits, graph = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
pictures = np.load(images)
found = [session.run(["logits"], {"images": pictures[i : i + 1]})[0] for i in range(len(pictures))]
np.save(logits, np.concatenate(found))
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--cpu", default="Haswell", help="As 'qemu-x86_64 -cpu help' lists them.")
    given = parser.parse_args()
    shipped = bundle.load(given.bundle)
    side = shipped.preprocessing.crop_px
    coarse = np.random.default_rng(0).integers(0, 256, (given.images, 7, 7, 3), dtype=np.uint8)
    pictures = np.stack([np.kron(one, np.ones((side // 7 + 1,) * 2 + (1,))) for one in coarse])
    table = Table("graph", "spread of logits", f"largest difference on {given.cpu}", "same label")
    with tempfile.TemporaryDirectory() as name:
        images, logits = Path(name, "images.npy"), Path(name, "logits.npy")
        np.save(images, pictures[:, :side, :side].astype(np.uint8))
        for precision, graph in shipped.graphs.items():
            if precision == ANY_SIZE:
                continue
            found = []
            for emulator in ([], ["qemu-x86_64", "-cpu", given.cpu]):
                command = [*emulator, sys.executable, "-c", ANSWER]
                subprocess.run(
                    [*command, str(images), str(logits), str(graph)],
                    check=True,
                    stderr=subprocess.DEVNULL,
                )
                found.append(np.load(logits))
            here, there = found
            same = int((here.argmax(axis=1) == there.argmax(axis=1)).sum())
            numbers = (f"{here.std():.3g}", f"{np.abs(here - there).max():.2g}")
            table.add_row(precision, *numbers, f"{same} of {given.images}")
    Console().print(table)


if __name__ == "__main__":
    main()
