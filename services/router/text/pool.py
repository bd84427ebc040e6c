"""The worker processes that render and tokenize what must not hold up the router: bounded, fair, and stoppable.

A Python thread in a template cannot be stopped, nor can the tokenizer; a process can. Jobs go to one of four lanes
with workers of their own, so that many large ones do not delay small ones, and a slow template delays chats only. In
each lane clients take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest, Overloaded, Unavailable, Unready
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.text import forkserver, jobs, worker
from elasticmoe.services.router.text.fair import FairTurns
from elasticmoe.services.router.text.jobs import Job, JobRefused, Reply

log = get_logger("router")

MIB: Final = 1024 * 1024
SMALL_CHARS_MAX: Final = 32_768
START_SECONDS_MAX: Final = 30.0
RESTART_SECONDS: Final = 0.5
RESTART_SECONDS_MAX: Final = 30.0
WAIT_SECONDS_MAX: Final = 60.0
ENDING_SECONDS_MAX: Final = 5.0
CLOCK_FACTOR: Final = 6  # time on the clock for each second of CPU: others use the machine too
HELD_BYTES_MAX: Final = 160 * MIB  # of large jobs that wait or are worked at; the others are bounded by permits
DEATHS_MAX: Final = 2  # a worker may be killed by somebody else: one death is no proof that the job did it


class Limits(NamedTuple):
    """What one lane may use: processes, and for a job seconds of CPU and bytes of memory, and more of each for every
    token of the context. A prompt of a million tokens takes 7 to 15 s and 430 MiB with SmolLM2's tokenizer."""

    workers: int
    seconds: float
    memory_bytes: int
    seconds_per_token: float = 0.0
    memory_bytes_per_token: int = 0

    def for_context(self, context: int) -> tuple[int, int]:
        """Seconds and bytes for a job of so many tokens at most."""
        seconds = math.ceil(self.seconds + context * self.seconds_per_token)
        return seconds, self.memory_bytes + context * self.memory_bytes_per_token


LANES: Final = {
    "chat": Limits(2, 5.0, 128 * MIB),
    "text": Limits(1, 5.0, 128 * MIB),
    "grammar": Limits(1, 5.0, 256 * MIB),
    "large": Limits(1, 30.0, 256 * MIB, 30e-6, 640),
}


def lane_of(job: Job) -> str:
    """Where a job waits: large texts of all kinds together."""
    if isinstance(job, jobs.Compile | jobs.Spell):
        return "grammar"
    if jobs.num_chars(job) > SMALL_CHARS_MAX:
        return "large"
    is_chat = isinstance(job, jobs.Chat | jobs.Inspect) or (isinstance(job, jobs.Tokenize) and job.conversation)
    return "chat" if is_chat else "text"


class _Worker(NamedTuple):
    number: int
    sock: socket.socket
    memory_bytes: int
    ending: asyncio.Future[int]  # its exit status

    def is_alive(self) -> bool:
        """Its end is open. It has nothing to say while it is idle."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    async def ask(self, raw: bytes, seconds: int) -> tuple[bytes, bool]:
        """The reply, and whether the worker ends. Raises OSError or EOFError when it has died."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.sock, worker.JOB_HEAD.pack(len(raw), seconds))
        await loop.sock_sendall(self.sock, raw)
        length, is_last = worker.REPLY_HEAD.unpack(await self._read(worker.REPLY_HEAD.size))
        return await self._read(length), bool(is_last)

    async def _read(self, nbytes: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            count = await loop.sock_recv_into(self.sock, view[done:])
            if count == 0:
                raise EOFError
            done += count
        return bytes(data)


@dataclass(slots=True)
class _Lane:
    limits: Limits
    turns: FairTurns
    idle: list[_Worker] = field(default_factory=list)


class TextWorkers:
    """The pool of one router. It works while `keep` runs, in the same loop.

    `digest`: of the files that the router itself has read; workers that have read others are not used.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self._directory = directory
        self._digest = digest
        self._lanes = {
            name: _Lane(limits, FairTurns(limits.workers, WAIT_SECONDS_MAX)) for name, limits in LANES.items()
        }
        self._endings: dict[int, asyncio.Future[int]] = {}
        self._held_bytes = 0
        self._is_stale = False
        self._numbers = itertools.count()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = asyncio.Event()

    async def run(self, job: Job, client: str) -> Reply:
        """Have a job done, in the client's turn.

        Raises InvalidRequest, also for one that takes too long or too much memory; Overloaded after a long wait, or
        where too many large ones wait; Unavailable while there are no workers.
        """
        name = lane_of(job)
        lane, num_bytes = self._lanes[name], jobs.num_bytes(job) if name == "large" else 0
        if num_bytes and self._held_bytes and self._held_bytes + num_bytes > HELD_BYTES_MAX:
            raise Overloaded(f"long texts hold {self._held_bytes} bytes; the limit is {HELD_BYTES_MAX}")
        self._held_bytes += num_bytes
        try:
            async with lane.turns.turn(client):
                limits = lane.limits.for_context(jobs.context_of(job))
                reply = await self._run(lane, msgspec.msgpack.encode(job), *limits)
                if isinstance(reply, JobRefused) and reply.code == "prompt_too_expensive" and name == "grammar":
                    reply = worker.grammar_too_complex(job, *limits)
        finally:
            self._held_bytes -= num_bytes
        if isinstance(reply, JobRefused):
            raise InvalidRequest(reply.text, code=reply.code, param=reply.param)
        return reply

    async def _run(self, lane: _Lane, raw: bytes, seconds: int, memory_bytes: int) -> Reply | JobRefused:
        num_deaths = 0
        while num_deaths < DEATHS_MAX:
            await self._wait_ready()
            server = self._process
            one = self._worker_of(lane, memory_bytes)
            try:
                async with asyncio.timeout(CLOCK_FACTOR * seconds):
                    answer, is_last = await one.ask(raw, seconds)
            except TimeoutError:
                self._kill(one)
                return _stopped(seconds)
            except (OSError, EOFError):
                self._kill(one)
                if server is not self._process:
                    pass  # all workers ended with their fork server, which is not the job's doing; there is a new one
                elif server is None or server.poll() is not None:
                    self._is_ready.clear()  # the same, not noticed yet
                else:
                    status = await _ending_of(one)
                    if status == forkserver.NOT_STARTED:
                        raise Unavailable("no worker can be started: no process, memory or descriptor") from None
                    if status == -signal.SIGXCPU:
                        return _stopped(seconds)
                    num_deaths += 1
                continue
            except BaseException:
                self._kill(one)  # it would answer the next job with this one's reply
                raise
            if is_last:
                one.sock.close()
            else:
                lane.idle.append(one)
            return jobs.REPLIES.decode(answer)
        log.warning("text worker died twice of a job", limit_mib=memory_bytes // MIB)
        return worker.too_large(memory_bytes)

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                await self._is_ready.wait()
        except TimeoutError:
            raise Unready("the workers that tokenize are not running") from None
        if self._is_stale:
            raise Unavailable("the checkpoint's tokenizer files have changed; the router has to be started again")

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _worker_of(self, lane: _Lane, memory_bytes: int) -> _Worker:
        while lane.idle:
            one = lane.idle.pop()
            if one.is_alive() and one.memory_bytes >= memory_bytes:
                return one
            one.sock.close()
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise Unavailable(f"no worker can be started: {error.strerror}") from None
        with theirs:
            ours.setblocking(False)
            one = _Worker(next(self._numbers), ours, memory_bytes, asyncio.get_running_loop().create_future())
            self._endings[one.number] = one.ending
            if not self._order(forkserver.FORK, one.number, memory_bytes, theirs.fileno()):
                self._endings.pop(one.number)
                ours.close()
                raise Unavailable("no worker can be started: the fork server takes no orders")
        return one

    def _kill(self, one: _Worker) -> None:
        one.sock.close()
        self._order(forkserver.KILL, one.number, 0)

    def _order(self, kind: bytes, number: int, memory_bytes: int, *fds: int) -> bool:
        """False where a fork server that lives does not take it. Nothing happens where it has ended: its workers have
        ended with it."""
        if self._control is not None:
            try:
                socket.send_fds(self._control, [forkserver.ORDER.pack(kind, number, memory_bytes)], fds)
            except BrokenPipeError:
                pass
            except OSError:
                return False
        return True

    # ---- the fork server ---------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Run the fork server, and another one whenever it ends. Cancelling it ends all processes."""
        pause = RESTART_SECONDS
        try:
            while True:
                try:
                    await self._run_forkserver()
                    log.error("the text workers' fork server has ended")
                except (OSError, MemoryError) as error:
                    log.error("the text workers' fork server cannot be started", kind=type(error).__name__)
                pause = RESTART_SECONDS if self._is_ready.is_set() else min(2 * pause, RESTART_SECONDS_MAX)
                await self._stop_forkserver()
                await asyncio.sleep(pause)
        finally:
            await self._stop_forkserver()

    async def _run_forkserver(self) -> None:
        """Until it ends."""
        loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", forkserver.__name__, str(self._directory), str(fd)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(fd,)
            )
        digest = await loop.sock_recv(self._control, 1024)
        self._is_stale = bool(digest) and digest.decode() != self._digest
        if self._is_stale:
            log.error("the checkpoint's tokenizer files have changed since the router was started")
        if digest:
            self._is_ready.set()
        while report := await loop.sock_recv(self._control, forkserver.ENDING.size):
            number, status = forkserver.ENDING.unpack(report)
            self._endings.pop(number).set_result(status)  # each is told once

    async def _stop_forkserver(self) -> None:
        self._is_ready.clear()
        self._endings.clear()
        for lane in self._lanes.values():
            while lane.idle:
                lane.idle.pop().sock.close()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()  # and the kernel kills its workers
            await asyncio.get_running_loop().run_in_executor(None, process.wait)


def _stopped(seconds: int) -> JobRefused:
    log.warning("text worker stopped: a job took too long", limit_s=seconds)
    return worker.too_slow(seconds)


async def _ending_of(one: _Worker) -> int:
    """The exit status of a worker that has died; 0 where nobody tells."""
    done, _ = await asyncio.wait([one.ending], timeout=ENDING_SECONDS_MAX)
    return one.ending.result() if done else 0
