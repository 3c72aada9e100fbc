"""MATLAB 5-7 files in: numbers, text, cells and structures, which is what the data sets' files consist of.

They are read here, not with scipy's `loadmat`: a file with deeply nested cells crashes that one, and a small compressed
one may claim any memory.

The format ("MAT-File Format", MathWorks): a header of 128 bytes, then elements of a tag and data; an array is an
element of elements.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError

LIMIT = 512 << 20  # bytes of a file, and that its variables may unpack to
MOST_FIELDS = 1000  # of a structure
NAME_LENGTH = 63  # letters of a variable's name, which MATLAB cuts there
DEEPEST = 8  # cells and structures within one another; OSIE's file has 5

# The format's own numbers.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8"}
WIDE_TEXTS = {4: "utf-16", 17: "utf-16", 18: "utf-32"}  # in the file's byte order
ARRAY, COMPRESSED = 14, 15
CELL, STRUCTURE, TEXT = 1, 2, 4
NUMERIC = range(6, 16)
IS_COMPLEX = 0x0800
NOTHING = np.empty((0, 0))  # one object for all empty cells, of which a small file may hold very many


def read_matlab(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named variables that a MATLAB 5-7 file holds.

    Numbers come as arrays, text as str, cells as lists in column order, structures as dicts.

    Raises:
        UserError: no such file, of another version, damaged, or a named variable with contents of other kinds.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the data set's own .mat file")
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT >> 20} MiB")
        return dict(_matlab_variables(memoryview(path.read_bytes()), names))
    except (ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is no MATLAB 5-7 file as expected ({error}): save it anew with -v7") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: give the data set's own file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def cells_of(path: Path, value: Any, name: str) -> list:
    """A value of the file that must be a cell array; `name` says which in the UserError where it is none."""
    if not isinstance(value, list):
        raise UserError(f"{path}: {name} is not a cell array: give the data set's own file")
    return value


def field_of(path: Path, structure: Any, name: str, kind: type) -> Any:
    """The field of a structure, of a kind (str, dict, list, np.ndarray); empty ones fit every kind.

    Raises:
        UserError: no structure, no such field, or of another kind.
    """
    value = structure.get(name) if isinstance(structure, dict) else None
    if kind is not list and isinstance(value, list) and not value:
        value = kind()
    if not isinstance(value, kind):
        raise UserError(
            f"{path}: an entry lacks the field {name}, or it is of another kind: give the data set's own file"
        )
    return value


def _matlab_variables(data: memoryview, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if order is None or bytes(data[:19]) != b"MATLAB 5.0 MAT-file":
        raise ValueError("its header is another")
    place, left = 128, LIMIT
    while place < len(data):
        kind, content, place = _element(data, place, order)
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, max(left, 1))  # 0 would mean no limit
            left -= len(unpacked)
            if unpacker.unconsumed_tail or not unpacker.eof:
                raise ValueError("a variable is cut off or too large")
            kind, content, _ = _element(memoryview(unpacked), 0, order)
        if kind != ARRAY:
            raise ValueError(f"an element of kind {kind}")
        name = _array_head(content, order)[2] if content else ""
        if name in names:
            yield name, _array(content, order, 1)


def _element(data: memoryview, place: int, order: str) -> tuple[int, memoryview, int]:
    """Kind and content of the element at `place`, and the place after it."""
    kind, size = struct.unpack_from(order + "II", data, place)
    if kind >> 16:  # up to 4 bytes sit in the tag itself
        kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        if size > 4:
            raise ValueError("a short element is too long")
    else:
        start = place + 8
        end = start + size + (0 if kind == COMPRESSED else -size % 8)
    if start + size > len(data):
        raise ValueError("an element is cut off")
    return kind, data[start : start + size], end


def _numbers(data: memoryview, place: int, order: str) -> tuple[np.ndarray, int]:
    kind, content, place = _element(data, place, order)
    if kind not in NUMBERS:
        raise ValueError(f"numbers of kind {kind}")
    return np.frombuffer(content, np.dtype(NUMBERS[kind]).newbyteorder(order)), place


def _array_head(data: memoryview, order: str) -> tuple[int, list[int], str, int]:
    """Flags, shape and name of an array element's content, and the place after them."""
    flags, place = _numbers(data, 0, order)
    dimensions, place = _numbers(data, place, order)
    _, name, place = _element(data, place, order)
    if flags.size != 2 or dimensions.size < 2 or (dimensions < 0).any():
        raise ValueError("a damaged array")
    return int(flags[0]), dimensions.tolist(), bytes(name).decode("latin-1"), place


def _array(data: memoryview, order: str, depth: int) -> Any:
    """Value of an array element's content.

    Raises:
        ValueError: not as the format says, nested too deeply, or of a kind that is not read.
    """
    if depth > DEEPEST:
        raise ValueError("cells nested too deeply")
    if not data:
        return NOTHING
    flags, shape, _, place = _array_head(data, order)
    count, kind = math.prod(shape), flags & 0xFF
    if kind == CELL:
        return _arrays(data, place, order, depth, count)
    if kind == STRUCTURE and count == 1:
        return _structure(data, place, order, depth)
    if kind == TEXT:
        encoding, content, _ = _element(data, place, order)
        codecs = TEXTS | {key: codec + {"<": "-le", ">": "-be"}[order] for key, codec in WIDE_TEXTS.items()}
        if encoding not in codecs:
            raise ValueError(f"text of kind {encoding}")
        return bytes(content).decode(codecs[encoding])
    if kind not in NUMERIC or flags & IS_COMPLEX:
        raise ValueError(f"an array of kind {kind}, or of complex numbers")
    values, _ = _numbers(data, place, order)
    if values.size != count:
        raise ValueError("an array of another size than it says")
    return values.reshape(shape, order="F")


def _arrays(data: memoryview, place: int, order: str, depth: int, count: int) -> list:
    """The values of `count` array elements one after another."""
    if count * 8 > len(data) - place:
        raise ValueError("a cell array is cut off")
    values = []
    for _ in range(count):
        kind, content, place = _element(data, place, order)
        if kind != ARRAY:
            raise ValueError(f"a cell of kind {kind}")
        values.append(_array(content, order, depth + 1))
    return values


def _structure(data: memoryview, place: int, order: str, depth: int) -> dict[str, Any]:
    length, place = _numbers(data, place, order)
    _, content, place = _element(data, place, order)
    width = int(length[0]) if length.size == 1 else 0
    if width < 1 or len(content) // width > MOST_FIELDS:
        raise ValueError("a damaged structure")
    names = [bytes(content[i : i + width]).split(b"\0")[0].decode("latin-1") for i in range(0, len(content), width)]
    return dict(zip(names, _arrays(data, place, order, depth, len(names)), strict=True))
