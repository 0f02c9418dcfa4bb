import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import Workspace, copy_repository
from tests.learning.test_resume import arguments


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    photos: Path, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    """Over BatchNorm and augmentation: each computes half of every batch, joined by gloo."""
    workspace = copy_repository(tmp_path / "copy", cache_env)
    workspace.set_source(photos)
    workspace.configure("embed", freeze="blocks4", views=2)
    workspace.configure("train", epochs=3, batch=6, optimiser="sgd", batch_norm="batch")
    workspace.run("dvc", "repro", "--quiet", "split", "embed")
    _, *alone = arguments(tmp_path / "one")
    workspace.run("tlpipe", *alone)
    _, *together = arguments(tmp_path / "two")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    workspace.run(sys.executable, *torchrun, "-m", "tlpipe", *together)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    moved = 0
    for name, tensor in one.items():
        assert np.abs(tensor - two[name]).max() <= 1e-5 * max(1, np.abs(tensor).max()), name
        moved += "running_mean" in name
    assert moved > 10
    histories = [Workspace(tmp_path / name).rows("history.csv") for name in ("one", "two")]
    for a, b in zip(*histories, strict=True):
        assert float(a["validation_loss"]) == pytest.approx(float(b["validation_loss"]), rel=1e-3)


def test_statistics_over_one_process_are_those_of_torch() -> None:
    """The layer that several processes use, in a group of one."""
    import torch.distributed as dist

    from tlpipe.learning.norms import share_statistics

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).double()
    shared = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).double()
    shared.load_state_dict(plain.state_dict())
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        share_statistics(shared)
        images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
        for _ in range(3):
            results = [network(images) for network in (plain, shared)]
            assert torch.allclose(*results, atol=1e-10)
            weights = torch.linspace(0, 1, results[0].numel(), dtype=torch.float64)
            for network, result in zip((plain, shared), results, strict=True):
                network.zero_grad()
                (result.flatten() * weights).sum().backward()
        assert plain.state_dict().keys() == shared.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert torch.allclose(tensor, shared.state_dict()[name], atol=1e-10), name
        gradients = zip(plain.parameters(), shared.parameters(), strict=True)
        assert all(torch.allclose(a.grad, b.grad, atol=1e-8) for a, b in gradients)
        shared.eval(), plain.eval()
        assert torch.allclose(plain(images), shared(images), atol=1e-10)
    finally:
        dist.destroy_process_group()
