"""The command line `elasticmoe`: one subcommand per module, and the only place where errors become lines."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Collection, Sequence

from elasticmoe.cli import terminal
from elasticmoe.cli.arguments import WrongUsage
from elasticmoe.cli.version import version
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.transport import describe

# Each module has HELP, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "up": "elasticmoe.cli.up",
    "down": "elasticmoe.cli.down",
    "status": "elasticmoe.cli.status",
    "scale": "elasticmoe.cli.scale",
    "plan": "elasticmoe.cli.plan",
    "rebalance": "elasticmoe.cli.rebalance",
    "policy": "elasticmoe.cli.policy",
    "events": "elasticmoe.cli.events",
    "chat": "elasticmoe.cli.chat",
    "load": "elasticmoe.cli.load.command",
    "doctor": "elasticmoe.cli.doctor",
    "model": "elasticmoe.cli.model",
    "tour": "elasticmoe.cli.tour.command",
    "bench": "elasticmoe.cli.bench.command",
    "chaos": "elasticmoe.cli.chaos",
    "completion": "elasticmoe.cli.completion",
    "version": "elasticmoe.cli.version",
}
_INTERRUPTED = 128 + signal.SIGINT
_READER_LEFT = 128 + signal.SIGPIPE  # as a shell reports a program that ended by the signal


def make_parser(names: Collection[str] = COMMANDS.keys()) -> terminal.Parser:
    """The parser of these subcommands, whose modules are imported."""
    parser = terminal.Parser(
        prog="elasticmoe", description="Serves Mixture-of-Experts models and scales while it serves."
    )
    parser.add_argument("--version", action="version", version=f"elasticmoe {version()}", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the stack of an unexpected error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        module = importlib.import_module(COMMANDS[name])
        command = commands.add_parser(name, help=module.HELP, description=module.HELP.capitalize() + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, 2 for a wrong command line, 130 when interrupted,
    141 when the reader of its output has left.

    An error is one line `elasticmoe: code: text` on stderr, never a stack.
    """
    terminal.prepare_streams()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # what cannot be written is told here, not by the interpreter's end
    except BrokenPipeError:  # the reader left, as `head` does
        terminal.discard(sys.stdout)
        return _READER_LEFT
    except OSError as error:
        terminal.discard(sys.stdout)
        terminal.complain(f"elasticmoe: {describe(terminal.output_failed(error))}")
        return 1


def _asked(argv: Sequence[str]) -> Collection[str]:
    """The subcommands that can be meant: the one that is named, as to import all of them takes a third of a second."""
    name = next((argument for argument in argv if argument != "--debug"), "")
    if name == "--version":
        return ()
    return (name,) if name in COMMANDS else COMMANDS.keys()


def _run(argv: Sequence[str]) -> int:
    """The same, but for what goes wrong with stdout."""
    for number, argument in enumerate(argv, 1):
        if not terminal.is_text(argument):
            terminal.complain(f"elasticmoe: bad_argument: argument {number} is not text in UTF-8: {argument[:200]}")
            return terminal.WRONG_USAGE
    is_debug = False
    try:
        args = make_parser(_asked(argv)).parse_args(argv)
        is_debug = args.debug
        return int(args.run(args))
    except ElasticMoEError as error:
        line = describe(error)
    except WrongUsage as error:
        terminal.complain_of_usage(str(error), f"elasticmoe {args.command}")
        return terminal.WRONG_USAGE
    except KeyboardInterrupt:
        terminal.complain("elasticmoe: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:  # the last line of defence: users get a line, `--debug` shows the rest
        if is_debug:
            traceback.print_exc()
        line = f"internal_error: {type(error).__name__}: {' '.join(str(error).split())}"
    terminal.complain(f"elasticmoe: {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
