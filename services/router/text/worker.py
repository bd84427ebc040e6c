"""One worker process: takes jobs from its socket, one after another, and answers each.

It is a fork of the fork server, so the tokenizer is there and shared. It may be killed at any moment.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.text import jobs, process
from elasticmoe.services.router.text.codec import TextCodec

JOB_HEAD = struct.Struct("<II")  # bytes of the job, and seconds of CPU that it may take
REPLY_HEAD = struct.Struct("<IB")  # bytes of the reply, and whether the worker ends after it
GROWTH_BYTES_MAX = 32 * 1024 * 1024  # a worker that has grown by more ends, which gives the memory back

_encode = msgspec.msgpack.encode


def serve(sock: socket.socket, codec: TextCodec, memory_bytes: int) -> None:
    """Work until the other end closes `sock`, or until the process has grown. The kernel kills it where a job takes
    more CPU than it may.

    Any exception but InvalidRequest and MemoryError is a fault of this program and ends the process.
    """
    at_start = process.resident_bytes()
    process.confine(memory_bytes)
    while (head := _read(sock, JOB_HEAD.size)) is not None:
        length, seconds = JOB_HEAD.unpack(head)
        raw = _read(sock, length)
        if raw is None:
            return
        process.allow_cpu(seconds)
        reply = _perform(codec, raw, memory_bytes)
        del raw
        is_last = process.resident_bytes() - at_start > GROWTH_BYTES_MAX
        sock.sendall(REPLY_HEAD.pack(len(reply), is_last))
        sock.sendall(reply)
        if is_last:
            return


def _perform(codec: TextCodec, raw: bytearray, memory_bytes: int) -> bytes:
    try:
        return _encode(codec.perform(jobs.JOBS.decode(raw)))
    except InvalidRequest as error:
        return _encode(jobs.JobRefused(error.message, error.code, error.param))
    except MemoryError:
        return _encode(too_large(memory_bytes))


def too_large(memory_bytes: int) -> jobs.JobRefused:
    """The refusal of a prompt that does not fit into a worker's memory."""
    text = f"the prompt needs more than the limit of {memory_bytes >> 20} MiB of memory to be rendered and tokenized"
    return jobs.JobRefused(text, "prompt_too_expensive", None)


def too_slow(seconds_max: float) -> jobs.JobRefused:
    """The refusal of a prompt whose worker was stopped."""
    text = f"the prompt takes more than the limit of {seconds_max:g} s of CPU to be rendered and tokenized"
    return jobs.JobRefused(text, "prompt_too_expensive", None)


def grammar_too_complex(job: jobs.Job, seconds: int, memory_bytes: int) -> jobs.JobRefused:
    """The refusal of a structure whose worker was stopped."""
    param = job.structure.param if isinstance(job, jobs.Compile) else None
    text = f"{param} takes more than the limits of {seconds} s of CPU and {memory_bytes >> 20} MiB of memory to be read"
    return jobs.JobRefused(text, "grammar_too_complex", param)


def _read(sock: socket.socket, nbytes: int) -> bytearray | None:
    """Exactly `nbytes`; None at the end."""
    data = bytearray(nbytes)
    view, done = memoryview(data), 0
    while done < nbytes:
        count = sock.recv_into(view[done:])
        if count == 0:
            return None
        done += count
    return data
