"""An engine that computes nothing, behind the server that OpenVINO has: `python -m tests.unit.toy_peer PORT`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from typing import Any

from elasticmoe.cli.bench.peers.openvino_server import Batcher, run_engine, server


class ToyPipeline:
    """Each sequence counts up from its prompt's last token. Prompts of two tokens are errors: `add` fails where the
    first is 1, `step` at 2, `read` at 3. `together`: steps make nothing until so many are there. `short`: answers that
    have to be so long are one shorter."""

    def __init__(self, short: int = 0) -> None:
        self.together = 1
        self._short = short
        self._fails = False
        self.most = 0
        self._living: list[list[int]] = []

    def add(self, prompt: list[int], num_tokens: int) -> list[int]:
        """A handle: the last token, how many are left, how many are new."""
        fault = prompt[0] if len(prompt) == 2 else 0
        if fault == 1:
            raise ValueError("this prompt is refused")
        self._fails = fault == 2
        handle = [prompt[-1], num_tokens - (num_tokens == self._short), 0, fault]
        self._living.append(handle)
        self.most = max(self.most, len(self._living))
        return handle

    def step(self) -> None:
        """One token each."""
        if self._fails:
            self._living, self._fails = [], False
            raise RuntimeError("the step failed")
        for handle in self._living if len(self._living) >= self.together else []:
            handle[2] += 1

    def read(self, handle: Any) -> tuple[list[int], bool]:
        """The new ones."""
        if handle[3] == 3:
            self._living.remove(handle)
            raise RuntimeError("the sequence failed")
        tokens = [handle[0] + 1 + at for at in range(handle[2])]
        handle[0], handle[1], handle[2] = handle[0] + handle[2], handle[1] - handle[2], 0
        if not handle[1]:
            self._living.remove(handle)
        return tokens, bool(handle[1])


def batcher_of(pipeline: ToyPipeline) -> Batcher:
    """What a server needs of it; it computes in a thread."""
    ours, theirs = multiprocessing.Pipe()
    threading.Thread(target=run_engine, args=(theirs, pipeline), daemon=True).start()
    return Batcher(ours)


if __name__ == "__main__":
    server(batcher_of(ToyPipeline(int(os.environ.get("TOY_SHORT", "0")))), int(sys.argv[1])).serve_forever()
