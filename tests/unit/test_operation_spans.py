"""An operation's trace, from the states that a scaler sees one after the other: its phases, what the HMM does for it,
and a scaler that goes on with another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.common.tracing.spans import Spans
from elasticmoe.services.scaler.control.operation_spans import OperationSpans
from elasticmoe.services.scaler.operation.operation import (
    NO_CALLER,
    Accounting,
    CallerTrace,
    Operation,
    OperationPhase,
    PhaseTime,
)
from tests.clocks import PlayedClock
from tests.unit.span_sink import Sink
from tests.unit.transitions import UP, operation_of


class Story:
    """What is seen, second by second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sink = Sink(monkeypatch)
        self._sink.go.set()
        self.now = 1_000.0
        self.operation = msgspec.structs.replace(operation_of(UP), accepted_unix=self.now)
        self.restart()

    def restart(self) -> None:
        """Another scaler goes on."""
        self._spans = Spans("http://collector", "scaler", "default", lambda _: None)
        self._writer = OperationSpans(self._spans, PlayedClock(lambda: self.now))

    def close(self) -> None:
        """What was written before a restart comes now."""
        self._spans.close()

    def to(self, phase: OperationPhase, after_s: float = 1.0, **changes: Any) -> Operation:
        """It goes on to a phase, after so long in the one before."""
        self.now += after_s
        before, timing = self.operation, PhaseTime(self.operation.leg, self.operation.phase, after_s)
        self.operation = msgspec.structs.replace(
            before, phase=phase, accounting=Accounting(timings=(timing,)), **changes
        )
        self._writer.changed(before, self.operation)
        return self.operation

    def hmm(self, phase: str, after_s: float, op: str = "op", **facts: Any) -> None:
        """The HMM has gone on to a phase, after so long in the one before."""
        self.now += after_s
        known: dict[str, Any] = {"bytes_done": 0, "bytes_total": 70, "prepared": (), "peak_pages": {}}
        status = TransitionStatus(TransitionId(op, 0, 0), 2, phase, **{**known, **facts})  # type: ignore[arg-type]
        self._writer.look(self.operation, status)
        self._writer.look(self.operation, status)  # as in most turns: nothing is new

    def written(self) -> list[Any]:
        """What has come so far."""
        return self._sink.spans

    def spans(self) -> dict[str, Any]:
        """By name, with what all have to keep."""
        self.close()
        found = {span.name: span for span in self._sink.spans}
        assert len(found) == len(self._sink.spans)
        root = next(span for span in found.values() if span.name.startswith("operation "))
        others = [span for span in found.values() if span is not root]
        assert (root.parent is None) == (self.operation.caller == NO_CALLER)
        assert {span.parent.span_id for span in others} == {root.context.span_id}
        assert all(root.start_time <= span.start_time <= span.end_time <= root.end_time for span in others)
        return found


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    story = Story(monkeypatch)
    yield story
    story.close()


def seconds(span: Any) -> float:
    return round((span.end_time - span.start_time) / 1e9, 3)


def test_phases_and_copies(story: Story) -> None:
    story.to("prepare", 0.5)
    story.hmm("released", 0.0, op="an earlier one")
    story.hmm("vacating", 0.1)
    story.hmm("copying", 0.2)
    story.hmm("copying", 0.3, bytes_done=20)
    story.hmm("staged", 0.4, bytes_done=70)
    story.to("commit", 1.5)
    story.hmm("committed", 0.1)
    story.hmm("flipped", 0.2)
    story.to("migrate", 0.5)
    story.to("release", 2.0)
    story.to("done", 0.25, why="all is released")
    found = story.spans()
    assert found.keys() == {
        *("plan", "prepare", "commit", "migrate", "release", "operation scale_up"),
        *("hmm vacate", "hmm copy", "hmm map", "hmm flip"),
    }
    assert {name: seconds(found[name]) for name in ("plan", "prepare", "migrate", "release")} == {
        **{"plan": 0.5, "prepare": 1.5, "migrate": 2.0, "release": 0.25},
    }
    assert {name: seconds(span) for name, span in found.items() if name.startswith("hmm")} == {
        **{"hmm vacate": 0.2, "hmm copy": 0.7, "hmm map": 1.6, "hmm flip": 0.2},
    }
    copy = found["hmm copy"].attributes
    assert (copy["elasticmoe.bytes"], copy["elasticmoe.attempt"]) == (70, "op/0.0")
    assert sum(int(pair.rpartition(" ")[2]) for pair in copy["elasticmoe.copies"]) == len(UP.legs[0].copies)
    whole = found["operation scale_up"]
    assert whole.attributes["elasticmoe.outcome"] == "done"
    assert whole.attributes["elasticmoe.operation_id"] == "op"
    assert whole.start_time == 1_000 * 10**9


def test_what_is_over_within_a_turn_is_written_too(story: Story) -> None:
    story.to("prepare", 0.5)
    story.hmm("released", 0.0, op="an earlier one")
    story.hmm("staged", 0.01, bytes_done=70)
    story.to("done")
    found = story.spans()
    assert found.keys() == {"plan", "prepare", "hmm copy", "operation scale_up"}
    assert (seconds(found["hmm copy"]), found["hmm copy"].attributes["elasticmoe.bytes"]) == (0.01, 70)


def test_an_operation_that_is_undone_says_why(story: Story) -> None:
    story.to("prepare")
    story.hmm("copying", 0.1)
    story.hmm("failed", 0.1, error=Refused("does_not_fit", "text", False))
    story.to("abort", error=Refused("does_not_fit", "text", False))
    story.to("aborted")
    found = story.spans()
    assert {found[name].status.description for name in ("prepare", "hmm copy", "operation scale_up")} == {
        "does_not_fit"
    }
    assert found["operation scale_up"].attributes["error.type"] == "does_not_fit"


def test_another_scaler_goes_on_with_the_trace(story: Story) -> None:
    story.to("prepare")
    story.close()
    story.restart()
    story.to("commit")
    story.to("done")
    assert story.spans().keys() == {"plan", "prepare", "commit", "operation scale_up"}


@pytest.mark.parametrize("does_record", [True, False])
def test_it_is_within_the_trace_of_whoever_ordered_it(story: Story, does_record: bool) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-0{int(does_record)}"
    story.operation = msgspec.structs.replace(story.operation, caller=CallerTrace(parent))
    story.to("prepare")
    story.hmm("copying", 0.1)
    story.hmm("staged", 0.4, bytes_done=70)
    story.close()
    story.restart()
    story.to("done")
    if not does_record:
        story.close()
        assert story.written() == []
        return
    found = story.spans()
    assert found.keys() == {"plan", "prepare", "hmm copy", "operation scale_up"}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {"ab" * 16}
    assert f"{found['operation scale_up'].parent.span_id:016x}" == "cd" * 8
