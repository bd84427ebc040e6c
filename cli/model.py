"""`elasticmoe model`: make the named models."""

from __future__ import annotations

import argparse
from pathlib import Path

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.console import make_console, size
from elasticmoe.cli.terminal import say
from elasticmoe.common.protocol.errors import CheckpointError

HELP = "make or list the models that need no hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`make NAME DIR` and `list`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="make a model in a folder")
    make.add_argument("name", metavar="NAME", help="one of `elasticmoe model list`")
    make.add_argument("directory", metavar="DIR", type=Path, help="a folder that is empty or does not exist")
    make.add_argument("--seed", type=whole(0), default=0, help="seed of the random weights (default 0)")
    make.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: the model's own)"
    )
    actions.add_parser("list", help="the names, and what they are")


def run(args: argparse.Namespace) -> int:
    """Raises CheckpointError when the model cannot be made."""
    from elasticmoe.cli.models import make_model, model_names

    if args.action == "list":
        for name, summary in model_names().items():
            say(f"{name:<22}{summary}")
        return 0
    with make_console() as console:
        try:
            make_model(
                args.name,
                args.directory,
                seed=args.seed,
                dtype=args.dtype,
                progress=lambda done, total: console.progress(f"making {args.name}", done, total),
            )
        except OSError as error:
            text = f"{error.filename or args.directory}: {error.strerror}"
            raise CheckpointError(text, code="model_failed") from None
        except ValueError as error:
            raise CheckpointError(" ".join(str(error).split()), code="model_failed") from None
    say(f"{args.directory}: {size(sum(path.stat().st_size for path in args.directory.iterdir()))}")
    return 0
