"""What the admin surface answers, field by field: `snapshot.py` fills it in, and the OpenAPI document is made of it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from elasticmoe.common.described import says
from elasticmoe.common.layout import Seat
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.control.state import DeploymentPhase
from elasticmoe.services.scaler.operation.operation import (
    Figures,
    OperationKind,
    OperationOutcome,
    OperationPhase,
    PhaseTime,
    Planned,
    Request,
)
from elasticmoe.services.scaler.store.resume import Resumed

DeviceState = Literal["used", "joining", "leaving", "free", "failed"]


class Health(msgspec.Struct, frozen=True):
    """The listener answers."""

    status: Annotated[Literal["ok"], says("Always `ok`")]


class Ready(msgspec.Struct, frozen=True):
    """Whether the deployment serves, and how far it has come."""

    phase: Annotated[DeploymentPhase, says("`serving` when all ranks of the layout step")]
    reason: Annotated[str, says("Why it is in this phase", "nothing to do")]
    bytes_done: Annotated[int, says("Bytes of the checkpoint that have been read")]
    bytes_total: Annotated[int, says("Bytes of the checkpoint to be read; 0 before that is known")]
    error: Annotated[Refused | None, says("Why it has failed; null unless it has")]
    resumed: Annotated[Resumed | None, says("What was gone on with at the start; null for a fresh deployment")] = None


class Memory(msgspec.Struct, frozen=True):
    """A device's bytes by class: `weights + kv + other + free == budget`."""

    budget: Annotated[int, says("All that the deployment may use of the device")]
    weights: Annotated[int, says("Weights")]
    kv: Annotated[int, says("KV blocks, used or not")]
    other: Annotated[int, says("The rank's ledger and mailbox, and its part of what is shared")]
    free: Annotated[int, says("What is left of the budget")]
    total: Annotated[int | None, says("What the device has, as its driver says; null: its memory is the machine's")]


class Rank(msgspec.Struct, frozen=True):
    """One seat of the layout, or one that joins or leaves now, with the process in it."""

    replica: Annotated[int, says("The replica's number")]
    tp: Annotated[int, says("The rank's number in its replica")]
    slot: Annotated[int, says("Its place on the bus")]
    device: Annotated[str, says("Its device", "host:0")]
    state: Annotated[DeviceState, says("`used` unless it joins or leaves now")]
    incarnation: Annotated[str | None, says("The process; null where the seat has none")]
    pid: Annotated[int | None, says("Its process id, in the pool's namespace")]
    ready: Annotated[bool, says("It has mapped its memory and can step")]
    attach_ms: Annotated[float | None, says("What mapping its memory took")]
    experts: Annotated[int, says("Expert records on its device")]
    kv_blocks: Annotated[int, says("KV blocks of its device")]
    kv_blocks_free: Annotated[
        int | None, says("Those that are free; null where the rank has not told lately, and where another leads")
    ]
    memory: Annotated[Memory | None, says("Its device's bytes; null while the HMM does not answer")]


class Layout(msgspec.Struct, frozen=True):
    """The layout in force: which ranks serve, and where each expert is."""

    epoch: Annotated[int, says("Grows by one with each change of the layout")]
    fence: Annotated[int, says("This scaler's fencing epoch")]
    phase: Annotated[DeploymentPhase, says("As of /ready")]
    reason: Annotated[str, says("Why it is in this phase")]
    tp: Annotated[int, says("Ranks of a replica")]
    replicas: Annotated[int, says("Replicas that serve")]
    operation: Annotated[str | None, says("`op_id` of the operation in progress")]
    computes_by: Annotated[
        list[str],
        says("Kernels and threads that ready ranks compute by; several where ranks differ", "host avx512, 1 thread"),
    ]
    ranks: Annotated[list[Rank], says("All seats")]
    experts: Annotated[
        tuple[tuple[tuple[int, ...], ...], ...], says("`experts[layer][expert]`: slots whose devices hold it")
    ]


class Device(msgspec.Struct, frozen=True):
    """One device."""

    device: Annotated[str, says("Its name", "host:0")]
    state: Annotated[DeviceState, says("Whether the layout uses it; `failed`: it does not, and could not")]
    failure: Annotated[str, says("Why it cannot be used, as its driver says; empty: it can")]
    attached: Annotated[str | None, says("The process that has mapped its memory")]
    memory: Annotated[Memory, says("Its bytes")]
    pages: Annotated[int, says("Bytes of real memory behind its weights and KV")]
    large_pages: Annotated[
        int,
        says("Bytes of these in large pages, which the HMM makes in the background where the backend's own are small"),
    ]


class Devices(msgspec.Struct, frozen=True):
    """All devices."""

    standby_processes: Annotated[int, says("Processes that wait for a seat")]
    devices: Annotated[list[Device], says("All devices, used or not")]


class Progress(msgspec.Struct, frozen=True):
    """What the HMM does for the operation's present leg."""

    hmm_phase: Annotated[str, says("`vacating`, `copying`, `staged`, `committed`, …")]
    bytes_done: Annotated[int, says("Bytes copied")]
    bytes_total: Annotated[int, says("Bytes to be copied")]
    slots_prepared: Annotated[tuple[int, ...], says("Slots whose rank has mapped everything")]


class Operation(msgspec.Struct, frozen=True):
    """One operation: what was asked for, how far it is, and what it has cost."""

    op_id: Annotated[str, says("Its name", "op-1f0c2d3e4a5b")]
    kind: Annotated[OperationKind, says("What it does")]
    phase: Annotated[OperationPhase, says("`done` or `aborted` when it has ended")]
    outcome: Annotated[OperationOutcome | None, says("How it ended; null before that")]
    reason: Annotated[str, says("Why it is in this phase: what it waits for", "slots 2 have not mapped everything")]
    leg: Annotated[int, says("The present leg, from 1")]
    legs: Annotated[int, says("How many it has")]
    attempt: Annotated[int, says("The present attempt at this leg, from 1")]
    request: Annotated[Request, says("What was asked for")]
    by: Annotated[Literal["operator", "policy"], says("Whose order it is; what comes by this API is the operator's")]
    accepted_unix: Annotated[float, says("When it was accepted, in seconds since 1970")]
    deadline_s: Annotated[float, says("It is undone unless it is committed by then")]
    elapsed_s: Annotated[float, says("Since it was accepted; time without a scaler is not counted")]
    is_late: Annotated[bool, says("It is past its deadline and cannot be undone any more")]
    is_cancelled: Annotated[bool, says("Somebody has cancelled it")]
    timings: Annotated[tuple[PhaseTime, ...], says("How long it was in each phase")]
    progress: Annotated[Progress | None, says("What the HMM does for it; null where it does nothing")]
    planned: Annotated[Planned | None, says("The plan in short; null for a rebalance")]
    figures: Annotated[Figures, says("What it has cost so far, beside what was planned")]
    error: Annotated[Refused | None, says("Why it was undone; null unless it was")]


class Operations(msgspec.Struct, frozen=True):
    """The one in progress first, then the last 100 that have ended, newest first."""

    operations: Annotated[list[Operation], says("All that are known")]


class Move(msgspec.Struct, frozen=True, array_like=True):
    """What one device sends to another, as a list."""

    source: Annotated[str | None, says("The device that sends; null: it is read from the checkpoint", "host:0")]
    target: Annotated[str, says("The device that it comes to", "host:2")]
    records: Annotated[int, says("Weight records")]
    experts: Annotated[int, says("Of them, experts")]
    bytes: Annotated[int, says("Bytes that they have")]


class LegMoves(msgspec.Struct, frozen=True):
    """Who sends how much to whom in one leg."""

    moves: Annotated[list[Move], says("The 50 largest pairs of devices, the largest first")]
    pairs: Annotated[int, says("Pairs of devices, told here or not")]
    records: Annotated[int, says("Weight records of all pairs")]
    bytes: Annotated[int, says("Bytes of all pairs")]


class Moves(msgspec.Struct, frozen=True):
    """What an operation in progress moves."""

    op_id: Annotated[str, says("Its name", "op-1f0c2d3e4a5b")]
    legs: Annotated[list[LegMoves] | None, says("By leg; null where it has no plan: it levels requests, or has ended")]


class Leg(msgspec.Struct, frozen=True):
    """One step of a plan, from one layout to the next."""

    epoch: Annotated[int, says("Of the layout that it leads to")]
    joining: Annotated[tuple[Seat, ...], says("Seats that come")]
    leaving: Annotated[tuple[Seat, ...], says("Seats that go")]
    bytes_copied: Annotated[int, says("Bytes that its copies have")]
    peak_bytes: Annotated[dict[str, int], says("The most bytes at any instant, by device")]
    kv_handles: Annotated[dict[str, int], says("KV handles by device, until the release")]
    kv_handles_after: Annotated[dict[str, int], says("KV handles by device, from the release on")]
    copies: Annotated[list[tuple[str, str | None, str]], says("Each record with the device it comes from, and goes to")]
    moves: Annotated[LegMoves, says("The same by pairs of devices")]


class Plan(msgspec.Struct, frozen=True):
    """What a dry run would do."""

    kind: Annotated[OperationKind, says("What it does; `none`: the deployment is what is asked for")]
    planned: Annotated[Planned | None, says("The plan in short")]
    legs: Annotated[list[Leg], says("Its steps, in order")]


Column = list[float | None]


class SeriesColumns(msgspec.Struct, frozen=True):
    """One place in each list for each row; null: not known, or nothing happened that could tell it."""

    at: Annotated[list[int], says("Seconds since 1970")]
    serving: Annotated[Column, says("1 while all ranks of the layout step")]
    replicas: Annotated[Column, says("Replicas of the layout in force")]
    target: Annotated[Column, says("Replicas that there should be")]
    running: Annotated[Column, says("Sequences of all ranks")]
    queued: Annotated[Column, says("Requests without a first token")]
    requests_per_s: Annotated[Column, says("Asked for: admitted, and refused")]
    refused_per_s: Annotated[Column, says("Refused for want of room")]
    generated_per_s: Annotated[Column, says("Tokens that came out, of all replicas")]
    prompt_per_s: Annotated[Column, says("Tokens of prompts that went in, of all replicas")]
    ttft_s: Annotated[Column, says("The objective's quantile of the time to the first token")]
    itl_s: Annotated[Column, says("Mean time between tokens")]
    step_s: Annotated[Column, says("Mean step of the slowest rank")]
    attainment: Annotated[Column, says("Share of the requests of late that kept both objectives")]
    kv_share: Annotated[Column, says("Used share of the fullest rank's KV")]
    ttft_saturation: Annotated[Column, says("Time to the first token, over its objective")]
    itl_saturation: Annotated[Column, says("Time between tokens, over its objective")]
    backlog_saturation: Annotated[Column, says("What waits, over what the objective leaves for waiting")]
    queue_age_saturation: Annotated[Column, says("How long the oldest request has waited, over half the objective")]
    kv_saturation: Annotated[Column, says("Used share of the fullest rank's KV, over the most")]


class SeriesView(msgspec.Struct, frozen=True):
    """Figures over time. Numbers have four digits."""

    cursor: Annotated[str, says("`since` of the next call, for the rows that come", "scaler:105c73cc0c704e27.1.812")]
    step_s: Annotated[int, says("Seconds from row to row; of more than one, rows are means")]
    is_whole: Annotated[bool, says("Nothing is known of `since`: the rows are the oldest that are kept")]
    is_more: Annotated[bool, says("There are further rows already: call again")]
    columns: Annotated[SeriesColumns, says("The rows, oldest first")]


class NowDevice(msgspec.Struct, frozen=True, array_like=True):
    """A device with its memory in bytes, as a list."""

    device: Annotated[str, says("Its name", "host:0")]
    state: Annotated[DeviceState, says("As in /v1/devices")]
    slot: Annotated[int | None, says("Place on the bus of the rank on it")]
    rank: Annotated[str | None, says("Name of that rank", "r1t0")]
    is_ready: Annotated[bool, says("That rank's process can step")]
    experts: Annotated[int, says("Expert records on it")]
    budget: Annotated[int, says("All that the deployment may use")]
    weights: Annotated[int, says("Weights")]
    kv: Annotated[int, says("KV blocks, used or not")]
    other: Annotated[int, says("The rank's own")]
    free: Annotated[int, says("What is left of the budget")]
    failure: Annotated[str, says("Why it cannot be used; empty: it can")]


class NowRank(msgspec.Struct, frozen=True, array_like=True):
    """A rank's load, as a list."""

    slot: Annotated[int, says("Its place on the bus")]
    blocks_total: Annotated[int, says("KV blocks")]
    blocks_free: Annotated[int, says("Of them, free ones")]
    running: Annotated[int, says("Sequences that it steps")]
    waiting: Annotated[int, says("Sequences that wait for a place")]
    moving: Annotated[int, says("Sequences on their way to another rank")]


class NowProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the operation in progress is, in small: /v1/operations/OP tells the rest, with all that it plans."""

    phase: Annotated[OperationPhase, says("The phase that it is in")]
    leg: Annotated[int, says("The present leg, from 1; 0 for an operation without legs")]
    elapsed_s: Annotated[float, says("Since it was accepted")]
    hmm_phase: Annotated[str | None, says("What the HMM does for the present leg; null where it does nothing")]
    bytes_done: Annotated[int, says("Bytes copied for the present leg")]
    bytes_total: Annotated[int, says("Bytes to be copied for the present leg; 0 where the HMM does nothing for it")]
    bytes_copied: Annotated[int, says("Bytes copied for all legs")]
    sequences_moved: Annotated[int, says("Running requests that went to another rank")]


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """How the deployment is, for who looks again and again: of devices and ranks, those that have changed since."""

    cursor: Annotated[str, says("`since` of the next call", "scaler:105c73cc0c704e27.40")]
    is_whole: Annotated[bool, says("Nothing is known of `since`: all devices and ranks are told")]
    phase: Annotated[DeploymentPhase, says("As of /ready")]
    reason: Annotated[str, says("Why it is in this phase")]
    error: Annotated[Refused | None, says("Why it has failed; null unless it has")]
    instance: Annotated[str, says("Names the deployment")]
    fence: Annotated[int, says("This scaler's fencing epoch: another one after each of its restarts")]
    epoch: Annotated[int | None, says("Of the layout in force; null before the first")]
    replicas: Annotated[int | None, says("Replicas that serve; null before the first layout is known")]
    target: Annotated[int | None, says("Replicas that there should be; null like `replicas`")]
    tp: Annotated[int, says("Ranks of a replica")]
    operation: Annotated[str | None, says("`op_id` of the operation in progress")]
    progress: Annotated[NowProgress | None, says("How far that is; null like `operation`")]
    hmm_answers: Annotated[bool | None, says("Whether the HMM answers; null where nobody has looked yet")]
    pool_answers: Annotated[bool | None, says("Whether the worker pool answers; null like `hmm_answers`")]
    standby_processes: Annotated[int | None, says("Processes that wait for a seat; null where nobody has looked yet")]
    num_devices: Annotated[int | None, says("Devices, changed or not; null where nobody has looked yet")]
    devices: Annotated[list[NowDevice], says("Those that have changed")]
    ranks: Annotated[list[NowRank], says("Those whose load has changed, of the ranks that told theirs lately")]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process of the deployment. Ranks and standbys are the worker pool's: /v1/layout tells of them."""

    name: Annotated[str, says("What it is", "router")]
    state: Annotated[
        Literal["running", "ended", "restarting", "failing"],
        says("`ended`: a moment ago; `restarting`: it is started again soon; `failing`: it does not stay up"),
    ]
    pid: Annotated[int | None, says("Its process id, in the launcher's namespace; null where it does not run")]
    restarts: Annotated[
        int, says("How often it was started again since this launcher began, with the start that is due")
    ]
    reason: Annotated[str | None, says("How it ended last; null where it runs")]
    starts_unix: Annotated[float | None, says("When it is started again; null where it runs")]


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher keeps running."""

    is_known: Annotated[bool, says("A launcher runs here and has written down what it started")]
    reason: Annotated[str, says("Why nothing is known; empty where something is")]
    processes: Annotated[list[Process], says("Running ones first")]


class ExpertsOfRank(msgspec.Struct, frozen=True):
    """What is routed to the experts of one rank."""

    rank: Annotated[str, says("Its name", "r1t0")]
    slot: Annotated[int, says("Its place on the bus")]
    device: Annotated[str, says("Its device", "host:1")]
    experts: Annotated[int, says("Expert records on its device")]
    rows_per_step: Annotated[
        float | None, says("Rows that it computes in a step, over all layers; null: not told lately")
    ]
    imbalance: Annotated[float | None, says("The same over the mean of all ranks; 1: as much as others")]


class ExpertsView(msgspec.Struct, frozen=True):
    """Where each expert lives, and how often it was routed to in the last minutes, by sampled steps."""

    epoch: Annotated[int, says("Of the layout")]
    sampled_steps: Annotated[float, says("Steps that this rests on; old ones count less")]
    owners: Annotated[
        list[list[int]], says("`owners[layer][expert]`: the slot that computes it; dense layers are empty")
    ]
    load: Annotated[
        list[list[int]],
        says(
            "`load[layer][expert]`: rows that came for it, in thousandths of the layer's mean; empty: nothing is known"
        ),
    ]
    ranks: Annotated[list[ExpertsOfRank], says("The ranks of the layout")]
