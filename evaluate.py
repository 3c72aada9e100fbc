"""Tables: reconstructions against one another.

In:  see the commands.
Out: tables, per-image scores and pictures in the folder of --out.

    python evaluate.py reconstruction out/alexnet/reconstructions
    python evaluate.py reconstruction --help
"""

import argparse
import sys

from pipeline import cli, reconstruction_scores

# Modules with a docstring, add_options(parser) and run(args) -> exit code.
COMMANDS = {"reconstruction": reconstruction_scores}


def get_parser() -> cli.Parser:
    """Options of all commands."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = choices.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument(
            "--device", choices=cli.DEVICES, default="auto", help="auto takes cuda, then mps, then cpu"
        )
        command.add_argument("--seed", type=cli.natural, default=0, help="of noise and bootstrap (default: 0)")
        command.add_argument("--overwrite", action="store_true", help="evaluate afresh")
        module.add_options(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command."""
    args = get_parser().parse_args(argv)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
