"""What must hold before a rank goes on with another one's sequence. Pure."""

from __future__ import annotations

from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.rank import HandOver
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import BlockHold, Sequence


def check_hand_over(
    scheduler: Scheduler,
    geometry: KvGeometry,
    hold: BlockHold,
    message: HandOver,
    sequence: Sequence,
    *,
    has_followers: bool,
) -> None:
    """Whether `message` fits to the place that `hold` keeps and makes `sequence`; `has_followers`: its blocks have
    parts on other ranks, too. Raises InvalidRequest for figures that do not fit together."""
    num_tail = max(0, scheduler.blocks.blocks_for(message.kv_len) - message.num_copied)
    num_noted = len(message.prompt_logprobs or ())
    for is_wrong, what in (
        (tuple(sequence.tokens[: len(hold.tokens)]) != hold.tokens, "tokens do not begin as was said"),
        (sequence.num_output >= message.request.max_tokens, f"{sequence.num_output} output tokens"),
        (sequence.num_sent > sequence.num_output, f"{sequence.num_sent} tokens sent"),
        (len(sequence.tokens) >= scheduler.capacity_tokens, f"{len(sequence.tokens)} tokens"),
        (sequence.kv_len >= len(sequence.tokens), f"KV of {sequence.kv_len} tokens"),
        (sequence.kv_len > 0 and hold.row < 0, "KV without a row"),
        (not hold.num_cached <= message.num_copied <= len(hold.blocks), f"{message.num_copied} blocks copied"),
        (message.num_copied > scheduler.blocks.blocks_for(sequence.kv_len), f"{message.num_copied} blocks copied"),
        (has_followers and num_tail > 0, f"{num_tail} blocks not copied on all ranks"),
        (len(message.tail) != num_tail * geometry.block_bytes, f"a tail of {len(message.tail)} bytes"),
        (
            sequence.wants_prompt_logprobs and num_noted != sequence.kv_len,
            f"log probabilities of {num_noted} prompt tokens",
        ),
    ):
        if is_wrong:
            text = f"sequence {message.request.request_id} cannot be taken over: {what}"
            raise InvalidRequest(text, code="bad_hand_over")
