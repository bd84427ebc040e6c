"""What the scaler makes of the answers of its hosts: which layout is in force, who says so, and what adds up."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.common.devices.names import LOCAL_HOST
from elasticmoe.common.layout import RankId, Seat, initial_layout
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus
from elasticmoe.services.scaler.cluster import Cluster, HostStatus, InForce, in_force

HELD, LAST, BEGINNING = (initial_layout([4], ["host:0", "host:1"], epoch=epoch) for epoch in (7, 6, 3))
EMPTY = HmmStatus("empty", 0, 0, None, (), 0, (), False)
READY = msgspec.structs.replace(EMPTY, phase="ready", layout=HELD)


@pytest.mark.parametrize(
    ("hmm", "last", "found"),
    [
        (READY, LAST, InForce(HELD, "hmm")),
        (READY, None, InForce(HELD, "hmm")),
        (EMPTY, LAST, InForce(LAST, "last_seen")),
        (None, LAST, InForce(LAST, "last_seen")),
        (msgspec.structs.replace(EMPTY, phase="loading"), None, InForce(BEGINNING, "beginning")),
        (None, None, InForce(BEGINNING, "beginning")),
    ],
)
def test_the_hmm_says_what_is_in_force_then_what_it_said_last_then_the_store(
    hmm: HmmStatus | None, last: object, found: InForce
) -> None:
    told = in_force({LOCAL_HOST: HostStatus(hmm)}, last, BEGINNING)  # type: ignore[arg-type]
    assert told == found
    assert told.committed == (HELD if hmm is READY else None), "nothing else is known to be committed"


def host(name: str, slot: int, *, standby: int) -> HostStatus:
    """Two devices each, of which a rank in `slot` is attached to the first."""
    devices = tuple(
        DeviceStatus(f"{name}host:{index}", 100, 10, 10, 10, 70, 4, 8, f"rank:{slot}" if index == 0 else None)
        for index in range(2)
    )
    rank = PoolRank(RankId(slot, 0), slot, f"{name}host:0", f"rank:{slot}", 1, True)
    return HostStatus(msgspec.structs.replace(READY, devices=devices), PoolStatus(standby, (rank,)))


def test_what_hosts_have_is_put_together_and_seats_are_filled_from_their_own_host() -> None:
    hosts = {LOCAL_HOST: host("", 0, standby=1), "b": host("b/", 1, standby=0)}
    cluster = Cluster(hosts, InForce(HELD, "hmm"))
    assert [device.device for device in cluster.devices] == ["host:0", "host:1", "b/host:0", "b/host:1"]
    assert cluster.attached == {"host:0": "rank:0", "b/host:0": "rank:1"}
    assert (set(cluster.ranks), cluster.standby, cluster.pools_answer) == ({0, 1}, 1, True)
    seats = [
        Seat(RankId(2 + slot, 0), 2 + slot, device) for slot, device in enumerate(("b/host:1", "host:1", "host:0"))
    ]
    assert [seat.device for seat in cluster.startable(seats)] == ["host:1"]
    silent = Cluster({**hosts, "b": HostStatus(hosts["b"].hmm)}, cluster.in_force)
    assert (set(silent.ranks), silent.pools_answer) == ({0}, False)


def test_what_several_hosts_would_have_to_agree_on_is_not_guessed() -> None:
    hosts = {LOCAL_HOST: host("", 0, standby=1), "b": host("b/", 1, standby=0)}
    for ask in (lambda: in_force(hosts, None, BEGINNING), lambda: Cluster(hosts, InForce(HELD, "hmm")).transition):
        with pytest.raises(ValueError, match="one host"):
            ask()
