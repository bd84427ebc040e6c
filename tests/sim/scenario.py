"""One seed: a deployment comes up, orders and requests come while faults happen, then all must become well again."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import NamedTuple

from elasticmoe.services.scaler.control.replay import DECISIONS, replay
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.planning.plan import Target
from tests.sim.heap import Faults, Violation
from tests.sim.world import World

START_S_MAX = 20.0
HEAL_S_MAX = 240.0
LOOK_S = 2.0
BAD_MAX = 2  # more bad requests than these may exceed what a seat is allowed (ADR 20)


class Result(NamedTuple):
    """What became of a seed. `error`: empty when all promises hold; `log`: its last events."""

    seed: int
    error: str
    log: list[str]
    figures: dict[str, int]


def run_seed(seed: int, *, tp: int = 1, verbose: bool = False) -> Result:
    """Run one seed, with replicas of `tp` ranks. Only within `simulated()`."""
    world = World(seed, tp=tp, verbose=verbose)
    error = ""
    try:
        _play(world)
    except Violation as violation:
        error = str(violation)
    except Exception as failure:
        frames = traceback.extract_tb(failure.__traceback__)[-3:]
        places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
        error = f"{type(failure).__name__}: {failure} at {places}"
        if verbose:
            traceback.print_exc()
    return Result(seed, error, list(world.sim.log), _figures(world))


def _figures(world: World) -> dict[str, int]:
    ends = list(world.router.ends.values())
    return {
        "events": world.sim.num_events,
        "flips": world.hmm.bus.num_flips,
        "urgent": world.num_urgent,
        "followed": world.num_followed,
        "requests": len(ends),
        "finished": sum(kind == "finish" for kind, _ in ends),
        "moved": world.router.history.report.num_moves,
        "resubmitted": sum(r.num_resubmits for r in world.router.history.report.requests.values()),
        "fenced": world.hmm.fence.num_refused,
        "decisions": len(world.store.decisions),
        "devices_lost": world.losses.num_lost,
        "adopted": world.pool.num_adopted,
        "poisons": len(world.poisons.num_strikes),
        "strikes": sum(world.poisons.num_strikes.values()),
        "convicted": sum(reason == "request_failed" for _, reason in ends),
        "stores_full": world.num_full,
        "ejected": world.num_ejected,
        "crash_loops": int(world.has_crash_loop),
        "given_up_full": sum(_is_given_up_full(operation) for operation in world.store.data.get("ended", [])),
        "seconds": int(world.sim.now),
        **world.policies.figures,
    }


def _is_given_up_full(operation: Operation) -> bool:
    return operation.error is not None and operation.error.message.startswith("the operation's records")


def _play(world: World) -> None:
    sim, rng = world.sim, world.sim.rng
    while not (world.scalers and world.scalers[0].phase == "serving" and world.router.dispatcher.readiness(sim.now)[0]):
        world.expect(sim.now < START_S_MAX, "it does not come up")
        sim.run(sim.now + 0.25)
    world.store.remember()
    is_calm = rng.random() < 0.1
    span_s = rng.uniform(8.0, 20.0)
    if not is_calm:
        _draw_network(world)
        _draw_faults(world, span_s)
        _draw_full(world, span_s)
    is_plain = is_calm and rng.random() < 0.8
    _draw_orders(world, span_s, is_plain=is_plain)
    _draw_requests(world, span_s, is_plain=is_plain)
    world.policies.draw(span_s)
    if not is_calm:
        world.losses.draw(span_s)
    sim.run(sim.now + span_s)
    heal(world)
    until = sim.now + HEAL_S_MAX
    unrest = world.unrest()
    while unrest:
        world.expect(sim.now < until, f"not at rest {HEAL_S_MAX:g} s after the last fault: {unrest}")
        sim.run(sim.now + LOOK_S)
        unrest = world.unrest()
    _check_requests(world, is_plain=is_plain)
    again = replay([DECISIONS.decode(raw) for raw in world.store.decisions])
    differences = [f"{one.name}: {one.difference}" for one in again if one.difference]
    world.expect(not differences, "; ".join(differences))


def heal(world: World) -> None:
    """No fault from now on."""
    world.sim.note("healed")
    world.is_healed = True
    world.sim.faults.clear()
    world.store.is_down = world.store.is_full = False
    world.crash_rate = world.hmm.failure_rate = 0.0


def _check_requests(world: World, *, is_plain: bool) -> None:
    report, ends = world.router.history.report, world.router.ends
    num_bad = len(world.poisons.num_strikes)
    world.expect(num_bad > BAD_MAX or not world.has_crash_loop, f"a seat is given up for {num_bad} bad requests")
    for name in report.requests:
        world.expect(name in ends or name in report.cut_off, f"{name} was accepted and never ended")
        if is_plain and name not in world.poisons.by_name and not world.has_crash_loop:
            world.expect(ends[name][0] == "finish", f"{name} failed without a fault: {ends[name]}")


def _draw_network(world: World) -> None:
    rng = world.sim.rng
    for plane in ("control", "data"):
        if rng.random() < (0.25 if plane == "control" else 0.5):
            continue
        world.sim.faults[plane] = Faults(
            loss=rng.choice((0.0, 0.05, 0.15, 0.3)) * (1.0 if plane == "control" else 0.3),
            doubled=rng.choice((0.0, 0.1, 0.5)),
            delay_max=rng.choice((0.1, 1.0, 5.0)),
            slow=rng.choice((0.0, 0.05, 0.3)),
            reorders=rng.random() < 0.7,
        )


def _at(world: World, span_s: float, what: Callable[[], None]) -> None:
    world.sim.push(world.sim.now + world.sim.rng.random() * span_s, None, 0, what, ())


def _draw_faults(world: World, span_s: float) -> None:
    rng = world.sim.rng
    if rng.random() < 0.3:
        world.crash_rate = 0.01
    if rng.random() < 0.25:
        world.hmm.failure_rate = rng.choice((0.2, 0.5))
    for _ in range(rng.choice((0, 1, 2, 2, 3, 4))):
        _at(world, span_s, lambda: _fault(world))


def _draw_full(world: World, span_s: float) -> None:
    """The store without room for a while, by numbers of its own: a seed's other events stay what they are."""
    rng = random.Random(f"full {world.sim.seed}")
    if rng.random() < 0.3:
        seconds, is_reserve_eaten = rng.uniform(1.0, 12.0), rng.random() < 0.5
        at = world.sim.now + rng.random() * span_s
        world.sim.push(at, None, 0, _store_full, (world, seconds, is_reserve_eaten))


def _fault(world: World) -> None:
    """One of them, now."""
    rng, sim, store = world.sim.rng, world.sim, world.store
    kind = rng.choice(
        (
            *("pause", "pause", "rank", "rank", "hmm", "pool", "scaler", "two", "two", "router", "down", "wipe"),
            *("back", "pool and hmm"),
        )
    )
    down_s = rng.uniform(0.1, 3.0)
    ranks = list(world.ranks.values())
    if kind == "pause":
        rng.choice([world.hmm, world.pool, world.router, *world.scalers, *ranks]).pause(rng.uniform(0.1, 6.0))
    elif kind == "rank" and ranks:
        rng.choice(ranks).exit("killed")
    elif kind == "scaler" and world.scalers:
        rng.choice(world.scalers).crash(down_s)
    elif kind == "two" and len(world.scalers) == 1:
        old = world.scalers[0]
        world.start_scaler()
        new = world.scalers[-1]
        old.pause(rng.uniform(3.0, 9.0))
        draw = rng.random()
        if draw < 0.4:
            sim.push(sim.now + rng.uniform(4.0, 9.0), None, 0, new.crash, (down_s,))
        elif draw < 0.8:  # once the new one acts: both leases run out, and the store forgets whose was the higher epoch
            sim.push(sim.now + 3.4, None, 0, _store_lost, (world, rng.uniform(4.0, 7.0)))
            late = f"late{world.num_scalers}", Target(replicas=rng.randint(1, 4))
            sim.push(old.paused_until, old, old.life, old.hand_in, late)
    elif kind in ("hmm", "pool", "router", "pool and hmm"):
        for name in kind.split(" and "):
            actor = getattr(world, name)
            if actor.is_alive and not actor.is_paused:
                actor.crash(down_s)
    elif kind == "down":
        _store_down(world, rng.uniform(0.5, 8.0))
    elif kind == "wipe":
        store.wipe()
    elif kind == "back":
        store.roll_back()


def _store_down(world: World, seconds: float) -> None:
    if not (world.store.is_down or world.is_healed):
        world.sim.note("store: down")
        world.store.is_down = True
        world.sim.push(world.sim.now + seconds, None, 0, _store_up, (world,))


def _store_full(world: World, seconds: float, is_reserve_eaten: bool) -> None:
    if not (world.store.is_full or world.is_healed):
        world.sim.note(f"store: full, {'the reserve too' if is_reserve_eaten else 'but for the reserve'}")
        world.store.is_full, world.store.is_reserve_eaten = True, is_reserve_eaten
        world.num_full += 1
        world.sim.push(world.sim.now + seconds, None, 0, _store_has_room, (world,))


def _store_has_room(world: World) -> None:
    world.sim.note("store: has room")
    world.store.is_full = False


def _store_lost(world: World, seconds: float) -> None:
    _store_down(world, seconds)
    world.store.wipe()


def _store_up(world: World) -> None:
    world.sim.note("store: up")
    world.store.is_down = False


def _draw_orders(world: World, span_s: float, *, is_plain: bool) -> None:
    rng = world.sim.rng
    for number in range(rng.choice((1, 1, 2, 3))):
        target: Target | None = Target(replicas=rng.randint(1, 4))
        draw = rng.random()
        if draw < 0.2:
            target = Target(remove=(rng.randint(0, 2),))
        elif draw < 0.4:
            count = world.tp * rng.randint(1, len(world.devices) // world.tp)
            target = Target(devices=tuple(sorted(rng.sample(world.devices, count))))
        elif draw < 0.5:
            target = None
        _at(world, span_s * 0.7, lambda target=target, number=number: _order(world, f"op{number}", target))
        if rng.random() < 0.2 and not is_plain:
            _at(world, span_s, lambda number=number: world.orders.append((f"cancel{number}", f"op{number}")))
    if rng.random() < 0.1 and not is_plain:
        world.deadline_s = rng.uniform(1.0, 5.0)


def _order(world: World, op_id: str, target: Target | None) -> None:
    if target is None or world.losses.admits(target):
        world.orders.append((op_id, target))


def _draw_requests(world: World, span_s: float, *, is_plain: bool) -> None:
    rng = world.sim.rng
    beginnings = [tuple(rng.randrange(250) for _ in range(12)) for _ in range(2)]
    for number in range(rng.randint(3, 9)):
        begin = beginnings[rng.randrange(2)][: rng.choice((0, 4, 8, 12))]
        prompt = begin + tuple(rng.randrange(250) for _ in range(rng.randint(1, 8)))
        count = rng.randint(4, 27)
        name = f"q{number}"
        _at(world, span_s, lambda name=name, p=prompt, c=count: _open(world, name, p, c))
        if rng.random() < 0.1 and not is_plain:
            _at(world, span_s, lambda name=name: world.router.cancel(name))


def _open(world: World, name: str, prompt: tuple[int, ...], count: int) -> None:
    world.router.open(name, prompt, count, 60.0)
