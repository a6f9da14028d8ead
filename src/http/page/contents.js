// What is in a version: the curve of the run that tuned it, and the words that its virtual tokens are nearest to.
import { call, copyAsCurl, picture } from "./api.js";
import { choice, el, field, say, table } from "./dom.js";

/** A word as it is, with its spaces; a part of a character by its id. */
const shown = ({ id, text }) => (text.includes("\ufffd") ? `#${id}` : JSON.stringify(text));

async function curve(path, version) {
  try {
    const src = await picture(`${path}/loss.svg`);
    const loaded = (event) => URL.revokeObjectURL(event.target.src);
    return [
      el("img", { src, class: "curve", onload: loaded, onerror: loaded,
        alt: `Loss curve of version ${version}: the loss of the training batches and of the held-out examples at each step of its tuning` }),
      copyAsCurl(() => ["GET", `${path}/loss.svg`]),
    ];
  } catch (problem) {
    if (problem.code !== "not_found") throw problem;
    return [el("p", {}, "No loss curve was stored with it. ", el("code", {}, "softserve tune"), " writes one as ",
      el("code", {}, "loss.svg"), " beside the prompt's files.")];
  }
}

async function words(path, version) {
  if (version.kind === "key-values") {
    return [el("p", {}, `It is a ${version.peft_type} prompt: it consists of keys and values of each layer, so there are no rows that words could be near to.`)];
  }
  const { virtual_tokens: tokens } = await call("GET", `${path}/nearest?count=5`);
  const near = (word) => [el("code", {}, shown(word)), ` ${word.similarity.toFixed(2)}`];
  return [
    table(`The ${tokens.length} virtual tokens, with the words whose embeddings are nearest by cosine similarity`, [
      ["Token", (t) => tokens.indexOf(t).toString(), true],
      ["Norm", (t) => t.norm.toFixed(3), true],
      ["Nearest words", (t) => el("span", {}, t.nearest.map((word, i) => [i ? ", " : "", near(word)]))],
    ], tokens),
    copyAsCurl(() => ["GET", `${path}/nearest?count=5`]),
  ];
}

/** A choice among a task's versions, and what is in the chosen one when asked. `path` is the task's in the admin API. */
export function contents(path, versions, active) {
  const [chosenField, chosen] = field("Version", choice(versions.map((v) => [v.version, v.version]), active));
  const panel = el("div");
  let last;
  const show = async (event) => {
    event.preventDefault();
    const version = versions.find((v) => v.version === chosen.value);
    const asked = (last = {});
    const at = `${path}/versions/${version.version}`;
    panel.replaceChildren(el("p", {}, "Loading …"));
    const parts = await Promise.all([curve(at, version.version), words(at, version)]).catch((problem) => problem);
    // Another version may have been asked for meanwhile.
    if (asked !== last) return;
    if (parts instanceof Error) {
      panel.replaceChildren(el("p", { class: "bad", role: "alert" }, parts.message));
      return;
    }
    panel.replaceChildren(el("h3", {}, `Version ${version.version}`), ...parts.flat());
    say(`What is in version ${version.version} is shown.`);
  };
  return [
    el("h2", {}, "What is in a version"),
    el("form", { onsubmit: show, class: "row" }, chosenField, el("button", {}, "Show what is in it")),
    panel,
  ];
}
