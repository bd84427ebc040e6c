"""Chat templates, rendered as transformers renders them: constructs, options, contents, and wrong templates."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from elasticmoe.cli.models.byte_tokenizer import build_byte_tokenizer
from elasticmoe.common.protocol.errors import CheckpointError, InvalidRequest
from elasticmoe.services.router.text.template import TEMPLATE_CHARS_MAX, ChatTemplate
from tests.unit.template_samples import TEMPLATES

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hello world"}],
    "spaces": [{"role": "user", "content": "  hé <b>\n\n"}, {"role": "assistant", "content": " ans \n"}],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nanswer", "reasoning_content": "because"},
        {"role": "user", "content": "three", "name": "Ann"},
    ],
    "reasoning": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "r"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "thinking": "t"},
    ],
    "twice-user": [{"role": "user", "content": "a"}, {"role": "user", "content": ""}],
}
OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": False, "continue_final_message": "reasoning_content"},
    {
        "add_generation_prompt": True,
        "documents": [{"title": "T", "text": "x"}, {"title": "U", "text": "y"}],
        "variables": {"enable_thinking": False, "level": 3, "extra": {"x": [1]}, "flags": ["a", "b"], "sep_token": "-"},
    },
]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=build_byte_tokenizer(),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        unk_token="<|user|>",
        model_specific_special_tokens={"image_token": "<|assistant|>"},
    )


def expected(
    reference: PreTrainedTokenizerFast, template: str, conversation: list[dict[str, Any]], options: dict[str, Any]
) -> str | None:
    """transformers' text; None for whatever it raises."""
    given = {name: value for name, value in options.items() if name != "variables"} | options.get("variables", {})
    try:
        text = reference.apply_chat_template(conversation, tokenize=False, chat_template=template, **given)
    except Exception:
        return None
    assert isinstance(text, str)
    return text


def rendered(
    reference: PreTrainedTokenizerFast, template: str, conversation: list[dict[str, Any]], options: dict[str, Any]
) -> str | None:
    """Our text; None where the template or the conversation is refused."""
    try:
        return ChatTemplate(template, reference.special_tokens_map).render(conversation, **options)
    except (CheckpointError, InvalidRequest):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template(reference: PreTrainedTokenizerFast, name: str) -> None:
    for what, conversation in CONVERSATIONS.items():
        for options in OPTIONS:
            given = expected(reference, TEMPLATES[name], conversation, options)
            assert rendered(reference, TEMPLATES[name], conversation, options) == given, (what, options)


def test_the_samples_are_what_they_say(reference: PreTrainedTokenizerFast) -> None:
    """At least sixty render; those that are wrong do not."""
    texts = {name: expected(reference, text, CONVERSATIONS["system"], OPTIONS[0]) for name, text in TEMPLATES.items()}
    assert sum(text is not None for text in texts.values()) >= 60
    assert {name for name, text in texts.items() if text is None} >= {"syntax-error", "unclosed", "raise", "huge-range"}


def test_random_compositions(reference: PreTrainedTokenizerFast) -> None:
    rng = random.Random(11)
    names = [
        name for name, text in TEMPLATES.items() if expected(reference, text, CONVERSATIONS["one"], {}) is not None
    ]
    for _ in range(150):
        template = "".join(TEMPLATES[name] for name in rng.sample(names, 3))
        conversation = rng.choice(list(CONVERSATIONS.values()))
        options = rng.choice(OPTIONS)
        given = expected(reference, template, conversation, options)
        assert rendered(reference, template, conversation, options) == given, template


PARTS = [{"type": "text", "text": " a "}, {"type": "text", "text": "b\n"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TEMPLATES["content-parts"], "user:ab;"),  # it takes lists: as transformers
        ('Answer as {"type": "object"}.' + TEMPLATES["content-parts"], 'Answer as {"type": "object"}.user:ab;'),
        (TEMPLATES["chatml"], "<|im_start|>user\n a \nb\n<|im_end|>\n<|im_start|>assistant\n"),  # as vLLM joins them
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", " a b\n"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", ""),  # it reads but the first: no list
    ],
)
def test_parts(reference: PreTrainedTokenizerFast, template: str, text: str) -> None:
    compiled = ChatTemplate(template, reference.special_tokens_map)
    assert compiled.render([{"role": "user", "content": PARTS}]) == text
    theirs = expected(reference, template, [{"role": "user", "content": PARTS}], {"add_generation_prompt": True})
    assert theirs in (text, None) or "content[0]" in template


def test_a_text_for_a_template_that_only_takes_parts() -> None:
    template = ChatTemplate("{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}", {})
    assert template.render([{"role": "user", "content": "whole"}]) == "[whole]"
    assert template.render([{"role": "user", "content": "whole"}], continue_final_message=True) == "[whole"


def test_a_final_message_of_parts() -> None:
    template = ChatTemplate(TEMPLATES["content-parts"] + "end", {})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": PARTS}]
    assert template.render(messages, continue_final_message=True) == "user:q;assistant:ab"


@pytest.mark.parametrize(
    ("template", "field", "text"),
    [
        ("{{ messages[0].role }}", "content", "does not read 'content'"),
        ("{{ messages[0].content | upper }}", "content", "changes the final message or leaves it out"),
        ("{{ messages[0].content[:1] }}", "content", "changes the final message or leaves it out"),
        ("{{ messages[0].content }}", "thinking", "has no 'thinking' to continue"),
    ],
)
def test_final_messages_that_cannot_be_continued(template: str, field: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        ChatTemplate(template, {}).render([{"role": "user", "content": "abc"}], continue_final_message=field)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{% for i in range(9999999) %}{% endfor %}",
    ],
)
def test_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot render"):
        ChatTemplate(source + "{{ messages[9].content.x }}", {}).render([{"role": "user", "content": "hi"}])


def test_a_client_cannot_send_a_template() -> None:
    assert (
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "{{ 7 * 7 }}"}])
        == "{{ 7 * 7 }}"
    )


@pytest.mark.parametrize(
    "source", ["x" * (TEMPLATE_CHARS_MAX + 1), "{{ 1 // 0 }}{% if %}", "{{ 10 ** 5000 }}", "{% generation %}"]
)
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, {})


def test_refusals_of_the_template_itself() -> None:
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])


def test_which_variables_are_read() -> None:
    template = ChatTemplate("{% set a = 1 %}{{ a }}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}", {})
    assert template.takes("reasoning_effort")
    assert not template.takes("a")
