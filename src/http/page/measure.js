// Labelled lines, classified: accuracy, confusion matrix and calibration.
import { call, copyAsCurl } from "./api.js";
import { choice, el, field, percent, svg, table } from "./dom.js";

const PER_CALL = 64;

/** Lines of "text<TAB>label", or of JSON with "input" (or "text") and "label". */
export function read(text, labels) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return lines.map((line, i) => {
    let input, label;
    if (line.startsWith("{")) {
      let row;
      try {
        row = JSON.parse(line);
      } catch (error) {
        throw new Error(`line ${i + 1} is not JSON: ${error.message}`);
      }
      [input, label] = [row.input ?? row.text, row.label];
    } else {
      const at = line.lastIndexOf("\t");
      [input, label] = at < 0 ? [] : [line.slice(0, at), line.slice(at + 1)];
    }
    label = label?.toString().trim();
    if (!input || !label) throw new Error(`line ${i + 1}: expected a text, a tab and a label, or JSON with "input" and "label"`);
    if (!labels.includes(label)) throw new Error(`line ${i + 1}: found the label "${label}", expected one of ${labels.join(", ")}`);
    return { input, label };
  });
}

/** How often answers of a confidence are right, in ten bins. */
function bins(rows) {
  const all = Array.from({ length: 10 }, () => ({ count: 0, right: 0, confidence: 0 }));
  for (const { confidence, isRight } of rows) {
    const bin = all[Math.min(9, Math.floor(10 * confidence))];
    bin.count += 1;
    bin.right += isRight;
    bin.confidence += confidence;
  }
  return all;
}

function reliability(rows) {
  const side = 240, left = 34, top = 8;
  const x = (value) => left + side * value, y = (value) => top + side * (1 - value);
  const drawn = bins(rows).map(({ count, right }, i) => {
    if (!count) return undefined;
    const height = (side * right) / count;
    return svg("rect", { x: x(i / 10) + 1, y: y(0) - height, width: side / 10 - 2, height: Math.max(height, 1) });
  });
  const text = (value, at, anchor) => svg("text", { x: at[0], y: at[1], "text-anchor": anchor }, value);
  return svg("svg", { viewBox: `0 0 ${side + left + 12} ${side + 46}`, width: side + left + 12, role: "img",
      "aria-label": "Share of right answers by confidence, in ten bins" },
    drawn, svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
    svg("path", { class: "axis", d: `M${x(0)},${y(1)} V${y(0)} H${x(1)}` }),
    text("0", [x(0), y(0) + 15], "middle"), text("1", [x(1), y(0) + 15], "middle"), text("1", [x(0) - 6, y(1) + 8], "end"),
    text("confidence", [x(0.5), y(0) + 30], "middle"), text("right", [x(0) - 6, y(0.5)], "end"));
}

function results(root, rows, labels) {
  const right = rows.filter((row) => row.isRight).length;
  const brier = rows.reduce((all, row) => all + row.brier, 0) / rows.length;
  const ece = bins(rows).reduce((all, { count, right: r, confidence }) => all + Math.abs(r - confidence) / rows.length * (count ? 1 : 0), 0);
  const count = (label, found) => rows.filter((row) => row.label === label && row.found === found).length;
  root.replaceChildren(
    el("h2", {}, "Result"),
    el("p", { id: "accuracy" }, `Accuracy ${percent(right / rows.length)} (${right} of ${rows.length}), Brier score ${brier.toFixed(3)}, expected calibration error ${ece.toFixed(3)}`),
    el("div", { class: "columns" },
      table("Confusion matrix: true labels in rows, found labels in columns", [
        ["True", (label) => label],
        ...labels.map((found) => [found, (label) => (label === found ? el("strong", {}, `${count(label, found)}`) : `${count(label, found)}`), true]),
      ], labels),
      el("figure", {}, reliability(rows), el("figcaption", { class: "quiet" }, "Calibration: the bars follow the dashed line where a confidence is as good as it says."))),
    table("Lines that were answered wrongly", [
      ["Text", (row) => row.input], ["True", (row) => row.label], ["Found", (row) => row.found],
      ["Confidence", (row) => percent(row.confidence), true],
    ], rows.filter((row) => !row.isRight)),
  );
}

export default async function measure(root, name) {
  const tasks = (await call("GET", "/v1/tasks")).tasks.filter((task) => task.labels.length);
  root.append(el("h1", {}, "Measure"));
  if (tasks.length === 0) {
    root.append(el("p", {}, "No task has labels."));
    return;
  }
  const [taskField, taskChoice] = field("Task", choice(tasks.map((t) => t.task), name ?? tasks[0].task));
  const [linesField, lines] = field("Labelled lines", el("textarea", { rows: 12, required: true, placeholder: "A fine evening.\tpositive" }));
  const known = el("p", { class: "quiet" });
  const task = () => tasks.find((t) => t.task === taskChoice.value) ?? tasks[0];
  const tell = () => (known.textContent = `One line each: a text, a tab and a label (${task().labels.join(", ")}), or JSON with "input" and "label".`);
  taskChoice.addEventListener("change", tell);
  tell();
  const result = el("section", { "aria-live": "polite" });
  const path = () => `/v1/tasks/${task().task}/classify`;
  const submit = async (event) => {
    event.preventDefault();
    try {
      const { labels } = task();
      const examples = read(lines.value, labels);
      const rows = [];
      for (let i = 0; i < examples.length; i += PER_CALL) {
        const part = examples.slice(i, i + PER_CALL);
        const { results } = await call("POST", path(), { inputs: part.map((example) => example.input) });
        results.forEach((found, j) => {
          if (found.code) throw new Error(`line ${i + j + 1}: ${found.detail}`);
          const example = part[j];
          const brier = found.probabilities.reduce((all, p) => all + (p.probability - (p.label === example.label)) ** 2, 0);
          rows.push({ ...example, found: found.label, confidence: found.confidence, isRight: found.label === example.label, brier });
        });
        result.replaceChildren(el("p", {}, `${rows.length} of ${examples.length} lines`));
      }
      results(result, rows, labels);
    } catch (problem) {
      result.replaceChildren(el("p", { class: "bad", role: "alert" }, problem.message));
    }
  };
  const asked = () => lines.value.split("\n").filter(Boolean).map((line) => line.split("\t")[0]);
  root.append(el("form", { onsubmit: submit }, taskField, linesField, known, el("p", {}, el("button", { class: "main" }, "Measure"))),
    copyAsCurl(() => ["POST", path(), { inputs: asked() }]), result);
}
