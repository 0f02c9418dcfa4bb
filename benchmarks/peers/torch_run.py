"""A trained model in torch, as it is called by hand: ``torch_run.py MODEL IMAGES THREADS ANSWERS``.

MODEL is a folder that ``tlpipe train`` wrote. ``--channels-last`` lays tensors out as the CPU's
kernels like it.
"""

import sys
from pathlib import Path

import torch
from answering import Images, Logits, answer

from tlpipe.backbones.backbone import describe
from tlpipe.training import model as models
from tlpipe.training.classifier import full_network

model, images, threads, answers, *options = sys.argv[1:]
torch.set_num_threads(int(threads))
trained = models.load(Path(model))
origin = trained.card.origin
backbone = describe(origin.backbone)
weights = backbone.find_weights(origin.weights, origin.weights_sha256)
layout = torch.channels_last if "--channels-last" in options else torch.contiguous_format
# Without the first module, which normalises pixels as they lie in the file.
network = full_network(backbone, weights, trained)[1:].to(memory_format=layout)
pixels = origin.preprocessing
mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))


def infer(batch: Images) -> Logits:
    """Return the logits (B, C)."""
    with torch.inference_mode():
        inputs = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        logits = network((inputs.float() / 255 - mean) / std)
        torch.softmax(logits, dim=1)
    return logits.numpy()


answer(f"torch {torch.__version__}", infer, Path(images), Path(answers))
