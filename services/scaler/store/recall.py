"""How a scaler finds what earlier runs have left, in the store and on this host's disk, and takes it over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.fence import Fence
from elasticmoe.common.layout import Served
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.store import Store, Writer
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.policy.record import PolicyRecord, cautious, policy_of
from elasticmoe.services.scaler.policy.record import resumed as resumed_policy
from elasticmoe.services.scaler.store.records import OPERATIONS
from elasticmoe.services.scaler.store.resume import Beginning, Left, Resumed, Wanted, begin

log = get_logger("scaler")

_policies = msgspec.msgpack.Decoder(PolicyRecord)
_LATER = ("store_unavailable", "storage_full")


class Recalled(msgspec.Struct, frozen=True):
    """How a scaler begins: the layout, the operation in progress, those that ended, newest first, what of it is
    resumed, the deployment's name, which it has until its state is dropped, the policy, with why the one that is left
    cannot be read, and what the layout is of."""

    beginning: Beginning
    operation: Operation | None
    ended: list[Operation]
    resumed: Resumed | None
    instance: str
    policy: PolicyRecord
    policy_damage: str
    served: Served | None


class Recall:
    """Made and called by the loop's thread. `epochs`: the highest epoch of a layout, kept on this host, so that it does
    not fall where the store is emptied as well."""

    def __init__(
        self, config: ScalerConfig, spec: ModelSpec, store: Store, epochs: Fence, new_identity: Callable[[str], str]
    ) -> None:
        self._config = config
        self._store = store
        self._mark = config.fresh_mark
        self._wanted = Wanted(
            Served(str(Path(config.model).absolute()), spec.dtype, config.compute_backend, config.activation_kind),
            config.replicas,
            config.tp,
            config.device_count,
            tuple(spec.num_experts_by_layer),
        )
        self.epochs = epochs
        self._new_identity = new_identity

    def read(self, by: Writer) -> Recalled:
        """Read all of it, and where nothing is refused, say in the store what is served from now on. Raises Unavailable
        where the store or the disk does not answer, Fenced where another scaler has taken over."""
        ended = self._store.ended_operations(OPERATIONS)
        left = self._left()
        operation = left.operation
        beginning = begin(left, self._wanted)
        resumed = None
        if beginning.refusal is not None:
            log.error("nothing begins", because=beginning.refusal.message)
        elif beginning.is_resumed:
            layout = beginning.layout
            op_id = operation.op_id if operation is not None else ""
            resumed = Resumed(layout.epoch, layout.dp, self._config.replicas, op_id)
            log.info("layout resumed", **msgspec.structs.asdict(resumed))
        else:
            log.info("layout begun anew", epoch=beginning.layout.epoch, replicas=beginning.layout.dp)
        if left.is_dropped:
            operation = None
            self._store.put_operation(by, None)
        if beginning.refusal is None and left.served != self._wanted.served:
            self._store.put_served(by, self._wanted.served)
        is_refused = beginning.refusal is not None
        instance = self._instance(by, left, is_refused=is_refused)
        policy, damage = self._policy(by, left, is_refused=is_refused)
        served = left.served if is_refused else self._wanted.served
        return Recalled(beginning, operation, ended, resumed, instance, policy, damage, served)

    def _instance(self, by: Writer, left: Left, *, is_refused: bool) -> str:
        known = "" if left.is_dropped else self._store.get_instance()
        if not known and not is_refused:
            known = f"i-{self._new_identity('i')[-12:]}"
            self._store.put_instance(by, known)
        return known

    def _policy(self, by: Writer, left: Left, *, is_refused: bool) -> tuple[PolicyRecord, str]:
        """One that cannot be read, such as a later release's, stays as it is until somebody sets another: nothing else
        hangs on it."""
        settings = policy_of(self._config)
        try:
            known = None if left.is_dropped else self._store.get_policy(_policies)
        except Unavailable as error:
            if error.code in _LATER:
                raise
            log.error("the policy cannot be read, and nothing is done by it", because=error.message)
            return cautious(settings), error.message
        policy = resumed_policy(known, settings)
        if policy != known and not is_refused:
            self._store.put_policy(by, policy)
        return policy, ""

    def _left(self) -> Left:
        is_dropped = self._mark.exists()
        epoch, damage = self.epochs.refresh(), ""
        layout = served = operation = None
        try:
            epoch = max(epoch, self._store.get_epoch())
            layout, served = self._store.get_layout(), self._store.get_served()
            operation = self._store.get_operation(OPERATIONS)
        except Unavailable as error:
            if error.code in _LATER:
                raise
            damage = error.message
        if layout is not None:
            epoch = max(epoch, layout.epoch)
        return Left(layout, served, operation, epoch, damage, is_dropped)

    def settled(self) -> None:
        """The layout to begin with has been committed: what was to be dropped has been."""
        self._mark.unlink(missing_ok=True)
