/** The admin API. Every request goes to the page's own origin, with the token in a header. */

import { token } from "./session.js";

/** A refusal: the API's `code`, its text, and `param`, the field that it is about. `status` 0: nobody answered. */
export class Refusal extends Error {
  constructor(status, code, message, param = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/** Ask; the answer and its bytes. Throws Refusal. */
export async function ask(method, path, body) {
  const headers = { authorization: `Bearer ${token()}` };
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  let text;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: AbortSignal.timeout(20_000),
    });
    text = await answer.text();
  } catch {
    throw new Refusal(0, "no_answer", "the scaler does not answer");
  }
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Refusal(answer.status, "no_answer", "the answer is not the scaler's");
  }
  if (!answer.ok) {
    const error = value.error ?? {};
    throw new Refusal(answer.status, error.code ?? "unknown", error.message ?? `status ${answer.status}`, error.param);
  }
  return { value, bytes: text.length };
}

export const get = (path) => ask("GET", path);

/** A name for an order: whoever gives it again with the same name begins nothing more. */
export function newOpId() {
  const parts = crypto.getRandomValues(new Uint8Array(6));
  return `op-${[...parts].map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}

/**
 * Server-sent events after the one of `lastId`, each given to `onEvent(id, event)`; `onPast` is called once those that
 * there are already have been told. Resolves when the stream ends; throws Refusal where it does not begin.
 */
export async function listen(path, lastId, onEvent, onPast, signal) {
  const headers = { authorization: `Bearer ${token()}`, "last-event-id": lastId };
  let answer;
  try {
    answer = await fetch(path, { headers, cache: "no-store", credentials: "omit", redirect: "error", signal });
  } catch {
    throw new Refusal(0, "no_answer", "the scaler does not answer");
  }
  if (!answer.ok) {
    const { error } = await answer.json();
    throw new Refusal(answer.status, error.code, error.message);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block === ": heartbeat") onPast();
      const fields = Object.fromEntries(
        block.split("\n").map((line) => [line.split(":", 1)[0], line.slice(line.indexOf(":") + 2)]),
      );
      if (fields.data !== undefined) onEvent(fields.id, JSON.parse(fields.data));
    }
  }
}
