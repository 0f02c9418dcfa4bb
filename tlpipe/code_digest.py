"""Name what code computes: digests of source that comments and docstrings do not change.

A cache whose key holds the digest of the modules that determine its content, and the versions of
the libraries, is never read after one of them has changed.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path


def of_modules(*names: str) -> str:
    """Return a digest, 16 hexadecimal digits, of the syntax trees of modules.

    It does not depend on comments, docstrings, formatting, the order of ``names``, the folder of
    the installation or the version of Python. ``names``: whole names such as
    ``tlpipe.backbones.augment``; the modules need not be imported, and what they import is not part
    of it.

    Raises:
        ModuleNotFoundError: a module or its source is missing.
    """
    parts = "\n".join(f"{name} {_of_module(name)}" for name in sorted(names))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages, named as on PyPI, that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _of_module(name: str) -> str:
    spec = find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ModuleNotFoundError(f"the source of {name} is missing; install tlpipe again")
    tree = ast.parse(Path(spec.origin).read_bytes())
    digest = hashlib.sha256()
    for token in _tokens(tree):
        digest.update(f"{token}\0".encode())
    return digest.hexdigest()


def _tokens(node: object) -> Iterator[str]:
    """Yield a syntax tree as text, each node with the fields that are set.

    ``ast.dump`` and ``ast.unparse`` give other text for the same code in other versions of Python.
    """
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for field, found in ast.iter_fields(node):
            value = _relevant(node, found) if isinstance(found, list) else found
            is_set = value is not None and value != []
            if (is_set or field == "value") and field not in ("kind", "type_comment"):
                yield f"{field}="
                yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _tokens(item)
        yield "]"
    else:
        yield ascii(node)


def _relevant(parent: ast.AST, items: list[object]) -> list[object]:
    """Return a list of nodes without statements of a mere constant, as docstrings are.

    Python 3.12 splits the text in an f-string in other places: neighbours are put together.
    """
    if not isinstance(parent, ast.JoinedStr):
        return [
            item
            for item in items
            if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        ]
    joined: list[object] = []
    for is_text, parts in groupby(items, lambda item: isinstance(item, ast.Constant)):
        group = list(parts)
        text = "".join(str(part.value) for part in group if isinstance(part, ast.Constant))
        joined += [text] * bool(text) if is_text else group
    return joined
