"""What every endpoint works with: one bundle, made by the service and handed to the app."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from elasticmoe.common.config import RouterConfig
from elasticmoe.common.protocol.errors import NotFound
from elasticmoe.services.router.answer_parsers.forms import parser_of
from elasticmoe.services.router.answer_parsers.reasoning import Marks, marks_of
from elasticmoe.services.router.answer_parsers.tools import ToolParser
from elasticmoe.services.router.api.sampling_defaults import SamplingDefaults, read_defaults
from elasticmoe.services.router.api.turns import Turns
from elasticmoe.services.router.dispatch.admission import ByteBudget, Permits
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher
from elasticmoe.services.router.grammar.structures import Structures
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.texts import Texts, Workers
from elasticmoe.services.router.text.tokenizer import ServedModel

if TYPE_CHECKING:
    from elasticmoe.common.tracing.spans import Spans

BODIES_MAX = 16  # bodies of the largest size that are in memory at once
ANSWERS_MAX = 2  # answers of the largest size


@dataclass(slots=True)
class Front:
    """The parts of a running router. `defaults`: of requests that do not say how to sample. `tool_parser`: of the form
    in which the model writes calls, where that is known; `reasoning`: the marks around what it thinks, where it does.
    `spans`: writes those of requests, where they are traced. `is_draining`: no new requests; those that run may end.
    `api_key` None: open."""

    config: RouterConfig
    model: ServedModel
    texts: Texts
    structures: Structures
    dispatcher: Dispatcher
    metrics: Metrics
    permits: Permits
    bodies: ByteBudget
    answers: ByteBudget
    defaults: SamplingDefaults
    tool_parser: type[ToolParser] | None
    reasoning: Marks | None
    turns: Turns = field(default_factory=Turns)
    api_key: bytes | None = None
    spans: Spans | None = None
    is_draining: bool = False
    started_unix: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for a model that is not served here; none given means the only one."""
        if name is not None and name != self.model.name:
            raise NotFound(f"model {name[:80]!r} is not served here", code="model_not_found")


def make_front(
    config: RouterConfig,
    model: ServedModel,
    workers: Workers,
    dispatcher: Dispatcher,
    metrics: Metrics,
    api_key: bytes | None,
    spans: Spans | None = None,
) -> Front:
    """The bundle with its limits taken from `config`, and the model's defaults. Raises CheckpointError."""
    texts = Texts(model.codec, workers)
    return Front(
        config=config,
        model=model,
        texts=texts,
        structures=Structures(model, texts, dispatcher.vocabulary),
        dispatcher=dispatcher,
        metrics=metrics,
        permits=Permits(config.requests_max),
        bodies=ByteBudget(BODIES_MAX * config.body_bytes_max),
        answers=ByteBudget(ANSWERS_MAX * config.answer_bytes_max, "answers"),
        defaults=read_defaults(Path(config.model), config.generation_config),
        tool_parser=parser_of(config.tool_call_parser, model.codec.template_text),
        reasoning=marks_of(config.reasoning_parser, model.codec.template_text),
        api_key=api_key,
        spans=spans,
    )
