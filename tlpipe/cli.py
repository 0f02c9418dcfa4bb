"""The command line: one command a stage, and those that people use beside the graph.

Nothing heavy is imported before a command needs it, so that ``--help`` and refusals are quick.
"""

import errno
import importlib
import logging
import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tlpipe.errors import ArtifactError, TlpipeError

if TYPE_CHECKING:
    from tlpipe.backbones.embed import Params as EmbedParams
    from tlpipe.evaluation.evaluate import Params as EvaluateParams
    from tlpipe.export.bundle import Bundle
    from tlpipe.params import Section

# The stages in the graph's order, each with the module that holds its ``Params`` and ``run``.
STAGES = {
    "ingest": "tlpipe.data.ingest",
    "split": "tlpipe.data.split",
    "embed": "tlpipe.backbones.embed",
    "audit": "tlpipe.training.audit",
    "train": "tlpipe.training.train",
    "export": "tlpipe.export.export",
    "evaluate": "tlpipe.evaluation.evaluate",
    "register": "tlpipe.registry.register",
}

_log = logging.getLogger("tlpipe")

app = typer.Typer(
    help="From labelled images to a classifier in production: reproducible, measured, served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

In = Annotated[Path, typer.Option(help="Input.")]
Out = Annotated[Path, typer.Option(help="Output.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="The file of parameters.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A bundle's folder, or NAME@ALIAS in the registry. [default: register.name@champion]",
    ),
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or another that the bundle has: int8, fp16.")
]
STAGE_PANEL = "Stages of the graph (dvc.yaml runs them)"
PARAMS_FILE = Path("params.yaml")


def main() -> None:
    """Run a command; a refusal ends in one line and its own exit code."""
    # No network unless asked for: these are read when the packages are imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("tlpipe").setLevel(logging.INFO)
    try:
        app()
    except TlpipeError as error:
        print(f"tlpipe: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        known = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        if error.filename is None or error.errno not in known:
            raise
        print(
            f"tlpipe: {_printable(str(error.filename))}: {error.strerror}; expected a folder that "
            f"may be read and written. Change its permissions, or work in another one.",
            file=sys.stderr,
        )
        raise SystemExit(ArtifactError.exit_code) from None


def load_params(path: Path) -> "dict[str, Section]":
    """Read every section, also those of other stages: an error is found before any work."""
    sections = _read_params(path)
    _check_together(sections)
    return sections


def _read_params(path: Path) -> "dict[str, Section]":
    from tlpipe import params

    models = {name: importlib.import_module(module).Params for name, module in STAGES.items()}
    return params.load(path, models)


def _check_together(sections: "dict[str, Section]") -> None:
    from tlpipe.backbones import embed
    from tlpipe.data import ingest
    from tlpipe.data.images import Sampling
    from tlpipe.training import train

    read = cast(ingest.Params, sections["ingest"])
    sampling = Sampling(short_side_px=read.short_side_px, interpolation=read.interpolation)
    frozen = cast(embed.Params, sections["embed"])
    open_stages = embed.check_freeze(frozen)
    if open_stages is not None:
        train.check_effects(cast(train.Params, sections["train"]), frozen.freeze, open_stages)
    embed.check_sampling(sampling, frozen)


def _run(stage: str, params: Path, **paths: Path) -> None:
    section = load_params(params)[stage]
    importlib.import_module(STAGES[stage]).run(params=section, **paths)


@app.command(rich_help_panel=STAGE_PANEL)
def ingest(
    manifest: Out,
    rejects: Out,
    duplicates: Out,
    pixels: Out,
    report: Out,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Read the source: list, check and decode its images once."""
    from tlpipe import versioning
    from tlpipe.data import ingest
    from tlpipe.sources import listing

    section = cast(ingest.Params, load_params(params)["ingest"])
    if (params.parent / ".dvc").is_dir():
        listing.check_written_out(section.source, "ingest.source")
    for path in versioning.readable_but_hidden(params.parent):
        _log.warning(
            "%s can be read now, but .dvcignore hides it: DVC does not see it change. Run 'tlpipe "
            "check --hide'",
            path,
        )
    ingest.run(
        manifest=manifest,
        rejects=rejects,
        duplicates=duplicates,
        pixels=pixels,
        report=report,
        data_version=versioning.data_version(params.parent),
        params=section,
    )


@app.command(rich_help_panel=STAGE_PANEL)
def split(
    manifest: In, split: Out, report: Out, placements: Out, params: ParamsFile = PARAMS_FILE
) -> None:
    """Say which image trains, validates or tests."""
    outputs = {"split": split, "report": report, "placements": placements}
    _run("split", params, manifest=manifest, **outputs)


@app.command(rich_help_panel=STAGE_PANEL)
def embed(manifest: In, pixels: In, activations: Out, params: ParamsFile = PARAMS_FILE) -> None:
    """Run the pretrained network once over every image."""
    from tlpipe.backbones import embed, weights

    section = cast(embed.Params, load_params(params)["embed"])
    if section.weights.startswith(weights.REGISTERED):
        section = _with_registered_weights(section)
    embed.run(manifest=manifest, pixels=pixels, activations=activations, params=section)


@app.command(rich_help_panel=STAGE_PANEL)
def audit(
    manifest: In,
    pixels: In,
    split: In,
    activations: In,
    data_report: In,
    label_issues: Out,
    leaks: Out,
    plots: Out,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Show the data set, label issues, and held-out images with copies in train."""
    known = {"pixels": pixels, "split": split, "activations": activations}
    outputs = {"label_issues": label_issues, "leaks_report": leaks, "plots": plots}
    _run("audit", params, manifest=manifest, data_report=data_report, **known, **outputs)


@app.command(rich_help_panel=STAGE_PANEL)
def train(
    activations: In,
    pixels: In,
    split: In,
    model: Out,
    history: Out,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Fit what is not frozen."""
    from tlpipe.registry import register, tracking
    from tlpipe.training import train

    sections = load_params(params)
    name = cast(register.Params, sections["register"]).name
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun numbers the processes it starts
    if is_first:
        _say_what_changed(split, params.parent, name)
    with ExitStack() as stack:
        is_live = is_first and "MLFLOW_TRACKING_URI" in os.environ
        train.run(
            activations=activations,
            pixels=pixels,
            split=split,
            model=model,
            history=history,
            params=cast(train.Params, sections["train"]),
            is_first=is_first,
            live=stack.enter_context(tracking.live_run(Path(), name)) if is_live else None,
        )


@app.command("lr-find")
def lr_find(
    plot: Annotated[Path, typer.Option(help="Where to draw it.")] = Path("artifacts/lr-find.png"),
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Raise the learning rates step by step and suggest those where the loss falls fastest."""
    from tlpipe.training import lr_find, train
    from tlpipe.versioning import stage_paths

    section = cast(train.Params, load_params(params)["train"])
    given = stage_paths("train", params.parent)
    known = {name: given[name] for name in ("activations", "pixels", "split")}
    found = lr_find.run(**known, plot=plot, params=section)
    if found.learning_rates is None:
        print(f"the loss never falls: {plot}")
    else:
        print(f"train.head_lr: {found.learning_rates.head:.2g}")
        if found.open_stages:
            print(f"train.backbone_lr: {found.learning_rates.backbone:.2g}")
        print(f"see {plot}")


@app.command("cross-validate")
def cross_validate(
    folds: Annotated[
        int | None, typer.Option(min=3, max=20, help="How many. [default: split.folds]")
    ] = None,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Train and test once for each fold; give each number's mean over folds with its interval."""
    from tlpipe.evaluation import cross_validation
    from tlpipe.versioning import stage_paths

    sections = load_params(params)
    if folds is not None:
        sections["split"] = sections["split"].model_copy(update={"folds": folds})
    stages = {name: importlib.import_module(STAGES[name]).run for name in cross_validation.STAGES}
    folder = params.parent / "artifacts" / "cross-validation"
    report = cross_validation.run(
        **stage_paths("embed", params.parent),
        placements=stage_paths("split", params.parent)["placements"],
        folder=folder,
        workspace=params.parent,
        stages=stages,
        params=sections,
    )
    _print_folds(report)
    print(f"see {folder}")


@app.command(rich_help_panel=STAGE_PANEL)
def export(
    model: In, pixels: In, split: In, bundle: Out, parity: Out, params: ParamsFile = PARAMS_FILE
) -> None:
    """Write the ONNX bundle, proven equal to the trained model."""
    paths = {"model": model, "pixels": pixels, "split": split, "bundle": bundle, "parity": parity}
    _run("export", params, **paths, workspace=params.parent)


@app.command(rich_help_panel=STAGE_PANEL)
def evaluate(
    bundle: In,
    pixels: In,
    manifest: In,
    split: In,
    held_out: In,
    history: In,
    report: Out,
    speed: Out,
    predictions: Out,
    tables: Out,
    plots: Out,
    examples: Out,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Measure the bundle on the test split."""
    from tlpipe.evaluation import evaluate

    images = {"pixels": pixels, "manifest": manifest, "split": split}
    trained = {"bundle": bundle, "held_out": held_out, "history": history}
    texts = {"report": report, "speed": speed, "predictions": predictions, "tables": tables}
    pictures = {"plots": plots, "examples": examples}
    section = _with_ood_that_fits(load_params(params))
    evaluate.run(**images, **trained, **texts, **pictures, params=section)


@app.command(rich_help_panel=STAGE_PANEL)
def register(
    model: In,
    bundle: In,
    parity: In,
    report: In,
    speed: In,
    predictions: In,
    plots: In,
    examples: In,
    history: In,
    data_report: In,
    split_report: In,
    rejects: In,
    label_issues: In,
    leaks: In,
    data_plots: In,
    pixels: In,
    manifest: In,
    split: In,
    receipt: Out,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Make the bundle a run and a model version in MLflow."""
    from tlpipe.data import ingest
    from tlpipe.registry import register
    from tlpipe.registry.gate import Measured
    from tlpipe.registry.publishing import Content

    sections = load_params(params)
    content = Content(
        model=model,
        bundle=bundle,
        parity=parity,
        report=report,
        speed=speed,
        predictions=predictions,
        plots=plots,
        examples=examples,
        history=history,
        data_report=data_report,
        split_report=split_report,
        rejects=rejects,
        label_issues=label_issues,
        leaks=leaks,
        data_plots=data_plots,
        manifest=manifest,
        split=split,
    )
    register.run(
        content=content,
        measured=Measured(pixels=pixels, manifest=manifest, split=split),
        receipt=receipt,
        workspace=Path(),
        source=cast(ingest.Params, sections["ingest"]),
        params=cast(register.Params, sections["register"]),
    )


@app.command()
def promote(
    version: Annotated[
        str | None,
        typer.Argument(help="Its number or an alias; by default what was registered from here."),
    ] = None,
    force: Annotated[
        str, typer.Option(metavar="WHY", help="Put it in production although the gate refuses it.")
    ] = "",
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Copy it to this MLflow server, and do so there. Its account: the variables of "
            "MLflow with TO_ before them, such as TO_MLFLOW_TRACKING_TOKEN.",
        ),
    ] = None,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Put a version in production, if it passes the gate against the one that is there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tlpipe.data import ingest
    from tlpipe.registry import promotion, register, tracking, transfer
    from tlpipe.registry.gate import Decision, Measured
    from tlpipe.versioning import stage_paths

    sections = load_params(params)
    section = cast(register.Params, sections["register"])
    given = stage_paths("register", params.parent)
    version = version or register.registered(given["receipt"], given["bundle"], section.name)

    def show(decision: Decision) -> None:
        against = f"version {decision.champion}" if decision.champion else "nothing before it"
        title = f"{section.name} version {decision.candidate} against {against}"
        table = Table("rule", "found", "expected", "", title=escape(title), title_justify="left")
        for rule in decision.rules:
            colour = {"holds": "green", "fails": "red", "cannot tell": "yellow"}[rule.verdict]
            found, expected = (escape(_printable(text)) for text in (rule.found, rule.expected))
            table.add_row(rule.name, found, expected, f"[{colour}]{rule.verdict}[/{colour}]")
        Console().print(table)

    if to is not None:
        version = transfer.copy(params.parent, section.name, version, to)
    with tracking.connection(params.parent, address=to) as client:
        moved = promotion.promote(
            client,
            section.name,
            version,
            measured=Measured(**{name: given[name] for name in ("pixels", "manifest", "split")}),
            source=cast(ingest.Params, sections["ingest"]),
            bounds=section.gate,
            force=force,
            show=show,
        )
    print(f"{section.name} version {moved.champion} is in production, {_before(moved.previous)}")


@app.command()
def rollback(
    version: Annotated[
        str | None, typer.Argument(help="Its number or alias; by default the one before.")
    ] = None,
    why: Annotated[str, typer.Option(help="The reason, for the history.")] = "",
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Put back what was in production before."""
    from tlpipe.registry import promotion, register, tracking

    name = cast(register.Params, _read_params(params)["register"]).name
    with tracking.connection(params.parent) as client:
        moved = promotion.rollback(client, name, version, why)
    print(f"{name} version {moved.champion} is in production again, {_before(moved.previous)}")


@app.command()
def history(
    at: Annotated[
        str | None, typer.Option(help="A date or a moment (ISO 8601; UTC): what was there then.")
    ] = None,
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Say which version was in production, since when, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from tlpipe.registry import moves, promotion, register, tracking

    name = cast(register.Params, _read_params(params)["register"]).name
    with tracking.connection(params.parent) as client:
        log, now = promotion.history(client, name)
    if at is not None:
        log = moves.during(log, *promotion.period(at))
    if not log:
        if at is None and now:
            print(f"{name} version {now} is in production; nobody has promoted it with tlpipe")
            return
        print(f"nothing of {name} was in production{f' at {at}' if at else ' yet'}")
        return
    table = Table(Column("since (UTC)", no_wrap=True), "version", "before", "move", "by", "why")
    for move in log:
        since = f"{move.at:%Y-%m-%d %H:%M:%S}"
        words = (escape(_printable(text)) for text in (move.kind, move.by, move.why))
        table.add_row(since, move.champion or "none", move.previous or "none", *words)
    Console().print(table)
    if at is None and now != log[-1].champion:
        print(
            f"now {f'version {now}' if now else 'none'} is in production: its alias was moved in "
            f"MLflow since. The next 'register', 'promote' or 'rollback' writes that down."
        )


@app.command()
def rebuild(
    model: Annotated[str, typer.Argument(help="NAME@ALIAS or NAME@VERSION in the registry.")],
    repository: Annotated[
        str | None, typer.Option(help="What to clone. [default: this project, or its origin]")
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
    """Make a registered bundle once more, from its commit and data alone, and compare the bytes."""
    from tlpipe.registry import rebuild

    def confirm(what: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"Run {_printable(what)}?"))

    version, digest = rebuild.run(
        reference=model,
        repository=repository,
        keep=output,
        workspace=Path(),
        confirm=confirm,
        with_credentials=with_credentials,
    )
    print(f"{model} (version {version}) came out with the same bytes: {digest}")


def _before(previous: str) -> str:
    return f"version {previous} was before" if previous else "the first one"


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    precision: PrecisionOption = "fp32",
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Answer for image files with the model in production."""
    from tlpipe.inference import predict

    bundle, _ = _bundle(model, params)
    answers = predict.run(bundle=bundle, images=images, precision=precision)
    if as_json:
        import json

        print(json.dumps(answers, indent=2))
    else:
        _print_answers(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(4)


@app.command()
def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    precision: PrecisionOption = "fp32",
    params: ParamsFile = PARAMS_FILE,
) -> None:
    """Answer over HTTP: POST the bytes of an image to /predict."""
    from tlpipe.serving import serve

    bundle, degraded = _bundle(model, params)
    serve.run(bundle=bundle, degraded=degraded, host=host, port=port, precision=precision)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
) -> None:
    """Show this folder's registry in the browser: MLflow's own pages."""
    from tlpipe.registry import local, tracking

    tracking.check_own(Path())
    # Made or moved here first: the server would keep artifacts where the folder was before.
    with tracking.connection(Path(), create=True):
        pass
    store = ("--backend-store-uri", local.address(Path()))
    root = ("--default-artifact-root", local.artifacts(Path()))
    where = ("--host", "127.0.0.1", "--port", str(port))
    server = [sys.executable, "-P", "-m", "mlflow", "server", *store, *root, *where]
    os.execv(sys.executable, server)  # noqa: S606


@app.command()
def summary(receipt: Annotated[Path, typer.Argument(help="What register wrote.")]) -> None:
    """Show what the pipeline made last, and what comes next."""
    from rich.console import Console
    from rich.table import Table

    from tlpipe.registry import summary

    table = Table(show_header=False, title="tlpipe", title_justify="left")
    rows, following = summary.run(receipt=receipt, workspace=Path())
    for name, value in rows:
        table.add_row(name, value)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"next: {following}", markup=False)


BundleArgument = Annotated[
    str, typer.Argument(help="A folder that export wrote, or NAME@ALIAS in the registry.")
]
SignatureOption = Annotated[
    Path | None, typer.Option(help="The file of a folder's signature; by default FOLDER.sig.")
]


@app.command()
def verify(
    bundle: BundleArgument,
    key: Annotated[Path | None, typer.Option(help="Public key, PEM: check who signed it.")] = None,
    signature: SignatureOption = None,
) -> None:
    """Check every file of a bundle by its hash, and its signature where a key is given."""
    from tlpipe.export import bundle as bundles
    from tlpipe.export import signing

    if _is_registered(bundle):
        from tlpipe.registry import signatures

        found = signatures.verify(Path(), bundle, key)
    else:
        folder = Path(bundle)
        if key is not None:
            signing.check(folder, key, signature or signing.beside(folder))
        found = bundles.load(folder)
    signed = f"signed by the owner of {key}" if key else "signature not checked: no --key"
    print(f"{bundle} is whole: {found.digest}, {', '.join(found.graphs)}; {signed}")


@app.command()
def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Private key of an elliptic curve, PEM.")],
    signature: SignatureOption = None,
) -> None:
    """Sign a bundle, so that others can check who made it."""
    from tlpipe.export import bundle as bundles
    from tlpipe.export import signing

    if _is_registered(bundle):
        from tlpipe.registry import signatures

        found = signatures.sign(Path(), bundle, key)
        print(f"signed {found.digest}: {signing.ARTIFACT} of {bundle}")
        return
    found = bundles.load(Path(bundle))
    target = signature or signing.beside(found.folder)
    signing.sign(found.folder, key, target)
    print(f"signed {found.digest}: {target}")


@app.command()
def check(
    params: ParamsFile = PARAMS_FILE,
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
    from tlpipe import files, lineage, versioning
    from tlpipe.backbones import embed
    from tlpipe.data import ingest, overview
    from tlpipe.evaluation import answers
    from tlpipe.registry import changes, register
    from tlpipe.sources import listing
    from tlpipe.sources.storage import Folder

    sections = load_params(params)
    for folder in filter(Path.is_dir, (params.parent, params.parent / "artifacts")):
        files.check_writable(folder)
    to_fetch = embed.check_weights(cast(embed.Params, sections["embed"]))
    for said in filter(None, (to_fetch, lineage.other_versions(params.parent))):
        print(said)
    name = cast(register.Params, sections["register"]).name
    for said in changes.run(workspace=params.parent, name=name):
        print(_printable(said))
    section = cast(ingest.Params, sections["ingest"])
    ood = _with_ood_that_fits(sections).ood
    listing.check_written_out(section.source, "ingest.source")
    if ood:
        listing.check_written_out(ood, "evaluate.ood")
    with ingest.opened(section) as source, answers.opened(ood) if ood else nullcontext():
        for note in (*source.notes, *overview.describe(source.candidates())):
            print(_printable(note))
        links = list(source.storage.links_outside()) if isinstance(source.storage, Folder) else []
    if source.rejects:
        first = source.rejects[0]
        print(
            f"{len(source.rejects)} will be rejected ({ingest.counted(source.rejects)}), the first "
            f"is {_printable(f'{first.path}: {first.detail}')}"
        )
        most = section.max_rejected
        ingest.check_rejected(source.rejects, source.counts.total(), most, "ingest lists each")
    if links:
        (name, target), *_ = links
        print(
            f"{len(links)} links lead outside of {section.source} and will be rejected, the first "
            f"is {_printable(f'{name} -> {target}')}. ingest.follow_links: true reads what they "
            f"lead to."
        )
    versioning.check_hidden(params.parent, Path(section.source), hide=hide)


@app.command()
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


@app.command(hidden=True)
def schema() -> None:
    """Print the JSON Schema of params.yaml."""
    from tlpipe import params
    from tlpipe.files import json_bytes

    models = {name: importlib.import_module(module).Params for name, module in STAGES.items()}
    print(json_bytes(params.json_schema(models)).decode(), end="")


def _with_ood_that_fits(sections: "dict[str, Section]") -> "EvaluateParams":
    """Leave out the built-in out-of-distribution images where the classes are not built-in ones.

    How often a classifier of tumours answers for brick says nothing about it.
    """
    from tlpipe.data import ingest
    from tlpipe.evaluation import evaluate
    from tlpipe.sources.listing import is_builtin

    section = cast(evaluate.Params, sections["evaluate"])
    source = cast(ingest.Params, sections["ingest"]).source
    if not is_builtin(section.ood) or is_builtin(source):
        return section
    _log.info(
        "evaluate.ood is %s, an example for built-in classes, and left out: name a folder of "
        "images that the classifier may meet but shall not know",
        section.ood,
    )
    return section.model_copy(update={"ood": ""})


def _with_registered_weights(section: "EmbedParams") -> "EmbedParams":
    """Fetch the weights of a registered model, and pin what was found."""
    from tlpipe.errors import WeightsError
    from tlpipe.registry import tracking
    from tlpipe.training import registered

    folder = tracking.fetch_model(Path(), section.weights)
    sha256 = registered.keep_weights(folder, section.backbone)
    if section.weights_sha256 not in (None, sha256):
        raise WeightsError(
            f"{section.weights} has the sha256 {sha256}; embed.weights_sha256 is "
            f"{section.weights_sha256}. The alias has moved: change one of them in params.yaml."
        )
    return section.model_copy(update={"weights_sha256": sha256})


def _say_what_changed(split: Path, workspace: Path, name: str) -> None:
    """Say which classes were taken away or added since the model in production was trained."""
    from tlpipe.data.manifest import load_split
    from tlpipe.registry import gate, moves, tracking

    if (known := tracking.champion_labels(workspace, name)) is None:
        return
    labels = {row.label for row in load_split(split) if row.split == "train"}
    if what := _printable(gate.label_changes(known, labels)):
        _log.warning("the classes differ from those of %s@%s: %s", name, moves.CHAMPION, what)


def _bundle(model: str | None, params: Path) -> "tuple[Bundle, str]":
    """Load a bundle from a folder, or fetch it from the registry; and why it is an older one."""
    from tlpipe.export import bundle

    if model is not None and not _is_registered(model):
        return bundle.load(Path(model)), ""
    from tlpipe.registry import moves, register, tracking

    if model is None:
        # Those who answer need not have what describes a backbone.
        section = cast(register.Params, _read_params(params)["register"])
        model = f"{section.name}@{moves.CHAMPION}"
    fetched = tracking.fetch_bundle(Path(), model)
    return fetched.bundle, fetched.degraded


def _is_registered(model: str) -> bool:
    """Return whether it names a version in the registry, and no folder."""
    return "@" in model and not Path(model).exists()


def _print_answers(answers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("image", overflow="fold"), "label", "probability", "next")
    for answer in answers:
        name = escape(_printable(answer["path"]))
        if "error" in answer:
            table.add_row(name, f"[red]{escape(_printable(answer['error']))}[/red]")
            continue
        _, *others = answer["probabilities"].items()
        following = ", ".join(f"{_printable(label)} {p:.3f}" for label, p in others[:2])
        label = escape(_printable(answer["label"]))
        table.add_row(name, label, f"{answer['probability']:.3f}", escape(following))
    Console().print(table)


def _print_folds(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tlpipe.evaluation.evaluate import describe
    from tlpipe.evaluation.metrics import title

    names = [name for name in report["mean"] if not name.startswith("top_")]
    table = Table("split.\nfold", *(title(name).replace(" ", "\n") for name in names))
    for column in table.columns:
        column.justify = "right"
    for fold in report["folds"]:
        table.add_row(str(fold["fold"]), *(f"{fold['metrics'][name]:.3f}" for name in names))
    table.add_section()
    means = [report["mean"][name] for name in names]
    table.add_row("mean", *(f"{mean['value']:.3f}\n+-{mean['half_width']:.3f}" for mean in means))
    Console().print(table)
    pooled = report["pooled"]
    share = f"{means[0]['confidence']:.0%}"
    print(f"+-: {share} interval, corrected for the training images that folds share")
    print(f"pooled: accuracy {describe(pooled['accuracy'])} on {pooled['images']} images")


class _Printable(logging.Formatter):
    """Messages may quote names of files, and what others wrote into a registry."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return _printable(super().formatMessage(record))


def _printable(text: str) -> str:
    """Escape what would move the cursor, colour the terminal or be no UTF-8: names may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
