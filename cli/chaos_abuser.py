"""`python -m elasticmoe.cli.chaos_abuser RUN_DIR MODEL SEED`: attacks the deployment until its standard input ends.

It says `> NAME` when an attack begins, and `< NAME WORD` when it has ended: the status of the answer, or another word.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from elasticmoe.cli.chaos_attacks import ATTACKS, Attack, Target
from elasticmoe.cli.terminal import say
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.record import read_record

AT_ONCE = 3  # attacks under way; many more would be overload, which is another question
PAUSE_S = 0.05


async def attack_on(run_dir: Path, model: str, seed: int, client: int) -> None:
    """One attack after another, each kind as often as every other, in an order that the seed gives."""
    rng = random.Random(f"{seed}/abuse/{client}")
    order: list[Attack] = []
    while True:
        order = order or rng.sample(ATTACKS, len(ATTACKS))
        attack = order.pop()
        record = _record(run_dir)
        if record is not None:
            say(f"> {attack.__name__}")
            try:
                word = await attack(Target(record[0], record[1], model, rng))
            except (OSError, ValueError) as error:  # the listener restarts just now
                word = type(error).__name__
            say(f"< {attack.__name__} {word}")
        await asyncio.sleep(PAUSE_S)


def _record(run_dir: Path) -> tuple[str, str] | None:
    """Where the deployment listens; None while it does not."""
    try:
        record = read_record(run_dir)
    except ElasticMoEError:
        return None
    return (record.url, record.admin_url) if record is not None else None


async def main() -> None:
    """Until standard input ends; attacks under way are given up then."""
    run_dir, model, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    attacks = [asyncio.create_task(attack_on(run_dir, model, seed, client)) for client in range(AT_ONCE)]
    over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([over, *attacks], return_when=asyncio.FIRST_COMPLETED)
    for task in attacks:
        if task.done():
            task.result()  # an attack must not end by itself
        task.cancel()
    await asyncio.gather(*attacks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
