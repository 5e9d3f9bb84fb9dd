"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const make = (name, attributes = {}, text = "") => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};
const drawn = (name, attributes, into, text = "") => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  into.append(made);
  return made;
};
const steps = (event, index, count) => ({ ArrowLeft: index - 1, ArrowUp: index - 1, ArrowRight: index + 1,
  ArrowDown: index + 1, Home: 0, End: count - 1 })[event.key];

// ---- plots: places are shares of the plot, from 0 to 1, as eval/report.py gives them

const hidden = new Set();  // contestants that are not drawn
const shownIn = plot => plot.series.filter(s => !hidden.has(s.contestant));
const room = text => 7 * text.length;  // pixels that a label takes

function draw(box, width = Math.max(240, box.clientWidth)) {
  const plot = data.plots[box.dataset.plot], rows = plot.rows ? plot.y.ticks.length : 0;
  const height = rows ? 70 + 46 * rows : 310, top = 26, bottom = 46;
  const left = rows ? 8 : 14 + Math.max(...plot.y.ticks.map(t => room(t[1]))), right = 18, inset = rows ? 22 : 8;
  const X = x => left + inset + x * (width - left - right - 2 * inset);
  const Y = y => rows ? top + 34 + y * 46 * Math.max(0, rows - 1) : top + 6 + (1 - y) * (height - top - bottom - 6);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-hidden", "true");
  drawn("text", { x: 0, y: 13 }, svg, plot.y.title);
  drawn("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, plot.x.title);
  const wide = Math.max(...plot.x.ticks.map(t => room(t[1]))) + 8;
  let last = -Infinity;
  for (const [x, label] of plot.x.ticks) {
    if (rows) drawn("line", { class: "rule", x1: X(x), x2: X(x), y1: top, y2: height - bottom }, svg);
    if (X(x) - last < wide) continue;
    last = X(x);
    const end = X(x) + room(label) / 2 > width ? "end" : "middle";
    drawn("text", { x: end === "end" ? width : X(x), y: height - bottom + 17, "text-anchor": end }, svg, label);
  }
  for (const [y, label] of plot.y.ticks) {
    if (rows) { drawn("text", { class: "row", x: left, y: Y(y) - 13 }, svg, label); continue; }
    drawn("line", { class: "rule", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }, svg);
    drawn("text", { x: left - 7, y: Y(y) + 4, "text-anchor": "end" }, svg, label);
  }
  const path = points => "M" + points.map(([x, y]) => `${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("L");
  if (plot.guesses.length) drawn("path", { class: "guesses", d: path(plot.guesses) }, svg);
  for (const s of plot.series) {
    const group = drawn("g", { class: "series k" + s.number, "data-contestant": s.contestant }, svg);
    const known = s.points.filter(p => p.limits);
    if (rows) for (const p of known) drawn("line", { class: "whisker", x1: X(p.limits[0]), x2: X(p.limits[1]), y1: Y(p.y), y2: Y(p.y) }, group);
    else if (known.length) {
      const around = [...known.map(p => [p.x, p.limits[1]]), ...known.map(p => [p.x, p.limits[0]]).reverse()];
      drawn("path", { class: "band", d: path(around) + "Z" }, group);
    }
    if (!rows) drawn("path", { class: "curve", d: path(s.points.map(p => [p.x, p.y])) }, group);
    if (s.points.length < 30) for (const p of s.points)
      drawn("path", { class: "mark " + s.fill, d: s.path, transform: `translate(${X(p.x).toFixed(1)} ${Y(p.y).toFixed(1)})` }, group);
  }
  drawn("line", { class: "cursor", hidden: "" }, svg);
  box.querySelector("svg")?.remove();
  box.prepend(svg);
  box.map = { X, Y, top, bottom: height - bottom, left, right: width - right, width };
  choose();
}

function choose() {  // shows and hides what the legend says
  for (const group of all("g.series")) group.toggleAttribute("hidden", hidden.has(group.dataset.contestant));
  for (const button of all(".legend [data-contestant]")) button.setAttribute("aria-pressed", !hidden.has(button.dataset.contestant));
}

function read(box, stop) {  // the values at a stop, beside it and for screen readers
  const plot = data.plots[box.dataset.plot], { X, Y, top, bottom, left, right, width } = box.map;
  const tip = box.querySelector(".tip"), cursor = box.querySelector(".cursor");
  box.stop = stop;
  tip.hidden = stop === null;
  cursor.toggleAttribute("hidden", stop === null);
  if (stop === null) return;
  const [at, said] = plot.stops[stop], axis = plot.rows ? "y" : "x", found = [];
  for (const s of shownIn(plot)) {
    const near = s.points.reduce((a, b) => Math.abs(b[axis] - at) < Math.abs(a[axis] - at) ? b : a, s.points[0]);
    if (near && Math.abs(near[axis] - at) < 0.03) found.push([near, s]);
  }
  found.sort((a, b) => b[0].y - a[0].y);
  const list = make("ul");
  for (const [point, s] of found) {
    const line = make("li"), symbol = drawn("svg", { class: "symbol k" + s.number, viewBox: "-6 -6 12 12" }, line);
    drawn("path", { class: s.fill, d: s.path }, symbol);
    line.append(plot.rows ? "" : s.label + ": ", point.said);
    list.append(line);
  }
  tip.replaceChildren(make("b", {}, plot.rows ? said : `${plot.x.title}: ${said}`), list);
  if (plot.rows) tip.style.top = Y(at) + 14 + "px";
  const across = plot.rows ? { x1: left, x2: right, y1: Y(at), y2: Y(at) } : { x1: X(at), x2: X(at), y1: top, y2: bottom };
  for (const [key, value] of Object.entries(across)) cursor.setAttribute(key, value);
  const before = plot.rows || X(at) < width / 2;
  tip.style.left = before ? (plot.rows ? "auto" : X(at) + 12 + "px") : "auto";
  tip.style.right = plot.rows ? "0" : before ? "auto" : width - X(at) + 12 + "px";
  box.setAttribute("aria-valuenow", stop);
  box.setAttribute("aria-valuetext", `${said}. ` + found.map(([p, s]) => `${s.label}: ${p.said}`).join("; "));
}

for (const box of all(".drawing")) {
  const plot = data.plots[box.dataset.plot], count = plot.stops.length;
  for (const [key, value] of Object.entries({ tabindex: 0, role: "slider", "aria-label": plot.title, "aria-valuemin": 0,
    "aria-valuemax": count - 1, "aria-valuenow": 0, "aria-valuetext": plot.stops[0][1] })) box.setAttribute(key, value);
  box.append(make("div", { class: "tip", hidden: "" }));
  draw(box);
  const point = event => {
    const frame = box.getBoundingClientRect(), scale = box.map.width / frame.width;
    const place = plot.rows ? (event.clientY - frame.top) * scale : (event.clientX - frame.left) * scale;
    const far = plot.stops.map(([at]) => Math.abs((plot.rows ? box.map.Y(at) : box.map.X(at)) - place));
    read(box, far.indexOf(Math.min(...far)));
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("pointerleave", () => read(box, null));
  box.addEventListener("focus", () => { if (box.matches(":focus-visible")) read(box, box.stop ?? 0); });
  box.addEventListener("blur", () => read(box, null));
  box.addEventListener("keydown", event => {
    if (event.key === "Escape") return read(box, null);
    const next = steps(event, box.stop ?? -1, count);
    if (next === undefined) return;
    event.preventDefault();
    read(box, Math.max(0, Math.min(count - 1, next)));
  });
  new ResizeObserver(() => { if (Math.max(240, box.clientWidth) !== box.map.width) draw(box); }).observe(box);
}

// Paper has two plots side by side.
addEventListener("beforeprint", () => all(".drawing").forEach(box => draw(box, 340)));
addEventListener("afterprint", () => all(".drawing").forEach(box => draw(box)));

const names = all(".legend [data-contestant]").map(button => button.dataset.contestant);
for (const button of all(".legend button")) button.addEventListener("click", event => {
  const name = button.dataset.contestant;
  if (name === undefined) hidden.clear();
  else if (event.shiftKey) { for (const other of names) other === name ? hidden.delete(other) : hidden.add(other); }
  else if (!hidden.delete(name)) hidden.add(name);
  choose();
});

const legend = document.querySelector(".legend");  // it covers what stands behind it, so that links must leave room
if (legend) new ResizeObserver(() => document.documentElement.style.setProperty("--legend", legend.offsetHeight + "px")).observe(legend);

// ---- tables behind tabs; without a script they stand one below another

for (const tabs of all(".tabs")) {
  const panels = all(".panel", tabs), list = make("div", { role: "tablist", "aria-label": "Tables" });
  const buttons = panels.map((panel, i) => {
    const tab = make("button", { type: "button", role: "tab", id: "tab-" + panel.id, "aria-controls": panel.id }, panel.dataset.tab);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => open(i));
    return tab;
  });
  const open = chosen => panels.forEach((panel, i) => {
    panel.hidden = i !== chosen;
    buttons[i].setAttribute("aria-selected", i === chosen);
    buttons[i].tabIndex = i === chosen ? 0 : -1;
  });
  list.addEventListener("keydown", event => {
    const next = steps(event, buttons.indexOf(event.target), buttons.length);
    if (next === undefined) return;
    event.preventDefault();
    const chosen = (next + buttons.length) % buttons.length;
    open(chosen);
    buttons[chosen].focus();
  });
  list.append(...buttons);
  tabs.prepend(list);
  if (panels.length) open(0);
}

// ---- contents: marks the section that is read

const links = all("#contents a"), targets = links.map(link => document.getElementById(link.hash.slice(1)));
function mark() {
  const line = innerHeight / 3;
  let current = 0;
  targets.forEach((target, i) => { if (target.getBoundingClientRect().top < line) current = i; });
  if (innerHeight + scrollY >= document.documentElement.scrollHeight - 2) current = links.length - 1;
  links.forEach((link, i) => i === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
  const bar = document.getElementById("contents"), link = links[current];
  if (bar && bar.scrollWidth > bar.clientWidth) bar.scrollLeft = link.offsetLeft - bar.clientWidth / 2 + link.offsetWidth / 2;
}
addEventListener("scroll", mark, { passive: true });
mark();

// ---- downloads, from what the page holds

function unpacked(kind) {
  const bytes = Uint8Array.from(atob(document.getElementById(kind).textContent), x => x.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const types = { csv: "text/csv", json: "application/json" };
for (const button of all("[data-save]")) button.addEventListener("click", async () => {
  const kind = button.dataset.save, link = make("a", { download: `${data.name}.${kind}` });
  link.href = URL.createObjectURL(new Blob([await unpacked(kind)], { type: types[kind] }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
