"""Command ``sweep``: many trainings over freeze levels, numbers of images, seeds and parameters."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tlpipe.cli.projects import check, make_current, run_python
from tlpipe.cli.stages import ParamsFile, enter, sections, with_registered_weights
from tlpipe.cli.tables import print_sweep
from tlpipe.errors import ParamsError

if TYPE_CHECKING:
    from tlpipe.backbones.embed import Params as EmbedParams


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)


def sweep(
    freeze: Annotated[
        str | None,
        typer.Option(
            metavar="LEVELS",
            help="Freeze levels, as embed.freeze names them. (default: all,none; with --search the "
            "project's own)",
        ),
    ] = None,
    images: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Numbers of training images, or all.")
    ] = "all",
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="How often each, on other images.")
    ] = 1,
    backbones: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Backbones. (default: the project's own)"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V1,V2", help="Values of a key of embed or train."),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH",
            help="Search a key of train for the least validation loss, in a range or among V1,V2.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many trials a search has.")
    ] = 20,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop in time, with what there is: 30m."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray: HOST:PORT or ray://HOST:PORT. (default: one of its own)"),
    ] = None,
    params: ParamsFile = None,
) -> None:
    """Train over freeze levels, numbers of images, seeds and parameters; draw accuracy by them.

    After a kill or the end of --budget, the same command goes on.
    """
    from tlpipe import cells as work
    from tlpipe.sweep import grid
    from tlpipe.sweep import search as searches
    from tlpipe.sweep import sweep as sweeps

    began = time.time()
    sweeps.check_installed()
    seconds = None if budget is None else sweeps.read_budget(budget)
    ranges = [searches.read_range(text) for text in search or ()]
    if address is not None and not sweeps.is_address(address):
        raise ParamsError(
            f"--address is {address!r}; expected that of a running Ray, HOST:PORT or "
            f"ray://HOST:PORT. 'ray start --head' says its own."
        )
    settings = [grid.read_setting(text) for text in set_ or ()]
    if twice := [key for n, (key, _) in enumerate(settings) if key in dict(settings[:n])]:
        raise ParamsError(f"--set {twice[0]} stands twice; expected all of its values in one.")
    project = enter(params)
    make_current(project)
    for stage in sweeps.STAGES:
        project.check_code(stage)
    own = cast("EmbedParams", project.sections()["embed"]).freeze
    levels = ((own,) if ranges else ("all", "none")) if freeze is None else grid.read_freeze(freeze)
    asked = grid.Asked(
        levels, grid.read_images(images), grid.read_backbones(backbones), seeds, dict(settings)
    )
    cells = sweeps.cells(asked, ranges)
    check(project.params)
    run_python("-m", "dvc", "repro", "split")
    name = cast(Any, sections(project)["register"]).name
    with work.exclusive(Path()) as lock:
        plan = sweeps.plan(
            cells,
            ranges,
            trials,
            name,
            with_registered_weights,
            deadline=None if seconds is None else began + seconds,
            address=address,
            budget=seconds or 0.0,
        )
        print(sweeps.describe(plan))
        sys.stdout.flush()
        failed = None
        try:
            if plan["todo"] and (seconds is None or time.time() < began + seconds):
                run_python(str(Path("flows", "sweep.py")), inherit=(lock,))
        except typer.Exit as end:  # what others came to is worth a picture all the same
            failed = end
        print_sweep(sweeps.finish(plan))
        if failed is not None:
            raise failed
