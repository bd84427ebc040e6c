"""The scaler's connections to the hosts and to the ranks. The loop's thread only."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe.common.capacity import load_of
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.devices.names import LOCAL_HOST, HostId
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.scaler import ToScaler
from elasticmoe.services.scaler.cluster import HostStatus
from elasticmoe.services.scaler.control.host_link import HostLink
from elasticmoe.services.scaler.control.peers import Peers
from elasticmoe.services.scaler.parts import ScalerParts


class Links:
    """`on_event` gets what a pool tells unasked. `hosts`: LOCAL_HOST alone; to which of several a command would go is
    not said yet."""

    def __init__(
        self, config: ScalerConfig, spec: ModelSpec, parts: ScalerParts, on_event: Callable[[ToScaler], None]
    ) -> None:
        self._config = config
        self._spec = spec
        self._clock = parts.clock
        self._poller = parts.poller
        self._new_identity = parts.new_identity
        self.hosts: dict[HostId, HostLink] = {LOCAL_HOST: HostLink(parts, config.pool_name, on_event)}
        self.peers = Peers(parts.transport, parts.identity, parts.clock)

    @property
    def starting(self) -> frozenset[int]:
        """Slots whose rank was asked for and has neither come nor failed."""
        return frozenset(slot for host in self.hosts.values() for slot in host.starting)

    def act_under(self, fence: int) -> None:
        """Send everything with this fencing epoch from now on."""
        self.peers.epoch = fence
        for host in self.hosts.values():
            host.act_under(fence)

    def ask(self, *, is_starting: bool, is_quiet: bool) -> dict[HostId, HostStatus]:
        """What all hosts say now, as HostLink.ask."""
        return {name: host.ask(is_starting=is_starting, is_quiet=is_quiet) for name, host in self.hosts.items()}

    def tell_hmm(self, command: Message) -> None:
        """Send a command and wait for its answer. Raises ElasticMoEError: the refusal, or DeadlineExceeded."""
        self.hosts[LOCAL_HOST].tell_hmm(command)

    def tell_pool(self, command: Message) -> None:
        """Send a command and wait for its answer. Raises ElasticMoEError: the refusal, or DeadlineExceeded."""
        self.hosts[LOCAL_HOST].tell_pool(command)

    def load(self, layout: Layout) -> None:
        """Let the HMM load the model for `layout`. Raises ElasticMoEError."""
        self.tell_hmm(load_of(self._config, self._spec, layout))

    def start(self, seat: Seat, epoch: int) -> None:
        """Let a standby of the seat's host take `seat` of the layout of `epoch`. Raises ElasticMoEError."""
        self.hosts[seat.host].start(
            StartRank(
                rank=seat.rank,
                slot=seat.slot,
                device=seat.device,
                incarnation=self._new_identity(f"rank-{seat.rank}"),
                epoch=epoch,
                max_tokens=self._config.max_tokens_per_step,
                max_sequences=self._config.max_sequences,
                max_model_len=min(self._config.max_model_len, self._spec.max_positions),
                compute=self._config.compute_backend,
                activations=self._config.activation_kind,
            )
        )

    def wait(self, wait_s: float, *, is_quiet: bool = False) -> None:
        """Until something comes, at most `wait_s`; where it is quiet, until something is told unasked or somebody wakes
        this. What has come is handled."""
        deadline = self._clock.monotonic() + wait_s
        # The sockets' descriptors are edge-triggered: they have to be drained before each wait.
        while not self._drain() and (left_s := deadline - self._clock.monotonic()) > 0:
            fds = (fd for host in self.hosts.values() for fd in host.filenos())
            if self._poller.poll((*fds, *self.peers.filenos()), left_s) or not is_quiet:
                self._drain()
                return

    def _drain(self) -> bool:
        self.peers.receive()
        return any([host.drain() for host in self.hosts.values()])

    def close(self) -> None:
        """Close all connections."""
        for host in self.hosts.values():
            host.close()
        self.peers.close()
