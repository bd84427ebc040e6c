"""`openvino_server.py MODEL PORT SEQUENCES KV_GIB THREADS`, in OpenVINO's environment: streams completions.

Of token ids, with as much of OpenAI's API as a benchmark's client needs. OpenVINO keeps the interpreter's lock for
whole steps, so the pipeline has a process of its own, and one message a step goes to that which has the connections.
Tokens are told as numbers: making text of them would cost OpenVINO time that it does not take in its own benchmarks.
Imports the standard library, and OpenVINO in its process.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any, Protocol

STEP_TOKENS_MAX = 512  # of one step, as OpenVINO's own benchmarks have it
END = None
TokenQueue = queue.SimpleQueue[list[int] | str | None]  # tokens, or what went wrong


class Pipeline(Protocol):
    """What computes. One thread."""

    def add(self, prompt: list[int], num_tokens: int) -> Any:
        """Take a sequence, which makes exactly `num_tokens` tokens. Returns its handle."""

    def step(self) -> None:
        """Make the next tokens of all sequences."""

    def read(self, handle: Any) -> tuple[list[int], bool]:
        """The tokens that are new, and whether there will be more. Raises what ended the sequence before its end."""


def run_engine(connection: Connection, pipeline: Pipeline) -> None:
    """Step the pipeline while there are requests (number, prompt, tokens), until END comes or the other side is gone.
    Each step's news are one list of (number, new tokens or what went wrong, whether there will be more)."""
    living: dict[int, Any] = {}
    with connection:
        try:
            while True:
                while connection.poll(0 if living else None):
                    if (request := connection.recv()) is END:
                        return
                    number, prompt, num_tokens = request
                    try:
                        living[number] = pipeline.add(prompt, num_tokens)
                    except Exception as error:  # whatever it is, it is that request's
                        connection.send([(number, repr(error), False)])
                connection.send(_step(pipeline, living))
        except (EOFError, OSError):
            return


def _step(pipeline: Pipeline, living: dict[int, Any]) -> list[tuple[int, list[int] | str, bool]]:
    news: list[tuple[int, list[int] | str, bool]] = []
    try:
        pipeline.step()
    except Exception as error:  # clients would wait for ever
        news += [(number, repr(error), False) for number in living]
        living.clear()
    for number, handle in list(living.items()):
        told: list[int] | str
        try:
            told, is_running = pipeline.read(handle)
        except Exception as error:
            told, is_running = repr(error), False
        if told or not is_running:
            news.append((number, told, is_running))
        if not is_running:
            del living[number]
    return news


class Batcher:
    """The other side of `run_engine`: a queue for each request. Owns the connection until `close`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._answers: dict[int, TokenQueue] = {}
        self._num_asked = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def ask(self, prompt: list[int], num_tokens: int) -> TokenQueue:
        """A queue of lists of tokens, END behind the last; a text instead where something went wrong."""
        answer: TokenQueue = queue.SimpleQueue()
        with self._lock:
            self._num_asked += 1
            self._answers[self._num_asked] = answer
            self._connection.send((self._num_asked, prompt, num_tokens))
        return answer

    def close(self) -> None:
        """End the engine."""
        with self._lock:
            self._connection.send(END)
        self._thread.join()
        self._connection.close()

    def _read(self) -> None:
        try:
            while True:
                for number, told, is_running in self._connection.recv():
                    self._answers[number].put(told)
                    if not is_running:
                        self._answers.pop(number).put(END)
        except (EOFError, OSError):
            for answer in list(self._answers.values()):
                answer.put("the engine has ended")


class Handler(BaseHTTPRequestHandler):
    """One connection. `batcher` is set by `server`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a token may wait for the client's acknowledgement of the one before
    batcher: Batcher

    def do_GET(self) -> None:
        """Health, and the one model."""
        known: dict[str, Any] = {
            "/health": {},
            "/v1/models": {"object": "list", "data": [{"id": "model", "object": "model"}]},
        }
        self._answer(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        """A streamed completion of token ids."""
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            prompt, num_tokens = [int(token) for token in body["prompt"]], int(body["max_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, {"error": {"code": "invalid_request", "message": repr(error)}})
            return
        if not prompt or num_tokens < 1:
            self._answer(400, {"error": {"code": "invalid_request", "message": "nothing is asked for"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._stream(self.batcher.ask(prompt, num_tokens))

    def _stream(self, answer: TokenQueue) -> None:
        count = 0
        while (tokens := answer.get()) is not END:
            if isinstance(tokens, str):
                self._event({"error": {"code": "engine_failed", "message": tokens}})
                return
            for token in tokens:
                self._event({"choices": [{"index": 0, "text": f" {token}", "finish_reason": None}]})
            count += len(tokens)
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, fields: dict[str, Any]) -> None:
        self.wfile.write(b"data: %b\n\n" % json.dumps(fields).encode())

    def _answer(self, status: int, fields: dict[str, Any]) -> None:
        body = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: it would cost more than the request."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def server(batcher: Batcher, port: int) -> ThreadingHTTPServer:
    """A server on the loopback; `serve_forever` serves."""
    kind = type("BatcherHandler", (Handler,), {"batcher": batcher})
    return _Server(("127.0.0.1", port), kind)


class GenAiPipeline:
    """OpenVINO's own."""

    def __init__(self, model: str, num_sequences: int, kv_gib: int, num_threads: int) -> None:
        names = ("numpy", "openvino", "openvino_genai")
        self._numpy, self._openvino, self._genai = (importlib.import_module(name) for name in names)
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.max_num_batched_tokens = STEP_TOKENS_MAX
        scheduler.max_num_seqs = num_sequences
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self._pipeline = self._genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads, "KV_CACHE_PRECISION": "f16"}
        )
        self._number = 0

    def add(self, prompt: list[int], num_tokens: int) -> Any:
        """See Pipeline."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._number += 1
        ids = self._openvino.Tensor(self._numpy.array([prompt], dtype=self._numpy.int64))
        return self._pipeline.add_request(self._number, ids, config)

    def step(self) -> None:
        """See Pipeline."""
        self._pipeline.step()

    def read(self, handle: Any) -> tuple[list[int], bool]:
        """See Pipeline."""
        tokens: list[int] = []
        status, known = handle.get_status(), self._genai.GenerationStatus
        while handle.can_read():
            for output in handle.read().values():
                tokens += output.generated_ids
        if status not in (known.RUNNING, known.FINISHED):
            raise RuntimeError(f"the request ended as {status}")
        return tokens, status == known.RUNNING


def engine(connection: Connection, model: str, num_sequences: int, kv_gib: int, num_threads: int) -> None:
    """The engine's process."""
    pipeline = GenAiPipeline(model, num_sequences, kv_gib, num_threads)
    connection.send(True)
    run_engine(connection, pipeline)


def main() -> None:
    """Serve until it is ended."""
    model, port, *numbers = sys.argv[1], *map(int, sys.argv[2:6])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=engine, args=(theirs, model, *numbers), daemon=True).start()
    theirs.close()
    try:
        ours.recv()
    except EOFError:
        sys.exit("the engine did not start")
    server(Batcher(ours), port).serve_forever()


if __name__ == "__main__":
    main()
