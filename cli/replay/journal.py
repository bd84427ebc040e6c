"""Decisions of a real deployment, made again by the present code: from the journal in its store, or from a file."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.terminal import say, say_json
from elasticmoe.common.config import Common, load
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError
from elasticmoe.common.store import DECISION_BYTES_MAX, DECISIONS_MAX, store_of
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.control.replay import Remade, replay_records

_MAGIC = b"elasticmoe journal 1\n"
_BYTES_MAX = DECISIONS_MAX * DECISION_BYTES_MAX  # of a file, and of what it inflates to
_HEADER_BYTES = 5  # of a list or of a record in msgpack, at most
_entries = msgspec.msgpack.Decoder(list[bytes])


class _Raw:
    """A decoder that leaves records as they are: they may be of another release."""

    def decode(self, raw: bytes, /) -> bytes:
        return raw


def of_run_dir(run_dir: Path) -> list[bytes]:
    """The records in the store of a deployment that runs, oldest first. Raises ConfigError, Unavailable."""
    store = store_of(load(Common, {"run_dir": str(run_dir)}), "policy-replay")
    try:
        return store.decisions(_Raw())
    finally:
        store.close()


def save(path: Path, records: list[bytes]) -> int:
    """Keep records, oldest first, in a file, which must not exist: as many of the last ones as `of_file` reads. Returns
    how many are kept. Raises ConfigError; then no file is left behind."""
    kept = _last_within(records, _BYTES_MAX)
    try:
        with open(path, "xb") as file:
            try:
                file.write(_MAGIC + zlib.compress(msgspec.msgpack.encode(kept)))
                file.flush()
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigError(f"--save {path}: {error.strerror or error}") from None
    return len(kept)


def _last_within(records: list[bytes], bytes_max: int) -> list[bytes]:
    """The last of them that, encoded as one list, take no more bytes than that."""
    num, left = 0, bytes_max - _HEADER_BYTES
    for record in reversed(records):
        left -= len(record) + _HEADER_BYTES
        if left < 0:
            break
        num += 1
    return records[len(records) - num :]


def of_file(path: Path) -> list[bytes]:
    """The records that `save` kept. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"--journal {path}: {error.strerror or error}") from None
    if len(raw) > _BYTES_MAX:
        raise ConfigError(f"--journal {path}: more than {_BYTES_MAX} bytes, the most that a journal has")
    if not raw.startswith(_MAGIC):
        raise ConfigError(f"--journal {path}: not written by `elasticmoe policy replay --save`")
    try:
        unpacker = zlib.decompressobj()
        inflated = unpacker.decompress(raw[len(_MAGIC) :], _BYTES_MAX + 1)
        if len(inflated) > _BYTES_MAX:
            raise ConfigError(f"--journal {path}: inflates to over {_BYTES_MAX} bytes, the most that a journal has")
        if not unpacker.eof:
            raise ConfigError(f"--journal {path}: cut off after {len(raw)} bytes")
        return _entries.decode(inflated)
    except (zlib.error, msgspec.DecodeError):
        raise ConfigError(f"--journal {path}: damaged") from None


def tell(records: list[bytes], *, as_json: bool) -> int:
    """Print how the decisions come out; 0 where all come out as they did, 1 where one does not. Raises ElasticMoEError
    where there is none of the policy, or none can be read."""
    made, num_unread = replay_records(records)
    whole = [one for one in made if one.is_whole]
    ours, others = ([one for one in whole if (one.kind == "load") == is_ours] for is_ours in (True, False))
    other = [one for one in whole if one.difference]
    if not ours and not other:
        found = f"{counted(len(records), 'record')}, {num_unread} of another release"
        text = f"the journal has no decision of the policy: {found}"
        raise ElasticMoEError(text, code="nothing_recorded")
    if as_json:
        say_json(_as_json(ours, others, other, len(made) - len(whole), num_unread))
        return 1 if other else 0
    for one in other:
        say(f"{one.now:12.3f} s  {one.name}: {one.difference}")
    reasons = Counter(one.said.rpartition(", ")[2] for one in ours)
    say(
        f"{len(ours)} turns of the policy made again ({', '.join(f'{n} {name}' for name, n in reasons.most_common())}),"
    )
    verb = "comes" if len(other) == 1 else "come"
    say(f"{counted(len(others), 'other decision')}; {len(other)} {verb} out otherwise")
    if len(made) > len(whole) or num_unread:
        say(f"left out: {len(made) - len(whole)} whose plan the journal has no more, {num_unread} of another release")
    return 1 if other else 0


def _as_json(
    ours: list[Remade], others: list[Remade], other: list[Remade], num_partial: int, num_unread: int
) -> dict[str, Any]:
    return {
        "policy": [{"now": one.now, "decided": one.said, "difference": one.difference} for one in ours],
        "others": len(others),
        "different": [{"name": one.name, "now": one.now, "difference": one.difference} for one in other],
        "without_plan": num_partial,
        "unreadable": num_unread,
    }
