"""A real router process in front of fake ranks, and the files of a model that has only a tokenizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from elasticmoe.cli.models.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from elasticmoe.common.config import environment_of
from elasticmoe.common.layout import Layout, RankId
from tests.history import Report, check_history
from tests.procs.router_fakes import WAIT_S, FakeRank, layout_of
from tests.procs.waiting import wait_until

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
StartRouter = Callable[..., "RouterProcess"]  # settings of a router by name, and `model`: its folder


def write_model(directory: Path) -> Path:
    """A checkpoint directory without weights: what a router reads."""
    directory.mkdir()
    write_byte_tokenizer(directory)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 257,
    }
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    return directory


def configure(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file, which need not be there yet."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def plain_client(url: str) -> httpx.Client:
    """A client that keeps no connection open, so that no test sees another's."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, trust_env=False, verify=False, timeout=WAIT_S, limits=limits)


class RouterProcess:
    """One router as a child process. Its layout is what `set_layout` says."""

    def __init__(self, run_dir: Path, model: Path, layout: Layout, **settings: Any) -> None:
        self.run_dir = run_dir
        self.http = plain_client("")
        self._layout_file = run_dir / "layout.json"
        self.sockets.mkdir(parents=True, exist_ok=True)
        self.set_layout(layout)
        values = {"run_dir": run_dir, "model": model, "served_name": MODEL, "port": 0, "history": "true", **settings}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ELASTICMOE_")}
        with (run_dir / "router.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.procs.router_child", str(self._layout_file)],
                cwd=ROOT,
                env=environment | environment_of(values),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, self.log_text
            self.port = int(line)
            self.url = f"http://127.0.0.1:{self.port}"
            self.http.base_url = self.url
            wait_until(self._answers, "the router listens", timeout_s=30.0)
        except BaseException:
            self.kill()
            raise

    @property
    def sockets(self) -> Path:
        """Where the ranks' sockets are."""
        return self.run_dir / "sockets"

    def set_layout(self, layout: Layout) -> None:
        """Publish a layout, at once and whole."""
        staged = self._layout_file.with_suffix(".new")
        staged.write_bytes(msgspec.json.encode(layout))
        staged.replace(self._layout_file)

    def _answers(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str) -> httpx.Response:
        """A plain GET."""
        return self.http.get(path)

    def wait_ready(self, replicas: int = 1) -> None:
        """Until that many replicas have reported."""
        wait_until(lambda: sum(r["is_fresh"] for r in self.get("/load").json()["replicas"]) == replicas, "ready")

    def wait_idle(self) -> None:
        """Until all permits are back."""
        wait_until(lambda: self.get("/load").json()["server_load"] == 0, "all permits are back")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self, *, expected: int = 0) -> Report:
        """SIGTERM, wait for the exit, and check the history."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(40.0)
        finally:
            self.kill()
        assert code == expected, self.log_text
        assert "Traceback" not in self.log_text, self.log_text
        return self.history()

    def kill(self) -> None:
        """End it, checking nothing."""
        self.http.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def log_text(self) -> str:
        """What it has logged."""
        return (self.run_dir / "router.log").read_text()

    def history(self, *, is_running: bool = False) -> Report:
        """The checked history."""
        return check_history(self.run_dir / "logs" / "history-router.jsonl", is_running=is_running)


@contextmanager
def running_router(folder: Path, *replicas: int, model: Path | None = None, **settings: Any) -> Iterator[RouterProcess]:
    """A router of `folder` for the block, then stopped with its checks; its layout has `replicas`, or one."""
    layout = layout_of(*replicas or (0,))
    router = RouterProcess(folder / "run", model or write_model(folder / "model"), layout, **settings)
    try:
        yield router
    except BaseException:
        router.kill()
        raise
    router.stop()


@contextmanager
def serving(router: RouterProcess, rank: FakeRank | None = None) -> Iterator[FakeRank]:
    """A rank (`rank`, not started yet, or one of its own) behind `router` for the block. Then all permits are back, and
    the history so far holds."""
    rank = (rank or FakeRank(router.sockets)).start()
    try:
        router.wait_ready()
        yield rank
        router.wait_idle()
        router.history(is_running=True)
    finally:
        rank.stop()


@contextmanager
def ranks_of(router: RouterProcess, *replicas: int) -> Iterator[list[FakeRank]]:
    """A rank of each of `replicas` behind `router` for the block."""
    ranks = [FakeRank(router.sockets, RankId(replica, 0)).start() for replica in replicas]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.stop()


def post(router: RouterProcess, path: str = "/v1/completions", **body: object) -> httpx.Response:
    """A request with that body."""
    return router.http.post(path, json=body)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of a refusal."""
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]
