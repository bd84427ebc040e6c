"""Load on an OpenAI endpoint: streaming requests, lean enough to share two cores with what they measure.

Prompts are token ids, different in every request, so that no prefix is shared; `ignore_eos` makes every request as long
as asked for. Here is one request, and closed-loop clients for a number of requests: each keeps one request under way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec


class Sample(msgspec.Struct):
    """One request, filled in while it runs. Times in seconds of the monotonic clock.

    `sent`: when the connection stood; 0 before. `arrivals`: when each event with text came. `tokens`: as the server
    counted them. `status`: HTTP status of the answer, 0 without one. `error`: None while it runs, empty when it ended
    with a finish reason, else the reason. `ended`: when one or the other was known.
    """

    sent: float = 0.0
    arrivals: list[float] = []
    tokens: int = 0
    status: int = 0
    error: str | None = None
    ended: float = 0.0


class Shape(msgspec.Struct, frozen=True):
    """What every request looks like. `is_counted`: ask for log probabilities, with which every token is an event even
    where it makes no text (the half of a character)."""

    model: str
    prompt_tokens: int
    output_tokens: int
    vocab: int
    temperature: float = 0.0
    is_counted: bool = False


class _Chunk(msgspec.Struct):
    choices: list[object] = []
    usage: dict[str, object] | None = None
    error: dict[str, object] | None = None


_decoder = msgspec.json.Decoder(_Chunk)
CUT_OFF = "cut off"
_LINE_BYTES_MAX = 1 << 20


async def run_clients(url: str, shape: Shape, concurrency: int, num_requests: int, seed: int) -> list[Sample]:
    """`num_requests` requests by `concurrency` clients; samples in order of their ends. Raises OSError when the server
    takes no connection."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(shape.vocab) for _ in range(shape.prompt_tokens)] for _ in range(num_requests)]
    samples: list[Sample] = []

    async def client() -> None:
        while prompts:
            sample = Sample()
            await one_request(url, prompts.pop(), shape, sample)
            samples.append(sample)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return samples


async def one_request(url: str, prompt: Sequence[int], shape: Shape, sample: Sample) -> None:
    """Send one streaming completion and note in `sample` when its parts came.

    Raises OSError when no connection can be made; what happens after that is in `sample.error`.
    """
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_LINE_BYTES_MAX)
    sample.sent = time.monotonic()
    sample.error = None
    try:
        writer.write(_encode(parts.netloc, prompt, shape))
        sample.error = await _read(reader, sample)
    except ConnectionError:
        sample.error = CUT_OFF
    finally:
        sample.ended = time.monotonic()
        writer.close()


def _encode(host: str, prompt: Sequence[int], shape: Shape) -> bytes:
    fields: dict[str, object] = {
        "model": shape.model,
        "prompt": prompt,
        "max_tokens": shape.output_tokens,
        "temperature": shape.temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if shape.is_counted:
        fields["logprobs"] = 0
    body = msgspec.json.encode(fields)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _read(reader: asyncio.StreamReader, sample: Sample) -> str:
    """Read the answer to its end; the error, empty for none."""
    words = (await reader.readline()).split(b" ")
    if len(words) < 2:
        return CUT_OFF
    sample.status = int(words[1])
    if sample.status != 200:
        return f"HTTP {sample.status}"
    has_usage = False
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        chunk = _decoder.decode(line[6:])
        if chunk.error is not None:
            return str(chunk.error.get("code"))
        if chunk.choices:
            sample.arrivals.append(now)
        if chunk.usage is not None:
            sample.tokens, has_usage = int(str(chunk.usage["completion_tokens"])), True
    return "" if has_usage else CUT_OFF


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
