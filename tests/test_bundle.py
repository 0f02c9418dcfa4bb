"""Bundles signed with a key pair and checked, by the command line, with OpenSSF's model-signing."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from tests.conftest import Workspace
from tlpipe import bundle
from tlpipe import bundle as bundles
from tlpipe.bundle import has_external_data
from tlpipe.errors import ArtifactError, ParamsError


@pytest.fixture
def copied(artifacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts / "export" / "bundle", tmp_path / "bundle"))


def test_a_bundle_reads_back_whole(copied: Path) -> None:
    bundle = bundles.load(copied)
    assert bundle.labels == tuple("0123456789")
    assert bundle.preprocessing.crop_px == 224
    assert bundle.provenance["origin"]["threads"] == 2
    assert len(bundle.digest) == 64


def test_a_precision_that_is_not_there_is_named(copied: Path) -> None:
    bundle = bundles.load(copied)
    assert bundle.graph("fp32") == bundle.model
    there = [name for name in ("fp32", "fp16", "int8") if name in bundle.graphs]
    for name in ("bf16", "any-size"):
        with pytest.raises(
            ParamsError,
            match=rf"has no graph of the precision {name}; it has {', '.join(there)}. Name one",
        ):
            bundle.graph(name)


def test_a_flipped_bit_anywhere_is_an_error(copied: Path) -> None:
    source = random.Random(0)
    for name in ("model.onnx", "labels.json", "preprocessing.json", "provenance.json"):
        path = copied / name
        for _ in range(5):
            content = bytearray(path.read_bytes())
            position = source.randrange(len(content))
            content[position] ^= 1 << source.randrange(8)
            intact, _ = path.read_bytes(), path.write_bytes(content)
            with pytest.raises(ArtifactError, match=rf"{name} has the sha256 .* was altered"):
                bundles.load(copied)
            path.write_bytes(intact)


@pytest.mark.fault("R08")
def test_permuted_labels_are_errors(copied: Path) -> None:
    labels = json.loads((copied / "labels.json").read_text())
    (copied / "labels.json").write_text(json.dumps(labels[::-1], indent=2) + "\n")
    with pytest.raises(ArtifactError, match=r"labels.json has the sha256"):
        bundles.load(copied)


def test_a_missing_or_extra_file_is_an_error(copied: Path, tmp_path: Path) -> None:
    (copied / "extra.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"holds .*extra.bin.*; expected labels.json"):
        bundles.load(copied)
    (copied / "extra.bin").unlink()
    (copied / "labels.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds model.any-size.onnx, .*; expected labels.json"):
        bundles.load(copied)
    with pytest.raises(ArtifactError, match=r"is no bundle: SHA256SUMS cannot be read"):
        bundles.load(tmp_path / "nowhere")


def wanting(location: str, place: str) -> bytes:
    """Return a graph one of whose tensors lies in another file."""
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "weights")
    set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [3])
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, [3])
    add = helper.make_node("Add", ["images", "weights"], ["total"])
    if place == "initializer":
        graph = helper.make_graph([add], "g", [images], [total], [tensor])
    elif place == "constant":
        constant = helper.make_node("Constant", [], ["weights"], value=tensor)
        graph = helper.make_graph([constant, add], "g", [images], [total])
    else:  # in a branch
        inner = helper.make_graph([add], "inner", [], [total], [tensor])
        yes = numpy_helper.from_array(np.array(True), "yes")
        branch = helper.make_node("If", ["yes"], ["total"], then_branch=inner, else_branch=inner)
        graph = helper.make_graph([branch], "g", [images], [total], [yes])
    model: bytes = helper.make_model(graph).SerializeToString()
    return model


@pytest.mark.fault("R07")
@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_weights_in_another_file_are_errors_though_every_hash_is_right(
    copied: Path, tmp_path: Path, place: str
) -> None:
    old = bundles.load(copied)
    kept = {name: path.read_bytes() for name, path in old.graphs.items()}

    def seal(graph: bytes) -> None:
        bundles.save(
            copied,
            graphs={**kept, "fp16": graph},
            labels=old.labels,
            preprocessing=old.preprocessing,
            provenance=old.provenance,
        )

    (tmp_path / "secret").write_bytes(bytes(12))
    for location in ("../secret", str(tmp_path / "secret"), "linked"):
        seal(wanting(location, place))
        with pytest.raises(ArtifactError, match=r"model.fp16.onnx wants weights from other files"):
            bundles.load(copied)
    seal(kept["fp32"])
    assert set(bundles.load(copied).graphs) == {*kept, "fp16"}


@pytest.mark.fault("R07")
def test_graphs_in_graphs_are_followed_to_any_depth(tmp_path: Path) -> None:
    """Each branch holds a graph with one more; the innermost has a tensor in another file."""

    def message(number: int, content: bytes) -> bytes:
        size, coded = len(content), b""
        while size >= 0x80:
            coded, size = coded + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + coded + bytes([size]) + content

    for location in (b"", message(13, b"secret")):
        graph = message(5, message(8, b"weights") + location)
        for _ in range(2000):
            graph = message(1, message(5, message(6, graph)))
        path = tmp_path / "deep.onnx"
        path.write_bytes(message(7, graph))
        assert has_external_data(path) == bool(location)


@pytest.mark.fault("R07")
def test_a_link_beside_the_graph_is_an_error(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(12))
    seal = (copied / "SHA256SUMS").read_text()
    for link in (Path.symlink_to, Path.hardlink_to):
        link(copied / "linked", tmp_path / "secret")
        for line in ("", f"{hashlib.sha256(bytes(12)).hexdigest()}  linked\n"):
            (copied / "SHA256SUMS").write_text(seal + line)
            with pytest.raises(ArtifactError, match=r"holds .*linked.*; expected labels.json"):
                bundles.load(copied)
        (copied / "linked").unlink()


def test_what_is_no_graph_is_an_error(copied: Path) -> None:
    whole = (copied / "model.onnx").read_bytes()
    # The last one is the tag of the graph, with a bit more than others look at.
    hidden = b"\xba\x80\x80\x80\x10" + bytes(1)
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 20, b"GIF89a", hidden):
        path = copied / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"ends in the middle|empty file|unknown kind|than 32 bits"
        ):
            has_external_data(path)


@pytest.fixture
def signed(artifacts: Path, empty: Workspace) -> Workspace:
    """A folder with a bundle, two key pairs, and the bundle's signature by the first."""
    shutil.copytree(artifacts / "export/bundle", empty.path / "bundle")
    for name in ("ours", "theirs"):
        empty.make_keys(name)
    empty.call("sign", "bundle", "--key", "ours.pem")
    return empty


def error_of(workspace: Workspace, *options: str) -> str:
    result = workspace.call("verify", "bundle", *options, code=6)
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.fault("R06")
def test_a_signature_says_who_made_it(signed: Workspace) -> None:
    said = signed.call("verify", "bundle", "--key", "ours.pub").stdout
    digest = bundle.load(signed.path / "bundle").digest
    assert f"bundle is intact: {digest}" in said
    assert "signed by the owner of ours.pub" in said
    assert "is not of bundle by the owner of theirs.pub" in error_of(signed, "--key", "theirs.pub")
    (signed.path / "bundle/more.txt").write_text("x")
    assert "is not of bundle by the owner of ours.pub" in error_of(signed, "--key", "ours.pub")
    (signed.path / "bundle/more.txt").unlink()
    (signed.path / "bundle.sig").unlink()
    assert "bundle is not signed: bundle.sig does not exist" in error_of(
        signed, "--key", "ours.pub"
    )


@pytest.mark.fault("R06")
def test_a_bundle_that_was_sealed_anew_is_not_the_signed_one(signed: Workspace) -> None:
    """Hashes alone do not say who wrote them."""
    old = bundle.load(signed.path / "bundle")
    bundle.save(
        signed.path / "bundle",
        graphs={name: path.read_bytes() for name, path in old.graphs.items()},
        labels=old.labels[::-1],
        preprocessing=old.preprocessing,
        provenance=old.provenance,
    )
    signed.call("verify", "bundle")
    assert "is not of bundle by the owner" in error_of(signed, "--key", "ours.pub")


def test_keys_that_are_none_are_named(signed: Workspace) -> None:
    (signed.path / "no.pem").write_text("no key")
    for command, key, message in (
        ("sign", "no.pem", "no.pem is no private key to sign with"),
        ("verify", "no.pem", "no.pem is no public key"),
        ("sign", "gone.pem", "the private key gone.pem does not exist"),
        ("verify", "gone.pem", "the public key gone.pem does not exist"),
    ):
        error = signed.call(command, "bundle", "--key", key, code=3).stderr
        assert message in error
        assert len(error.splitlines()) == 1
    assert (signed.path / "bundle.sig").exists()


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_a_thousand_refusals(tmp_path: Path, artifacts: Path) -> None:
    """Anywhere in the bundle, also in the hashes themselves; nothing is opened before."""
    folder = tmp_path / "bundle"
    shutil.copytree(artifacts / "export/bundle", folder)
    for name in ("model.any-size.onnx", "model.int8.onnx"):  # as good as the first, and slow
        (folder / name).unlink(missing_ok=True)
        sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "SHA256SUMS").write_text("".join(line for line in sums if name not in line))
    bundle.load(folder)
    source, errors = random.Random(0), 0
    paths = sorted(folder.iterdir())
    for number in range(1000):
        path = paths[number % len(paths)]
        position = source.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(position)
            (intact,) = file.read(1)
            file.seek(position)
            file.write(bytes([intact ^ 1 << source.randrange(8)]))
            file.flush()
            try:
                bundle.load(folder)
            except ArtifactError:
                errors += 1
            file.seek(position)
            file.write(bytes([intact]))
    assert errors == 1000
    bundle.load(folder)
