"""Log probabilities as OpenAI's clients read them: a list of entries in chat, columns in completions.

The chosen token is always among the alternatives, as one more where it is none of the most probable: whoever looks it
up finds it. They are rendered as they come, in pieces, so that a large answer takes nobody's turn; what is kept is the
JSON, which is smaller than what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from elasticmoe.common.protocol.limits import LOGPROB_MIN
from elasticmoe.common.protocol.router import Logprob
from elasticmoe.services.router.api.pieces import items_of, joined
from elasticmoe.services.router.api.told import CompletionLogprobs, TokenLogprob, TopLogprob
from elasticmoe.services.router.api.turns import Turns
from elasticmoe.services.router.dispatch.streams import TokenInfo
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable

_COLUMNS = tuple(name.encode() for name in CompletionLogprobs.__struct_fields__)
PIECE_TOKENS = 256  # that are rendered in one go: some milliseconds with all alternatives

Rows = tuple[list[str], list[float | None], list[dict[str, float] | None], list[int]]


class Teller:
    """How tokens and their alternatives are told: `num_top` of these, `as_ids` by names like `token_id:17`."""

    def __init__(self, table: TokenTable, num_top: int, *, as_ids: bool) -> None:
        self.table = table
        self._num_top = num_top
        self._text = _id_name if as_ids else table.text_of  # in chat, where the bytes stand beside it
        self._label = _id_name if as_ids else table.label_of  # in completions, where partial characters have to differ

    def entries(self, tokens: Sequence[TokenInfo]) -> list[TokenLogprob]:
        """Of a chat choice. With `num_top` 0 they have no alternatives."""
        return [self._entry(token.token_id, token.logprob) for token in tokens]

    def _entry(self, token_id: int, logprob: Logprob) -> TokenLogprob:
        text, bytes_of = self._text, self.table.bytes_of
        top = logprob.top[: self._num_top]
        if self._num_top and token_id not in [other for other, _ in top]:
            top = (*top, (token_id, logprob.token))
        return TokenLogprob(
            text(token_id),
            finite(logprob.token),
            list(bytes_of(token_id)),
            [TopLogprob(text(other), finite(value), list(bytes_of(other))) for other, value in top],
        )

    def rows(self, tokens: Sequence[TokenInfo], offset: int) -> Rows:
        """Of a completion's output, which `offset` characters stand before: what its columns become longer by."""
        return (
            [self._label(token.token_id) for token in tokens],
            [finite(token.logprob.token) for token in tokens],
            [self._top(token.token_id, token.logprob) for token in tokens],
            [offset + token.text_offset for token in tokens],
        )

    def prompt_rows(self, ids: Sequence[int], logprobs: Sequence[Logprob | None], offsets: list[int]) -> Rows:
        """Of a part of a prompt."""
        return (
            [self._label(token_id) for token_id in ids],
            [None if logprob is None else finite(logprob.token) for logprob in logprobs],
            [
                None if logprob is None else self._top(token_id, logprob)
                for token_id, logprob in zip(ids, logprobs, strict=True)
            ],
            offsets,
        )

    def _top(self, token_id: int, logprob: Logprob) -> dict[str, float]:
        """The best ones and the token itself. Of tokens with the same name the more probable stays, or the token."""
        label, best = self._label, logprob.top[: self._num_top]
        top = {label(other): finite(value) for other, value in best}
        if len(top) < len(best):
            top = {label(other): finite(value) for other, value in reversed(best)}
        top[label(token_id)] = finite(logprob.token)
        return top


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


class Entries:
    """A chat choice's log probabilities as JSON, rendered as they come."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._parts: list[bytes] = []

    def add(self, tokens: Sequence[TokenInfo]) -> None:
        """Render what came: PIECE_TOKENS at most in one go."""
        if tokens:
            self._parts.append(items_of(self._teller.entries(tokens)))

    def json(self) -> Iterator[bytes]:
        """A ChatLogprobs object, piece by piece."""
        yield b'{"content":['
        yield from joined(self._parts)
        yield b"]}"


class Columns:
    """The same of a completion: `offset` characters stand before its output, and `prompt`, where it is told too."""

    def __init__(self, teller: Teller, *, offset: int = 0, prompt: Columns | None = None) -> None:
        self._teller = teller
        self._offset = offset
        self._columns: list[list[bytes]] = [[*column] for column in prompt._columns] if prompt else [[], [], [], []]

    def add(self, tokens: Sequence[TokenInfo]) -> None:
        """Render what came: PIECE_TOKENS at most in one go."""
        if tokens:
            self._add(self._teller.rows(tokens, self._offset))

    async def add_prompt(self, ids: Sequence[int], logprobs: Sequence[Logprob], turns: Turns) -> None:
        """Render a prompt's tokens; the first has no probability, because nothing comes before it."""
        text = TextStream(self._teller.table)
        known: list[Logprob | None] = [*[None] * (len(ids) - len(logprobs)), *logprobs[-len(ids) :]]
        known[0] = None
        for start in range(0, len(ids), PIECE_TOKENS):
            await turns.wait()
            piece, offsets = ids[start : start + PIECE_TOKENS], []
            for token_id in piece:
                offsets.append(text.num_chars)
                text.feed(token_id)
            self._add(self._teller.prompt_rows(piece, known[start : start + PIECE_TOKENS], offsets))

    def json(self) -> Iterator[bytes]:
        """A CompletionLogprobs object, piece by piece."""
        for number, (name, column) in enumerate(zip(_COLUMNS, self._columns, strict=True)):
            yield b'%b"%b":[' % (b"," if number else b"{", name)
            yield from joined(column)
            yield b"]"
        yield b"}"

    def _add(self, rows: Rows) -> None:
        for column, row in zip(self._columns, cast(tuple[list[object], ...], rows), strict=True):
            column.append(items_of(row))


def finite(logprob: float) -> float:
    """JSON has no infinities and no NaN: whatever a rank says, -9999 at least, which is OpenAI's for impossible tokens,
    and 0 at most."""
    return min(0.0, max(LOGPROB_MIN, logprob))  # in this order a NaN becomes the least
