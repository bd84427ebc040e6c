"""A deployment with load on it, for what is recorded of one: its commands, and a client."""

from __future__ import annotations

import subprocess
import sys
import threading

import httpx


def command(*words: str) -> str:
    """Run a command of ours; what it prints."""
    words = (sys.executable, "-m", "elasticmoe.cli.main", *words)
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def load(url: str, stop: threading.Event) -> None:
    """A client that streams answers one after the other."""
    body = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.Client(trust_env=False, timeout=60) as client:
        while not stop.is_set():
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                for _ in answer.iter_lines():
                    if stop.is_set():
                        return
