"""Name what code computes: digests of source that comments and docstrings do not change.

A cache whose key holds the digest of the modules that determine its content, and the versions of
the libraries, is never read after one of them has changed.
"""

import ast
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
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


def of_closure(*names: str) -> str:
    """Return the digest of modules and of all that they import of their own package, at any depth.

    What is imported for type checking alone does not count, and neither does the ``__init__`` of
    the package itself, which names what is public; those of the packages in it do.

    Raises:
        ModuleNotFoundError: a module or its source is missing.
    """
    return of_modules(*set[str]().union(*map(closure, names)))


def closure(name: str) -> set[str]:
    """Return the names of a module and of all that it imports of its own package, at any depth.

    Raises:
        ModuleNotFoundError: a module or its source is missing.
    """
    found, waiting = set[str](), [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imports(module, name.partition(".")[0])
            if module.count(".") > 1:  # importing it runs its package, too
                waiting.append(module.rpartition(".")[0])
    return found


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
def _source(name: str) -> Path | None:
    """Return the file of a module, None where there is none; nothing but its package is imported.

    ``importlib`` would import every module on the way.
    """
    package, *parts = name.split(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    if not parts:
        return Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*parts)
    return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


def _package(name: str) -> str:
    """Return the package that a module's relative imports count from."""
    path = _source(name)
    return name if path is not None and path.stem == "__init__" else name.rpartition(".")[0]


@cache
def _tree(name: str) -> ast.Module:
    if (path := _source(name)) is None:
        raise ModuleNotFoundError(f"the source of {name} is missing; install tlpipe again")
    return ast.parse(path.read_bytes())


@cache
def _imports(name: str, package: str) -> frozenset[str]:
    """Return the modules of a package, but its own ``__init__``, that a module names in imports."""
    named: list[str] = []
    waiting: list[ast.AST] = [_tree(name)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            continue  # no import is in an expression, and these are nearly all of a tree
        if isinstance(node, ast.If) and _is_for_types(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = resolve_name("." * node.level + base, _package(name))
            named += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        waiting += ast.iter_child_nodes(node)
    return frozenset(m for m in named if m.startswith(f"{package}.") and _source(m))


def _is_for_types(test: ast.expr) -> bool:
    """Return whether a condition is TYPE_CHECKING, or typing.TYPE_CHECKING."""
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


@cache
def _of_module(name: str) -> str:
    tokens: list[str] = []
    _add(_tree(name), tokens)
    return hashlib.sha256("".join(f"{token}\0" for token in tokens).encode()).hexdigest()


def _add(node: object, tokens: list[str]) -> None:
    """Add a syntax tree as text, each node with the fields that are set.

    ``ast.dump`` and ``ast.unparse`` give other text for the same code in other versions of Python.
    """
    if isinstance(node, ast.AST):
        tokens.append(f"{type(node).__name__}(")
        for field, found in ast.iter_fields(node):
            value = _relevant(node, found) if isinstance(found, list) else found
            is_set = value is not None and value != []
            if (is_set or field == "value") and field not in ("kind", "type_comment"):
                tokens.append(f"{field}=")
                _add(value, tokens)
        tokens.append(")")
    elif isinstance(node, list):
        tokens.append("[")
        for item in node:
            _add(item, tokens)
        tokens.append("]")
    else:
        tokens.append(ascii(node))


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
