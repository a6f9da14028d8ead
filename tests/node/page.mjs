// The page at /, in a real browser: every view, with mouse and with keyboard, looked at by axe-core.
//
//     node tests/node/page.mjs PROGRAM [FOLDER FOR SCREENSHOTS]
//
// Starts PROGRAM with the demo. Needs Chromium at $CHROMIUM or /usr/bin/chromium.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const [program, shots] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const home = mkdtempSync(join(tmpdir(), "softserve-page-"));

/** A server of the demo, and its address. */
async function serve(home, ...more) {
  const child = spawn(program, ["serve", "--listen=127.0.0.1:0", ...more], {
    env: { PATH: process.env.PATH, HOME: home, XDG_DATA_HOME: home }, stdio: ["ignore", "pipe", "ignore"] });
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.trim().startsWith("listen")) return [child, line.trim().split(/\s+/)[1]];
  }
  throw new Error("the server did not start");
}

const [child, url] = await serve(home);
const [guarded, guardedUrl] = await serve(join(home, "guarded"), "--api-key=the-api-key", "--admin-key=the-admin-key");
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const errors = [];
let scheme;

async function open(context, address = url) {
  const page = await context.newPage();
  // A policy that blocks something says so here.
  page.on("console", (message) => {
    if (message.type() === "error" && !/status of (401|403|404|422)/.test(message.text())) errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(error.message));
  await page.goto(address);
  return page;
}

async function accessible(page, what) {
  // The page's policy allows no script of others: axe runs beside it.
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] }));
  const serious = violations.filter((v) => ["serious", "critical"].includes(v.impact));
  assert.deepEqual(serious.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 120))]), [], what);
}

async function shot(page, name) {
  if (!shots || scheme !== "light") return;
  // Without what was just told.
  await page.waitForFunction(() => !document.getElementById("status").textContent);
  await page.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
}

/** A prompt of keys and values for the demo: its configuration and its tensors, as files. */
function keysAndValues() {
  const model = JSON.parse(readFileSync(join(here, "../../models/demo/config.json"), "utf8"));
  const [layers, heads] = [model.num_hidden_layers, model.num_key_value_heads];
  const width = heads * (model.head_dim ?? model.hidden_size / model.num_attention_heads);
  const config = { peft_type: "PREFIX_TUNING", task_type: "CAUSAL_LM", num_virtual_tokens: 2, num_layers: layers, num_attention_heads: heads, token_dim: width };
  const rows = new Float32Array(2 * layers * 2 * width).fill(0.01);
  const header = JSON.stringify({ prompt_embeddings: { dtype: "F32", shape: [2, layers * 2 * width], data_offsets: [0, rows.byteLength] } });
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  const files = [["adapter_config.json", Buffer.from(JSON.stringify(config))], ["adapter_model.safetensors", Buffer.concat([length, Buffer.from(header), Buffer.from(rows.buffer)])]];
  return files.map(([name, content]) => {
    writeFileSync(join(home, name), content);
    return [name, join(home, name)];
  });
}

const checks = {
  async tasks(page) {
    await page.waitForSelector("text=question-answering");
    assert.ok(await page.locator("tbody tr").count() >= 5);
    await accessible(page, "tasks");
    await shot(page, "page-tasks");
    await page.click("tbody >> text=sentiment");
    await page.waitForSelector("h1:has-text('sentiment')");
    assert.match(await page.textContent("table"), /accuracy/);
    await accessible(page, "a task");
  },

  async "what is in a version"(page) {
    await page.goto(`${url}/#/tasks/sentiment`);
    await page.waitForSelector("h2:has-text('What is in a version')");
    // By keyboard: the choice, then its button.
    await page.getByLabel("Version", { exact: true }).focus();
    await page.keyboard.press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.textContent), "Show what is in it");
    await page.keyboard.press("Enter");
    const curve = page.getByAltText(/^Loss curve of version/);
    await curve.waitFor();
    await page.waitForFunction(() => document.querySelector("img.curve").naturalWidth > 100);
    const table = page.getByRole("table", { name: /virtual tokens/ });
    assert.equal(await table.locator("tbody tr").count(), 32);
    // The number, the norm, and five words with their similarity.
    const row = await table.locator("tbody tr").first().innerText();
    assert.match(row, /^0\s+\d+\.\d{3}\s+("|#\d)/);
    assert.equal(row.match(/ 0\.\d\d(?=,|$)/g)?.length, 5, row);
    await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("What is in version"));
    await accessible(page, "what is in a version");
    await shot(page, "page-contents");
    await page.getByRole("button", { name: "Copy as curl" }).last().click();
    await page.waitForSelector("text=Copied.");
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^curl '.*\/versions\/[0-9a-f]{12}\/nearest\?count=5'$/);
  },

  async "try it, with probabilities, labels and another side"(page) {
    await page.goto(`${url}/#/try/sentiment`);
    await page.getByLabel("Input", { exact: true }).fill("The food was cold and the waiter rude.");
    await page.getByLabel("Beside it").selectOption("base");
    await page.getByRole("button", { name: "Ask" }).click();
    await page.waitForSelector("text=ended by stop");
    await page.waitForSelector(".panel >> nth=1 >> text=ended by");
    assert.equal(await page.locator(".panel").count(), 2);
    const token = page.locator(".panel").first().locator(".token").first();
    assert.match(await token.textContent(), /^negative/);
    await token.hover();
    await page.waitForSelector(".token .tip:visible");
    assert.match(await token.locator(".tip").textContent(), /% {2}"positive"/);
    await page.waitForSelector("meter[aria-label^=negative]");
    await accessible(page, "try it");
    await shot(page, "page-try");
    await page.getByLabel("Beside it").selectOption("words");
    await page.getByRole("button", { name: "Ask" }).click();
    await page.waitForSelector("h2:has-text('in words')");
    await page.waitForSelector(".panel >> nth=1 >> text=ended by");
  },

  async measure(page) {
    await page.goto(`${url}/#/measure/sentiment`);
    const lines = ["A fine evening.\tpositive", "The food was cold and the waiter rude.\tnegative", '{"input": "I love it", "label": "positive"}'];
    await page.getByLabel("Labelled lines").fill(Array.from({ length: 20 }, (_, i) => lines[i % 3]).join("\n"));
    await page.getByRole("button", { name: "Measure" }).click();
    await page.waitForSelector("#accuracy");
    assert.match(await page.textContent("#accuracy"), /of 20/);
    await page.waitForSelector("svg[role=img] rect");
    await accessible(page, "measure");
    await shot(page, "page-measure");
    await page.getByLabel("Labelled lines").fill("no label here");
    await page.getByRole("button", { name: "Measure" }).click();
    await page.waitForSelector("[role=alert]:has-text('line 1')");
  },

  async "upload, refused and stored, then activated and rolled back"(page) {
    const files = readdirSync(home, { recursive: true });
    const folder = (task) => join(home, dirname(files.find((path) => path.includes(`${task}/`) && path.endsWith("adapter_config.json"))));
    const own = folder("sentiment");
    await page.goto(`${url}/#/upload/moods`);
    // Dropped, as from a file manager.
    const drop = async (files) => {
      const given = files.map(([name, path]) => [name, [...readFileSync(path)]]);
      const transfer = await page.evaluateHandle((given) => {
        const transfer = new DataTransfer();
        for (const [name, content] of given) transfer.items.add(new File([new Uint8Array(content)], name));
        return transfer;
      }, given);
      await page.dispatchEvent(".drop", "drop", { dataTransfer: transfer });
      await page.getByRole("button", { name: "Upload" }).click();
    };
    await drop([["adapter_config.json", join(here, "package.json")], ["adapter_model.safetensors", join(own, "adapter_model.safetensors")]]);
    await page.waitForSelector("text=Refused; nothing was stored");
    await accessible(page, "a refused upload");
    const names = readdirSync(own).filter((name) => ["adapter_config.json", "adapter_model.safetensors", "task.json"].includes(name));
    await drop(names.map((name) => [name, join(own, name)]));
    await page.waitForSelector("text=Stored as version");
    await accessible(page, "upload");
    // Another version: another task's prompt, from the task's own page.
    await drop(names.map((name) => [name, join(folder("topic"), name)]));
    await page.waitForSelector("text=Stored as version");
    await page.goto(`${url}/#/tasks/moods`);
    await page.waitForSelector("text=answers");
    const active = () => page.locator("tr:has-text('answers') code").textContent();
    const before = await active();
    await page.getByRole("button", { name: /^Activate/ }).click();
    await page.waitForFunction((before) => document.querySelector("tbody strong")?.closest("tr").querySelector("code").textContent !== before, before);
    assert.notEqual(await active(), before);
    await shot(page, "page-task");
    // Both were stored without a curve.
    await page.getByRole("button", { name: "Show what is in it" }).click();
    await page.waitForSelector("text=No loss curve was stored with it");
    assert.equal(await page.locator("img").count(), 0);
    await page.goto(`${url}/#/upload/layers`);
    await page.waitForSelector("h1:has-text('Upload')");
    await drop(keysAndValues());
    await page.waitForSelector("text=Stored as version");
    await page.goto(`${url}/#/tasks/layers`);
    await page.getByRole("button", { name: "Show what is in it" }).click();
    await page.waitForSelector("text=It is a PREFIX_TUNING prompt");
    await accessible(page, "what is in a prompt of keys and values");
  },

  async "the server"(page) {
    await page.goto(`${url}/#/server`);
    await page.waitForSelector("text=KV cache in use");
    await page.waitForTimeout(1500);
    await accessible(page, "the server");
    await shot(page, "page-server");
  },

  async "the keyboard alone"(page) {
    await page.goto(`${url}/#/tasks`);
    await page.reload();
    await page.waitForSelector("text=question-answering");
    await page.locator("body").press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to the content");
    // To "Try it", and there.
    for (let i = 0; i < 3; i++) await page.keyboard.press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.textContent), "Try it");
    await page.keyboard.press("Enter");
    await page.waitForSelector("h1:has-text('Try it')");
    await page.waitForFunction(() => document.activeElement.id === "main");
    await page.keyboard.press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.tagName), "SELECT");
    await page.keyboard.type("sentiment");
    for (let i = 0; i < 3; i++) await page.keyboard.press("Tab");
    await page.keyboard.type("A fine evening.");
    for (let i = 0; i < 3; i++) await page.keyboard.press("Tab");
    await page.keyboard.press("Enter");
    await page.waitForSelector("text=ended by");
  },

  async "copy as curl"(page) {
    await page.goto(`${url}/#/tasks/topic`);
    await page.getByRole("button", { name: "Copy as curl" }).click();
    await page.waitForSelector("text=Copied.");
    const text = await page.evaluate(() => navigator.clipboard.readText());
    assert.match(text, /^curl -X PUT '.*\/v1\/admin\/tasks\/topic\/active'/);
  },

  async "a key"(_, context) {
    const page = await open(context, guardedUrl);
    await page.waitForSelector("text=Enter a key");
    await page.getByLabel("Key").fill("the-api-key");
    await page.getByRole("button", { name: "Use" }).click();
    await page.waitForSelector("text=question-answering");
    // What only an administrator may see is shown with an admin's key, the picture too.
    await page.getByLabel("Key").fill("the-admin-key");
    await page.getByRole("button", { name: "Use" }).click();
    await page.goto(`${guardedUrl}/#/tasks/topic`);
    await page.getByRole("button", { name: "Show what is in it" }).click();
    await page.waitForFunction(() => document.querySelector("img.curve")?.naturalWidth > 100);
    await page.close();
  },
};

let failed = 0;
try {
  for (scheme of ["light", "dark"]) {
    const context = await browser.newContext({ colorScheme: scheme, permissions: ["clipboard-read", "clipboard-write"], viewport: { width: 1200, height: 800 } });
    const page = await open(context);
    const policy = (await page.request.get(url)).headers()["content-security-policy"];
    assert.ok(policy.includes("default-src 'none'") && !policy.includes("unsafe"), policy);
    for (const [name, check] of Object.entries(checks)) {
      // What is stored is stored once.
      if (scheme === "dark" && (name.startsWith("upload") || name.startsWith("copy"))) continue;
      try {
        await check(page, context);
        console.log(`passed: ${name} (${scheme})`);
      } catch (error) {
        failed += 1;
        console.error(`FAILED: ${name} (${scheme}): ${error.stack}`);
      }
    }
    await context.close();
  }
  assert.deepEqual(errors, [], "errors on the page's console");
} finally {
  await browser.close();
  child.kill();
  guarded.kill();
  rmSync(home, { recursive: true, force: true });
}
process.exitCode = failed ? 1 : 0;
