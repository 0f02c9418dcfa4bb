"""Projects of one's own: made by ``init``, run with an installed wheel, upgraded."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, Workspace, elsewhere, lock
from tests.data.test_split import entries
from tlpipe import files, graph, upgrade
from tlpipe.cli import projects
from tlpipe.data import split
from tlpipe.data.images import LIBHEIF
from tlpipe.project import Project

# What the folder of a project holds, but for what DVC and Git make.
FILES = [
    *(
        ".dvcignore",
        ".gitattributes",
        ".gitignore",
        ".tlpipe",
        "README.md",
        "constraints.txt",
        "dvc.yaml",
        "flows",
    ),
    *("params.yaml", "prefect.yaml", "requirements.txt", "tlpipe.lock.yaml"),
]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {".git", ".dvc"} & set(path.relative_to(folder).parts)
    }


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process end before a file is written, after that many; below zero it does not."""
    real, left = files.write_bytes, [-1]

    def write_bytes(path: Path, content: bytes) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, content)

    monkeypatch.setattr(files, "write_bytes", write_bytes)
    return lambda number: left.__setitem__(0, number)


@pytest.fixture
def made(
    tmp_path: Path, photos: Path, cache_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A project of photos, in neither a Git nor a DVC repository."""
    monkeypatch.setattr(projects, "_make_repositories", lambda *_, **__: None)
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos))
    return Workspace(tmp_path / "p", cache_env)


def make_earlier(project: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a project be of an earlier version: another graph, flow, parameter, and the user's own.

    The user has wrapped a command and shortened the flow.
    """
    change = (version("tlpipe"), upgrade.Renamed("export.parity_tolerance", "tolerance"))
    monkeypatch.setattr(upgrade, "CHANGES", (change,))
    for path in ("dvc.yaml", ".tlpipe/dvc.yaml.base"):
        project.replace(path, "      - artifacts/ingest/rejects.csv\n", "")
    project.replace("dvc.yaml", "cmd: tlpipe ingest\n", "cmd: srun tlpipe ingest\n")
    for path in ("flows/pipeline.py", ".tlpipe/flows/pipeline.py.base"):
        project.replace(path, "retries: int = 0", "retries: int = 5")
    project.replace("flows/pipeline.py", "max_workers=8", "max_workers=2")
    project.replace("tlpipe.lock.yaml", f"tlpipe: {version('tlpipe')}\n", "tlpipe: 0.0.1\n")


def here(tmp_path: Path, cache_env: dict[str, str]) -> Workspace:
    return Workspace(tmp_path, cache_env)


def test_a_source_in_the_project_goes_to_dvc_before_all_else_goes_to_git(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    project = here(tmp_path, cache_env)
    said = project.call("init", "--here", "--source", photos.name).stdout
    add, commit = ("dvc add photos", "git add . && git commit -m 'A new project'")
    assert f"next:\n  {add} && {commit}\n" in said
    project.run("sh", "-c", f"{add} && git add .")
    staged = project.run("git", "diff", "--cached", "--name-only").stdout.splitlines()
    assert "photos.dvc" in staged
    assert not any(name.endswith(".png") for name in staged)


def test_a_repository_that_git_will_not_speak_of_gets_no_other_one_inside(
    tmp_path: Path, cache_env: dict[str, str]
) -> None:
    """As where it is another user's."""
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin" / "git"
    git.write_text(
        "#!/bin/sh\necho fatal: detected dubious ownership in repository >&2; exit 128\n"
    )
    git.chmod(0o755)
    env = {**cache_env, "PATH": f"{git.parent}:{os.environ['PATH']}"}
    (line,) = Workspace(tmp_path, env).call("init", "new", code=3).stderr.splitlines()
    assert "'git rev-parse' fails in" in line
    assert "dubious ownership in repository. Mend that" in line
    assert not (tmp_path / "new" / ".git").exists()


def test_init_says_what_the_source_holds_and_writes_parameters_that_fit(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    said = here(tmp_path, cache_env).call("init", "my flowers", "--source", str(photos))
    assert "24 images in 2 classes: dark 12, light 12" in said.stdout
    assert said.stdout.splitlines()[-4:] == [
        "next:",
        "  cd 'my flowers' && git add . && git commit -m 'A new project'",
        "  tlpipe run     # reproduce it, say what came out and whether it passes the gate",
        "  tlpipe serve   # answer over HTTP with what is in production: the first that passes",
    ]
    made = Workspace(tmp_path / "my flowers", cache_env)
    assert set(made.names()) == {*FILES, ".dvc", ".git"}
    params = yaml.safe_load((made.path / "params.yaml").read_text())
    assert params["ingest"]["source"] == str(photos)
    assert params["register"]["name"] == "my-flowers"
    assert params["register"]["gate"]["min_test_images"] == 3  # of some five
    assert "few images: register.gate.min_test_images is 3; it is 20 in larger" in said.stdout
    assert "the largest class will have some 2 test images; 0.5 where each" in said.stdout
    assert (made.path / "tlpipe.lock.yaml").read_text() == lock()
    checked = made.call("check")
    assert "24 images in 2 classes" in checked.stdout


@pytest.mark.fault("E33")
@pytest.mark.parametrize("count", [3, 4])
def test_where_few_given_images_test_a_class_that_is_said(
    tmp_path: Path, cache_env: dict[str, str], count: int
) -> None:
    """The smaller class has images enough, but few that test."""
    for part, counts in {"train": (30, 30), "test": (30, count)}.items():
        for label, number in zip("ab", counts, strict=True):
            folder = tmp_path / "given" / part / label
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (40, 40), (i, number, 0)).save(folder / f"{i}.png")
    said = here(tmp_path, cache_env).call("init", "p", "--source", "given", "--no-git").stdout
    params = yaml.safe_load((tmp_path / "p/params.yaml").read_text())
    asked = params["register"]["gate"]
    assert (asked["min_test_images"], asked["min_recall"]) == (20, 0.5)
    said_so = "few images of the smallest class: it will have some 3 test images" in said
    assert said_so is (count == 3)
    assert "min_test_images is" not in said


@pytest.mark.fault("E33")
def test_no_split_is_smaller_than_the_gate_asks_for(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    """Of 100 images in two classes, however the seed draws them."""
    for label in ("dark", "light"):
        for i in range(12, 50):
            shutil.copy(photos / label / "0.png", photos / label / f"{i}.png")
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos), "--no-git")
    params = yaml.safe_load((tmp_path / "p/params.yaml").read_text())
    asked = params["register"]["gate"]["min_test_images"]
    drawn = [split.assign(entries(100), split.Params(seed=seed)).splits for seed in range(100)]
    assert 12 < asked <= min(parts.count("test") for parts in drawn)


@pytest.mark.fault("E15")
def test_init_goes_on_after_a_failure(
    tmp_path: Path,
    photos: Path,
    cache_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    ends: Callable[[int], None],
) -> None:
    """Killed at any write, or where Git or DVC fails: the same command makes the same project."""
    make = ("init", "p", "--source", str(photos))
    monkeypatch.setattr(projects, "_make_repositories", lambda *_, **__: None)
    here(tmp_path, cache_env).call(*make)
    expected = content(tmp_path / "p")
    (tmp_path / "other").mkdir()
    home = here(tmp_path / "other", cache_env)
    assert len(expected) > 15
    for number in range(5):  # three writes more at each try
        ends(3)
        home.call(*make, code=130)
        assert len(content(home.path / "p")) == 3 * number + 3
    ends(-1)
    home.call(*make)
    assert content(home.path / "p") == expected
    home.call(*make)  # nothing is overwritten
    assert content(home.path / "p") == expected
    monkeypatch.undo()
    (home.path / "p/.dvc").mkdir()  # as a killed 'dvc init' leaves it
    (home.path / "p/.dvc/config").touch()
    (home.path / "bin").mkdir()
    git = home.path / "bin/git"
    none = "echo fatal: not a git repository >&2; exit 128"
    git.write_text(f"#!/bin/sh\n[ $1 = init ] || {{ {none}; }}\necho no room >&2; exit 1\n")
    git.chmod(0o755)
    path = {"PATH": f"{git.parent}:{os.environ['PATH']}"}
    failing = Workspace(home.path, {**cache_env, **path})
    said = failing.call(*make, code=3).stderr
    assert "'git init --quiet' fails in " in said
    assert "no room. Mend that, and give the same command again." in said
    home.call(*make)
    assert content(home.path / "p") == expected
    assert "analytics = false" in (home.path / "p/.dvc/config").read_text()


def test_init_says_why_dvc_fails(tmp_path: Path, photos: Path, cache_env: dict[str, str]) -> None:
    home = here(tmp_path, cache_env)
    home.run("git", "init", "-q")
    (tmp_path / ".gitignore").write_text(".dvc\n")
    said = home.call("init", "p", "--source", str(photos), code=3).stderr
    assert "'dvc init --subdir' fails in " in said and "is ignored by your SCM tool" in said
    assert said.count("\n") == 1


def test_init_without_git(tmp_path: Path, photos: Path, cache_env: dict[str, str]) -> None:
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos), "--no-git")
    made = Workspace(tmp_path / "p", cache_env)
    assert set(made.names()) == {*FILES, ".dvc"}
    assert "no_scm = True" in (made.path / ".dvc/config").read_text()
    assert made.call("status").stdout == (
        "stages: none has run yet\nmade last: nothing yet\n"
        "in production: nothing; there is no registry yet\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"), [("../photos", "photos"), ("link/../photos", "photos"), ("link", None)]
)
def test_a_source_is_stored_without_detours(
    tmp_path: Path,
    photos: Path,
    cache_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    expected: str | None,
) -> None:
    """Links stay: what they lead to may change."""
    monkeypatch.setattr(projects, "_make_repositories", lambda *_, **__: None)
    (tmp_path / "in").mkdir()
    if source.startswith("link"):
        shutil.copytree(photos, tmp_path / "in/photos")
        (tmp_path / "in/link").symlink_to(tmp_path / "in/photos")
    here(tmp_path / "in", cache_env).call("init", "../p", "--source", source)
    stored = yaml.safe_load((tmp_path / "p/params.yaml").read_text())["ingest"]["source"]
    known = {"../photos": photos, "link": tmp_path / "in/link"}
    assert stored == str(known.get(source, tmp_path / "in/photos"))


def test_a_source_inside_of_the_project_is_relative(
    tmp_path: Path, photos: Path, cache_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projects, "_make_repositories", lambda *_, **__: None)
    here(tmp_path, cache_env).call("init", "--here", "--source", "./photos")
    assert '  source: "photos"\n' in (tmp_path / "params.yaml").read_text()


def test_a_source_that_needs_a_key_gets_a_project_to_write_it_in(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    rows = [f"{path.relative_to(photos)};{path.parent.name}" for path in photos.rglob("*.png")]
    (photos / "labels.csv").write_text("\n".join(["Bild;Art", *rows]))
    home = here(tmp_path, cache_env)
    error = home.call("init", "p", "--source", str(photos), code=4).stderr
    assert "ingest.columns" in error
    assert f"write that in {tmp_path}/p/params.yaml and ask 'tlpipe check'" in error
    made = Workspace(tmp_path / "p", cache_env)
    assert set(made.names()) == {*FILES, ".dvc", ".git"}
    made.configure("ingest", columns={"path": "Bild", "label": "Art"})
    assert "24 images in 2 classes: dark 12, light 12" in made.call("check").stdout


def test_a_source_that_is_mended_takes_the_same_command_again(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    """As an archive of which half was downloaded."""
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", photos))
    archive = tmp_path / "photos.zip"
    archive.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    home = here(tmp_path, cache_env)
    words = ("init", "p", "--source", str(archive))
    assert (
        "once the source itself is mended, give the same command"
        in home.call(*words, code=4).stderr
    )
    archive.write_bytes(whole.read_bytes())
    assert "24 images in 2 classes" in home.call(*words).stdout
    gate = yaml.safe_load((tmp_path / "p/params.yaml").read_text())["register"]["gate"]
    assert gate["min_test_images"] < 5  # what fits 24 images, not what stood there before
    (tmp_path / "p/params.yaml").write_text("mine")
    assert "already holds params.yaml" in home.call(*words, code=3).stderr


def test_what_cannot_be_read_does_not_count(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    linked = tmp_path / "linked"
    for path in photos.rglob("*.png"):
        place = linked / path.relative_to(photos)
        place.parent.mkdir(parents=True, exist_ok=True)
        if int(path.stem) < 6:
            place.symlink_to(path)
        else:
            place.write_bytes(path.read_bytes())
    home = here(tmp_path, cache_env)
    said = home.call("init", "p", "--source", str(linked)).stdout
    assert "12 links lead outside of" in said
    # A fifth of 12 images, less what a split may be off.
    assert "register.gate.min_test_images is 1;" in said
    for path in linked.rglob("*.png"):
        path.rename(path.with_suffix(".heic" if int(path.stem) < 9 else ".png"))
    made = Workspace(tmp_path / "p", cache_env)
    made.replace("params.yaml", "min_test_images: 1", "min_test_images: 20")
    said = made.call("check").stdout
    assert "min_test_images is 20, and some" in said
    assert "no first version will pass. Set it lower, or add images." in said
    if not LIBHEIF:
        assert "files are called .heic and cannot be read here" in said


def test_one_tiny_class_takes_the_floor_of_recall_from_no_other_class(
    tmp_path: Path, cache_env: dict[str, str]
) -> None:
    for label, count in (("paper", 30), ("trash", 5)):
        (tmp_path / "all" / label).mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGB", (40, 40), (number, 2 * number, 100))
            picture.save(tmp_path / "all" / label / f"{number}.png")
    home = here(tmp_path, cache_env)
    said = home.call("init", "p", "--source", str(tmp_path / "all")).stdout
    assert "few images of the smallest class: it will have some 1 test images" in said
    gate = yaml.safe_load((tmp_path / "p/params.yaml").read_text())["register"]["gate"]
    assert gate["min_recall"] == 0.5


def test_files_that_git_would_ignore_are_added_by_force(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    home = here(tmp_path, cache_env)
    home.run("git", "init", "-q")
    (tmp_path / ".gitignore").write_text("*.yaml\n")
    said = home.call("init", "sub", "--source", str(photos)).stdout
    (line,) = [line for line in said.splitlines() if "git add --force" in line]
    home.run("sh", "-c", line.replace("git commit", "git -c user.name=x -c user.email=x@y commit"))
    committed = home.run("git", "ls-files").stdout
    for name in ("params.yaml", "dvc.yaml", "tlpipe.lock.yaml"):
        assert f"sub/{name}" in committed


def test_init_overwrites_nothing(tmp_path: Path, cache_env: dict[str, str]) -> None:
    home = here(tmp_path, cache_env)
    (tmp_path / "params.yaml").write_text("mine")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows/pipeline.py").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    error = home.call("init", "--here", code=3).stderr
    assert "already holds flows/pipeline.py, params.yaml, and nothing is overwritten" in error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "params.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ((), 3, "name the new folder, 'tlpipe init DIR', or give --here; not both"),
        (("x", "--here"), 3, "not both"),
        (("x", "--name", "a/b"), 3, "--name is 'a/b'; expected 1 to 200 letters"),
        (("x", "--name", "a.b"), 3, "--name is 'a.b'; expected 1 to 200 letters"),
        (("x", "--name", "a-history"), 3, "without -history last"),
        (("x", "--source", "nowhere"), 4, "nowhere does not exist"),
        (("--here", "--source", "."), 3, "holds the project itself"),
        (("x", "--source", "."), 3, "holds the project itself"),
        (("x/y", "--source", "../"), 3, "holds the project itself"),
        (("x", "--source", "x"), 3, "holds the project itself"),
    ],
)
def test_init_refuses_in_one_line(
    tmp_path: Path, cache_env: dict[str, str], arguments: tuple[str, ...], code: int, expected: str
) -> None:
    said = here(tmp_path, cache_env).call("init", *arguments, code=code)
    assert expected in said.stderr
    assert said.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_project_inside_of_a_git_repository_gets_none_of_its_own(
    tmp_path: Path, cache_env: dict[str, str]
) -> None:
    home = here(tmp_path, cache_env)
    home.run("git", "init", "-q")
    home.call("init", "inner")
    inner = Workspace(tmp_path / "inner", cache_env)
    assert not (inner.path / ".git").exists() and (inner.path / ".dvc").is_dir()
    assert "1,000 images in 10 classes" in inner.call("check").stdout
    below = Workspace(inner.path / "data", cache_env)
    assert "nothing yet" in below.call("status").stdout
    home.call("init", "bare", "--no-git")


def test_other_code_is_accepted_by_upgrade_alone(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos))
    made = Workspace(tmp_path / "p", cache_env)
    content = yaml.safe_load((made.path / "tlpipe.lock.yaml").read_text())
    content["stages"]["train"]["code"] = "0" * 16
    content["stages"]["ingest"]["numpy"] = "1.0"
    (made.path / "tlpipe.lock.yaml").write_text(yaml.safe_dump(content))
    error = made.call("ingest", code=6).stderr
    assert "ingest was not run: tlpipe.lock.yaml states numpy 1.0, and" in error
    assert not (made.path / "artifacts").exists()
    error = made.call("run", code=6).stderr
    assert "tlpipe.lock.yaml" in error and "'tlpipe upgrade'" in error
    tried = made.call("upgrade", "--dry-run").stdout
    assert "tlpipe.lock.yaml would be written" in tried
    assert "train would run again: code of tlpipe, 0000000000000000, and" in tried
    assert yaml.safe_load((made.path / "tlpipe.lock.yaml").read_text()) == content
    made.call("upgrade")
    assert (made.path / "tlpipe.lock.yaml").read_text() == lock()
    assert made.call("upgrade").stdout == "nothing to change\n"
    (made.path / "tlpipe.lock.yaml").write_text("stages: [")
    assert "is damaged; 'tlpipe upgrade'" in made.call("split", code=6).stderr
    made.call("upgrade")
    later = lock().replace(f"tlpipe: {version('tlpipe')}\n", "tlpipe: 99.0\n")
    (made.path / "tlpipe.lock.yaml").write_text(later)
    said = made.call("upgrade", code=6).stderr
    assert "is of tlpipe 99.0, and " in said and "Install 99.0, or one after it" in said


def test_what_the_user_changed_in_generated_files_stays(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    """Also what an earlier version wrote otherwise: this test plays it."""
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos))
    made = Workspace(tmp_path / "p", cache_env)
    dvc, flow = made.path / "dvc.yaml", made.path / "flows/pipeline.py"
    written = dvc.read_text()
    own = "  mine:\n    cmd: echo mine\n"

    def wrapped(text: str) -> str:
        return text.replace("cmd: tlpipe train\n", "cmd: A=1 nice tlpipe train\n") + own

    dvc.write_text(wrapped(written))
    (made.path / "prefect.yaml").unlink()
    assert made.call("upgrade").stdout == "nothing to change\n"
    assert dvc.read_text() == wrapped(written)
    # As an earlier version would have written it: without rejects, and another flow.
    for path in (dvc, made.path / ".tlpipe/dvc.yaml.base"):
        text = path.read_text()
        path.write_text(text.replace("      - artifacts/ingest/rejects.csv\n", ""))
    for path in (flow, made.path / ".tlpipe/flows/pipeline.py.base"):
        path.write_text(path.read_text().replace("retries: int = 0", "retries: int = 5"))
    before = {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    tried = made.call("upgrade", "--dry-run").stdout.splitlines()
    assert tried[0] == "dvc.yaml, flows/pipeline.py would be written"
    assert tried[1] == "ingest would run again: its entry in dvc.yaml"
    assert tried[2].endswith(": split, embed, audit, train, export, evaluate, register")
    assert before == {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    made.call("upgrade")
    assert dvc.read_text() == wrapped(written)
    assert "retries: int = 0" in flow.read_text()
    assert not (made.path / "prefect.yaml").exists()


@pytest.mark.fault("E12")
def test_a_conflict_is_shown_and_stops_every_stage_until_it_is_settled(
    made: Workspace,
) -> None:
    flow = made.path / "flows/pipeline.py"
    written = flow.read_text()
    flow.write_text(written.replace("retries: int = 0", "retries: int = 7"))
    base = made.path / ".tlpipe/flows/pipeline.py.base"
    base.write_text(written.replace("retries: int = 0", "retries: int = 5"))
    made.replace("tlpipe.lock.yaml", f"tlpipe: {version('tlpipe')}\n", "tlpipe: 0.0.1\n")
    line = 1 + written[: written.index("retries: int")].count("\n")
    said = f"conflict in flows/pipeline.py, line {line}: tlpipe and you changed the same lines\n"
    assert said in made.call("upgrade", "--dry-run").stdout
    assert "retries: int = 7" in flow.read_text() and "<<<<<<<" not in flow.read_text()
    tried = made.call("upgrade", code=6)
    assert said in tried.stdout and "flows/pipeline.py: both versions stand there" in tried.stderr
    assert "retries: int = 7" in flow.read_text() and "retries: int = 0" in flow.read_text()
    for command in ("upgrade", "run", "status"):
        assert f"has marks of a conflict in line {line}" in made.call(command, code=6).stderr
    for stage in graph.STAGES:
        assert f"has marks of a conflict in line {line}" in made.call(stage, code=6).stderr
    assert not (made.path / "artifacts").exists()
    flow.write_text(written.replace("retries: int = 0", "retries: int = 7"))
    assert made.call("upgrade").stdout.startswith("tlpipe.lock.yaml written\n")
    assert "retries: int = 7" in flow.read_text()
    assert (made.path / "tlpipe.lock.yaml").read_text() == lock()


def test_parameters_that_change_the_graph_need_no_upgrade(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    """The images of evaluate.ood are a dependency where there are some."""
    here(tmp_path, cache_env).call("init", "p", "--source", str(photos))
    made = Workspace(tmp_path / "p", cache_env)
    assert "nowhere" not in (made.path / "dvc.yaml").read_text()
    made.configure("evaluate", ood=str(tmp_path / "nowhere"))
    said = made.call("run", code=4)
    assert "dvc.yaml written\n" in said.stdout and "nowhere does not exist" in said.stderr
    stages = yaml.safe_load((made.path / "dvc.yaml").read_text())["stages"]
    assert str(tmp_path / "nowhere") in stages["evaluate"]["deps"]
    said = here(tmp_path, cache_env).call("run", "--params", "p/params.yaml", code=4)
    assert "nowhere does not exist" in said.stderr


@pytest.mark.fault("E15")
def test_an_upgrade_killed_at_any_write_goes_on(
    made: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: Callable[[int], None],
) -> None:
    make_earlier(made, monkeypatch)
    shutil.copytree(made.path, tmp_path / "undisturbed")
    Project(tmp_path / "undisturbed").generate()
    expected = content(tmp_path / "undisturbed")
    written = [path for path, text in content(made.path).items() if text != expected[path]]
    assert len(written) == 6
    left = set()
    for number in range(3 + 3 + len(written)):  # two files are merged, from three texts each
        killed = tmp_path / str(number)
        shutil.copytree(made.path, killed)
        ends(number)
        with pytest.raises(KeyboardInterrupt):
            Project(killed).generate()
        ends(-1)
        left.add(sum(text != expected[path] for path, text in content(killed).items()))
        # Parameters and files come before their bases, the lock last.
        bases = [path for path in written if path.startswith(".tlpipe")]
        for path in bases:
            has_base = (killed / path).read_bytes() == expected[path]
            file = path.removeprefix(".tlpipe/").removesuffix(".base")
            assert not has_base or (killed / file).read_bytes() == expected[file]
        assert (killed / graph.LOCK).read_bytes() != expected[graph.LOCK]
        Project(killed).generate()
        assert content(killed) == expected
    assert Project(killed).generate().changed == {}
    assert content(killed) == expected
    assert left == {1, 2, 3, 4, 5, 6}


@pytest.mark.fault("E13")
@pytest.mark.parametrize("command", ["upgrade", "run", "status", "check", "split"])
def test_parameters_of_something_else_are_no_project(
    tmp_path: Path, cache_env: dict[str, str], command: str
) -> None:
    (tmp_path / "params.yaml").write_text("lr: 1\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  mine:\n    cmd: echo\n")
    before = content(tmp_path)
    for given in ((), ("--params", "params.yaml")):
        said = here(tmp_path, cache_env).call(command, *given, code=3).stderr
        assert "params.yaml is of something else than tlpipe: beside it there is no " in said
        assert said.count("\n") == 1
    assert content(tmp_path) == before


@pytest.mark.fault("E13")
def test_a_project_says_what_it_is_in_three_places(made: Workspace) -> None:
    (made.path / "other").mkdir()
    (made.path / "other/params.yaml").write_text("lr: 1\n")
    made.path.joinpath("tlpipe.lock.yaml").unlink()
    said = made.call("split", code=6).stderr
    assert "tlpipe.lock.yaml is missing; 'tlpipe upgrade' writes it" in said
    said = made.call("run", code=6).stderr
    assert "tlpipe.lock.yaml in " in said and "(ingest, split, embed, " in said
    assert len(said) < 500
    lost = (("dvc.yaml", ".tlpipe"), (".tlpipe", "dvc.yaml"))
    for kept, other in lost:
        for path in (made.path / other, made.path / "tlpipe.lock.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        assert (made.path / kept).exists()
        # Parameters of something else in a folder of the project: it is the project's.
        Workspace(made.path / "other", made.env).call("upgrade")
        assert (made.path / "tlpipe.lock.yaml").read_text() == lock()
        assert (made.path / other).exists()


@pytest.mark.fault("E14")
def test_a_project_that_lost_what_was_written_before_is_upgraded_whole(made: Workspace) -> None:
    expected = content(made.path)
    shutil.rmtree(made.path / ".tlpipe")
    made.replace("flows/pipeline.py", "retries: int = 0", "retries: int = 5")
    (made.path / "prefect.yaml").unlink()
    said = made.call("run", code=6).stderr
    assert "flows/pipeline.py and prefect.yaml in " in said and "'tlpipe upgrade'" in said
    assert "<<<<<<<" not in (made.path / "flows/pipeline.py").read_text()
    said = made.call("upgrade", code=6).stdout
    assert ".tlpipe/ is missing, which holds what tlpipe wrote last: " in said
    assert "conflict in flows/pipeline.py, line " in said
    found = content(made.path)
    assert [path for path in expected if found[path] != expected[path]] == ["flows/pipeline.py"]
    flow = found["flows/pipeline.py"].decode()
    assert flow.count("retries: int = ") == 2 and len(flow.splitlines()) == 4 + len(
        expected["flows/pipeline.py"].splitlines()
    )


@pytest.mark.fault("E16")
def test_line_ends_of_a_clone_are_no_change(made: Workspace, tmp_path: Path) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    made.run("git", "init", "-q")
    made.run("git", "add", "--all")
    made.run("git", *who, "commit", "-qm", "made")
    made.run("git", "clone", "-q", "-c", "core.autocrlf=true", ".", str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone")
    known = {path: text for path, text in content(made.path).items() if path != "README.md"}
    assert {path: content(clone.path)[path] for path in known} == known
    for path in clone.path.rglob("*"):  # of a project that an earlier version made
        if path.is_file() and ".git" not in path.parts:
            path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    before = content(clone.path)
    Project(clone.path).check_generated()
    assert Project(clone.path).is_current()
    Project(clone.path).generate()
    assert content(clone.path) == before


@pytest.mark.fault("E16")
def test_an_upgrade_keeps_line_ends_and_links(
    made: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_earlier(made, monkeypatch)
    shutil.copytree(made.path, tmp_path / "plain")
    Project(tmp_path / "plain").generate()
    for path in ("params.yaml", "dvc.yaml", "flows/pipeline.py"):
        file = made.path / path
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    (made.path / "params.yaml").rename(tmp_path / "shared.yaml")
    (made.path / "params.yaml").symlink_to(tmp_path / "shared.yaml")
    found = here(tmp_path, {}).call("upgrade", "--params", "p/params.yaml").stdout
    assert "params.yaml, dvc.yaml, flows/pipeline.py, tlpipe.lock.yaml written" in found
    assert (made.path / "params.yaml").is_symlink()
    plain = content(tmp_path / "plain")
    for path in ("params.yaml", "dvc.yaml", "flows/pipeline.py"):
        expected = plain[path].replace(b"\n", b"\r\n")
        assert (made.path / path).read_bytes() == expected
    assert b"  tolerance: " in (tmp_path / "shared.yaml").read_bytes()
    assert not (tmp_path / "dvc.yaml").exists()


def test_comments_in_the_lock_state_nothing_and_of_two_versions_the_older_counts(
    made: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made.path / "tlpipe.lock.yaml"
    path.write_text("# mine\n" + lock().replace("tlpipe: ", "tlpipe:   "))
    Project(made.path).check_generated()
    assert made.call("upgrade").stdout == "nothing to change\n"
    change = (version("tlpipe"), upgrade.Renamed("export.parity_tolerance", "tolerance"))
    monkeypatch.setattr(upgrade, "CHANGES", (change,))
    for said in ("tlpipe: 0.0.1\n" + lock(), lock() + "tlpipe: '0.0.1'\n"):  # as Git merges them
        path.write_text(said)
        assert not Project(made.path).is_current()
        assert len(Project(made.path).plan().migrations) == 1
    Project(made.path).generate()
    assert path.read_text() == lock()


@pytest.mark.slow
def test_an_installed_wheel_makes_a_project_runs_it_and_answers(
    tmp_path: Path, installed: Path, cache_env: dict[str, str]
) -> None:
    """Of the digits, with the wheel's own weights, in a folder of a repository.

    A folder of photos, in a repository of its own: see tests/test_upgrade.py.
    """
    home = Workspace(tmp_path, elsewhere(installed, cache_env))
    where = "import sys, tlpipe; print(tlpipe.__file__, *sys.path)"
    seen = home.run("python", "-c", where).stdout
    assert str(installed.parent) in seen and f"{ROOT} " not in f"{seen} "
    home.run("git", "init", "-q")
    home.run("tlpipe", "init", "mine")
    made = Workspace(tmp_path / "mine", home.env)
    made.configure("export", precisions=[], parity_images=32)
    made.configure("evaluate", corrupted_images=8, ood_images=8)
    made.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 12")
    assert "mine version 1" in made.run("tlpipe", "run").stdout
    assert not (made.path / ".git").exists()
    (made.path / "inner").mkdir()
    below = Workspace(made.path / "inner", home.env)
    example = str(min((made.path / "artifacts/evaluate/examples").glob("*.png")))
    bundle = str(made.path / "artifacts/export/bundle")
    said = below.run("tlpipe", "predict", example, "--json", "--model", bundle).stdout
    (answer,) = json.loads(said)
    assert answer["label"] in {str(digit) for digit in range(10)}
    for place, given in ((below, ()), (home, ("--params", "mine/params.yaml"))):
        again = place.run("tlpipe", "run", *given).stdout
        assert "didn't change" in again and "Running stage" not in again
    assert "test accuracy" in made.run("tlpipe", "status").stdout
