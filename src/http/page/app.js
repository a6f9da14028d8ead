// Which view is shown, by the part of the address after "#".
import { call, key } from "./api.js";
import { el, say } from "./dom.js";
import measure from "./measure.js";
import server from "./server.js";
import tasks from "./tasks.js";
import tryIt from "./try.js";
import upload from "./upload.js";

const views = { tasks, try: tryIt, measure, upload, server };
const main = document.getElementById("main");
let leave = () => {};

async function show(isFirst) {
  const [, name = "tasks", ...rest] = location.hash.split("/");
  const view = views[name] ?? tasks;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.getAttribute("href") === `#/${views[name] ? name : "tasks"}`;
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  leave();
  leave = () => {};
  const shown = el("div");
  main.replaceChildren(shown);
  try {
    leave = (await view(shown, ...rest.map(decodeURIComponent))) ?? (() => {});
  } catch (problem) {
    const hint = problem.status === 401 || problem.status === 403 ? " Enter a key at the top of the page." : "";
    shown.replaceChildren(el("h1", {}, "That did not work"), el("p", { role: "alert" }, problem.message + hint));
  }
  document.title = `${shown.querySelector("h1")?.textContent ?? "Softserve"} – Softserve`;
  if (!isFirst) main.focus();
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(document.getElementById("key").value);
  say(key.get() ? "The key is used until this tab is closed." : "No key is used.");
  name();
  show();
});
document.getElementById("key").value = key.get();
window.addEventListener("hashchange", () => show());

async function name() {
  const models = await call("GET", "/v1/models").catch(() => undefined);
  document.getElementById("model").textContent = models?.data.find((model) => model.parent === null)?.id ?? "";
}
name();
show(true);
