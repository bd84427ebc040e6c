"""`python -m tests.sim SEED` replays one seed verbosely; `python -m tests.sim FIRST LAST` runs many in short. Before
them `--tp 2`: with replicas of two ranks."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.scenario import run_seed
from tests.sim.world import simulated


def main() -> int:
    """The exit status: 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    args = parser.parse_args()
    first, last = args.first, args.first if args.last is None else args.last
    failed, figures, began = 0, Counter[str](), time.process_time()
    with simulated():
        for seed in range(first, last + 1):
            result = run_seed(seed, tp=args.tp, verbose=first == last)
            figures.update(result.figures)
            if result.error:
                failed += 1
                print(f"seed {seed}: {result.error}")
    spent = time.process_time() - began
    print(f"{last - first + 1} seeds, {failed} failed, {spent:.1f} s of CPU; {dict(figures)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
