"""The model card: what somebody who knows nothing of a version must know before using it.

Sections after Mitchell et al. (2019), Model cards for model reporting.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlpipe.bundle import Bundle, describe, members
from tlpipe.data import leaks, shortcuts
from tlpipe.evaluation.metrics import UNKNOWN, by_recall, describe_gap, title, why_no_threshold
from tlpipe.registry import SUFFIX
from tlpipe.registry.moves import LONGEST
from tlpipe.versioning import is_commit

_LISTED = 12
PURPOSE = "tlpipe.purpose"
_ROOM = "\N{EM SPACE}"
_HEADLINES = (
    *("accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss"),
    "calibration_error",
)
Known = Mapping[str, Mapping[str, Any]]


def of_model(name: str) -> str:
    """Return the description of a registered model, all of its versions."""
    return (
        f"An image classifier made by tlpipe. The alias champion is in production, previous was "
        f"before it, challenger is the newest. 'tlpipe promote' moves them after a comparison, "
        f"'tlpipe rollback' moves them back; {name}{SUFFIX} keeps every move ('tlpipe history')."
    )


def write(
    name: str, shipped: Bundle, known: Known, lineage: Mapping[str, str], use: str | None = None
) -> str:
    """Return the card as Markdown.

    ``known``: what the stages report, by the names of ``publishing.Content``; ``lineage``: tags
    that say where it comes from, and with ``PURPOSE`` what it is for; ``use``: how to use it, where
    it is not from the registry.
    """
    exact = known["report"]["precisions"]["fp32"]
    accuracy = exact["accuracy"]
    parts = [
        f"# {name}: {_listed(shipped.labels)}",
        f"{_built_on(shipped)}; right for "
        f"**{accuracy['value']:.1%}** of {known['report']['images']:,} test images "
        f"({accuracy['confidence']:.0%} interval {accuracy['low']:.1%} to {accuracy['high']:.1%}).",
        "## Intended use",
        lineage.get(PURPOSE)
        or f"Say which of its {len(shipped.labels)} classes an image shows. Its owner has not "
        f"written down more (register.purpose).",
        "## Results on the test split",
        _results(known),
        _weakest(exact) + ("" if use else " Pictures: plots/ among the artifacts."),
        "## Limits",
        limits(known["report"], is_soup="soup" in shipped.provenance),
        _copies(known["leaks_report"]),
        _shortcuts(known["shortcuts"]["told"]),
        "## Data",
        _data(known),
        "## How it was made",
        _made(shipped, lineage),
        "## How to use it",
        use or _use(name, shipped),
    ]
    return "\n\n".join(part for part in parts if part)


def shortened(text: str) -> str:
    """Return a card that is at most as long as MLflow keeps."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]}\n…"


def _built_on(shipped: Bundle) -> str:
    """Return what it is built on; names of members may hold what Markdown understands."""
    text = describe(shipped.provenance)
    for name in members(shipped.provenance):
        text = text.replace(name, plain(name))
    return text


def _results(known: Known) -> str:
    precisions = known["report"]["precisions"]
    rows = [
        [title(key), *(_value(measured[key]) for measured in precisions.values())]
        for key in _HEADLINES
        if key in precisions["fp32"]
    ]
    rows.append(["size", *(f"{measured['megabytes']:.1f} MB" for measured in precisions.values())])
    times = [known["speed"][precision]["milliseconds"]["1"] for precision in precisions]
    rows.append(["one answer", *(f"{time:.1f} ms" for time in times)])
    return table(["", *precisions], rows)


def _weakest(exact: Mapping[str, Any]) -> str:
    rows = exact["per_class"]
    found = [
        f"{plain(label)} ({rows[label]['recall']:.0%} of {rows[label]['images']})"
        for label in by_recall(rows)[:3]
    ]
    return f"Least often found: {', '.join(found)}."


def limits(report: Mapping[str, Any], *, is_soup: bool = False) -> str:
    """Say what it does not do, by the report of ``evaluate``."""
    abstention, ood, robustness = report["abstention"], report["ood"], report["robustness"]
    lines = []
    if report["generalisation"]["is_below"]:
        lines.append(
            f"Test accuracy is below validation accuracy beyond chance, so other images may cost "
            f"still more: {describe_gap(report['generalisation'])}."
        )
    lines += [_abstention(abstention)]
    if is_soup:
        lines.append(
            "Its members were chosen on the images held out: the accuracy there, and what is said "
            "of a threshold, are optimistic."
        )
    lines += [_ood(ood)]
    kinds = {name: steps for name, steps in robustness.items() if name not in ("images", "clean")}
    worst = min(kinds, key=lambda kind: kinds[kind][-1]["accuracy"])
    least, clean = kinds[worst][-1]["accuracy"], robustness["clean"]["accuracy"]
    images = f"on the same {robustness['images']} images as they are"
    if least < clean:
        lines.append(
            f"Strong {plain(worst)} costs most: {least:.1%} right, against {clean:.1%} {images}."
        )
    else:
        lines.append(
            f"None of {', '.join(map(plain, kinds))} costs anything: {clean:.1%} right {images}, "
            f"and no fewer with them. So few images may hold none of a rare class."
        )
    return "\n".join(f"- {line}" for line in lines)


def _ood(ood: Mapping[str, Any] | None) -> str:
    """Say how images of none of the classes are answered."""
    if ood is None:
        return (
            "It has no answer for images of anything else; how often it gives one nevertheless was "
            "not measured (evaluate.ood)."
        )
    above = "told from the test images by their probability with"
    if ood["answered"] is not None:
        above = f"{ood['answered']:.0%} were above that probability;"
    return (
        f"It has no answer for images of anything else: of {ood['images']} from "
        f"{plain(ood['source'])}, {above} AUROC {ood['auroc']:.3f}."
    )


def _copies(found: Mapping[str, Any]) -> str:
    """Say that training has seen copies of held-out images, where there are more than by chance."""
    if not found["is_above_clean"]:
        if leaks.held_out_pretrained(found):
            return f"**The accuracy may promise too much:** {leaks.describe(found)}."
        return ""
    return (
        f"**The accuracy promises too much:** {leaks.describe(found)}, clean sets show "
        f"{found['clean_share']:.0%} at most. data/leaks.json among the artifacts names some."
    )


def _shortcuts(told: Sequence[Mapping[str, Any]]) -> str:
    """Say which classes the files tell without a look at the picture, if any."""
    if not told:
        return ""
    shown = [{**row, "label": plain(row["label"])} for row in told]
    return f"**It may know the files, not the objects:** {shortcuts.warning(shown)}"


def _abstention(found: Mapping[str, Any]) -> str:
    """Say below which probability answers should be left to people, or why none is known."""
    rate, confidence_level = f"{found['error_rate']:.1%}", f"{found['confidence']:.0%}"
    if found["threshold"] is not None:
        return (
            f"Answers below a probability of {found['threshold']:.3f} should be left to people: "
            f"above it at most {rate} of all answers are wrong, whatever the class, with "
            f"{confidence_level} confidence. {_answered(found)}"
        )
    text = (
        f"No probability is known above which at most {rate} of answers are wrong "
        f"({confidence_level} confidence): {why_no_threshold(found)}."
    )
    observed = found["observed"]
    if observed["threshold"] is None:
        return text
    return (
        f"{text} Above {observed['threshold']:.3f} no more were wrong on images held out, which "
        f"promises nothing. {_answered(observed)}"
    )


def _answered(found: Mapping[str, Any]) -> str:
    right = f", {found['accuracy']['value']:.1%} right" if found["accuracy"] else ""
    return f"It leaves {found['coverage']:.0%} of test images answered{right}."


def _data(known: Known) -> str:
    data, split = known["data_report"], known["split_report"]
    parts = ", ".join(
        f"{count:,} {name}" for name, count in split["images"].items() if count and name != "unused"
    )
    counts = sorted(data["classes"].items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{plain(label)}: {count:,}" for label, count in counts[:_LISTED]]
    more = [f"and {len(counts) - _LISTED} more"] * (len(counts) > _LISTED)
    lines = [
        f"{plain(data['source'])}, {data['images']:,} images ({parts}), "
        f"{sum(data['rejected'].values()):,} files rejected",
        f"images a class: {', '.join(shown + more)}",
        f"images whose like lies in another split: {split['leaks']} found and left out",
        leaks.describe(known["leaks_report"]),
        f"labels that the other images speak against: {known['label_issues']['found']:,}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _made(shipped: Bundle, lineage: Mapping[str, str]) -> str:
    origin = shipped.provenance["origin"]
    changed = " with uncommitted changes" * (lineage.get("tlpipe.git_changed") == "true")
    rows = [
        *(["made of", plain(one)] for one in members(shipped.provenance)),
        ["backbone", f"{origin['backbone']}, weights {plain(origin['weights'])}"],
        *([["pretrained on", plain(said)]] if (said := origin.get("pretrained_on")) else []),
        ["frozen", str(origin["freeze"])],
        ["commit", f"{plain(lineage.get('tlpipe.git_commit', 'unknown'))}{changed}"],
        ["data", plain(origin["data_version"] or origin["data_sha256"])],
        ["weights", origin["weights_sha256"]],
        ["bundle", shipped.digest],
    ]
    if "ensemble" in shipped.provenance:  # each member has its own
        rows = [
            row for row in rows if row[0] not in ("backbone", "pretrained on", "frozen", "weights")
        ]
    return table(["", ""], rows)


def _use(name: str, shipped: Bundle) -> str:
    crop = shipped.preprocessing.crop_px
    rebuild = f"tlpipe rebuild {name}@champion   # the same bytes from its commit and data\n"
    is_made_of_others = bool(members(shipped.provenance))
    can_rebuild = is_commit(shipped.provenance.get("git_commit", "")) and not is_made_of_others
    return (
        f"```sh\ntlpipe predict --model {name}@champion IMAGE\n"
        f"tlpipe serve --model {name}@champion\n"
        f"{rebuild * can_rebuild}```\n\n"
        f"With MLflow alone, on RGB images of {crop} x {crop} (`uint8`, N x H x W x 3):\n\n"
        f'```python\nmodel = mlflow.onnx.load_model("models:/{name}@champion")\n'
        f"session = onnxruntime.InferenceSession(model.SerializeToString())\n"
        f'logits, probabilities = session.run(None, {{"images": images}})\n```\n\n'
        f"`bundle/` among the artifacts has the graphs, `labels.json` and `preprocessing.json`; "
        f"`model.any-size.onnx` takes images of any size."
    )


def _value(found: Mapping[str, float] | None) -> str:
    if found is None:
        return UNKNOWN
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(map(plain, labels[:_LISTED]))
    return shown if len(labels) <= _LISTED else f"{shown} and {len(labels) - _LISTED} more"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        # MLflow's page draws cells without any room between them.
        return f"| {' | '.join(f'{cell}{_ROOM}' for cell in cells)} |"

    return "\n".join([line(head), f"{'| --- ' * len(head)}|", *map(line, rows)])


def plain(text: object) -> str:
    """Return a name so that Markdown shows it as it is: classes may be called anything."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    for special in "\\`*_|<>[]#":
        printable = printable.replace(special, f"\\{special}")
    return printable[:80]
