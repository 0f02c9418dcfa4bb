"""Commands over a project as a whole: make it, check it, run it, show it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from tlpipe import files, graph
from tlpipe.cli.stages import ParamsFile, enter, function, model_name, sections, with_ood_that_fits
from tlpipe.cli.tables import print_advice, print_folds, print_pretrained, printable
from tlpipe.errors import DataError, ParamsError
from tlpipe.registry import LONGEST_NAME, NOT_IN_NAMES, SUFFIX, check_name

if TYPE_CHECKING:
    from tlpipe.project import Project
    from tlpipe.sources import Candidate
    from tlpipe.sources.listing import Source

_DIGITS, _TEXTURES = "data/digits.yaml", "data/textures.yaml"
# What the template's gate asks for: so many test images, and a recall where each class has some.
_ENOUGH, _RECALL, _ENOUGH_OF_EACH = 20, 0.5, 4
_TEST = 0.2  # the template's share of test images


def add(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (
        init,
        run,
        flow,
        status,
        check,
        summary,
        upgrade,
        ui,
        advise,
        explain,
        pretrain,
        backbones,
    ):
        app.command()(command)
    app.command("lr-find")(lr_find)
    app.command("cross-validate")(cross_validate)
    app.command(hidden=True)(schema)


def init(
    folder: Annotated[Path | None, typer.Argument(help="A new folder.", metavar="DIR")] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Labelled images: a folder, an archive, s3://... (default: digits)"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What models are registered as. (default: the folder's name)")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Make it in the current folder.")] = False,
    no_git: Annotated[
        bool, typer.Option("--no-git", help="Make no Git repository; DVC does without.")
    ] = False,
) -> None:
    """Make a project: look at the source, write parameters that fit it. Nothing is overwritten.

    After a failure, the same command goes on.
    """
    from tlpipe import upgrade

    if here == (folder is not None):
        raise ParamsError("name the new folder, 'tlpipe init DIR', or give --here; not both.")
    target = Path.cwd() if folder is None else _normal(folder)
    name = name or _name(target)
    try:
        check_name(name)
    except ValueError as error:
        raise ParamsError(f"--name is {name!r}; {error}.") from None
    texts, unfit, not_understood = _texts(target, source, name)
    # What a killed 'init' wrote is the same, and one that did not understand the source wrote this.
    there = sorted(path for path, text in texts.items() if _differs(target / path, text))
    if there and (there != [graph.PARAMS] or _differs(target / graph.PARAMS, unfit)):
        raise ParamsError(
            f"{target} already holds {', '.join(there)}, and nothing is overwritten. Move that "
            f"away, or name another folder."
        )
    for path, text in texts.items():
        upgrade.write(target / path, text)
    has_git = _make_repositories(target, no_git=no_git)
    if not_understood is not None:
        raise DataError(
            f"{not_understood} The project is made: where a parameter can say how to read it, "
            f"write that in {target / graph.PARAMS} and ask 'tlpipe check'; once the source itself "
            f"is mended, give the same command again."
        )
    print("next:")
    steps = [f"cd {shlex.quote(str(folder))}"] if folder is not None else []
    if has_git:  # or 'rebuild' would have no commit to make the model again from
        if inside := _inside(target, source):  # or Git would keep every image for good
            steps.append(f"dvc add {shlex.quote(inside)}")
        if ignored := _ignored(target, texts):
            steps.append(f"git add --force {shlex.join(ignored)}")
        steps.append("git add . && git commit -m 'A new project'")
    if steps:
        print(f"  {' && '.join(steps)}")
    print("  tlpipe run     # reproduce it, say what came out and whether it passes the gate")
    print("  tlpipe serve   # answer over HTTP with what is in production: the first that passes")


def _inside(target: Path, source: str | None) -> str:
    """Return where in a project its source lies; nothing where that is elsewhere, or a text."""
    place = _normal(Path(source or ""))
    is_data = place.is_dir() or place.suffix not in (".csv", ".json", ".yaml", ".yml")
    is_inside = place.exists() and place.is_relative_to(target) and place != target
    if not (is_inside and is_data) or place.with_name(f"{place.name}.dvc").exists():
        return ""
    return place.relative_to(target).as_posix()


def _ignored(target: Path, names: Iterable[str]) -> list[str]:
    """Return which files Git would leave out: a repository above may ignore names such as these."""
    command = ["git", "check-ignore", "--", *names]
    found = subprocess.run(command, cwd=target, capture_output=True, text=True).stdout
    return found.splitlines()


def _normal(path: Path) -> Path:
    """Return a path from the root on, without '..'; links stay."""
    return Path(os.path.normpath(path.expanduser().absolute()))


def _differs(path: Path, expected: str) -> bool:
    """Return whether there is something else than a file with that text."""
    from tlpipe import upgrade

    return path.exists() and not (path.is_file() and upgrade.text(path) == expected)


def _name(target: Path) -> str:
    """Return a folder's name as one that models may have."""
    words = re.findall(rf"[^\s{NOT_IN_NAMES}]+", target.name.removesuffix(SUFFIX))
    return "-".join(words).strip("-_ ")[:LONGEST_NAME] or "model"


def _texts(
    target: Path, source: str | None, name: str
) -> tuple[dict[str, str], str, DataError | None]:
    """Return the files of a new project, by their paths, and say what its source holds.

    And the parameters where the source is not understood, and why it is not: that may take a
    parameter, which needs a project.

    Raises:
        DataError: the source is not there.
    """
    from tlpipe import params, upgrade
    from tlpipe.project import dvc_yaml, lock

    generated = upgrade.texts()
    texts = dict(generated)
    if source is None:
        for path in (_DIGITS, _TEXTURES):
            texts[path] = upgrade.template(path)
    found, held, not_understood = _DIGITS, _Held(150, 20, 20), None
    if source is not None:
        if "://" not in source:
            source = str(_normal(Path(source)))
            _check_outside(target, Path(source))
        found = _source(source, target)
        try:
            held = _look_at(source)
        except DataError as error:
            if "://" in source or not Path(source).exists():
                raise
            not_understood = error
    images = min(_ENOUGH, max(1, int(held.tested)))
    has_recall = held.largest >= _ENOUGH_OF_EACH

    def parameters(images: int, recall: float) -> str:
        return upgrade.template(graph.PARAMS).format(
            source=json.dumps(found, ensure_ascii=False),
            name=json.dumps(name, ensure_ascii=False),
            ood=_TEXTURES if source is None else "null",
            recall=recall,
            images=images,
        )

    texts[graph.PARAMS] = parameters(images, _RECALL if has_recall else 0.0)
    if images < _ENOUGH:
        print(
            f"few images: register.gate.min_test_images is {images}; it is {_ENOUGH} in larger "
            f"sets. Raise it as this one grows"
        )
    if not has_recall:
        print(
            f"few images of a class: register.gate.min_recall is 0, since the largest class will "
            f"have some {held.largest:.0f} test images; {_RECALL} where each has "
            f"{_ENOUGH_OF_EACH}. Raise it as the set grows"
        )
    elif held.smallest < _ENOUGH_OF_EACH:
        print(
            f"few images of the smallest class: it will have some {held.smallest:.0f} test images, "
            f"of which its recall can hardly be told, and the gate asks for {_RECALL} of every "
            f"class. Add images of it, or set register.gate.min_recall to 0"
        )
    texts["README.md"] = upgrade.template("README.md").format(name=name)
    written = {**generated, graph.FILE: dvc_yaml(params.parse(texts[graph.PARAMS], Path()))}
    bases = {upgrade.base(path): text for path, text in written.items()}
    made = {**texts, **written, **bases, graph.LOCK: lock()}
    return made, parameters(_ENOUGH, _RECALL), not_understood


def _check_outside(target: Path, source: Path) -> None:
    """Check that a project does not lie in its own source: DVC would hash what it writes there.

    Raises:
        ParamsError: it does.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ParamsError(
            f"--source {source} holds the project itself, {target}; what the project writes would "
            f"be its source. Name a folder of images alone, or make the project elsewhere."
        )


def _source(source: str, target: Path) -> str:
    """Return a source as the project's parameters name it: inside of it by a relative path."""
    if "://" in source:
        return source
    path = Path(source)
    return path.relative_to(target).as_posix() if path.is_relative_to(target) else str(path)


class _Held(NamedTuple):
    """How many images of a source will test at least, and how many of a class, about."""

    tested: float
    smallest: float
    largest: float


def _look_at(source: str) -> _Held:
    """Say what a source holds; return what the gate can ask for.

    Raises:
        DataError: it cannot be read, or its labels not be told.
    """
    from tlpipe.data import charts, ingest

    with ingest.opened(ingest.Params(source=source)) as opened:
        candidates = list(opened.candidates())
        for note in (*opened.notes, *charts.describe_source(candidates)):
            print(printable(note))
        if opened.rejects:
            first = opened.rejects[0]
            text = printable(f"{first.path}: {first.detail}")
            print(f"{len(opened.rejects)} would be rejected, the first is {text}")
        links = _links_outside(opened)
        if links:
            said = _of_links(links, source)
            print(f"{said}. ingest.follow_links: true in params.yaml reads what they lead to")
    return _held(candidates, links, _TEST)


def _held(candidates: "Iterable[Candidate]", links: Mapping[str, str], share: float) -> _Held:
    """Return what the gate can ask for; what cannot be read, as links out of a folder, is left out.

    ``share``: of the images that test, where the source does not say which do.
    """
    from tlpipe.data import split
    from tlpipe.data.images import UNREAD

    unread = {suffix for suffixes, _ in UNREAD for suffix in suffixes}
    read = [
        one
        for one in candidates
        if one.file not in links and PurePath(one.file).suffix.lower() not in unread
    ]
    splits = Counter(one.split for one in read)
    labels = Counter(one.label for one in read)
    least = 1 - split.TOLERANCE
    if not splits["test"]:
        tested = Counter({label: share * count for label, count in labels.items()})
        total = share * splits.total()
    else:
        tested = Counter(one.label for one in read if one.split == "test")
        total = splits["test"]
    each = [tested[label] for label in labels] or [0]
    return _Held(least * total, min(each), max(each))


def _links_outside(opened: "Source") -> dict[str, str]:
    """Return which links of a folder lead out of it, and where to."""
    from tlpipe.sources.storage import Folder

    return dict(opened.storage.links_outside()) if isinstance(opened.storage, Folder) else {}


def _of_links(links: Mapping[str, str], name: str) -> str:
    first = printable(" -> ".join(next(iter(links.items()))))
    return f"{len(links)} links lead outside of {name} and will be rejected, the first is {first}"


def _make_repositories(target: Path, *, no_git: bool) -> bool:
    """Make a Git and a DVC repository where the folder is in none, and no commit.

    Returns:
        Whether the folder is in a Git repository now.
    """

    def is_in(*command: str) -> bool:
        return subprocess.run(command, cwd=target, capture_output=True).returncode == 0

    has_git = _is_in_git(target) if shutil.which("git") else False
    if not has_git and not no_git and shutil.which("git"):
        _make(target, "git", "init", "--quiet")
        has_git = True
    dvc = (sys.executable, "-P", "-m", "dvc")
    half = target / ".dvc"
    if half.is_dir() and not any(
        path.is_file() and path.stat().st_size for path in half.rglob("*")
    ):
        shutil.rmtree(half)  # a killed 'dvc init' left it
    if not is_in(*dvc, "root"):
        how = ["--subdir"] * (not (target / ".git").exists()) if has_git else ["--no-scm"]
        _make(target, *dvc, "init", *how)
        _make(target, *dvc, "config", "core.analytics", "false")
    return has_git


def _is_in_git(target: Path) -> bool:
    """Return whether a folder is in a Git repository.

    Raises:
        ParamsError: Git will not say: one made inside it would hide the files from it.
    """
    command = ("git", "rev-parse", "--show-toplevel")
    env = {**os.environ, "LC_ALL": "C"}
    asked = subprocess.run(command, cwd=target, capture_output=True, text=True, env=env)
    if asked.returncode and "not a git repository" not in asked.stderr:
        raise ParamsError(_fails(target, "git rev-parse", asked.stderr))
    return not asked.returncode


def _fails(target: Path, command: str, said: str) -> str:
    return (
        f"'{command}' fails in {target}: {' '.join(said.split())[:300]}. Mend that, and give the "
        f"same command again."
    )


def _make(target: Path, *command: str) -> None:
    """Run a command that makes a repository.

    Raises:
        ParamsError: it fails.
    """
    made = subprocess.run(command, cwd=target, capture_output=True, text=True)
    if made.returncode:
        name = " ".join(command if command[0] == "git" else command[3:])
        raise ParamsError(_fails(target, name, f"{made.stderr} {made.stdout}"))


def check(
    params: ParamsFile = None,
    hide: Annotated[
        bool,
        typer.Option(
            "--hide",
            help="Hide from DVC, in .dvcignore, what it cannot read of the source, and show it "
            "again what it can.",
        ),
    ] = False,
) -> None:
    """Check params.yaml and that the sources are there, before anything runs."""
    from tlpipe import versioning
    from tlpipe.backbones import embed
    from tlpipe.data import charts, ingest, split
    from tlpipe.evaluation import answers
    from tlpipe.registry import register
    from tlpipe.sources import listing

    project = enter(params)
    found = sections(project)
    project.check_compared()
    for folder in filter(Path.is_dir, (Path(), Path("artifacts"))):
        files.check_writable(folder)
    to_fetch = embed.check_weights(cast(embed.Params, found["embed"]))
    for said in filter(None, (to_fetch, versioning.other_versions(Path()))):
        print(said)
    name = cast(register.Params, found["register"]).name
    for said in register.changed_by_others(workspace=Path(), name=name):
        print(printable(said))
    section = cast(ingest.Params, found["ingest"])
    ood = with_ood_that_fits(found).ood
    for key, address in ingest.addresses(section).items():
        listing.check_written_out(address, key)
    if ood:
        listing.check_written_out(ood, "evaluate.ood")
    with ExitStack() as stack:
        source = stack.enter_context(ingest.opened(section))
        candidates = list(source.candidates())
        for note in (*source.notes, *charts.describe_source(candidates)):
            print(printable(note))
        if ood:
            _, names = stack.enter_context(answers.opened(ood))
            print(printable(f"{len(names):,} images out of distribution: {ood}"))
        links = _links_outside(source)
    if source.rejects:
        first = source.rejects[0]
        print(
            f"{len(source.rejects)} will be rejected ({ingest.counted(source.rejects)}), the first "
            f"is {printable(f'{first.path}: {first.detail}')}"
        )
        most = section.max_rejected
        ingest.check_rejected(source.rejects, source.counts.total(), most, "ingest lists each")
    if links:
        said = _of_links(links, section.source)
        print(f"{said}. ingest.follow_links: true reads what they lead to.")
    shares = cast(split.Params, found["split"])
    held = _held(candidates, links, 1 / shares.folds if shares.folds else shares.test)
    asked = cast(register.Params, found["register"]).gate.min_test_images
    if asked > (tests := held.tested / (1 - split.TOLERANCE)):
        print(
            f"register.gate.min_test_images is {asked}, and some {tests:.0f} images will test: no "
            f"first version will pass. Set it lower, or add images."
        )
    folders = (section.source, *filter(None, [section.unlabelled]))
    versioning.check_hidden(Path(), *map(Path, folders), hide=hide)


def summary(params: ParamsFile = None) -> None:
    """Show what the pipeline made last, and what comes next."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tlpipe.registry import register

    enter(params)
    table = Table(show_header=False, title="tlpipe", title_justify="left")
    rows, following = register.summary(receipt=Path(graph.PATHS["receipt"]), workspace=Path())
    for name, value in rows:
        table.add_row(name, escape(printable(value)))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"next: {following}", markup=False)


def run(params: ParamsFile = None) -> None:
    """Check the project, run the stages that a change concerns, say what came out."""
    summary(_check_and(params, "-m", "dvc", "repro"))


def flow(params: ParamsFile = None) -> None:
    """Do what 'run' does as a Prefect flow, with its logs and states."""
    _check_and(params, str(Path("flows", "pipeline.py")))


def make_current(project: "Project") -> None:
    """Write what tlpipe generates where that is all that differs, as before any run.

    Raises:
        ArtifactError: the project is of other code than is installed.
    """
    # The code is the project's own, or what has changed is what its parameters make of dvc.yaml.
    if (project.is_source() or project.is_current()) and not project.plan().conflicts:
        for path in project.generate().changed:
            print(f"{path} written")
    else:
        project.check_generated()  # first: parameters may be those of another version


def _check_and(params: Path | None, *command: str) -> Path:
    """Check the project, then run a Python program in its folder; return its params.yaml."""
    project = enter(params)
    make_current(project)
    found = project.folder / graph.PARAMS  # the current folder is another one now
    check(found)
    sys.stdout.flush()
    run_python(*command)
    return found


def run_python(*command: str, inherit: tuple[int, ...] = ()) -> None:
    """Run a Python program in the current folder; what it ends with, this command ends with.

    Nothing is imported from there: the user's own files may be named as packages are. ``inherit``:
    file descriptors.
    """
    beside = str(Path(sys.executable).parent)  # where DVC finds tlpipe
    env = {**os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")])}
    code = subprocess.run([sys.executable, "-P", *command], env=env, pass_fds=inherit).returncode
    if code:
        raise typer.Exit(code)


def status(params: ParamsFile = None) -> None:
    """Say which stages would run and why, what was made last, and what is in production."""
    from tlpipe.registry import promotion, tracking

    project = enter(params)
    project.check_generated()
    if os.access(project.folder, os.W_OK):
        # This project's stages alone: its DVC repository may hold others.
        command = [sys.executable, "-P", "-m", "dvc", "status", "--json", graph.FILE]
        asked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if asked.returncode:
            raise typer.Exit(asked.returncode)
        print(f"stages: {_changed(json.loads(asked.stdout))}")
    else:
        print("stages: nobody can tell, since DVC has to write into the project, and it may not")
    receipt = Path(graph.PATHS["receipt"])
    print(f"made last: {_made_last(receipt)}")
    name = model_name(project)
    if not tracking.is_there(Path()):
        print("in production: nothing; there is no registry yet")
        return
    with tracking.connection(Path()) as client:
        log, champion = promotion.history(client, name)
        answers = "" if champion else promotion.stands_in(client, name)
        lost = tracking.of_deleted_run(client, name, champion) if champion else ""
    since = f", since {log[-1].at:%Y-%m-%d %H:%M:%S} UTC" if log else ""
    shown = f"{name} version {champion}{since}" if champion else answers or "nothing"
    print(f"in production: {shown}")
    if lost:
        print(lost)


def _changed(found: dict[str, list[Any]]) -> str:
    """Say what 'dvc status --json' found to have changed, a line a stage."""
    if not Path("dvc.lock").exists():
        return "none has run yet"
    if not found:
        return "all are up to date"
    gone = [stage for stage, entries in found.items() if _is_gone(entries)]
    changed = {stage: entries for stage, entries in found.items() if stage not in gone}
    lines = []
    if gone:
        lines.append(
            f"not here: what {', '.join(gone)} would write. 'dvc pull' fetches it where another "
            f"copy has pushed it; 'tlpipe run' makes it."
        )
    if changed:
        lines.append("changed, so that 'tlpipe run' runs them and what follows:")
        lines += [
            f"  {stage}: {', '.join(_changes(entries))}" for stage, entries in changed.items()
        ]
    return "\n".join(map(printable, lines))


def _is_gone(entries: list[Any]) -> bool:
    """Return whether something that a stage writes is not there, as in a fresh clone."""
    outs = (entry.get("changed outs", {}) for entry in entries if isinstance(entry, dict))
    return any(how == "deleted" for some in outs for how in some.values())


def _changes(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):  # such as 'changed command'
            yield entry
            continue
        for path, how in (pair for paths in entry.values() for pair in paths.items()):
            if isinstance(how, dict):  # of a file of parameters
                yield from (f"{path} {key} {changed}" for key, changed in how.items())
            else:
                yield f"{path} {how}"


def _made_last(receipt: Path) -> str:
    from tlpipe import files

    if not receipt.exists():
        return "nothing yet"
    content = files.read_json(receipt)
    return (
        f"{content['name']} version {content['version']}, test accuracy "
        f"{content['accuracy']['value']:.3f}"
    )


def upgrade(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")
    ] = False,
    params: ParamsFile = None,
) -> None:
    """Accept the code that is installed: write the lock, merge what tlpipe generates."""
    from tlpipe import upgrade
    from tlpipe.errors import ArtifactError

    project = enter(params)
    if not (project.folder / upgrade.BASES).is_dir():
        print(
            f"{upgrade.BASES}/ is missing, which holds what tlpipe wrote last: what differs from "
            f"what it writes now counts as your change. Get it back from Git first if you can"
        )
    found = project.plan() if dry_run else project.generate()
    would, will = ("would be ", "would") if dry_run else ("", "will")
    for said in found.migrations:
        print(printable(f"{graph.PARAMS}: {said}"))
    written = [path for path in found.changed if not (found.conflicts and path == graph.LOCK)]
    print(f"{', '.join(written)} {would}written" if written else "nothing to change")
    for stage, why in found.again.items():
        print(f"{stage} {will} run again: {why}")
    if followers := found.followers():
        names = ", ".join(followers)
        print(f"what follows {will} run again where what it reads has changed: {names}")
    for path, lines in found.conflicts.items():
        print(f"conflict in {path}, {upgrade.said(lines)}: tlpipe and you changed the same lines")
    if found.conflicts and not dry_run:
        raise ArtifactError(
            f"{', '.join(found.conflicts)}: both versions stand there, between marks of Git, and "
            f"until that is settled no stage of tlpipe runs. Write there what is to hold, take the "
            f"marks out, and run 'tlpipe upgrade' again."
        )


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    params: ParamsFile = None,
) -> None:
    """Show the project's registry in the browser: MLflow's own pages."""
    from tlpipe.registry import local, tracking

    enter(params)
    tracking.check_own(Path())
    # Made or moved here first: the server would keep artifacts where the folder was before.
    with tracking.connection(Path(), create=True):
        pass
    store = ("--backend-store-uri", local.address(Path()))
    root = ("--default-artifact-root", local.artifacts(Path()))
    where = ("--host", "127.0.0.1", "--port", str(port))
    server = [sys.executable, "-P", "-m", "mlflow", "server", *store, *root, *where]
    os.execv(sys.executable, server)  # noqa: S606


def advise(
    images: Annotated[
        int,
        typer.Option(min=1, max=10_000, help="Look at so many images at most; time goes by them."),
    ] = 1000,
    params: ParamsFile = None,
) -> None:
    """Say how much to freeze and whether the images are enough, before anything is fine-tuned."""
    from tlpipe.backbones import embed
    from tlpipe.training import advise

    project = enter(params)
    project.check_code("embed")  # whose activations it looks at
    named = cast(embed.Params, sections(project)["embed"]).advice
    recommendation = Path(named or "advice.json")
    names = ("activations", "pixels", "split", "leaks_report")
    known = {name: Path(graph.PATHS[name]) for name in names}
    folder = Path("artifacts", "advise")
    print_advice(advise.run(**known, folder=folder, recommendation=recommendation, images=images))
    print(f"see {folder / 'advice.png'}; {recommendation} holds what is recommended")
    if named is None:
        print(f"to follow it: embed.freeze: auto, embed.advice: {recommendation}; commit that file")


def explain(
    images: Annotated[
        int,
        typer.Option(
            min=1,
            max=100_000,
            help="Look at so many training images at most for what excites channels; where stages "
            "are open, so many for the map and the neighbours, too.",
        ),
    ] = 1000,
    mistakes: Annotated[
        int, typer.Option(min=1, max=60, help="Explain so many, and as many right answers.")
    ] = 12,
    no_log: Annotated[
        bool, typer.Option("--no-log", help="Write files here only, log nothing to MLflow.")
    ] = False,
    params: ParamsFile = None,
) -> None:
    """Show what the last trained model looks at: filters, patches, heat maps, a map of images.

    Pictures and thumbnails of images are logged to the model's run in MLflow: in this project, or
    on the server that MLFLOW_TRACKING_URI names.
    """
    from tlpipe.explanation import FOLDER, explain
    from tlpipe.explanation.inputs import Paths
    from tlpipe.registry import publishing, tracking

    project = enter(params)
    project.check_code("train")  # whose network it takes apart
    name, folder = model_name(project), Path(FOLDER)
    explained = explain.run(
        paths=Paths.of_project(), folder=folder, images=images, mistakes=mistakes
    )
    print(
        f"{explained.mistakes} of {explained.all_mistakes} mistakes on {explained.tested:,} test "
        f"images explained; of {explained.asked} labels that their nearest images can tell of, "
        f"{explained.doubtful} are in doubt"
    )
    print(f"see {folder / explain.PAGE}; 'dvc plots show' has the galleries, too")
    if no_log or not tracking.is_there(Path()):
        return
    with tracking.connection(Path()) as client:
        added = publishing.add(client, name, explained.bundle, folder, publishing.EXPLAINED)
    if added is None:
        print(f"not logged: no run of {name} has this bundle; 'tlpipe run' registers it")
    else:
        run_id, is_new = added
        how = "logged to" if is_new else "already logged to"
        print(f"{how} {publishing.EXPLAINED}/ among the artifacts of the MLflow run {run_id}")


def pretrain(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A folder, an archive or an address of images. (default: the training images)",
            metavar="FOLDER",
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, max=10_000, help="How often each image is seen, in two views.")
    ] = 100,
    batch_size: Annotated[
        int | None,
        typer.Option(min=2, max=65_536, help="Images a step. (default: 64, or all if fewer)"),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Whether views are flipped. (default: as in embed.augmentation)",
        ),
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Train the backbone on images without labels, and say what that is worth for your own."""
    from tlpipe.backbones import embed
    from tlpipe.data import ingest
    from tlpipe.training import pretrain

    where = None if source is None or "://" in source else str(Path(source).expanduser().absolute())
    project = enter(params)
    project.check_code("embed")  # whose activations say what it begins from
    found_sections = sections(project)
    section = cast(embed.Params, found_sections["embed"])
    known = {name: Path(graph.PATHS[name]) for name in ("activations", "pixels", "split")}
    folder = Path("artifacts", "pretrain")
    found = pretrain.run(
        **known,
        folder=folder,
        source=where or source,
        params=section,
        epochs=epochs,
        batch_size=batch_size,
        flip=flip,
        follow_links=cast(ingest.Params, found_sections["ingest"]).follow_links,
    )
    print_pretrained(found)
    print(f"see {folder / 'pretrain.png'} and {folder / 'report.json'}")
    if found.is_worth_it:
        kept = f"pretrained-{found.sha256[:8]}.safetensors"
        has_git = any((path / ".git").exists() for path in (Path.cwd(), *Path.cwd().parents))
        added = f"  git add {kept}.dvc .gitignore\n" if has_git else ""
        print(
            f"to begin from it:\n"
            f"  cp {folder / pretrain.WEIGHTS} {kept}\n  dvc add {kept}\n{added}"
            f"and in the section embed of params.yaml set:\n"
            f"  weights: {kept}\n  weights_sha256: {found.sha256}"
        )


def lr_find(
    plot: Annotated[
        Path | None, typer.Option(help="Where to draw it. (default: artifacts/lr-find.png)")
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Raise the learning rates step by step and suggest those where the loss falls fastest."""
    from tlpipe.project import Project
    from tlpipe.training import lr_find, train

    project = Project.find(params)
    for stage in ("embed", "train"):
        project.check_code(stage)
    section = cast(train.Params, sections(project)["train"])
    plot = plot or project.folder / "artifacts" / "lr-find.png"
    known = {name: project.path(name) for name in ("activations", "pixels", "split")}
    found = lr_find.run(**known, plot=plot, params=section)
    if found.learning_rates is None:
        print(f"the loss never falls: {plot}")
    else:
        print(f"train.head_lr: {found.learning_rates.head:.2g}")
        if found.open_stages:
            print(f"train.backbone_lr: {found.learning_rates.backbone:.2g}")
        print(f"see {plot}")


def cross_validate(
    folds: Annotated[
        int | None, typer.Option(min=3, max=20, help="How many. (default: split.folds)")
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Train and test once for each fold; give each number's mean over folds with its interval."""
    from tlpipe.evaluation import cross_validation

    project = enter(params)
    for stage in cross_validation.STAGES:
        project.check_code(stage)
    found = sections(project)
    if folds is not None:
        found["split"] = found["split"].model_copy(update={"folds": folds})
    known = ("manifest", "pixels", "activations", "placements", "leaks_report")
    folder = Path("artifacts", "cross-validation")
    report = cross_validation.run(
        **{name: Path(graph.PATHS[name]) for name in known},
        folder=folder,
        workspace=Path(),
        stages={name: function(name) for name in cross_validation.STAGES},
        params=found,
    )
    print_folds(report)
    print(f"see {folder}")


def backbones(
    pattern: Annotated[
        str, typer.Argument(help="A name, or a pattern such as 'resnet*' or 'timm/vit_tiny*'.")
    ] = "*",
) -> None:
    """List pretrained networks: their stages, what these give, whether weights are here."""
    from rich.console import Console
    from rich.table import Table

    from tlpipe.backbones import backbone, weights
    from tlpipe.errors import WeightsError
    from tlpipe.progress import track

    console = Console()
    names = backbone.matching(pattern)
    for name in track(names, total=len(names), description="backbones"):
        try:
            found = backbone.describe(name)
        except WeightsError as error:
            if len(names) == 1:
                raise
            console.print(f"{name}: {error}", markup=False)
            continue
        at_hand = "weights here" if weights.at_hand(found.pretrained) else "weights to be fetched"
        what = at_hand if found.pretrained else "no pretrained weights"
        side = found.preprocessing.crop_px
        title = f"{name}: {found.parameters:,} parameters, {side} px, {what}"
        table = Table("stage", "gives", "KiB an image", "parameters", title=title)
        table.title_justify = "left"
        for column in table.columns[1:]:
            column.justify = "right"
        for stage in found.stages:
            shape = " x ".join(map(str, stage.shape))
            table.add_row(stage.name, shape, f"{stage.kib:.1f}", f"{stage.parameters:,}")
        console.print(table)


def schema() -> None:
    """Print the JSON Schema of params.yaml."""
    from tlpipe import params
    from tlpipe.files import json_bytes
    from tlpipe.project import models

    print(json_bytes(params.json_schema(models())).decode(), end="")
