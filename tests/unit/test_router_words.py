"""Each word of a request is honoured, ignored for a stated reason, or refused by name, and docs/api.md has them all.

A word that is silently ignored gives another answer than was asked for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from anthropic.types import message_create_params as anthropic_messages
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat
from openai.types.responses import response_create_params as openai_responses

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api import messages_input, responses_input
from elasticmoe.services.router.api.messages_schemas import MessagesRequest
from elasticmoe.services.router.api.options import options_of, refuse_words
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.responses_schemas import ResponsesRequest
from elasticmoe.services.router.api.schemas import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    StreamOptions,
)
from elasticmoe.services.router.api.words import ANTHROPIC_WORDS, MESSAGE_WORDS, RESPONSES_WORDS, WORDS, Word
from elasticmoe.services.router.text.tokenizer import ServedModel

CHAT, COMPLETION = msgspec.json.Decoder(ChatRequest), msgspec.json.Decoder(CompletionRequest)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
BASES: dict[Any, dict[str, Any]] = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, COMPLETION: {"prompt": "x"}}
ASKING: tuple[Any, ...] = ({"a": 1}, ["a"], "something", 7, True, False, 0.5, "x" * 5_000)
# Words whose row says that they are for one endpoint: the other's struct has a field of that name.
FIELDS = {kind: set(kind.__struct_fields__) for kind in (ChatRequest, CompletionRequest)}


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def words_in(text: str) -> set[str]:
    return set(re.findall(r"`([a-z][a-z_0-9]*)`", text))


def supported(kind: type[msgspec.Struct]) -> set[str]:
    """The fields that are not there only to be refused."""
    hints = get_type_hints(kind, include_extras=True)
    return {name for name in kind.__struct_fields__ if name not in WORDS or msgspec.Raw not in _members(hints[name])}


def _members(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", ())


def options(model: ServedModel, decoder: Any, **body: Any) -> Any:
    request = parse(decoder, msgspec.json.encode({**BASES[decoder], "seed": 1, **body}))
    return options_of(request, model, max_tokens=request.max_tokens, logprobs=-1)


def refused_by(decoder: Any) -> list[str]:
    kind = ChatRequest if decoder is CHAT else CompletionRequest
    return sorted(set(WORDS) - supported(kind))


@pytest.mark.parametrize("decoder", [CHAT, COMPLETION], ids=["chat", "completions"])
def test_what_asks_for_something_is_refused_by_name(model: ServedModel, decoder: Any) -> None:
    for word in refused_by(decoder):
        neutral = WORDS[word].neutral
        asking = [
            value
            for value in ASKING
            if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
        ]
        assert len(asking) >= len(ASKING) - 1
        for value in asking:
            with pytest.raises(InvalidRequest) as caught:
                options(model, decoder, **{word: value})
            assert (caught.value.code, caught.value.param) == ("unsupported", word)
            assert caught.value.message.startswith(f"{word} is not supported: ")
            assert len(caught.value.message) < 200


@pytest.mark.parametrize("decoder", [CHAT, COMPLETION], ids=["chat", "completions"])
def test_what_asks_for_nothing_passes(model: ServedModel, decoder: Any) -> None:
    plain = options(model, decoder)
    for word in refused_by(decoder):
        empty: tuple[Any, ...] = () if WORDS[word].is_asking else ([], {}, "")
        for value in (None, *empty, *WORDS[word].neutral):
            assert options(model, decoder, **{word: value}) == plain, word


def test_a_search_with_defaults_is_a_search(model: ServedModel) -> None:
    for word in ("web_search_options", "moderation"):
        with pytest.raises(InvalidRequest):
            options(model, CHAT, **{word: {}})


def test_numbers_are_neutral_however_they_are_written_and_booleans_are_none(model: ServedModel) -> None:
    for value in (1, 1.0):
        options(model, CHAT, typical_p=value, best_of=value)
    for word in ("typical_p", "best_of", "mirostat"):
        with pytest.raises(InvalidRequest):
            options(model, CHAT, **{word: word != "mirostat"})


def test_values_that_are_hardly_json_are_refused(model: ServedModel) -> None:
    for value in (b'"\xff"', b"[" * 100 + b"]" * 100):
        raw = b'{"prompt":"x","guided_regex":' + value + b"}"
        request = parse(COMPLETION, raw)
        with pytest.raises(InvalidRequest, match="guided_regex"):
            options_of(request, model, max_tokens=None, logprobs=-1)


@pytest.mark.parametrize("word", MESSAGE_WORDS)
def test_words_of_messages(word: str) -> None:
    decoder = msgspec.json.Decoder(ChatMessage)
    body = {"role": "assistant", "content": "x"}
    for value in (None, *MESSAGE_WORDS[word].neutral):
        refuse_words(decoder.decode(msgspec.json.encode(body | {word: value})), MESSAGE_WORDS)
    message = decoder.decode(msgspec.json.encode(body | {word: {"id": "a"}}))
    with pytest.raises(InvalidRequest) as caught:
        refuse_words(message, MESSAGE_WORDS, "messages[3].")
    assert (caught.value.code, caught.value.param) == ("unsupported", f"messages[3].{word}")


# ---- the newer interfaces

RESPONSES, MESSAGES = msgspec.json.Decoder(ResponsesRequest), msgspec.json.Decoder(MessagesRequest)
NEWER: dict[str, tuple[Any, Any, dict[str, Word], dict[str, Any]]] = {
    "responses": (RESPONSES, responses_input.chat_of, RESPONSES_WORDS, {"input": "x"}),
    "messages": (
        MESSAGES,
        messages_input.chat_of,
        ANTHROPIC_WORDS,
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
    ),
}
# What is taken and not used there: docs/api.md says why.
NOT_USED = {"user", "metadata", "request_id", "model", "stream", "stream_options"}


def of_newer(name: str) -> set[str]:
    """The words that it refuses; the others are its own fields."""
    decoder, _, words, _ = NEWER[name]
    hints = get_type_hints(decoder.type, include_extras=True)
    return {word for word in words if msgspec.Raw in _members(hints[word])}


@pytest.mark.parametrize("name", NEWER)
def test_the_newer_interfaces_refuse_by_name_what_they_do_not_honour(name: str) -> None:
    """They took 200 for a request whose `stop`, `seed` or `structured_outputs` they had not read."""
    decoder, chat_of, words, base = NEWER[name]
    refused = of_newer(name)
    assert len(refused) > 100
    for word in refused:
        for value in (None, *words[word].neutral):
            chat_of(parse(decoder, msgspec.json.encode({**base, word: value})))
        with pytest.raises(InvalidRequest) as caught:
            chat_of(parse(decoder, msgspec.json.encode({**base, word: {"a": 1}})))
        assert (caught.value.code, caught.value.param) == ("unsupported", word)


@pytest.mark.parametrize("name", NEWER)
def test_no_reason_leads_to_a_word_that_is_refused_there(name: str) -> None:
    words, refused = NEWER[name][2], of_newer(name)
    for word in refused:
        led_to = set(re.findall(r"(?:use|or|called|in) ([a-z_.]+)", words[word].reason))
        assert not led_to & refused, word


def test_what_a_reason_leads_to_is_said_beside_it() -> None:
    for word in WORDS.values():
        led_to = set(re.findall(r"(?:use|or|called|in) ([a-z_]+)", word.reason))
        assert led_to & set(ChatRequest.__struct_fields__) - {"temperature"} <= set(word.instead), word


def test_what_claude_code_sends_unasked_passes() -> None:
    _, chat_of, _, base = NEWER["messages"]
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    chat_of(parse(MESSAGES, msgspec.json.encode({**base, "context_management": edits})))


@pytest.mark.parametrize("name", NEWER)
def test_each_word_of_chat_has_its_place_in_the_newer_interfaces(name: str) -> None:
    decoder = NEWER[name][0]
    assert set(ChatRequest.__struct_fields__) - NOT_USED <= set(decoder.type.__struct_fields__)


def test_each_word_of_their_clients_has_its_place() -> None:
    """Those that are not in the struct are among what docs/api.md says is ignored."""
    responses, messages = section("Responses"), section("Messages")
    for decoder, params, text in (
        (RESPONSES, openai_responses.ResponseCreateParamsBase, responses),
        (MESSAGES, anthropic_messages.MessageCreateParamsBase, messages),
    ):
        known = set(decoder.type.__struct_fields__) | words_in(text.partition("**Ignored**")[2].partition("\n- ")[0])
        assert set(params.__annotations__) <= known


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_document_has_what_is_refused() -> None:
    assert words_in(section("Refused").partition("|---|---|---|\n")[2]) >= {*WORDS, *MESSAGE_WORDS}
    rows = "\n".join(line.split("|")[1] for line in section("Refused").splitlines() if line.startswith("| "))
    assert words_in(rows) == {*WORDS, *MESSAGE_WORDS}


def test_the_document_has_what_is_honoured() -> None:
    both, chat, completions = (words_in(part) for part in section("Honoured").split("\n\n- ")[0].strip().split("\n\n"))
    common = supported(ChatRequest) & supported(CompletionRequest)
    assert both - {"text"} == common
    assert chat == supported(ChatRequest) - common
    assert completions == supported(CompletionRequest) - common
    assert set(StreamOptions.__struct_fields__) <= words_in(section("Honoured"))


def ignored() -> set[str]:
    rows = [line.split("|")[1] for line in section("Ignored").splitlines() if line.startswith("| `")]
    return words_in("\n".join(rows))


def test_what_is_ignored_changes_nothing(model: ServedModel) -> None:
    words = ignored()
    assert len(words) > 20
    assert not words & {*GenerateRequest.__struct_fields__, *FIELDS[ChatRequest], *FIELDS[CompletionRequest]}
    for decoder in (CHAT, COMPLETION):
        plain = options(model, decoder)
        for word in words:
            assert options(model, decoder, **{word: {"a": [1]}}) == plain


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatRequest, openai_chat.CompletionCreateParamsBase),
        (CompletionRequest, openai_completion.CompletionCreateParamsBase),
    ],
)
def test_each_word_of_openais_client_has_its_place(kind: type[msgspec.Struct], params: type) -> None:
    known = set(kind.__struct_fields__) | ignored()
    assert {*params.__annotations__, "stream"} <= known
