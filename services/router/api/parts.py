"""Of how many parts a JSON document consists, counted before it is decoded: a list is as long in memory as it is
decoded, whatever bound it breaks."""

from __future__ import annotations

from elasticmoe.common.protocol.errors import InvalidRequest

CONTAINERS_MAX = 16_384  # arrays and objects: four for each of the most messages
STRINGS_MAX = 131_072  # names and texts: eight for each of those
VALUES_MAX = 262_144  # of all kinds, beside the tokens that the contexts of a batch hold
PIECE_BYTES = 256 * 1024  # counted in one go: some milliseconds, whatever it consists of


class BodyParts:
    """What has been seen of one document, which comes in pieces. `tokens_max`: of all its prompts together."""

    def __init__(self, tokens_max: int) -> None:
        self._values_max = tokens_max + VALUES_MAX
        self._num_quotes = 0
        self._num_containers = 0
        self._num_values = 0
        self._escape = b""  # which the last piece ended with

    def count(self, piece: bytes) -> None:
        """Look at the next piece, of PIECE_BYTES at most. Raises InvalidRequest once there is more of a kind than any
        request has. What is no JSON is counted somehow: decoding refuses it."""
        if b"\\" in piece or self._escape:
            piece = self._unescaped(piece)
        texts = piece.split(b'"')
        outside = b"".join(texts[self._num_quotes % 2 :: 2])
        self._num_quotes += len(texts) - 1
        self._num_containers += outside.count(b"[") + outside.count(b"{")
        self._num_values += outside.count(b",")
        for what, count, most in (
            ("texts and names", self._num_quotes // 2, STRINGS_MAX),
            ("arrays and objects", self._num_containers, CONTAINERS_MAX),
            ("values", self._num_values, self._values_max),
        ):
            if count > most:
                raise InvalidRequest(
                    f"the body has {count} {what} or more; the limit is {most}", code="body_too_complex"
                )

    def _unescaped(self, piece: bytes) -> bytes:
        """Without escaped quotes, which begin and end no text."""
        piece = self._escape + piece
        num_last = len(piece) - len(piece.rstrip(b"\\"))
        self._escape = b"\\" * (num_last % 2)
        piece = piece[: len(piece) - len(self._escape)]
        return piece.replace(b"\\\\", b"").replace(b'\\"', b"")
