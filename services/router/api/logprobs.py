"""Log probabilities as OpenAI's clients read them: a list of entries in chat, columns in completions.

The chosen token is always among the alternatives, as one more where it is none of the most probable: whoever looks it
up finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.protocol.limits import LOGPROB_MIN
from common.protocol.router import Logprob
from services.router.api.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from services.router.detokenizer import TextStream, TokenTable
from services.router.streams import Stream, TokenInfo


class TokenNames:
    """How tokens are called in an answer: by their text, or `as_ids` as `token_id:17`."""

    def __init__(self, table: TokenTable, *, as_ids: bool) -> None:
        self.table = table
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        """In chat, where the bytes stand beside it."""
        return f"token_id:{token_id}" if self._as_ids else self.table.text_of(token_id)

    def label(self, token_id: int) -> str:
        """In completions, where partial characters have to differ."""
        return f"token_id:{token_id}" if self._as_ids else self.table.label_of(token_id)


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenInfo], num_top: int) -> ChatLogprobs:
    """Of a chat choice. With `num_top` 0 the entries have no alternatives."""
    return ChatLogprobs([_entry(names, token, num_top) for token in tokens])


def _entry(names: TokenNames, token: TokenInfo, num_top: int) -> TokenLogprob:
    bytes_of = names.table.bytes_of
    top = list(token.logprob.top[:num_top])
    if num_top and all(token_id != token.token_id for token_id, _ in top):
        top.append((token.token_id, token.logprob.token))
    return TokenLogprob(
        names.text(token.token_id),
        finite(token.logprob.token),
        list(bytes_of(token.token_id)),
        [TopLogprob(names.text(token_id), finite(value), list(bytes_of(token_id))) for token_id, value in top],
    )


def output_logprobs(names: TokenNames, tokens: Sequence[TokenInfo], num_top: int, offset: int) -> CompletionLogprobs:
    """Of a completion's tokens; `offset`: characters before the output."""
    return CompletionLogprobs(
        [names.label(token.token_id) for token in tokens],
        [finite(token.logprob.token) for token in tokens],
        [_top(names, token.token_id, token.logprob, num_top) for token in tokens],
        [offset + token.text_offset for token in tokens],
    )


def prompt_logprobs(names: TokenNames, stream: Stream, num_top: int) -> CompletionLogprobs:
    """Of a completion's prompt; the first token has no probability, because nothing comes before it."""
    ids = stream.submit.prompt
    known: Sequence[Logprob | None] = stream.prompt_logprobs or ()
    padded = [*[None] * (len(ids) - len(known)), *known[-len(ids) :]]
    padded[0] = None
    text, offsets = TextStream(names.table), []
    for token_id in ids:
        offsets.append(text.num_chars)
        text.feed(token_id)
    return CompletionLogprobs(
        [names.label(token_id) for token_id in ids],
        [None if logprob is None else finite(logprob.token) for logprob in padded],
        [
            None if logprob is None else _top(names, token_id, logprob, num_top)
            for token_id, logprob in zip(ids, padded, strict=True)
        ],
        offsets,
    )


def _top(names: TokenNames, token_id: int, logprob: Logprob, num_top: int) -> dict[str, float]:
    """The `num_top` best and the token itself. Of tokens with the same name the more probable stays, or the token."""
    top: dict[str, float] = {}
    for other, value in logprob.top[:num_top]:
        top.setdefault(names.label(other), finite(value))
    top[names.label(token_id)] = finite(logprob.token)
    return top


def finite(logprob: float) -> float:
    """JSON has no infinities and no NaN: whatever a rank says, -9999 at least, which is OpenAI's for impossible tokens,
    and 0 at most."""
    return min(0.0, max(LOGPROB_MIN, logprob))  # in this order a NaN becomes the least
