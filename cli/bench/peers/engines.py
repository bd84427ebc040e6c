"""The engines that ours is compared with, by the names that `--peers` takes."""

from __future__ import annotations

import argparse

from elasticmoe.cli.bench.peers import llama_cpp, openvino, vllm
from elasticmoe.cli.bench.peers.engine import Engine

ENGINES: dict[str, Engine] = {module.ENGINE.name: module.ENGINE for module in (vllm, llama_cpp, openvino)}


def engines(text: str) -> tuple[Engine, ...]:
    """The type of a flag: names of engines with commas between, each once."""
    found: dict[str, Engine] = {}
    for name in (part.strip() for part in text.split(",")):
        if name not in ENGINES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ENGINES)}")
        found[name] = ENGINES[name]
    return tuple(found.values())
