import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.conftest import ROOT
from tlpipe import code_digest
from tlpipe.backbones.forward import CODE
from tlpipe.code_digest import of_closure, of_modules, versions
from tlpipe.graph import STAGES

SOURCE = '''"""What it is."""

import math  # of the standard library


class Circle:
    """Round."""

    radius: float = 1.0
    "In metres."

    @property
    def area(self) -> float:
        """The area."""
        return self.radius**2 * math.pi


def say(circle: Circle | None, *rest: int, sep=", ", **options) -> str:
    match rest:
        case [first, *_]:
            return f"{circle!r:>{first}} {sep.join(map(str, rest))}{options['end']}"
        case _:
            return b"\\x00".decode() if circle is None else str({**options, "a": None})
'''


def digest(folder: Path, source: str) -> str:
    """Return the digest of a module with this source, in a process of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "shapes.py").write_text(source)
    program = "from tlpipe.code_digest import of_modules; print(of_modules('shapes'))"
    command = (sys.executable, "-B", "-c", program)
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # of the standard library", ""),
        ('"""What it is."""\n', "# A comment.\n"),
        ('"""The area."""', '"""Return the area.\n\n        In square metres.\n        """'),
        ('    "In metres."\n', ""),
        ("self.radius**2 * math.pi", "(\n            self.radius ** 2 * math.pi\n        )"),
        ('sep=", "', "sep=', '"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert digest(tmp_path, SOURCE.replace(old, new)) == digest(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.0", "1"),
        ("radius**2", "radius**3"),
        ("import math", "import cmath as math"),
        ("@property\n", "@staticmethod\n"),
        ('sep=", "', 'sep="; "'),
        ("{circle!r:>", "{circle!s:>"),
        ("[first, *_]", "[first, _]"),
        ('"a": None', '"a": False'),
        ("circle is None", "circle is not None"),
        (" -> str:", " -> object:"),
    ],
)
def test_what_is_executed_counts(tmp_path: Path, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert digest(tmp_path, SOURCE.replace(old, new)) != digest(tmp_path, SOURCE)


def test_the_digest_is_that_of_every_python(tmp_path: Path) -> None:
    """The value was found alike by 3.10.13, 3.11.7, 3.12.1 and 3.13.0."""
    assert digest(tmp_path, SOURCE) == "e486cb2dbb5ab2a1"


@pytest.fixture(params=["3.12", "3.13"])
def other_python(request: pytest.FixtureRequest) -> str:
    """Another Python than this one, without any package; of this machine's, or the test skips."""
    name = f"python{request.param}"
    of_pyenv = (Path.home() / ".pyenv" / "versions").glob(f"*/bin/{name}")
    installed = shutil.which(name)
    found = [*([installed] if installed else []), *map(str, of_pyenv)]
    asked = "import sys; print(*sys.version_info[:2], sep='.')"
    for program in found:
        run = subprocess.run([program, "-c", asked], capture_output=True, text=True)
        if run.stdout.strip() == request.param:
            return program
    pytest.skip(f"there is no {name} here")


def test_another_python_compiles_all_code_and_gives_it_the_same_digest(
    other_python: str, tmp_path: Path
) -> None:
    """Warnings are errors: what is deprecated in the grammar is found before it is taken out."""
    shutil.copytree(ROOT / "tlpipe", tmp_path / "tlpipe", ignore=shutil.ignore_patterns("*.pyc"))
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tlpipe").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )
    assert len(names) > 70
    compiling = (other_python, "-W", "error", "-m", "compileall", "-q", "tlpipe")
    subprocess.run(compiling, cwd=tmp_path, check=True)
    # Alone, since packages import what this Python does not have.
    files = {name: str(ROOT / f"{name.replace('.', '/')}.py") for name in names}
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom tlpipe import code_digest\n"
        "files = json.load(sys.stdin)\n"
        "code_digest._source = lambda name: Path(files[name])\n"
        "print(code_digest.of_modules(*files))"
    )
    found = subprocess.run(
        [other_python, "-B", "-c", program],
        cwd=ROOT,
        input=json.dumps(files),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == of_modules(*names)


def test_order_does_not_count_but_names_do() -> None:
    one, two = "tlpipe.progress", "tlpipe.runtime"
    assert of_modules(one, two) == of_modules(two, one)
    assert len({of_modules(one), of_modules(two), of_modules(one, two)}) == 3


def test_a_module_without_source_is_an_error() -> None:
    for name in ("tlpipe.nothing", "zlib"):
        with pytest.raises(ModuleNotFoundError, match=rf"the source of {name} is missing"):
            of_modules(name)


def test_a_closure_holds_what_is_imported_at_any_depth_and_not_for_types_alone(
    tmp_path: Path,
) -> None:
    texts = {
        "__init__": "from shapes import typed\n",
        "circle": "import math\nfrom typing import TYPE_CHECKING\nfrom . import area\n"
        "if TYPE_CHECKING:\n    from shapes import typed\nelse:\n    import shapes.other\n"
        "if not TYPE_CHECKING:\n    import shapes.run\n"
        "if IS_NO_TYPE_CHECKING:\n    import shapes.named\n",
        "area": "def of(radius):\n    from shapes.deep import PI\n    return radius**2 * PI\n",
        "deep/__init__": "from .values import PI\nfrom ..circle import math\n",
        "deep/values": "PI = 3\n",
        "deep/unused": "",
        "named": "",
        "other": "",
        "run": "",
        "typed": "",
    }
    for name, text in texts.items():
        (tmp_path / "shapes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shapes" / f"{name}.py").write_text(text)
    program = "from tlpipe import code_digest as c; print(*sorted(c.closure('shapes.circle')))"
    command = (sys.executable, "-B", "-c", program)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = ("area", "circle", "deep", "deep.values", "named", "other", "run")
    assert run.stdout.split() == [f"shapes.{name}" for name in found]


@pytest.mark.parametrize(
    ("edits", "concerned"),
    [
        # Imported by functions alone.
        ({"training/trainer.py": "_IS_ANOTHER = 1"}, {"train"}),
        # The second is what a package runs when it is imported; register imports of it, too.
        (
            {
                "export/precisions.py": "_IS_ANOTHER = 1",
                "evaluation/__init__.py": "_IS_ANOTHER = 1",
            },
            {"export", "evaluate", "register"},
        ),
        # The last names what is public.
        (
            {"files.py": '"""More."""', "data/ingest.py": "# A word.", "__init__.py": "A = 1"},
            set(),
        ),
    ],
)
def test_a_line_of_code_is_code_of_the_stages_that_run_it(
    tmp_path: Path, edits: dict[str, str], concerned: set[str]
) -> None:
    shutil.copytree(ROOT / "tlpipe", tmp_path / "tlpipe", ignore=shutil.ignore_patterns("*.pyc"))
    for name, line in edits.items():
        with (tmp_path / "tlpipe" / name).open("a") as file:
            file.write(f"\n{line}\n")
    program = (
        "from tlpipe import code_digest, graph\n"
        "for name, stage in graph.STAGES.items():\n"
        "    print(name, code_digest.of_closure(stage.module))"
    )
    command = (sys.executable, "-B", "-c", program)
    run = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    after = dict(line.split() for line in run.stdout.splitlines())
    before = {name: of_closure(stage.module) for name, stage in STAGES.items()}
    assert {name for name in before if before[name] != after[name]} == concerned


def test_versions_are_those_of_the_installed_packages() -> None:
    import numpy

    assert versions("numpy", "no-such-package") == {"numpy": numpy.__version__}


# These have no part in any number. Files are checked by content, progress is shown, the device is
# recorded by its name; what makes stored pixels is part of their decoder, which keys name.
NO_NUMBERS = {
    "tlpipe.data.values",
    "tlpipe.code_digest",
    "tlpipe.errors",
    "tlpipe.files",
    "tlpipe.params",
    "tlpipe.progress",
}


def test_the_key_of_activations_covers_all_code_that_makes_them() -> None:
    graph = grimp.build_graph("tlpipe", cache_dir=None)
    closure = graph.find_upstream_modules("tlpipe.backbones.forward")
    packages = {module for module in graph.modules if graph.find_children(module)}
    made_by = {"tlpipe.backbones.forward", *closure} - packages
    assert set(CODE) | NO_NUMBERS == made_by
    assert not set(CODE) & NO_NUMBERS


def test_the_keys_of_the_graph_and_of_descriptions_cover_what_makes_them() -> None:
    from tlpipe.backbones import backbone, frozen

    graph = grimp.build_graph("tlpipe", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    # Of these the preprocessing alone is used, and its values stand in the key.
    values = {"tlpipe.data.images"}
    for module, code, known in ((frozen, frozen._CODE, values), (backbone, backbone._CODE, set())):
        closure = {module.__name__, *graph.find_upstream_modules(module.__name__)} - packages
        assert closure == {*code, *known} | (NO_NUMBERS & closure)


def test_what_is_kept_of_a_package_holds_as_long_as_no_byte_of_it_changes(tmp_path: Path) -> None:
    """Each digest comes from a process of its own, which finds what the one before has kept."""
    cache, package = tmp_path / "cache", tmp_path / "kept"
    package.mkdir()
    (package / "__init__.py").touch()
    asked = "from tlpipe.code_digest import of_closure; print(of_closure('kept.a'))"

    def found(a: str, b: str = "x = 1\n") -> str:
        (package / "a.py").write_text(a)
        (package / "b.py").write_text(b)
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, "-c", asked]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = found("y = 2\n")
    (kept,) = (cache / "tlpipe" / "code").iterdir()
    assert found("y = 2\n") == alone
    content = kept.read_bytes()
    assert found("y = 2  # the same\n") == alone
    assert kept.read_bytes() != content
    importing = found("import kept.b\ny = 2\n")
    assert importing != alone
    assert found("import kept.b\ny = 2\n", "x = 3\n") not in (alone, importing)
    assert found("import kept.b\ny = 2\n") == importing
    for damaged in ('{"key": 1}', "{", content.decode().replace('"content"', '"other"')):
        kept.write_text(damaged)
        assert found("y = 2\n") == alone


def test_what_is_no_module_or_is_never_imported_may_be_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks of editors, the second halves of files on macOS, checkpoints of notebooks, scratch."""
    package = tmp_path / "strays"
    (package / ".ipynb_checkpoints").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "a.py").write_text("x = 1\n")
    (package / ".#a.py").symlink_to("somebody@somewhere.1")
    (package / "._a.py").write_bytes(b"\0\5\26\7")
    (package / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("x = ")
    (package / "scratch.py").write_text("def half(")
    (package / "folder.py").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(of_closure("strays.a")) == 16
    with pytest.raises(SyntaxError):
        of_modules("strays.scratch")


@pytest.mark.parametrize("has_home", [True, False])
def test_a_digest_needs_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_home: bool
) -> None:
    """It is not there, cannot be made, or nobody knows where it would be."""
    (tmp_path / "homeless").mkdir()
    (tmp_path / "homeless" / "__init__.py").touch()
    (tmp_path / "homeless" / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    code_digest._modules.cache_clear()
    (tmp_path / "file").touch()
    if has_home:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    assert len(of_closure("homeless.a")) == 16


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
