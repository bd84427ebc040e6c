"""Load on an OpenAI endpoint: closed-loop streaming clients, lean enough to share two cores with what they measure.

Each client keeps one connection and sends the next request when the last has ended. Prompts are token ids, different in
every request, so that no prefix is shared; `ignore_eos` makes every request as long as asked for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec


class Sample(msgspec.Struct, frozen=True):
    """One request: when it was sent and when each event with text came, in seconds of the monotonic clock; tokens as
    the server counted them. `error` is empty for one that ended with a finish reason."""

    sent: float
    arrivals: tuple[float, ...]
    tokens: int
    error: str = ""


class Shape(msgspec.Struct, frozen=True):
    """What every request looks like."""

    model: str
    prompt_tokens: int
    output_tokens: int
    vocab: int
    temperature: float = 0.0


class _Chunk(msgspec.Struct):
    choices: list[object] = []
    usage: dict[str, object] | None = None
    error: dict[str, object] | None = None


_decoder = msgspec.json.Decoder(_Chunk)


async def run_clients(url: str, shape: Shape, concurrency: int, num_requests: int, seed: int) -> list[Sample]:
    """`num_requests` requests by `concurrency` clients; samples in order of their ends."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(shape.vocab) for _ in range(shape.prompt_tokens)] for _ in range(num_requests)]
    samples: list[Sample] = []

    async def client() -> None:
        while prompts:
            samples.append(await one_request(url, prompts.pop(), shape))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return samples


async def one_request(url: str, prompt: Sequence[int], shape: Shape) -> Sample:
    """Send one streaming completion and note when its parts came. Never raises for what the server does."""
    parts = urlsplit(url)
    body = msgspec.json.encode(
        {
            "model": shape.model,
            "prompt": prompt,
            "max_tokens": shape.output_tokens,
            "temperature": shape.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    sent = time.perf_counter()
    arrivals: list[float] = []
    tokens, error = 0, "the stream ended without usage"
    try:
        writer.write(head.encode() + body)
        status = (await reader.readline()).split(b" ")[1]
        if status != b"200":
            return Sample(sent, (), 0, f"HTTP {status.decode()}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            chunk = _decoder.decode(line[6:])
            if chunk.error is not None:
                error = str(chunk.error.get("code"))
                break
            if chunk.choices:
                arrivals.append(now)
            if chunk.usage is not None:
                tokens, error = int(str(chunk.usage["completion_tokens"])), ""
    finally:
        writer.close()
    return Sample(sent, tuple(arrivals), tokens, error)


class Figures(msgspec.Struct, frozen=True):
    """Of one run. Times in milliseconds; `tokens_per_s` over the time from the first request to the last token."""

    concurrency: int
    requests: int
    failed: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    gap_max_ms: float


def figures(samples: Sequence[Sample], concurrency: int) -> Figures:
    """Sum up one run. Raises ValueError when no request succeeded."""
    good = [sample for sample in samples if not sample.error and sample.arrivals]
    if not good:
        raise ValueError(f"all {len(samples)} requests failed; the first with: {samples[0].error}")
    start = min(sample.sent for sample in good)
    end = max(sample.arrivals[-1] for sample in good)
    ttft = sorted((sample.arrivals[0] - sample.sent) * 1e3 for sample in good)
    tpot = sorted((s.arrivals[-1] - s.arrivals[0]) * 1e3 / max(1, s.tokens - 1) for s in good)
    gaps = [(b - a) * 1e3 for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return Figures(
        concurrency,
        len(samples),
        len(samples) - len(good),
        sum(sample.tokens for sample in good) / (end - start),
        percentile(ttft, 50),
        percentile(ttft, 99),
        percentile(tpot, 50),
        percentile(tpot, 99),
        max(gaps, default=0.0),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
