import hashlib
from pathlib import Path

import numpy as np
import pytest

from tlpipe.data.pixels import Chunks, ChunkWriter

ROW = (5, 3)


def keys(count: int, seed: int = 0) -> list[bytes]:
    return [bytes(row) for row in np.random.default_rng(seed).integers(0, 256, (count, 8), "u1")]


def rows(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *ROW), "u1")


def write(
    folder: Path, named: list[bytes], given: list[np.ndarray | int], known: Chunks | None = None
) -> Chunks:
    folder.mkdir(parents=True)
    writer = ChunkWriter(folder, ROW, "|u1", known)
    for key, row in zip(named, given, strict=True):
        writer.append(key, row)
    writer.close()
    return Chunks(folder, tuple(writer.names), ROW, "|u1")


def content(chunks: Chunks) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in chunks.folder.iterdir()}


def test_chunks_are_named_by_their_bytes(tmp_path: Path) -> None:
    named, given = keys(100), rows(100)
    one = write(tmp_path / "one", named, list(given))
    assert (one[:] == given).all()
    assert len(one.names) > 1
    for name, count in one.names:
        array = np.load(one.folder / name)
        whole = (one.folder / name).read_bytes()
        header = whole[: -array.nbytes]
        assert array.shape == (count, *ROW)
        assert name == hashlib.sha256(array.tobytes() + header).hexdigest()[:32] + ".npy"
    # The same images with other content: a name of keys alone would be the same.
    changed = given.copy()
    changed[40, 0, 0] ^= 1
    two = write(tmp_path / "two", named, list(changed))
    differ = [a != b for a, b in zip(one.names, two.names, strict=True)]
    assert sum(differ) == 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_taken_over_the_bytes_are_those_of_writing_anew(
    tmp_path: Path, seed: int
) -> None:
    named, given = keys(300), rows(300)
    some = np.random.default_rng(seed)
    before = np.flatnonzero(some.random(300) < (0.97, 0.5)[seed % 2])
    known = write(tmp_path / "a", [named[i] for i in before], [given[i] for i in before])
    after = np.flatnonzero(some.random(300) < (0.99, 0.5)[seed % 2])
    if seed > 3:
        after = np.concatenate([after, after[20:60]])  # equal images
    if seed > 5:
        some.shuffle(after)
    places = {int(i): row for row, i in enumerate(before)}
    mixed = [places.get(int(i), given[i]) for i in after]
    found = write(tmp_path / "b", [named[i] for i in after], mixed, known)
    expected = write(tmp_path / "c", [named[i] for i in after], [given[i] for i in after])
    assert found.names == expected.names
    assert content(found) == content(expected)
    assert (found[:] == given[after]).all()


def test_only_the_chunk_with_a_new_image_is_written_again(tmp_path: Path) -> None:
    named, given = keys(300), rows(300)
    old = [i for i in range(300) if i != 150]
    known = write(tmp_path / "a", [named[i] for i in old], [given[i] for i in old])
    places: list[np.ndarray | int] = [*range(150), given[150], *range(150, 299)]
    found = write(tmp_path / "b", named, places, known)
    written = [n for n, _ in found.names if not (known.folder / n).exists()]
    assert len(written) == 1 and len(found.names) > 4
    for name, _ in found.names:
        assert name in written or (found.folder / name).samefile(known.folder / name)
    assert (found[:] == given).all()


def test_a_chunk_whose_rows_changed_places_is_another(tmp_path: Path) -> None:
    named, given = keys(100), rows(100)
    known = write(tmp_path / "a", named, list(given))
    (_, first), (_, count), *_ = known.names
    assert count > 3
    order = list(range(100))
    order[first + 1], order[first + 2] = first + 2, first + 1
    found = write(tmp_path / "b", named, list(order), known)
    assert (found[:] == given[order]).all()
    assert [n != m for n, m in zip(found.names, known.names, strict=True)].index(True) == 1


@pytest.mark.parametrize("damage", ["bit", "header", "cut", "longer", "gone", "another"])
def test_damaged_chunks_are_told_by_their_bytes(tmp_path: Path, damage: str) -> None:
    chunks = write(tmp_path / "a", keys(200), list(rows(200)))
    assert chunks.intact().all() and chunks.intact().shape == (200,)
    path = chunks.folder / chunks.names[1][0]
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-1] ^= 1
    elif damage == "header":
        data[20] ^= 1
    elif damage == "cut":
        del data[-ROW[0] :]
    elif damage == "longer":
        data += b"\0"
    elif damage == "another":
        data = bytearray((chunks.folder / chunks.names[2][0]).read_bytes())
    path.unlink()
    if damage != "gone":
        path.write_bytes(data)
    start = chunks.names[0][1]
    expected = np.ones(200, bool)
    expected[start : start + chunks.names[1][1]] = False
    assert (chunks.intact() == expected).all()


def test_no_rows_are_no_chunks(tmp_path: Path) -> None:
    chunks = write(tmp_path / "a", [], [])
    assert chunks.names == () and chunks.intact().shape == (0,)
