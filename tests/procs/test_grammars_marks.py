"""A model whose marks are tokens, as people's are, through the whole system: an answer of a form behind what is thought
is the same whichever rank dies on either side of the mark, and calls that the model makes by itself satisfy their
schemas."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from elasticmoe.cli.models.byte_tokenizer import ASSISTANT, EOS_ID, USER, VOCAB_SIZE, build_byte_tokenizer
from tests.procs.deployment import Deployment
from tests.procs.router_harness import configure
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs

MODEL = "tiny-qwen3-moe"
HELLO: Any = [{"role": "user", "content": "Tell me."}]
MARKS = {USER: "</think>", ASSISTANT: "<tool_call>"}
CLOSE, CALL = (build_byte_tokenizer(VOCAB_SIZE).token_to_id(token) for token in MARKS)
TEMPLATE = (
    "{% if tools %}T{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking %}<think>\n{% else %}</think>{% endif %}{# <tool_call> #}"
)
WORDS = {"type": "array", "items": {"enum": ["tea", "mud", "sky"]}, "minItems": 60, "maxItems": 60}
SCHEMA = {"type": "object", "properties": {"words": WORDS}, "required": ["words"], "additionalProperties": False}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def deployment(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Of one rank, whose tokenizer has MARKS in the places of two other special tokens."""
    folder = tmp_path_factory.mktemp("marks") / MODEL
    shutil.copytree(model_folder(MODEL), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for token, mark in MARKS.items():
            text = text.replace(token, mark)
        (folder / name).write_text(text)
    configure(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    deployed = Deployment(folder, replicas=1, devices=2, standbys=1, max_model_len=1_024).wait_ready()
    try:
        yield deployed
        deployed.stop()
    finally:
        deployed.discard()


async def told(deployment: Deployment, kill_in: str = "") -> tuple[str, str]:
    """What is thought and what is said. The rank dies while the one or the other, `kill_in`, comes."""
    form = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
    body = {"model": MODEL, "messages": HELLO, "stream": True, "seed": 7, "max_tokens": 900, "response_format": form}
    body |= {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {str(CLOSE): 1.0}}
    said = {"reasoning_content": "", "content": ""}
    victim, killed = deployment.rank_pids()["r0t0"], False
    async with httpx.AsyncClient(base_url=deployment.base_url, timeout=300, trust_env=False) as http:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                delta = json.loads(line[6:])["choices"][0]["delta"]
                for field in said:
                    said[field] += delta.get(field) or ""
                if kill_in and not killed and len(said[kill_in]) > 3:
                    killed = deployment.kill("r0t0") == victim
    if kill_in:
        assert killed
        await asyncio.to_thread(
            wait_until, lambda: deployment.rank_pids().get("r0t0", victim) != victim, "the rank is replaced", 60.0
        )
    return said["reasoning_content"], said["content"]


async def test_thinking_and_the_form_behind_it_are_the_same_whenever_the_rank_dies(deployment: Deployment) -> None:
    thought, said = wanted = await told(deployment)
    assert len(thought) > 10
    assert re.match(r'\s*\{\s*"words"\s*:\s*\[\s*"(tea|mud|sky)"', said)
    for field in ("reasoning_content", "content"):
        assert await told(deployment, field) == wanted


def test_calls_that_the_model_makes_by_itself_satisfy_the_schemas_of_strict_tools(deployment: Deployment) -> None:
    """No rank is told to call: a mark comes by chance, in the middle of a text."""
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    with openai.OpenAI(base_url=f"{deployment.base_url}/v1", api_key="none", max_retries=0) as client:
        for seed in range(40):
            completion = client.chat.completions.create(
                model=MODEL,
                messages=HELLO,
                tools=tools,
                seed=seed,
                max_tokens=700,
                parallel_tool_calls=False,
                logit_bias={str(CALL): 3, str(EOS_ID): 2},
            )
            message: Any = completion.choices[0].message
            if completion.choices[0].finish_reason == "tool_calls" and message.content:
                (call,) = message.tool_calls
                assert call.function.name == "weather"
                jsonschema.validate(json.loads(call.function.arguments), WEATHER)
                return
    raise AssertionError("forty answers, and no text with a call in it")
