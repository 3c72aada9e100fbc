"""Tables: saliency maps against human fixations, reconstructions against one another, images against spoiled copies.

In:  see the commands.
Out: tables, per-image scores, pictures, and report.html with all of them, in the folder of --out.

    python evaluate.py fixations --stimuli photos/ --fixations fixations.csv
    python evaluate.py reconstruction out/alexnet/reconstructions
    python evaluate.py naturalness photos/
    python evaluate.py fixations --help
"""

import sys

from evaluation import score_fixations, score_naturalness, score_reconstructions
from pipeline import distributed, options, program

# Modules with a docstring, add_options(parser) and run(args) -> exit code.
COMMANDS = {"fixations": score_fixations, "reconstruction": score_reconstructions, "naturalness": score_naturalness}


def get_parser() -> options.Parser:
    """Options of all commands."""
    return options.command_parser(__doc__, COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run a command."""
    args = get_parser().parse_args(argv)
    code = COMMANDS[args.command].run(args)
    if distributed.leads() and (args.out / "summary.json").is_file():
        from evaluation import page

        page.write_page(args.out, args.command)
    return code


if __name__ == "__main__":
    sys.exit(program.run(main))
