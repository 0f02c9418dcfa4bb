"""What ``rebuild`` runs, and of whom."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import Workspace
from tests.sources.test_versioning import commit
from tlpipe import bundle as bundles
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.data.split import Params, assign

pytestmark = pytest.mark.slow
Repository = Callable[..., tuple[Workspace, str]]
Registered = Callable[..., None]


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of Git and DVC with nothing in it, to be copied."""
    folder = tmp_path_factory.mktemp("blank")
    Workspace(folder).run("git", "init", "-q")
    Workspace(folder).run("dvc", "init", "-q")
    return folder


@pytest.fixture
def repository(tmp_path: Path, blank: Path, cache_env: dict[str, str]) -> Repository:
    def make(folder: str, command: str, *, top: str = ".") -> tuple[Workspace, str]:
        """Make a DVC repository whose stage ``export`` is a command; return its commit as well.

        ``top``: where the repository lies, from the folder on.
        """
        path = tmp_path / folder
        path.mkdir(parents=True)
        stages = {"stages": {"export": {"cmd": command, "outs": ["bundle"]}}}
        (path / "dvc.yaml").write_text(yaml.safe_dump(stages))
        shutil.copytree(blank, path / top, dirs_exist_ok=True)
        for name in ("params.yaml", "tlpipe.lock.yaml"):  # a project
            (path / name).touch()
        made = Workspace(path, cache_env)
        commit(made, "all")
        return made, head(made)

    return make


def head(workspace: Workspace) -> str:
    return workspace.run("git", "rev-parse", "HEAD").stdout.strip()


@pytest.fixture
def registered(fresh_database: Path) -> Registered:
    def register(workspace: Workspace, *versions: dict[str, str]) -> None:
        """Make a registry of versions with tags that somebody has set."""
        import mlflow

        database = shutil.copy(fresh_database, workspace.path)
        client = mlflow.MlflowClient(f"sqlite:///{database}")
        client.create_registered_model("digits")
        for tags in versions:
            named = {f"tlpipe.{key}": value for key, value in ({"bundle": "0" * 64} | tags).items()}
            client.create_model_version("digits", source="s3://bucket/0", tags=named)

    return register


@pytest.mark.fault("R13")
def test_the_repository_that_a_tag_names_is_not_run(
    empty: Workspace, tmp_path: Path, repository: Repository, registered: Registered
) -> None:
    trace = tmp_path / "was run"
    evil, made_at = repository("evil", f"touch '{trace}' && mkdir bundle")
    registered(empty, {"git_commit": made_at, "git_remote": str(evil.path)})
    said = empty.call("rebuild", "digits@1", "--yes", code=8).stderr
    assert not trace.exists()
    assert "--repository" in said


@pytest.mark.fault("R13")
def test_a_folder_outside_of_the_repository_is_not_run(
    empty: Workspace, tmp_path: Path, repository: Repository, registered: Registered
) -> None:
    """The tag leads out of the clone, which lies in a temporary folder; or a link in it does."""
    trace = tmp_path / "was run"
    own, _ = repository("own", "mkdir bundle")
    evil, _ = repository("evil", f"touch '{trace}' && mkdir bundle")
    (own.path / "inner").symlink_to(evil.path)
    commit(own, "link")
    folders = str(evil.path), "../" * 20 + str(evil.path).lstrip("/"), "inner"
    registered(empty, *({"git_commit": head(own), "git_folder": folder} for folder in folders))
    options = ("--repository", str(own.path), "--yes")
    for number in (1, 2):
        said = empty.call("rebuild", f"digits@{number}", *options, code=8).stderr
        assert "it was made in the folder" in said
    said = empty.run("tlpipe", "rebuild", "digits@3", *options, code=8).stderr
    assert "has no folder 'inner', or it leads out of the repository" in said
    assert not trace.exists()


@pytest.mark.fault("R13")
def test_nothing_runs_that_nobody_confirmed(
    empty: Workspace, tmp_path: Path, repository: Repository, registered: Registered
) -> None:
    trace = tmp_path / "was run"
    own, made_at = repository("own", f"touch '{trace}' && mkdir bundle")
    registered(empty, {"git_commit": made_at})
    command = ("tlpipe", "rebuild", "digits@1", "--repository", str(own.path))
    said = empty.run(*command, code=8).stderr
    assert not trace.exists()
    assert f"was not rebuilt: that runs the code of {own.path}, commit {made_at[:7]}" in said
    assert "all. Look at it, then confirm with --yes." in said
    empty.run(*command, "--yes", code=None)
    assert trace.exists()


@pytest.mark.fault("R13")
@pytest.mark.fault("E23")
@pytest.mark.parametrize(
    ("is_given", "folder"), [(True, "own"), (False, "own"), (True, "repository/inner")]
)
def test_code_of_the_clone_sees_no_keys(
    tmp_path: Path, repository: Repository, registered: Registered, is_given: bool, folder: str
) -> None:
    """They serve the pull, if that was asked for, and are gone when the clone's code runs.

    Also where the project is one of several in a repository, whose ``.dvc`` lies above.
    """
    seen = tmp_path / "seen"
    top = ".." if "/" in folder else "."
    command = f"cp {top}/.dvc/config.local '{seen}'; mkdir bundle"
    own, _ = repository(folder, command, top=top)
    (own.path / "photos").write_text("data")
    own.run("dvc", "add", "-q", "photos")
    config = "[core]\n    remote = store\n['remote \"store\"']\n    url = https://nobody.invalid/\n"
    (own.path / top / ".dvc/config").write_text(config)
    commit(own, "data")
    (own.path / top / ".dvc/config.local").write_text(
        f"['remote \"store\"']\n    url = {tmp_path / 'store'}\n"
        "['remote \"other\"']\n    url = https://user:secret@nobody.invalid\n"
    )
    own.run("dvc", "push", "-q")
    where = folder.partition("/")[2]
    registered(own, {"git_commit": head(own), "git_folder": where})
    options = ("--yes", "--with-credentials") if is_given else ("--yes",)
    said = own.run("tlpipe", "rebuild", "digits@1", *options, code=None).stderr
    assert seen.exists() == is_given
    if is_given:
        assert "secret" not in seen.read_text()
    else:
        assert "--with-credentials lets it use this project's .dvc/config.local" in said


@pytest.mark.parametrize("is_same", [True, False])
def test_a_folder_s_bundle_is_rebuilt_from_the_commit_that_it_names(
    small_job: Workspace, tmp_path: Path, repository: Repository, is_same: bool
) -> None:
    """What the stage of its commit gives lies elsewhere: the same bundle, or another one."""
    given = tmp_path / "given"
    command = f"mkdir -p artifacts/export bundle && cp -r '{given}' artifacts/export/bundle"
    own, commit_id = repository("own", command)
    old = bundles.load(small_job.path / "artifacts/export/bundle")

    def save(folder: Path, **changes: object) -> None:
        bundles.save(
            folder,
            graphs={name: path.read_bytes() for name, path in old.graphs.items()},
            labels=old.labels,
            preprocessing=old.preprocessing,
            provenance={**old.provenance, "git_commit": commit_id, **changes},
        )

    save(own.path / "mine")
    save(given, **({} if is_same else {"l2": 0.5}))
    said = own.run("tlpipe", "rebuild", "mine", "--yes", code=0 if is_same else 6)
    if is_same:
        digest = bundles.digest(own.path / "mine")
        assert f"mine came out with the same bytes: {digest}" in said.stdout
    else:
        assert "mine was rebuilt with the digest" in said.stderr
        assert "provenance.json came out different" in said.stderr


def textures(workspace: Workspace, count: int) -> None:
    """Fill data/photos up to so many images of each of two kinds, the same in every run."""
    for number, label in enumerate(("coarse", "fine")):
        folder = workspace.path / "data" / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng(100 * number + i).integers(0, 256, (40, 40, 3), "u1")
            grain = 2 - number
            Image.fromarray(noise.repeat(grain, 0).repeat(grain, 1)).save(folder / f"{i}.png")


def export(workspace: Workspace) -> None:
    """Make the bundle in this process. DVC's lock is written before: the bundle holds its hash."""
    before = ("ingest", "split", "embed", "train")
    for stage in before:
        workspace.call(stage)
    workspace.run("dvc", "commit", "-q", "-f", *before)
    workspace.call("export")


@pytest.mark.fault("L01")
def test_a_version_of_a_grown_data_set_is_rebuilt(
    workspace: Workspace, tmp_path: Path, registered: Registered
) -> None:
    """Of three images each split got one, whatever their hashes say; each stays where it was."""
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    workspace.set_source("data/photos")
    workspace.use_small_network()
    for count in (3, 12):
        textures(workspace, count)
        workspace.run("dvc", "add", "data/photos")
        commit(workspace, f"{count} images of each class")
        if count == 3:
            workspace.reproduce("split")
        else:
            export(workspace)
        commit(workspace, "what was made of them")
    workspace.run("dvc", "push", "data/photos.dvc")
    bundle = bundles.load(workspace.path / "artifacts/export/bundle")
    made_at = bundle.provenance["git_commit"]
    registered(workspace, {"bundle": bundle.digest, "git_commit": made_at})
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
    """Also those whose commit has an older splits.csv, or none: the run keeps its split table.

    And those that were made where there were other cores: provenance holds the number of threads.
    """
    as_user = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    workspace.set_source("data/photos")
    workspace.use_small_network()
    workspace.configure("embed", threads="auto")
    other_cores = Workspace(workspace.path, {**workspace.env, "TLPIPE_THREADS": "3"})
    digests = []
    for version, (count, copied) in enumerate(((12, 0), (32, 8)), start=1):
        grown(workspace, count, copied)
        workspace.run("dvc", "add", "data/photos")
        workspace.run("git", "add", "data", "params.yaml", ".dvc/config")
        workspace.run(*as_user, "commit", "-qm", f"data {version}")
        export(other_cores)
        for stage in ("audit", "evaluate", "register"):
            other_cores.call(stage)
        bundle = bundles.load(workspace.path / "artifacts/export/bundle")
        assert bundle.provenance["git_commit"] == head(workspace)
        assert bundle.provenance["origin"]["threads"] == 3
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
