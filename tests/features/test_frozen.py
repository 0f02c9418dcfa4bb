import hashlib
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workspace

EXPORT = """
from tlpipe.features.backbone import describe
from tlpipe.features.frozen import whole_graph
from tlpipe.features.weights import IMAGENET, find
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
