"""What the scaler sees in one turn, and what a part of the reconciler makes of it. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import msgspec

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import RankLoad
from elasticmoe.services.scaler.actions import Action
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.planning.plan import Rates
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import RefusedOrder
from elasticmoe.services.scaler.policy.figures import Signals
from elasticmoe.services.scaler.policy.step_model import StepModel

S = TypeVar("S")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen of the load in a turn in which the policy decides, with what it needs to judge that.

    config: what the operator wants
    signals: what routers and ranks have told
    steps: by width, what a step takes
    sizes, memory, devices, rates: what plans are made from; devices that may be used
    kv_handle_tokens: that a KV handle holds
    step_tokens_max: prompt tokens of one step
    shares_cores: ranks divide the machine's cores: of twice as many each is half as fast, once all cores are in use;
        until then each has `threads_max` of them
    cores: of the machine, as far as is known; 0: not
    threads_max: most that a rank computes with
    accepted, refused: the newest order of the policy that was
    """

    config: PolicyConfig
    signals: Signals
    steps: dict[int, StepModel]
    sizes: Sizes
    memory: MemoryForecast
    devices: tuple[str, ...]
    rates: Rates
    kv_handle_tokens: int
    step_tokens_max: int
    shares_cores: bool = False
    cores: int = 0
    threads_max: int = 64
    accepted: str | None = None
    refused: RefusedOrder | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen last.

    cluster: the hosts, and the layout in force
    loads: by slot, fresh ones of ranks that live
    starting: slots whose rank was asked for and has neither come nor failed
    announced_epoch: of the layout that the routers see
    restarts_left: ranks of members that may still be replaced in this window
    is_backing_off: not yet the next one
    last_exit: why the last one ended
    load_refused: why nothing may be loaded
    is_resumed: this scaler goes on with a layout that was committed before it began
    exits: by slot, why ranks of joining seats ended since this attempt began
    stage_refused: the HMM's answer to its staging
    is_durable: the journal holds the operation's present state
    no_room: why the store takes no writes, where that is for want of room
    load: in turns in which the policy decides
    """

    cluster: Cluster
    loads: Mapping[int, RankLoad] = {}
    starting: frozenset[int] = frozenset()
    announced_epoch: int = 0
    restarts_left: int = 1
    is_backing_off: bool = False
    last_exit: str = ""
    load_refused: Refused | None = None
    is_resumed: bool = False
    exits: Mapping[int, str] = {}
    stage_refused: Refused | None = None
    is_durable: bool = True
    no_room: str = ""
    load: Load | None = None


class Step(NamedTuple, Generic[S]):
    """What comes of an observation: the new state, what is asked for, and why."""

    state: S
    actions: tuple[Action, ...] = ()
    reason: str = ""
