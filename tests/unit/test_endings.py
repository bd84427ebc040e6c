"""SIGTERM and SIGHUP end a command that has started others as Ctrl-C does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from elasticmoe.cli.endings import ends_as_by_ctrl_c

ENDS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Whatever the tests themselves were started by: `nohup`, or a shell's `&`, has some signals ignored."""
    usual = {**dict.fromkeys(ENDS, signal.SIG_DFL), signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("end", ENDS)
def test_what_cleans_up_after_ctrl_c_does_so_after_other_ends(end: signal.Signals) -> None:
    seen = []
    before = signal.getsignal(end)

    def work() -> None:
        try:
            os.kill(os.getpid(), end)
            signal.pause()
        finally:
            seen.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), ends_as_by_ctrl_c():
        work()
    assert seen == ["cleaned up"]
    assert signal.getsignal(end) is before


@pytest.mark.parametrize("end", ENDS)
def test_tasks_are_cancelled(end: signal.Signals) -> None:
    seen = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), end)
            await asyncio.Event().wait()
        finally:
            seen.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), ends_as_by_ctrl_c():
        asyncio.run(asyncio.wait_for(work(), 30.0))
    assert seen == ["cleaned up"]


def test_a_job_in_the_background_ends_too() -> None:
    """Its shell has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), ends_as_by_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_as_by_ctrl_c():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
