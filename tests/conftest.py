"""Workspaces to test in: copies of this repository, each a Git and DVC repository of its own."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image

# Two test processes with two threads each on two cores: who waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Workspace:
    """A folder to run commands in, with the environment that they get."""

    path: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, *command: str, code: int | None = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and check its exit code; ``None`` takes any."""
        result = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if code is not None:
            assert result.returncode == code, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    def environment(self) -> dict[str, str]:
        """Return the environment, with this Python's commands first."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_"))
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**inherited, "PATH": path, "DO_NOT_TRACK": "1", **self.env}

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace the one place where ``old`` stands in a file."""
        target = self.path / file
        text = target.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        target.write_text(text.replace(old, new))

    def configure(self, section: str, **values: object) -> None:
        """Set parameters of one section."""
        path = self.path / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params[section] |= values
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def names(self) -> list[str]:
        """Return what stands in the folder, sorted."""
        return sorted(path.name for path in self.path.iterdir())

    def set_source(self, source: Path | str, **options: object) -> None:
        """Read ``source`` instead of the digits; options are further keys of ``ingest``."""
        lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in options.items())
        self.replace("params.yaml", "  source: data/digits.yaml ", f"{lines}  source: {source} ")

    def ingest(self, *, code: int = 0) -> str:
        """Run the stage ``ingest`` alone, into ``out``; return what it says."""
        outputs = (
            *("--manifest", "out/manifest.csv", "--rejects", "out/rejects.csv"),
            *("--duplicates", "out/duplicates.csv"),
            *("--pixels", "out/pixels", "--report", "out/report.json"),
        )
        return self.run("tlpipe", "ingest", *outputs, code=code).stderr

    def embed(self, activations: str = "out/activations", *, code: int = 0) -> str:
        """Run the stage ``embed`` alone, on what ``ingest`` has written; return what it says."""
        known = ("--manifest", "out/manifest.csv", "--pixels", "out/pixels")
        return self.run("tlpipe", "embed", *known, "--activations", activations, code=code).stderr

    def rows(self, table: str) -> list[dict[str, str]]:
        """Return the rows of a CSV table."""
        with (self.path / table).open(newline="", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    def make_keys(self, name: str) -> None:
        """Write a pair of keys to sign with: NAME.pem and NAME.pub."""
        make = ("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout")
        self.run(*make, "-out", f"{name}.pem")
        self.run("openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub")

    def rejects(self) -> dict[str, str]:
        """Return the reason of each rejected file after ``ingest``."""
        return {row["path"]: row["reason"] for row in self.rows("out/rejects.csv")}


# What most tests of the pipeline do not look at: eight bits, and hundreds of images to check with.
LESS = {
    "  parity_images: 256\n": "  parity_images: 32\n  precisions: []\n",
    "  mistakes: 18\n": "  mistakes: 18\n  corrupted: 8\n  unknown_images: 8\n",
}


def copy_repository(target: Path, env: Mapping[str, str], *, is_whole: bool = False) -> Workspace:
    """Copy the files of this repository, committed or not, into a new Git repository.

    ``is_whole``: with the parameters as they are; otherwise less is exported and measured.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    workspace = Workspace(target, env)
    if not is_whole:
        for much, less in LESS.items():
            workspace.replace("params.yaml", much, less)
    # Equal files are the same commit in every copy, since bundles name it.
    dated = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
    for arguments in (
        ["init", "-q"],
        ["add", "--all"],
        ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "copy"],
    ):
        Workspace(target, {**env, **dated}).run("git", *arguments)
    return workspace


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def cache_env(shared: Path) -> dict[str, str]:
    """A user's cache folder that starts empty: the frozen part is exported in this session."""
    return {"XDG_CACHE_HOME": str(shared / "cache")}


@pytest.fixture(scope="session")
def main_job(shared: Path, cache_env: dict[str, str]) -> Workspace:
    """A workspace after its first 'dvc repro'. Tests read it and register nothing else in it.

    Of several test processes, the first one that needs it makes it.
    """
    target, made = shared / "main job" / "copy", shared / "main job" / "made"
    with FileLock(shared / "main job.lock"):
        if made.exists():
            return Workspace(target, cache_env)
        workspace = copy_repository(target, cache_env, is_whole=True)
        workspace.run("dvc", "repro")
        made.touch()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path, cache_env: dict[str, str]) -> Workspace:
    """A fresh copy in which nothing has run."""
    return copy_repository(tmp_path / "copy", cache_env)


@pytest.fixture
def empty(tmp_path: Path, cache_env: dict[str, str]) -> Workspace:
    """A folder with nothing but ``params.yaml``."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return Workspace(tmp_path, cache_env)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of twelve tiny images each, as PNG files in class folders."""
    root = tmp_path / "photos"
    for number, label in enumerate(("dark", "light")):
        (root / label).mkdir(parents=True)
        for i in range(12):
            shade = 40 + 150 * number + 3 * i
            Image.new("RGB", (40 + i, 48), (shade, shade // 2, i)).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a folder of the real data beside the repository, or skip the test by its name."""

    def folder(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_dir():
            pytest.skip(f"the real data {name} is not here")
        return path

    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="print the table of docs/faults.md")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each fault of the catalogue as passed, failed or missing."""
    if not terminalreporter.config.getoption("--faults"):
        return
    outcomes: dict[str, str] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, fault in getattr(report, "user_properties", ()):
                if name == "fault" and outcomes.get(fault) != "failed":
                    outcomes[fault] = "passed" if outcome == "passed" else "failed"
    catalogue = (ROOT / "docs" / "faults.md").read_text()
    terminalreporter.section("faults")
    for fault in re.findall(r"^\| ([A-Z]\d\d) \|", catalogue, re.MULTILINE):
        terminalreporter.write_line(f"{fault} {outcomes.get(fault, 'missing')}")


@pytest.fixture(autouse=True)
def _note_faults(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    for marker in request.node.iter_markers("fault"):
        for fault in marker.args:
            record_property("fault", fault)


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(workspace: Workspace, *command: str, ready: str, timeout: float = 90) -> Iterator[int]:
    """Run a server in its own process group until the block ends; yield its process id.

    ``ready``: an address that answers 200 once the server is up.
    """
    log = workspace.path / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=workspace.path,
            env=workspace.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not answers(ready):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(address: str) -> bool:
    """Return whether the address answers 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def artifacts(main_job: Workspace) -> Path:
    """What the stages of the main job wrote."""
    return main_job.path / "artifacts"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A local S3 server with an empty bucket; yields the environment of its clients."""
    port = free_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = ("moto_server", "-H", "127.0.0.1", "-p", str(port))
    with server(Workspace(tmp_path), *command, ready=f"http://127.0.0.1:{port}/moto-api/"):
        program = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
        Workspace(tmp_path, env).run("python", "-c", program)
        yield env
