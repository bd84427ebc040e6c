"""Anthropic's client for Python: pip install anthropic; python anthropic_client.py [URL [MODEL]]"""

import json
import os
import sys

import anthropic

key = os.environ.get("ANTHROPIC_API_KEY", "none")  # of `up --api-key-file`, where there is one
url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = anthropic.Anthropic(base_url=url, api_key=key)
model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id

messages = [{"role": "user", "content": "What is the weather in Rome?"}]
asked = {"model": model, "messages": messages, "max_tokens": 32, "extra_body": {"temperature": 0}}
schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
tools = [{"name": "weather", "description": "Of a city", "input_schema": schema}]

# A message, whole and streamed.
answer = client.messages.create(**asked)
print("chat", json.dumps("".join(block.text for block in answer.content)))
with client.messages.stream(**asked) as stream:
    print("chat streamed", json.dumps("".join(stream.text_stream)))

# A tool that has to be called, whole and streamed: its input satisfies the schema.
asked = {"model": model, "messages": messages, "max_tokens": 400}
choice = {"type": "any", "disable_parallel_tool_use": True}
(call,) = client.messages.create(**asked, tools=tools, tool_choice=choice).content
print("tool", call.name, json.dumps(call.input))
with client.messages.stream(**asked, tools=tools, tool_choice={"type": "tool", "name": "weather"}) as stream:
    (call,) = stream.get_final_message().content
print("tool streamed", call.name, json.dumps(call.input))

# An answer of a form.
form = {"type": "json_schema", "schema": schema}
answer = client.messages.create(**asked, output_config={"format": form}).content[0].text
print("schema", json.dumps(json.loads(answer)))

# What is wrong with a request.
try:
    client.messages.create(**asked | {"max_tokens": 0})
except anthropic.BadRequestError as error:
    print("refused", error.body["error"]["code"], error.body["error"]["param"])
try:
    client.messages.create(**asked | {"model": "no-such-model"})
except anthropic.NotFoundError as error:
    print("not found", error.body["error"]["code"])
