"""Begin from a model that was trained here before: its network as a file of pretrained weights."""

from pathlib import Path

from tlpipe import files
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.weights import registered_file
from tlpipe.errors import WeightsError
from tlpipe.training import model as models


def keep_weights(folder: Path, backbone: str) -> str:
    """Put the network of a trained model into the user's cache; return the hash of its file.

    What was frozen in it comes from its own pretrained weights; its head is left out.

    Raises:
        ArtifactError: the model is incomplete.
        WeightsError: it is built on another backbone, or its own weights are not here.
    """
    import hashlib

    from safetensors.torch import save

    model = models.load(folder)
    origin = model.card.origin
    if origin.backbone != backbone:
        raise WeightsError(
            f"the registered model is built on {origin.backbone}; expected {backbone}. Change "
            f"embed.backbone or embed.weights in params.yaml."
        )
    known = describe(backbone)
    network = load_network(known, known.find_weights(origin.weights, origin.weights_sha256))
    import torch

    trained = {name: torch.from_numpy(tensor) for name, tensor in model.stages.items()}
    if unknown := network.load_state_dict(trained, strict=False).unexpected_keys:
        raise WeightsError(
            f"the registered model has tensors that {backbone} has not, such as {unknown[0]}: this "
            f"version of tlpipe cuts it into other stages. Train and register it anew."
        )
    # Behind the name of its stage, a tensor has the name that the backbone's own code gives it.
    tensors = {name.partition(".")[2]: tensor for name, tensor in network.state_dict().items()}
    content = save({name: tensors[name].contiguous() for name in sorted(tensors)})
    digest = hashlib.sha256(content).hexdigest()
    with files.writing_cache(registered_file(digest).parent):
        files.write_bytes(registered_file(digest), content)
    return digest
