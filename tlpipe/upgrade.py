"""What tlpipe writes into a project, and how an upgrade changes it along.

Files that tlpipe generates: a user may edit each of them, so another version's text is merged in,
as Git merges branches: what was written last is the base, the user's file the one side, the new
text the other. The base is kept in the project, in ``.tlpipe/``, and committed. Its digest would
not do: it says that a file was edited, not what; and neither the version that wrote it nor the
commit that holds it as it was written needs to exist: files are edited before they are committed.
Each base ends in ``.base``, since DVC takes every ``dvc.yaml`` for a pipeline.

Keys of ``params.yaml`` that a version renamed, took out or gave another default: a key keeps its
value under its new name, and a default that the project relied on is written out, so that none of
its results changes silently. The text is edited where the YAML parser says that a key stands.
ruamel.yaml writes the whole file anew: it indents lists otherwise, and with a key it takes out the
comment above the next one.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tlpipe import files, graph
from tlpipe.errors import ArtifactError, ParamsError

BASES = ".tlpipe"
# Files of the package that a project holds as they are.
_COPIED = ("flows/__init__.py", "flows/pipeline.py", "flows/sweep.py", "prefect.yaml")


def root() -> Path:
    """Return where ``init`` copies from: the package, or the repository that it comes from."""
    packed = Path(__file__).with_name("template")
    return packed if (packed / "constraints.txt").exists() else packed.parents[1]


def template(path: str) -> str:
    """Return the text of a file that ``init`` writes, or fills in."""
    own = Path(__file__).with_name("template") / path
    return (own if own.exists() else root() / path).read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """Return the files that ``init`` writes and ``upgrade`` merges, but for ``dvc.yaml``, by path.

    The version stands in the constraints alone, so that who writes ``gpu`` into the requirements
    has no conflict with each new one.
    """
    found = {path: template(path) for path in _COPIED}
    found[".gitignore"], found[".dvcignore"] = template("gitignore"), "__pycache__/\n.*.lock\n"
    found["constraints.txt"] = f"tlpipe=={version('tlpipe')}\n{template('constraints.txt')}"
    found["requirements.txt"] = (
        "# tlpipe is in no package index: install it first, from the wheel or address you have.\n"
        "# Then pip install -r requirements.txt; with an NVIDIA GPU, write gpu for cpu first.\n"
        "-c constraints.txt\ntlpipe[pipeline,serve,cpu]\n"
    )
    # Lines of both tables do not depend on one another. DVC compares bytes: the same everywhere.
    tables = ("labels.csv", "splits.csv")
    kept = sorted([*found, "*.yaml", "data/*.yaml", "dvc.lock", *tables, ".gitattributes"])
    lines = [f"/{path} text eol=lf\n" for path in [*kept, f"{BASES}/**"]]
    found[".gitattributes"] = "".join([*lines, *(f"{path} merge=union\n" for path in tables)])
    return found


def base(path: str) -> str:
    """Return where the text that tlpipe wrote last for ``path`` is kept, both from the project on.

    Example:
        >>> base("flows/pipeline.py")
        '.tlpipe/flows/pipeline.py.base'
    """
    return f"{BASES}/{path}.base"


def is_of_init(folder: Path) -> bool:
    """Return whether ``init`` made a project; the files of the repository are its own.

    There, ``dvc.yaml`` alone has a base. Where all bases are lost, ``init`` made it.
    """
    found = [path.relative_to(folder).as_posix() for path in (folder / BASES).rglob("*.base")]
    return found != [base(graph.FILE)]


def is_written(path: Path) -> bool:
    """Return whether tlpipe wrote a ``dvc.yaml``: its first line says so."""
    return (text(path) or "").startswith(graph.MARK)


def text(path: Path) -> str | None:
    r"""Return what a file holds, of any encoding, with ``\n`` for the line ends of Windows.

    None where there is no file. Where only some lines end in ``\r\n``, they stay as they are.
    """
    found = _content(path)
    return found if found is None or not _is_of_windows(found) else found.replace("\r\n", "\n")


def write(path: Path, new: str) -> None:
    r"""Write a file that may have been in another encoding, unless it holds that already.

    It keeps its line ends where they are ``\r\n``, and a link leads where it led. A file comes
    before its base: after a crash between the two, both sides have changed alike.
    """
    before = _content(path)
    if before is not None and _is_of_windows(before):
        new = new.replace("\n", "\r\n")
    if before != new:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, new.encode(errors="surrogateescape"))


def _content(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _is_of_windows(content: str) -> bool:
    return 0 < content.count("\n") == content.count("\r\n")


def merged(folder: Path, path: str, new: str) -> str | None:
    """Return what a file of a project is with another text of tlpipe; None: it is not there.

    Where both sides changed the same lines, both stand there, between the marks of Git. A file that
    the user took away stays away; without ``dvc.yaml`` there is no project, so it comes back. Where
    the base is lost, what differs is a conflict.

    Raises:
        ArtifactError: marks of an earlier conflict are still there, tlpipe did not write the file,
            or Git does not merge.
    """
    current, before = text(folder / path), text(folder / base(path))
    if current is None:
        return new if before is None or path == graph.FILE else None
    _check_settled(folder, path)
    if before is None and new.rstrip() in current:
        before = new  # what is there whole was written
    if new in (current, before):
        return current
    if before is None and path == graph.FILE and not is_written(folder / path):
        raise ArtifactError(
            f"{folder / path} is not written by tlpipe: its first line is not '{graph.MARK} ...'. "
            f"Move it away, run 'tlpipe upgrade' again, and put your own stages below the line "
            f"that says so."
        )
    return new if current == before else _merge(path, current, before, new)


def check_settled(folder: Path) -> None:
    """Check that no file that tlpipe writes has marks of a conflict.

    Raises:
        ArtifactError: one has.
    """
    for path in (graph.FILE, *(texts() if is_of_init(folder) else ())):
        _check_settled(folder, path)


def _check_settled(folder: Path, path: str) -> None:
    if lines := conflicts(text(folder / path) or ""):
        raise ArtifactError(
            f"{folder / path} has marks of a conflict in {said(lines)}. Write there what is to "
            f"hold, take out the lines that begin with <<<<<<<, |||||||, ======= and >>>>>>>, and "
            f"run 'tlpipe upgrade' again."
        )
    if lines := conflicts(text(folder / base(path)) or ""):
        raise ArtifactError(
            f"{folder / base(path)} has marks of a conflict in {said(lines)}; it holds what tlpipe "
            f"wrote last for {path}. Take either side of it, such as by 'git checkout --ours', and "
            f"run 'tlpipe upgrade' again."
        )


def conflicts(text: str) -> list[int]:
    r"""Return the lines, from 1 on, in which a conflict begins.

    Example:
        >>> conflicts("a\n<<<<<<< yours\nb\n=======\nc\n>>>>>>> tlpipe 0.2.0\n")
        [2]
    """
    return [n for n, line in enumerate(text.splitlines(), 1) if re.match("<{7}( |$)", line)]


def said(lines: list[int]) -> str:
    """Return line numbers as a message names them."""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))}"


def _merge(path: str, current: str, before: str | None, new: str) -> str:
    names = {"yours": current, "written before": before or "", f"tlpipe {version('tlpipe')}": new}
    with tempfile.TemporaryDirectory() as folder:
        for number, side in enumerate(names.values()):
            write(Path(folder, str(number)), side)
        labels = [word for name in names for word in ("-L", name)]
        # Without a base Git takes what is equal out of the conflict, if it need not show that.
        style = ["--diff3"] * (before is not None)
        command = ["git", "merge-file", "-p", *style, *labels, "0", "1", "2"]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True)
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} was edited and is not what tlpipe writes now; Git merges the two, and is "
                f"not installed. Install it, and run 'tlpipe upgrade' again."
            ) from None
    if not 0 <= result.returncode <= 127:  # else it is how many conflicts there are
        why = " ".join(result.stderr.decode(errors="replace").split())
        raise ArtifactError(
            f"{path} cannot be merged: 'git merge-file' ends with exit code {result.returncode}"
            f"{f': {why}' if why else ''}. Nothing was changed; run 'tlpipe upgrade' again."
        )
    return result.stdout.decode("utf-8", errors="surrogateescape")


@dataclass(frozen=True)
class Renamed:
    """A key has another name; ``old`` with its sections (``train.rate``), ``new`` without."""

    old: str
    new: str


@dataclass(frozen=True)
class Removed:
    """A key is gone; ``reason`` follows its name and "is taken out:"."""

    key: str
    reason: str


@dataclass(frozen=True)
class NewDefault:
    """A key has another default; ``before``: the one that earlier versions have."""

    key: str
    before: object


Change = Renamed | Removed | NewDefault
# From the oldest on: the version that a change came with, and the change.
CHANGES: tuple[tuple[str, Change], ...] = ()


def migrate(text: str, since: str, *, until: str) -> tuple[str, list[str]]:
    r"""Return a ``params.yaml`` of one version as one of another, and a line for each change.

    What is not concerned stays as it is, with comments and layout. Doing it twice changes nothing
    more. A pre-release counts as the version that it comes before: it has the changes of that.

    Raises:
        ParamsError: a renamed key stands there under both names, or the text is laid out so that
            more or less than the key would change.

    Example:
        >>> migrate("train:\n  epochs: 3\n", "0.1.0", until="0.1.0")
        ('train:\n  epochs: 3\n', [])
    """
    from packaging.version import Version

    def released(name: str) -> Version:
        return Version(Version(name).base_version)

    said = []
    for since_version, change in CHANGES:
        if released(since) < released(since_version) <= released(until):
            new, what = _apply(text, change)
            if new != text:
                what = f"{what} (tlpipe {since_version})"
                _check(text, new, change, what)
                text = new
                said.append(what)
    return text, said


def _check(text: str, new: str, change: Change, what: str) -> None:
    """Check by the YAML parser that a change did to a text what it does to mappings.

    It does more or less in sections that share an anchor, for example.

    Raises:
        ParamsError: it does not.
    """
    try:
        expected = _changed(_plain(yaml.safe_load(text)) or {}, change)
        if _plain(yaml.safe_load(new)) == _plain(expected):
            return
    except (yaml.YAMLError, TypeError, AttributeError):  # also where a section is no mapping
        pass
    raise ParamsError(
        f"params.yaml cannot be changed as an upgrade asks, {what}: it is laid out so that more or "
        f"less would change, as with an anchor, braces around all of it or '...' at its end. "
        f"Change that key by hand, and run 'tlpipe upgrade' again."
    )


def _changed(content: dict[str, Any], change: Change) -> dict[str, Any]:
    """Return what parameters are with a change."""
    *sections, name = (change.old if isinstance(change, Renamed) else change.key).split(".")
    mapping = content
    for section in sections:
        if mapping.get(section) is None:
            mapping[section] = {}
        mapping = mapping[section]
    if isinstance(change, Renamed):
        mapping[change.new] = mapping.pop(name, None)
    elif isinstance(change, Removed):
        mapping.pop(name, None)
    else:
        mapping.setdefault(name, change.before)
    return content


def _plain(content: Any) -> Any:
    """Return a copy in which no two keys share a mapping; None for one that holds nothing."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()} or None
    return content


def _apply(text: str, change: Change) -> tuple[str, str]:
    if isinstance(change, Renamed):
        section = change.old.rpartition(".")[0]
        if (found := _value(text, change.old)) is None:
            return text, ""
        if _value(text, f"{section}.{change.new}") is not None:
            raise ParamsError(
                f"params.yaml has {change.old} and {section}.{change.new}, which is its new name. "
                f"Take one of them out."
            )
        key, _ = found
        new = text[: key.start_mark.index] + change.new + text[key.end_mark.index :]
        return new, f"{change.old} is named {section}.{change.new}"
    if isinstance(change, Removed):
        if (found := _value(text, change.key)) is None:
            return text, ""
        value = text[found[1].start_mark.index : _end(text, found[1])]
        return _without(text, change.key), (
            f"{change.key}: {' '.join(value.split())} is taken out: {change.reason}"
        )
    if _value(text, change.key) is not None:
        return text, ""
    return _with(text, change.key, change.before), (
        f"{change.key}: {change.before} is written out: it was the default, and is no more"
    )


def _way(text: str, key: str) -> Iterator[tuple[yaml.MappingNode, tuple[yaml.Node, yaml.Node]]]:
    """Yield the mapping, and the key with its value, for each name of a dotted key that is there.

    Raises:
        ParamsError: the text is no YAML.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ParamsError(f"params.yaml is no plain YAML: {' '.join(str(error).split())}") from None
    for name in key.split("."):
        if not isinstance(node, yaml.MappingNode):
            return
        pair = next((pair for pair in node.value if pair[0].value == name), None)
        if pair is None:
            return
        yield node, pair
        node = pair[1]


def _value(text: str, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the nodes of a key and its value; None where it is not there."""
    found = list(_way(text, key))
    return found[-1][1] if len(found) == len(key.split(".")) else None


def _end(text: str, value: yaml.Node) -> int:
    """Return where a value ends; the parser counts the comments after a block to it."""
    if isinstance(value, yaml.CollectionNode) and not value.flow_style and value.value:
        last = value.value[-1]
        return _end(text, last[1] if isinstance(value, yaml.MappingNode) else last)
    return len(text[: value.end_mark.index].rstrip())


def _without(text: str, key: str) -> str:
    """Take out a key and its value: in a block their lines, with what is said behind them."""
    *_, (mapping, (name, value)) = _way(text, key)
    if mapping.flow_style:
        number = [pair[0] for pair in mapping.value].index(name)
        if number + 1 < len(mapping.value):
            start, end = name.start_mark.index, mapping.value[number + 1][0].start_mark.index
        else:
            before = mapping.value[number - 1][1].end_mark.index if number else None
            start, end = before or name.start_mark.index, value.end_mark.index
        return text[:start] + text[end:]
    start = name.start_mark.index - name.start_mark.column
    end = text.find("\n", _end(text, value))
    return text[:start] + (text[end + 1 :] if end >= 0 else "")


def _with(text: str, key: str, value: object) -> str:
    """Set a key that is not there, as the first of its section."""
    way = [pair for _, pair in _way(text, key)]
    name, *inner = key.split(".")[len(way) :]
    for word in reversed(inner):
        value = {word: value}
    lines = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).splitlines()
    if not way:
        return "\n".join([text.rstrip("\n"), "", *lines, ""]).lstrip("\n")
    section, found = way[-1]
    if isinstance(found, yaml.MappingNode) and found.flow_style:
        start = found.start_mark.index + 1
        flow = yaml.safe_dump({name: value}, default_flow_style=True, width=10_000).strip()[1:-1]
        return f"{text[:start]}{flow}{', ' * bool(found.value)}{text[start:]}"
    if isinstance(found, yaml.MappingNode):
        first = found.value[0][0].start_mark
        start, indent = first.index - first.column, first.column
    else:  # null, said or not
        text = text[: found.start_mark.index] + text[found.end_mark.index :]
        start = text.find("\n", section.end_mark.index) + 1 or len(text)
        indent = section.start_mark.column + 2
        if start == len(text) and not text.endswith("\n"):
            text, start = f"{text}\n", start + 1
    return text[:start] + "".join(f"{' ' * indent}{line}\n" for line in lines) + text[start:]
