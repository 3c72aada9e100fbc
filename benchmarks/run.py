"""Speed, measured: every figure a ratio within one run, what is compared in turn and repeated, beside its goal.

Out: OUT/benchmarks.json, every value of every round; OUT/benchmarks.md, the table that is also printed.

    python benchmarks/run.py
    python benchmarks/run.py --only training startup --repeats 9

training: one update, against the original's scan, plain nn.LSTM and the machine's matrix product. extraction: both
passes, against the bare network. memory: memory-mapped features against features in memory, memory against the number
of images. reconstruction: one iteration, against its parts. saliency: a folder, against the bare network. startup:
--help, loading. growth: fitted exponents of saliency in the image's area, of an update in batch, grid and components,
beside the arithmetic's.

Leave the machine alone meanwhile: the whole takes some minutes on two cores.
"""

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)

from evaluation import tables  # noqa: E402
from pipeline import artefacts, options, program  # noqa: E402

PARTS = {  # module by name
    "training": "updates",
    "extraction": "extraction",
    "memory": "memory",
    "reconstruction": "descents",
    "saliency": "image_folder",
    "startup": "startup",
    "growth": "growth",
}
HEAD = ("figure", "median", "min", "max", "goal", "", "note")


def get_parser() -> options.Parser:
    """What to measure, how often, and where the results go."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.inputs("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.machine("--repeats", type=options.positive, default=5, help="rounds that count, after a first (default: 5)")
    parser.machine("--threads", type=options.positive, help="of torch (default: as many as it takes by itself)")
    parser.machine("--device", choices=options.DEVICES, default="auto", help="auto takes cuda, then mps, then cpu")
    parser.output(
        "--out", type=options.writable_folder, default=Path("out/benchmarks"), help="folder (default: out/benchmarks)"
    )
    parser.inputs("--quick", action="store_true", help="tiny sizes: shows that all of it runs, measures nothing")
    return parser


def machine(threads: int, device: Any) -> dict[str, Any]:
    """The processor, its cores and load, torch's threads and device."""
    processor = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        names = [line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "device": str(device),
        "load_before": load,
    }


def write(out: Path, results: dict[str, Any], lines: list[list[str]]) -> str:
    """Write benchmarks.json and benchmarks.md; returns the table, Markdown."""
    about = results["machine"]
    table = (
        f"{about['device']}, {about['threads']} threads of {about['cores']} cores of {about['processor']}; load before "
        f"{about['load_before']}; {results['arguments']['repeats']} rounds; torch {results['versions']['torch']}\n\n"
        f"{tables.table(HEAD, lines)}\n"
    )
    artefacts.write_json(out / "benchmarks.json", results)
    artefacts.write_text(out / "benchmarks.md", table)
    return table


def main(argv: list[str] | None = None) -> None:
    """Measure the parts asked for; what is done is on disk after each."""
    args = get_parser().parse_args(argv)
    import torch

    from benchmarks.timing import Setup
    from pipeline import networks

    device = networks.prepare_device(args.device)
    program.announce(vars(args), device)
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "versions": program.versions(),
        "machine": machine(torch.get_num_threads(), device),
        "arguments": {"repeats": args.repeats, "quick": args.quick},
        "parts": {},
    }
    lines: list[list[str]] = []
    table = ""
    for name in dict.fromkeys(args.only):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            setup = Setup(args.repeats, device, torch.get_num_threads(), Path(folder), args.quick)
            report = importlib.import_module(f"benchmarks.{PARTS[name]}").measure(setup)
        took = time.monotonic() - began
        print(f"{name}: {took:.0f} s", flush=True)
        figures = [figure.as_json() for figure in report.figures]
        results["parts"][name] = {"seconds": took, "figures": figures, "facts": report.facts}
        lines += [figure.as_cells() for figure in report.figures]
        table = write(args.out, results, lines)
    print(f"\n{table}\n{args.out}: benchmarks.json, benchmarks.md")


if __name__ == "__main__":
    sys.exit(program.run(main))
