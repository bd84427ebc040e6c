"""OpenAI's client for Python: pip install openai; python openai_client.py [URL [MODEL]]"""

import json
import os
import sys

import openai

key = os.environ.get("OPENAI_API_KEY", "none")  # of `up --api-key-file`, where there is one
url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id

messages = [{"role": "user", "content": "What is the weather in Rome?"}]
asked = {"model": model, "messages": messages, "seed": 1, "max_tokens": 32}
schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": schema}}]

# A chat, whole and streamed.
answer = client.chat.completions.create(**asked)
print("chat", json.dumps(answer.choices[0].message.content))
parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
print("chat streamed", json.dumps("".join(parts)))

# A tool that has to be called, whole and streamed: its arguments satisfy the schema.
asked["max_tokens"] = 400
answer = client.chat.completions.create(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
call = answer.choices[0].message.tool_calls[0].function
print("tool", call.name, json.dumps(json.loads(call.arguments)))
named = {"type": "function", "function": {"name": "weather"}}
with client.chat.completions.stream(**asked, tools=tools, tool_choice=named) as stream:
    call = stream.get_final_completion().choices[0].message.tool_calls[0].function
print("tool streamed", call.name, json.dumps(json.loads(call.arguments)))

# An answer of a form.
form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": True}}
answer = client.chat.completions.create(**asked, response_format=form).choices[0].message.content
print("schema", json.dumps(json.loads(answer)))

# What is wrong with a request.
try:
    client.chat.completions.create(**asked, top_p=3)
except openai.BadRequestError as error:
    print("refused", error.code, error.param)
try:
    client.with_options(max_retries=0).chat.completions.create(**asked | {"model": "no-such-model"})
except openai.NotFoundError as error:
    print("not found", error.code)
