"""What is promoted: bundles as versions of an MLflow model.

In: bundle, parity, report, plots, history, data report. Out: a run, a model version and a receipt.
Stage: ``register``.

Which model is meant is said in one way, for every command and parameter that takes one:
``NAME@ALIAS`` or ``NAME@VERSION`` in the registry, or a bundle's folder. ``models:/`` may stand
before a registered one, and then MLflow's own ``models:/NAME/VERSION`` is understood, too. Neither
names nor aliases hold a slash, so what has one is a folder: one called ``a@b`` is written
``./a@b``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tlpipe.errors import ParamsError

NOT_IN_NAMES = r"/:.%\"'@?#\\\x00-\x1f"  # of registered models, in brackets of a pattern
NAME = rf"[^\s{NOT_IN_NAMES}][^{NOT_IN_NAMES}]*"
LONGEST_NAME = 200
SUFFIX = "-history"  # ends the name of what keeps the moves of a model
FORMS = "NAME@ALIAS, NAME@VERSION or a bundle's folder"
_SCHEME = "models:/"
_PATTERN = re.compile(rf"({NAME})@([\w-]+)")
_OF_MLFLOW = re.compile(rf"{_SCHEME}({NAME})(?:@([\w-]+)|/(\d+))")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model: ``which`` is its number, an alias, or a bundle's digest."""

    name: str
    which: str

    def __str__(self) -> str:
        return f"{self.name}@{self.which}"


def check_name(name: str) -> str:
    """Return the name of a model, if it may be one.

    Raises:
        ValueError: it may not.
    """
    if not re.fullmatch(NAME, name) or len(name) > LONGEST_NAME or name.endswith(SUFFIX):
        raise ValueError(
            f"expected 1 to {LONGEST_NAME} letters, digits, blanks, dashes or underscores, without "
            f"any of / : . % \" ' @ ? # \\, without a blank first, and without {SUFFIX} last, "
            f"which is for what keeps the moves of a model"
        )
    return name


def parse(text: str) -> Registered | Path:
    """Return the registered version or the folder that a text names.

    Raises:
        ParamsError: it names neither.

    Example:
        >>> parse("digits@champion")
        Registered(name='digits', which='champion')
        >>> parse("models:/digits/3")
        Registered(name='digits', which='3')
    """
    if text.startswith(_SCHEME) or ("@" in text and "/" not in text):
        return registered(text)
    folder = Path(text)
    if not (text and folder.exists()):
        is_alias = text in ("champion", "challenger", "previous") or text.isdecimal()
        example = f"NAME@{text}" if is_alias else f"{text}@champion"
        hint = f", such as {example}" if re.fullmatch(NAME, text) else ""
        raise ParamsError(
            f"{text or 'an empty text'} names no model: there is no such folder; expected {FORMS}"
            f"{hint}. 'tlpipe models' lists what is registered."
        )
    return folder if folder.name not in ("", "..") else folder.resolve()


def registered(text: str) -> Registered:
    """Return the registered version that a text names.

    Raises:
        ParamsError: it names none.
    """
    if found := _PATTERN.fullmatch(text):
        return Registered(*found.groups())
    if found := _OF_MLFLOW.fullmatch(text):
        name, alias, number = found.groups()
        return Registered(name, alias or number)
    before = _SCHEME if text.startswith(_SCHEME) else ""
    raise ParamsError(
        f"{text} names no registered version; expected {before}NAME@ALIAS or {before}NAME@VERSION, "
        f"such as {before}digits@champion. 'tlpipe models' lists what is registered."
    )


def name_alone(text: str) -> str:
    """Return a text that names a model without saying which version.

    Raises:
        ParamsError: it is no such name.
    """
    if re.fullmatch(NAME, text):
        return text
    raise ParamsError(
        f"{text or 'an empty text'} is no name of a model; expected a name alone, such as digits. "
        f"One version: 'tlpipe show NAME@VERSION'."
    )


def of_own(text: str, name: str) -> str | Path:
    """Return which version of the model ``name`` is meant, where that name may be left out.

    ``text``: a number, an alias, or one of the forms of ``parse``. A bundle's folder is returned.

    Raises:
        ParamsError: a version of another model is meant, or none, or it may be a folder as well.
    """
    if "@" not in text and "/" not in text:
        if not text.isdecimal() and Path(text).is_dir():
            raise ParamsError(
                f"{text} is a folder here, and may be an alias of {name}: write ./{text}, or "
                f"{name}@{text}."
            )
        return text
    found = parse(text)
    if isinstance(found, Path):
        return found
    if found.name != name:
        raise ParamsError(
            f"{text} is a version of {found.name}; expected one of {name}, which register.name in "
            f"params.yaml says, such as {name}@{found.which}. Name one, or go to the project of "
            f"{found.name}."
        )
    return found.which
