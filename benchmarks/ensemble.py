"""Whether an ensemble is worth it: ``python benchmarks/ensemble.py [SET ...] [--backbones ...]``.

For each data set a project of its own, as ``tlpipe init`` makes it: a linear probe is trained and
registered on each backbone, then ``tlpipe ensemble`` makes one model of them. It is compared with
the member that is best on images held out, on the test split, which has chosen nothing. The
backbones are those whose weights pip packages carry: three sizes of one family, so an ensemble of
unlike families should gain more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tlpipe.backbones.backbone import PACKAGED
from tlpipe.graph import STAGES

ROOT = Path(__file__).resolve().parent.parent
SETS = ("hymenoptera", "trash")
# Of what the table does not show, little is made.
LESS: dict[str, dict[str, Any]] = {
    "export": {"precisions": []},
    "evaluate": {"corrupted_images": 1, "ood": None, "mistakes": 0},
    "audit": {"folds": 2},
}


def tlpipe(folder: Path, *words: str) -> None:
    """Run a command of tlpipe in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tlpipe", *words]
    subprocess.run(command, cwd=folder, check=True, env=environment, stdout=sys.stderr)


def made(home: Path, source: Path, backbones: list[str]) -> dict[str, Any]:
    """Register a version on each backbone and make an ensemble; return what that reports."""
    project = home / source.name
    if not project.exists():
        tlpipe(home, "init", source.name, "--source", str(source))
    params = project / "params.yaml"
    for number, backbone in enumerate(backbones):
        if (project / f"{number + 1}.made").exists():
            continue
        content = yaml.safe_load(params.read_text())
        content["embed"] |= {"backbone": backbone, "freeze": "all"}
        for section, less in LESS.items():
            content[section] = {**(content.get(section) or {}), **less}
        params.write_text(yaml.safe_dump(content, sort_keys=False))
        for stage in STAGES:
            tlpipe(project, stage)
        (project / f"{number + 1}.made").touch()
    name = yaml.safe_load(params.read_text())["register"]["name"]
    versions = [f"{name}@{number + 1}" for number in range(len(backbones))]
    tlpipe(project, "ensemble", *versions)
    report: dict[str, Any] = json.loads((project / "artifacts/ensemble/members.json").read_text())
    return report


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=SETS, metavar="SET")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    # The one with the largest images last: the ensemble takes what is stored for it.
    parser.add_argument("--backbones", nargs="+", default=sorted(PACKAGED))
    parser.add_argument("--keep", type=Path, help="What lies there already is not done again.")
    given = parser.parse_args()
    table = Table("data", "member", "weight", "held out", "log loss", "test")
    said = []
    with tempfile.TemporaryDirectory() as name:
        home = given.keep or Path(name)
        home.mkdir(exist_ok=True)
        for data in given.sets:
            found = made(home, given.data / data, given.backbones)
            rows = [*zip(given.backbones, found["members"], strict=True)]
            for name, row in (*rows, ("ensemble", found["together"])):
                weight = f"{row['weight']:.3f}" if row["name"] else ""
                accuracy, test = row["held_out"]["value"], row["test"]["value"]
                cells = (f"{accuracy:.4f}", f"{row['log_loss']:.3f}", f"{test:.4f}")
                table.add_row(data, name, weight, *cells)
            table.add_section()
            change = found["change"]
            best = next(name for name, row in rows if row["name"] == found["best"])
            line = (
                f"{data}: ensemble less {best}, the best on {found['images']} images held out: "
                f"{change['value']:+.4f} on {found['tested']} test images "
                f"({change['confidence']:.0%} interval {change['low']:+.4f} to "
                f"{change['high']:+.4f})"
            )
            print(line, file=sys.stderr, flush=True)
            said.append(line)
    Console(width=100).print(table)
    print("\n".join(said))


if __name__ == "__main__":
    main()
