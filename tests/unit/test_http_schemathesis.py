"""The OpenAPI documents are true: whatever schemathesis draws from them, valid or not, is answered with a status, a
media type and a body that the document names, and what breaks a bound is refused (promise P15).

The apps are those of test_http_surfaces.py, which draws what no document allows. Neither document has a status of 500.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from elasticmoe.common.protocol.router import Delta, Logprob
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher
from elasticmoe.services.router.dispatch.streams import Stream
from elasticmoe.services.scaler.control.admission import Accepted, CommandAnswer, Order, SetPolicy
from elasticmoe.services.scaler.policy.record import PolicyRecord
from tests.unit import test_http_surfaces as surfaces
from tests.unit.test_scaler_admin import Listener, snapshot_of
from tests.unit.transitions import SIZES, UP, World, operation_of

pytestmark = pytest.mark.slow

App = Callable[..., Any]

empty_router = surfaces.router
starting_admin = surfaces.admin
# What is valid and yet refused, for the most part: names of other models, and what is not supported.
REFUSED = ("model", "tools", "tool_choice", "response_format", "suffix", "best_of", "stream_options")
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection]


class Answering(Dispatcher):
    """Ends each stream at once, with one token."""

    def max_model_len(self) -> int:
        return 4_096

    def readiness(self, now: float) -> tuple[bool, str]:
        return True, "this test answers"

    def open(self, stream: Stream, now: float) -> None:
        sampling, num_prompt = stream.submit.sampling, len(stream.submit.prompt)
        logprob = Logprob(-0.5, tuple((97 + i, -0.5 - i) for i in range(sampling.logprobs)))
        noted = (logprob,) * (num_prompt - 1) if stream.submit.prompt_logprobs else None
        chosen = (logprob,) if sampling.logprobs >= 0 else None
        stream.accept(Delta(stream.submit.request_id, 0, (97,), "length", None, chosen, noted), now)


@pytest.fixture(scope="module")
def serving_router(tmp_path_factory: pytest.TempPathFactory) -> App:
    return surfaces.make_router(tmp_path_factory.mktemp("s"), Answering)


class Accepting(Listener):
    """Takes every order."""

    def _handle(self, order: Any) -> CommandAnswer:
        if isinstance(order, SetPolicy):
            return PolicyRecord(2, order.config, order.config)
        is_dry_run = isinstance(order, Order) and order.is_dry_run
        return Accepted(operation_of(UP), UP, SIZES) if is_dry_run else Accepted(operation_of(UP))


@pytest.fixture
def serving_admin() -> Iterator[App]:
    listener = Accepting(snapshot_of(World(UP.before), operation=operation_of(UP)))
    yield listener.app
    listener.loop.close()


def check(app: App, headers: dict[str, str], *, num_examples: int) -> set[tuple[str, str, int]]:
    """Try all that the document names; what was answered: (method, path, status)."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    seen: set[tuple[str, str, int]] = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in surfaces.STREAMS:
            continue
        # Where there is no body there is nothing that would break the document.
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
            @given(case=strategy, is_plain=st.booleans() if mode is GenerationMode.POSITIVE else st.just(False))
            def try_all(case: Case, is_plain: bool) -> None:
                if isinstance(case.body, dict) and is_plain:
                    case.body = {name: value for name, value in case.body.items() if name not in REFUSED}
                answer = case.call(headers=headers)
                seen.add((case.method, case.path, answer.status_code))
                assert answer.status_code != 500  # documented for engines that fail, not for what a listener does
                # Refused for its size, which the document names, before anybody looks what is in it.
                is_too_large = answer.status_code == 413
                case.validate_response(answer, checks=CHECKS[:3] if is_too_large else CHECKS)

            try_all()
    return seen


def test_the_routers_document_is_true_without_replicas(empty_router: App) -> None:
    seen = check(empty_router, {}, num_examples=4)
    assert {status for _, _, status in seen} >= {200, 400, 503}


def test_the_routers_document_is_true_while_it_serves(serving_router: App) -> None:
    seen = check(serving_router, {}, num_examples=15)
    assert {status for _, _, status in seen} >= {200, 400, 404}


STREAMED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2], "echo": True, "logprobs": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2},
}


NAMED: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "a", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
}


@pytest.mark.parametrize("path", NAMED)
def test_named_events_are_what_the_document_says(serving_router: App, path: str) -> None:
    operation = schemathesis.openapi.from_asgi("/openapi.json", serving_router)[path]["POST"]
    case = operation.Case(body={"stream": True, **NAMED[path]}, media_type="application/json")
    answer = case.call()
    assert answer.status_code == 200, answer.content
    case.validate_response(answer, checks=CHECKS[:3])
    false = case.call()
    false.content = false.content.replace(b'"type":', b'"kind":')
    with pytest.raises(FailureGroup):
        case.validate_response(false, checks=CHECKS[:3])


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_the_events_of_a_stream_are_what_the_document_says(serving_router: App, path: str, options: Any) -> None:
    operation = schemathesis.openapi.from_asgi("/openapi.json", serving_router)[path]["POST"]
    body = {"model": "m", "stream": True, "stream_options": options, "max_tokens": 1, **STREAMED[path]}
    case = operation.Case(body=body, media_type="application/json")
    answer = case.call()
    assert answer.status_code == 200, answer.content
    assert answer.content.endswith(b"data: [DONE]\n\n")
    case.validate_response(answer, checks=CHECKS[:3])
    false = case.call()
    false.content = false.content.replace(b'"index":', b'"indices":')
    with pytest.raises(FailureGroup):  # events are looked into
        case.validate_response(false, checks=CHECKS[:3])


def test_the_admin_document_is_true_before_anything_serves(starting_admin: App) -> None:
    seen = check(starting_admin, {"Authorization": "Bearer t"}, num_examples=25)
    assert {status for _, _, status in seen} >= {200, 400, 503}


def test_the_admin_document_is_true_while_all_serves(serving_admin: App) -> None:
    seen = check(serving_admin, {"Authorization": "Bearer secret"}, num_examples=25)
    assert {status for _, _, status in seen} >= {200, 202, 400, 404}
