"""Every message: encoded here, decoded by an independent MessagePack library, decoded again strictly; and bad bytes."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from elasticmoe.common.layout import RankId, initial_layout
from elasticmoe.common.model_spec import KvGeometry, RecordKey
from elasticmoe.common.protocol import handles, hmm, keeper, peer, pool, rank, router, scaler, signals, standby
from elasticmoe.common.protocol.codec import Codec, Message, encode
from elasticmoe.common.protocol.errors import ProtocolError
from elasticmoe.common.protocol.handles import RecordHandle
from elasticmoe.common.protocol.ids import CommandId, TransitionId
from elasticmoe.common.protocol.limits import (
    EPOCH_MAX,
    NAME_CHARS_MAX,
    PROTOCOL_VERSION,
    SKETCH_BUCKETS,
    WINDOW_COUNT_MAX,
)
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.protocol.router import Delta, Logprob
from elasticmoe.common.protocol.scaler import DeviceStatus, PoolRank
from tests.unit.specs import tiny_mixtral_spec

LAYOUT = initial_layout([3, 0, 3], ["host:0", "host:1"])
RANK = RankId(1, 0)
TRANSITION = TransitionId("op", 0, 1)
NAME = "rank-r1t0:0123456789abcdef"
SAMPLING = rank.Sampling(seed=7, temperature=0.5, logit_bias=((3, -1.5),), logprobs=2)
SEAT = handles.SeatMemory(
    7,
    (RecordHandle(RecordKey("expert", 0, 2), 8),),
    (9,),
    (handles.Routing(2, ((0, 1), (1, 0))),),
    (0, 1),
    (1, 2),
)

RECEIVERS: dict[str, tuple[Codec[Any], tuple[Message, ...]]] = {
    "hmm": (
        hmm.CODEC,
        (
            hmm.LoadModel("op", "/models/x", "bfloat16", LAYOUT, 16, 1 << 20, 256, 32, 2048),
            hmm.GetHmmStatus(),
            hmm.SetMembership((0, 1), True),
            hmm.CheckIntegrity(True),
            hmm.StageLayout(
                TRANSITION,
                LAYOUT,
                (hmm.RecordCopy(RecordKey("expert", 0, 2), "host:0", "host:1"),),
                {"host:0": 3, "host:1": 2},
                {"host:1": 4},
                1 << 30,
            ),
            hmm.CommitLayout(TRANSITION),
            hmm.ReleaseLayout(TRANSITION),
            hmm.AbortLayout(TRANSITION),
            hmm.CopyBlocks(0, NAME, 1, "other", 7, 12.5, ((3, 4), (0, 1))),
        ),
    ),
    "pool": (
        pool.CODEC,
        (
            pool.StartRank(RANK, 1, "host:1", NAME, 1, 256, 32, 2048),
            pool.StopRank(RANK, NAME, 100),
            pool.GetPool(),
        ),
    ),
    "rank": (
        rank.CODEC,
        (
            rank.Submit("r1", (1, 2, 3), 5, SAMPLING, (0,), 1, 30.0, -3, True),
            rank.Submit("r2", (1,), 5, rank.Sampling(seed=1, grammar=rank.Grammar(b"packed", "0" * 64))),
            rank.Submit("r3", (1,), 5, SAMPLING, origin=rank.Origin("mine", f"00-{'ab' * 16}-{'cd' * 8}-01")),
            rank.Cancel("r1"),
            rank.VocabularyPiece("0" * 64, 0, 2, b"ab"),
            rank.Watch(),
            rank.TellShares(router.StepShares(1, 0.125, 0.75)),
            rank.Unwatch(),
            rank.GetRankIntegrity(),
            rank.GetRankLoad(),
            rank.MigrateTo(CommandId("op", 1, 0, "migrate", 2), (rank.MoveTarget(RANK, 1, 3),)),
            rank.Precopy(CommandId("op", 0, 1, "precopy"), (rank.MoveTarget(RANK, 1, 1),), 6),
            rank.DecodeOnly(CommandId("op", 0, 1, "decode_only"), 6),
            rank.Drain(CommandId("op", 0, 0, "drain"), (rank.MoveTarget(RANK, 1),)),
            rank.CancelMigration(CommandId("", 0, 0, "cancel")),
            rank.Reserve("r1", b"router:1", (1, 2, 3), 2),
            rank.Unreserve("r1", b"router:1"),
            rank.HandOver(
                rank.Submit("r1", (1, 2, 3), 5, SAMPLING, (0,), 1, 30.0, -3, True),
                b"router:1",
                (4, 5),
                1,
                4,
                2,
                b"\x00\xffkv",
                (Logprob(-0.5, ((5, -0.5),)),),
            ),
        ),
    ),
    "router": (
        router.CODEC,
        (
            router.Suspected("r1", router.Suspicion(3, 2, 9)),
            router.RankTimes("r1", 0.5, 0.25, 16, 1),
            router.WantVocabulary("0" * 64),
            router.Tokens((Delta("r1", 0, (5,), "stop", 2, (Logprob(-0.5, ((5, -0.5),)),), None),)),
            router.Failed("r1", "queue_full", "64 requests wait; the limit is 64", True),
            router.Moved("r1", RANK),
            router.MayMove("r1", RANK),
            router.RankStatus(
                RANK, NAME, 3, 1, 2, 30, 9, 10, 2048, 0.25, 0.5, True, followers=(router.StepShares(1, 0.125, 0.75),)
            ),
            Ack(),
            Refused("conflict", "text", False),
        ),
    ),
    "scaler": (
        scaler.CODEC,
        (
            scaler.HmmStatus(
                "ready",
                1,
                2,
                None,
                (DeviceStatus("host:0", 9, 1, 2, 3, 3, 4, 5, NAME, 6),),
                3,
                (0, 1),
                True,
                "op",
                LAYOUT,
                scaler.MemoryFacts(4096, KvGeometry(16, 4096, 4096, 1, 4096), 1 << 20, 8192, 2, 3),
                scaler.TransitionStatus(
                    TRANSITION, 2, "failed", (0,), 1, 2, {"host:0": 9}, Refused("does_not_fit", "text", False)
                ),
            ),
            scaler.RankStarted(RANK, NAME),
            scaler.RankReady(RANK, 1, NAME, 1.5, 2.5),
            scaler.RankExited(RANK, 1, NAME, -9, "killed by signal 9"),
            scaler.PoolStatus(2, (PoolRank(RANK, 1, "host:1", NAME, 12, True),)),
            scaler.RankLoad(RANK, NAME, 1, 2, 3, 4, 5, 6, 7, True, CommandId("op", 0, 0, "drain"), 1, 2),
            scaler.Integrity(("finding",), {"host:0/base": 1 << 63}),
            Ack(),
            Refused("conflict", "text", False),
        ),
    ),
    "scaler from all that serve": (
        signals.CODEC,
        (
            signals.RouterWindow(
                router="router:0123456789abcdef",
                number=7,
                epoch=2,
                ended_s=1234.5,
                span_s=1.0,
                admitted=3,
                refused=1,
                prompt_tokens=900,
                max_tokens=600,
                finished=2,
                failed=1,
                cancelled=1,
                output_tokens=123,
                open=5,
                queued=2,
                oldest_queued_s=0.75,
                ttft=((0, 1), (70, 2)),
                gaps=((30, 100),),
                joint=((0, 30, 1), (0, 31, 1), (70, 30, 2)),
            ),
            signals.RankWindow(
                rank=RANK,
                incarnation=NAME,
                number=7,
                epoch=2,
                ended_s=1234.5,
                span_s=1.0,
                running=3,
                waiting=1,
                queued_prefill_tokens=450,
                kv_used=2048,
                kv_total=4096,
                uncached_tokens=900,
                cached_tokens=300,
                generated=60,
                num_steps=20,
                steps=(signals.StepSample(0.05, 128, 2048, 3, 40),),
            ),
        ),
    ),
    "keeper": (keeper.TO_KEEPER, (keeper.Keep(("a", "b")), keeper.Forget(("a",)), keeper.Fetch())),
    "template": (standby.TO_TEMPLATE, (standby.Fork(),)),
    "pool from its processes": (standby.TO_POOL, (standby.Forked(12), standby.Posted())),
    "seats on file": (
        standby.ON_FILE,
        (
            standby.SeatRecord(
                12,
                pool.StartRank(RANK, 1, "host:1", NAME, 2, 256, 64, 2048),
                scaler.RankReady(RANK, 1, NAME, 1.5, 2.5),
                Refused("conflict", "text", False),
            ),
        ),
    ),
    "hmm from keeper": (keeper.FROM_KEEPER, (keeper.Kept(("a",)), Ack(), Refused("x", "y", True))),
    "hmm from rank": (handles.FROM_RANK, (handles.Attach(RANK, 1, "host:1", NAME, True), handles.Applied(7))),
    "rank from rank": (
        peer.CODEC,
        (peer.Reserved("r1", NAME, 1, (3, 4), 1), peer.Taken("r1"), Ack(), Refused("unknown_router", "text", False)),
    ),
    "rank from hmm": (
        handles.TO_RANK,
        (
            handles.AttachReply(
                "memory-1",
                tiny_mixtral_spec(),
                "records-1",
                4096,
                KvGeometry(16, 4096, 4096, 1, 4096),
                1 << 20,
                handles.Segment(0, 4096),
                handles.Segment(0, 4096),
            ),
            handles.ShareHandles(
                (
                    handles.SharedHandle(8, 4096, handles.SharedFd(1, 8192)),
                    handles.SharedHandle(9, 1 << 21, handles.SharedKey((1 << 64) - 1)),
                )
            ),
            SEAT,
            Refused("conflict", "text", False),
        ),
    ),
}
CASES = [(name, message) for name, (_, messages) in RECEIVERS.items() for message in messages]


def _plain(message: Message) -> Any:
    """As an independent decoder sees it: lists for tuples, bytes as they are."""
    return _lists(msgspec.to_builtins(message, builtin_types=(bytes,)))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def kinds_of(codec: Codec[Any]) -> set[str]:
    union = codec._decoder.type
    return {kind.__name__ for kind in (get_args(union) or (union,))}


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_every_message_of_the_union_has_an_example(receiver: str) -> None:
    codec, messages = RECEIVERS[receiver]
    assert {type(message).__name__ for message in messages} == kinds_of(codec)


@pytest.mark.parametrize(("receiver", "message"), CASES, ids=[f"{n}-{type(m).__name__}" for n, m in CASES])
def test_round_trip_and_independent_decoding(receiver: str, message: Message) -> None:
    raw = encode(message, sender="test:1", epoch=3, seq=9)
    plain = msgpack.unpackb(raw)
    assert {key: plain[key] for key in ("version", "epoch", "sender", "seq")} == {
        "version": PROTOCOL_VERSION,
        "epoch": 3,
        "sender": "test:1",
        "seq": 9,
    }
    assert plain["body"]["type"] == type(message).__name__
    assert plain["body"] == _plain(message)
    received = RECEIVERS[receiver][0].decode(raw)
    assert (received.epoch, received.sender, received.seq, received.body) == (3, "test:1", 9, message)


def test_another_version_is_told_apart_whatever_its_body() -> None:
    raw = msgpack.packb({"version": 1, "epoch": 0, "sender": "x:1", "seq": 1, "body": {"type": "New", "deep": [[]]}})
    with pytest.raises(ProtocolError, match=f"version 1 is not {PROTOCOL_VERSION}") as caught:
        rank.CODEC.decode(raw)
    assert caught.value.code == "version_mismatch"


@pytest.mark.parametrize(
    "body",
    [
        {"type": "Unknown"},
        {"type": "Cancel"},
        {"type": "Cancel", "request_id": 5},
        {"type": "Cancel", "request_id": "a", "extra": 1},
        {"type": "Cancel", "request_id": ""},
        {"type": "Submit", "request_id": "a", "prompt": [], "max_tokens": 1, "sampling": {"seed": 1}},
        {"type": "Submit", "request_id": "a", "prompt": [-1], "max_tokens": 1, "sampling": {"seed": 1}},
        {"type": "Submit", "request_id": "a", "prompt": [1], "max_tokens": 1, "sampling": {"seed": 1, "top_p": -1e-9}},
        {
            "type": "Submit",
            "request_id": "a",
            "prompt": [1],
            "max_tokens": 1,
            "sampling": {"seed": 1, "temperature": float("nan")},
        },
        [],
        None,
        7,
    ],
)
def test_bodies_out_of_bounds_are_refused(body: Any) -> None:
    raw = msgpack.packb({"version": PROTOCOL_VERSION, "epoch": 0, "sender": "x:1", "seq": 1, "body": body})
    with pytest.raises(ProtocolError):
        rank.CODEC.decode(raw)


ROUTER_WINDOW = {"type": "RouterWindow", "router": "router:1", "number": 1, "epoch": 1, "ended_s": 9.0, "span_s": 1.0}
RANK_WINDOW = {
    "type": "RankWindow",
    "rank": [0, 0],
    "incarnation": NAME,
    "number": 1,
    "epoch": 1,
    "ended_s": 9.0,
    "span_s": 1.0,
}


@pytest.mark.parametrize(
    ("window", "wrong", "why"),
    [
        (ROUTER_WINDOW, {"number": 0}, "number"),
        (ROUTER_WINDOW, {"router": ""}, "router"),
        (ROUTER_WINDOW, {"span_s": 0.0}, "span_s"),
        (ROUTER_WINDOW, {"span_s": 61.0}, "span_s"),
        (ROUTER_WINDOW, {"ended_s": float("nan")}, "ended_s"),
        (ROUTER_WINDOW, {"ended_s": float("inf")}, "ended_s"),
        (ROUTER_WINDOW, {"admitted": -1}, "admitted"),
        (ROUTER_WINDOW, {"epoch": 1 << 53}, "epoch"),
        (ROUTER_WINDOW, {"ttft": [[140, 1]]}, "ttft"),
        (ROUTER_WINDOW, {"ttft": [[3, 0]]}, "ttft"),
        (ROUTER_WINDOW, {"ttft": [[3, 1], [3, 1]]}, "bucket 3 comes after 3"),
        (ROUTER_WINDOW, {"gaps": [[4, 1], [3, 1]]}, "bucket 3 comes after 4"),
        (ROUTER_WINDOW, {"gaps": [[3, 1]] * 141}, "gaps"),
        (ROUTER_WINDOW, {"open": 1, "queued": 2}, "2 requests wait for a first token, of 1"),
        (ROUTER_WINDOW, {"oldest_queued_s": 0.5}, "no request waits"),
        (ROUTER_WINDOW, {"output_tokens": 5, "failed": 1}, "no request finished"),
        (ROUTER_WINDOW, {"finished": 1, "joint": [[1, 1, 2]]}, "2 requests with a token ended, of 1"),
        (ROUTER_WINDOW, {"finished": 3, "joint": [[2, 1, 1], [1, 9, 1]]}, "comes after"),
        (RANK_WINDOW, {"kv_used": 2, "kv_total": 1}, "KV of 2 tokens is used, of 1"),
        (RANK_WINDOW, {"num_steps": 9, "steps": [[0.1, 1, 1, 1, 1]] * 9}, "steps"),
        (RANK_WINDOW, {"num_steps": 1, "steps": [[0.1, 1, 1, 1, 1]] * 2}, "2 steps are told, of 1"),
        (RANK_WINDOW, {"num_steps": 1, "steps": [[0.0, 1, 1, 1, 1]]}, "steps"),
        (RANK_WINDOW, {"rank": [-1, 0]}, "no rank is"),
    ],
)
def test_windows_that_cannot_be_are_refused(window: dict[str, Any], wrong: dict[str, Any], why: str) -> None:
    head = {"version": PROTOCOL_VERSION, "epoch": 0, "sender": "x:1", "seq": 0}
    assert signals.CODEC.decode(msgpack.packb({**head, "body": window})).body is not None
    with pytest.raises(ProtocolError, match=why):
        signals.CODEC.decode(msgpack.packb({**head, "body": {**window, **wrong}}))


def test_the_longest_window_is_a_small_message() -> None:
    """No sender has to leave anything out of it."""
    buckets = range(SKETCH_BUCKETS)
    most = WINDOW_COUNT_MAX // SKETCH_BUCKETS**2
    window = signals.RouterWindow(
        router="r" * NAME_CHARS_MAX,
        number=EPOCH_MAX,
        epoch=EPOCH_MAX,
        ended_s=1e9,
        span_s=1.0,
        finished=WINDOW_COUNT_MAX,
        ttft=tuple((bucket, most) for bucket in buckets),
        gaps=tuple((bucket, most) for bucket in buckets),
        joint=tuple((first, second, most) for first in buckets for second in buckets),
    )
    raw = encode(window, sender="test:1")
    assert len(raw) < 256 * 1024
    assert signals.CODEC.decode(raw).body == window


def test_no_bytes_raise_anything_else() -> None:
    rng = random.Random(1)
    samples = [(codec, encode(m, sender="t:1")) for codec, messages in RECEIVERS.values() for m in messages]
    bombs = [b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"", b"\xc1", b"\x81" * 50_000]
    num_refused = 0
    for turn in range(20_000):
        codec, raw = samples[turn % len(samples)]
        data = bytearray(bombs[turn % len(bombs)] if turn % 50 == 0 else raw)
        for _ in range(rng.randint(0, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data) + 1) :]
        try:
            codec.decode(bytes(data))
        except ProtocolError:
            num_refused += 1
    assert num_refused > 1_000
