"""The loop of PyTorch's transfer learning tutorial, on Lite0: what people write by hand.

``tutorial.py DATA FREEZE EPOCHS [--steps N] [--tuned] [--plain]``: FREEZE is how many of the stages
keep their weights, DATA has the folders train and val. Prints one line of JSON.

Source: https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

import argparse
import ctypes
import json
import resource
import time

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("freeze", type=int)
parser.add_argument("epochs", type=int)
parser.add_argument("--steps", type=int, default=0, help="measure so many steps after two others")
parser.add_argument("--tuned", action="store_true", help="keep freed memory; channels last")
parser.add_argument("--plain", action="store_true", help="no augmentation")
given = parser.parse_args()
if given.tuned:
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
        libc.mallopt(option, value)

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

from tlpipe.backbones.backbone import describe, load_network  # noqa: E402
from tlpipe.backbones.weights import IMAGENET, find  # noqa: E402

torch.set_num_threads(2)
torch.manual_seed(0)
backbone = describe("efficientnet_lite0")
stages = load_network(backbone, find(backbone.name, backbone.pretrained, IMAGENET, None))
for stage in list(stages)[: given.freeze]:
    stage.requires_grad_(False)
normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
middle = [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
varied = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
shown = {"train": middle if given.plain else varied, "val": middle}
images_of = {
    part: datasets.ImageFolder(
        f"{given.data}/{part}", transforms.Compose([*steps, transforms.ToTensor(), normalise])
    )
    for part, steps in shown.items()
}
loaders = {
    part: torch.utils.data.DataLoader(of_part, batch_size=32, shuffle=part == "train")
    for part, of_part in images_of.items()
}
model = nn.Sequential(stages, nn.Linear(1280, len(images_of["train"].classes)))
layout = torch.channels_last if given.tuned else torch.contiguous_format
model = model.to(memory_format=layout)
criterion = nn.CrossEntropyLoss()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
taken, start, images = 0, 0.0, 0
for _ in range(given.epochs):
    for part, loader in loaders.items():
        if given.steps and part == "val":
            continue
        model.train(part == "train")
        hits = 0
        for inputs, labels in loader:
            optimizer.zero_grad()
            with torch.set_grad_enabled(part == "train"):
                logits = model(inputs.to(memory_format=layout))
                loss = criterion(logits, labels)
                if part == "train":
                    loss.backward()
                    optimizer.step()
            hits += int((logits.argmax(1) == labels).sum())
            taken += 1
            if taken == 2:
                start, images = time.process_time(), 0
            images += len(inputs) if taken > 2 else 0
            if given.steps and taken == 2 + given.steps:
                break
        if given.steps and taken >= 2 + given.steps:
            break
    if given.steps and taken >= 2 + given.steps:
        break
    scheduler.step()
print(
    json.dumps(
        {
            "accuracy": hits / len(images_of["val"]),
            "ms_an_image": 1000 * (time.process_time() - start) / max(images, 1),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
