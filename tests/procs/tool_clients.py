"""What people's clients read of one answer with calls: its text, and each call's name and arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.procs.router_fakes import WAIT_S
from tests.procs.router_harness import MODEL, plain_client

HELLO: Any = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
Read = tuple[str, list[tuple[str, Any]]]


def by_openai(url: str, *, is_streamed: bool) -> Read:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS}
    with plain_client("") as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S, http_client=http)
        if is_streamed:
            with client.chat.completions.stream(**asked) as stream:  # checks the chunks and puts them together
                choice: Any = stream.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    return choice.message.content, calls


def by_anthropic(url: str, *, is_streamed: bool, max_tokens: int = 200) -> Read:
    tools: Any = [{"name": "weather", "input_schema": PARAMETERS}, {"name": "now", "input_schema": {"type": "object"}}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": tools, "max_tokens": max_tokens}
        if is_streamed:
            with client.messages.stream(**asked) as stream:
                message: Any = stream.get_final_message()
        else:
            message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    said = "".join(block.text for block in message.content if block.type == "text")
    return said, [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def by_langchain(url: str, *, is_streamed: bool) -> Read:
    langchain_openai = pytest.importorskip("langchain_openai")
    with httpx.Client(trust_env=False) as http:
        chat = langchain_openai.ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", http_client=http)
        chat = chat.bind_tools(TOOLS)
        chunks = list(chat.stream("Hi")) if is_streamed else [chat.invoke("Hi")]
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    return message.content, [(call["name"], call["args"]) for call in message.tool_calls]


_LITELLM = """
import json, sys
import litellm

asked, url, is_streamed = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
answer = litellm.completion(**asked, api_base=f"{url}/v1", api_key="none", stream=is_streamed)
whole = litellm.stream_chunk_builder(list(answer), messages=asked["messages"]) if is_streamed else answer
message = whole.choices[0].message
calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
print(json.dumps([message.content, calls]))
"""


def by_litellm(url: str, *, is_streamed: bool) -> Read:
    """In a process of its own: it leaves threads and connections behind."""
    if find_spec("litellm") is None:
        pytest.skip("litellm is not installed")
    asked = json.dumps({"model": f"openai/{MODEL}", "messages": HELLO, "tools": TOOLS})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LITELLM, asked, url, str(is_streamed)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks GitHub for prices
    )
    assert done.returncode == 0, done.stderr
    said, calls = json.loads(done.stdout.splitlines()[-1])
    return said, [(name, arguments) for name, arguments in calls]
