// The tasks, and one task with its versions.
import { call, copyAsCurl, metrics, quantile, sum } from "./api.js";
import { contents } from "./contents.js";
import { bytes, el, milliseconds, say, table } from "./dom.js";

export const FIRST_TOKEN = "softserve_time_to_first_token_seconds";

/** The best of what was measured of a version, for people. */
function score(metrics) {
  const shown = Object.entries(metrics).filter(([name]) => /accuracy|f1|exact_match|brier|ece/.test(name));
  return shown.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ") || "–";
}

/** What the admin API answers, or what anyone may see; and which it was. */
async function adminOr(adminPath, path) {
  try {
    return [await call("GET", adminPath), true];
  } catch (problem) {
    if (problem.status !== 401 && problem.status !== 403) throw problem;
    return [await call("GET", path), false];
  }
}

/** A task of the public list, as the admin API would have it. */
const asAdmin = (task) => ({ task: task.task, active: task.version, versions: [{ ...task, active: true }] });

/** A page of the tasks by name. */
async function listed(after) {
  const query = after ? `?after=${encodeURIComponent(after)}` : "";
  const [page, isAdmin] = await adminOr(`/v1/admin/tasks${query}`, `/v1/tasks${query}`);
  return { tasks: isAdmin ? page.tasks : page.tasks.map(asAdmin), next: page.next, isAdmin };
}

async function find(name) {
  const path = encodeURIComponent(name);
  try {
    const [task, isAdmin] = await adminOr(`/v1/admin/tasks/${path}/versions`, `/v1/tasks/${path}`);
    return [isAdmin ? task : asAdmin(task), isAdmin];
  } catch (problem) {
    if (problem.status !== 404) throw problem;
    return [undefined, false];
  }
}

/** Where a version's tensors are: in the key-value cache, in memory, or only in the store. */
const where = (residency) => residency && (residency.cache === "resident" ? "cached" : residency.loaded ? "in memory" : "stored");

export default async function tasks(root, name, after) {
  if (name) {
    const [task, isAdmin] = await find(name);
    return one(root, task, name, isAdmin);
  }
  const { tasks: all, next, isAdmin } = await listed(after);
  // A key may see the tasks and not the metrics.
  const samples = await metrics().catch(() => []);
  const active = (task) => task.versions.find((version) => version.version === task.active);
  const more = () => {
    root.replaceChildren();
    return tasks(root, undefined, next);
  };
  root.append(
    el("h1", {}, "Tasks"),
    all.length === 0
      ? el("p", {}, "There are no tasks yet. ", el("a", { href: "#/upload" }, "Upload a learned prompt"), " to have one.")
      : table("Every task with its active version", [
          ["Task", (t) => el("a", { href: `#/tasks/${encodeURIComponent(t.task)}` }, t.task)],
          ["Type", (t) => active(t)?.peft_type],
          ["Virtual tokens", (t) => active(t)?.virtual_tokens?.toString(), true],
          ["Size", (t) => active(t)?.residency && bytes(active(t).residency.bytes), true],
          ["Active version", (t) => t.active && el("code", {}, t.active)],
          ["Where", (t) => where(active(t)?.residency)],
          ["Requests", (t) => sum(samples, "softserve_request_input_tokens_count", t.task).toString(), true],
          ["First token p50", (t) => milliseconds(quantile(samples, FIRST_TOKEN, t.task, 0.5)), true],
          ["p95", (t) => milliseconds(quantile(samples, FIRST_TOKEN, t.task, 0.95)), true],
        ], all),
    next ? el("p", {}, el("button", { onclick: more }, `Tasks after ${next}`)) : "",
    copyAsCurl(() => ["GET", isAdmin ? "/v1/admin/tasks" : "/v1/tasks"]),
  );
}

function one(root, task, name, isAdmin) {
  if (!task) {
    root.append(el("h1", {}, name), el("p", {}, "There is no such task."));
    return;
  }
  const path = `/v1/admin/tasks/${encodeURIComponent(name)}`;
  const current = task.versions.find((version) => version.version === task.active) ?? task.versions[0];
  const activate = async (version) => {
    await call("PUT", `${path}/active`, { version });
    say(`${version} answers now.`);
    location.reload();
  };
  const date = (seconds) => (seconds ? new Date(1000 * seconds).toLocaleString() : "–");
  const newest = [...task.versions].sort((a, b) => (b.stored_at ?? 0) - (a.stored_at ?? 0));
  const previous = task.previous?.[0];
  const rollBack = async () => {
    const { active } = await call("POST", `${path}/rollback`);
    say(`${active} answers again.`);
    location.reload();
  };
  const aliases = (version) => Object.keys(task.aliases ?? {}).filter((alias) => task.aliases[alias] === version);
  const share = (version) => task.shares?.[version] && `${Math.round(100 * task.shares[version])} %`;
  const detail = (term, value) => value && [el("dt", {}, term), el("dd", {}, value)];
  root.append(
    el("h1", {}, name),
    el("p", {}, current?.description ?? ""),
    el("p", {}, el("a", { href: `#/try/${encodeURIComponent(name)}` }, "Try it"), " · ",
      el("a", { href: `#/measure/${encodeURIComponent(name)}` }, "Measure it"), " · ",
      el("a", { href: `#/upload/${encodeURIComponent(name)}` }, "Upload a version")),
    el("dl", {}, detail("Template", el("code", {}, current?.template ?? (current?.fields ?? []).join(", "))),
      detail("Labels", Object.keys(Array.isArray(current?.labels) ? Object.fromEntries(current.labels.map((l) => [l, 1])) : current?.labels ?? {}).join(", ")),
      detail("Defaults", current?.defaults && el("code", {}, JSON.stringify(current.defaults)))),
    ...(task.unreadable ?? []).map((v) => el("p", { class: "bad" }, `Version ${v.version} cannot be read: ${v.reason}`)),
    table("Versions, the newest first", [
      ["Version", (v) => el("code", {}, v.version)],
      ["Stored", (v) => date(v.stored_at)],
      ["Type", (v) => v.peft_type],
      ["Virtual tokens", (v) => v.virtual_tokens?.toString(), true],
      ["Where", (v) => where(v.residency)],
      ["Measured", (v) => score(v.metrics ?? {})],
      ["Alias", (v) => aliases(v.version).join(", ") || undefined],
      ["", (v) => (share(v.version) ? el("strong", {}, `answers ${share(v.version)}`) : v.version === task.active ? el("strong", {}, "answers") : isAdmin && el("button", { onclick: () => activate(v.version) }, `Activate ${v.version}`))],
    ], newest),
    isAdmin && previous ? el("p", {}, el("button", { onclick: rollBack }, `Roll back to ${previous}`)) : "",
    copyAsCurl(() => (isAdmin && current ? ["PUT", `${path}/active`, { version: current.version }] : ["GET", `/v1/tasks/${name}`])),
    ...(isAdmin && newest.length ? contents(path, newest, task.active) : []),
  );
}
