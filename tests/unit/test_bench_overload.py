"""`bench overload`: what counts as in time, late, refused and failed, and arrivals that are sent once."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import pytest

from elasticmoe.cli.bench import overload
from elasticmoe.cli.bench.overload import (
    Bounds,
    Figures,
    Step,
    figures_of,
    parse_factors,
    summary_of,
)
from elasticmoe.cli.bench.scaling_figures import Window
from elasticmoe.cli.load.client import Load, Target
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.load.sample import CUT_OFF, NO_CONNECTION, Sample

BOUNDS = Bounds(ttft_s=1.0, tpot_s=0.5)
STEP = Step(2.0, 8.0, Window(10.0, 20.0))


def served(asked: float, *arrivals: float, **fields: Any) -> Sample:
    fields = {"error": "", "status": 200, "tokens": len(arrivals), "ended": arrivals[-1]} | fields
    return Sample(asked=asked, arrivals=list(arrivals), **fields)


def refused(asked: float, after: float, status: int = 429) -> Sample:
    return Sample(asked=asked, status=status, error=f"HTTP {status}", ended=asked + after)


def test_each_request_of_a_step_is_one_of_four_kinds() -> None:
    requests = [
        served(10.0, 10.5, 11.4, 11.5),  # one gap is long, the mean is not
        served(12.0, 13.5, 13.6),  # its first token is late
        served(12.0, 12.5, 13.1),  # its tokens are slow
        Sample(asked=15.0, arrivals=[15.2], status=200),  # under way for ever
        served(16.0, 16.1, error=CUT_OFF),
        Sample(asked=17.0, error=NO_CONNECTION, ended=17.0),
        refused(18.0, 0.004),
        refused(18.5, 0.020, 503),
        refused(9.9, 3.0),  # asked for before
        served(20.0, 20.1),  # and after
    ]
    found = figures_of(requests, STEP, BOUNDS)
    assert (found.requests, found.in_time, found.late, found.refused, found.failed) == (8, 1, 3, 2, 2)
    assert (found.refusal_p50_ms, found.refusal_p99_ms) == (pytest.approx(20), pytest.approx(20))
    assert (found.first_token_p50_ms, found.first_token_p99_ms) == (pytest.approx(500), pytest.approx(1500))


def test_goodput_is_what_came_of_requests_that_are_in_time() -> None:
    requests = [
        served(9.0, 9.9, 10.1, 10.2),  # asked for before: two tokens came here
        served(12.0, 13.5, 13.6),  # late
        served(12.0, 12.1, error=CUT_OFF),
        Sample(asked=15.0, arrivals=[15.2], status=200),
        served(19.8, 19.9, 20.0),  # one came after the step
    ]
    found = figures_of(requests, STEP, BOUNDS)
    assert found.goodput == pytest.approx((2 + 1) / 10)
    assert found.tokens_per_s == pytest.approx((2 + 2 + 1 + 1 + 1) / 10)


def test_nothing_is_not_zero() -> None:
    found = figures_of([], STEP, BOUNDS)
    assert (found.requests, found.goodput, found.refusal_p50_ms, found.first_token_p99_ms) == (0, 0.0, -1.0, -1.0)


def figures(factor: float, goodput: float) -> Figures:
    return Figures(factor, 1.0, 1, 1, 0, 0, 0, 1.0, goodput, 1.0, 1.0, 1.0, 1.0)


def test_the_summary_compares_with_the_highest() -> None:
    steps = [figures(1.0, 100.0), figures(2.0, 95.0), figures(3.0, 90.0), figures(2.0, 40.0)]
    assert "95 %, 40 % of the highest (100.0 tokens/s)" in summary_of(steps)
    assert summary_of(steps[:1]) == summary_of([]) == summary_of([figures(2.0, 0.0)]) == ""


def test_factors_are_checked() -> None:
    assert parse_factors("0.5,1,3") == [0.5, 1.0, 3.0]
    for text in ("", "1,x", "0", "-1", "nan", "1e9"):
        with pytest.raises(ValueError, match="factors"):
            parse_factors(text)
    parser = argparse.ArgumentParser()
    overload.add_arguments(parser)
    with pytest.raises(ValueError, match="settle-s is 10"):
        overload.run(parser.parse_args(["--settle-s", "10"]))


def once(url: str) -> Load:
    load = Load(Shape("m", 4, 8), seed=1, is_patient=False)
    load.set_targets(Target("it", url))
    return load


async def test_a_refused_request_is_not_sent_again() -> None:
    num = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num
        num += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        arrivals = once(f"http://127.0.0.1:{port}")
        await arrivals.arrive(100.0, 0.2)
        await arrivals.drain(10.0)
    assert num == len(arrivals.requests) > 0
    assert all(overload.is_refused(request) for request in arrivals.requests)
    gone = once(f"http://127.0.0.1:{port}")
    await gone.arrive(100.0, 0.05)
    await gone.drain(10.0)
    assert {request.error for request in gone.requests} == {NO_CONNECTION}


async def test_who_does_not_end_is_left() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client leaves
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        arrivals = once(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await arrivals.arrive(100.0, 0.1)
        await arrivals.drain(0.1)
    assert arrivals.requests
    assert all(request.arrivals == [] for request in arrivals.requests)
