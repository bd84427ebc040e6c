// Node's two clients: fetch (undici) and http with an agent that keeps connections. Arguments: URL, body, and header
// fields as name, value, ... Prints a line per answer.

import http from "node:http";

const [url, body, ...rest] = process.argv.slice(2);
const fields = {};
for (let i = 0; i < rest.length; i += 2) fields[rest[i]] = rest[i + 1];
const print = (what, status, text) => console.log([what, status, text.trimEnd().replaceAll("\n", "|")].join("\t"));

const post = async (what) => {
  const answer = await fetch(url, { method: "POST", headers: fields, body });
  print(what, answer.status, await answer.text());
};
for (let i = 0; i < 3; i++) await post("fetch");
await Promise.all(Array.from({ length: 8 }, () => post("fetch in parallel")));

const pieces = new ReadableStream({
  start(controller) {
    for (const piece of body.match(/.{1,7}/gs)) controller.enqueue(new TextEncoder().encode(piece));
    controller.close();
  },
});
const streamed = await fetch(url, { method: "POST", headers: fields, body: pieces, duplex: "half" });
print("fetch in chunks", streamed.status, await streamed.text());
const head = await fetch(new URL("/health", url), { method: "HEAD", headers: fields });
print("fetch head", head.status, head.headers.get("content-length"));

const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
const ask = (what, method, target, more, pieces) =>
  new Promise((resolve, reject) => {
    const request = http.request(target, { method, agent, headers: { ...fields, ...more } }, (answer) => {
      let text = "";
      answer.on("data", (data) => (text += data));
      answer.on("end", () => resolve(print(what, answer.statusCode, method === "HEAD" ? "" : text)));
    });
    request.on("error", reject);
    if (more.Expect) request.on("continue", () => request.end(pieces.join("")));
    else {
      for (const piece of pieces) request.write(piece);
      request.end();
    }
  });
const length = { "Content-Length": Buffer.byteLength(body) };
await ask("agent", "POST", url, length, [body]);
await ask("agent in packets", "POST", url, length, [body.slice(0, 5), body.slice(5)]);
await ask("agent in chunks", "POST", url, {}, [body.slice(0, 5), body.slice(5)]);
await ask("agent expects", "POST", url, { ...length, Expect: "100-continue" }, [body]);
await ask("agent offers", "POST", url, { ...length, Connection: "Upgrade", Upgrade: "h2c" }, [body]);
await ask("agent head", "HEAD", new URL("/health", url), {}, []);
await ask("agent", "POST", url, length, [body]);
agent.destroy();
