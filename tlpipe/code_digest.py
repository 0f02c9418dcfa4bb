"""Name what code computes: digests of source that comments and docstrings do not change.

A cache whose key holds the digest of the modules that determine its content, and the versions of
the libraries, is never read after one of them has changed.

Parsing all modules takes as long as most stages take to start: what was found of a package is kept
in the user's cache, and holds as long as no byte of its source changes.
"""

import ast
import hashlib
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tlpipe import files


def of_modules(*names: str) -> str:
    """Return a digest, 16 hexadecimal digits, of the syntax trees of modules.

    It does not depend on comments, docstrings, formatting, the order of ``names``, the folder of
    the installation or the version of Python. ``names``: whole names such as
    ``tlpipe.backbones.augment``; the modules need not be imported, and what they import is not part
    of it.

    Raises:
        ModuleNotFoundError: a module or its source is missing.
    """
    parts = "\n".join(f"{name} {_module(name).digest}" for name in sorted(names))
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
            waiting += _module(module).imports
            if module.count(".") > 1:  # importing it runs its package, too
                waiting.append(module.rpartition(".")[0])
    return found


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages, named as on PyPI, that are installed."""
    found = {package: _version(package, *sys.path) for package in packages}
    return {package: installed for package, installed in found.items() if installed is not None}


@cache
def _version(package: str, *_: str) -> str | None:  # reading one takes milliseconds
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _Module(NamedTuple):
    """``digest``: of its syntax tree; ``imports``: modules of its package that it imports."""

    digest: str
    imports: list[str]


def _module(name: str) -> _Module:
    package = name.partition(".")[0]
    if (found := _modules(package).get(name)) is None:
        if name in (sources := _sources(package)):
            ast.parse(sources[name].read_bytes())  # raises what is wrong with it
        raise ModuleNotFoundError(f"the source of {name} is missing; install tlpipe again")
    return found


@cache
def _modules(package: str) -> dict[str, _Module]:
    """Return what is known of each module of a package that can be parsed, kept or found now."""
    sources, contents = _sources(package), {}
    for name, path in sources.items():
        with suppress(OSError):
            contents[name] = path.read_bytes()
    named = [f"{name} {len(content)}\n".encode() + content for name, content in contents.items()]
    key = hashlib.sha256(b"".join([Path(__file__).read_bytes(), *named])).hexdigest()
    installed = hashlib.sha256(bytes(sources[package].resolve())).hexdigest()[:16]
    with suppress(TypeError):
        if kept := files.kept(f"code/{installed}.json", key):
            return {name: _Module(*found) for name, found in kept.items()}
    found = {}
    for name, content in contents.items():
        with suppress(SyntaxError):  # what nobody imports may be half-written
            tree = ast.parse(content)
            imports = sorted(_imports(tree, name, sources) & sources.keys() - {package})
            found[name] = _Module(_of_tree(tree), imports)
    files.keep(f"code/{installed}.json", key, found)
    return found


def _sources(package: str) -> dict[str, Path]:
    """Return the source of each module of a package; nothing is imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ModuleNotFoundError(f"the source of {package} is missing; install tlpipe again")
    folder, found = Path(spec.origin).parent, {package: Path(spec.origin)}
    for path in sorted(folder.rglob("*.py")) if spec.submodule_search_locations else ():
        parts = path.relative_to(folder).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def _imports(tree: ast.Module, name: str, sources: dict[str, Path]) -> set[str]:
    """Return what a module names in imports, whole."""
    named: list[str] = []
    waiting: list[ast.AST] = [tree]
    package = name if sources[name].stem == "__init__" else name.rpartition(".")[0]
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
                base = resolve_name("." * node.level + base, package)
            named += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        waiting += ast.iter_child_nodes(node)
    return set(named)


def _is_for_types(test: ast.expr) -> bool:
    """Return whether a condition is TYPE_CHECKING, or typing.TYPE_CHECKING."""
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _of_tree(tree: ast.Module) -> str:
    tokens: list[str] = []
    _add(tree, tokens)
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
