"""What a tour says of its figures, and that a lost or wrong stream is told as a failure."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec
import pytest

from elasticmoe.cli.console import Console
from elasticmoe.cli.main import main
from elasticmoe.cli.resolve import Resolved
from elasticmoe.cli.tour import command
from elasticmoe.cli.tour.acts import Tour
from elasticmoe.cli.tour.figures import QuietRun, RankKill, SizeChange, StreamCount, TourFigures

GROWTH = SizeChange(
    replicas_before=1,
    replicas_after=2,
    reason="it should grow",
    ordered_s=3.14,
    took_s=0.618,
    gap_ms=41.4,
    recomputed=0,
    moved=1,
)
FIGURES = TourFigures(
    model="demo",
    up_s=8.0,
    quiet=QuietRun(streams=24, together_ms=60.0, alone_ms=9.84, objective_ms=32.0),
    growth=GROWTH,
    kill=RankKill(rank="r1t0", back_s=0.25, gap_ms=300.0, recomputed=1_200, resubmitted=0),
    shrink=msgspec.structs.replace(GROWTH, replicas_before=2, replicas_after=1),
    streams=StreamCount(whole=98, tokens=9_000, lost={}, wrong=0),
    elapsed_s=60.0,
)


def test_every_act_is_told_with_its_figures() -> None:
    assert "9.8 ms" in FIGURES.quiet.told()
    told = GROWTH.told()
    assert told.startswith("3.1 s later the policy ordered 2 replicas: it should grow. The replica could serve 0.62 s")
    assert told.endswith("longest gap of a stream was 41 ms; 1 stream moved with KV, 0 tokens were recomputed.")
    assert "ordered 1 replica: it should grow. The replica had left" in FIGURES.shrink.told()
    assert "300 ms; 1,200 tokens were recomputed, 0 streams" in FIGURES.kill.told()
    assert (
        FIGURES.streams.told() == "98 streams, 9,000 tokens: 0 lost, 0 with a text that differs from the one at rest."
    )


def run_with(streams: StreamCount, monkeypatch: pytest.MonkeyPatch) -> int:
    async def toured(args: argparse.Namespace, console: Console) -> TourFigures:
        return msgspec.structs.replace(FIGURES, streams=streams)

    monkeypatch.setattr(command, "resolve_model", lambda model, _: Resolved(Path("/m"), model))
    monkeypatch.setattr(command, "_interruptible", toured)
    return main(["tour", "--json"])


def test_a_lost_or_wrong_stream_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(FIGURES.streams, monkeypatch) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=TourFigures) == FIGURES
    lost = StreamCount(whole=98, tokens=9_000, lost={"connection_broken": 2}, wrong=1)
    assert "2 lost (connection_broken), 1 with" in lost.told()
    assert run_with(lost, monkeypatch) == 1
    assert "tour_failed: of 100 streams 2 were lost and 1 had a wrong text" in capsys.readouterr().err


class NeverOrdered:
    """A deployment whose policy is content."""

    async def get(self, path: str) -> object:
        decision = {"reason": "steady", "target": None}
        return {"operations": []} if path == "/v1/operations" else {"decision": decision}

    async def metrics(self) -> str:
        return ""


class Still:
    """Clients without a stream."""

    def let(self, count: int) -> None:
        pass


def test_what_the_policy_does_not_order_is_told_with_its_reason() -> None:
    tour = Tour(NeverOrdered(), 1, 0.01, lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"not told to grow within 0\.01 s; the policy says: the present size is right"
    ):
        asyncio.run(tour._change(Still(), 24, 2))  # type: ignore[arg-type]
