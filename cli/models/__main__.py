"""`python -m elasticmoe.cli.models NAME DIR [--seed N] [--dtype bfloat16|float32]`: make one of the named models."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from elasticmoe.cli.models.checkpoint import DTYPES
from elasticmoe.cli.models.make import make_model, model_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model that the command line asks for. Returns the exit status: 0, or 1 with the reason on stderr."""
    known = "\n".join(f"  {name:<22}{summary}" for name, summary in model_names().items())
    parser = argparse.ArgumentParser(
        prog="python -m elasticmoe.cli.models",
        description=f"Make a model checkpoint without a hub.\n\nnames:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of the names above")
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder that is empty or does not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the weights (default: the model's own)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        make_model(
            options.name,
            options.directory,
            seed=options.seed,
            dtype=options.dtype,
            progress=_show_progress if sys.stderr.isatty() else None,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    num_bytes = sum(path.stat().st_size for path in options.directory.iterdir())
    print(f"{options.directory}: {num_bytes / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
    return 0


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
