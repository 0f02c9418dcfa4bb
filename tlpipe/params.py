"""Read ``params.yaml``: one section a stage, each checked against the stage's own model."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from tlpipe.errors import ParamsError


class Section(BaseModel):
    """Base of a stage's parameters: immutable, typed strictly, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that no value stands twice: for ``AfterValidator``.

    Raises:
        ValueError: one does.
    """
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"{twice[0]} stands twice")
    return values


def load(path: Path, models: Mapping[str, type[Section]]) -> dict[str, Section]:
    """Read a YAML file that has exactly the sections ``models``.

    Raises:
        ParamsError: the file is missing or no plain YAML, a key is unknown or stands twice, or a
            value is of a wrong type or out of its range. The message names the key's whole path.
    """
    content = read_yaml(path)
    for name in content:
        if name not in models:
            raise ParamsError(_unknown(path, str(name), name, models))
    sections = {}
    for name, model in models.items():
        section = content.get(name)
        if section is None:
            section = {}
        sections[name] = validate(path, model, section, prefix=name)
    return sections


def check_effect(name: str, section: Section, fields: Sequence[str], reason: str) -> None:
    """Check that none of these fields is set; ``reason``: why one would have no effect.

    Set is what differs from the default: a default that is written down promises nothing that would
    not happen anyway, and the same file serves several values of other keys.

    Raises:
        ParamsError: at least one is; all are named.
    """
    if said := without_effect(name, section, fields, reason):
        raise ParamsError(f"{said} Take it out, or change that.")


def without_effect(name: str, section: Section, fields: Sequence[str], reason: str) -> str:
    """Say which of these fields are set, and have no effect; nothing where none is."""
    defaults = type(section).model_fields
    known = {field: getattr(section, field) for field in fields}
    found = [n for n, value in known.items() if value != defaults[n].get_default()]
    given = ", ".join(f"{name}.{field}: {_shown(known[field])}" for field in found)
    return f"{given} {'has' if len(found) == 1 else 'have'} no effect: {reason}." if found else ""


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def validate(path: Path, model: type[Section], content: object, *, prefix: str = "") -> Section:
    """Check what a YAML file holds against a model.

    Raises:
        ParamsError: at the first key that does not fit.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # An unknown key first: it is often the misspelling of one that is missing.
        found = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        # A key that may have several types has an error for each.
        same = [detail for detail in found if _location(detail) == _location(found[0])]
        raise ParamsError(_explain(path, model, same, prefix)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping in which no key stands twice and no tag builds an object.

    Raises:
        ParamsError: the file is missing or holds anything else.
    """
    return parse(read_text(path), path)


def read_text(path: Path) -> str:
    """Read a file of parameters.

    Raises:
        ParamsError: it is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; run tlpipe in the folder that holds it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} cannot be read: {error}.") from None


def parse(text: str, path: Path) -> dict[str, Any]:
    """Return a YAML mapping as ``read_yaml`` does; messages name ``path``.

    Raises:
        ParamsError: the text is anything else.
    """
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ParamsError(f"{path}:{line} {problem}. Expected plain YAML.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ParamsError(f"{path} holds a {type(content).__name__}; expected sections of keys.")
    return content


def json_schema(models: Mapping[str, type[Section]]) -> dict[str, Any]:
    """Return the JSON Schema of ``params.yaml``, for editors to complete and check it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "params.yaml of tlpipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: model.model_json_schema() for name, model in models.items()},
    }


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the second of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key is no plain word", problem_mark=key_node.start_mark
                )
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.2, which DVC reads, takes 1e-4 for a number; PyYAML asks for 1.0e-4.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


_TYPES = ("str", "int", "float", "bool")
_TRIED = re.compile(r"literal\[|constrained-|function-")


def _location(error: ErrorDetails) -> list[str]:
    """Return where an error is, without which of the types that a key may have was tried."""
    location = [str(part) for part in error["loc"]]
    if location and (location[-1] in _TYPES or _TRIED.match(location[-1])):
        location.pop()
    return location


def _explain(path: Path, model: type[Section], errors: list[ErrorDetails], prefix: str) -> str:
    """Say what is wrong with one key; ``errors``: one for each type that it may have."""
    location, error = _location(errors[0]), errors[0]
    key = ".".join([prefix, *location] if prefix else location)
    if error["type"] == "extra_forbidden":
        return _unknown(path, key, location[-1], _fields_at(model, location[:-1]))
    if error["type"] == "missing":
        return f"{key} is missing. Set it in {path}."
    said = [each["msg"].removeprefix("Value error, ") for each in errors]
    expected = " or ".join(said).replace("Input should be", "it must be", 1)
    expected = expected.replace(" or Input should be", ", or")
    expected = expected.replace("a valid tuple", "a list").replace("a valid dict", "a mapping")
    shown = repr(error["input"])
    if isinstance(error["input"], bool) and "valid string" in expected:
        read = "No, off and false" if error["input"] is False else "Yes, on and true"
        shown += f" (YAML reads {read} so: put quotes around a word)"
    return f"{key} is {shown}; {expected}. Change it in {path}."


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> Mapping[str, object]:
    """Return the fields of the section within a section that a location leads to."""
    for name in location:
        field = model.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            model = field.annotation
    return model.model_fields


def _unknown(path: Path, key: str, name: object, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
    stem = key.rpartition(".")[0]
    guess = f"did you mean {stem + '.' if stem else ''}{nearest[0]}? " if nearest else ""
    return f"{key} is no known key; {guess}Known here: {', '.join(known)}. Change it in {path}."
