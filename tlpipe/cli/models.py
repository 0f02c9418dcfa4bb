"""Commands over models: what is registered, in production, to be trusted; and what answers."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

import typer

from tlpipe import files, graph
from tlpipe.cli.stages import (
    MODEL,
    AsJson,
    ParamsFile,
    enter,
    model_name,
    sections,
    with_ood_that_fits,
)
from tlpipe.cli.tables import (
    print_answers,
    print_decision,
    print_ensemble,
    print_json,
    print_model,
    print_moves,
    print_versions,
    printable,
)
from tlpipe.registry import SUFFIX, Registered, name_alone, of_own, parse, registered

if TYPE_CHECKING:
    from tlpipe.bundle import Bundle
    from tlpipe.registry.gate import Measured


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
RegisteredArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME@VERSION.")
]
OwnVersion = typer.Argument(
    metavar="VERSION", help=f"A number or an alias of the project's model, or {MODEL}"
)
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help=f"{MODEL} (default: register.name@champion)",
    ),
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or another that the bundle has: int8, fp16.")
]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the history.")]
Named = TypeVar("Named", bound=Registered | Path | None)
_NEWEST = 20


def add(app: typer.Typer) -> None:
    """Add these commands."""
    for about_versions in (models, show, compare, promote, rollback, history):
        app.command()(about_versions)
    for about_bundles in (ensemble, download, share, verify, sign, rebuild):
        app.command()(about_bundles)
    for answering in (predict, serve):
        app.command()(answering)


def models(
    name: Annotated[
        str | None, typer.Argument(help="Of which model. (default: register.name)")
    ] = None,
    all_versions: Annotated[
        bool, typer.Option("--all", help=f"Not only the newest {_NEWEST} and those with an alias.")
    ] = False,
    as_json: AsJson = False,
    params: ParamsFile = None,
) -> None:
    """List the versions of a model: accuracy, aliases, who registered each, when, which commit."""
    from tlpipe.project import Project
    from tlpipe.registry import tracking, versions

    if name is None:
        project = Project.find(params)
        name = model_name(project)
    else:
        project, name = Project.near(params), name_alone(name)
    with tracking.connection(project.folder) as client:
        found = versions.table(client, name, newest=None if all_versions else _NEWEST)
    if as_json:
        print_json(found)
    else:
        print_versions(name, found)


def show(model: ModelArgument, as_json: AsJson = False, params: ParamsFile = None) -> None:
    """Show all that is known of one model: numbers, classes, origin, signature, promotions."""
    from tlpipe.registry import versions

    named = parse(model)
    if isinstance(named, Path):
        found = versions.describe_folder(named)
    else:
        from tlpipe.project import Project
        from tlpipe.registry import tracking

        with tracking.connection(Project.near(params).folder) as client:
            found = versions.describe(client, named)
    if as_json:
        print_json(found)
    else:
        print_model(found)


def compare(
    model: ModelArgument,
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help=f"{MODEL} (default: what is in production)"),
    ] = None,
    as_json: AsJson = False,
    params: ParamsFile = None,
) -> None:
    """Ask the gate about a model beside another one, and move nothing; exit code 11: it fails."""
    from tlpipe.data import ingest
    from tlpipe.errors import GateError
    from tlpipe.registry import promotion, register

    named, beside = _absolute(model), _absolute(other) if other is not None else None
    project = enter(params)
    named, beside = _from_here(named), _from_here(beside)
    found = sections(project)
    section = cast(register.Params, found["register"])
    decision = promotion.compare(
        model=named,
        other=beside,
        name=section.name,
        workspace=Path(),
        own=promotion.Own(
            _measured(),
            *(Path(graph.PATHS[name]) for name in ("bundle", "held_out", "leaks_report")),
        ),
        source=cast(ingest.Params, found["ingest"]),
        bounds=section.gate,
    )
    if as_json:
        print_json(decision.content())
    else:
        print_decision(section.name if isinstance(named, Path) else named.name, decision)
    if decision.verdict != "holds":
        rules = [
            f"{rule.name} {rule.verdict}" for rule in decision.rules if rule.verdict != "holds"
        ]
        raise GateError(f"{model} would stay out of production: {', '.join(rules)}.")


def _absolute(model: str) -> Registered | Path:
    named = parse(model)
    return named.absolute() if isinstance(named, Path) else named


def _from_here(model: Named) -> Named:
    """Return a folder as tables name it: relative, where it lies in the current folder."""
    here = Path.cwd()
    if isinstance(model, Path) and model.is_relative_to(here):
        return model.relative_to(here)
    return model


def _measured() -> "Measured":
    from tlpipe.registry.gate import Measured

    return Measured(**{name: Path(graph.PATHS[name]) for name in ("pixels", "manifest", "split")})


def promote(
    version: Annotated[str | None, OwnVersion] = None,
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Although the gate fails it; needs --reason.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Copy it to this MLflow server, and put it in production there. Its account: the "
            "variables of MLflow with TO_ before them, such as TO_MLFLOW_TRACKING_TOKEN.",
        ),
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Put a version in production, by default the one that 'tlpipe run' registered last.

    It has to pass the gate against the one that is there.
    """
    from tlpipe.data import ingest
    from tlpipe.errors import ParamsError
    from tlpipe.registry import promotion, register, tracking, versions

    if force and not reason.strip():
        raise ParamsError(
            "--force was given without a reason, which the history keeps; expected --force "
            "--reason TEXT."
        )
    given = _own_version(version, params)
    project = enter(params)
    found = sections(project)
    section = cast(register.Params, found["register"])
    receipt, bundle = Path(graph.PATHS["receipt"]), Path(graph.PATHS["bundle"])
    which = given or register.registered(receipt, bundle, section.name)
    if to is not None:
        which = versions.copy(Path(), section.name, which, to)
    with tracking.connection(Path(), address=to) as client:
        moved = promotion.promote(
            client,
            section.name,
            which,
            measured=_measured(),
            source=cast(ingest.Params, found["ingest"]),
            bounds=section.gate,
            reason=reason,
            force=force,
            show=partial(print_decision, section.name),
        )
    print(f"{section.name} version {moved.champion} is in production, {_before(moved.previous)}")


def rollback(
    version: Annotated[str | None, OwnVersion] = None,
    reason: Reason = "",
    params: ParamsFile = None,
) -> None:
    """Put back what was in production before, or a version that once was."""
    from tlpipe.project import Project
    from tlpipe.registry import promotion, tracking

    project = Project.find(params)
    name = model_name(project)
    which = _own_version(version, params)
    with tracking.connection(project.folder) as client:
        moved = promotion.rollback(client, name, which, reason)
    print(f"{name} version {moved.champion} is in production again, {_before(moved.previous)}")


def _own_version(text: str | None, params: Path | None) -> str | None:
    """Return the number, alias or bundle's digest that a text names of the project's model."""
    if text is None:
        return None
    from tlpipe import bundle
    from tlpipe.project import Project

    named = of_own(text, model_name(Project.find(params)))
    return bundle.load(named).digest if isinstance(named, Path) else named


def history(
    at: Annotated[
        str | None, typer.Option(help="A date or a moment (ISO 8601; UTC): what was there then.")
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Say which version was in production, since when, and why."""
    from tlpipe.project import Project
    from tlpipe.registry import moves, promotion, tracking

    project = Project.find(params)
    name = model_name(project)
    with tracking.connection(project.folder) as client:
        log, now = promotion.history(client, name)
        answers = "" if now else promotion.stands_in(client, name)
        before = moves.of_deleted(client, name)
    if before:
        print(
            f"{before} moves of a model {name} that was deleted in MLflow are not shown; MLflow "
            f"keeps them in {name}{SUFFIX}"
        )
    if at is not None:
        log = moves.during(log, *promotion.period(at))
    if not log:
        if at is None and now:
            print(f"{name} version {now} is in production; nobody has promoted it with tlpipe")
            return
        print(f"nothing of {name} was in production{f' at {at}' if at else ' yet'}")
        return
    print_moves(log)
    if at is None and answers:
        print(f"now: {answers}")
    elif at is None and now != log[-1].champion:
        print(
            f"now {f'version {now}' if now else 'none'} is in production: its alias was moved in "
            f"MLflow since. The next 'register', 'promote' or 'rollback' writes that down."
        )


def download(
    model: RegisteredArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder; nothing is overwritten.")
    ],
    params: ParamsFile = None,
) -> None:
    """Write a registered bundle into a new folder, verified; its signature beside that."""
    from tlpipe import bundle as bundles
    from tlpipe.project import Project
    from tlpipe.registry import versions

    named = registered(model)
    found = versions.download(Project.near(params).folder, named, folder)
    beside = bundles.signature_beside(folder)
    signed = f", its signature {beside}" if beside.exists() else ""
    print(f"{folder} is {named}, intact: {found.digest}, {', '.join(found.graphs)}{signed}")


def share(
    model: RegisteredArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder; nothing is overwritten.")
    ],
    license_: Annotated[
        str, typer.Option("--license", metavar="NAME", help="License of what is shared; required.")
    ] = "",
    data_license: Annotated[
        str, typer.Option(metavar="NAME", help="License of the images it was trained on; required.")
    ] = "",
    weights_license: Annotated[
        str, typer.Option(metavar="NAME", help="License of the pretrained weights; required.")
    ] = "",
    params: ParamsFile = None,
) -> None:
    """Write a folder to publish: card, weights for timm or torchvision, ONNX, licenses."""
    from tlpipe.project import Project
    from tlpipe.registry import share

    named = registered(model)
    licenses = share.Licenses(license_, data_license, weights_license)
    share.share(Project.near(params).folder, named, folder, licenses)
    print(f"{folder} is {named}, ready to publish; read {folder / 'README.md'} before")


def ensemble(
    named: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL)],
    soup: Annotated[
        bool,
        typer.Option(
            "--soup", help="Average the weights of fine-tuned versions of one architecture."
        ),
    ] = False,
    params: ParamsFile = None,
) -> None:
    """Make one model of several registered versions, evaluate it and register it.

    They must have the same labels, data and splits.
    """
    from tlpipe.data import ingest
    from tlpipe.export import export
    from tlpipe.registry import ensemble, register

    absolute = [_absolute(model) for model in named]
    project = enter(params)
    for stage in ("export", "evaluate", "register"):
        project.check_code(stage)
    found = sections(project)
    folder = Path("artifacts", "ensemble")
    made = ensemble.run(
        models=[_from_here(model) for model in absolute],
        is_soup=soup,
        measured=_measured(),
        folder=folder,
        workspace=Path(),
        settings=ensemble.Settings(
            cast(export.Params, found["export"]),
            with_ood_that_fits(found),
            cast(register.Params, found["register"]),
            cast(ingest.Params, found["ingest"]),
        ),
    )
    print_ensemble(made)
    print(f"see {folder / 'plots' / 'ensemble.png'}")
    receipt = files.read_json(folder / "receipt.json")
    version = printable(f"{receipt['name']}@{receipt['version']}")
    print(f"next: tlpipe compare {version} | tlpipe promote {version}")


def rebuild(
    model: ModelArgument,
    repository: Annotated[
        str | None, typer.Option(help="What to clone. (default: this project, or its origin)")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder to keep the bundle in.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Run the code of that commit without asking.")
    ] = False,
    with_credentials: Annotated[
        bool,
        typer.Option(
            "--with-credentials", help="Use this project's .dvc/config.local to pull the data."
        ),
    ] = False,
) -> None:
    """Make a bundle once more, from its commit and data alone, and compare the bytes."""
    from tlpipe.project import Project
    from tlpipe.registry import rebuild

    def confirm(what: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"Run {printable(what)}?"))

    version, digest = rebuild.run(
        model=parse(model),
        repository=repository,
        keep=output,
        workspace=Project.near().folder,
        confirm=confirm,
        with_credentials=with_credentials,
    )
    which = f" ({version})" if version != model else ""
    print(f"{model}{which} came out with the same bytes: {digest}")


def _before(previous: str) -> str:
    return f"version {previous} was before" if previous else "the first one"


SignatureOption = Annotated[
    Path | None, typer.Option(help="The file of a folder's signature; by default FOLDER.sig.")
]


def verify(
    model: ModelArgument,
    key: Annotated[Path | None, typer.Option(help="Public key, PEM: check who signed it.")] = None,
    signature: SignatureOption = None,
) -> None:
    """Check every file of a bundle by its hash, and its signature where a key is given."""
    from tlpipe import bundle as bundles

    named = parse(model)
    _check_signature(named, signature)
    if isinstance(named, Path):
        if key is not None:
            bundles.check_signature(named, key, signature or bundles.signature_beside(named))
        found = bundles.load(named)
    else:
        from tlpipe.project import Project
        from tlpipe.registry import versions

        found = versions.verify(Project.near().folder, named, key)
    signed = f"signed by the owner of {key}" if key else "signature not checked: no --key"
    print(f"{model} is intact: {found.digest}, {', '.join(found.graphs)}; {signed}")


def sign(
    model: ModelArgument,
    key: Annotated[Path, typer.Option(help="Private key of an elliptic curve, PEM.")],
    signature: SignatureOption = None,
) -> None:
    """Sign a bundle, so that others can check who made it."""
    from tlpipe import bundle as bundles

    named = parse(model)
    _check_signature(named, signature)
    if not isinstance(named, Path):
        from tlpipe.project import Project
        from tlpipe.registry import versions

        found = versions.sign(Project.near().folder, named, key)
        print(f"signed {found.digest}: {bundles.SIGNATURE} of {named}")
        return
    found = bundles.load(named)
    target = signature or bundles.signature_beside(found.folder)
    bundles.sign(found.folder, key, target)
    print(f"signed {found.digest}: {target}")


def _check_signature(named: Registered | Path, signature: Path | None) -> None:
    if signature is not None and not isinstance(named, Path):
        from tlpipe.errors import ParamsError

        raise ParamsError(
            f"--signature {signature} has no effect: that of {named} is kept in the registry. Take "
            f"it out, or name a folder."
        )


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: ModelOption = None,
    as_json: AsJson = False,
    precision: PrecisionOption = "fp32",
    params: ParamsFile = None,
) -> None:
    """Answer for image files with the model in production."""
    from tlpipe import predict

    bundle, _ = _bundle(model, params)
    answers = predict.run(bundle=bundle, images=images, precision=precision)
    if as_json:
        import json

        print(json.dumps(answers, indent=2))
    else:
        print_answers(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(4)


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    precision: PrecisionOption = "fp32",
    params: ParamsFile = None,
) -> None:
    """Answer over HTTP: POST the bytes of an image to /predict."""
    from tlpipe.serving import serve

    bundle, degraded = _bundle(model, params)
    serve.run(bundle=bundle, degraded=degraded, host=host, port=port, precision=precision)


def _bundle(model: str | None, params: Path | None) -> "tuple[Bundle, str]":
    """Load a bundle from a folder, or fetch it from the registry; and why it is an older one."""
    from tlpipe import bundle as bundles

    named = parse(model) if model is not None else None
    if isinstance(named, Path):
        return bundles.load(named), ""
    from tlpipe.project import Project
    from tlpipe.registry import moves, tracking

    # Those who answer need no project, where a server is named.
    if named is None:
        project = Project.find(params)
        named = Registered(model_name(project), moves.CHAMPION)
    else:
        project = Project.near(params)
    fetched = tracking.fetch_bundle(project.folder, named)
    return fetched.bundle, fetched.degraded
