"""What is known of the load at a moment. Zero, missing and unknown are three things. Pure data.

A number is a number, 0 included. `Missing`: nothing happened that the figure could tell of, such as a latency where no
request was. `Unknown`: somebody who has a share in the figure is silent; what the others say is not the figure.
"""

from __future__ import annotations

import msgspec


class Missing(msgspec.Struct, frozen=True, tag=True):
    """Nothing that the figure could tell of has happened."""


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """Some who have a share in the figure are silent."""


MISSING = Missing()
UNKNOWN = Unknown()
Known = float | Unknown
Figure = float | Missing | Unknown


class Throughput(msgspec.Struct, frozen=True):
    """Tokens per second of all replicas, by the newest window of each: those that came out, and those of the prompts
    that went in, served by the prefix cache or not. Nothing is decided by it."""

    generated_per_s: Known
    prompt_per_s: Known


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a deployment at `at_s`.

    silent: routers and ranks that have not been heard of for too long; `silent_since_s`: since when the first of them
    admitted_per_s: of all routers, at admission; of who was refused there too. `burst_per_s`: in the last moments;
        `last_per_s`: in the last one, which tells of a step of the load a second sooner and is twice as noisy
    prompt_tokens: of a request that was admitted, in the mean of the last minutes
    queued, oldest_queued_s, oldest_prompt_tokens, refused_per_s: of the routers that are heard
    output_tokens: of a request that finished; `asked_tokens`: that one may get, of those admitted
    uncached_share: of prompt tokens, what the prefix cache did not have
    ttft_s, itl_s: the quantile of the time to the first token, and the mean gap between tokens; of windows since the
        layout came into force and settled
    step_s: mean step of the slowest rank in the last seconds
    queued_prefill_tokens: of all ranks
    running: sequences of all ranks
    kv_used, kv_share_most: tokens in KV of all ranks; used share of the fullest
    attainment: share of the requests that ended or were refused which kept both objectives
    """

    at_s: float
    silent: tuple[str, ...] = ()
    silent_since_s: float | None = None
    admitted_per_s: Known = UNKNOWN
    burst_per_s: Known = UNKNOWN
    last_per_s: Known = UNKNOWN
    prompt_tokens: Figure = MISSING
    queued: int = 0
    oldest_queued_s: float = 0.0
    oldest_prompt_tokens: int = 0
    refused_per_s: float = 0.0
    output_tokens: Figure = MISSING
    asked_tokens: Figure = MISSING
    uncached_share: Figure = MISSING
    ttft_s: Figure = MISSING
    itl_s: Figure = MISSING
    step_s: Figure = MISSING
    queued_prefill_tokens: Known = UNKNOWN
    running: Known = UNKNOWN
    kv_used: Known = UNKNOWN
    kv_share_most: Known = UNKNOWN
    attainment: Figure = MISSING
