// How the server is doing, once a second.
import { metrics, copyAsCurl, sum } from "./api.js";
import { el, svg, table } from "./dom.js";

const KEPT = 120;

function spark(values, label) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${(300 * i) / (KEPT - 1)},${58 - (56 * value) / most}`).join(" ");
  return svg("svg", { class: "spark", viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img", "aria-label": label }, svg("polyline", { points }));
}

export default async function server(root) {
  const figures = el("div", { class: "columns" });
  const byTask = el("section");
  root.append(el("h1", {}, "Server"), figures, byTask, copyAsCurl(() => ["GET", "/metrics"]));
  const history = { generated: [], prompt: [], running: [], waiting: [], kv: [] };
  let before;
  const panel = (title, value, values, more) =>
    el("section", { class: "panel" }, el("h2", {}, title), el("p", {}, el("strong", {}, value), more ? ` ${more}` : ""), spark(values, `${title}, the last two minutes`));
  const look = async () => {
    const samples = await metrics();
    const at = performance.now() / 1000;
    const one = (name) => sum(samples, name);
    const now = { at, generated: one("softserve_engine_generated_tokens_total"), prompt: one("softserve_engine_prompt_tokens_total"), tasks: new Map() };
    for (const { name, labels, value } of samples) {
      if (name === "softserve_request_output_tokens_sum") now.tasks.set(labels.task, value);
    }
    const rate = (name) => (before ? Math.max(0, now[name] - before[name]) / (at - before.at) : 0);
    const blocks = one("softserve_engine_kv_blocks"), used = one("softserve_engine_kv_blocks_used");
    const current = { generated: rate("generated"), prompt: rate("prompt"), running: one("softserve_engine_running_requests"),
      waiting: one("softserve_engine_waiting_requests"), kv: blocks ? used / blocks : 0 };
    for (const [name, value] of Object.entries(current)) {
      history[name].push(value);
      if (history[name].length > KEPT) history[name].shift();
    }
    figures.replaceChildren(
      panel("Generated tokens/s", current.generated.toFixed(0), history.generated),
      panel("Input tokens/s", current.prompt.toFixed(0), history.prompt),
      panel("Running requests", `${current.running}`, history.running),
      panel("Waiting requests", `${current.waiting}`, history.waiting),
      panel("KV cache in use", `${(100 * current.kv).toFixed(1)} %`, history.kv, `(${used} of ${blocks} blocks)`),
    );
    const rows = [...now.tasks].map(([task, tokens]) => ({
      task, requests: sum(samples, "softserve_request_output_tokens_count", task), tokens,
      rate: before ? (tokens - (before.tasks.get(task) ?? 0)) / (at - before.at) : 0,
    }));
    byTask.replaceChildren(table("By task", [
      ["Task", (r) => r.task], ["Answers", (r) => `${r.requests}`, true], ["Generated tokens", (r) => `${r.tokens}`, true],
      ["Tokens/s", (r) => r.rate.toFixed(0), true],
    ], rows.sort((a, b) => b.rate - a.rate || b.tokens - a.tokens)));
    before = now;
  };
  await look();
  const timer = setInterval(() => look().catch(() => {}), 1000);
  return () => clearInterval(timer);
}
