import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, ROOT, Workspace

EXPORT = """
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.frozen import whole_graph
from tlpipe.backbones.weights import IMAGENET, find
backbone = describe("efficientnet_lite0")
print(whole_graph(backbone, find(backbone.name, backbone.pretrained, IMAGENET, None)))
"""


def export(cache: Path, **env: str) -> Path:
    workspace = Workspace(ROOT, {"XDG_CACHE_HOME": str(cache), **env})
    return Path(workspace.run("python", "-c", EXPORT).stdout.strip())


@pytest.mark.slow
def test_exported_twice_the_bytes_are_equal_and_say_nothing_of_the_machine(tmp_path: Path) -> None:
    first = export(tmp_path / "one", PYTHONHASHSEED="1", TZ="Asia/Tokyo")
    second = export(tmp_path / "two", PYTHONHASHSEED="2", LC_ALL="C")
    content = first.read_bytes()
    assert content == second.read_bytes()
    for trace in (b".py", b"site-packages", str(ROOT).encode(), b"stack_trace"):
        assert trace not in content


def test_a_damaged_cache_is_made_anew(tmp_path: Path, main_job: Workspace) -> None:
    cached = export(Path(main_job.env["XDG_CACHE_HOME"]))
    mine = tmp_path / "cache" / "tlpipe" / "frozen" / cached.name
    mine.parent.mkdir(parents=True)
    mine.with_suffix(".sha256").write_bytes(cached.with_suffix(".sha256").read_bytes())
    mine.write_bytes(cached.read_bytes()[:-1000])
    assert export(tmp_path / "cache") == mine
    wanted = hashlib.sha256(cached.read_bytes()).hexdigest()
    assert hashlib.sha256(mine.read_bytes()).hexdigest() == wanted


# Waits for the others before it looks into the cache.
TOGETHER = """
import sys
from pathlib import Path
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.frozen import whole_graph
from tlpipe.backbones.weights import Weights
import torch.onnx, onnxscript
backbone = describe("timm/test_resnet")
print("ready", flush=True)
sys.stdin.readline()
path = whole_graph(backbone, Weights(None, ""))
print(path, path.read_bytes() == whole_graph(backbone, Weights(None, "")).read_bytes())
"""


@pytest.mark.slow
def test_processes_that_export_into_one_cache_leave_one_intact_file(tmp_path: Path) -> None:
    workspace = Workspace(ROOT, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TOGETHER],
            cwd=ROOT,
            env=workspace.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    (printed,) = {out for out, _ in ends}
    name, is_same = printed.split()
    assert is_same == "True"
    folder = tmp_path / "cache" / "tlpipe" / "frozen"
    path = Path(name)
    assert sorted(folder.iterdir()) == [path, path.with_suffix(".sha256")]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_suffix(".sha256").read_text() == sha256
