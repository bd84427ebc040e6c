"""The only importer of redis: the deployment's keys, their types, and what each is for.

The store coordinates; it is never on the path of a token, and what it says is checked by the resources (fence.py). All
keys share the prefix `elasticmoe:<deployment>:`. Values are MessagePack of the types named here, decoded strictly.

| key | type | lives | holds |
|---|---|---|---|
| `layout` | Layout | for ever | the committed layout |
| `epoch` | integer | for ever | that layout's epoch, which routers poll |
| `layouts` | stream of epochs | the last LAYOUTS_MAX | wakes routers when a layout is committed, no more |
| `fence` | integer | for ever | the last fencing epoch given out; never falls |
| `lease` | holder's identity | `lease_ms` | who may act as scaler |
| `events` | stream of Event | the last EVENTS_MAX | phase changes of operations and every decision, with reason |
| `operation` | the scaler's Operation | until it ends | the operation in progress, as of its latest phase |
| `operations` | list of the scaler's Operation | the last OPERATIONS_MAX | operations that ended, newest first |
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.config import Common
from common.layout import Layout
from common.protocol.errors import ConfigError, Fenced, PayloadTooLarge, Unavailable

EVENTS_MAX = 10_000
OPERATIONS_MAX = 100
VALUE_BYTES_MAX = 32 * 1024 * 1024
CALL_SECONDS_MAX = 2.0
LAYOUTS_MAX = 16
POLL_SECONDS = 0.2  # a new layout is seen after this time at the latest, also when the news of it got lost

R = TypeVar("R")

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, holder} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local fence = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], fence)
return {fence, ARGV[1]}
"""
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder and tonumber(redis.call('GET', KEYS[2]) or '0') > tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# Written only by the holder of the lease, or while nobody holds it: a scaler that slept past its lease changes nothing.
_PUT_OPERATION = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""
_END_OPERATION = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('LPUSH', KEYS[3], ARGV[2])
redis.call('LTRIM', KEYS[3], 0, tonumber(ARGV[3]) - 1)
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Event(msgspec.Struct, frozen=True):
    """One line of the journal. `facts` are the inputs that the reason rests on, as text."""

    kind: str
    reason: str
    epoch: int
    sender: str
    time_unix: float
    facts: dict[str, str] = {}


_FROM_THE_FIRST = "0-0"

_layouts = msgspec.msgpack.Decoder(Layout)
_events = msgspec.msgpack.Decoder(Event)


def store_url(config: Common) -> str:
    """The URL that this deployment's store answers at. The embedded server's password is read from its file."""
    if config.store_url:
        return config.store_url
    password = config.secret("store.password")
    try:
        secret = password.read_text().strip()
    except OSError as error:
        raise ConfigError(f"store password {password.name} cannot be read: {error.strerror}") from None
    return f"unix://:{secret}@{config.socket('store')}"


class Store:
    """Blocking access, for the scaler and the command line. Every call ends within CALL_SECONDS_MAX."""

    def __init__(self, url: str, deployment: str) -> None:
        """Raises ConfigError for a URL that cannot be read; connects at the first call."""
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=CALL_SECONDS_MAX,
                socket_connect_timeout=CALL_SECONDS_MAX,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"store URL: {error}") from None
        self._prefix = f"elasticmoe:{deployment}:"

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

    def renew_lease(self, holder: str, lease_ms: int, fence: int) -> bool:
        """Extend the lease, or take it back if nobody has it; False when somebody else holds it, or has held it since
        `holder` got its fencing epoch `fence`: what that one did is in the journal, which is read with a new lease."""
        keys = [self._key("lease"), self._key("fence")]
        return bool(_guard(lambda: self._redis.eval(_RENEW, 2, *keys, holder, lease_ms, fence)))

    def release_lease(self, holder: str) -> None:
        """Give the lease back if `holder` has it."""
        _guard(lambda: self._redis.eval(_RELEASE, 1, self._key("lease"), holder))

    def put_layout(self, layout: Layout) -> None:
        """Make `layout` the committed one, in one transaction with its epoch and the news of it."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.set(self._key("layout"), msgspec.msgpack.encode(layout))
        pipeline.set(self._key("epoch"), layout.epoch)
        pipeline.xadd(self._key("layouts"), {"epoch": layout.epoch}, maxlen=LAYOUTS_MAX, approximate=False)
        _guard(pipeline.execute)

    def get_layout(self) -> Layout | None:
        """The committed layout, or None before the first."""
        return _decode(_guard(lambda: self._redis.get(self._key("layout"))), _layouts)

    def get_epoch(self) -> int:
        """Epoch of the committed layout, 0 before the first."""
        raw = _guard(lambda: self._redis.get(self._key("epoch")))
        try:
            return int(raw or 0)
        except ValueError:
            raise Unavailable("store value is not valid: epoch is no number", code="store_corrupt") from None

    def append_event(self, event: Event) -> None:
        """Add to the journal; the oldest fall out beyond EVENTS_MAX."""
        raw = msgspec.msgpack.encode(event)
        _guard(lambda: self._redis.xadd(self._key("events"), {"e": raw}, maxlen=EVENTS_MAX, approximate=True))

    def events(self, most: int) -> list[Event]:
        """The newest `most` events, newest first."""
        entries: Any = _guard(lambda: self._redis.xrevrange(self._key("events"), count=most))
        decoded = (_decode(fields.get(b"e"), _events) for _, fields in entries)
        return [event for event in decoded if event is not None]

    def put_operation(self, holder: str, operation: msgspec.Struct) -> None:
        """Make `operation` the one in progress. Raises Fenced when another scaler than `holder` has the lease."""
        keys = [self._key("lease"), self._key("operation")]
        raw = _encode(operation)
        if not _guard(lambda: self._redis.eval(_PUT_OPERATION, 2, *keys, holder, raw)):
            raise Fenced("another scaler holds the lease")

    def end_operation(self, holder: str, operation: msgspec.Struct) -> None:
        """Move the operation in progress to the ended ones, as `operation`, in one transaction. Raises Fenced."""
        keys = [self._key("lease"), self._key("operation"), self._key("operations")]
        raw = _encode(operation)
        if not _guard(lambda: self._redis.eval(_END_OPERATION, 3, *keys, holder, raw, OPERATIONS_MAX)):
            raise Fenced("another scaler holds the lease")

    def get_operation(self, decoder: msgspec.msgpack.Decoder[R]) -> R | None:
        """The operation in progress, or None. Raises Unavailable `store_corrupt` for what `decoder` does not take."""
        return _decode(_guard(lambda: self._redis.get(self._key("operation"))), decoder)

    def ended_operations(self, decoder: msgspec.msgpack.Decoder[R]) -> list[R]:
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
    """What a router needs, for one asyncio loop."""

    def __init__(self, url: str, deployment: str) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=CALL_SECONDS_MAX * 2,
            socket_connect_timeout=CALL_SECONDS_MAX,
            retry=AsyncRetry(NoBackoff(), 0),
        )
        self._prefix = f"elasticmoe:{deployment}:"

    async def get_layout(self) -> Layout | None:
        """The committed layout, or None before the first. Raises Unavailable."""
        return _decode(await self._get("layout"), _layouts)

    async def _get(self, name: str) -> Any:
        try:
            return await self._redis.get(self._prefix + name)
        except (redis.RedisError, OSError) as error:
            raise Unavailable(f"store does not answer: {type(error).__name__}", code="store_unavailable") from None

    async def watch_layout(self) -> AsyncIterator[Layout]:
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


def store_of(config: Common) -> Store:
    """The blocking store of this deployment."""
    return Store(store_url(config), config.deployment)


def async_store_of(config: Common) -> AsyncStore:
    """The asyncio store of this deployment."""
    return AsyncStore(store_url(config), config.deployment)


def _guard(call: Callable[[], R]) -> Any:
    """Run one store call; its failures become Unavailable, `storage_full` where it has no room for what is written."""
    try:
        return call()
    except redis.RedisError as error:
        # MISCONF: the server cannot write its own files.
        if isinstance(error, redis.exceptions.OutOfMemoryError) or str(error).startswith("MISCONF "):
            raise Unavailable("store takes no writes: it is out of memory or disk", code="storage_full") from None
        raise Unavailable(f"store does not answer: {type(error).__name__}", code="store_unavailable") from None


def _encode(value: msgspec.Struct) -> bytes:
    """Raises PayloadTooLarge beyond VALUE_BYTES_MAX, so that what is written can be read back."""
    raw = msgspec.msgpack.encode(value)
    if len(raw) > VALUE_BYTES_MAX:
        raise PayloadTooLarge(f"store value of {len(raw)} bytes exceeds the limit of {VALUE_BYTES_MAX}")
    return raw


def _decode(raw: Any, decoder: msgspec.msgpack.Decoder[R]) -> R | None:
    if raw is None:
        return None
    if len(raw) > VALUE_BYTES_MAX:
        raise Unavailable(f"store value of {len(raw)} bytes exceeds the limit of {VALUE_BYTES_MAX}")
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise Unavailable(f"store value is not valid: {error}", code="store_corrupt") from None
