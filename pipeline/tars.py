"""Members of a tar as ranges of bytes, found from its headers alone; nothing is unpacked.

The standard library's reader trusts what it reads: it takes a header of any size into memory, follows headers of
headers by recursion, may go backwards for ever, and takes a damaged header for the end. This one needs the same little
memory for every file, always moves forward, and says where a tar stops before its end mark. It knows the formats v7,
ustar, GNU and pax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MOST_EXTENSION = 1 << 20  # bytes of a long name or of pax records
LONGEST_NAME = 4096  # as for file systems
REGULAR = (b"0", b"\0", b"7")
FOLDER, GNU_SPARSE, GNU_LONG_NAME = b"5", b"S", b"L"
PAX = (b"x", b"X")
EXTENSIONS = (GNU_LONG_NAME, b"K", b"g", *PAX)  # headers that say something of what follows
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever their size field says


class TarError(Exception):
    """The tar is damaged or cut off here; what came before is whole."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member that is no folder; its data are the bytes `offset … offset + size` of the file.

    `regular` is False for links, devices and sparse files.
    """

    name: str
    offset: int
    size: int
    regular: bool


def is_tar(head: bytes) -> bool:
    """Whether a file whose first bytes these are (512 or more) starts like a tar."""
    block = head[:BLOCK]
    return len(block) == BLOCK and (not any(block) or _has_checksum(block))


def members(file: BinaryIO, start: int, size: int) -> Iterator[Member]:
    """Members of the tar that is the bytes `start … start + size` of a file, in order.

    Data that reach beyond the end of the tar are cut off; nothing follows them.

    Raises:
        TarError: something else than a header or the end mark comes next.
    """
    position = 0
    noted: dict[str, bytes] = {}  # what extension headers say of the member that follows: path, size, sparse
    while any(header := _read(file, start, position, BLOCK, size)):
        if not _has_checksum(header):
            raise TarError(f"byte {position} starts no header")
        kind, length, data = header[156:157], _number(header[124:136]), position + BLOCK
        if kind in EXTENSIONS:
            noted |= _extension(file, start, data, length, size, kind)
            position = data + _whole_blocks(length)
            continue
        if kind == GNU_SPARSE:
            data = _after_sparse_map(file, start, data, size, bool(header[482]))
        if "size" in noted:
            length = _decimal(noted["size"])
        name = (noted["path"] if "path" in noted else _name(header)).decode("utf-8", "surrogateescape")
        if len(name) > LONGEST_NAME:
            raise TarError(f"a name of {len(name)} bytes")
        regular = kind in REGULAR and "sparse" not in noted
        if kind != FOLDER and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, start + data, length, regular)
        position = data if kind in WITHOUT_DATA else data + _whole_blocks(length)
        if regular and data + length > size:
            return
        noted = {}


def _read(file: BinaryIO, start: int, position: int, count: int, size: int) -> bytes:
    """Bytes of the tar; a TarError where it does not have them."""
    if position == size:
        raise TarError("it has no end mark, so it may be cut off")
    if position + count <= size:
        file.seek(start + position)
        content = file.read(count)
        if len(content) == count:
            return content
    raise TarError("it is cut off")


def _extension(file: BinaryIO, start: int, data: int, length: int, size: int, kind: bytes) -> dict[str, bytes]:
    """What an extension header says of the next member; other facts of it, and global ones, are left aside."""
    if kind not in (GNU_LONG_NAME, *PAX):
        return {}
    if length > MOST_EXTENSION:
        raise TarError(f"a header of {length} bytes")
    content = _read(file, start, data, length, size) if length else b""
    if kind == GNU_LONG_NAME:
        return {"path": content.partition(b"\0")[0]}
    noted, position = {}, 0
    while position < len(content):  # records `<length> <key>=<value>\n`, whose length counts all of it
        digits, _, _ = content[position : position + 20].partition(b" ")
        length = _decimal(digits)
        record = content[position : position + length]
        key, _, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < max(length, len(digits) + 3) or not record.endswith(b"\n"):
            raise TarError("damaged pax records")
        position += len(record)
        if key in (b"path", b"size"):
            noted[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            noted |= {"sparse": b"", "path": value} if key == b"GNU.sparse.name" else {"sparse": b""}
    return noted


def _after_sparse_map(file: BinaryIO, start: int, data: int, size: int, goes_on: bool) -> int:
    """Where the data of a sparse member of the old GNU format start: its map may go on in further blocks."""
    while goes_on:
        goes_on = bool(_read(file, start, data, BLOCK, size)[504])
        data += BLOCK
    return data


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _has_checksum(header: bytes) -> bool:
    """Whether a header's checksum is right; some old programs summed signed bytes."""
    others = header[:148] + b" " * 8 + header[156:]
    try:
        noted = _number(header[148:156])
    except TarError:
        return False
    return noted == sum(others) or noted == sum(others) - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """A number of a header: octal text or, where that is too short, big-endian bytes after 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip() or b"0"
    if text.strip(b"01234567"):
        raise TarError("a header with a number that is none")
    return int(text, 8)


def _decimal(text: bytes) -> int:
    """A number of a pax record; beyond 20 digits nothing is meant."""
    if not text.isdigit() or len(text) > 20:
        raise TarError("damaged pax records")
    return int(text)


def _whole_blocks(count: int) -> int:
    return -(-count // BLOCK) * BLOCK
