"""OpenVINO GenAI's continuous batching, behind a server of ours: it has none of its own on PyPI."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.environment import Environment

VERSION = "2026.4.1.0"
KV_GIB = 2
_CONVERTER = "optimum-intel==2.2.0"


def install(environment: Environment) -> None:
    """What the converter brings for pictures is built for CUDA and cannot be loaded beside torch for CPUs."""
    environment.run(environment.python, "-m", "pip", "uninstall", "--yes", "torchvision")


def convert(environment: Environment, checkpoint: Path, folder: Path) -> None:
    """To OpenVINO's form, with weights of 16 bits: the converter's own choice for large models is 8."""
    tool = environment.folder / "bin" / "optimum-cli"
    words = ("--task", "text-generation-with-past", "--weight-format", "fp16")
    environment.run(
        tool, "export", "openvino", "--model", checkpoint, *words, folder, variables={"HF_HUB_OFFLINE": "1"}
    )


def launch(environment: Environment, model: Path, port: int, demand: Demand) -> Launch:
    """See openvino_server.py. KV of 16 bits, as the others have it: OpenVINO's own choice is 8."""
    # -P: this module lies beside the script, and would be found as `openvino`.
    script = Path(__file__).with_name("openvino_server.py")
    argv = (environment.python, "-P", script, model, port, demand.sequences, KV_GIB, len(demand.cores))
    return Launch(tuple(map(str, argv)))


ENGINE = Engine(
    "openvino",
    f"OpenVINO GenAI {VERSION}",
    (f"openvino-genai=={VERSION}", _CONVERTER),
    launch,
    install=install,
    convert=convert,
)
