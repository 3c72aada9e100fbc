"""Caffe's files without Caffe: a reader of the protobuf wire format for networks and mean images.

A message is a run of fields; each starts with a varint `number << 3 | wire type`. Field numbers are those of BVLC's
caffe.proto (commit 9b8915401). Blobs are views of the memory-mapped file wherever their floats lie in one piece.
"""

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from models.errors import UserError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
NET_LAYERS, NET_LAYER = 2, 100  # of NetParameter: the older and the newer list of layers
LAYER_NAME, LAYER_BLOBS = 1, 7
V1_NESTED, V1_NAME, V1_BLOBS = 1, 4, 6
V0_NAME, V0_BLOBS = 1, 50
BLOB_LEGACY_DIMS = (1, 2, 3, 4)  # num, channels, height, width
BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE_DATA = 5, 7, 8
SHAPE_DIM = 1
MAX_DIMENSIONS = 32  # as Caffe


class _Malformed(Exception):
    """The bytes are no message of the expected kind."""


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The unsigned 64-bit varint at `position` and the position after it."""
    value = 0
    for i in range(10):
        if position + i >= len(data):
            raise _Malformed("it ends inside a number")
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, position + i + 1
    raise _Malformed("a number is longer than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview, int]]:
    """Fields of a message: number, wire type, value, and where the next one starts.

    A value is an integer for varints and the bytes for all other types. `send(position)` continues elsewhere.
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has number 0")
        if wire == VARINT:
            value, position = _varint(data, position)
        elif wire in (FIXED64, FIXED32, BYTES):
            if wire == BYTES:
                length, position = _varint(data, position)
            else:
                length = 8 if wire == FIXED64 else 4
            if length > len(data) - position:
                raise _Malformed(f"a field of {length} bytes is announced where {len(data) - position} are left")
            value = data[position : position + length]
            position += length
        else:
            raise _Malformed(f"it has a field of wire type {wire}")
        jump = yield number, wire, value, position
        if jump is not None:
            position = jump
            yield number, wire, value, position


def _numbers(
    data: memoryview, number: int, wire: int, value: memoryview, end: int, kind: str
) -> tuple[np.ndarray, int]:
    """The packed numbers of a field, or the whole run of equal unpacked fields that starts with it.

    Returns:
        the numbers and the position after them.
    """
    size = np.dtype(kind).itemsize
    if wire == BYTES:
        if len(value) % size:
            raise _Malformed(f"{len(value)} bytes are no whole number of {kind} values")
        return np.frombuffer(value, kind), end
    tag = _encode(number << 3 | wire)
    record = len(tag) + size
    start = end - record
    count = (len(data) - start) // record
    records = np.frombuffer(data, np.uint8, count * record, start).reshape(count, record)
    same = (records[:, : len(tag)] == np.frombuffer(tag, np.uint8)).all(axis=1)
    run = count if same.all() else int(same.argmin())
    values = np.ascontiguousarray(records[:run, len(tag) :]).view(kind)[:, 0]
    return values, start + run * record


def _encode(value: int) -> bytes:
    """The shortest varint of a small number."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _shape(data: memoryview) -> list[int]:
    """Dimensions of a BlobShape."""
    dims = []
    for number, wire, value, _ in _fields(data):
        if number != SHAPE_DIM:
            continue
        if wire == VARINT:
            dims.append(value)
        elif wire == BYTES:
            position = 0
            while position < len(value):
                dim, position = _varint(value, position)
                dims.append(dim)
        if len(dims) > MAX_DIMENSIONS:
            raise _Malformed(f"a blob has more than {MAX_DIMENSIONS} dimensions")
    return dims


def _blob(data: memoryview) -> np.ndarray:
    """A BlobProto as float32 of its own shape."""
    pieces: list[np.ndarray] = []
    legacy: dict[int, int] = {}
    shape: list[int] | None = None
    fields = _fields(data)
    for number, wire, value, end in fields:
        if number in BLOB_LEGACY_DIMS and wire == VARINT:
            legacy[number] = value
        elif number == BLOB_SHAPE and wire == BYTES:
            shape = _shape(value)
        elif number in (BLOB_DATA, BLOB_DOUBLE_DATA) and wire != VARINT:
            kind = "<f4" if number == BLOB_DATA else "<f8"
            if wire not in (BYTES, FIXED32 if number == BLOB_DATA else FIXED64):
                raise _Malformed(f"its data have wire type {wire}")
            values, after = _numbers(data, number, wire, value, end, kind)
            pieces.append(values)
            if after != end:
                fields.send(after)
    with np.errstate(over="ignore"):
        pieces = [piece.astype(np.float32, copy=False) for piece in pieces]
    values = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.float32), *pieces])
    if shape is None:
        shape = [legacy.get(n, 1) for n in BLOB_LEGACY_DIMS] if legacy else [len(values)]
    count = 1
    for dim in shape:
        count *= dim
    if count != len(values):
        raise _Malformed(f"a blob of shape {tuple(shape)} holds {len(values)} values")
    if not np.isfinite(values).all():
        raise _Malformed("a blob holds values that are no finite numbers")
    return values.reshape(shape)


def _layer(data: memoryview, name_field: int, blobs_field: int) -> tuple[str, list[memoryview]]:
    """Name and undecoded blobs of a layer; the layer inside an oldest V1 layer stands for it."""
    name, blobs = "", []
    for number, wire, value, _ in _fields(data):
        if wire != BYTES:
            continue
        if name_field == V1_NAME and number == V1_NESTED:
            inner_name, inner_blobs = _layer(value, V0_NAME, V0_BLOBS)
            name, blobs = name or inner_name, blobs + inner_blobs
        elif number == name_field:
            try:
                name = str(value, "utf-8")
            except UnicodeDecodeError:
                raise _Malformed("a layer's name is no text") from None
        elif number == blobs_field:
            blobs.append(value)
    return name, blobs


def _open(path: Path) -> memoryview:
    """The file's bytes, memory-mapped."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a Caffe file")
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty: download it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _refusal(path: Path, error: _Malformed, where: str = "") -> UserError:
    return UserError(
        f"{path} is no whole Caffe file{where and f', layer {where!r}'}: {error}; download it again or give another "
        "file with --weights"
    )


def read_caffemodel(path: Path, *, wanted: Collection[str] | None = None) -> dict[str, list[np.ndarray]]:
    """Blobs of every layer of a .caffemodel, in either list of layers.

    Args:
        wanted: names of the layers to decode; None for all.

    Returns:
        float32 arrays by layer name, in the file's order and with the file's own shapes (legacy blobs have four
        dimensions). They are views of the file where possible, and read-only. Layers without blobs are left out.

    Raises:
        UserError: truncated, not protobuf, a layer twice, a blob whose shape does not fit its values, NaN.
    """
    data = _open(path)
    layers: dict[str, list[np.ndarray]] = {}
    known = False
    where = ""
    try:
        for number, wire, value, _ in _fields(data):
            where = ""
            if number not in (NET_LAYERS, NET_LAYER) or wire != BYTES:
                continue
            known = True
            fields = (V1_NAME, V1_BLOBS) if number == NET_LAYERS else (LAYER_NAME, LAYER_BLOBS)
            where, blobs = _layer(value, *fields)
            if not blobs or (wanted is not None and where not in wanted):
                continue
            if where in layers:
                raise _Malformed("it is there twice")
            layers[where] = [_blob(blob) for blob in blobs]
    except _Malformed as error:
        raise _refusal(path, error, where) from None
    if not known:
        raise _refusal(path, _Malformed("it lists no layers"))
    return layers


def read_binaryproto(path: Path) -> np.ndarray:
    """The array of a .binaryproto, such as a mean image: (C, H, W) float32 where its first dimension is 1.

    Raises:
        UserError: truncated, not protobuf, or empty.
    """
    try:
        array = _blob(_open(path))
    except _Malformed as error:
        raise UserError(f"{path} is no whole .binaryproto: {error}; download it again or give another file") from None
    if not array.size:
        raise UserError(f"{path} holds no values: download it again or give another file")
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array


def match_parameters(
    blobs: Mapping[str, list[np.ndarray]], expected: Mapping[str, tuple[int, ...]], *, path: Path
) -> dict[str, np.ndarray]:
    """The parameters `<layer>.weight` and `<layer>.bias` of a network from the blobs of its layers.

    Caffe's kernels are correlation kernels (out, in/groups, k, k), as PyTorch's. A legacy blob's leading ones are
    dropped.

    Raises:
        UserError: a layer is missing or has other shapes; names it, and the shapes expected and found.
    """
    parameters = {}
    for name, shape in expected.items():
        layer, kind = name.split(".")
        found = blobs.get(layer, [])
        index = ("weight", "bias").index(kind)
        if index >= len(found):
            what = f"layer {layer!r} has no {kind}" if found else f"there is no layer {layer!r}"
            raise UserError(f"{path}: {what}, expected {shape}; it is of another network, give another file")
        array = found[index]
        own = array.shape
        while len(own) > len(shape) and own[0] == 1:
            own = own[1:]
        if own != tuple(shape):
            raise UserError(
                f"{path}: {kind} of layer {layer!r} should be {tuple(shape)}, found {array.shape}; "
                "it is of another network, give another file"
            )
        parameters[name] = array.reshape(shape)
    return parameters
