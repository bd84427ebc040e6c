"""Where load goes, and the bytes of a request to it."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from elasticmoe.cli.http import check_url, verification

_PATH = "/v1/completions"


class Shape(msgspec.Struct, frozen=True):
    """What every request looks like. Outputs are as long as asked for, whatever token ends them. `is_counted`: ask for
    log probabilities, with which every token is an event even where it makes no text (the half of a character).
    `structured_outputs`: what the answers have to look like, in vLLM's words; None: like anything."""

    model: str
    prompt_tokens: int
    output_tokens: int
    temperature: float = 0.0
    is_counted: bool = False
    structured_outputs: dict[str, Any] | None = None


class Endpoint(msgspec.Struct, frozen=True):
    """An OpenAI server. `tls`: how it proves who it is; None for one without TLS."""

    host: str
    port: int
    head: bytes
    tls: ssl.SSLContext | None

    def request(self, shape: Shape, prompt: Sequence[int]) -> bytes:
        """A streaming completion of token ids, for a connection of its own."""
        return self.addressed(body_of(shape, prompt))

    def addressed(self, body: bytes) -> bytes:
        """A request with a body of `body_of`, to this server."""
        return b"%bContent-Length: %d\r\n\r\n%b" % (self.head, len(body), body)


def body_of(shape: Shape, prompt: Sequence[int]) -> bytes:
    """The body of a streaming completion of token ids."""
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
    if shape.structured_outputs is not None:
        fields["structured_outputs"] = shape.structured_outputs
    return msgspec.json.encode(fields)


def endpoint_of(url: str, *, api_key: str = "", ca_file: str | None = None, traceparent: str = "") -> Endpoint:
    """The server at `url`, without `/v1`. `traceparent`: a header of every request. Raises ConfigError for a URL or
    certificates that are none."""
    check_url(url)
    parts = urlsplit(url)
    lines = [f"POST {parts.path.rstrip('/')}{_PATH} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
    lines += ["Content-Type: application/json", "Connection: close"]
    lines += [f"Authorization: Bearer {api_key}"] if api_key else []
    lines += [f"traceparent: {traceparent}"] if traceparent else []
    tls = verification(url, ca_file)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    head = "\r\n".join([*lines, ""]).encode()
    return Endpoint(parts.hostname or "", port, head, tls if isinstance(tls, ssl.SSLContext) else None)
