// Requests to the server that this page came from, and the same requests as commands for a shell.
import { el, say } from "./dom.js";

const KEY = "softserve-key";
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server answered instead, as its problem says it. */
export class Problem extends Error {
  constructor(status, body) {
    const error = body?.error ?? body;
    super(error?.detail ?? error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.errors = error?.errors ?? [];
    this.code = error?.code;
  }
}

function options(method, body, headers = {}) {
  const all = { ...headers };
  if (key.get()) all.authorization = `Bearer ${key.get()}`;
  const isJson = body !== undefined && !(body instanceof FormData) && !(body instanceof Blob);
  if (isJson) all["content-type"] = "application/json";
  return { method, headers: all, body: isJson ? JSON.stringify(body) : body };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => undefined);
  throw new Problem(response.status, body);
}

/** The answer as JSON; with `etag` where it has one. */
export async function call(method, path, body, headers) {
  const response = await checked(await fetch(path, options(method, body, headers)));
  const answer = await response.json();
  return Object.assign(answer, { etag: response.headers.get("etag") ?? undefined });
}

/** The address of a picture in this tab; whoever shows it revokes it. */
export async function picture(path) {
  const response = await checked(await fetch(path, options("GET")));
  return URL.createObjectURL(await response.blob());
}

/** Calls `each` with every event of a stream. */
export async function stream(path, body, each) {
  const response = await checked(await fetch(path, options("POST", { ...body, stream: true })));
  let rest = "";
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + piece).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") && event.slice(6);
      if (!data || data === "[DONE]") continue;
      const news = JSON.parse(data);
      if (news.error || (news.code && news.detail)) throw new Problem(500, news);
      each(news);
    }
  }
}

/** The request as a command, on one line for each part. */
export function curl(method, path, body, files = []) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${method === "GET" ? "" : `-X ${method} `}${quoted(location.origin + path)}`];
  if (key.get()) parts.push(`-H "authorization: Bearer $SOFTSERVE_API_KEY"`);
  if (body !== undefined) parts.push(`-H 'content-type: application/json'`, `-d ${quoted(JSON.stringify(body))}`);
  parts.push(...files.map((file) => `-F ${quoted(`${file.name}=@${file.name}`)}`));
  return parts.join(" \\\n  ");
}

/** A button that copies a request as a command. */
export function copyAsCurl(request) {
  const copy = async () => {
    const text = curl(...request());
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
    } catch {
      // Without permission, or over plain HTTP from another machine: it is shown to be copied by hand.
      copied.replaceChildren(el("pre", { tabindex: 0 }, text));
    }
  };
  const copied = el("div");
  return el("div", {}, el("button", { type: "button", onclick: copy }, "Copy as curl"), copied);
}

/** The samples of /metrics: a list of {name, labels, value}. */
export async function metrics() {
  const text = await (await checked(await fetch("/metrics", options("GET")))).text();
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(/([a-z_]+)="([^"]*)"/g)].map((m) => [m[1], m[2]]));
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

/** A quantile of a task's histogram, from the bounds of its buckets. */
export function quantile(samples, name, task, of) {
  const buckets = samples
    .filter((s) => s.name === `${name}_bucket` && s.labels.task === task)
    .map((s) => [s.labels.le === "+Inf" ? Infinity : Number(s.labels.le), s.value])
    .sort((a, b) => a[0] - b[0]);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total === 0) return undefined;
  const at = buckets.findIndex(([, count]) => count >= of * total);
  const [from, below] = at > 0 ? buckets[at - 1] : [0, 0];
  const [to, count] = buckets[at];
  return to === Infinity ? from : from + (to - from) * ((of * total - below) / Math.max(count - below, 1));
}

export const sum = (samples, name, task) =>
  samples.filter((s) => s.name === name && (task === undefined || s.labels.task === task)).reduce((all, s) => all + s.value, 0);
