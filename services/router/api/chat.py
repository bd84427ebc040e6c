"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.reasoning import Marks
from elasticmoe.services.router.api.answer import Answer, Renderer
from elasticmoe.services.router.api.answer_reader import AnswerForm
from elasticmoe.services.router.api.chat_renderer import ChatRenderer
from elasticmoe.services.router.api.conversation import conversation_of
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.field_names import CHAT, COMPLETION_TOKENS, FieldNames
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import caller_of, client_of, front_of, permit_of, request_id_of
from elasticmoe.services.router.api.generate import Generation, counting_refusals, start, with_grammar
from elasticmoe.services.router.api.options import Options, options_of
from elasticmoe.services.router.api.parse import body_of
from elasticmoe.services.router.api.schemas import ChatRequest
from elasticmoe.services.router.api.told import ChatCompletion, ChatCompletionChunk
from elasticmoe.services.router.api.tool_use import ToolUse, tool_use, tools_of
from elasticmoe.services.router.grammar.structure import Thought
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.template import REASONING_FIELDS

routes = APIRouter()
_decoder = msgspec.json.Decoder(ChatRequest)


@routes.post("/v1/chat/completions", **describe(ChatRequest, ChatCompletion, chunk=ChatCompletionChunk))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation, as one answer or (`stream`) token by token."""
    front = front_of(request)
    raw = await body_of(request, _decoder)
    names = CHAT if raw.max_completion_tokens is None else COMPLETION_TOKENS
    chat = await start_chat(request, raw, kind="chatcmpl", names=names)
    answer_id = f"chatcmpl-{request_id_of(request, raw.request_id)}"
    renderer = ChatRenderer(answer_id, front, chat.options, chat.form)
    return answer_of(front, chat, renderer)


class StartedChat(NamedTuple):
    """One that runs: its generation, how it was asked for, and how its text is read (None: it is nothing but text).
    `is_strict`: tools that do not say whether they are strict are."""

    generation: Generation
    options: Options
    form: AnswerForm | None
    is_strict: bool


async def start_chat(
    request: Request, raw: ChatRequest, *, kind: str, names: FieldNames = CHAT, is_strict: bool = False
) -> StartedChat:
    """Submit it. `kind`: what its choices are called by. `names`: what the client calls chat's fields. `is_strict`:
    tools that do not say whether they are strict are, where all of them can be. Raises what `start` raises,
    InvalidRequest and NotFound."""
    with names.in_errors():
        return await _started(request, raw, kind, is_strict=is_strict)


async def _started(request: Request, raw: ChatRequest, kind: str, *, is_strict: bool) -> StartedChat:
    front = front_of(request)
    front.check_model(raw.model)
    options = _options(raw, front)
    context = front.dispatcher.max_model_len()
    conversation = conversation_of(raw)
    tools, structure = tool_use(raw, tools_of(raw), front.tool_parser, options.structure)
    client = client_of(request)
    with counting_refusals(front, options.num_choices):
        prompt, tail = await front.texts.encode_chat(conversation, context, client)
        form = _form(raw, front, tools, conversation, tail)
        thought = _thought(front, conversation, tail)
        strict = await _with_strict_tools(front, raw, options, thought, client) if is_strict else None
        options = strict or await with_grammar(front, options._replace(structure=structure), thought, client)
    front.model.check_embedded(prompt)
    kept = front.model.special_ids(form.specials) if form else frozenset[int]()
    caller = caller_of(request, raw.request_id)
    generation = await start(front, permit_of(request), caller, options, [prompt], kind=kind, kept=kept)
    return StartedChat(generation, options, form, strict is not None)


async def _with_strict_tools(
    front: Front, raw: ChatRequest, options: Options, thought: Thought | None, client: str
) -> Options | None:
    """The options with a grammar by which tools are strict that do not say so; None where not all of them can be."""
    try:
        _, structure = tool_use(raw, tools_of(raw), front.tool_parser, options.structure, is_strict=True)
        return await with_grammar(front, options._replace(structure=structure), thought, client)
    except InvalidRequest:
        return None


def answer_of(front: Front, chat: StartedChat, renderer: Renderer) -> Answer:
    """Its answer, streamed or not."""
    keepalive_s = front.config.stream_keepalive_s
    return Answer(chat.generation, renderer, is_stream=chat.options.is_stream, keepalive_s=keepalive_s)


def _form(
    raw: ChatRequest, front: Front, tools: ToolUse | None, conversation: Conversation, tail: str
) -> AnswerForm | None:
    """None where the answer is nothing but text. `tail`: the prompt's last characters."""
    marks = front.reasoning
    if tools is None and marks is None:
        return None
    is_inside, is_separated = _is_inside(marks, conversation, tail), raw.separate_reasoning is not False
    return AnswerForm(tools, marks, is_inside, raw.include_reasoning is not False, is_separated)


def _is_inside(marks: Marks | None, conversation: Conversation, tail: str) -> bool:
    """Whether the answer begins with thinking whose opening mark the prompt has."""
    if marks is None:
        return False
    return tail.rstrip().endswith(marks.open) or conversation.continue_final_message in REASONING_FIELDS


def _thought(front: Front, conversation: Conversation, tail: str) -> Thought | None:
    """What the model thinks before an answer that has to look like something, where it may."""
    marks = front.reasoning
    if marks is None or tail.rstrip().endswith(marks.close):
        return None
    is_inside = _is_inside(marks, conversation, tail)
    if conversation.continue_final_message and not is_inside:
        return None
    return Thought(marks.open, marks.close, is_inside)


def _options(raw: ChatRequest, front: Front) -> Options:
    if raw.top_logprobs and not raw.logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs", param="top_logprobs")
    most = raw.max_completion_tokens if raw.max_completion_tokens is not None else raw.max_tokens
    logprobs = (raw.top_logprobs or 0) if raw.logprobs else -1
    defaults = front.defaults
    return options_of(
        raw,
        front.model,
        max_tokens=most,
        logprobs=logprobs,
        default_tokens=defaults.max_new_tokens,
        defaults=defaults,
        allow_priority=front.config.allow_priority,
    )
