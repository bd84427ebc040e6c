"""Calls of each form, as people's clients read them, streamed and not: the model calls by itself, in the way that its
chat template shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from elasticmoe.services.router.answer_parsers.forms import PARSERS
from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import RouterProcess, configure, running_router, serving, write_model
from tests.procs.tool_clients import Read, by_anthropic, by_langchain, by_openai
from tests.written_calls import WAYS, Call

pytestmark = pytest.mark.procs

CALLED: list[Call] = [("weather", {"city": 'Å "b" <c>'}), ("now", {}), ("weather", {"city": "Rome\nItaly"})]
SIGNS = {parser.name: sign for parser, sign in PARSERS}


@pytest.fixture(scope="module", params=sorted(SIGNS))
def spoken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A form, and a router whose model's template shows that it is its own."""
    folder = tmp_path_factory.mktemp("form")
    model = write_model(folder / "model")
    template = "{% if tools %}T{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    configure(model / "tokenizer_config.json", chat_template=f"{template}{{# {SIGNS[request.param]} #}}")
    with running_router(folder, model=model) as router:
        yield request.param, router


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "by", [by_openai, partial(by_anthropic, max_tokens=1_000), by_langchain], ids=["openai", "anthropic", "langchain"]
)
def test_calls_by_clients(spoken: tuple[str, RouterProcess], by: Callable[..., Read], is_streamed: bool) -> None:
    form, router = spoken
    rank = FakeRank(router.sockets)
    rank.max_model_len = 2_048
    with serving(router, rank):
        for way in (way for way in WAYS if way.split()[0] == form):
            rank.answer = Reply(b"Let me see.\n" + WAYS[way](CALLED).encode(), per_step=7)
            said, calls = by(router.url, is_streamed=is_streamed)
            assert said.strip() == "Let me see.", way
            assert calls == CALLED, way
