"""Workspaces to test in: copies of this repository, each a Git and DVC repository of its own."""

import csv
import functools
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock
from PIL import Image

from tlpipe import graph, project

# How long anything may take before it counts as hanging. No test says how fast something is: a
# machine that runs other things beside this suite is a slow one, not a broken one.
PATIENCE_S = 1800
# The same for what libraries give up on by themselves.
PATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE_S),
    "AWS_MAX_ATTEMPTS": "20",
    "PREFECT_API_REQUEST_TIMEOUT": str(PATIENCE_S),
    "PREFECT_SERVER_DATABASE_TIMEOUT": str(PATIENCE_S),
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": str(PATIENCE_S),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
os.environ.update(PATIENT)
# Several test processes with two threads each on two cores: who waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Workspace:
    """A folder to run commands in, with the environment that they get."""

    path: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command and check its exit code; ``None`` takes any."""
        result = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            stdin=subprocess.DEVNULL,
        )
        if code is not None:
            assert result.returncode == code, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    def call(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of tlpipe in this process, since a start with its imports costs seconds.

        For what depends on neither signals nor limits nor variables that libraries read at import.
        """
        from tlpipe import cli

        printed, said = io.StringIO(), io.StringIO()
        handler, root = logging.StreamHandler(said), logging.getLogger()
        found: object = 0
        root.addHandler(handler)
        try:
            with (
                pytest.MonkeyPatch.context() as patch,
                warnings.catch_warnings(action="default"),
                redirect_stdout(printed),
                redirect_stderr(said),
            ):
                patch.chdir(self.path)
                patch.setattr(sys, "argv", ["tlpipe", *words])
                for name, value in self.env.items():
                    patch.setenv(name, value)
                cli.main()
        except SystemExit as end:
            found = end.code or 0
        finally:
            root.removeHandler(handler)
        assert found == code, f"{words}\n{printed.getvalue()}\n{said.getvalue()}"
        return subprocess.CompletedProcess(words, code, printed.getvalue(), said.getvalue())

    def reproduce(self, last: str = "register") -> str:
        """Run the stages up to one as 'dvc repro' would anew, in this process; return what is said.

        For what is not about DVC. ``last``: its stage; ``audit`` runs where a stage reads it.
        """
        stages = list(graph.STAGES)
        upto = stages[: stages.index(last) + 1]
        if last not in ("audit", "evaluate", "register"):
            upto = [stage for stage in upto if stage != "audit"]
        return "".join(self.call(stage).stderr for stage in upto)

    def environment(self) -> dict[str, str]:
        """Return the environment, with this Python's commands first."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_"))
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**inherited, **PATIENT, "PATH": path, "DO_NOT_TRACK": "1", **self.env}

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
        """Read ``source`` instead of the digits; options are further keys of ``ingest``.

        The gate lets a first version pass that a handful of images has tested.
        """
        self.replace(
            "params.yaml", "    min_recall: 0.5 ", "    min_test_images: 1\n    min_recall: 0.0 "
        )
        lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in options.items())
        self.replace("params.yaml", "  source: data/digits.yaml ", f"{lines}  source: {source} ")

    def use_small_network(self) -> None:
        """Train on a network that computes next to nothing, and knows as much."""
        self.configure("embed", backbone="timm/test_resnet", weights="none")

    def ingest(self, *, code: int = 0) -> str:
        """Run the stage ``ingest`` alone; return what it says."""
        return self.call(*INGEST, code=code).stderr

    def embed(self, *, code: int = 0) -> str:
        """Run the stage ``embed`` alone, on what ``ingest`` has written; return what it says."""
        return self.call("embed", code=code).stderr

    def take(self, other: "Workspace", *names: str) -> None:
        """Link to what stages have written in another workspace, by its names in the graph."""
        for name in names:
            path = self.path / graph.PATHS[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(other.path / graph.PATHS[name])

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
        return {row["path"]: row["reason"] for row in self.rows("artifacts/ingest/rejects.csv")}


INGEST = ("ingest",)

# What is computed is not to depend on how many cores this machine has.
THREADS = ("  weights: imagenet\n", "  weights: imagenet\n  threads: 2\n")
# What most tests of the pipeline do not look at: eight bits, and hundreds of images to check with.
LESS = {
    "  parity_tolerance:": "  parity_images: 32\n  precisions: []\n  parity_tolerance:",
    "  mistakes: 18\n": "  mistakes: 18\n  corrupted_images: 8\n  ood_images: 8\n",
}


def copy_repository(target: Path, env: Mapping[str, str], *, is_whole: bool = False) -> Workspace:
    """Copy the files of this repository, committed or not, into a new Git repository.

    ``is_whole``: with the parameters as they are; otherwise less is exported and measured.
    """
    shutil.copytree(_template(is_whole), target, dirs_exist_ok=True)
    return Workspace(target, env)


lock = functools.cache(project.lock)


@functools.cache
def _template(is_whole: bool) -> Path:
    """Make the repository that is then copied, once for each test process."""
    target = _templates[0] / ("whole" if is_whole else "less")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name not in ("dvc.lock", "splits.csv"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    workspace = Workspace(target)
    (target / graph.LOCK).write_text(lock())  # whatever was last committed
    workspace.replace("params.yaml", *THREADS)
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
        Workspace(target, dated).run("git", *arguments)
    return target


_templates: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def _place_templates(tmp_path_factory: pytest.TempPathFactory) -> None:
    _templates.append(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def kept(shared: Path, pytestconfig: pytest.Config) -> Path:
    """The folder of the main job and its cache, which several sessions may share."""
    return Path(pytestconfig.getoption("--main-job") or shared / "main job").resolve()


@pytest.fixture(scope="session")
def cache_env(kept: Path) -> dict[str, str]:
    """A user's cache folder that starts empty: the frozen part is exported in this session."""
    return {"XDG_CACHE_HOME": str(kept / "cache"), "DVC_SITE_CACHE_DIR": str(kept / "dvc")}


@pytest.fixture(scope="session", autouse=True)
def _leave_the_real_cache_alone(cache_env: dict[str, str]) -> None:
    os.environ.update(cache_env)


@pytest.fixture(scope="session")
def main_job(kept: Path, cache_env: dict[str, str]) -> Workspace:
    """A workspace after its first 'dvc repro'. Tests read it and register nothing else in it.

    Of several test processes, the first one that needs it makes it.
    """
    kept.mkdir(parents=True, exist_ok=True)
    target, made = kept / "copy", kept / "made"
    with FileLock(kept / "lock"):
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
    """A folder with nothing but parameters and the lock of the code that is tested."""
    # A few images, of which some are bad on purpose: a larger share than the default may be so.
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("max_rejected: 0.02", "max_rejected: 0.5").replace(*THREADS)
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / graph.LOCK).write_text(lock())
    return Workspace(tmp_path, cache_env)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of twelve tiny images each, as PNG files in class folders."""
    return make_photos(tmp_path / "photos")


def make_photos(root: Path) -> Path:
    """Write two classes of twelve tiny images each, as PNG files in class folders."""
    for number, label in enumerate(("dark", "light")):
        (root / label).mkdir(parents=True)
        for i in range(12):
            shade = 40 + 150 * number + 3 * i
            Image.new("RGB", (40 + i, 48), (shade, shade // 2, i)).save(root / label / f"{i}.png")
    return root


def install(source: Path, folder: Path) -> Path:
    """Build the wheel of a source and install it; return the environment's folder of commands.

    All other packages are those that are tested with. What makes this repository importable is a
    .pth file among them, which counts in an environment's own folder alone.
    """
    pip = (sys.executable, "-m", "pip")
    build = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    asked = (python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    own = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    to = (*pip, "--python", str(python), "install", "-q", "--no-deps")
    subprocess.run([*to, str(wheel)], check=True)
    Path(own, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture(scope="session")
def installed(shared: Path) -> Path:
    """The commands of an environment with this source's wheel, which does not see this folder."""
    folder = shared / "installed"
    with FileLock(shared / "installed.lock"):
        return folder / "env" / "bin" if folder.exists() else install(ROOT, folder)


def elsewhere(commands: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment that runs these commands, and has no network but this machine's."""
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    dead = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    offline = {**dead, **{name.upper(): address for name, address in dead.items()}}
    here = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
    return {**env, **offline, **here, "PATH": path, "PYTHONPATH": ""}


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a folder of the real data beside the repository, or skip the test by its name."""

    def folder(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_dir():
            pytest.skip(f"the real data {name} is not here")
        return path

    return folder


# Every case of the catalogue, with its status: "tested" or "planned".
CATALOGUE = {
    cells[1].strip(): cells[4].strip()
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if len(cells := line.split("|")) == 6 and re.fullmatch(r" [A-Z]\d\d ", cells[1])
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--main-job",
        metavar="DIR",
        help="keep the finished main job there, and take it from there the next time, whatever has "
        "changed since: saves a minute while a test is written",
    )
    parser.addoption(
        "--every-family",
        action="store_true",
        help="export every family of backbones, also those whose graphs are like others': for "
        "changes of backbones/, export/ or constraints.txt, and before a release",
    )
    parser.addoption(
        "--faults", metavar="FILE", help="print docs/faults.md with the outcomes collected in FILE"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the outcome of each case, over this run and those before it with the same file."""
    if (name := terminalreporter.config.getoption("--faults")) is None:
        return
    file = Path(name)
    outcomes: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    ranks = ["not run", "skipped", "xfailed", "passed", "failed", "error"]
    for outcome in ranks[1:]:
        for report in terminalreporter.stats.get(outcome, []):
            for key, fault in getattr(report, "user_properties", ()):
                if key == "fault":
                    known = outcomes.get(fault, "not run")
                    outcomes[fault] = max(known, outcome, key=ranks.index)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(outcomes, sort_keys=True, indent=2))
    terminalreporter.section("faults")
    for fault, status in CATALOGUE.items():
        terminalreporter.write_line(f"{fault} {status}: {outcomes.get(fault, 'not run')}")


@pytest.fixture(autouse=True)
def _note_faults(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    for marker in request.node.iter_markers("fault"):
        for fault in marker.args:
            record_property("fault", fault)


def free_port(ports: range = range(20_000, 32_000)) -> int:
    """Return a port of the loopback address that nobody listens on, and that nobody else is given.

    The kernel deals out ports above these. Other test processes of this machine see the claim: a
    name of Linux's abstract sockets, which ends with this process.
    """
    for port in random.SystemRandom().sample(ports, len(ports)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0tlpipe test port {port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            claim.close()
            continue
        claim.detach()  # open for as long as this process lives
        return port
    raise AssertionError(f"no port of {ports} is free")


def wait_until(
    holds: Callable[[], object], *, process: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Wait until a condition holds; fail where the process that should make it so has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process is None or process.poll() is None, "the process has ended before"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.05)


def processes_in(folder: Path, program: str) -> list[int]:
    """Return the ids of the running programs of that name that work in a folder.

    Process names are the whole machine's; folders of a test are its own.
    """
    return [
        process.pid
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == program and process.info["cwd"] == str(folder)
    ]


@contextmanager
def server(workspace: Workspace, *command: str, ready: str) -> Iterator[int]:
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
        try:
            wait_until(lambda: answers(ready), process=process)
        except AssertionError as error:
            raise AssertionError(f"{command[0]}: {error}\n{log.read_text()}") from None
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(address: str) -> bool:
    """Return whether the address answers 200."""
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (chromium := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


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
