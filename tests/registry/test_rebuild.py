"""What ``rebuild`` runs, and of whom."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import Workspace
from tests.test_versioning import commit
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.data.split import Params, assign
from tlpipe.export import bundle as bundles

pytestmark = pytest.mark.slow


def repository(path: Path, env: dict[str, str], command: str) -> tuple[Workspace, str]:
    """Make a DVC repository whose stage ``export`` is a command; return its commit as well."""
    path.mkdir(parents=True)
    stages = {"stages": {"export": {"cmd": command, "outs": ["bundle"]}}}
    (path / "dvc.yaml").write_text(yaml.safe_dump(stages))
    made = Workspace(path, env)
    made.run("git", "init", "-q")
    made.run("dvc", "init", "-q")
    commit(made, "all")
    return made, made.run("git", "rev-parse", "HEAD").stdout.strip()


def registered(workspace: Workspace, **tags: str) -> None:
    """Make a registry of a version with tags that somebody has set."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")
    client.create_registered_model("digits")
    named = {f"tlpipe.{name}": value for name, value in {"bundle": "0" * 64, **tags}.items()}
    client.create_model_version("digits", source="s3://bucket/0", tags=named)


@pytest.mark.fault("R13")
def test_the_repository_that_a_tag_names_is_not_run(
    empty: Workspace, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    trace = tmp_path / "was run"
    evil, commit = repository(tmp_path / "evil", cache_env, f"touch '{trace}' && mkdir bundle")
    registered(empty, git_commit=commit, git_remote=str(evil.path))
    said = empty.run("tlpipe", "rebuild", "digits@1", "--yes", code=None)
    assert not trace.exists()
    assert said.returncode == 8
    assert "--repository" in said.stderr


@pytest.mark.fault("R13")
@pytest.mark.parametrize("how", ["absolute", "upwards", "link"])
def test_a_folder_outside_of_the_repository_is_not_run(
    empty: Workspace, tmp_path: Path, cache_env: dict[str, str], how: str
) -> None:
    """The tag leads out of the clone, which lies in a temporary folder; or a link in it does."""
    trace = tmp_path / "was run"
    own, made_at = repository(tmp_path / "own", cache_env, "mkdir bundle")
    evil, _ = repository(tmp_path / "evil", cache_env, f"touch '{trace}' && mkdir bundle")
    upwards = "../" * 20 + str(evil.path).lstrip("/")
    if how == "link":
        (own.path / "inner").symlink_to(evil.path)
        own.run("git", "add", "inner")
        commit(own, "link")
        made_at = own.run("git", "rev-parse", "HEAD").stdout.strip()
    folder = {"absolute": str(evil.path), "upwards": upwards, "link": "inner"}[how]
    registered(empty, git_commit=made_at, git_folder=folder)
    said = empty.run(
        "tlpipe", "rebuild", "digits@1", "--repository", str(own.path), "--yes", code=None
    )
    assert not trace.exists()
    assert said.returncode == 8
    assert "folder" in said.stderr


@pytest.mark.fault("R13")
def test_nothing_runs_that_nobody_confirmed(
    empty: Workspace, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    trace = tmp_path / "was run"
    own, made_at = repository(tmp_path / "own", cache_env, f"touch '{trace}' && mkdir bundle")
    registered(empty, git_commit=made_at)
    command = ("tlpipe", "rebuild", "digits@1", "--repository", str(own.path))
    said = empty.run(*command, code=8).stderr
    assert not trace.exists()
    assert f"was not rebuilt: that runs the code of {own.path}, commit {made_at[:7]}" in said
    assert "all. Look at it, then confirm with --yes." in said
    empty.run(*command, "--yes", code=None)
    assert trace.exists()


@pytest.mark.fault("R13")
@pytest.mark.parametrize("is_given", [True, False])
def test_code_of_the_clone_sees_no_keys(
    empty: Workspace, tmp_path: Path, cache_env: dict[str, str], is_given: bool
) -> None:
    """They serve the pull, if that was asked for, and are gone when the clone's code runs."""
    seen = tmp_path / "seen"
    own, _ = repository(tmp_path / "own", cache_env, f"cp .dvc/config.local '{seen}'; mkdir bundle")
    (own.path / "photos").write_text("data")
    own.run("dvc", "add", "-q", "photos")
    own.run("dvc", "remote", "add", "-q", "-d", "store", "https://nobody.invalid/")
    commit(own, "data")
    store = tmp_path / "store"
    own.run("dvc", "remote", "add", "-q", "--local", "--force", "store", str(store))
    own.run("dvc", "remote", "add", "-q", "--local", "other", "https://user:secret@nobody.invalid")
    own.run("dvc", "push", "-q")
    registered(own, git_commit=own.run("git", "rev-parse", "HEAD").stdout.strip())
    options = ("--yes", "--with-credentials") if is_given else ("--yes",)
    said = own.run("tlpipe", "rebuild", "digits@1", *options, code=None).stderr
    assert seen.exists() == is_given
    if is_given:
        assert "secret" not in seen.read_text()
    else:
        assert "--with-credentials lets it use this project's .dvc/config.local" in said


def textures(workspace: Workspace, count: int) -> None:
    """Fill data/photos up to so many images of each of two kinds, the same in every run."""
    for number, label in enumerate(("coarse", "fine")):
        folder = workspace.path / "data" / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng(100 * number + i).integers(0, 256, (40, 40, 3), "u1")
            grain = 2 - number
            Image.fromarray(noise.repeat(grain, 0).repeat(grain, 1)).save(folder / f"{i}.png")


@pytest.mark.fault("L01")
def test_a_version_of_a_grown_data_set_is_rebuilt(workspace: Workspace, tmp_path: Path) -> None:
    """Of three images each split got one, whatever their hashes say; each stays where it was."""
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    workspace.set_source("data/photos")
    for count, stage in ((3, "split"), (12, "export")):
        textures(workspace, count)
        workspace.run("dvc", "add", "data/photos")
        commit(workspace, f"{count} images of each class")
        workspace.run("dvc", "repro", stage)
        commit(workspace, "what was made of them")
    workspace.run("dvc", "push", "data/photos.dvc")
    bundle = bundles.load(workspace.path / "artifacts/export/bundle")
    registered(workspace, bundle=bundle.digest, git_commit=bundle.provenance["git_commit"])
    said = workspace.run("tlpipe", "rebuild", "digits@1", "--yes", code=None)
    assert said.returncode == 0, said.stderr
    assert f"came out with the same bytes: {bundle.digest}" in said.stdout


def grown(workspace: Workspace, count: int, copied: int) -> None:
    """Add images of each kind, near copies of some old ones, and a third, small kind."""
    textures(workspace, count)
    for label in ("coarse", "fine"):
        folder = workspace.path / "data" / "photos" / label
        for number in range(copied):
            with Image.open(folder / f"{number}.png") as image:
                brighter = image.point(lambda value: min(value + 3 * copied, 255))
            brighter.save(folder / f"{number} brighter by {copied}.png")
    folder = workspace.path / "data" / "photos" / "striped"
    folder.mkdir(exist_ok=True)
    for number in range(count // 4):
        rows = np.random.default_rng(1000 + number).integers(0, 256, (40, 1, 3), "u1")
        Image.fromarray(rows.repeat(40, 1)).save(folder / f"{number}.png")


@pytest.mark.fault("L01")
def test_every_version_of_a_growing_data_set_is_rebuilt(
    workspace: Workspace, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    """Also those whose commit has an older splits.csv, or none: the run keeps its split table."""
    as_user = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    workspace.set_source("data/photos", short_side_px=168, interpolation="bilinear")
    text = (workspace.path / "params.yaml").read_text()
    for key in ("  short_side_px: 256\n", "  interpolation: bicubic\n"):
        assert key in text
        text = text.replace(key, "")
    (workspace.path / "params.yaml").write_text(text)
    workspace.configure("embed", backbone="timm/test_resnet", weights="none")
    digests = []
    for version, (count, copied) in enumerate(((12, 0), (20, 4), (40, 8)), start=1):
        grown(workspace, count, copied)
        workspace.run("dvc", "add", "data/photos")
        workspace.run("git", "add", "data", "params.yaml", ".dvc/config")
        workspace.run(*as_user, "commit", "-qm", f"data {version}")
        said = workspace.run("dvc", "repro")
        bundle = bundles.load(workspace.path / "artifacts/export/bundle")
        head = workspace.run("git", "rev-parse", "HEAD").stdout.strip()
        assert bundle.provenance["git_commit"] == head, said.stderr
        digests.append(bundle.digest)
        entries = list(load_manifest(workspace.path / "artifacts/ingest/manifest.csv"))
        table = load_split(workspace.path / "artifacts/split/split.csv")
        drawn_anew = assign(entries, Params()).splits
        assert ([row.split for row in table] == drawn_anew) is (version == 1)
        if version == 1:  # the rows of later versions are never committed
            workspace.run("git", "add", "splits.csv", "dvc.lock")
            workspace.run(*as_user, "commit", "-qm", "splits")
    workspace.run("dvc", "push", "--all-commits", "data/photos.dvc")
    registry = {"MLFLOW_TRACKING_URI": f"sqlite:///{workspace.path / 'mlflow.db'}"}
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Workspace(tmp_path / "elsewhere", cache_env | registry)
    for version, digest in enumerate(digests, start=1):
        said = elsewhere.run(
            *(
                "tlpipe",
                "rebuild",
                f"digits@{version}",
                "--yes",
                "--repository",
                str(workspace.path),
            ),
            code=None,
        )
        assert said.returncode == 0, said.stderr
        assert f"came out with the same bytes: {digest}" in said.stdout
        assert "the run's split table is taken" in said.stderr
