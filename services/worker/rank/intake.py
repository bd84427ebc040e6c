"""What routers and other ranks have checked already, checked again where a bad index would hurt every tenant. Pure."""

from __future__ import annotations

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.rank import Submit


def check_ids(request: Submit, output: tuple[int, ...], vocab: int) -> None:
    """Whether all token ids of a request are of the model. Raises ElasticMoEError `token_out_of_range`; numbers below 0
    are no messages (protocol/rank.py)."""
    for name, ids in (
        ("prompt", request.prompt),
        ("output", output),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in request.sampling.logit_bias)),
    ):
        if ids and max(ids) >= vocab:
            raise ElasticMoEError(
                f"{name} has token id {max(ids)}; the vocabulary has {vocab}", code="token_out_of_range"
            )
