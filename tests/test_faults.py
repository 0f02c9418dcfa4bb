"""docs/faults.md promises what tests prove; everything else in it is planned."""

import ast
import re
from collections.abc import Iterator

from tests.conftest import CATALOGUE, ROOT


def marks(node: ast.expr, name: str) -> Iterator[ast.Call]:
    """Yield the calls of ``pytest.mark.NAME`` in an expression."""
    for found in ast.walk(node):
        if isinstance(found, ast.Call) and ast.unparse(found.func) == f"pytest.mark.{name}":
            yield found


def carried() -> Iterator[tuple[str, str, str]]:
    """Yield each id that a test carries: id, file and line, and why the test is to fail, or ''."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            reasons = [
                ast.literal_eval(keyword.value)
                for decorator in node.decorator_list
                for mark in marks(decorator, "xfail")
                for keyword in mark.keywords
                if keyword.arg == "reason"
            ]
            for decorator in node.decorator_list:
                for mark in marks(decorator, "fault"):
                    for fault in mark.args:
                        where = f"{path.relative_to(ROOT)}:{node.lineno}"
                        yield ast.literal_eval(fault), where, "".join(reasons)


def test_every_id_of_a_test_stands_in_the_catalogue() -> None:
    assert [(fault, where) for fault, where, _ in carried() if fault not in CATALOGUE] == []


def test_every_case_has_a_test_or_is_planned() -> None:
    tested = {fault for fault, _, expected_to_fail in carried() if not expected_to_fail}
    expected = {fault: "tested" if fault in tested else "planned" for fault in CATALOGUE}
    assert expected == CATALOGUE


def test_no_row_of_the_catalogue_is_overlooked() -> None:
    rows = re.findall(r"^\|\s*([A-Z]\d+)\s*\|", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    assert rows == list(CATALOGUE)
    assert len(rows) >= 90
