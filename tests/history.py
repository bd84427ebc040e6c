"""The checker of promise P1 over a router's history: every accepted request ends exactly once.

`check_history` reads what services/router/history.py wrote and raises AssertionError with every finding. It is meant to
run at the end of every test that serves requests with history on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec


@dataclass
class Request:
    """One accepted generation as the history tells it."""

    name: str
    rank: str = ""
    tokens: list[int] = field(default_factory=list)
    num_moves: int = 0
    num_resubmits: int = 0
    terminal: dict[str, Any] | None = None


@dataclass
class Report:
    """What was found. `cut_off`: requests of a router that was killed; their clients saw the connection break."""

    requests: dict[str, Request] = field(default_factory=dict)
    cut_off: list[str] = field(default_factory=list)

    def count(self, kind: str, reason: str | None = None) -> int:
        """Requests that ended as `finish`, `error` or `cancelled`, with that reason where one is given."""
        terminals = [request.terminal for request in self.requests.values() if request.terminal]
        return sum(t["kind"] == kind and reason in (None, t["reason"]) for t in terminals)

    @property
    def num_moves(self) -> int:
        """How often a request changed its rank while it ran, over all requests."""
        return sum(request.num_moves for request in self.requests.values())

    @property
    def num_tokens(self) -> int:
        """Tokens over all requests."""
        return sum(len(request.tokens) for request in self.requests.values())


def check_history(path: Path, *, is_running: bool = False) -> Report:
    """Check one router's history, over all its incarnations. `is_running`: the last may have requests under way."""
    report, findings = Report(), []
    open_now: dict[str, Request] = {}
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    for number, line in enumerate(lines, start=1):
        try:
            event = msgspec.json.decode(line)
        except msgspec.DecodeError:
            # Half a line: the router was killed while it wrote, so another one's start follows, or nothing.
            if number < len(lines) and b'"start"' not in lines[number]:
                findings.append(f"line {number} is not an event: {line[:80]!r}")
            continue
        findings += [f"line {number}: {text}" for text in _apply(event, report, open_now)]
    if open_now and not is_running:
        findings.append(f"never ended: {sorted(open_now)}")
    assert not findings, "history breaks P1:\n" + "\n".join(findings[:50])
    return report


def _apply(event: dict[str, Any], report: Report, open_now: dict[str, Request]) -> list[str]:
    """Take one event; returns what is wrong with it."""
    kind = event["event"]
    if kind == "start":
        report.cut_off += open_now
        open_now.clear()
        return []
    if kind == "stop":
        return [f"the router stopped while {name} ran" for name in open_now]
    name = event["id"]
    if kind == "accepted":
        if name in report.requests:
            return [f"{name} was accepted twice"]
        report.requests[name] = open_now[name] = Request(name, event["rank"])
        return []
    request = report.requests.get(name)
    if request is None:
        return [f"{kind} of {name}, which was never accepted"]
    if request.terminal is not None:
        return [f"{kind} of {name} after its end"]
    if kind == "chunk":
        return _apply_chunk(event, request)
    if kind in ("moved", "resubmitted"):
        return _apply_rank(event, request)
    if kind != "terminal":
        return [f"{name}: {kind!r} is no event"]
    request.terminal = event
    open_now.pop(name, None)
    return _check_terminal(event, request)


def _apply_chunk(event: dict[str, Any], request: Request) -> list[str]:
    expected, index = len(request.tokens), event["index"]
    request.tokens += event["ids"]
    findings = [] if event["ids"] else [f"{request.name}: a chunk without tokens"]
    if index != expected:
        findings.append(f"{request.name}: chunk at index {index} after {expected} tokens")
    return findings


def _apply_rank(event: dict[str, Any], request: Request) -> list[str]:
    """A request changes its rank: moved with what it has, or submitted anew with its tokens."""
    findings = [] if re.fullmatch(r"r\d+t0", event["rank"]) else [f"{request.name}: {event['rank']!r} leads no replica"]
    if event["event"] == "resubmitted":
        request.num_resubmits += 1
    else:
        request.num_moves += 1
        if event["rank"] == request.rank:
            findings.append(f"{request.name}: moved to {request.rank}, where it was")
    request.rank = event["rank"]
    return findings


def _check_terminal(event: dict[str, Any], request: Request) -> list[str]:
    findings = []
    if event["tokens"] != len(request.tokens):
        findings.append(f"{request.name}: ended with {event['tokens']} tokens, chunks had {len(request.tokens)}")
    reasons = {"finish": ("stop", "length"), "cancelled": ("cancelled",)}.get(event["kind"])
    if event["kind"] not in ("finish", "error", "cancelled") or (reasons and event["reason"] not in reasons):
        findings.append(f"{request.name}: ended as {event['kind']} {event['reason']}")
    return findings
