"""Stage 1: images on disk -> images.npy, what the networks are trained on.

In:  --source, one or more of: a folder (flat or nested), an uncompressed tar (ILSVRC2012_img_val.tar), a tar of tars
     (ILSVRC2012_img_train.tar), a text file with one path per line, or `samples`: random crops of the photos that
     scikit-learn and scikit-image carry. Of several, names begin with the source's.
Out: ROOT/images.npy (N, 256, 256, 3) uint8 RGB, resized by exact area averaging without regard to the aspect ratio; the
     names, in order, in its sidecar; ROOT/rejected.csv with the files that could not be read, and why.

    python prepare_images.py --source ILSVRC2012_img_val.tar --root out/alexnet
"""

import csv
import io
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from models.errors import UserError
from pipeline import array_files, artefacts, locks, options, ownership, program
from pipeline.images import STORED_SIZE
from pipeline.progress import Progress, SafePoints
from pipeline.scaling import area_scale
from pipeline.sources import Crop, Entry, count_by_source, fingerprint, list_images

MOST_WORKERS = 64  # more threads would only hold more decoded images
MARK_EVERY = 256  # images between two notes of progress on disk; more where many were rejected, as each is noted


def load_square(entry: Entry | Crop) -> np.ndarray | str:
    """One image as (256, 256, 3) uint8, or the reason why it cannot be read."""
    try:
        return area_scale(entry.read(), STORED_SIZE, STORED_SIZE)
    except UserError as error:
        return str(error)


def load_in_order(entries: list[Entry] | list[Crop], workers: int) -> Iterator[np.ndarray | str]:
    """`load_square` of all entries in order, decoded ahead by `workers` threads (Pillow decodes in parallel)."""
    workers = min(workers, MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(load_square, entry) for entry in entries[: 2 * workers])
        for following in range(2 * workers, len(entries) + 2 * workers):
            if not ahead:
                return
            result = ahead.popleft().result()
            if following < len(entries):
                ahead.append(pool.submit(load_square, entries[following]))
            yield result


def prepare(
    entries: list[Entry] | list[Crop],
    out: Path,
    *,
    workers: int,
    strict: bool,
    facts: artefacts.Facts,
) -> dict[int, str]:
    """Write all readable entries to `out`, the names and reasons of the others beside it to rejected.csv.

    Returns:
        the reasons by index.

    Raises:
        UserError: an unreadable file under `strict`, or nothing readable at all.
    """
    ownership.foresee(out.parent, "rejected.csv")
    rows = sum(not getattr(entry, "problem", "") for entry in entries)
    size = rows * STORED_SIZE * STORED_SIZE * 3
    print(f"{len(entries)} images, {artefacts.format_bytes(size)} in {out}", flush=True)
    if not rows:
        raise nothing_readable(out, entries, {i: str(load_square(entry)) for i, entry in enumerate(entries)})
    writer = array_files.ArrayWriter(out, (rows, STORED_SIZE, STORED_SIZE, 3), "uint8", facts)
    rejected = noted_rejections(writer, len(entries))
    first = marked = writer.done + len(rejected)
    with Progress(len(entries), "preparing", "images", first) as progress, SafePoints() as signals:
        for index, result in enumerate(load_in_order(entries[first:], workers), first):
            if isinstance(result, str):
                if strict:
                    raise UserError(f"{result} (--strict)")
                rejected[index] = result
            else:
                writer.put(writer.done, result[None])
                writer.done += 1
            progress.update(note=f"{len(rejected)} rejected" if rejected else "")
            if index + 1 - marked >= max(MARK_EVERY, len(rejected)):
                writer.mark(writer.done, rejected=rejected)
                marked = index + 1
            signals.check(lambda: writer.mark(writer.done, rejected=rejected))
    if not writer.done:
        raise nothing_readable(out, entries, rejected)
    write_rejected(out, entries, rejected)
    writer.finish(
        rows=writer.done,
        content_sha256=array_files.hash_rows(writer.array[: writer.done]),
        rejected=len(rejected),
        versions=program.versions(),
        names=[entry.name for index, entry in enumerate(entries) if index not in rejected],
    )
    return rejected


def noted_rejections(writer: array_files.ArrayWriter, count: int) -> dict[int, str]:
    """Reasons by index that an earlier run noted; a note that cannot be of `count` entries is one of nothing done."""
    noted = writer.state.get("rejected", {})
    reasons = {int(i): str(reason) for i, reason in noted.items() if i.isdecimal()} if isinstance(noted, dict) else {}
    if max(reasons, default=-1) < writer.done + len(reasons) <= count:
        return reasons
    writer.done = 0
    return {}


def nothing_readable(out: Path, entries: list[Entry] | list[Crop], rejected: dict[int, str]) -> UserError:
    """Where no entry is an image: lists them, leaves no array behind, and returns what to say."""
    write_rejected(out, entries, rejected)
    artefacts.discard_partial(out)
    return UserError(f"none of the {len(entries)} files is a readable image, the first: {rejected[0]}")


def write_rejected(out: Path, entries: list[Entry] | list[Crop], rejected: dict[int, str]) -> None:
    """Names and reasons as CSV, beside `out`."""
    text = io.StringIO()
    csv.writer(text).writerows([("name", "reason"), *((entries[i].name, reason) for i, reason in rejected.items())])
    artefacts.write_text(out.parent / "rejected.csv", text.getvalue())


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    parser.inputs(
        "--source", nargs="+", help="folders, tars, tars of tars, list files, or 'samples' (paper: ILSVRC2012 val)"
    )
    parser.output("--out", type=options.writable_file, help="where to write (default: ROOT/images.npy)")
    parser.inputs("--num-images", type=options.positive, help="a random subset of this size (paper: all)")
    parser.inputs("--workers", type=options.positive, default=os.cpu_count() or 1, help="decoding threads")
    options.add_image_options(parser)
    parser.inputs("--strict", action="store_true", help="stop at the first unreadable file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """List the images of the sources, and prepare them unless that is finished."""
    args = options.parse_args(get_parser(), argv, "prepare_images")
    if args.source is None:
        raise UserError("--source is missing: give a folder, a tar, a list file, or 'samples'")
    out = args.out or args.root / "images.npy"
    program.announce(vars(args))
    entries = list_images(args.source, args.num_images, args.seed)
    facts = {
        "stage": "prepare_images",
        "sources": count_by_source(args.source, entries),
        "inputs_sha256": fingerprint(entries),
        "num_images": args.num_images,
        "seed": args.seed,
        **options.image_facts(),
    }
    with locks.claim(out):
        if artefacts.reuse(out, facts, args.overwrite):
            print(f"{out} is finished: nothing to do")
            return
        rejected = prepare(entries, out, workers=args.workers, strict=args.strict, facts=facts)
    print(f"{out}: {len(entries) - len(rejected)} images, {len(rejected)} rejected")
    for reason in list(rejected.values())[:5]:
        print(f"  rejected: {reason}")
    if len(rejected) > 5:
        print(f"  … all of them are listed in {out.parent / 'rejected.csv'}")


if __name__ == "__main__":
    sys.exit(program.run(main))
