"""LangChain: pip install langchain-openai; python langchain_client.py [URL [MODEL]]"""

import json
import os
import sys

import openai
from langchain_openai import ChatOpenAI

key = os.environ.get("OPENAI_API_KEY", "none")  # of `up --api-key-file`, where there is one
url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
where = {"base_url": f"{url}/v1", "api_key": key}
model = sys.argv[2] if len(sys.argv) > 2 else openai.OpenAI(**where).models.list().data[0].id

question = "What is the weather in Rome?"
schema = {
    "title": "weather",
    "description": "Of a city",
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}

# A chat, whole and streamed.
chat = ChatOpenAI(model=model, seed=1, max_tokens=32, **where)
print("chat", json.dumps(chat.invoke(question).content))
print("chat streamed", json.dumps("".join(chunk.content for chunk in chat.stream(question))))

# A tool that has to be called, whole and streamed: its arguments satisfy the schema.
chat = ChatOpenAI(model=model, seed=1, max_tokens=400, **where)
(call,) = chat.bind_tools([schema], tool_choice="required", parallel_tool_calls=False).invoke(question).tool_calls
print("tool", call["name"], json.dumps(call["args"]))
whole = None
for chunk in chat.bind_tools([schema], tool_choice="weather").stream(question):
    whole = chunk if whole is None else whole + chunk
(call,) = whole.tool_calls
print("tool streamed", call["name"], json.dumps(call["args"]))

# An answer of a form.
print("schema", json.dumps(chat.with_structured_output(schema, method="json_schema").invoke(question)))

# What is wrong with a request: the errors of OpenAI's client.
try:
    chat.invoke(question, top_p=3)
except openai.BadRequestError as error:
    print("refused", error.code, error.param)
try:
    chat.invoke(question, model="no-such-model")
except openai.NotFoundError as error:
    print("not found", error.code)
