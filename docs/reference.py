"""Write pages of the site when MkDocs builds it (a hook of it).

The reference comes from the code, the notebook's page from ``notebook.ipynb``, and what stands
beside ``docs/`` in the repository from there.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import tlpipe
from tlpipe import cli, errors, graph, project
from tlpipe.bundle import Bundle
from tlpipe.predict import Prediction

_ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages; called by MkDocs."""
    pages: dict[str, Callable[[], Iterator[str]]] = {
        "reference/commands.md": commands,
        "reference/parameters.md": parameters,
        "reference/exit-codes.md": exit_codes,
        "reference/python.md": python,
        "notebook.md": notebook,
        "contributing.md": partial(beside, "CONTRIBUTING.md"),
        "changelog.md": partial(beside, "CHANGELOG.md"),
    }
    for name, page in pages.items():
        files.append(File.generated(config, name, content="\n".join(page()) + "\n"))
    return files


def commands() -> Iterator[str]:
    """Yield the lines of a page about every command, stages first."""
    known: Any = typer.main.get_command(cli.app)
    visible = {name: command for name, command in known.commands.items() if not command.hidden}
    yield "# Commands"
    yield (
        "\nEvery command has `--help`. Those that work on a project take the current folder's, or "
        "that of `--params FILE`. `tlpipe --install-completion` completes commands in a shell."
    )
    for title, is_stage in (("Over a project and its models", False), ("Stages", True)):
        yield f"\n## {title}"
        if is_stage:
            yield "\n`tlpipe run` runs them in this order, those that a change concerns."
        for name, command in visible.items():
            if (name in graph.STAGES) == is_stage:
                yield f"\n### tlpipe {name}\n\n{_escaped(command.help)}\n"
                yield from _arguments(command.params)


def _arguments(params: list[Any]) -> Iterator[str]:
    shown = [param for param in params if not param.hidden and param.name != "params"]
    if not shown:
        return
    yield "| argument | meaning |"
    yield "|---|---|"
    for param in shown:
        meaning, _, said = (param.help or "").partition("[default: ")
        names = " ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
        if not param.opts[0].startswith("-"):
            names = f"`{(param.metavar or param.name).upper()}`"
        elif not getattr(param, "is_bool_flag", False):
            names += f" `{param.metavar or param.name.upper()}`"
        default = said.rstrip("] ")
        if not default and param.default not in (None, "", False):
            default = f"`{param.default}`"
        after = f" Default: {default}." if default else " *Required.*" if param.required else ""
        yield f"| {names} | {_escaped(meaning.strip())}{after} |"


def parameters() -> Iterator[str]:
    """Yield the lines of a page about every key of params.yaml."""
    yield "# Parameters"
    yield (
        "\nThe keys of `params.yaml`, one section a stage. A key that is not written has its "
        "default. `tlpipe check` says where one does not fit.\n"
    )
    for name, model in project.models().items():
        schema = model.model_json_schema()
        yield f"\n## {name}\n\n{_text(schema['description'])}\n"
        yield "| key | value | meaning |"
        yield "|---|---|---|"
        yield from _keys(name, schema, schema.get("$defs", {}))


def _keys(prefix: str, schema: dict[str, Any], defined: dict[str, Any]) -> Iterator[str]:
    for name, field in schema["properties"].items():
        key = f"{prefix}.{name}"
        reference = field.get("$ref")
        within = defined[reference.rpartition("/")[2]] if reference else field
        if "properties" in within:
            yield from _keys(key, within, defined)
            continue
        is_required = name in schema.get("required", ())
        default = "*required*" if is_required else f"default {_yaml(field['default'])}"
        meaning = _text(field.get("description", ""))
        yield f"| `{key}` | {_values(field, defined)}; {default} | {meaning} |"


def _values(field: dict[str, Any], defined: dict[str, Any]) -> str:
    """Say which values a key may have, from its JSON Schema."""
    if "$ref" in field:
        field = defined[field["$ref"].rpartition("/")[2]]
    if "anyOf" in field:
        return " or ".join(_values(one, defined) for one in field["anyOf"])
    if "const" in field or "enum" in field:
        return " or ".join(_yaml(value) for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "value"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {field[bound]}" for bound, sign in bounds.items() if bound in field]
    if kind == "array":
        items = field.get("items") or next(iter(field.get("prefixItems", [])), None)
        kind = f"list of {_values(items, defined)}" if items else "list"
    words = {"string": "text", "boolean": "true or false", "object": "mapping", "null": "`null`"}
    return ", ".join([words.get(kind, kind), *said])


def exit_codes() -> Iterator[str]:
    """Yield the lines of a page about the codes that commands end with."""
    yield "# Exit codes"
    yield "\nA command that fails says why in one line on standard error.\n"
    yield "| code | error | meaning |"
    yield "|---|---|---|"
    rows = [
        (0, "", "Done, or nothing to do."),
        (2, "", "The command line itself is wrong: an unknown option, a missing argument."),
        *((e.exit_code, f"`{e.__name__}`", _text(e.__doc__ or "")) for e in _errors()),
    ]
    for code, error, meaning in sorted(rows):
        yield f"| {code} | {error} | {meaning} |"
    yield (
        "\n`tlpipe run` ends with DVC's code where a stage fails; the stage's own line stands "
        "above it. `tlpipe predict` ends with 4 where it cannot read one of several images."
    )


def python() -> Iterator[str]:
    """Yield the lines of a page about the Python API, from its docstrings."""
    yield "# Python"
    yield f"\n{_docstring(tlpipe.__doc__)}"
    for name in tlpipe.__all__:
        yield from _documented(f"tlpipe.{name}", getattr(tlpipe, name))
    yield "\n## What they return"
    for found in (Bundle, Prediction):
        yield from _documented(found.__name__, found, level=3)
    yield ("\n## Errors\n\nAll are of `tlpipe.errors`; [the exit codes](exit-codes.md) list them.")


def _documented(name: str, found: Any, *, level: int = 2) -> Iterator[str]:
    """Yield a heading, the signature and the docstring; of a class, also those of its parts."""
    yield f"\n{'#' * level} {name}\n"
    yield f"```python\n{name}{_signature(found)}\n```\n"
    yield _docstring(found.__doc__)
    if not isinstance(found, type):
        return
    begins = inspect.getdoc(vars(found)["__init__"])
    if begins and not hasattr(found, "__dataclass_fields__"):
        yield f"\n{_docstring(begins)}"
    for part, value in vars(found).items():
        if part.startswith("_") or not (text := inspect.getdoc(getattr(found, part))):
            continue
        if isinstance(value, property):
            yield f"\n{'#' * (level + 1)} {found.__name__}.{part}\n\n{_docstring(text)}"
        elif inspect.isfunction(getattr(found, part)) or isinstance(value, classmethod):
            shown = f"{found.__name__}.{part}"
            yield f"\n{'#' * (level + 1)} {shown}\n"
            yield f"```python\n{part}{_signature(getattr(found, part))}\n```\n"
            yield _docstring(text)


def _signature(found: Any) -> str:
    signature = inspect.signature(found)
    given = [one for name, one in signature.parameters.items() if name != "self"]
    text = str(signature.replace(parameters=given))
    # Without modules' names, and without quotes around a class within itself.
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", re.sub(r"-> '(\w+)'", r"-> \1", text))


def _docstring(text: str | None) -> str:
    """Return a docstring in Google's style as Markdown."""
    lines, section, is_code = list[str](), "", False
    for line in inspect.cleandoc(text or "").splitlines():
        is_example = line.lstrip().startswith((">>> ", "... "))
        if is_example and not is_code:
            lines += ["", "```pycon"]
            is_code = True
        elif is_code and not line.strip():
            lines.append("```")
            is_code = False
        if is_code:
            lines.append(line.removeprefix("    "))
        elif heading := re.fullmatch(r"(Args|Attributes|Raises|Examples?):", line):
            section = heading[1]
            lines += ["", f"**{section}**", ""]
        elif section and (item := re.fullmatch(r"    (\w+): (.*)", line)):
            lines.append(f"- `{item[1]}`: {_marked(item[2])}")
        else:
            lines.append(f"  {_marked(line.strip())}" if section and line else _marked(line))
    return "\n".join([*lines, *["```"] * is_code])


def _marked(line: str) -> str:
    return _escaped(line.replace("``", "`"))


def notebook() -> Iterator[str]:
    """Yield the lines of the notebook's page: its text, and its code."""
    content = json.loads((_ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell = text.startswith("!")
            text = f"```{'console' if shell else 'python'}\n{text}\n```"
        yield f"{text}\n"
    yield "[The notebook itself](notebook.ipynb), to be run."


def beside(name: str) -> Iterator[str]:
    """Yield the lines of a page that stands beside ``docs/``, its links as they are within."""
    text = (_ROOT / name).read_text(encoding="utf-8")
    yield text.replace("](docs/", "](")


def _errors() -> Iterator[type[errors.TlpipeError]]:
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, errors.TlpipeError):
            yield found


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(str(one) for one in value)}]`"
    return f"`{value}`" if value != "" else "empty"


def _text(docstring: str) -> str:
    """Return a docstring's first paragraph as Markdown."""
    first = docstring.strip().partition("\n\n")[0]
    return _escaped(re.sub(r"\s+", " ", first).replace("``", "`"))


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, but for what stands in backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_|<\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
