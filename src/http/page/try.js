// One input, answered side by side: by a task, by another version of it, without a prompt, or by an instruction in words.
import { call, copyAsCurl, stream } from "./api.js";
import { bars, choice, el, field, percent } from "./dom.js";

/** A token of an answer, with what else it could have been. */
function token({ text, logprob, top_logprobs: top = [] }) {
  const probability = Math.exp(logprob);
  const sure = probability > 0.8 ? "likely" : probability > 0.3 ? "unsure" : "unlikely";
  const line = (t) => `${percent(Math.exp(t.logprob)).padStart(7)}  ${JSON.stringify(t.text)}`;
  return el("span", { class: `token ${sure}`, tabindex: 0, "aria-label": `${text}, ${percent(probability)}`, role: "note" }, text,
    el("span", { class: "tip", "aria-hidden": "true" }, top.map(line).join("\n") || percent(probability)));
}

/** What a side asks: [path, body, whether it streams]. */
function request(side, task, fields, settings, base) {
  const input = task.fields.length === 1 ? fields[task.fields[0]] : fields;
  const own = { max_tokens: settings.max_tokens, temperature: settings.temperature };
  if (side.kind === "task") return [`/v1/tasks/${task.task}/generate`, { input, ...own, logprobs: 5, version: side.version }];
  const text = Object.values(fields).join("\n");
  const prompt = side.kind === "words" ? `${settings.instruction}\n${text}\n` : `${text}\n`;
  return ["/v1/completions", { model: base, prompt, ...own, max_tokens: own.max_tokens ?? 32, logprobs: 5 }];
}

async function ask(panel, path, body) {
  const answer = el("div", { class: "answer", role: "log", "aria-label": "Answer" });
  const told = el("p", { class: "quiet" }, "…");
  panel.append(answer, told, copyAsCurl(() => ["POST", path, body]));
  const started = performance.now();
  let tokens = 0;
  try {
    await stream(path, body, (news) => {
      const choice = news.choices?.[0];
      const list = news.tokens ?? openAiTokens(choice?.logprobs);
      tokens += list.length;
      answer.append(...(list.length ? list.map(token) : [news.output ?? choice?.text ?? ""]));
      const reason = news.finish_reason ?? choice?.finish_reason;
      const seconds = (performance.now() - started) / 1000;
      if (reason) told.textContent = `${tokens} tokens in ${(1000 * seconds).toFixed(0)} ms, ended by ${reason}`;
    });
  } catch (problem) {
    told.replaceChildren(el("span", { class: "bad", role: "alert" }, problem.message));
  }
}

const openAiTokens = (logprobs) =>
  (logprobs?.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top_logprobs: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));

async function labels(panel, task, fields, version) {
  const input = task.fields.length === 1 ? fields[task.fields[0]] : fields;
  const path = `/v1/tasks/${task.task}/classify`;
  const body = { input, version };
  try {
    const answer = await call("POST", path, body);
    panel.append(el("h3", {}, "Labels"), bars(answer.probabilities.map((p) => [p.label, p.probability])),
      el("p", { class: "quiet" }, `The labels have ${percent(answer.label_mass)} of all probability together.`),
      copyAsCurl(() => ["POST", path, body]));
  } catch (problem) {
    panel.append(el("p", { class: "bad", role: "alert" }, problem.message));
  }
}

export default async function tryIt(root, name) {
  const { tasks } = await call("GET", "/v1/tasks");
  const models = await call("GET", "/v1/models");
  const base = models.data.find((model) => model.parent === null)?.id;
  root.append(el("h1", {}, "Try it"));
  if (tasks.length === 0) {
    root.append(el("p", {}, "There are no tasks yet."));
    return;
  }
  const [taskField, taskChoice] = field("Task", choice(tasks.map((t) => t.task), name ?? tasks[0].task));
  const inputs = el("div");
  const [besideField, beside] = field("Beside it", choice([]));
  const [wordsField, words] = field("Instruction in words", el("input", { size: 40 }));
  const [tokensField, maxTokens] = field("At most tokens", el("input", { type: "number", min: 1, placeholder: "the task's", size: 6 }));
  const [temperatureField, temperature] = field("Temperature", el("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 }));
  const answers = el("div", { class: "columns" });
  let task;
  const controls = new Map();
  const choose = async () => {
    task = tasks.find((t) => t.task === taskChoice.value) ?? tasks[0];
    controls.clear();
    inputs.replaceChildren(...task.fields.map((fieldName) => {
      const [labelled, control] = field(fieldName === "input" ? "Input" : fieldName, el("textarea", { required: true }));
      controls.set(fieldName, control);
      return labelled;
    }));
    words.value = task.description ? `${task.description}:` : "";
    const others = await call("GET", `/v1/admin/tasks/${task.task}/versions`).then((a) => a.versions, () => []);
    const versions = others.filter((v) => !v.active).map((v) => [`version ${v.version}`, `version ${v.version}`]);
    beside.replaceChildren(...choice([["none", "nothing"], ["base", "no prompt"], ["words", "an instruction in words"], ...versions]).children);
  };
  taskChoice.addEventListener("change", choose);
  await choose();
  const submit = async (event) => {
    event.preventDefault();
    const fields = Object.fromEntries([...controls].map(([fieldName, control]) => [fieldName, control.value]));
    const settings = {
      max_tokens: maxTokens.value ? Number(maxTokens.value) : undefined,
      temperature: Number(temperature.value),
      instruction: words.value,
    };
    const sides = [{ kind: "task", title: `${task.task}, version ${task.version}` }];
    if (beside.value === "base") sides.push({ kind: "base", title: `${base}, no prompt` });
    if (beside.value === "words") sides.push({ kind: "words", title: `${base}, in words` });
    if (beside.value.startsWith("version ")) {
      const version = beside.value.slice(8);
      sides.push({ kind: "task", version, title: `${task.task}, version ${version}` });
    }
    answers.replaceChildren();
    await Promise.all(sides.map(async (side) => {
      const panel = el("section", { class: "panel" }, el("h2", {}, side.title));
      answers.append(panel);
      await ask(panel, ...request(side, task, fields, settings, base));
      if (side.kind === "task" && task.labels.length) await labels(panel, task, fields, side.version);
    }));
  };
  root.append(
    el("form", { onsubmit: submit }, el("div", { class: "row" }, taskField, besideField, wordsField), inputs,
      el("div", { class: "row" }, tokensField, temperatureField), el("p", {}, el("button", { class: "main" }, "Ask"))),
    el("p", { class: "quiet" }, "Point at a token, or reach it with the Tab key, to see what else it could have been."),
    answers,
  );
}
