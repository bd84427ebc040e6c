// OpenAI's client for Node: npm install; node openai_client.mjs [URL [MODEL]]

import OpenAI from "openai";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const apiKey = process.env.OPENAI_API_KEY ?? "none"; // of `up --api-key-file`, where there is one
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey });
const model = process.argv[3] ?? (await client.models.list()).data[0].id;

const asked = { model, messages: [{ role: "user", content: "What is the weather in Rome?" }], seed: 1, max_tokens: 32 };
const schema = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, days: { type: "integer", minimum: 1, maximum: 14 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", description: "Of a city", parameters: schema } }];

// A chat, whole and streamed.
const answer = await client.chat.completions.create(asked);
console.log("chat", JSON.stringify(answer.choices[0].message.content));
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
console.log("chat streamed", JSON.stringify(text));

// A tool that has to be called, whole and streamed: its arguments satisfy the schema.
asked.max_tokens = 400;
const called = await client.chat.completions.create({
  ...asked, tools, tool_choice: "required", parallel_tool_calls: false,
});
let call = called.choices[0].message.tool_calls[0].function;
console.log("tool", call.name, JSON.stringify(JSON.parse(call.arguments)));
const named = { type: "function", function: { name: "weather" } };
const stream = client.chat.completions.stream({ ...asked, tools, tool_choice: named });
call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0].function;
console.log("tool streamed", call.name, JSON.stringify(JSON.parse(call.arguments)));

// An answer of a form.
const form = { type: "json_schema", json_schema: { name: "trip", schema, strict: true } };
const formed = await client.chat.completions.create({ ...asked, response_format: form });
console.log("schema", JSON.stringify(JSON.parse(formed.choices[0].message.content)));

// What is wrong with a request.
try {
  await client.chat.completions.create({ ...asked, top_p: 3 });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log("refused", error.code, error.param);
}
try {
  await client.chat.completions.create({ ...asked, model: "no-such-model" });
} catch (error) {
  if (!(error instanceof OpenAI.NotFoundError)) throw error;
  console.log("not found", error.code);
}
