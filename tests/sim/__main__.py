"""`python -m tests.sim SEED` replays one seed verbosely; `python -m tests.sim FIRST LAST` runs many in short."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.sim.scenario import run_seed
from tests.sim.world import simulated


def main() -> int:
    """The exit status: 1 where a promise is broken."""
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    failed, figures, began = 0, Counter[str](), time.process_time()
    with simulated():
        for seed in range(first, last + 1):
            result = run_seed(seed, verbose=first == last)
            figures.update(result.figures)
            if result.error:
                failed += 1
                print(f"seed {seed}: {result.error}")
    spent = time.process_time() - began
    print(f"{last - first + 1} seeds, {failed} failed, {spent:.1f} s of CPU; {dict(figures)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
