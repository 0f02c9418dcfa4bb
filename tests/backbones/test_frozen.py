import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import ROOT, Workspace
from tlpipe.backbones import frozen
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.frozen import whole_graph
from tlpipe.backbones.weights import IMAGENET, Weights, find
from tlpipe.errors import ParityError

EXPORT = """
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.frozen import whole_graph
from tlpipe.backbones.weights import IMAGENET, find
backbone = describe("efficientnet_lite0")
print(whole_graph(backbone, find(backbone.name, backbone.pretrained, IMAGENET, None)))
"""


def test_a_damaged_cache_is_made_anew_with_bytes_that_say_nothing_of_the_machine(
    tmp_path: Path, main_job: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process in other surroundings than those of the main job."""
    monkeypatch.setenv("XDG_CACHE_HOME", main_job.env["XDG_CACHE_HOME"])
    backbone = describe("efficientnet_lite0")
    cached = whole_graph(backbone, find(backbone.name, backbone.pretrained, IMAGENET, None))
    mine = tmp_path / "cache" / "tlpipe" / "frozen" / cached.name
    mine.parent.mkdir(parents=True)
    mine.with_suffix(".sha256").write_bytes(cached.with_suffix(".sha256").read_bytes())
    mine.write_bytes(cached.read_bytes()[:-1000])
    surroundings = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    workspace = Workspace(ROOT, {"XDG_CACHE_HOME": str(tmp_path / "cache"), **surroundings})
    assert workspace.run("python", "-c", EXPORT).stdout.strip() == str(mine)
    content = mine.read_bytes()
    assert content == cached.read_bytes()
    for trace in (b".py", b"site-packages", str(ROOT).encode(), b"stack_trace"):
        assert trace not in content


def test_a_graph_that_computes_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter that errs by a hundredth in one channel of the first layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exported = frozen.export

    def err(*given: Any) -> onnx.ModelProto:
        model = exported(*given)
        first = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == first)
        weight = numpy_helper.to_array(tensor).copy()
        weight[0] *= 1.01
        tensor.CopyFrom(numpy_helper.from_array(weight, first))
        return model

    monkeypatch.setattr(frozen, "export", err)
    with pytest.raises(ParityError, match=r"stage \w+ of timm/test_resnet gives values up to"):
        whole_graph(describe("timm/test_resnet"), Weights(None, ""))
    assert not list((tmp_path / "tlpipe" / "frozen").glob("*"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert whole_graph(describe("timm/test_resnet"), Weights(None, "")).exists()


def export_together(cache: Path, everybody: Any, exported: Any) -> None:
    """Wait for the others, then export; send the path, and whether the cache is used again."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    backbone = describe("timm/test_resnet")
    everybody.wait()
    path = whole_graph(backbone, Weights(None, ""))
    again = whole_graph(backbone, Weights(None, ""))
    exported.put((path, path.read_bytes() == again.read_bytes()))


@pytest.mark.slow
def test_processes_that_export_into_one_cache_leave_one_intact_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "torch.onnx", "onnxscript"])
    arguments = (tmp_path / "cache", context.Barrier(2), context.SimpleQueue())
    processes = [context.Process(target=export_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ((path, is_same),) = {arguments[-1].get() for _ in processes}
    assert is_same
    folder = tmp_path / "cache" / "tlpipe" / "frozen"
    assert sorted(folder.iterdir()) == [path, path.with_suffix(".sha256")]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_suffix(".sha256").read_text() == sha256
