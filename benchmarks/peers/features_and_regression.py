"""The ten lines that many begin with: features of a frozen network, then scikit-learn.

``python features_and_regression.py GRAPH IMAGES CROP``: an ONNX file from (N, CROP, CROP, 3) uint8
to features, and a folder of one folder of images a class. Prints the accuracy on a fifth of them.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression

graph, folder, crop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
paths = sorted(folder.glob("*/*"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
last = session.get_outputs()[-1].name
features = []
for start in range(0, len(paths), 8):
    photos = [Image.open(path).convert("RGB") for path in paths[start : start + 8]]
    fitted = [np.asarray(ImageOps.fit(photo, (crop, crop))) for photo in photos]
    features.append(session.run([last], {"images": np.stack(fitted)})[0])
inputs, labels = np.concatenate(features), np.array([path.parent.name for path in paths])
test = np.random.default_rng(0).random(len(paths)) < 0.2
fitted_model = LogisticRegression(max_iter=1000).fit(inputs[~test], labels[~test])
print(f"{fitted_model.score(inputs[test], labels[test]):.3f}")
