"""The cells of a sweep: what is asked for, checked by the stages' own parameters, before any runs.

A cell is a set of values for keys of ``params.yaml``. What can have no effect at its freeze level
is left out of it, so that cells that would compute the same are one.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from tlpipe import params
from tlpipe.backbones import activations, embed, sampling
from tlpipe.backbones.activations import ALL, NONE
from tlpipe.backbones.backbone import describe
from tlpipe.data import ingest
from tlpipe.errors import ParamsError
from tlpipe.params import Section
from tlpipe.training import train

SECTIONS = ("split", "embed", "train")  # whose keys may differ from cell to cell
# Set by options of their own, or by the sweep itself.
_OWN = {
    "embed.freeze": "--freeze",
    "embed.backbone": "--backbones",
    "split.images": "--images",
    "split.images_seed": "--seeds",
    "train.seed": "--seeds",
    "train.fit_on": "no option: a sweep leaves validation to choose by",
}
OPTION_1, OPTION_2 = "option 1: only the output layer", "option 2: everything"
_EVERY = "all"  # in --images


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        values: what is set, by keys of params.yaml; without the seed.
        content: the whole of params.yaml.
        seed: of the images and of training.
        images: training images, or None where all are.
        alike: keys that have one value in all cells.
    """

    values: Mapping[str, Any]
    content: Mapping[str, Any]
    seed: int
    images: int | None
    alike: frozenset[str] = frozenset()

    @property
    def level(self) -> str:
        """What is varied but for the number of images: a line of the picture."""
        aside = {"split.images", *self.alike}
        shown = {key: value for key, value in self.values.items() if key not in aside}
        words = [str(shown.pop("embed.freeze"))]
        if backbone := shown.pop("embed.backbone", None):
            words.insert(0, str(backbone))
        return ", ".join([*words, *(f"{key.partition('.')[2]} {shown[key]}" for key in shown)])

    @property
    def option(self) -> str:
        """What the lectures call its freeze level; nothing where they do not name it."""
        return {ALL: OPTION_1, NONE: OPTION_2}.get(str(self.values["embed.freeze"]), "")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        freeze: values of embed.freeze.
        images: numbers of training images; None is all of them.
        backbones: values of embed.backbone; none: the project's own.
        seeds: how many, from 0 on.
        settings: values of other keys.
    """

    freeze: tuple[str | int, ...]
    images: tuple[int | None, ...]
    backbones: tuple[str, ...] = ()
    seeds: int = 1
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def read_freeze(text: str) -> tuple[str | int, ...]:
    """Return the levels of ``--freeze``, such as 'all,4,none'."""
    found = _words(text, "--freeze", "all,none")
    return tuple(int(word) if word.isdecimal() else word for word in found)


def read_images(text: str) -> tuple[int | None, ...]:
    """Return the numbers of ``--images``, such as '50,100,all'.

    Raises:
        ParamsError: one is none.
    """
    found = []
    for word in _words(text, "--images", "50,100,200,all"):
        if word != _EVERY and not (word.isdecimal() and int(word)):
            raise ParamsError(
                f"--images has {word!r}; expected numbers of training images from 1 on, or all, "
                f"such as 50,100,200,all."
            )
        found.append(None if word == _EVERY else int(word))
    return tuple(found)


def read_backbones(text: str | None) -> tuple[str, ...]:
    """Return the names of ``--backbones``."""
    if text is None:
        return ()
    return tuple(_words(text, "--backbones", "resnet18,efficientnet_lite0"))


def read_setting(text: str) -> tuple[str, tuple[Any, ...]]:
    """Return the key and the values of a ``--set``, such as 'train.epochs=5,10'.

    Raises:
        ParamsError: it has another form, or names a key that is not varied so.
    """
    key, _, values = text.partition("=")
    check_key(key, f"--set {text}", "--set train.epochs=5,10")
    return key, tuple(_value(word) for word in _words(values, f"--set {key}", "5,10"))


def check_key(key: str, given: str, example: str) -> None:
    """Check that a key may be varied.

    Raises:
        ParamsError: it is of another section, has an option of its own, or would change nothing.
    """
    section, _, name = key.partition(".")
    if not name:
        raise ParamsError(f"{given} names no key of params.yaml; expected {example}.")
    if key in _OWN:
        raise ParamsError(f"{given} sets {key}, which has another place: {_OWN[key]}.")
    if section not in ("embed", "train"):
        raise ParamsError(
            f"{given} sets {key}; a sweep varies keys of embed and train, such as {example}. What "
            f"is of other sections has no effect on what it measures, or changes what is measured."
        )


def _words(text: str, option: str, example: str) -> list[str]:
    """Return the values between commas, but for those within brackets."""
    words = [word.strip() for word in re.split(r",(?![^\[{]*[\]}])", text)]
    if not all(words):
        raise ParamsError(f"{option} is {text!r}; expected values with commas between: {example}.")
    if twice := [word for number, word in enumerate(words) if word in words[:number]]:
        raise ParamsError(f"{option} has {twice[0]} twice; expected each value once.")
    return words


def _value(word: str) -> Any:
    try:
        return params.parse(f"value: {word}", Path("--set"))["value"]
    except (ParamsError, yaml.YAMLError):
        return word


def cells(
    asked: Asked, content: Mapping[str, Any], models: Mapping[str, type[Section]]
) -> list[Cell]:
    """Return the cells, each once; whole grids of one seed after the other.

    ``content``: of params.yaml; ``models``: of its sections.

    Raises:
        ParamsError: a value is wrong, or has no effect in any cell.
    """
    found: dict[str, Cell] = {}
    keys = list(asked.settings)
    alike = frozenset(key for key, values in asked.settings.items() if len(values) == 1)
    used: set[str] = set()
    for seed in range(asked.seeds):
        for backbone, freeze in itertools.product(asked.backbones or (None,), asked.freeze):
            for settings in itertools.product(*asked.settings.values()):
                for images in asked.images:
                    values = {
                        **({} if backbone is None else {"embed.backbone": backbone}),
                        "embed.freeze": freeze,
                        **dict(zip(keys, settings, strict=True)),
                        **({} if images is None else {"split.images": images}),
                    }
                    one = replace(cell(values, content, models, seed), alike=alike)
                    used |= one.values.keys()
                    found.setdefault(_same(one, models), one)
    if unused := [key for key in keys if key not in used]:
        raise ParamsError(
            f"--set {unused[0]} has no effect at --freeze "
            f"{','.join(map(str, asked.freeze))}. Take it out, or open more."
        )
    return list(found.values())


def with_all(
    found: Sequence[Cell],
    available: int,
    content: Mapping[str, Any],
    models: Mapping[str, type[Section]],
) -> list[Cell]:
    """Return cells that name as many images as can train as those of all images, each once."""
    kept: dict[str, Cell] = {}
    for one in found:
        if one.images == available:
            values = {key: value for key, value in one.values.items() if key != "split.images"}
            one = replace(cell(values, content, models, one.seed), alike=one.alike)
        kept.setdefault(_same(one, models), one)
    return list(kept.values())


def _same(one: Cell, models: Mapping[str, type[Section]]) -> str:
    """Return what is equal where two cells would compute the same."""
    return str([_checked(name, one.content, models) for name in models])


def cell(
    values: Mapping[str, Any],
    content: Mapping[str, Any],
    models: Mapping[str, type[Section]],
    seed: int,
) -> Cell:
    """Return one cell, without what has no effect in it.

    Raises:
        ParamsError: a value is wrong.
    """
    changed = {name: dict(content.get(name) or {}) for name in models}
    split, trained = changed["split"], changed["train"]
    split.pop("images", None)
    split.pop("images_seed", None)
    trained |= {"seed": seed, "fit_on": "train"}
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    if split.get("images") is not None and seed:
        split["images_seed"] = seed
    frozen = cast(embed.Params, _checked("embed", changed, models))
    open_stages = _open_stages(frozen)
    recipe = cast(train.Params, _checked("train", changed, models))
    reasons = train.without_effects(recipe, frozen.freeze, open_stages)
    idle = {
        "embed": _idle(frozen, open_stages),
        "train": {name for _, names in reasons for name in names},
    }
    for section, names in idle.items():
        defaults = models[section].model_fields
        for name in names & changed[section].keys():
            # A default that is written down promises nothing.
            before = (content.get(section) or {}).get(name)
            if before is not None and before == defaults[name].default:
                changed[section][name] = before
            else:
                del changed[section][name]
    if trained.get("seed") == 0 and "seed" not in (content.get("train") or {}):
        del trained["seed"]
    found = {name: _checked(name, changed, models) for name in models}
    train.check_effects(cast(train.Params, found["train"]), frozen.freeze, open_stages)
    kept = {
        key: value
        for key, value in values.items()
        if key.partition(".")[2] not in idle.get(key.partition(".")[0], ())
    }
    return Cell(kept, {**copy.deepcopy(dict(content)), **changed}, seed, split.get("images"))


def resolved(content: Mapping[str, Any], models: Mapping[str, type[Section]]) -> dict[str, Section]:
    """Return the sections that a cell's stages run with, as the command line would fill them in.

    Raises:
        ParamsError: they do not fit each other.
    """
    found = {name: _checked(name, content, models) for name in models}
    found["embed"] = frozen = embed.with_threads(cast(embed.Params, found["embed"]))
    found["ingest"] = sampling.resolve(cast(ingest.Params, found["ingest"]), frozen.backbone)
    return found


def _checked(name: str, content: Mapping[str, Any], models: Mapping[str, type[Section]]) -> Section:
    return params.validate(Path("the command"), models[name], content[name] or {}, prefix=name)


def _open_stages(frozen: embed.Params) -> int:
    """Return how many stages a level leaves open.

    Raises:
        ParamsError: the network has no such boundary, or the number of images decides.
    """
    if frozen.freeze == activations.AUTO:
        raise ParamsError(
            "--freeze has auto, which is one of the other levels; expected all, none, a number of "
            "stages or the last frozen one. 'tlpipe backbones' shows their names."
        )
    stages = describe(frozen.backbone).stages
    return len(stages) - activations.frozen_stages(frozen.freeze, stages, labels=[""])


def _idle(frozen: embed.Params, open_stages: int) -> set[str]:
    """Return keys of embed that have no effect at a level."""
    if open_stages == len(describe(frozen.backbone).stages):
        return {"advice", "views"}
    return {"advice"} if frozen.views else {"advice", "augmentation"}
