"""What commands print: tables, and names that are safe to print."""

from collections.abc import Iterable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlpipe.registry.ensemble import Made, Row
    from tlpipe.registry.gate import Decision
    from tlpipe.registry.moves import Move
    from tlpipe.sweep.report import Found
    from tlpipe.training.advise import Advice
    from tlpipe.training.pretrain import Pretrained

_LISTED = 20  # classes
_METRICS = (
    *("accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss"),
    "calibration_error",
)


def printable(text: str) -> str:
    """Escape what would move the cursor, colour the terminal or be no UTF-8: names may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(content: object) -> None:
    """Print JSON for programs."""
    import json

    print(json.dumps(content, indent=2))


def print_answers(answers: list[dict[str, Any]]) -> None:
    """Print the answers for images."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("image", overflow="fold"), "label", "probability", "next")
    for answer in answers:
        name = escape(printable(answer["path"]))
        if "error" in answer:
            table.add_row(name, f"[red]{escape(printable(answer['error']))}[/red]")
            continue
        _, *others = answer["probabilities"].items()
        following = ", ".join(f"{printable(label)} {p:.3f}" for label, p in others[:2])
        label = escape(printable(answer["label"]))
        table.add_row(name, label, f"{answer['probability']:.3f}", escape(following))
    Console().print(table)


def print_folds(report: dict[str, Any]) -> None:
    """Print what each fold measured, and the means with their intervals."""
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
    if report["copies"]:
        print(
            f"too good to be true: {report['copies']}, and folds share them as splits do. Keep the "
            f"copies of an original in one group, and ask again"
        )


def print_advice(advice: "Advice") -> None:
    """Print what each boundary gives, the recommendation, its reasons and its place."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("boundary", "accuracy of a linear probe", "LogME")
    table.columns[2].justify = "right"
    rows = [(found.name, found) for found in advice.boundaries]
    for name, found in (*rows, (f"{advice.random.name}, random weights", advice.random)):
        accuracy = "{value:.3f} ({low:.3f} to {high:.3f})".format(**found.accuracy)
        table.add_row(escape(printable(name)), accuracy, f"{found.logme:.2f}")
    Console().print(table)
    print(f"recommended: embed.freeze: {printable(advice.freeze)}")
    for reason in advice.reasons:
        print(f"- {printable(reason)}")
    print(f"in the lectures' table: {advice.place}")


def print_pretrained(found: "Pretrained") -> None:
    """Print what linear probes make of the weights before and after, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    confidence = f"{found.gains[0].change['confidence']:.0%} interval"
    headings = (f"{name}\n({confidence})" for name in ("before", "after", "difference"))
    table = Table("linear probe on", "images", *headings)
    for gain in found.gains:
        change = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**gain.change)
        row = (gain.of, f"{gain.images:,}", _value(gain.before), _value(gain.after), change)
        table.add_row(*row)
    Console().print(table)
    print(found.verdict)


def print_sweep(found: "Found") -> None:
    """Print the table of a sweep, and what follows from it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tlpipe.sweep import report

    if found.rows and not found.trials:
        table = Table("freeze", "images", "validation", "test", "seeds")
        for column in (table.columns[1], table.columns[2]):
            column.justify = "right"
        for row in found.rows:
            spread = f"{min(row.seeds):.3f} to {max(row.seeds):.3f}" if len(row.seeds) > 1 else ""
            option = row.option.partition(":")[0]
            table.add_row(
                escape(printable(f"{row.level} ({option})" if option else row.level)),
                f"{row.images:,}",
                f"{row.validation:.3f}",
                report.shown(row.test),
                spread,
            )
        Console().print(table)
        print(report.title(found.rows))
    for said in report.conclusion(found):
        print(printable(said))
    print(f"see {report.PICTURE} and {report.TABLE}")


def print_ensemble(made: "Made") -> None:
    """Print what each member and all together came to, and the difference to the best member."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("member", "weight", "accuracy, held out", "log loss", "accuracy, test")
    for row in made.members:
        name = escape(printable(row.name))
        table.add_row(name, f"{row.weight:.3f}", *_columns(row))
    table.add_section()
    table.add_row("all together", "", *_columns(made.together))
    for column in (table.columns[1], table.columns[3]):
        column.justify = "right"
    Console().print(table)
    change = made.change
    how = (
        "its members were chosen on them, so what stands there of all together is optimistic"
        if made.is_soup
        else "what stands there of all together is by weights that were fitted without the image"
    )
    print(f"{made.images:,} images were held out of all members; {how}")
    print(
        f"on {made.tested:,} test images, beside {printable(made.best)}, the best member on images "
        f"held out: {change['value']:+.4f} ({change['confidence']:.0%} interval "
        f"{change['low']:+.4f} to {change['high']:+.4f})"
    )


def _columns(row: "Row") -> tuple[str, str, str]:
    return _value(row.held_out), f"{row.log_loss:.3f}", _value(row.test)


def print_decision(name: str, decision: "Decision") -> None:
    """Print what the gate found, rule by rule."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def called(version: str) -> str:
        return f"{name} version {version}" if version.isdecimal() else version

    against = called(decision.champion) if decision.champion else "nothing before it"
    title = printable(f"{called(decision.candidate)} against {against}")
    table = Table("rule", "found", "expected", "", title=escape(title), title_justify="left")
    for rule in decision.rules:
        colour = {"holds": "green", "fails": "red", "cannot tell": "yellow"}[rule.verdict]
        found, expected = (escape(printable(text)) for text in (rule.found, rule.expected))
        table.add_row(rule.name, found, expected, f"[{colour}]{rule.verdict}[/{colour}]")
    Console().print(table)


def print_moves(log: "list[Move]") -> None:
    """Print moves, the oldest first."""
    _print_moves(
        (f"{move.at:%Y-%m-%d %H:%M:%S}", move.champion, move.previous, move.kind, move.by, move.why)
        for move in log
    )


def _print_moves(rows: Iterable[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("since (UTC)", no_wrap=True), "version", "before", "move", "by", "reason")
    for since, version, before, *words in rows:
        shown = (escape(printable(text)) for text in words)
        table.add_row(since, version or "none", before or "none", *shown)
    Console().print(table)


def print_versions(name: str, found: list[dict[str, Any]]) -> None:
    """Print the versions of a model, the oldest first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    if not found:
        print(f"{name} has no version: all that were registered were deleted in MLflow")
        return
    table = Table(
        Column("version", justify="right"),
        "accuracy",
        "aliases",
        Column("registered (UTC)", no_wrap=True),
        "by",
        Column("from", overflow="fold"),
        title=escape(printable(name)),
        title_justify="left",
    )
    for one in found:
        words = (", ".join(one["aliases"]), _minute(one["registered_at"]), one["registered_by"])
        table.add_row(
            one["version"],
            _value(one["accuracy"]),
            *(escape(printable(text)) for text in words),
            escape(printable(_origin(one))),
        )
    Console().print(table)


def print_model(found: dict[str, Any]) -> None:
    """Print what is known of one model, of the registry or a folder."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    title = f"{found['name']} version {found['version']}" if "version" in found else found["folder"]
    table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False)
    table.title, table.title_justify = escape(printable(title)), "left"
    for key, value in _facts(found):
        table.add_row(key, escape(printable(value)))
    Console().print(table)
    if precisions := found.get("precisions"):
        _print_precisions(precisions)
    if moves := found.get("moves"):
        keys = ("version", "previous", "kind", "by", "reason")
        _print_moves((_minute(move["at"]), *(move[key] for key in keys)) for move in moves)


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows that say what it is and where it comes from."""
    provenance, origin = found["provenance"], found["provenance"]["origin"]
    rows = []
    if "version" in found:
        who = found["registered_by"] or "unknown"
        rows = [
            ("aliases", ", ".join(found["aliases"]) or "none"),
            ("registered", f"{_minute(found['registered_at'])} UTC by {who}"),
            ("from", _origin(found)),
            ("gate", found["gate"] or "not asked yet"),
        ]
    labels, signed = found["classes"], "there; 'tlpipe verify' checks it with --key"
    more = f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else ""
    graphs = (f"{name} {graph['bytes'] / 1e6:.1f} MB" for name, graph in found["graphs"].items())
    packages = (f"{name} {version}" for name, version in provenance["packages"].items())
    return [
        *rows,
        ("classes", f"{len(labels)}: {', '.join(labels[:_LISTED])}{more}"),
        *_weakest(found.get("precisions", {}).get("fp32")),
        *_limits(found.get("limits")),
        *_built_on(provenance),
        ("data", origin["data_version"] or origin["data_sha256"]),
        ("commit", provenance["git_commit"] or "none"),
        ("packages", ", ".join(packages)),
        ("graphs", ", ".join(graphs)),
        ("bundle", f"{found['bundle']}, intact"),
        ("signature", signed if found["is_signed"] else "none"),
    ]


def _built_on(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows that say what it is built on."""
    from tlpipe.bundle import members

    origin, rows = provenance["origin"], [("made of", ", ".join(members(provenance)))]
    if "ensemble" in provenance:  # each member has its own
        return rows
    backbone = ("backbone", f"{origin['backbone']}, weights {origin['weights']}")
    if said := origin.get("pretrained_on"):
        rows.append(("pretrained on", said))
    return [*filter(itemgetter(1), rows), backbone, ("frozen", str(origin["freeze"]))]


def _limits(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the rows that say how far the numbers hold."""
    if not found:
        return []
    from tlpipe.data import leaks
    from tlpipe.evaluation.metrics import describe_gap, why_no_threshold

    abstention, ood = found["abstention"], found["ood"]
    if abstention["threshold"] is None:
        threshold = f"none: {why_no_threshold(abstention)}"
    else:
        threshold = (
            f"{abstention['threshold']:.3f}: above it at most {abstention['error_rate']:.1%} are "
            f"wrong, and {abstention['coverage']:.0%} of test images are answered"
        )
    unknown = "not measured (evaluate.ood)"
    if ood is not None:
        unknown = f"AUROC {ood['auroc']:.3f} on {ood['images']} from {ood['source']}"
    return [
        ("validation and test", describe_gap(found["generalisation"])),
        ("copies", leaks.describe(found["copies"])),
        ("threshold", threshold),
        ("out of distribution", unknown),
    ]


def _weakest(measured: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return a row with the classes that are found least often."""
    if measured is None:
        return []
    from tlpipe.evaluation.metrics import by_recall

    rows = measured["per_class"]
    worst = by_recall(rows)[:3]
    said = (f"{name} ({rows[name]['recall']:.0%} of {rows[name]['images']})" for name in worst)
    return [("least often found", ", ".join(said))]


def _print_precisions(precisions: dict[str, Any]) -> None:
    """Print what was measured on the test split, a column for each precision."""
    from rich.console import Console
    from rich.table import Table

    from tlpipe.evaluation.metrics import title

    table = Table("test split", *precisions)
    for key in _METRICS:
        table.add_row(title(key), *(_value(measured.get(key)) for measured in precisions.values()))
    table.add_row("size", *(f"{measured['megabytes']:.1f} MB" for measured in precisions.values()))
    times = (f"{measured['milliseconds']:.1f} ms" for measured in precisions.values())
    table.add_row("one answer", *times)
    Console().print(table)


def _value(found: dict[str, float] | None) -> str:
    if found is None:
        return "unknown"
    interval = f" ({found['low']:.3f} to {found['high']:.3f})" if "low" in found else ""
    return f"{found['value']:.3f}{interval}"


def _origin(found: dict[str, Any]) -> str:
    """Return the commit, and where that is, as far as it is known."""
    commit = found["git_commit"][:10] or "no commit"
    changes = " with uncommitted changes" if found["git_changed"] else ""
    place = "/".join(filter(None, (found["git_remote"], found["git_folder"].rstrip("/"))))
    copied = f"copied from {found['copied_from']}" if found["copied_from"] else ""
    return ", ".join(filter(None, (found["made_of"], f"{commit}{changes}", place, copied)))


def _minute(moment: str) -> str:
    """Return a time in ISO 8601 without its seconds and zone."""
    return moment[:16].replace("T", " ")
