"""Which steps are brought to a form, and what is kept of them. What is captured: tests/interpreter/test_graphs.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe.services.worker.backends.accelerator import graphs
from elasticmoe.services.worker.backends.accelerator.batch import Form
from elasticmoe.services.worker.backends.accelerator.graphs import Graphs, TorchRecorder
from elasticmoe.services.worker.model.batch import Batch, BatchPart


class Counter:
    """A recorder that counts what it is asked for."""

    def __init__(self) -> None:
        self.num_records = self.num_replays = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_records += 1

        def replay() -> None:
            self.num_replays += 1

        return replay


class CudaModule:
    """What TorchRecorder uses of `torch.cuda`. `num_graphs`: that there are."""

    def __init__(self) -> None:
        self.num_graphs = 0

        class CUDAGraph:
            def __init__(graph) -> None:
                self.num_graphs += 1

            def __del__(graph) -> None:
                self.num_graphs -= 1

            def capture_begin(graph, pool: object, capture_error_mode: str) -> None:
                """As torch: a pool is given up with its last graph, and to ask for it again is a failed assertion."""
                assert self.num_graphs > 1 or not self.was_used, "use_count > 0"
                self.was_used = True

            def capture_end(graph) -> None:
                pass

            def replay(graph) -> None:
                pass

        self.CUDAGraph, self.was_used = CUDAGraph, False

    def graph_pool_handle(self) -> object:
        return object()

    def Stream(self, _: object) -> object:
        return object()

    def stream(self, _: object) -> nullcontext[None]:
        return nullcontext()


def batch(*kv_lens: int, num_logits: int = 1, count: int = 1) -> Batch:
    parts = [BatchPart([1] * count, kv_len - count, range(-(-kv_len // 16)), num_logits) for kv_len in kv_lens]
    return Batch(parts, 16)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (batch(5), Form(1, 2_048)),
        (batch(5, 6, 7), Form(4, 2_048)),
        (batch(2_048, 1), Form(2, 2_048)),
        (batch(2_049), Form(1, 8_192)),
        (batch(100_000), Form(1, 131_072)),
        (batch(*[3] * 33), Form(48, 2_048)),  # no more rows than there is room for
        (batch(*[3] * 49), None),
        (batch(), None),
        (batch(5, num_logits=0), None),  # not the last part of a prompt
        (batch(5, count=2), None),
    ],
    ids=["one", "padded", "full", "longer", "long", "no room", "too many", "empty", "prompt's part", "two tokens"],
)
def test_a_step_that_only_decodes_has_a_form(given: Batch, form: Form | None) -> None:
    made = Graphs(Counter(), lambda: 0)
    made.section(lambda _: None, 48)
    made.section(lambda _: None, 64)
    assert made.form_of(given) == form
    without = Graphs(None, lambda: 0)
    without.section(lambda _: None, 48)
    assert without.form_of(given) is None
    assert Graphs(Counter(), lambda: 0).form_of(given) is None  # a model without sections


def test_graphs_of_the_forms_that_came_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "FORMS_MAX", 2)
    recorder, runs = Counter(), []
    made = Graphs(recorder, lambda: 0)
    section = made.section(runs.append, 64)

    def step(rows: int) -> None:
        made.form_of(batch(5))  # a step begins
        given: Any = SimpleNamespace(form=Form(rows, 2_048))
        section(given)

    for rows in (1, 1, 2, 2, 1):
        step(rows)
    assert (len(runs), recorder.num_records, recorder.num_replays) == (2, 2, 3)
    step(4)  # in place of 2
    step(1)
    assert (len(runs), recorder.num_records, recorder.num_replays) == (3, 2, 4)
    step(2)  # as if it had never come
    step(2)
    assert (len(runs), recorder.num_records, recorder.num_replays) == (4, 3, 5)


def test_the_pool_outlives_the_graphs_that_were_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when what sections read has moved, and everything is captured anew."""
    module = CudaModule()
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    recorder = TorchRecorder(torch.device("meta"))
    kept = [recorder.record(lambda: None) for _ in range(3)]
    kept.clear()
    kept.append(recorder.record(lambda: None))
    assert module.num_graphs == 1
