"""The inferences of ``tlpipe evaluate`` and nothing else: ``bare_evaluation.py PLAN ANSWERS``.

PLAN is JSON: the threads of a session, the files of the stored pixels with their numbers of images,
the crop, and the passes: which model answers for which rows in batches of which size. ANSWERS gets
the logits of the first pass, as ``.npy``. Prints the peak memory of this process in MiB.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime

plan = json.loads(Path(sys.argv[1]).read_text())
places = []  # of each row: the file it is in, mapped, and its number there
for path, count in plan["chunks"]:
    mapped = np.asarray(np.load(path, mmap_mode="r"))
    places += [(mapped, number) for number in range(count)]
edge = (mapped.shape[1] - plan["crop_px"]) // 2
middle = slice(edge, edge + plan["crop_px"])


@cache
def session(model: str) -> onnxruntime.InferenceSession:
    """Return the session of a model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = plan["threads"]
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def logits(model: str, rows: list[int], size: int) -> np.ndarray:
    """Return the logits (N, C) of these rows."""
    found = []
    for start in range(0, len(rows), size):
        batch = [places[row] for row in rows[start : start + size]]
        images = np.stack([mapped[number, middle, middle] for mapped, number in batch])
        found.append(session(model).run(["logits", "probabilities"], {"images": images})[0])
    return np.concatenate(found)


first, *others = plan["passes"]
np.save(sys.argv[2], logits(**first))
for other in others:
    logits(**other)
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
