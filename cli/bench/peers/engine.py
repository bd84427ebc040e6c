"""What an engine is to the comparison: how it is installed, what it makes of a checkpoint, and how it serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from elasticmoe.cli.bench.peers.environment import Environment


class Demand(msgspec.Struct, frozen=True):
    """What a server has to hold. `tokens`: the most of a sequence. `sequences`: the most at once. `cores`: the numbers
    of the processor's cores that it may use."""

    tokens: int
    sequences: int
    cores: tuple[int, ...]


class Launch(msgspec.Struct, frozen=True):
    """A server's command. `argv[0]` is absolute. `environment`: variables beside the caller's own. `ready_path`:
    answers GET with 200 once it serves."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = {}
    ready_path: str = "/health"


class Engine(msgspec.Struct, frozen=True):
    """An engine that is installed for the comparison.

    `requirements`: its packages, each of one version, as pip takes them; `constraints`: of what these need.
    `install(environment)`: what is to be done beyond them, once. `convert(environment, checkpoint, folder)`: makes its
    own form of a checkpoint in the empty `folder`; None: it reads safetensors. Both raise ValueError.
    `launch(environment, model, port, demand)`: `model` is that folder, or the checkpoint.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    launch: Callable[[Environment, Path, int, Demand], Launch]
    constraints: tuple[str, ...] = ("torch==2.13.0",)  # else a package that needs any torch brings one with CUDA
    install: Callable[[Environment], None] | None = None
    convert: Callable[[Environment, Path, Path], None] | None = None
