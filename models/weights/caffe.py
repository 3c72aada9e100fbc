"""Caffe's files without Caffe: a reader of the protobuf wire format for networks and mean images.

A message is a run of fields; each starts with a varint `number << 3 | wire type`. Field numbers are those of
BVLC's caffe.proto (commit 9b8915401). Blobs are views of the memory-mapped file where their floats lie in one
piece.
"""

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from models.errors import UserError
from models.weights.contents import other_kind

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
NET_LAYERS, NET_LAYER = 2, 100  # of NetParameter: the older and the newer list of layers
LAYER_NAME, LAYER_BLOBS = 1, 7
V1_NESTED, V1_NAME, V1_BLOBS = 1, 4, 6
V0_NAME, V0_BLOBS = 1, 50
BLOB_LEGACY_DIMS = (1, 2, 3, 4)  # num, channels, height, width
BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE_DATA = 5, 7, 8
SHAPE_DIM = 1
MAX_DIMENSIONS = 32  # as Caffe
MAX_COUNT = 2**31 - 1  # values of a blob, as Caffe
MAX_FIELD = 2**29 - 1
MAX_FIELDS = 100_000  # in one file; the largest networks have some ten thousand. Bounds time and memory


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


def _run(data: memoryview, start: int, tag: int, size: int) -> tuple[np.ndarray, int]:
    """Unpacked numbers: the run of records (`tag` bytes of a tag, `size` of a value) that share the first's tag.

    The windows that are compared double, so that many short runs cost no more than one long run.

    Returns:
        the numbers, a strided view, and the position after the last record.
    """
    record = tag + size
    available = (len(data) - start) // record
    count, window = 1, 16
    first = np.frombuffer(data, np.uint8, tag, start)
    while count < available:
        window = min(2 * window, 1 << 20, available - count)
        block = np.frombuffer(data, np.uint8, window * record, start + count * record)
        same = (block.reshape(window, record)[:, :tag] == first).all(axis=1)
        if not same.all():
            count += int(same.argmin())
            break
        count += window
    numbers = np.ndarray((count,), f"<f{size}", data, start + tag, (record,))
    return numbers, start + count * record


class _Parser:
    """Reads the messages of one file, at most MAX_FIELDS fields in all."""

    def __init__(self) -> None:
        self.left = MAX_FIELDS
        self.layer_name = ""  # of the layer that is being read, where known

    def fields(self, data: memoryview) -> Iterator[tuple[int, int, int | memoryview | np.ndarray]]:
        """Fields of a message: number, wire type, value.

        A value is an integer (VARINT), bytes (BYTES), or the floats of a run of such fields (FIXED32, FIXED64).
        """
        position = 0
        while position < len(data):
            if not self.left:
                raise _Malformed(f"it has more than {MAX_FIELDS} fields")
            self.left -= 1
            start = position
            tag, position = _varint(data, position)
            number, wire = tag >> 3, tag & 7
            if not 1 <= number <= MAX_FIELD:
                raise _Malformed(f"it has a field of number {number}")
            if wire == VARINT:
                value, position = _varint(data, position)
            elif wire in (FIXED64, FIXED32, BYTES):
                fixed = {FIXED64: 8, FIXED32: 4}.get(wire)
                length, begin = (fixed, position) if fixed else _varint(data, position)
                if length > len(data) - begin:
                    raise _Malformed(f"a field of {length} bytes is announced where {len(data) - begin} are left")
                if fixed:
                    value, position = _run(data, start, position - start, fixed)
                else:
                    value, position = data[begin : begin + length], begin + length
            else:
                raise _Malformed(f"it has a field of wire type {wire}")
            yield number, wire, value

    def shape(self, data: memoryview) -> list[int]:
        """Dimensions of a BlobShape."""
        dims: list[int] = []
        for number, wire, value in self.fields(data):
            if number != SHAPE_DIM:
                continue
            _expect(wire, VARINT, BYTES, what="a dimension")
            if wire == VARINT:
                dims.append(value)
            position = 0
            while wire == BYTES and position < len(value) and len(dims) <= MAX_DIMENSIONS:
                dim, position = _varint(value, position)
                dims.append(dim)
            if len(dims) > MAX_DIMENSIONS:
                raise _Malformed(f"a blob has more than {MAX_DIMENSIONS} dimensions")
        return dims

    def blob(self, data: memoryview) -> np.ndarray:
        """A BlobProto as float32 of its own shape; doubles, where present, replace floats, as in Caffe."""
        pieces: dict[int, list[np.ndarray]] = {BLOB_DATA: [], BLOB_DOUBLE_DATA: []}
        legacy: dict[int, int] = {}
        shape: list[int] | None = None
        for number, wire, value in self.fields(data):
            if number in BLOB_LEGACY_DIMS:
                _expect(wire, VARINT, what="a dimension")
                legacy[number] = value
            elif number == BLOB_SHAPE:
                _expect(wire, BYTES, what="a shape")
                shape = (shape or []) + self.shape(value)
            elif number in pieces:
                fixed, size = (FIXED32, 4) if number == BLOB_DATA else (FIXED64, 8)
                _expect(wire, BYTES, fixed, what="a blob's data")
                if wire == BYTES and len(value) % size:
                    raise _Malformed(f"{len(value)} bytes are no whole number of values of {size} bytes")
                pieces[number].append(np.frombuffer(value, f"<f{size}") if wire == BYTES else value)
        if legacy:  # Caffe itself prefers them to a shape
            shape = [legacy.get(i, 1) for i in BLOB_LEGACY_DIMS]
        return _array(pieces[BLOB_DOUBLE_DATA] or pieces[BLOB_DATA], shape)

    def layer(self, data: memoryview, name_field: int, blobs_field: int) -> tuple[str, list[memoryview]]:
        """Name and undecoded blobs of a layer; the layer inside an oldest V1 layer stands for it."""
        name, blobs = "", []
        for number, wire, value in self.fields(data):
            if name_field == V1_NAME and number == V1_NESTED:
                _expect(wire, BYTES, what="a nested layer")
                inner_name, inner_blobs = self.layer(value, V0_NAME, V0_BLOBS)
                name, blobs = name or inner_name, blobs + inner_blobs
            elif number == name_field:
                _expect(wire, BYTES, what="a layer's name")
                try:
                    name = str(value, "utf-8")
                except UnicodeDecodeError:
                    raise _Malformed("a layer's name is no UTF-8 text") from None
                self.layer_name = name
            elif number == blobs_field:
                _expect(wire, BYTES, what="a blob")
                blobs.append(value)
        return name, blobs


def _expect(wire: int, *allowed: int, what: str) -> None:
    if wire not in allowed:
        raise _Malformed(f"{what} should have wire type {' or '.join(map(str, allowed))}, found {wire}")


def _array(pieces: list[np.ndarray], shape: list[int] | None) -> np.ndarray:
    """The pieces in a row as one float32 array of this shape (None: 1-D); its dimensions are unsigned as read."""
    if sum(map(len, pieces)) == 0:
        raise _Malformed("a blob holds no values")
    with np.errstate(over="ignore", invalid="ignore"):
        pieces = [piece.astype(np.float32, copy=False) for piece in pieces]
    values = np.ascontiguousarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)
    dims = (len(values),) if shape is None else tuple(dim - (dim >> 63 << 64) for dim in shape)  # as signed
    count = 1
    for dim in dims:
        if not 1 <= dim <= MAX_COUNT:
            raise _Malformed(f"a blob has shape {dims}, dimensions should be 1 to {MAX_COUNT}")
        count *= dim
    if count != len(values):
        raise _Malformed(f"a blob of shape {dims} should hold {count} values, found {len(values)}")
    if not np.isfinite(values).all():
        raise _Malformed("a blob holds values that are no finite numbers")
    return values.reshape(dims)


def _open(path: Path) -> memoryview:
    """The file's bytes, memory-mapped."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a Caffe file")
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise UserError(f"{path} is empty: download it again or give another file with --weights")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from None


def _refusal(
    path: Path, data: memoryview, what: str, error: _Malformed, layer: str = "", option: str = ""
) -> UserError:
    head = bytes(data[:256])
    kind = other_kind(head)
    other = f" but {kind}" if kind else ""
    where = f", layer {layer!r}" if layer else ""
    return UserError(
        f"{path} is no whole {what}{other}{where}: {error}; download it again or give another file{option}"
    )


def read_caffemodel(path: Path, *, wanted: Collection[str] | None = None) -> dict[str, list[np.ndarray]]:
    """Blobs of every layer of a .caffemodel, in either list of layers.

    Args:
        wanted: names of the layers to decode; None for all.

    Returns:
        float32 arrays by layer name, in the file's order and with the file's own shapes (legacy blobs have four
        dimensions). They are read-only views of the file where possible. Layers without blobs are left out.

    Raises:
        UserError: truncated, not protobuf, a layer twice, a blob that is empty, not finite, or of a shape that
            does not fit its values.
    """
    data = _open(path)
    layers: dict[str, list[np.ndarray]] = {}
    names: set[str] = set()
    known = False
    parser = _Parser()
    try:
        for number, wire, value in parser.fields(data):
            if number not in (NET_LAYERS, NET_LAYER):
                continue
            _expect(wire, BYTES, what="a layer")
            known = True
            fields = (V1_NAME, V1_BLOBS) if number == NET_LAYERS else (LAYER_NAME, LAYER_BLOBS)
            name, blobs = parser.layer(value, *fields)
            if blobs and name in names:
                raise _Malformed("it is there twice")
            if blobs:
                names.add(name)
            if blobs and (wanted is None or name in wanted):
                layers[name] = [parser.blob(blob) for blob in blobs]
            parser.layer_name = ""
        if not known:
            raise _Malformed("it lists no layers")
    except _Malformed as error:
        raise _refusal(path, data, "caffemodel", error, parser.layer_name, " with --weights") from None
    return layers


def read_binaryproto(path: Path) -> np.ndarray:
    """The array of a .binaryproto, such as a mean image: float32, (C, H, W) where the file has (1, C, H, W).

    Raises:
        UserError: truncated, not protobuf, or empty.
    """
    data = _open(path)
    try:
        array = _Parser().blob(data)
    except _Malformed as error:
        raise _refusal(path, data, "binaryproto", error) from None
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array


def match_parameters(
    blobs: Mapping[str, list[np.ndarray]], expected: Mapping[str, tuple[int, ...]], *, path: Path
) -> dict[str, np.ndarray]:
    """The parameters `<layer>.weight` and `<layer>.bias` of a network from the blobs of its layers.

    Caffe's kernels are correlation kernels (out, in/groups, k, k), as PyTorch's: nothing is flipped. A legacy
    blob's leading ones are dropped (fully connected weight 1x1xOutxIn, bias 1x1x1xOut).

    Raises:
        UserError: a layer is missing or has other shapes; names it, and the shapes expected and found.
    """
    parameters = {}
    again = "it is of another network, give another file with --weights"
    for name, shape in expected.items():
        layer, _, kind = name.rpartition(".")
        found = blobs.get(layer, [])
        index = ("weight", "bias").index(kind)
        if index >= len(found):
            what = f"layer {layer!r} has no {kind}" if found else f"there is no layer {layer!r}"
            raise UserError(f"{path}: {what}, expected {kind} {tuple(shape)}; {again}")
        if len(found) > 2:
            shapes = ", ".join(str(blob.shape) for blob in found)
            raise UserError(f"{path}: layer {layer!r} should have a weight and a bias, found {shapes}; {again}")
        own = found[index].shape
        while len(own) > len(shape) and own[0] == 1:
            own = own[1:]
        if own != tuple(shape):
            raise UserError(
                f"{path}: {kind} of layer {layer!r} should be {tuple(shape)}, found {found[index].shape}; {again}"
            )
        parameters[name] = found[index].reshape(shape)
    return parameters
