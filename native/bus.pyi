"""The shared-memory bus of one deployment: membership, abortable barriers, step publication, token exchange.

One segment, created and formatted by the HMM, mapped by every rank. Each rank has a slot (0 ≤ slot < ``max_ranks`` ≤ 64).
Membership has one writer, the HMM, except that members may make its staged publication current; everything else in a slot
has one writer, its rank. A process may be killed at any instruction: nothing it leaves behind blocks the others beyond the
next membership generation.

**Lockstep.** Members of a running generation make the same blocking calls (``step``, ``dispatch``, ``combine``)
in the same order. Each of them meets at exactly one barrier.

**Replicas.** Ranks of one replica (``set_replica``) meet apart from the others, too: ``reduce`` and ``gather`` are theirs
alone, in the same order on each of them, any number of them between two meetings of all. They begin, end and are aborted with
the same generations. A leader's ``write_plan`` comes before its arrival at a ``step``, the others' ``read_plan`` after it.

**Alone.** A rank that is no member yet warms up on a private bus: any zeroed, aligned memory formatted with ``max_ranks=1``.

**Replacing and removing.** A generation is the unit of recovery: whoever is replaced, or fails in mid-step, starts again at
count 0 in a greater generation. Before the HMM publishes a *running* generation, every process that has lost its slot must have
left or died (else it may still write into the areas of ranks that go on). The usual way is two generations: first
``running=False``, which makes everybody raise ``BusAborted``; then, when the leaving ranks have left, ``running=True``.

**Flipping.** Without a stop: the HMM stages a running membership upon the one in force (``stage_membership``); members who
see it (``staged``) say so as the flags of their next ``step``; when all flags of one step are that generation, nobody has
anything under way, and each calls ``flip`` instead of computing the step. The first one swings membership; the others get True
too, or, those that still wait in that step, ``BusAborted``. All start at count 0 in the new generation, and no step is lost.
A rank that the new membership leaves out has made its last arrival with that step, so it need not have left before.

Addresses are plain integers of this process; buffers are contiguous and owned by the caller, valid during the call. Blocking
calls release the GIL, and handle Python signals at least every 100 ms. Bad arguments raise ``ValueError``. The segment must
stay mapped as long as a ``Bus`` over it exists.
"""

from collections.abc import Sequence
from typing import Final

MAX_RANKS: Final[int]
"""The most rank slots a bus can have (64)."""

class BusAborted(RuntimeError):
    """The generation is over: membership changed, is not running, or another incarnation took the slot. Discard the step."""

    generation: int
    """The generation current when the wait was given up."""

class BusTimeout(TimeoutError):
    """The deadline passed before every member arrived. The arrival stands: the same call may be repeated to go on waiting."""

class BusDesync(RuntimeError):
    """Members made different calls at one barrier, or published nonsense: an error in the program, not a failure to recover from."""

def bus_bytes(
    max_ranks: int, max_tokens: int, hidden: int, top_k: int, half_elements: int = 0, plan_bytes: int = 0
) -> int:
    """Size of a segment. Most of it is area that takes real memory only once touched: for each rank
    ``max_tokens × (1 + top_k) × hidden × 4`` bytes of the exchange, and where replicas have several ranks
    ``2 × half_elements × 4`` for what it brings to their collectives and ``plan_bytes`` for the longest plan of a leader.
    ``ValueError`` where a parameter or the size is out of range."""

def format_bus(
    addr: int,
    nbytes: int,
    max_ranks: int,
    max_tokens: int,
    hidden: int,
    top_k: int,
    half_elements: int = 0,
    plan_bytes: int = 0,
) -> None:
    """Write the header into a segment of zeros (HMM only, before anyone opens it). ``addr`` is a multiple of 64."""

class Routing:
    """Owner slot of every expert of one layer. Immutable; the same on all members of a generation."""

    @property
    def num_experts(self) -> int: ...
    @property
    def owners(self) -> list[int]:
        """Owner slot by expert id; -1 where an expert has no home."""

def make_routing(owners: Sequence[int]) -> Routing:
    """Routing from the owner slot of each expert: -1 (no home; using the expert is then an error) or 0 ≤ slot < ``MAX_RANKS``."""

class Bus:
    """One participant's view of the segment.

    Blocking calls come from one thread at a time (``ValueError`` otherwise); all other methods may be called from any thread.
    """

    def __init__(self, addr: int, nbytes: int, slot: int = -1) -> None:
        """Open a formatted segment as ``slot``, or as an observer (-1), such as the HMM.

        ``ValueError`` where magic, version or geometry do not fit ``nbytes``.
        """

    @property
    def slot(self) -> int: ...
    @property
    def max_ranks(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """The most tokens of one rank in one exchange."""

    @property
    def hidden(self) -> int:
        """Elements of one token's row."""

    @property
    def top_k(self) -> int:
        """Expert choices of one token."""

    @property
    def half_elements(self) -> int:
        """The most float32 elements that a rank brings to one collective of its replica."""

    @property
    def plan_bytes(self) -> int:
        """The longest plan."""

    # Membership: written by the HMM alone, but for `flip`.
    def set_membership(self, generation: int, members: int, running: bool, epoch: int = 0) -> None:
        """Publish a generation and wake every waiter. ``members`` is a bit mask of slots, ``epoch`` (u64) the layout's.

        Whatever was staged is void from then on. ``ValueError`` unless ``generation`` is greater than the current one (a
        member may just have flipped to the staged one: read again) and < 2**32. A writer killed half-way leaves the old
        generation in force, and what was staged upon it.
        """

    def stage_membership(self, generation: int, members: int, epoch: int) -> None:
        """Offer the next *running* membership, that any member may then make current by ``flip``.

        Does nothing if just this is staged already. ``ValueError`` unless ``generation`` is greater than the current one and
        than any staged before, the current one is running, and nothing else is staged upon it (``set_membership`` makes that
        void). A writer killed half-way has staged nothing.
        """

    def staged(self) -> tuple[int, int, int]:
        """``(generation, members, epoch)`` of the membership that ``flip`` would make current now; ``(0, 0, 0)`` where none is
        staged or it has become current or void. Never blocks."""

    def flip(self, generation: int) -> bool:
        """Make the staged membership ``generation`` current and wake every waiter. Never blocks.

        True if that generation is current now, whoever made it so: read ``membership`` then. False if it is not staged, or
        another was published instead, such as a parked one. Only for those who know that all members agree (see above).
        """

    def membership(self) -> tuple[int, int, bool, int]:
        """``(generation, members, running, epoch)``, all of one publication; ``(0, 0, False, 0)`` before the first. Never blocks."""

    # The own slot and others' slots.
    def join(self, incarnation: int) -> None:
        """Take the own slot. ``incarnation`` (0 < u64) tells this process from its predecessor, which is fenced: if it still
        lives, its next blocking call raises ``BusAborted``."""

    def leave(self) -> None:
        """Give the own slot back (incarnation 0), unless another incarnation has taken it. Not a member afterwards by itself:
        the HMM publishes membership."""

    def bump_progress(self) -> None:
        """Count up the progress counter of the own slot: the rank's work loop is alive."""

    def progress(self, slot: int) -> int:
        """Progress counter of a slot. Counts on across incarnations."""

    def set_waiting_for_device(self, is_waiting: bool) -> None:
        """Say in the own slot that the rank waits for its device, or does no more. ``join`` says that it does not."""

    def is_waiting_for_device(self, slot: int) -> bool:
        """What the rank of a slot has said last."""

    def set_kv_blocks(self, num_blocks: int) -> None:
        """Say in the own slot how many KV blocks this rank has for its replica: the first rank of it, how many are in use;
        another one, how many it has mapped. What was said outlives the incarnation, as KV does. All ranks see what is said
        here and asked by ``kv_blocks`` in one and the same order."""

    def kv_blocks(self, slot: int) -> int:
        """What the rank of a slot has said last; 0 before it has said anything."""

    def tell_shortage(self, said: int) -> None:
        """Say in the own slot that this rank ends a generation because it found no memory for a step, before it ends it: a
        number that says which generation, and how large the step was (u64; services/worker/exchange/shm_barrier.py)."""

    def shortage(self, slot: int) -> int:
        """What the rank of a slot has said so last; 0 before it has."""

    # Meeting. `deadline_ms` is from now, ≥ 0; the own slot must be joined and a member (ValueError).
    def step(self, generation: int, num_tokens: int, flags: int, deadline_ms: float) -> list[tuple[int, int, int]]:
        """Publish ``num_tokens`` and ``flags`` (u32 both), meet, and return ``(slot, num_tokens, flags)`` of every member by slot.

        Repeated after ``BusTimeout`` it goes on waiting, and what was published first stands. ``BusAborted`` as soon
        as another generation is current or this one is not running; ``BusTimeout`` at the deadline.
        """

    def idle_wait(self, generation: int, deadline_ms: float) -> bool:
        """Sleep without arriving, until a peer waits at the next barrier: True.

        False at the deadline. ``BusAborted`` as in ``step``. An idle rank waits here rather than stepping with no tokens.
        """

    # Token exchange of one MoE layer: dispatch, experts, combine.
    def dispatch(
        self,
        routing: Routing,
        generation: int,
        x_addr: int,
        ids_addr: int,
        w_addr: int,
        n: int,
        rows_addr: int,
        rows_cap: int,
        counts_addr: int,
        deadline_ms: float,
    ) -> int:
        """Send own tokens to the experts' owners and collect the rows for own experts. Returns their number.

        In: ``x`` float32 [n, hidden], ``ids`` int32 [n, top_k] global expert ids (-1 = unused), ``w`` float32 [n, top_k];
        0 ≤ n ≤ ``max_tokens``. Out: ``rows`` float32 [rows_cap, hidden], sorted by (expert, source slot, token), and
        ``counts`` int32 [num_experts], rows of each expert (0 for those of other owners). At most
        ``top_k × sum of all members' n`` rows. ``x``, ``ids`` and ``w`` need not outlive the call.

        ``ValueError`` for an id out of range or without a home among the members (before arriving), or if ``rows_cap`` is
        too small (after arriving: the step is lost). Raises as ``step`` does.
        """

    def combine(
        self, routing: Routing, generation: int, y_addr: int, out_addr: int, n: int, deadline_ms: float
    ) -> None:
        """Return expert outputs to their tokens' ranks and sum: ``out[t] = Σ_j w[t, j] · y(ids[t, j])``.

        In: ``y`` float32 [rows, hidden], in the row order of the last ``dispatch``; the same ``routing`` and ``n``. Out:
        ``out`` float32 [n, hidden]. The sum runs over j in ascending order whoever owns the experts, so the result does
        not depend on the layout. A token without experts gets zeros. Raises as ``step`` does.
        """

    # The same exchange where rows travel elsewhere: between the memories of devices.
    def plan(
        self,
        routing: Routing,
        generation: int,
        ids_addr: int,
        n: int,
        fetched_addr: int,
        answered_addr: int,
        rows_cap: int,
        returned_addr: int,
        counts_addr: int,
        deadline_ms: float,
    ) -> list[tuple[int, int, int, int]]:
        """``dispatch`` with ids alone: meets, and says which rows go where. Own rows must be readable for all before it.

        Returns, of every member by slot, ``(slot, tokens, rows, returned_at)``: the tokens that it brought, how many rows of
        them are for own experts, and where the answers to those begin among the rows that are returned to it.

        In: ``ids`` as of ``dispatch``. Out, all int64 but the last: ``fetched`` [rows_cap], for each row in the order of
        ``dispatch`` the token that it is of, counted through the tokens of all members by slot; ``answered`` [rows_cap], the
        rows in the order in which answers are returned, member by member; ``returned`` [n, top_k], where the answer to each own
        choice is among the rows that are returned here, -1 where it is unused; ``counts`` int32 [num_experts].

        Raises as ``dispatch`` does.
        """

    def meet_combined(self, routing: Routing, generation: int, n: int, deadline_ms: float) -> None:
        """``combine`` without rows: when it returns, all answers to the last ``plan`` have been returned. Own ones must have been
        before it. Raises as ``combine`` does."""

    def set_cores(self, cores: int) -> None:
        """Cores that the members of this host share: those of the machine until it is said. With fewer cores than members
        nobody spins while it waits. Any thread. ``ValueError`` below 1."""

    # Between the ranks of one replica. `deadline_ms` and what is raised: as of `step`.
    def set_replica(self, slots: Sequence[int]) -> None:
        """The slots of the own replica's ranks, in their order (by tp index), the own one among them. Between two
        collectives only; the same on all of them. ``ValueError`` for a slot that is there twice or out of range."""

    def reduce(
        self, generation: int, x_addr: int, rows_addr: int, out_addr: int, n: int, width: int, deadline_ms: float
    ) -> None:
        """``out`` = rows that each of the replica's ranks has, plus what all of them bring, added in their order.

        In: ``x`` float32 [n, width], what this rank brings; 0 where nobody brings any. ``rows`` float32 [n, width], of which
        rank t of N has those from n·t // N to n·(t + 1) // N; 0 where nobody has any. Out: ``out`` float32 [n, width], the same
        on all; it may be one of them. A row's sum begins with ``rows``.

        ``ValueError`` for more than ``half_elements`` elements of both together, or where a rank of the replica is no member;
        ``BusDesync`` where ranks say another ``n`` or ``width``.
        """

    def gather(self, generation: int, x_addr: int, out_addr: int, n: int, total: int, deadline_ms: float) -> None:
        """``out`` = ``x`` of all ranks of the replica, side by side. In: ``x`` float32 [n, own columns], those from
        total·t // N to total·(t + 1) // N. Out: ``out`` float32 [n, total]; 0 where only others want it. Raises as
        ``reduce``; the largest share of the columns counts for ``half_elements``."""

    def write_plan(self, plan: bytes) -> None:
        """Put what the replica's other ranks are to read after the next ``step``. ``ValueError`` for more than
        ``plan_bytes``."""

    def read_plan(self, generation: int) -> bytes:
        """What the replica's first rank has put before the last ``step``, if something is computed in that one: until its
        first collective. ``BusAborted`` where the generation is over."""

    # Figures.
    def take_wait_ns(self) -> int:
        """Nanoseconds spent waiting for others in barriers since the last call."""

    def take_exchange_ns(self) -> int:
        """Nanoseconds spent in ``step`` and in the calls of the exchange, waiting included, since the last call."""
