"""The command line `elasticmoe`: one subcommand per module, and the only place where errors become lines."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from common.protocol.errors import ElasticMoEError
from common.transport import describe

# Each module has HELP, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "up": "cli.up",
    "down": "cli.down",
    "status": "cli.status",
    "scale": "cli.scale",
    "plan": "cli.plan",
    "rebalance": "cli.rebalance",
    "events": "cli.events",
    "chat": "cli.chat",
    "doctor": "cli.doctor",
    "model": "cli.model",
    "bench": "cli.bench.command",
    "chaos": "cli.chaos",
    "version": "cli.version",
}
_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="elasticmoe", description="Serves Mixture-of-Experts models and scales while it serves."
    )
    parser.add_argument("--debug", action="store_true", help="show the stack of an unexpected error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP.capitalize() + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, 2 for a wrong command line, 130 when interrupted.

    An error is one line `elasticmoe: code: text` on stderr, never a stack.
    """
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ElasticMoEError as error:
        line = describe(error)
    except KeyboardInterrupt:
        print("elasticmoe: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (as `head` does); Python's own flush at the end must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last line of defence: users get a line, `--debug` shows the rest
        if args.debug:
            traceback.print_exc()
        line = f"internal_error: {type(error).__name__}: {' '.join(str(error).split())}"
    print(f"elasticmoe: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
