"""What is kept of earlier activations is used if, and only if, it would be computed alike."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import INGEST, ROOT, Workspace, lock
from tlpipe import files, graph
from tlpipe.backbones import activations, frozen
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.forward import PACKAGES
from tlpipe.backbones.weights import Weights

pytestmark = pytest.mark.fault("T17")
IMAGES = 24
LITE0 = describe("efficientnet_lite0")


def photographs(folder: Path) -> None:
    """Two classes of noise: what is cropped or coloured otherwise is another image."""
    from PIL import Image

    for number, label in enumerate(("coarse", "fine")):
        (folder / label).mkdir(parents=True)
        for i in range(IMAGES // 2):
            some = np.random.default_rng(100 * number + i).integers(0, 256, (30, 46 + i, 3), "u1")
            Image.fromarray(some).save(folder / label / f"{i}.png")


def ingest(workspace: Workspace) -> str:
    """Run the stage as a process of its own, which imports the code that PYTHONPATH names."""
    workspace.run("tlpipe", "upgrade")
    return workspace.run("tlpipe", *INGEST).stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A workspace in which 'ingest' and 'embed' have run, with the frozen part in the cache."""
    path = tmp_path_factory.mktemp("made")
    (path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    workspace = Workspace(path, cache_env)
    (path / graph.LOCK).write_text(lock())
    shutil.copy(ROOT / graph.FILE, path)
    shutil.copytree(ROOT / ".tlpipe", path / ".tlpipe")
    photographs(path / "photos")
    workspace.set_source("photos")
    workspace.use_small_network()
    workspace.configure("embed", freeze="layer2", views=1)
    workspace.ingest()
    workspace.embed()
    return workspace


@dataclass
class Case:
    """A copy of that workspace, with code and packages of its own."""

    workspace: Workspace
    before: dict[str, bytes]

    def change(self, file: str, old: str, new: str) -> None:
        """Change one place of the code that runs."""
        code = self.workspace.path / "code" / "tlpipe"
        if not code.exists():
            shutil.copytree(ROOT / "tlpipe", code)
        self.workspace.replace(f"code/tlpipe/{file}", old, new)

    def pretend(self, package: str, version: str) -> None:
        """Let another version of a package seem installed."""
        folder = self.workspace.path / "code" / f"{package}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")

    def embed(self) -> int:
        """Run 'embed'; return of how many images the rows were taken over."""
        self.workspace.run("tlpipe", "upgrade")
        said = self.workspace.run("tlpipe", "embed").stderr
        found = re.search(rf"(\d+) of {IMAGES} images are known already", said)
        return int(found[1]) if found else 0

    @property
    def kept(self) -> Path:
        return self.workspace.path / "artifacts/embed" / ".activations"

    @property
    def written(self) -> Path:
        return self.workspace.path / "artifacts/embed" / "activations"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def case(made: Workspace, tmp_path: Path) -> Case:
    path = tmp_path / "copy"
    shutil.copytree(made.path, path)
    env = {**made.env, "PYTHONPATH": f"{path / 'code'}:{ROOT}"}
    return Case(Workspace(path, env), contents(path / "artifacts/embed" / "activations"))


def boundary(folder: Path) -> np.ndarray:
    found = activations.load(folder).boundary
    assert found is not None
    return found[:].astype(np.float32)


@pytest.mark.slow
def test_a_comment_a_docstring_or_code_beside_changes_nothing(case: Case) -> None:
    for file, old, new in (
        ("backbones/forward.py", "    rows = [row for", "    # Which ones.\n    rows = [row for"),
        ("backbones/augment.py", "ITU-R BT.601", "as ever"),
        ("backbones/stages.py", '    """Cut after every', '    """Cut, cut, after every'),
        ("data/images.py", '"""Read the header only;', '"""Read the header alone;'),
        ("files.py", "def write_bytes(", "_CACHE = 1\n\n\ndef write_bytes("),
    ):
        case.change(file, old, new)
    assert " 0 decoded" in ingest(case.workspace)
    assert case.embed() == IMAGES
    assert contents(case.written) == case.before


@pytest.mark.slow
def test_a_changed_line_of_the_forward_pass_changes_every_row(case: Case) -> None:
    before = boundary(case.written)
    case.change(
        "backbones/forward.py", "(forward, plain, backbone)", "(forward, 255 - plain, backbone)"
    )
    assert case.embed() == 0
    after = boundary(case.written)
    assert (np.abs(after[:, 0] - before[:, 0]).max((1, 2, 3)) > 0.01).all()
    assert (after[:, 1] == before[:, 1]).all()


@pytest.mark.slow
def test_a_changed_line_of_the_augmentation_changes_every_view(case: Case) -> None:
    before = boundary(case.written)
    case.change("backbones/augment.py", "images.mean((2, 3))", "images.amax((2, 3))")
    assert case.embed() == 0
    after = boundary(case.written)
    assert (after[:, 0] == before[:, 0]).all()
    assert (np.abs(after[:, 1] - before[:, 1]).max((1, 2, 3)) > 0.003).all()


@pytest.mark.slow
def test_a_changed_line_of_the_decoding_changes_pixels_and_activations(case: Case) -> None:
    before = boundary(case.written)
    case.change("data/images.py", "offset = round((resized - side) / 2)", "offset = 0")
    said = ingest(case.workspace)
    assert f"{IMAGES} decoded" in said
    assert case.embed() == 0
    assert (np.abs(boundary(case.written) - before).max((1, 2, 3, 4)) > 0.01).all()


@pytest.mark.slow
def test_another_onnxruntime_is_another_computation(case: Case) -> None:
    case.pretend("onnxruntime", "99.0")
    assert case.embed() == 0
    # The numbers are the same, since it is the same library; the origin says by which they are.
    after = contents(case.written)
    differ = [name for name in case.before if case.before[name] != after[name]]
    assert differ == ["index.json"]
    assert activations.load(case.written).origin.packages["onnxruntime"] == "99.0"
    assert case.embed() == IMAGES


@pytest.mark.parametrize("package", frozen.PACKAGES)
def test_another_version_of_what_exports_is_another_graph(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = frozen.graph_key(LITE0, Weights(None, ""))
    (tmp_path / f"{package}-99.0.dist-info").mkdir()
    metadata = tmp_path / f"{package}-99.0.dist-info" / "METADATA"
    metadata.write_text(f"Name: {package}\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert frozen.graph_key(LITE0, Weights(None, "")) != before
    assert set(frozen.PACKAGES) < set(PACKAGES)


@pytest.mark.slow
def test_another_pillow_decodes_and_computes_anew(case: Case) -> None:
    case.pretend("pillow", "99.0")
    assert case.embed() == IMAGES  # the pixels are still those of the old one
    assert f"{IMAGES} decoded" in ingest(case.workspace)
    assert case.embed() == 0
    assert "pillow 99.0" in activations.load(case.written).origin.decoder


@pytest.mark.parametrize(
    "update",
    [
        {"augmentation": Augmentation(colour_jitter=0.3)},
        {"views": 2},
        {"boundary": "layer1"},
        {"threads": 99},
        {"weights_sha256": "0" * 64},
        {"graph": "0" * 16},
        {"code": "0" * 16},
        {"decoder": "Pillow 1.0"},
        {"packages": {"onnxruntime": "1.0"}},
        {"provider": "torch, NVIDIA H100, CUDA 13.2, cuDNN 91400, bfloat16"},
    ],
)
def test_what_another_computation_has_left_is_not_used(
    case: Case, update: dict[str, object]
) -> None:
    origin = activations.load(case.written).origin
    for same in ({}, {"data_sha256": "0" * 64}, {"data_version": "other"}, {"freeze": 7}):
        assert activations.load_kept(case.kept, origin.model_copy(update=same)) is not None
    assert getattr(origin, next(iter(update))) != next(iter(update.values()))
    assert activations.load_kept(case.kept, origin.model_copy(update=update)) is None


def cut_off(path: Path) -> bytes:
    return path.read_bytes()[:-100]


def one_bit(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.parametrize("damage", [cut_off, one_bit, None])
@pytest.mark.parametrize("part", ["features", "boundary", "keys.npy"])
def test_damaged_rows_are_told(
    case: Case, part: str, damage: Callable[[Path], bytes] | None
) -> None:
    origin = activations.load(case.written).origin
    harm(case, part, damage)
    found = activations.load_kept(case.kept, origin)
    if part == "keys.npy":
        assert found is None
    else:
        assert found is not None
        count = files.read_json(case.kept / "index.json")[part]["chunks"][0][1]
        assert found[1].tolist() == [False] * count + [True] * (IMAGES - count)


@pytest.mark.slow
def test_damaged_rows_are_computed_anew(case: Case) -> None:
    harm(case, "boundary", one_bit)
    assert case.embed() < IMAGES
    assert contents(case.written) == case.before
    assert contents(case.kept) == case.before
    assert case.embed() == IMAGES


def harm(case: Case, part: str, damage: Callable[[Path], bytes] | None) -> None:
    path = case.kept / part
    if path.is_dir():
        path /= files.read_json(case.kept / "index.json")[part]["chunks"][0][0]
    data = damage(path) if damage else None
    path.unlink()  # it is a link to the output, which is not to change
    if data is not None:
        path.write_bytes(data)


@pytest.mark.fault("F01")
def test_a_second_embed_is_an_error_and_takes_nothing_away(case: Case) -> None:
    with files.locked(case.written.with_name(".embed.lock"), "an embedding"):
        said = case.workspace.embed(code=10)
    place = "artifacts/embed"
    assert re.search(
        rf"an embedding runs in {place} already, as process \d+; expected one at", said
    )
    assert contents(case.written) == contents(case.kept) == case.before


def test_the_digest_is_of_the_content_not_of_the_images(case: Case, tmp_path: Path) -> None:
    before = activations.load(case.written)
    digests = []
    for number, change in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = activations.Writer(folder, before.origin, width=96, boundary=None, known=None)
        for key, row in zip(before.keys, before.features, strict=True):
            writer.append(int(key).to_bytes(8), row + np.float16(change), 0)
        writer.finish()
        digests.append(activations.digest(folder))
    assert digests[0] == digests[1] != digests[2]
