"""The command line itself: its version, completion, what it imports, and doctor."""

import shutil
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import Workspace, free_port
from tlpipe.cli import doctor

MAIN = """
import sys
sys.argv = {words!r}
from tlpipe.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    printed = Workspace(tmp_path).call("--version").stdout
    assert printed == f"tlpipe {metadata.version('tlpipe')}\n"


def test_help_and_completion_import_nothing_heavy(tmp_path: Path) -> None:
    program = MAIN.format(words=["tlpipe", "--help"]) + (
        "heavy = {'pydantic', 'numpy', 'PIL', 'mlflow', 'torch', 'onnxruntime', 'dvc'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    printed = Workspace(tmp_path).run("python", "-c", program).stdout
    for command in ("models", "show", "download", "compare", "doctor", "--install-completion"):
        assert command in printed


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    home = Workspace(tmp_path, {"HOME": str(tmp_path)})
    assert (
        "bash completion installed"
        in home.run("bash", "-c", "tlpipe --install-completion; :").stdout
    )
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert str(script) in (tmp_path / ".bashrc").read_text()
    for words, expected in (("tlpipe down", "download"), ("tlpipe promote --rea", "--reason")):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        bash = Workspace(tmp_path, asked | {"_TLPIPE_COMPLETE": "complete_bash"})
        assert bash.run("tlpipe").stdout.split() == [expected]


def statuses(printed: str) -> dict[str, str]:
    """Return the status of each thing that doctor looks at."""
    rows = (line.split() for line in printed.splitlines() if not line.startswith(" "))
    return {what: status for status, what, *_ in rows}


def test_doctor_finds_a_project_that_has_run_in_order(main_job: Workspace) -> None:
    printed = main_job.call("doctor").stdout
    found = statuses(printed)
    parts = {"system", "python", "packages", "runtime", "GPU", "disk", "cache", "git", "dvc"}
    assert found.keys() == parts | {"project", "parameters", "lock", "registry"}
    assert {found[what] for what in ("runtime", "project", "parameters", "lock", "registry")} == {
        "ok"
    }
    assert "1 model (digits); you are " in printed
    assert f"onnxruntime {metadata.version('onnxruntime')}, execution providers: " in printed


@pytest.mark.fault("R39")
def test_doctor_says_what_is_wrong_and_what_to_do(
    main_job: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock states other code, a parameter is unknown, the registry does not answer."""
    for name in ("params.yaml", "dvc.yaml", "tlpipe.lock.yaml"):
        shutil.copy(main_job.path / name, tmp_path)
    workspace = Workspace(tmp_path)
    workspace.replace("tlpipe.lock.yaml", "  train:\n    code: ", "  train:\n    code: 0")
    workspace.replace("params.yaml", "  name: digits", "  nam: digits")
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    printed = workspace.call("doctor", code=1).stdout
    found = statuses(printed)
    assert {what for what, status in found.items() if status == "error"} == {
        *("project", "parameters", "lock", "registry")
    }
    assert "register.nam" in printed
    assert "train: code of tlpipe, 0" in printed
    assert "'tlpipe upgrade'" in printed
    assert f"MLflow at {address} does not answer" in printed


@pytest.mark.parametrize("has_parameters", [False, True])
def test_doctor_needs_no_project(tmp_path: Path, has_parameters: bool) -> None:
    """Parameters of something else make none."""
    if has_parameters:
        (tmp_path / "params.yaml").write_text("lr: 1\n")
    printed = Workspace(tmp_path).call("doctor").stdout
    assert statuses(printed)["project"] == "warning"
    assert "'tlpipe init' makes one" in printed
    assert "none yet, 'tlpipe run' makes it" in printed


@pytest.mark.fault("R39")
def test_doctor_needs_none_of_the_packages_that_train(workspace: Workspace) -> None:
    """As where tlpipe is installed to serve alone."""
    absent = ("torch", "torchvision", "timm", "dvc", "mlflow", "prefect", "onnx", "scipy")
    program = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "sys.argv = ['tlpipe', 'doctor']\nfrom tlpipe.cli import main\nmain()\n"
    )
    found = workspace.run("python", "-c", program)
    assert statuses(found.stdout)["lock"] == "ok"
    assert "Traceback" not in found.stderr


def test_a_current_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    said = Workspace(tmp_path).run("sh", "-c", f"cd {gone}; rmdir {gone}; tlpipe status", code=6)
    assert said.stderr == "tlpipe: the current folder was deleted. Go to another one.\n"


@pytest.mark.fault("R39")
def test_both_runtimes_at_once_are_an_error() -> None:
    both = doctor.runtime({"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.30.0"})
    assert both.status == "error"
    assert "are both installed, and each overwrites files of the other" in both.found
    assert both.advice.startswith("pip uninstall onnxruntime onnxruntime-gpu")
    assert doctor.runtime({}).status == "error"
    installed = metadata.version("onnxruntime")
    assert doctor.runtime({"onnxruntime": installed}).status == "ok"


def test_packages_that_are_missing_or_pinned_otherwise_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("rich==0.1\n")
    printed = Workspace(tmp_path).call("doctor").stdout
    assert statuses(printed)["packages"] == "warning"
    assert "1 packages are not what" in printed
    assert "Install the pinned ones" in printed


def test_help_says_what_an_option_is_by_default(tmp_path: Path) -> None:
    """In brackets it would be taken for a style of the terminal, and not be shown."""
    printed = Workspace(tmp_path, {"COLUMNS": "200"}).run("tlpipe", "predict", "--help").stdout
    assert "(default: register.name@champion)" in printed


@pytest.mark.fault("R65")
def test_doctor_says_what_keeps_dvc_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        found = doctor._project(tmp_path)
        return f"{found.status}: {found.found} -> {found.advice}"

    assert "is in no repository of DVC -> git init, then dvc init" in said()
    (tmp_path / ".dvc").mkdir()
    assert "is in no Git repository, which DVC expects -> git init, or: dvc config" in said()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    assert said().startswith("ok: ")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".dvc/config").unlink()
    assert said().startswith("ok: ")
    # The superuser, whom tests may run as, can write anywhere.
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written, so no stage can run in it" in said()
