"""Find out whether an ONNX file wants data from other files, without the package ``onnx``.

A graph may name any path for its weights, also outside its folder. ONNX Runtime would open it, so
this is asked before. Only the structure is read, field by field, as Protocol Buffers lay it out.

Source: onnx.proto of ONNX, and "Encoding" of Protocol Buffers.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
# Which fields of a message hold further messages that may hold tensors.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def has_external_data(path: Path) -> bool:
    """Return whether a tensor of an ONNX file lies in another file.

    Raises:
        ValueError: it is no ONNX file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        waiting = [("model", 0, len(content))]
        while waiting:  # not by recursion: graphs hold graphs, as deep as their author likes
            kind, start, end = waiting.pop()
            for number, value, stop in _fields(content, start, end):
                if kind == "tensor":
                    # data_location is 0 for data that stand in the tensor itself.
                    if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                        return True
                elif stop and (inside := _INSIDE[kind].get(number)):
                    waiting.append((inside, value, stop))
    return False


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, value and 0 of each field; of those with bytes, begin and end of these."""
    while place < end:
        tag, place = _varint(content, place, end)
        number, kind = tag >> 3, tag & 7
        if tag >> 32:  # others would read it as the tag of its lower bits
            raise ValueError("a field's number has more than 32 bits")
        value, stop = place, 0
        if kind == _VARINT:
            value, place = _varint(content, place, end)
        elif kind == _BYTES:
            size, value = _varint(content, place, end)
            place = stop = value + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if place > end:
            raise ValueError("it ends in the middle of a field")
        yield number, value, stop


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 64:
        byte = content[place]
        place, value = place + 1, value | (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("it ends in the middle of a number")
