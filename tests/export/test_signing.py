"""Bundles signed with a key pair and checked, by the command line, with OpenSSF's model-signing."""

import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import Workspace
from tlpipe.errors import ArtifactError
from tlpipe.export import bundle as bundles


@pytest.fixture
def signed(artifacts: Path, empty: Workspace) -> Workspace:
    """A folder with a bundle, two key pairs, and the bundle's signature by the first."""
    shutil.copytree(artifacts / "export/bundle", empty.path / "bundle")
    for name in ("ours", "theirs"):
        empty.make_keys(name)
    empty.run("tlpipe", "sign", "bundle", "--key", "ours.pem")
    return empty


def error_of(workspace: Workspace, *options: str) -> str:
    result = workspace.run("tlpipe", "verify", "bundle", *options, code=6)
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.fault("R06")
def test_a_signature_says_who_made_it(signed: Workspace) -> None:
    said = signed.run("tlpipe", "verify", "bundle", "--key", "ours.pub").stdout
    digest = bundles.load(signed.path / "bundle").digest
    assert f"bundle is whole: {digest}" in said
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
    old = bundles.load(signed.path / "bundle")
    bundles.save(
        signed.path / "bundle",
        graphs={name: path.read_bytes() for name, path in old.graphs.items()},
        labels=old.labels[::-1],
        preprocessing=old.preprocessing,
        provenance=old.provenance,
    )
    signed.run("tlpipe", "verify", "bundle")
    assert "is not of bundle by the owner" in error_of(signed, "--key", "ours.pub")


def test_keys_that_are_none_are_named(signed: Workspace) -> None:
    (signed.path / "no.pem").write_text("no key")
    for command, key, message in (
        ("sign", "no.pem", "no.pem is no private key to sign with"),
        ("verify", "no.pem", "no.pem is no public key"),
        ("sign", "gone.pem", "the private key gone.pem does not exist"),
        ("verify", "gone.pem", "the public key gone.pem does not exist"),
    ):
        error = signed.run("tlpipe", command, "bundle", "--key", key, code=3).stderr
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
    bundles.load(folder)
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
                bundles.load(folder)
            except ArtifactError:
                errors += 1
            file.seek(position)
            file.write(bytes([intact]))
    assert errors == 1000
    bundles.load(folder)
