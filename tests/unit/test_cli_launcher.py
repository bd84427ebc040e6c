"""The launcher starts each child as soon as those answer that it starts after."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from elasticmoe.cli.children import ChildSpec
from elasticmoe.cli.console import PlainConsole
from elasticmoe.cli.launcher import Launcher, Plan, StopRequested
from elasticmoe.cli.logs import Logs
from elasticmoe.common.protocol.errors import DeadlineExceeded, ElasticMoEError
from tests.procs.waiting import wait_until

SLEEP = ("/bin/sleep", "60")
FIRST = ChildSpec("first", SLEEP, awaits=Path("its socket"))
SECOND = ChildSpec("second", SLEEP, awaits=Path("its socket"), after=("first",))
THIRD = ChildSpec("third", SLEEP, after=("second", "first"))
ALONE = ChildSpec("alone", SLEEP)


class Ready:
    """A deployment that is ready when all have been started."""

    resumed = None

    def progress(self) -> None:
        """See Probe."""

    def close(self) -> None:
        """See Probe."""


class Stage:
    """`started`: names, in order; `asked`: of whom it was asked whether it answers."""

    def __init__(self, folder: Path) -> None:
        (folder / "logs").mkdir()
        self.folder = folder
        self.started: list[str] = []
        self.asked: list[str] = []
        self.launchers: list[Launcher] = []

    def start(
        self,
        specs: Sequence[ChildSpec],
        answers: Callable[[str], bool],
        seconds: float = 30.0,
        then: Callable[[Launcher], None] = lambda _: None,
    ) -> None:
        """Run the launcher up to where all is ready, and further by `then`."""

        def is_answering(spec: ChildSpec) -> bool:
            if spec.awaits is None:
                return True
            self.asked.append(spec.name)
            return answers(spec.name)

        def record(_state: str, processes: Sequence[object], _down: object) -> bool:
            self.started += [name for name in names_of(processes) if name not in self.started]
            return True

        plan = Plan(
            specs=specs,
            environment=dict(os.environ),
            directory=self.folder,
            probe=Ready(),
            answers=is_answering,
            record=record,
            listeners={},
            logs=Logs(self.folder / "logs", 1 << 20),
            ready_seconds_max=seconds,
        )
        launcher = Launcher(plan, PlainConsole(io.StringIO()))
        self.launchers.append(launcher)
        with launcher.signals():
            launcher.start()
            then(launcher)


def names_of(processes: Sequence[object]) -> list[str]:
    return [str(getattr(process, "name")) for process in processes]  # noqa: B009 - of a record


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    for launcher in stage.launchers:
        for child in launcher._children.values():
            child.kill()
            child.wait(60)
            child.reap()


def test_each_waits_for_those_before_it_and_nobody_else_does(stage: Stage) -> None:
    silences = {"first": 2, "second": 1}

    def answers(name: str) -> bool:
        silences[name] -= 1
        assert ("second" in stage.started) == (name == "second")
        return silences[name] < 0

    stage.start((FIRST, SECOND, THIRD, ALONE), answers)
    assert stage.started == ["first", "alone", "second", "third"]
    assert stage.asked == ["first"] * 3 + ["second"] * 2, "who has answered is not asked again"


def test_who_does_not_answer_is_named(stage: Stage) -> None:
    with pytest.raises(DeadlineExceeded, match=r"^first did not answer within 0\.1 s") as caught:
        stage.start((FIRST, SECOND, THIRD), lambda _: False, 0.1)
    assert caught.value.code == "start_timeout"
    assert stage.started == ["first"]


def test_a_signal_ends_the_wait(stage: Stage) -> None:
    def answers(_: str) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(StopRequested):
        stage.start((FIRST, SECOND), answers)
    assert stage.started == ["first"]


def test_an_end_in_the_wait_is_told(stage: Stage) -> None:
    ends = ChildSpec("first", ("/bin/sh", "-c", "exit 7"), awaits=Path("its socket"))
    with pytest.raises(ElasticMoEError, match="first ended with exit code 7"), suppress(DeadlineExceeded):
        stage.start((ends, SECOND), lambda _: False)
    assert "second" not in stage.started


COUNTS = """
n=0
trap 'n=$((n+1)); echo $n >> asked' TERM
echo > up
while [ ! -e go ]; do sleep 0.01; done
"""
WAITS = """
trap '' TERM
echo > deaf
while [ ! -e asked ]; do sleep 0.01; done
touch go
"""


def test_who_is_needed_no_more_is_asked_to_end_before_its_turn_and_once(stage: Stage) -> None:
    """The store, which takes up to a second to hear it, ends beside those that do not use it."""
    ahead = ChildSpec("ahead", ("/bin/sh", "-c", COUNTS), ends_after=("user",))
    between = ChildSpec("between", ("/bin/sh", "-c", WAITS))  # its turn is before that of the one that is ahead

    def stop(launcher: Launcher) -> None:
        for each in ("up", "deaf"):  # both have said what a signal does
            wait_until((stage.folder / each).exists, f"{each} is there")
        launcher.stop()
        assert launcher.num_unclean == 0

    stage.start((ahead, between, ChildSpec("user", SLEEP)), lambda _: True, then=stop)
    assert (stage.folder / "asked").read_text() == "1\n"
