// A learned prompt, checked and stored: dropped here, or chosen.
import { call, copyAsCurl } from "./api.js";
import { el, field } from "./dom.js";

const PACKED = { ".zip": "application/zip", ".tar": "application/x-tar", ".tar.gz": "application/gzip", ".tgz": "application/gzip" };

/** The request that uploads these files: its body and headers. */
function body(files) {
  const [file] = files;
  const packed = Object.entries(PACKED).find(([ending]) => files.length === 1 && file.name.endsWith(ending));
  if (packed) return [file, { "content-type": packed[1] }];
  if (files.length === 1 && file.name.endsWith(".safetensors")) return [file, { "content-type": "application/octet-stream" }];
  const form = new FormData();
  for (const part of files) form.append(part.name, part);
  return [form, {}];
}

export default async function upload(root, name) {
  const [nameField, task] = field("Task", el("input", { required: true, pattern: "[a-z0-9][a-z0-9_\\-]{0,62}", value: name ?? "",
    title: "lower-case letters, digits, - and _" }));
  const [filesField, chosen] = field("Files", el("input", { type: "file", multiple: true }));
  const [activateField, activate] = field("Answer with it at once", el("input", { type: "checkbox", checked: true }));
  const dropped = el("p", { class: "quiet" }, "A zip or tar of a PEFT folder, its files (adapter_config.json, adapter_model.safetensors, task.json, loss.svg), or one .safetensors file.");
  const report = el("section", { "aria-live": "polite" });
  let files = [];
  const take = (list) => {
    files = [...list];
    dropped.textContent = files.map((file) => `${file.name} (${file.size} bytes)`).join(", ");
  };
  chosen.addEventListener("change", () => take(chosen.files));
  const zone = el("div", { class: "drop",
    ondragover: (event) => { event.preventDefault(); zone.classList.add("over"); },
    ondragleave: () => zone.classList.remove("over"),
    ondrop: (event) => { event.preventDefault(); zone.classList.remove("over"); take(event.dataTransfer.files); },
  }, el("p", {}, "Drop files here, or choose them."), filesField, dropped);
  const path = () => `/v1/admin/tasks/${encodeURIComponent(task.value)}/versions${activate.checked ? "" : "?activate=false"}`;
  const submit = async (event) => {
    event.preventDefault();
    if (files.length === 0) {
      report.replaceChildren(el("p", { class: "bad", role: "alert" }, "Choose files first."));
      return;
    }
    report.replaceChildren(el("p", {}, "Checking …"));
    try {
      const [content, headers] = body(files);
      const stored = await call("POST", path(), content, headers);
      report.replaceChildren(
        el("h2", { class: "good" }, `Stored as version ${stored.version}`),
        el("p", {}, `${stored.peft_type}, ${stored.virtual_tokens} virtual tokens. ${stored.active === stored.version || stored.active === true ? "It answers now." : "Another version answers."}`),
        stored.warnings?.length ? [el("h3", {}, "Warnings"), el("ul", {}, stored.warnings.map((w) => el("li", {}, w)))].flat() : "",
        el("p", {}, el("a", { href: `#/tasks/${encodeURIComponent(task.value)}` }, `See ${task.value}`)),
      );
    } catch (problem) {
      const faults = problem.errors?.length ? problem.errors.map((e) => e.detail) : [problem.message];
      report.replaceChildren(el("h2", { class: "bad" }, "Refused; nothing was stored"), el("div", { role: "alert" }, el("ul", {}, faults.map((f) => el("li", {}, f)))));
    }
  };
  root.append(el("h1", {}, "Upload"), el("form", { onsubmit: submit }, nameField, zone, activateField, el("p", {}, el("button", { class: "main" }, "Upload"))),
    copyAsCurl(() => ["POST", path(), undefined, files]), report);
}
