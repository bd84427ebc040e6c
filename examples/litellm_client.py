"""LiteLLM: pip install litellm; python litellm_client.py [URL [MODEL]]"""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices when it is imported
import litellm
import openai

litellm.suppress_debug_info = True  # hints that it prints beside every error
url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
key = os.environ.get("OPENAI_API_KEY", "none")  # of `up --api-key-file`, where there is one
model = sys.argv[2] if len(sys.argv) > 2 else openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id

messages = [{"role": "user", "content": "What is the weather in Rome?"}]
asked = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key, "messages": messages, "seed": 1}
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
answer = litellm.completion(**asked, max_tokens=32)
print("chat", json.dumps(answer.choices[0].message.content))
parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, max_tokens=32, stream=True)]
print("chat streamed", json.dumps("".join(parts)))

# A tool that has to be called, whole and streamed: its arguments satisfy the schema.
asked["max_tokens"] = 400
answer = litellm.completion(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
call = answer.choices[0].message.tool_calls[0].function
print("tool", call.name, json.dumps(json.loads(call.arguments)))
named = {"type": "function", "function": {"name": "weather"}}
chunks = list(litellm.completion(**asked, tools=tools, tool_choice=named, stream=True))
call = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message.tool_calls[0].function
print("tool streamed", call.name, json.dumps(json.loads(call.arguments)))

# An answer of a form.
form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": True}}
answer = litellm.completion(**asked, response_format=form).choices[0].message.content
print("schema", json.dumps(json.loads(answer)))

# What is wrong with a request.
try:
    litellm.completion(**asked, top_p=3)
except litellm.BadRequestError as error:
    print("refused", error.status_code, "top_p" in str(error))
try:
    litellm.completion(**asked | {"model": "openai/no-such-model"})
except litellm.NotFoundError as error:
    print("not found", error.status_code)
