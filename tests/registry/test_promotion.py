"""The gate, promotion, rollback and history, through the commands, on a registry of its own."""

import json
import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import PATIENCE_S, Workspace, wait_until
from tests.registry.conftest import REGISTER, Said, change_bundle, killed_after_each_write
from tlpipe import bundle, files

if TYPE_CHECKING:
    from mlflow import MlflowClient

Tlpipe = Callable[..., Said]


def client_of(workspace: Workspace) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")


def run_of(client: "MlflowClient", version: int) -> str:
    run = client.get_model_version("digits", str(version)).run_id
    assert run is not None
    return run


def aliases(workspace: Workspace) -> dict[str, int]:
    found = client_of(workspace).get_registered_model("digits").aliases
    return {name: int(number) for name, number in found.items()}


def tags(workspace: Workspace, version: int) -> dict[str, str]:
    found = client_of(workspace).get_model_version("digits", str(version)).tags
    return {k.removeprefix("tlpipe."): v for k, v in found.items() if k.startswith("tlpipe.gate")}


def decisions(workspace: Workspace, version: int) -> list[dict[str, Any]]:
    client = client_of(workspace)
    run = run_of(client, version)
    found = sorted(artifact.path for artifact in client.list_artifacts(run, "gate"))
    return [json.loads(Path(client.download_artifacts(run, path)).read_text()) for path in found]


def blinded(folder: Path, number: int) -> dict[str, bytes]:
    """Return the graphs of a bundle, the exact one without an eye for one class."""
    graphs = {name: path.read_bytes() for name, path in bundle.load(folder).graphs.items()}
    model = onnx.load_from_string(graphs["fp32"])
    classes = len(bundle.load(folder).labels)
    (bias,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [classes]]
    values = numpy_helper.to_array(bias).copy()
    values[number] = -1e4
    bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), bias.name))
    return {**graphs, "fp32": model.SerializeToString()}


@pytest.mark.slow
@pytest.mark.fault("R05", "R06", "R10")
def test_versions_go_in_and_out_of_production_and_all_is_written_down(
    built: Workspace, tlpipe: Tlpipe
) -> None:
    folder = built.path / "artifacts/export/bundle"
    first = bundle.load(folder)
    whole = {name: path.read_bytes() for name, path in first.graphs.items()}
    assert "there is no registry yet" in tlpipe("history").error

    # The first one passes the gate by its own numbers.
    assert tlpipe(*REGISTER).code == 0
    assert aliases(built) == {"challenger": 1, "champion": 1}
    assert tags(built, 1)["gate"] == "passed"
    assert tags(built, 1)["gate.against"] == "none"
    again = tlpipe("promote")
    assert (again.code, "is in production already" in again.error) == (8, True)
    nowhere = tlpipe("rollback")
    assert (nowhere.code, "there is none to go back to" in nowhere.error) == (8, True)

    # The next one only challenges, until somebody promotes it.
    second = change_bundle(built, provenance={**first.provenance, "l2": 0.5})
    unregistered = tlpipe("promote")
    assert (unregistered.code, "what was registered from here" in unregistered.error) == (8, True)
    tlpipe(*REGISTER)
    assert aliases(built) == {"challenger": 2, "champion": 1}
    assert tags(built, 2) == {}
    promoted = tlpipe("promote", "--reason", "more l2")
    assert promoted.code == 0
    assert "digits version 2 is in production, version 1 was before" in promoted.printed
    # No image shows a change; some 4 in their number are possible.
    unchanged = r"\+0\.0000 against version 1 \(95% interval -(0\.0[1-9]\d\d) to \+\1\)"
    assert re.search(unchanged, tags(built, 2)["gate.accuracy_change"])
    assert aliases(built) == {"challenger": 2, "champion": 2, "previous": 1}
    assert (
        tags(built, 2)["gate.labels"] == "holds: the same 10, expected the same, in the same order"
    )
    (decision,) = decisions(built, 2)
    assert (decision["outcome"], decision["champion"]) == ("passed", "1")
    (beside,) = decision["numbers"]["compared"]
    assert (beside["version"], beside["accuracy"]) == ("1", decision["numbers"]["accuracy"])
    assert beside["trained_on"] == 0

    # One that is worse fails with the numbers, and goes there by force alone.
    params = (built.path / "params.yaml").read_text()
    bounds = {
        "min_recall": 0.2,
        "max_model_mb": 1.0,
        "max_latency_ms": 1e4,
        "max_calibration_error": 0.001,
    }
    built.configure("register", gate=bounds)
    change_bundle(built, graphs=blinded(folder, 3))
    tlpipe(*REGISTER)
    failed = tlpipe("promote")
    assert failed.code == 11
    assert "digits version 3 stays out of production" in failed.error
    assert re.search(
        r"recall 0\.0000 \(class 3, \d+ test images\), expected at least 0\.2000", failed.error
    )
    assert "model_mb 1.5" in failed.error
    assert "accuracy_change -0." in failed.error
    assert re.search(
        r"calibration_error (cannot tell: )?0\.\d{4} \(95% .*\), expected at most 0\.0010",
        failed.error,
    )
    assert "latency_ms" not in failed.error
    assert "│ fails" in failed.printed
    assert aliases(built) == {"challenger": 3, "champion": 2, "previous": 1}
    assert tags(built, 3)["gate"] == "failed"
    assert tags(built, 3)["gate.recall"].startswith("FAILS: 0.0000 (class 3, ")
    (built.path / "params.yaml").write_text(params)
    assert tlpipe("promote", "3", "--force", "--reason", "a drill").code == 0
    assert aliases(built) == {"challenger": 3, "champion": 3, "previous": 2}
    assert tags(built, 3)["gate"] == "forced: a drill"
    assert "gate.model_mb" not in tags(built, 3)
    assert [found["outcome"] for found in decisions(built, 3)] == ["failed", "forced: a drill"]

    # Back, and further back, and to a named one.
    between = datetime.now(UTC)
    assert "version 2 is in production again" in tlpipe("rollback", "--reason", "worse").printed
    assert aliases(built) == {"challenger": 3, "champion": 2, "previous": 3}
    assert "version 1 is in production again" in tlpipe("rollback").printed
    assert "there is none to go back to" in tlpipe("rollback").error
    assert "version 3 is in production again" in tlpipe("rollback", "digits@3").printed
    unknown = tlpipe("rollback", "7")
    assert (unknown.code, "such as 1, 2, 3, challenger" in unknown.error) == (8, True)
    history = tlpipe("history").printed
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in history.splitlines()
        if line.startswith("│")
    ]
    moved = [(before, version, kind) for _, version, before, kind, _, _ in rows]
    assert moved == [
        ("none", "1", "promotion"),
        ("1", "2", "promotion"),
        ("2", "3", "promotion"),
        ("3", "2", "rollback"),
        ("2", "1", "rollback"),
        ("1", "3", "rollback"),
    ]
    assert re.fullmatch(r"more l2; \d+ rules hold, against version 1", rows[1][-1])
    assert [row[-1] for row in rows[2:4]] == ["a drill", "worse"]
    then = tlpipe("history", "--at", between.isoformat()).printed
    assert "a drill" in then
    assert "worse" not in then
    assert "was in production at 2020-01-01" in tlpipe("history", "--at", "2020-01-01").printed
    assert tlpipe("history", "--at", "soon").error.startswith("'soon' is no date")

    # The champion is deleted: the last good one answers, and that is said.
    example = str(built.path / "artifacts/evaluate/examples/0.png")
    client_of(built).delete_model_version("digits", "3")
    said = built.call("predict", example).stderr
    assert "degraded: digits version 3 cannot serve, version 1 does" in said
    # The last good one was swapped in the store: the one before it.
    stored = client_of(built).get_model_version("digits", "1").run_id
    (graph,) = (built.path / "mlartifacts").glob(f"**/{stored}/artifacts/bundle/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert "version 2 does" in built.call("predict", example).stderr
    assert tlpipe("rollback", "1").code == 6

    # Where signatures are required, only signed ones pass.
    for name in ("mine", "other"):
        built.make_keys(name)
    built.configure("register", gate={"public_key": "mine.pub"})
    unsigned = tlpipe("promote", "2")
    assert (unsigned.code, "signature none, expected a signature by" in unsigned.error) == (
        11,
        True,
    )
    tlpipe("sign", "digits@2", "--key", "other.pem")
    wrong = tlpipe("promote", "2")
    assert (wrong.code, "is not of" in wrong.error) == (11, True)
    assert tlpipe("sign", "digits@2", "--key", "mine.pem").code == 0
    assert (
        f"is intact: {second.digest}" in tlpipe("verify", "digits@2", "--key", "mine.pub").printed
    )
    assert tlpipe("verify", "digits@2", "--key", "other.pub").code == 6
    assert "digits version 2 is in production" in tlpipe("promote", "2").printed
    assert tags(built, 2)["gate.signature"].startswith("holds: valid")

    # By itself, where that is wanted; but not again what somebody took out.
    built.configure("register", gate={}, promote="auto")
    change_bundle(built, graphs=whole, provenance={**first.provenance, "l2": 0.25})
    assert tlpipe(*REGISTER).code == 0
    assert aliases(built) == {"challenger": 4, "champion": 4, "previous": 2}
    tlpipe("rollback")
    assert tlpipe(*REGISTER).code == 0
    assert aliases(built) == {"challenger": 4, "champion": 2, "previous": 4}


@pytest.mark.slow
@pytest.mark.fault("R09")
def test_both_answer_for_the_candidate_s_test_images_or_nothing_is_said(
    built: Workspace, tlpipe: Tlpipe
) -> None:
    folder = built.path / "artifacts/export/bundle"
    first, report = bundle.load(folder), built.path / "artifacts/evaluate/report.json"
    measured = report.read_bytes()
    other = first.preprocessing.model_copy(update={"short_side_px": 176})
    change_bundle(built, preprocessing=other)
    # What it sees is not what is stored here: nothing is said, nothing promoted.
    assert tlpipe(*REGISTER).code == 0
    assert aliases(built) == {"challenger": 1}
    failed = tlpipe("promote")
    assert failed.code == 11
    assert "hold other data than the version was made with" in failed.error
    # Somebody puts it in production by other means; it is taken over, and measured as it sees.
    client_of(built).set_registered_model_alias("digits", "champion", "1")
    kept = {name: path.read_bytes() for name, path in first.graphs.items()}
    change_bundle(built, preprocessing=first.preprocessing, graphs=kept)
    report.write_bytes(measured)
    tlpipe(*REGISTER)
    assert tlpipe("promote").code == 0
    assert aliases(built) == {"challenger": 2, "champion": 2, "previous": 1}
    (decision,) = decisions(built, 2)
    (beside,) = decision["numbers"]["compared"]
    assert beside["accuracy"] == pytest.approx(decision["numbers"]["accuracy"], abs=0.05)
    assert beside["change"]["low"] < beside["change"]["high"]  # some answers differ
    assert "adoption" in tlpipe("history").printed
    # Another split, or images that are gone.
    split = built.path / "artifacts/split/split.csv"
    table = split.read_bytes()
    split.write_bytes(table.replace(b",train,", b",test,", 1))
    assert "hold other data than the version" in tlpipe("promote", "1").error
    split.unlink()
    assert (
        "split.csv is not here, so the version cannot be compared" in tlpipe("promote", "1").error
    )
    split.write_bytes(table)
    change_bundle(built, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    tlpipe("rollback")
    (built.path / "data/digits.yaml").unlink()
    gone = tlpipe("promote", "3")
    assert gone.code == 11
    assert "cannot be read again for it" in gone.error
    # Nothing is left to compare with: by force alone.
    for number in ("1", "2"):
        client_of(built).delete_model_version("digits", number)
    alone = tlpipe("promote", "3")
    assert alone.code == 11
    assert "nothing that was in production is left to compare with" in alone.error
    assert (
        "digits version 3 is in production"
        in tlpipe("promote", "3", "--force", "--reason", "lost").printed
    )
    assert tags(built, 3)["gate"] == "forced: lost"
    assert tags(built, 3)["gate.comparison"].startswith("cannot tell: nothing that was")


@pytest.mark.slow
@pytest.mark.fault("R27", "R28")
def test_a_loss_once_forced_stays_in_sight_and_images_that_trained_the_other_do_not_count(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    """Version 2 loses a class; version 3 is like it, and is measured beside version 1."""
    folder = released.path / "artifacts/export/bundle"
    first, worse = bundle.load(folder), blinded(folder, 3)
    whole = {name: path.read_bytes() for name, path in first.graphs.items()}
    change_bundle(released, graphs=worse)
    tlpipe(*REGISTER)
    assert tlpipe("promote", "--force", "--reason", "a drill").code == 0
    assert tags(released, 2)["gate.accuracy_change"].startswith("FAILS: -0.")
    change_bundle(released, graphs=worse, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    failed = tlpipe("promote")
    assert failed.code == 11
    assert re.search(r"accuracy_change -0\.\d+ against version 1 \(95%", failed.error)
    assert "the one that decides of 2 versions" in failed.error
    released.configure("register", gate={"compared_versions": 1, "max_validation_gap": 1.0})
    assert "version 3 is in production" in tlpipe("promote").printed
    # Another split: what version 3 trained on is no test of it.
    released.configure("register", gate={})
    split = released.path / "artifacts/split/split.csv"
    lines, moved = split.read_bytes().decode().splitlines(keepends=True), 0
    rows = released.rows("artifacts/split/split.csv")
    members = Counter(row["group"] for row in rows)
    for at, row in enumerate(rows):
        if row["split"] == "train" and members[row["group"]] == 1 and moved < 7:
            lines[at + 1] = lines[at + 1].replace(",train,", ",test,")
            moved += 1
    split.write_bytes("".join(lines).encode())
    resplit = {**first.provenance, "split_sha256": files.sha256(split)}
    change_bundle(released, graphs=whole, provenance=resplit)
    tlpipe(*REGISTER)
    assert (
        "version 4 is in production"
        in tlpipe("promote", "--force", "--reason", "its split").printed
    )
    (decision,) = decisions(released, 4)
    assert {beside["version"] for beside in decision["numbers"]["compared"]} == {"1", "2", "3"}
    assert {beside["trained_on"] for beside in decision["numbers"]["compared"]} == {7}
    assert (
        "7 that it trained on, or their like, do not count"
        in tags(released, 4)["gate.accuracy_change"]
    )


@pytest.mark.slow
def test_other_labels_and_leaks_are_seen(released: Workspace, tlpipe: Tlpipe) -> None:
    folder = released.path / "artifacts/export/bundle"
    first, split = bundle.load(folder), released.path / "artifacts/split/split.csv"
    change_bundle(released, labels=first.labels[::-1])
    tlpipe(*REGISTER)
    permuted = tlpipe("promote")
    assert permuted.code == 11
    assert "labels another order, expected the same, in the same order" in permuted.error
    assert "accuracy_change -0." in permuted.error
    # Of two images that are nearly equal, one trains and one tests.
    grouped: dict[str, list[str]] = {}
    for row in released.rows("artifacts/ingest/manifest.csv"):
        if row["group"]:
            grouped.setdefault(row["group"], []).append(row["path"])
    twins = next(paths for paths in grouped.values() if len(paths) > 1)
    lines = split.read_bytes().decode().splitlines(keepends=True)
    for path, part in zip(twins, ("train", "test"), strict=False):
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"{path},"))
        lines[at] = re.sub(",(train|validation|test),", f",{part},", lines[at])
    split.write_bytes("".join(lines).encode())
    resplit = {**first.provenance, "split_sha256": files.sha256(split)}
    change_bundle(released, labels=first.labels, provenance=resplit)
    tlpipe(*REGISTER)
    leaky = tlpipe("promote")
    assert leaky.code == 11
    assert "leaks 1 test images, expected none that training has seen" in leaky.error
    assert "labels" not in leaky.error


def has_open(process: subprocess.Popen[str], file: Path) -> bool:
    """Return whether a process holds a file open."""
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if link.readlink() == file:
                return True
    return False


@pytest.mark.slow
@pytest.mark.fault("R11")
def test_a_locked_database_is_waited_for_at_most_30_s(released: Workspace, tlpipe: Tlpipe) -> None:
    """It answers where the lock is let go, and gives up where it never is."""
    import sqlalchemy

    from tlpipe.registry import tracking

    database = released.path / "mlflow.db"
    with tracking.connection(released.path) as client:
        engine = sqlalchemy.create_engine(client.tracking_uri)
        with engine.connect() as asked:
            assert asked.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
        engine.dispose()
    with closing(sqlite3.connect(database, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        asking = subprocess.Popen(
            ["tlpipe", "history"],
            cwd=released.path,
            env=released.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(partial(has_open, asking, database))
        time.sleep(1)  # for its first statement: later or earlier, it must end well
        holder.execute("COMMIT")
        _, said = asking.communicate(timeout=PATIENCE_S)
        assert asking.returncode == 0, said
        holder.execute("BEGIN EXCLUSIVE")
        given_up = tlpipe("history")
    assert (given_up.code, "database is locked" in given_up.error) == (8, True)


@pytest.mark.slow
@pytest.mark.fault("R04")
def test_a_killed_promotion_leaves_the_old_or_the_new_one(
    tmp_path: Path, fresh_database: Path
) -> None:
    import mlflow

    from tlpipe.registry import moves

    address = f"sqlite:///{shutil.copy(fresh_database, tmp_path)}"
    client = mlflow.MlflowClient(address)
    client.create_registered_model("raced")
    for number in range(3):
        client.create_model_version("raced", source=f"s3://bucket/{number}")
    client.set_registered_model_alias("raced", "champion", "1")
    program = (
        "import mlflow\n"
        "from tlpipe.registry import moves, promotion\n"
        f"client = mlflow.MlflowClient({address!r})\n"
        "last = promotion.settle(client, 'raced')\n"
        "if last.champion != 'VERSION':\n"
        "    seen = moves.seen(client, 'raced', client.get_model_version('raced', 'VERSION'))\n"
        "    moves.move(client, 'raced', seen, after=last, kind='promotion', why='')\n"
    )
    seen = []
    for version in ("2", "3"):
        for place in killed_after_each_write(
            Workspace(tmp_path), program.replace("VERSION", version)
        ):
            found = client.get_registered_model("raced").aliases
            log = [move.champion for move in moves.history(client, "raced")]
            seen.append((place, log, str(found["champion"]), str(found.get("previous", ""))))
    assert seen == [
        ("create_registered_model", [], "1", ""),
        ("set_registered_model_tag", [], "1", ""),
        ("create_model_version", [], "1", ""),
        ("set_model_version_tag", [], "1", ""),
        ("set_registered_model_alias raced champion", ["1"], "2", ""),
        ("set_registered_model_alias raced previous", ["1"], "2", "1"),
        ("create_model_version", ["1", "2"], "2", "1"),
        ("set_model_version_tag", ["1", "2"], "2", "1"),  # the mark that it began
        ("set_registered_model_alias raced champion", ["1", "2"], "3", "1"),
        ("set_registered_model_alias raced previous", ["1", "2"], "3", "2"),
    ]
