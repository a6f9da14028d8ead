// Elements without a framework. Text is always set as text, so that nothing a model or a client wrote becomes markup.

/** An element: `el("a", {href: "/"}, "home")`. A property that begins with "on" is a listener. */
export function el(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** An element of an SVG. */
export function svg(name, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null));
  return element;
}

/** A table with a caption. A column is [title, cell of a row, whether it is a number]. */
export function table(caption, columns, rows) {
  const of = ([, cell, isNumber], row) => el("td", { class: isNumber ? "number" : undefined }, cell(row) ?? "–");
  const heads = columns.map(([title, , isNumber]) => el("th", { scope: "col", class: isNumber ? "number" : undefined }, title));
  const body = rows.map((row) => el("tr", {}, columns.map((column) => of(column, row))));
  // A region that scrolls can be reached by keyboard.
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body)));
}

/** A labelled field: the label and the control, and the control itself. */
export function field(label, control) {
  control.id ||= `field-${Math.random().toString(36).slice(2)}`;
  return [el("div", {}, el("label", { for: control.id }, label), control), control];
}

export function choice(options, chosen) {
  const option = ([value, text]) => el("option", { value, selected: value === chosen }, text);
  return el("select", {}, options.map((o) => option(Array.isArray(o) ? o : [o, o])));
}

/** Bars of probabilities: a list of [name, 0 to 1]. */
export function bars(items) {
  return el("div", { class: "bars" }, items.map(([name, value]) => [
    el("span", {}, name),
    el("meter", { min: 0, max: 1, value, "aria-label": `${name}: ${percent(value)}` }),
    el("span", {}, percent(value)),
  ]));
}

export const percent = (value) => `${(100 * value).toFixed(1)} %`;
export const milliseconds = (seconds) => (seconds === undefined ? "–" : `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`);

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < 3) [count, unit] = [count / 1024, unit + 1];
  return `${count.toFixed(unit && count < 10 ? 1 : 0)} ${units[unit]}`;
}

/** Tells what happened, to screen readers too. */
export function say(text) {
  document.getElementById("status").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (document.getElementById("status").textContent = ""), 4000);
}
