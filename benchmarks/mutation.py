"""How much of a change for the worse the tests notice: small mutations, killed or survived.

Run it with ``python benchmarks/mutation.py``. Each mutation is made in a copy of the repository,
and the tests that mirror its module run there until one fails. It stands here and not in ``tests``
because it measures the suite, takes hours, and is no part of it.

Printed for each: ``file:line``, the change, and which test noticed it. Results are appended to a
file and not repeated, so a run may be stopped and go on. Mutants in ``equivalent_mutants.txt``
compute the same as the original; they are not counted.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")

MODULES = {
    "training": "trainer recipe batches checkpoint linear_probe classifier",
    "backbones": "embed activations forward frozen stages augment",
    "export": "graph precisions",
    "evaluation": "metrics evaluate answers",
    "data": "pixels split images duplicates manifest",
    "registry": "moves gate promotion",
    "": "resampling files held_out bundle code_digest",
}
# Beside tests/ROOM/test_MODULE.py: files whose tests of a module are quick and thorough.
ALSO = {
    "data/duplicates": ["data/test_ingest.py"],
    "data/pixels": ["data/test_ingest.py"],
    "data/manifest": ["data/test_ingest.py", "data/test_split.py"],
    "backbones/activations": [
        "backbones/test_cache.py",
        "backbones/test_embed.py",
        "backbones/test_stages.py",
        "test_params.py",
    ],
    "backbones/embed": ["backbones/test_cache.py"],
    "backbones/stages": ["export/test_families.py"],
    "training/trainer": ["training/test_distributed.py"],
    "evaluation/evaluate": ["evaluation/test_slices.py"],
    "evaluation/metrics": ["evaluation/test_slices.py"],
    "evaluation/answers": ["evaluation/test_evaluate.py"],
    "backbones/forward": ["backbones/test_embed.py"],
    "export/graph": ["export/test_export.py", "export/test_parity.py"],
    "registry/gate": ["registry/test_promotion.py"],
    "resampling": [
        "evaluation/test_metrics.py",
        "training/test_linear_probe.py",
        "data/test_split.py",
    ],
}
# What differs in these does not differ in what is computed.
SAYING = re.compile(r"^(_?log(ger|ging)?\.|warnings\.|print\(|track\()")
NEUTRAL_KEYWORDS = {"strict", "description", "title", "help", "stacklevel", "encoding", "dpi"}
CONVERSIONS = {
    "list",
    "tuple",
    "float",
    "int",
    "bytes",
    "str",
    "Path",
    "iter",
    "range",
    "len",
    "dict",
    "set",
}

COMPARED = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change of one module: ``old`` from the offset ``start`` on becomes ``new``."""

    module: str
    line: int
    start: int
    kind: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """Return what finds it again: the place, the change and the module's digest."""
        digest = hashlib.sha256(path_of(ROOT, self.module).read_bytes()).hexdigest()[:12]
        return f"{self.module}:{self.start}:{self.kind}:{self.new}:{digest}"

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"tlpipe/{self.module}.py:{self.line} {self.kind}: {old} -> {new}"


def path_of(root: Path, module: str) -> Path:
    """Return a module's file."""
    return root / "tlpipe" / f"{module}.py"


class Finder(ast.NodeVisitor):
    """Collects what may be mutated: everything that computes, nothing that only says."""

    def __init__(self, module: str) -> None:
        """Read a module of the repository."""
        self.module = module
        self.source = path_of(ROOT, module).read_text(encoding="utf-8")
        lines = self.source.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._lines = lines
        self.found: list[Mutation] = []
        tree = ast.parse(self.source)
        self._imported = {
            (name.asname or name.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        self.visit(tree)

    def visit(self, node: ast.AST) -> None:
        """Visit what computes."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                children = [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]
            case ast.ClassDef():
                children = list(node.body)
            case ast.AnnAssign():
                children = [node.value] if node.value else []
            case ast.If() if ast.unparse(node.test) == "TYPE_CHECKING":
                return
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return
            case ast.Expr(ast.Constant()):
                return  # a docstring
            case ast.Call() if SAYING.match(ast.unparse(node)):
                return
            case ast.Call(func=ast.Name("cast"), args=[_, value]):
                children = [value]
            case ast.Subscript(value=ast.Name("Annotated")):
                return
            case ast.keyword(arg=arg) if arg in NEUTRAL_KEYWORDS:
                return
            case _:
                children = list(ast.iter_child_nodes(node))
        self._mutate(node)
        for child in children:
            self.visit(child)

    def _add(self, node: ast.expr | ast.stmt, kind: str, new: ast.AST | str) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None  # as parsed
        start = self._offset(node.lineno, node.col_offset)
        end = self._offset(node.end_lineno, node.end_col_offset)
        text = new if isinstance(new, str) else ast.unparse(new)
        if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Call):
            text = f"({text})"
        self.found.append(
            Mutation(self.module, node.lineno, start, kind, self.source[start:end], text)
        )

    def _offset(self, line: int, column: int) -> int:
        # ast counts bytes of UTF-8.
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _mutate(self, node: ast.AST) -> None:
        match node:
            case ast.Compare(ops=[op]) if type(op) in COMPARED:
                for other in COMPARED[type(op)]:
                    self._add(node, "comparison", _changed(node, ops=[other()]))
            case ast.BinOp(op=op) if type(op) in COMPUTED and not _is_text(node):
                self._add(node, "operator", _changed(node, op=COMPUTED[type(op)]()))
            case ast.BoolOp(op=op):
                swapped = _changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
                self._add(node, "and/or", swapped)
            case ast.UnaryOp(op=ast.Not()):
                self._add(node, "removed not", node.operand)
            case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
                self._add(node, "removed minus", node.operand)
            case ast.Constant(value=bool() as value):
                self._add(node, "constant", str(not value))
            case ast.Constant(value=int() as value):
                self._add(node, "constant", str(value + 1))
            case ast.Constant(value=float() as value):
                self._add(node, "constant", repr(value * 2 if value else 1.0))
            case ast.If() | ast.IfExp() | ast.While() if not isinstance(node.test, ast.Compare):
                self._add(node.test, "condition", ast.UnaryOp(ast.Not(), node.test))
            case ast.Call(args=[first, second, *rest]) if _are_alike(first, second):
                swapped = _changed(node, args=[second, first, *rest])
                self._add(node, "swapped arguments", swapped)
            case ast.Call(func=func, args=[only], keywords=[]) if (
                not isinstance(only, ast.Starred | ast.GeneratorExp)
                and ast.unparse(func) not in CONVERSIONS
                and not ast.unparse(func).rpartition(".")[2][:1].isupper()
            ):
                is_method = isinstance(func, ast.Attribute) and (
                    ast.unparse(func).partition(".")[0] not in self._imported
                )
                kept = func.value if is_method else only  # type: ignore[attr-defined]
                self._add(node, "dropped call", kept)
            case ast.Expr(ast.Call()) if not SAYING.match(ast.unparse(node)):
                self._add(node, "deleted statement", "pass")
            case ast.AugAssign() | ast.Delete():
                self._add(node, "deleted statement", "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                self._add(node, "deleted statement", "pass")
            case ast.Continue():
                self._add(node, "deleted statement", "pass")


def _are_alike(first: ast.expr, second: ast.expr) -> bool:
    """Return whether two arguments differ and could be taken for one another."""
    values = (ast.Name, ast.Attribute, ast.Subscript, ast.BinOp, ast.Call, ast.UnaryOp)
    texts = [ast.unparse(argument) for argument in (first, second)]
    return (
        texts[0] != texts[1]
        and all(isinstance(argument, values) for argument in (first, second))
        and not any(re.match(r"(np|torch)\.(u?int|float|bool|str)|path\b", text) for text in texts)
    )


def _changed(node: ast.expr, **fields: object) -> ast.expr:
    """Return a copy of a node in which these fields are others."""
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def _is_text(node: ast.BinOp) -> bool:
    """Return whether it puts strings or types together."""
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes | None))
        for side in sides
    )


def modules() -> list[str]:
    """Return the names of the modules that the reviews name and that still exist."""
    named = [
        f"{room}/{name}".lstrip("/") for room, names in MODULES.items() for name in names.split()
    ]
    return [module for module in named if path_of(ROOT, module).exists()]


def tests_of(module: str) -> list[str]:
    """Return the test files of a module: its mirror, those of ``ALSO``, else who imports it."""
    room, _, name = module.rpartition("/")
    own = ROOT / "tests" / room / f"test_{name}.py"
    also = [ROOT / "tests" / file for file in ALSO.get(module, [])]
    found = [path for path in (own, *also) if path.exists()]
    if not found:
        imported = re.compile(rf"tlpipe\.{room}\.{name}\b|tlpipe\.{room} import .*\b{name}\b")
        files = sorted((ROOT / "tests" / room).glob("test_*.py"))
        found = [path for path in files if imported.search(path.read_text(encoding="utf-8"))]
    if not found:
        raise SystemExit(f"{module} has no tests: name some in ALSO")
    return [str(path.relative_to(ROOT)) for path in found]


def choose(seed: int, count: int, only: list[str]) -> list[Mutation]:
    """Draw so many mutations, in turn from each module, and there in turn of each kind."""
    pools = []
    for module in only:
        kinds: dict[str, list[Mutation]] = {}
        pool = Finder(module).found
        random.Random(f"{seed} {module}").shuffle(pool)
        for mutation in pool:
            kinds.setdefault(mutation.kind, []).append(mutation)
        pools.append(_in_turn(list(kinds.values())))
    return _in_turn(pools)[:count]


def _in_turn(pools: list[list[Mutation]]) -> list[Mutation]:
    return [found for row in zip_longest(*pools) for found in row if found is not None]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: killed, survived or timed out, and what noticed it."""

    name: str
    outcome: str
    by: str


class Bench:
    """A copy of the repository in which modules are changed and tested."""

    def __init__(self, folder: Path) -> None:
        """Copy the files that Git knows or would add."""
        self._root = folder / "copy"
        self._job = folder / "main job"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self._root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._root / name)
        shared = ROOT.parent / "shared"
        if shared.exists():
            with suppress(FileExistsError):
                (folder / "shared").symlink_to(shared)
        subprocess.run(["git", "init", "-q"], cwd=self._root, check=True)

    def test(self, module: str, seconds: float, tier: str = "not slow") -> tuple[str, str]:
        """Run a module's tests until one fails; return the outcome and what noticed."""
        env = {**os.environ, "PYTHONPATH": str(self._root), "OMP_WAIT_POLICY": "passive"}
        command = [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"),
            *("--durations=0", "--main-job", str(self._job), "-m", tier, *tests_of(module)),
        ]
        try:
            done = subprocess.run(
                command, cwd=self._root, env=env, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return "timed out", f"after {seconds:.0f} s"
        if done.returncode in (0, 5):  # 5: none is of this tier
            return "survived", ""
        if done.returncode not in (1, 2):
            raise SystemExit(f"{module}: pytest ended with {done.returncode}\n{done.stdout}")
        noticed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return "killed", noticed[0] if noticed else done.stdout.strip().splitlines()[-1]

    def apply(self, mutation: Mutation, seconds: float) -> tuple[str, str]:
        """Test with one change, by the quick tests and then the slow ones, and take it back."""
        path = path_of(self._root, mutation.module)
        source = path.read_text(encoding="utf-8")
        end = mutation.start + len(mutation.old)
        assert source[mutation.start : end] == mutation.old
        try:
            self._write(path, source[: mutation.start] + mutation.new + source[end:])
            found = self.test(mutation.module, seconds)
            return found if found[0] == "killed" else self.test(mutation.module, 1800, "slow")
        finally:
            self._write(path, source)

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source, encoding="utf-8")
        # Byte-code is told by size and second, which a mutant may share with the one before.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


def equivalents() -> dict[tuple[str, str], str]:
    """Return the reason by module and change of each mutant known to compute the same."""
    known = {}
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            module, change, reason = (part.strip() for part in line.split(" | "))
            known[module, change] = reason
    return known


def main() -> None:
    """Mutate, test, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=80, help="how many mutations")
    parser.add_argument("--module", action="append", help="such as training/recipe; repeatable")
    parser.add_argument("--minutes", type=float, default=600, help="begin none after so long")
    parser.add_argument("--results", type=Path, default=ROOT / ".mutation_cache" / "results.jsonl")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    given = parser.parse_args()
    chosen = choose(given.seed, given.count, given.module or modules())
    if given.list:
        print(*chosen, sep="\n")
        return
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    known = {(found := Outcome(**json.loads(line))).name: found for line in lines}
    with tempfile.TemporaryDirectory(prefix="tlpipe-mutation-") as folder:
        for mutation, outcome in run(Bench(Path(folder)), chosen, known, given.minutes * 60):
            if mutation.name not in known:
                known[mutation.name] = outcome
                with given.results.open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{outcome.outcome:9} {mutation}  {outcome.by}", flush=True)
    report([known[mutation.name] for mutation in chosen if mutation.name in known], len(chosen))


def run(
    bench: Bench, chosen: list[Mutation], known: dict[str, Outcome], seconds: float
) -> Iterator[tuple[Mutation, Outcome]]:
    """Yield each mutation with its outcome, known ones first, until the time is up."""
    same = equivalents()
    limits: dict[str, float] = {}
    begun = time.monotonic()
    for mutation in sorted(chosen, key=lambda mutation: mutation.name not in known):
        change = " ".join(f"{mutation.old} -> {mutation.new}".split())
        if reason := same.get((mutation.module, change)):
            yield mutation, Outcome(mutation.name, "same", reason)
        elif mutation.name in known:
            yield mutation, known[mutation.name]
        elif time.monotonic() - begun < seconds:
            if mutation.module not in limits:
                started = time.monotonic()
                clean = bench.test(mutation.module, 3600)
                if clean[0] != "survived":
                    raise SystemExit(f"{mutation.module}: the clean tree fails: {clean}")
                limits[mutation.module] = 300 + 10 * (time.monotonic() - started)
            outcome, by = bench.apply(mutation, limits[mutation.module])
            yield mutation, Outcome(mutation.name, outcome, by)


def report(outcomes: list[Outcome], wanted: int) -> None:
    """Print the totals."""
    counted = [found for found in outcomes if found.outcome != "same"]
    killed = sum(found.outcome != "survived" for found in counted)
    share = killed / max(len(counted), 1)
    print(
        f"{killed} of {len(counted)} mutations were noticed ({share:.1%}); "
        f"{len(outcomes) - len(counted)} compute the same; {wanted - len(outcomes)} are left"
    )


if __name__ == "__main__":
    main()
