"""One request while a rank works on it."""

from __future__ import annotations

from common.protocol.rank import Submit


class Sequence:
    """A request's tokens and KV. Owned by the scheduler; only the rank's loop thread touches it.

    `tokens`: prompt and output so far. `kv_len`: how many of them have their KV written (the committed position).
    `blocks`: KV block ids by position. `row`: its ledger row while it runs, -1 while it waits.
    `num_sent`: output tokens that were reported to the router.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "deadline",
        "kv_len",
        "logged",
        "num_sent",
        "peer",
        "request",
        "row",
        "tokens",
    )

    def __init__(self, request: Submit, peer: bytes, arrival: int, deadline: float) -> None:
        self.request = request
        self.peer = peer
        self.arrival = arrival
        self.deadline = deadline
        self.tokens: list[int] = list(request.prompt)
        self.kv_len = 0
        self.blocks: list[int] = []
        self.row = -1
        self.cached = 0  # leading blocks that are registered in the prefix cache
        self.logged = 0  # leading blocks that its ledger row names
        self.num_sent = 0

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every row of the prompt is still needed: it must be computed, not taken from the prefix cache."""
        return self.request.prompt_logprobs and self.num_output == 0

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: lower runs first and is preempted last."""
        return (self.request.priority, self.arrival)

    def finish_reason(self, max_model_len: int) -> str | None:
        """`stop` when the last token ends the sequence, `length` at a limit, else None."""
        if self.num_output == 0:
            return None
        if self.tokens[-1] in self.request.stop_token_ids and self.num_output > self.request.min_tokens:
            return "stop"
        if self.num_output >= self.request.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        return None
