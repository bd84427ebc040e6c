"""The only importer of redis: the deployment's keys, their types, and what each is for. Longer than 400 lines, so that
every access to the store is in one place.

The store coordinates; it is never on the path of a token, and what it says is checked by the resources (fence.py). All
keys share the prefix `elasticmoe:<deployment>:`. Values are MessagePack of the types named here, decoded strictly.

| key | type | lives | holds |
|---|---|---|---|
| `layout` | Layout | for ever | the committed layout |
| `served` | Served | for ever | what that layout is of |
| `instance` | text | until its state is dropped | names the deployment to orchestrators |
| `policy` | the scaler's PolicyRecord | for ever | objectives and mode of the policy, with its version |
| `epoch` | integer | for ever | that layout's epoch, which routers poll |
| `layouts` | stream of epochs | the last LAYOUTS_MAX | wakes routers when a layout is committed, no more |
| `fence` | integer | for ever | the last fencing epoch given out; never falls |
| `lease` | holder's identity | `lease_ms` | who may act as scaler |
| `events` | stream of Event | the last EVENTS_MAX | phase changes of operations and every decision, with reason |
| `decisions` | stream of the scaler's Decision | the last DECISIONS_MAX | decisions with all their inputs, compressed |
| `operation` | the scaler's Operation | until it ends | the operation in progress, as of its latest phase |
| `journal` | random text | for ever | names the last write of `operation`, so that its loss is noticed |
| `operations` | list of the scaler's Operation | the last OPERATIONS_MAX | operations that ended, newest first |
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Protocol, TypeVar
from urllib.parse import quote

import msgspec
import redis
import redis.asyncio
from msgspec import Meta
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from elasticmoe.common.config import Common
from elasticmoe.common.layout import Layout, Served
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import ConfigError, Fenced, PayloadTooLarge, Unavailable
from elasticmoe.common.store_access import PASSWORDS, READER, WRITER
from elasticmoe.common.wording import undecodable

EVENTS_MAX = 10_000
DECISIONS_MAX = 500
DECISION_BYTES_MAX = 128 * 1024
OPERATIONS_MAX = 100
VALUE_BYTES_MAX = 32 * 1024 * 1024
CALL_SECONDS_MAX = 2.0
LAYOUTS_MAX = 16
POLL_SECONDS = 1.0  # a new layout is seen after this time at the latest, also when the news of it got lost

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# Keys expire by the server's wall clock. Where that went back after the last renewal, a dead holder's lease would last
# for as long as it went back: who waits shortens it to what it was given for. A living holder renews it before.
_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  local left_ms = redis.call('PTTL', KEYS[1])
  if left_ms < 0 or left_ms > 2 * tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return {0, holder}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local fence = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') or 0, tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], fence)
return {fence, ARGV[1]}
"""
# Every write begins so. The highest fencing epoch wins: where a higher one was given out, or another scaler holds the
# lease under the same, nothing is written. A lower one is what a store that was emptied or rolled back knows; it is
# put right, and a scaler that has renewed its lease under it has it no more.
_GUARD = """
local holder = redis.call('GET', KEYS[1])
local fence, own = tonumber(redis.call('GET', KEYS[2]) or '0') or 0, tonumber(ARGV[2])
local is_foreign = holder and holder ~= ARGV[1]
if fence > own or (fence == own and is_foreign) then return 0 end
if fence < own then
  redis.call('SET', KEYS[2], ARGV[2])
  if is_foreign then redis.call('DEL', KEYS[1]) end
end
"""
_RENEW = f"{_GUARD} redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3]) return 1"
# A record that takes another one's place needs no room of its own, so a server at its limit of memory takes it: it
# refuses the first write of a script that could need more, and a DEL does not.
_REPLACE = (
    "if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('DEL', KEYS[3]) end redis.call('SET', KEYS[3], ARGV[3])"
)
_PUT_OPERATION = f"{_GUARD} {_REPLACE} redis.call('SET', KEYS[4], ARGV[4]) return 1"
_NO_OPERATION = f"{_GUARD} redis.call('DEL', KEYS[3]) redis.call('SET', KEYS[4], ARGV[3]) return 1"
_END_OPERATION = f"""{_GUARD}
redis.call('DEL', KEYS[3])
redis.call('SET', KEYS[4], ARGV[4])
redis.call('LPUSH', KEYS[5], ARGV[3])
redis.call('LTRIM', KEYS[5], 0, tonumber(ARGV[5]) - 1)
return 1
"""
_PUT_LAYOUT = f"""{_GUARD}
{_REPLACE}
redis.call('SET', KEYS[4], ARGV[4])
redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[5], '*', 'epoch', ARGV[4])
return 1
"""
_PUT = f"{_GUARD} redis.call('SET', KEYS[3], ARGV[3]) return 1"
_APPEND = f"{_GUARD} redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'e', ARGV[3]) return 1"
_APPEND_DECISION = f"{_GUARD} redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[4], '*', 'd', ARGV[3]) return 1"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Writer(msgspec.Struct, frozen=True):
    """Who writes: a scaler by its identity, and the fencing epoch that it got with the lease."""

    holder: str
    fence: int


class Event(msgspec.Struct, frozen=True):
    """One line of the journal, and what listeners are shown."""

    kind: Annotated[str, Meta(description="What has happened, by its stable name")]
    reason: Annotated[str, Meta(description="Why, in words")]
    epoch: Annotated[int, Meta(description="Of the layout in force; 0 before the first")]
    sender: Annotated[str, Meta(description="The scaler's process")]
    time_unix: Annotated[float, Meta(description="When, in seconds since 1970")]
    facts: Annotated[
        dict[str, str], Meta(description="What the reason rests on, as text, by the kind's own names")
    ] = {}


_FROM_THE_FIRST = "0-0"

_layouts = msgspec.msgpack.Decoder(Layout)
_served = msgspec.msgpack.Decoder(Served)
_events = msgspec.msgpack.Decoder(Event)


def store_url(config: Common, user: str = WRITER) -> str:
    """The URL that this deployment's store answers at. The password of the embedded server's `user` is read from its
    file."""
    if config.store_url:
        return config.store_url
    # A path may hold what a URL would take for something else, such as a question mark.
    return f"unix://{user}:{read_secret(config.secret(PASSWORDS[user]))}@{quote(str(config.socket('store')))}"


class Decodes(Protocol[R_co]):
    """Reads stored values, as `msgspec.msgpack.Decoder` does."""

    def decode(self, raw: bytes, /) -> R_co:
        """The value in `raw`. Raises msgspec.DecodeError."""
        ...


class Store:
    """Blocking access, for the scaler and the command line. Every call ends within CALL_SECONDS_MAX.

    One connection, as long as one thread uses it: each thread has a Store of its own (`another`), so that how many
    connections a process has does not depend on whose calls happened to coincide.
    """

    def __init__(self, url: str, deployment: str, client: str = "") -> None:
        """`client`: what the server calls its connections (CLIENT LIST; the user must be allowed CLIENT SETNAME).
        Raises ConfigError for a URL that cannot be read; connects at the first call."""
        self._url, self._deployment = url, deployment
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=CALL_SECONDS_MAX,
                socket_connect_timeout=CALL_SECONDS_MAX,
                retry=Retry(NoBackoff(), 0),
                client_name=client or None,
            )
        except ValueError:
            raise ConfigError("store URL: has to be redis://HOST:PORT/N, rediss://… or unix:///PATH") from None
        self._prefix = f"elasticmoe:{deployment}:"

    def another(self, client: str) -> Store:
        """The same store, on connections of its own: for another thread."""
        return Store(self._url, self._deployment, client)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def ping(self) -> None:
        """Raises Unavailable unless the store answers."""
        _guard(self._redis.ping)

    def acquire_lease(self, holder: str, lease_ms: int, fence_min: int) -> int | str:
        """Become the scaler: a new fencing epoch above `fence_min` and all earlier ones, or the other holder's name."""
        keys = [self._key("lease"), self._key("fence")]
        fence, who = _guard(lambda: self._redis.eval(_ACQUIRE, 2, *keys, holder, lease_ms, fence_min))
        return int(fence) if int(fence) else bytes(who).decode(errors="replace")

    def _write(self, script: str, by: Writer, names: tuple[str, ...], *arguments: bytes | str | int) -> bool:
        keys = [self._key(name) for name in ("lease", "fence", *names)]
        return bool(_guard(lambda: self._redis.eval(script, len(keys), *keys, by.holder, by.fence, *arguments)))

    def _write_or_raise(self, script: str, by: Writer, names: tuple[str, ...], *arguments: bytes | str | int) -> None:
        if not self._write(script, by, names, *arguments):
            raise Fenced("another scaler holds the lease")

    def renew_lease(self, by: Writer, lease_ms: int) -> bool:
        """Extend the lease, or take it back if nobody has it; False when somebody else holds it, or has held it since
        `by` got its fencing epoch: what that one did is in the journal, which is read with a new lease. A holder under
        a lower epoch loses it: the store has lost its memory meanwhile."""
        return self._write(_RENEW, by, (), lease_ms)

    def release_lease(self, holder: str) -> None:
        """Give the lease back if `holder` has it."""
        _guard(lambda: self._redis.eval(_RELEASE, 1, self._key("lease"), holder))

    def put_layout(self, by: Writer, layout: Layout) -> None:
        """Make `layout` the committed one, in one transaction with its epoch and the news of it. Raises Fenced."""
        names, raw = ("layout", "epoch", "layouts"), _encode(layout)
        self._write_or_raise(_PUT_LAYOUT, by, names, raw, layout.epoch, LAYOUTS_MAX)

    def get_layout(self) -> Layout | None:
        """The committed layout, or None before the first."""
        return _decode(_guard(lambda: self._redis.get(self._key("layout"))), _layouts)

    def put_served(self, by: Writer, served: Served) -> None:
        """Say what the layouts that follow are of. Raises Fenced."""
        self._write_or_raise(_PUT, by, ("served",), _encode(served))

    def get_served(self) -> Served | None:
        """What the committed layout is of, or None before the first."""
        return _decode(_guard(lambda: self._redis.get(self._key("served"))), _served)

    def put_instance(self, by: Writer, instance: str) -> None:
        """Name the deployment. Raises Fenced."""
        self._write_or_raise(_PUT, by, ("instance",), instance)

    def get_instance(self) -> str:
        """The deployment's name, empty before it has one."""
        return bytes(_guard(lambda: self._redis.get(self._key("instance"))) or b"").decode(errors="replace")

    def put_policy(self, by: Writer, policy: msgspec.Struct) -> None:
        """Keep the policy. Raises Fenced."""
        self._write_or_raise(_PUT, by, ("policy",), _encode(policy))

    def get_policy(self, decoder: Decodes[R]) -> R | None:
        """The policy, or None before the first. Raises Unavailable `store_corrupt` for what `decoder` does not take."""
        return _decode(_guard(lambda: self._redis.get(self._key("policy"))), decoder)

    def get_epoch(self) -> int:
        """Epoch of the committed layout, 0 before the first."""
        raw = _guard(lambda: self._redis.get(self._key("epoch")))
        try:
            return int(raw or 0)
        except ValueError:
            raise Unavailable("store value is not valid: epoch is no number", code="store_corrupt") from None

    def append_event(self, by: Writer, event: Event) -> None:
        """Add to the journal; the oldest fall out beyond EVENTS_MAX. Raises Fenced."""
        self._write_or_raise(_APPEND, by, ("events",), msgspec.msgpack.encode(event), EVENTS_MAX)

    def events(self, most: int) -> list[Event]:
        """The newest `most` events, newest first."""
        entries: Any = _guard(lambda: self._redis.xrevrange(self._key("events"), count=most))
        decoded = (_decode(fields.get(b"e"), _events) for _, fields in entries)
        return [event for event in decoded if event is not None]

    def append_decision(self, by: Writer, decision: msgspec.Struct) -> None:
        """Keep a decision with its inputs; the oldest fall out beyond DECISIONS_MAX. Raises Fenced, and PayloadTooLarge
        for one of more than DECISION_BYTES_MAX when compressed."""
        raw = zlib.compress(msgspec.msgpack.encode(decision), 1)
        if len(raw) > DECISION_BYTES_MAX:
            raise PayloadTooLarge(f"decision of {len(raw)} bytes exceeds the limit of {DECISION_BYTES_MAX}")
        self._write_or_raise(_APPEND_DECISION, by, ("decisions",), raw, DECISIONS_MAX)

    def decisions(self, decoder: Decodes[R]) -> list[R]:
        """All decisions that are kept, oldest first. Raises Unavailable `store_corrupt` for what `decoder` refuses."""
        entries: Any = _guard(lambda: self._redis.xrange(self._key("decisions")))
        found = (_decode(_inflate(fields.get(b"d")), decoder) for _, fields in entries)
        return [decision for decision in found if decision is not None]

    def put_operation(self, by: Writer, operation: msgspec.Struct | None) -> str:
        """Make `operation` the one in progress; None: there is none. Returns what `journal_mark` says until somebody
        else writes. Raises Fenced when another scaler has the lease, or has had it since `by` got its epoch."""
        mark, names = secrets.token_hex(8), ("operation", "journal")
        if operation is None:
            self._write_or_raise(_NO_OPERATION, by, names, mark)
        else:
            self._write_or_raise(_PUT_OPERATION, by, names, _encode(operation), mark)
        return mark

    def end_operation(self, by: Writer, operation: msgspec.Struct) -> str:
        """Move the operation in progress to the ended ones, as `operation`, in one transaction. Returns and raises as
        put_operation."""
        mark, names = secrets.token_hex(8), ("operation", "journal", "operations")
        self._write_or_raise(_END_OPERATION, by, names, _encode(operation), mark, OPERATIONS_MAX)
        return mark

    def journal_mark(self) -> str:
        """Tells the last write of the operation in progress from all others; empty before the first."""
        return bytes(_guard(lambda: self._redis.get(self._key("journal"))) or b"").decode(errors="replace")

    def get_operation(self, decoder: Decodes[R]) -> R | None:
        """The operation in progress, or None. Raises Unavailable `store_corrupt` for what `decoder` does not take."""
        return _decode(_guard(lambda: self._redis.get(self._key("operation"))), decoder)

    def ended_operations(self, decoder: Decodes[R]) -> list[R]:
        """Operations that ended, newest first; those that `decoder` does not take (of another version) are left out."""
        found = []
        for raw in _guard(lambda: self._redis.lrange(self._key("operations"), 0, OPERATIONS_MAX - 1)):
            try:
                found.append(_decode(raw, decoder))
            except Unavailable:
                continue
        return [operation for operation in found if operation is not None]

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


class AsyncStore:
    """What a router needs, for one asyncio loop. `client` as of a Store."""

    def __init__(self, url: str, deployment: str, client: str = "") -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=CALL_SECONDS_MAX * 2,
            socket_connect_timeout=CALL_SECONDS_MAX,
            retry=AsyncRetry(NoBackoff(), 0),
            client_name=client or None,
        )
        self._prefix = f"elasticmoe:{deployment}:"

    async def get_layout(self) -> Layout | None:
        """The committed layout, or None before the first. Raises Unavailable."""
        return _decode(await self._get("layout"), _layouts)

    async def _get(self, name: str) -> Any:
        try:
            return await self._redis.get(self._prefix + name)
        except (redis.RedisError, OSError) as error:
            raise Unavailable(f"store does not answer: {_why(error)}", code="store_unavailable") from None

    async def watch(self) -> AsyncIterator[Layout]:
        """Each committed layout with an epoch above the last seen one, the present one first.

        Never ends by itself: an outage only delays. A store that was wiped or rolled back yields nothing until its
        epoch passes the last one seen.
        """
        seen, last_entry = 0, _FROM_THE_FIRST
        while True:
            try:
                epoch = await self._get("epoch")
                layout = await self.get_layout() if epoch is not None and int(epoch) > seen else None
            except (Unavailable, ValueError):
                layout = None
            if layout is not None and layout.epoch > seen:
                seen = layout.epoch
                yield layout
            last_entry = await self._wait_for_news(last_entry)
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the client may swallow it where it coincides with its timeouts
                raise asyncio.CancelledError

    async def _wait_for_news(self, last_entry: Any) -> Any:
        """Wait until `layouts` has an entry after `last_entry`, POLL_SECONDS at most; returns its last entry."""
        key, most_ms = self._prefix + "layouts", int(POLL_SECONDS * 1e3)
        try:
            streams: Any = await self._redis.xread({key: last_entry}, block=most_ms)
        except (redis.RedisError, OSError):
            await asyncio.sleep(POLL_SECONDS)
            return _FROM_THE_FIRST  # the store that comes back may count from the beginning
        return streams[0][1][-1][0] if streams else last_entry

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def store_of(config: Common, client: str) -> Store:
    """The blocking store of this deployment."""
    return Store(store_url(config), config.deployment, client)


def async_store_of(config: Common, client: str) -> AsyncStore:
    """The asyncio store of this deployment, to read layouts from."""
    return AsyncStore(store_url(config, READER), config.deployment, client)


def _guard(call: Callable[[], R]) -> Any:
    """Run one store call; its failures become Unavailable, `storage_full` where it has no room for what is written."""
    try:
        return call()
    except redis.RedisError as error:
        # MISCONF: the server cannot write its own files.
        if isinstance(error, redis.exceptions.OutOfMemoryError) or str(error).startswith("MISCONF "):
            raise Unavailable("store takes no writes: it is out of memory or disk", code="storage_full") from None
        raise Unavailable(f"store does not answer: {_why(error)}", code="store_unavailable") from None


def _encode(value: msgspec.Struct) -> bytes:
    """Raises PayloadTooLarge beyond VALUE_BYTES_MAX, so that what is written can be read back."""
    raw = msgspec.msgpack.encode(value)
    if len(raw) > VALUE_BYTES_MAX:
        raise PayloadTooLarge(f"store value of {len(raw)} bytes exceeds the limit of {VALUE_BYTES_MAX}")
    return raw


def _why(error: Exception) -> str:
    """Without the client library's words."""
    is_late = isinstance(error, redis.TimeoutError)
    return f"not within {CALL_SECONDS_MAX:g} s" if is_late else "there is no connection, or it refuses what is asked"


def _inflate(raw: bytes | None) -> bytes | None:
    if raw is None:
        return None
    try:
        return zlib.decompressobj().decompress(raw, VALUE_BYTES_MAX)
    except zlib.error:
        raise Unavailable("store value is not valid: it is not compressed as ours are", code="store_corrupt") from None


def _decode(raw: Any, decoder: Decodes[R]) -> R | None:
    if raw is None:
        return None
    if len(raw) > VALUE_BYTES_MAX:
        raise Unavailable(f"store value of {len(raw)} bytes exceeds the limit of {VALUE_BYTES_MAX}")
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise Unavailable(f"store value is not valid: {undecodable(error)}", code="store_corrupt") from None
