// The calls of an answer as OpenAI's client for Node reads them: node several_calls.mjs URL REQUEST (streamed|whole)

import { createRequire } from "node:module";

const OpenAI = createRequire(`${process.cwd()}/`)("openai");
const [url, request, manner] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const asked = JSON.parse(request);
const answer = await (manner === "streamed"
  ? client.chat.completions.stream(asked).finalChatCompletion() // checks the chunks and puts them together
  : client.chat.completions.create(asked));
const { message, finish_reason: reason } = answer.choices[0];
const calls = (message.tool_calls ?? []).map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
console.log(JSON.stringify([message.content, calls, reason]));
