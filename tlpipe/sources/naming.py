"""Notice names that share a prefix: a patient, a series or a video that must stay in one split."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tlpipe.sources.candidates import Candidate, given_split

# What follows the class folder, the coarsest first. What does not match belongs to no group.
_FORMS = {
    "the folder inside of its class": r"(?:(?P<group>[^/]+)/)?",
    "what its name begins with": r"(?:.*/)?(?:(?P<group>[^-_. /]+)[-_. ][^/]+\.[^./]+$)?",
    "its name up to the last separator": r"(?:.*/)?(?:(?P<group>[^/]+)[-_. ][^-_. /]+\.[^./]+$)?",
    "its name up to the number": r"(?:.*/)?(?:(?P<group>[^/]*[^/\d])\d+\.[^./]+$)?",
}
LEAST_GROUPS = 6
_LEAST_MATCHED, _MOST_OF_ONE = 0.9, 1 / 3  # of all images
_FEW = 10_000  # names after which a form that makes groups of one is given up


def advise(candidates: Iterable[Candidate], roots: Mapping[str, str]) -> str | None:
    """Return a sentence on names that share prefixes, with the pattern that groups by them.

    ``roots``: the folders whose folders are classes, and the split of each, as in ``Layout``. A
    prefix that all images of a class have says nothing, nor does one that nearly all images have,
    nor one of a single image.
    """
    start = pattern_of_folders(roots)
    if start is None:
        return None
    forms = [_Form(what, re.compile(start + rest)) for what, rest in _FORMS.items()]
    count = 0
    for count, candidate in enumerate(candidates, start=1):
        for form in forms:
            form.add(candidate)
        if count % _FEW == 0:
            forms = [form for form in forms if len(form.groups) <= form.groups.total() / 2]
    for form in forms:
        if form.makes_groups(count):
            return form.advice()
    return None


@dataclass
class _Form:
    """One way to read a group from a name, and what it finds."""

    what: str
    pattern: re.Pattern[str]
    groups: Counter[str] = field(default_factory=Counter)
    of_label: dict[str, set[str]] = field(default_factory=dict)
    example: tuple[str, str] = ("", "")
    _last: tuple[str, str] = ("", "")

    def add(self, candidate: Candidate) -> None:
        """Count the group of one more image."""
        some = self.of_label.setdefault(candidate.label, set())
        match = self.pattern.search(candidate.name)
        group = match["group"] if match else None
        if not group:
            return
        self.groups[group] += 1
        if len(some) < 2:
            some.add(group)
        if not self.example[0] and group == self._last[0]:
            self.example = self._last[1], candidate.name
        self._last = group, candidate.name

    def makes_groups(self, images: int) -> bool:
        """Return whether the groups look like such, and not like numbers or classes."""
        groups, matched = len(self.groups), self.groups.total()
        several = sum(len(some) > 1 for some in self.of_label.values())
        return (
            groups >= max(LEAST_GROUPS, len(self.of_label))
            and matched >= max(_LEAST_MATCHED * images, 2 * groups)
            and max(self.groups.values()) <= _MOST_OF_ONE * images
            and 2 * several >= len(self.of_label)
            and bool(self.example[0])
        )

    def advice(self) -> str:
        """Return what to do."""
        one, other = self.example
        pattern = self.pattern.pattern.replace("'", "''")
        return (
            f"{self.groups.total()} images share {len(self.groups)} prefixes, as {one} and {other} "
            f"do, and no group is given. If images of one prefix show the same thing (a patient, a "
            f"series, a video), splits by chance leak; keep them together by {self.what}: "
            f"ingest.pattern: '{pattern}'"
        )


def pattern_of_folders(roots: Mapping[str, str]) -> str | None:
    """Return a pattern that reads the label, and the split, from the folders; None if none can."""
    if list(roots.values()) == [""]:
        (root,) = roots
        return f"^{re.escape(root)}(?P<label>[^/]+)/"
    words, tops, depths = [], set(), set()
    for root, split in roots.items():
        parts = root.split("/")[:-1]
        place = next((i for i, part in enumerate(parts) if given_split(part) == split), None)
        if place is None:
            return None
        words.append(re.escape(parts[place]))
        tops.add("".join(f"{re.escape(part)}/" for part in parts[:place]))
        depths.add(len(parts) - place - 1)
    if len(tops) != 1 or len(depths) != 1:
        return None
    return f"^{tops.pop()}(?P<split>{'|'.join(words)})/{'[^/]+/' * depths.pop()}(?P<label>[^/]+)/"
