"""What a file that is no weights seems to be, told from its first bytes."""

from pathlib import Path

OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file itself)",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a zip archive or torch file",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a pickle",
    b"<": "a web page (the download needs another address, or a login)",
}


def other_kind(head: bytes) -> str | None:
    """What a file that starts with `head` seems to be: `a web page`, `an empty file`; None where that is not known."""
    if not head:
        return "an empty file"
    return next((kind for magic, kind in OTHERS.items() if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic)), None)


def other_kind_of(path: Path) -> str | None:
    """As `other_kind`, of a file; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return other_kind(file.read(256))
    except OSError:
        return None
