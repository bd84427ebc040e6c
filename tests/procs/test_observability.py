"""A deployment looked at from outside: its logs as JSON, in which requests and operations are found by their ids, and
the traces of requests and operations that a collector gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.procs.clients import stream_completion
from tests.procs.collector import Collector, collecting
from tests.procs.deployment import Deployment

pytestmark = pytest.mark.procs

SETTINGS: dict[str, Any] = {"devices": 3, "max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20}
MODEL = "oracle-paced"  # ten milliseconds a token or more, however quick the machine is
TOKENS = 800


def logs_of(deployment: Deployment) -> Path:
    """Where its processes log."""
    return deployment.run_dir / "logs"


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in JSON, but for one that is being written. Fails for one that is not."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


async def begin(deployment: Deployment, request_id: str, num_tokens: int = TOKENS) -> asyncio.Task[None]:
    """A stream that has begun; it has to end as it should."""
    has_begun = asyncio.Event()

    async def ask() -> None:
        headers = {"x-request-id": request_id}
        async with httpx.AsyncClient(
            base_url=deployment.base_url, timeout=60, trust_env=False, headers=headers
        ) as http:
            stream = await stream_completion(http, MODEL, range(1, 40), num_tokens, on_chunk=has_begun.set)
        assert (stream.error, stream.finish) == (None, "length")

    task = asyncio.create_task(ask())
    await has_begun.wait()
    return task


async def test_what_happens_is_in_logs_and_traces(deploy: Callable[..., Deployment]) -> None:
    with collecting() as collector:
        options = {"log_format": "json", "log_level": "debug", "otlp_endpoint": collector.url, **SETTINGS}
        deployment = deploy(MODEL, replicas=1, **options)
        await (await begin(deployment, "plain", 8))
        check_plain(collector)
        op_id = await check_moved(deployment, collector)
        await check_recovered(deployment, collector)
        check_logs(deployment, op_id, collector)


def check_plain(collector: Collector) -> None:
    """A request that nothing happens to has the spans of router and rank, one after the other."""
    spans = collector.within(collector.request("plain"))
    assert sorted(spans) == ["decode", "generate", "prefill", "queue", "tokenize"]
    (queue,), (prefill,), (decode,), (generate,) = (spans[name] for name in ("queue", "prefill", "decode", "generate"))
    assert generate.began <= queue.began + 1_000_000
    assert queue.ended == prefill.began
    assert prefill.ended == decode.began
    assert prefill.facts["elasticmoe.cached_tokens"] == 0
    assert generate.facts["gen_ai.usage.output_tokens"] == 8


async def check_moved(deployment: Deployment, collector: Collector) -> str:
    """A request whose replica leaves moves. The operation that it does so for."""
    grown = await asyncio.to_thread(deployment.scale, replicas=2)
    assert grown["phase"] == "done"
    check_operation(collector, grown)
    task = await begin(deployment, "moved")
    submitted = next(line for line in logged(logs_of(deployment) / "router.log") if line.get("request_id") == "moved")
    replica = int(submitted["rank"][1])
    op_id = await asyncio.to_thread(deployment.order, remove=[replica])
    await task
    await asyncio.to_thread(deployment.wait_operation, op_id)
    spans = collector.within(collector.request("moved"))
    assert spans["move"], spans
    assert spans["move"][0].facts["elasticmoe.from"] == submitted["rank"]
    assert spans["generate"][0].facts["gen_ai.usage.output_tokens"] == TOKENS
    return op_id


def check_operation(collector: Collector, grown: dict[str, Any]) -> None:
    """It has a trace with its phases, as long as it says that they took, and its copies."""
    root = collector.operation(grown["op_id"])
    assert (root.name, root.service, root.error) == ("operation scale_up", "elasticmoe-scaler", "")
    spans = collector.within(root)
    for timing in grown["timings"]:
        lengths = [(span.ended - span.began) / 1e9 for span in spans[timing["phase"]]]
        assert any(abs(length - timing["seconds"]) < 0.001 for length in lengths), (timing, lengths)
    assert sum(span.facts["elasticmoe.bytes"] for span in spans["hmm copy"]) == grown["figures"]["bytes_copied"] > 0
    assert spans["hmm map"]


async def check_recovered(deployment: Deployment, collector: Collector) -> None:
    """A request whose rank is killed goes on from the ledger."""
    (rank,) = deployment.rank_pids()
    task = await begin(deployment, "recovered")
    await asyncio.to_thread(deployment.kill, rank)
    await task
    (recovery,) = collector.within(collector.request("recovered"))["recovery"]
    assert recovery.facts == {"elasticmoe.how": "adopted", "elasticmoe.rank": rank}


def check_logs(deployment: Deployment, op_id: str, collector: Collector) -> None:
    """Every line is JSON, and says what it is of."""
    logs = {path.stem: logged(path) for path in logs_of(deployment).glob("*.log") if path.stem != "store"}
    logs["launcher"] = logged(deployment.output_path)
    assert logs.keys() >= {"keeper", "hmm", "pool", "scaler", "router", "launcher"}
    for name, lines in logs.items():
        assert lines, name
        assert all(line["message"] and line["level"] and line["ts"].endswith("+00:00") for line in lines), name
    assert {line["service"] for line in logs["pool"]} >= {"worker", "rank-r0t0", "rank-r1t0"}
    of_moved = [line for line in logs["router"] if line.get("request_id") == "moved"]
    assert [line["message"] for line in of_moved][:2] == ["submitted", "moved"]
    assert {line["trace_id"] for line in of_moved} == {collector.request("moved").trace_id}
    assert all(line["stream"].startswith("cmpl-") for line in of_moved)
    for name in ("scaler", "hmm"):
        of_operation = [line for line in logs[name] if line.get("operation_id") == op_id]
        assert len(of_operation) >= 4, name
