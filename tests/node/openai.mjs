// Asks a server of softserve with OpenAI's own npm package, unmodified.
//
//     node tests/node/openai.mjs PROGRAM
//
// Starts PROGRAM with the demo. Fails with the first answer that is not what OpenAI's package documents.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import OpenAI, { toFile } from "openai";

const home = mkdtempSync(join(tmpdir(), "softserve-openai-"));
const child = spawn(process.argv[2], ["serve", "--listen=127.0.0.1:0"], {
  env: { PATH: process.env.PATH, HOME: home, XDG_DATA_HOME: home }, stdio: ["ignore", "pipe", "ignore"] });
let url;
for await (const line of createInterface({ input: child.stdout })) {
  if (line.trim().startsWith("listen")) {
    url = line.trim().split(/\s+/)[1];
    break;
  }
}
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const TEXT = "The food was cold and the waiter rude.";
const messages = [{ role: "user", content: TEXT }];

const checks = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes("sentiment") && ids.includes("softserve-demo"), ids.join());
  },
  async completions() {
    const answer = await client.completions.create({ model: "sentiment", prompt: TEXT, logprobs: 2 });
    assert.equal(answer.choices[0].text, "negative");
    assert.ok(answer.choices[0].logprobs.token_logprobs[0] < 0 && answer.usage.total_tokens > 0);
  },
  async chat() {
    const answer = await client.chat.completions.create({ model: "sentiment", messages, logprobs: true, top_logprobs: 2 });
    assert.equal(answer.choices[0].message.content, "negative");
    assert.equal(answer.choices[0].logprobs.content[0].top_logprobs.length, 2);
  },
  async "a stream"() {
    const stream = await client.chat.completions.create({ model: "story", messages, max_tokens: 12, stream: true, stream_options: { include_usage: true } });
    let text = "", usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.ok(text.length > 0 && usage.completion_tokens > 0);
  },
  async "JSON by a schema"() {
    const schema = { type: "object", properties: { mood: { enum: ["glad", "sad"] } }, required: ["mood"], additionalProperties: false };
    const answer = await client.chat.completions.parse({ model: "sentiment", messages, max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "mood", strict: true, schema } } });
    assert.ok(["glad", "sad"].includes(JSON.parse(answer.choices[0].message.content).mood));
  },
  async decisions() {
    const questions = [{ type: "choice", name: "mood", choices: [{ value: "positive" }, { value: "negative" }] }];
    const answer = await client.post("/decisions", { body: { model: "sentiment", input: TEXT, questions } });
    assert.equal(answer.answers[0].value ?? answer.answers[0].choice, "negative", JSON.stringify(answer));
  },
  async batches() {
    const lines = [0, 1, 2].map((i) => JSON.stringify({ custom_id: `r${i}`, method: "POST", url: "/v1/completions", body: { model: "sentiment", prompt: TEXT } }));
    const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
    let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/completions", completion_window: "24h" });
    while (!["completed", "failed"].includes(batch.status)) batch = await client.batches.retrieve(batch.id);
    assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
    const output = await (await client.files.content(batch.output_file_id)).text();
    assert.equal(JSON.parse(output.split("\n")[0]).response.body.choices[0].text, "negative");
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ model: "topik", messages }), (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
    await assert.rejects(client.chat.completions.create({ model: "topic", messages, temperature: -1 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  },
};

try {
  for (const [name, check] of Object.entries(checks)) {
    await check();
    console.log(`passed: ${name}`);
  }
} finally {
  child.kill();
  rmSync(home, { recursive: true, force: true });
}
