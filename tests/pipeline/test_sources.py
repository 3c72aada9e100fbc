"""Hostile tars, folders and lists: what is no image is listed, nothing is written elsewhere, memory stays bounded."""

import csv
import encodings.ascii  # noqa: F401 (before a test gives up the right to read it)
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import prepare_images
from models.errors import UserError
from pipeline import program, tars
from pipeline.images import MOST_BYTES
from pipeline.sources import list_images
from tests.pipeline.test_images import add, png
from tests.pipeline.test_options import unprivileged

ROOT = Path(__file__).parents[2]
PETABYTE = 10**15
BOUND = 60  # megabytes that a source may take
END = bytes(1024)


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the code costs a process."""
    monkeypatch.setattr(program, "code_version", lambda: "tested")


def prepare(source: Path, root: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """Names of the images and reasons by name of the others."""
    prepare_images.main(["--preset", "alexnet", "--source", str(source), "--root", str(root), *options])
    with (root / "rejected.csv").open(newline="") as file:
        rejected = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    names = json.loads((root / "images.npy.json").read_text())["names"]
    assert len(np.load(root / "images.npy", mmap_mode="r")) == len(names)
    return names, rejected


def header(name: str, size: int = 0, kind: bytes = b"0", changes: dict[int, bytes] | None = None) -> bytes:
    """A header of 512 bytes with some bytes replaced and the checksum put right."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else size.to_bytes(12, "big", signed=True)
    if size >= 8**11:
        block[124] = 0x80
    for position, content in (changes or {}).items():
        block[position : position + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(key: str, value: str) -> bytes:
    """A pax record."""
    length = len(key) + len(value) + 3
    while length != len(f"{length}") + len(key) + len(value) + 3:
        length = len(f"{length}") + len(key) + len(value) + 3
    return f"{length} {key}={value}\n".encode()


def member(name: str, content: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(*records: tuple[str, str]) -> bytes:
    return member("pax", b"".join(record(*r) for r in records), b"x")


GOOD = member("good.png", png(0))
HOSTILE = {  # after a good image: what comes next, and why it, or what follows, is rejected
    "link": (header("x.png", kind=b"2", changes={157: b"/etc/passwd"}), "link, device or sparse"),
    "hard link": (header("x.png", kind=b"1", changes={157: b"good.png"}), "link, device or sparse"),
    "character device": (header("x.png", kind=b"3"), "link, device or sparse"),
    "block device": (header("x.png", kind=b"4"), "link, device or sparse"),
    "pipe": (header("x.png", kind=b"6"), "link, device or sparse"),
    "unknown kind": (member("x.png", png(1), b"Z"), "link, device or sparse"),
    "empty": (member("x.png", b""), "is empty"),
    "text": (member("x.png", b"no image"), "not an image"),
    "petabyte": (header("x.png", PETABYTE), "truncated"),
    "sparse, GNU": (
        header("x.png", 512, b"S", {386: b"%011o\0%011o\0" % (0, 512), 483: b"\x80" + PETABYTE.to_bytes(11, "big")})
        + bytes(512),
        "link, device or sparse",
    ),
    "sparse, GNU, map that never ends": (
        header("x.png", 512, b"S", {482: b"\1"}) + (bytes(504) + b"\1" + bytes(7)) * 50,
        "no end mark",
    ),
    "sparse, pax 0.0": (
        pax(("GNU.sparse.size", str(PETABYTE)), ("GNU.sparse.numblocks", "1")) + member("x.png", png(1)),
        "link, device or sparse",
    ),
    "sparse, pax 0.1": (
        pax(("GNU.sparse.map", "0," + str(PETABYTE)), ("GNU.sparse.name", "x.png")) + member("y", png(1)),
        "link, device or sparse",
    ),
    "sparse, pax 1.0": (
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", str(PETABYTE)))
        + member("x.png", b"99999999999999\n" + png(1)),
        "link, device or sparse",
    ),
    "pax size of a petabyte": (pax(("size", str(PETABYTE))) + member("x.png", png(1)), "truncated"),
    "negative size": (header("x.png", -512), "a number that is none"),
    "negative pax size": (pax(("size", "-512")) + member("x.png", png(1)), "damaged pax"),
    "size that is no number": (header("x.png", changes={124: b"12x\0"}), "a number that is none"),
    "pax record of no length": (member("pax", b"0 path=x\n", b"x") + member("x", png(1)), "damaged pax"),
    "pax record longer than its header": (member("pax", b"99 path=x\n", b"x") + member("x", png(1)), "damaged pax"),
    "pax records that overlap": (member("pax", b"2 " * 40_000 + b"=\n", b"x") + member("x", png(1)), "damaged pax"),
    "pax header of a petabyte": (header("pax", PETABYTE, b"x"), "a header of 1000000000000000 bytes"),
    "pax header, negative": (header("pax", -1024, b"x"), "a number that is none"),
    "long name of a petabyte": (header("name", PETABYTE, b"L"), "a header of 1000000000000000 bytes"),
    "long name": (member("name", b"x" * 100_000, b"L") + member("x.png", png(1)), "a name of 100000 bytes"),
    "long names of long names": (member("name", b"x", b"L") * 3000 + member("x", png(1)), None),
    "pax headers of pax headers": (pax(("path", "x")) * 3000 + member("y", png(1)), None),
    "global headers": (member("g", record("path", "x"), b"g") * 3000 + member("x", png(1)), None),
    "damaged header": (b"\xff" * 512 + member("x.png", png(1)), "starts no header"),
    "no end mark": (b"", "no end mark"),
    "cut in a header": (header("x.png", 5)[:300], "cut off"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    source = tmp_path / "in" / "source.tar"
    source.parent.mkdir()
    source.write_bytes(GOOD + content + (b"" if reason and "end mark" in reason else END))
    names, rejected = prepare(source, tmp_path / "out")
    if reason is None:
        assert names == ["good.png", "x"] and not rejected
    else:
        assert names == ["good.png"] and len(rejected) <= 2 and any(reason in found for found in rejected.values())
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
    assert [p.name for p in source.parent.iterdir()] == ["source.tar"], "nothing is unpacked"


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    names = ["/etc/x.png", "../../x.png", "a/../../x.png", "C:\\x.png", "a\nb.png", "\x1b[2J.png", "n" * 300 + ".png"]
    source = tmp_path / "source.tar"
    with tarfile.open(source, "w") as tar:
        for name in [*names, "\udcff.png"]:
            add(tar, name, png(0))
    found, rejected = prepare(source, tmp_path / "out")
    assert len(found) == 8 and not rejected and all(name.isprintable() for name in found)
    assert {"a\\nb.png", "\\x1b[2J.png", "\\udcff.png", "../../x.png", names[-1]} <= set(found)
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.name.endswith(".lock")}
    assert written == {"source.tar", "out", "out/.cnn-vlm", "out/images.npy", "out/images.npy.json", "out/rejected.csv"}


def test_members_of_one_name(tmp_path: Path) -> None:
    """The last one counts, as where tar unpacks, also if it is none that can be read."""
    source = tmp_path / "source.tar"
    with tarfile.open(source, "w") as tar:
        for i in range(3):
            add(tar, "a.png", png(i))
        add(tar, "b.png", png(0))
        add(tar, "b.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "c.png", png(0))
    assert prepare(source, tmp_path / "out")[0] == ["a.png", "c.png"]
    with pytest.raises(UserError, match=r"a.png is overwritten by a later member \(--strict\)"):
        prepare(source, tmp_path / "strict", "--strict")
    reasons = [(e.name, e.problem) for e in list_images(str(source), None, 0)]
    again = "is overwritten by a later member"
    link = "is a link, device or sparse file"
    assert reasons == [("a.png", again)] * 2 + [("a.png", ""), ("b.png", again), ("b.png", link), ("c.png", "")]


def nested(depth: int) -> bytes:
    content = png(0)
    for level in range(depth):
        content = member("0.png" if not level else f"{level}.tar", content) + END
    return content


def test_nested_tars_are_read_one_deep(tmp_path: Path) -> None:
    for depth in (2, 3, 60):
        source = tmp_path / f"{depth}.tar"
        source.write_bytes(member("good.png", png(0)) + nested(depth))
        names, rejected = prepare(source, tmp_path / f"out{depth}")
        assert names == (["1.tar/0.png", "good.png"] if depth == 2 else ["good.png"])
        assert len(rejected) == (depth > 2)
    source = tmp_path / "odd.tar"
    source.write_bytes(GOOD + member("no.tar", b"text") + member("cut.tar", GOOD[:700]) + member("0.tar", b"") + END)
    names, rejected = prepare(source, tmp_path / "odd")
    assert names == ["good.png"] and set(rejected) == {"no.tar", "cut.tar/good.png", "0.tar"}


def test_tar_cut_anywhere(tmp_path: Path) -> None:
    """Cut at any place, what is whole is read, the rest is named, and nothing is taken for whole."""
    whole = b"".join(member(f"{i}.png", png(i)) for i in range(4)) + END
    source = tmp_path / "source.tar"
    lengths = [len(member(f"{i}.png", png(i))) for i in range(4)]
    ends = np.cumsum(lengths) - [-len(png(i)) % 512 for i in range(4)]
    for cut in [*range(512, len(whole), 1111), *np.cumsum(lengths).tolist()]:
        source.write_bytes(whole[:cut])
        entries = list_images(str(source), None, 0)
        assert sum(not e.problem for e in entries) == int((ends <= cut).sum())
        assert sum(bool(e.problem) for e in entries) == (cut < len(whole) - 512)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused(mode: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        add(tar, "0.png", png(0))
    with pytest.raises(UserError, match="is compressed: uncompress it first"):
        list_images(str(tmp_path / "x.tar"), None, 0)
    source = tmp_path / "outer.tar"
    source.write_bytes(GOOD + member("inner.tar", (tmp_path / "x.tar").read_bytes()) + END)
    assert "damaged tar" in prepare(source, tmp_path / "out")[1]["inner.tar"]


FORMATS = {"v7 or ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_whole_tars_are_read_as_by_the_standard_library(form: str, tmp_path: Path) -> None:
    draw = random.Random(form)
    source = tmp_path / "source.tar"
    with tarfile.open(source, "w", format=FORMATS[form]) as tar:
        for i in range(60):
            longest = 90 if form == "v7 or ustar" else 400
            name = "".join(draw.choice("ab/é ") for _ in range(draw.randrange(longest))) + f"x{i}"
            kind = draw.choice([tarfile.REGTYPE] * 3 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
            content = draw.randbytes(draw.choice([0, 1, 511, 512, 513, 5000])) if kind == tarfile.REGTYPE else b""
            add(tar, name, content, type=kind, linkname="b" * draw.randrange(longest), mtime=draw.random() * 1e9)
    with tarfile.open(source) as tar:
        expected = [(m.name, m.offset_data, m.size, m.isreg()) for m in tar if not m.isdir()]
    with source.open("rb") as file:
        found = [(m.name, m.offset, m.size, m.regular) for m in tars.members(file, 0, source.stat().st_size)]
    assert found == expected


def test_flipped_bytes_never_break_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = bytearray(
        GOOD + pax(("path", "é" * 60), ("size", "7")) + member("x", b"7 bytes") + HOSTILE["sparse, GNU"][0]
    )
    whole += member("name", b"n" * 200, b"L") + member("y", b"data") + nested(2)
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            block = 512 * draw.randrange(len(content) // 512)
            at = block + draw.randrange(512)
            content[at] = draw.randrange(256)
            kept = content[block + 148 : block + 156]
            content[block + 148 : block + 156] = b" " * 8
            right = b"%06o\0 " % sum(content[block : block + 512])
            content[block + 148 : block + 156] = right if draw.random() < 0.8 else kept
        try:
            found = list(tars.members(io.BytesIO(content), 0, len(content)))
        except tars.TarError:
            continue
        assert all(m.offset >= 512 and m.size >= 0 for m in found)


GROWING: dict[str, Callable[[int], bytes]] = {  # tars whose careless reading takes memory
    "members": lambda size: header("a/1234567.png", 0) * (size // 512),
    "global headers": lambda size: (
        member("g", b"".join(record(f"k{i}", "v" * 900) for i in range(9)), b"g") * (size // 9728)
    ),
    "sparse map": lambda size: header("x", 512, b"S", {482: b"\1"}) + (b"1" * 504 + b"\1" + bytes(7)) * (size // 512),
    "pax header": lambda size: header("pax", size - 1024, b"x") + b"2 " * ((size - 1024) // 2),
    "long name": lambda size: header("name", size - 1024, b"L") + bytes(size - 1024),
}
MEASURED = """
import resource, sys
from pipeline import sources
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
entries = sources.list_images(sys.argv[1], None, 0)
sources.fingerprint(entries)
print(len(entries), peak() - before)
"""


def measure(source: Path) -> tuple[int, float]:
    """How many entries a source has, and megabytes that it takes to list them, in a process of its own."""
    command = [sys.executable, "-c", MEASURED, str(source)]
    limit = (2 << 30, 2 << 30)
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert result.returncode == 0, result.stderr
    count, megabytes = result.stdout.split()
    return int(count), float(megabytes)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does it")
@pytest.mark.parametrize("kind", GROWING)
def test_memory_is_bounded(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source.tar"
    source.write_bytes(GOOD + GROWING[kind](10 << 20) + END)
    count, megabytes = measure(source)
    assert count == {"members": 20_481, "global headers": 1, "sparse map": 3}.get(kind, 2)
    assert megabytes < BOUND


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does it")
def test_files_that_claim_petabytes(tmp_path: Path) -> None:
    """Sparse files take no room on the disk, whatever size they have."""
    (tmp_path / "folder").mkdir()
    starts = {
        "a.png": png(0),
        "b.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8L",
        "c.tif": b"II*\0\xff\xff\xff\x7f",
        "d.jpg": b"",
    }
    tar = tmp_path / "huge.tar"
    listing = tmp_path / "list.txt"
    tar.write_bytes(GOOD + header("x.png", 1 << 42))
    listing.write_bytes(b"folder/a.png\n")
    try:
        for name, start in starts.items():
            (tmp_path / "folder" / name).write_bytes(start)
            os.truncate(tmp_path / "folder" / name, 1 << 42)
        os.truncate(tar, (1 << 42) + 100_000)
        os.truncate(listing, 1 << 42)
    except OSError:
        pytest.skip("this disk has no files of 4 TB")
    (tmp_path / "folder" / "good.png").write_bytes(png(0))
    names, rejected = prepare(tmp_path / "folder", tmp_path / "out1")
    assert names == ["good.png"] and all("more than any image needs" in reason for reason in rejected.values())
    names, rejected = prepare(tar, tmp_path / "out2")
    assert names == ["good.png"] and "has 4.4 TB, more than any image needs" in rejected["x.png"]
    with pytest.raises(UserError, match="neither a tar nor a text file"):
        list_images(str(listing), None, 0)
    assert measure(tar)[1] < BOUND


def test_folders_with_what_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "locked").mkdir(parents=True)
    (folder / "good.png").write_bytes(png(0))
    (folder / "secret.png").write_bytes(png(1))
    (folder / "locked" / "inside.png").write_bytes(png(2))
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "there.png").symlink_to("back.png")
    (folder / "back.png").symlink_to("there.png")
    (folder / "nowhere.png").symlink_to("nothing.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "around").symlink_to("..")
    os.mkfifo(folder / "pipe.png")
    (folder / "nothing.png ").write_bytes(b"")
    tmp_path.chmod(0o777)
    for path in (folder / "secret.png", folder / "locked"):
        path.chmod(0)
    out = tmp_path / "in" / ".out"
    out.mkdir()
    out.chmod(0o777)
    parents = [p for p in tmp_path.parents if p.stat().st_uid == os.getuid() and p != Path("/")]
    modes = [p.stat().st_mode for p in parents]
    try:
        for parent in parents:
            parent.chmod(0o755)
        with unprivileged():
            names, rejected = prepare(folder, out)
    finally:
        (folder / "locked").chmod(0o700)
        for parent, mode in zip(parents, modes, strict=True):
            parent.chmod(mode)
    assert names == ["good.png"]
    denied, loop = "permission denied", "too many levels of symbolic links"
    expected = {"secret.png": denied, "locked": denied, "itself.png": loop, "there.png": loop, "back.png": loop}
    expected |= {"nowhere.png": "does not exist", "device.png": "not a regular file", "pipe.png": "not a regular file"}
    expected["nothing.png "] = "is empty"
    assert set(rejected) == set(expected)
    assert all(reason in rejected[name] for name, reason in expected.items())


def test_folders_below_folders(tmp_path: Path) -> None:
    """Deeper than Python's recursion goes."""
    depth = 1200
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("0.png", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.close(here)
    try:
        (entry,) = list_images(str(tmp_path), None, 0)
    finally:
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # pytest's own clean-up recurses
    assert entry.name.count("/") == depth or "name too long" in entry.problem


def test_lists_of_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(0))
    lines = [
        "good.png",
        "good.png",
        "x" * 5000,
        "missing.png",
        "nul\0.png",
        "good.png/below",
        ".",
        "/dev/zero",
        "a\x1b.png",
    ]
    listing = tmp_path / "list.txt"
    listing.write_text("# images\n\n" + "\n".join([*["padding.png"] * 50, *lines]))
    names, rejected = prepare(listing, tmp_path / "out")
    assert names == ["good.png"]
    assert rejected["x" * 5000] == f"{'x' * 5000} cannot be read: file name too long"
    assert "is listed twice" in rejected["good.png"] and "does not exist" in rejected["good.png/below"]
    assert "not a regular file" in rejected["/dev/zero"] and "is a folder" in rejected["."]
    assert {"missing.png", "nul\\x00.png", "a\\x1b.png"} <= set(rejected)


def test_sources_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zeros").write_bytes(bytes(10_240))
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "latin").write_bytes("é.png\n".encode("latin-1"))
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(png(0))
    messages = {"pipe": "no regular file", "loop": "does not exist", "zeros": "no files", "binary": "neither a tar"}
    messages |= {"latin": "neither a tar", "nothing": "no files", "image.png": "is a single image"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            list_images(str(tmp_path / name), None, 0)


def test_where_nothing_is_an_image_all_is_listed(tmp_path: Path) -> None:
    for name, content in (("text", b"text"), ("empty", b"")):
        source = tmp_path / f"{name}.tar"
        source.write_bytes(b"".join(member(f"{i}.png", content) for i in range(600)) + END)
        root = tmp_path / name
        with pytest.raises(UserError, match="none of the 600 files is a readable image"):
            prepare(source, root)
        assert (root / "rejected.csv").read_text().count("\n") == 601
        assert not list(root.glob("images*"))


def test_limit_of_bytes_leaves_room_for_any_image() -> None:
    from PIL import Image

    assert MOST_BYTES > 3 * 2 * Image.MAX_IMAGE_PIXELS * 1.9
