// What a reader gains with a script: sorting, filtering, folding, tooltips at once, large pictures. Without it all is there.
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

// Tables: sort by a head, filter rows, fold long ones.
const sortable = (cell) => {
  const text = (cell.dataset.value ?? cell.textContent).trim().replace("−", "-").replace("∞", "Infinity");
  const [number] = text.match(/^[-+]?(Infinity|[\d.]+(e[-+]?\d+)?)(?=$|\s*[±[(%])/i) ?? []; // 0.91 ± 0.02 sorts as 0.91
  return number === undefined ? text : Number(number);
};
const missing = (value) => value === "–" || value === "nan" || value === "";
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
}
function sortBy(table, column, heads) {
  const head = heads[column];
  const falling = head.getAttribute("aria-sort") === "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const bodies = [...table.tBodies];
  const sizes = bodies.map((body) => body.rows.length);
  const keyed = bodies.flatMap((body) => [...body.rows]).map((row) => [sortable(row.cells[column]), row]);
  keyed.sort(([a], [b]) => missing(a) - missing(b) || (falling ? -compare(a, b) : compare(a, b)));
  bodies.forEach((body, i) => body.append(...keyed.splice(0, sizes[i]).map(([, row]) => row)));
}
for (const table of all("table.data")) {
  const heads = [...table.tHead.rows[0].cells];
  if (table.querySelectorAll("tbody tr").length > 1) {
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(table, column, heads));
    });
  }
  const rows = all("tbody tr", table);
  if (rows.length > 15) {
    const field = make("input", { type: "search", placeholder: "filter rows", ariaLabel: "Filter rows" });
    const count = make("span", { className: "note", ariaLive: "polite" });
    const tools = make("div", { className: "tools" });
    tools.append(field, count);
    table.closest(".scroll").before(tools);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        const match = words.every((word) => text.includes(word));
        row.classList.toggle("unmatched", !match);
        shown += match;
      }
      fold(table, words.length === 0 && table.dataset.open === undefined);
      count.textContent = words.length ? `${shown} of ${rows.length}` : "";
    });
  }
}
function fold(table, folded) {
  table.classList.toggle("folded", folded);
}
for (const table of all("table[data-folds]")) {
  const button = make("button", { type: "button", className: "more", textContent: `Show all ${table.dataset.folds} rows` });
  fold(table, true);
  (table.closest(".scroll") ?? table).after(button);
  button.addEventListener("click", () => {
    table.dataset.open = "";
    fold(table, false);
    button.remove();
  });
}

// An arm under the pointer or the focus stands out everywhere; a click on a legend's entry keeps it so.
let kept = null;
const keys = new Map();
for (const part of all("[data-arm]")) keys.set(part.dataset.arm, [...(keys.get(part.dataset.arm) ?? []), part]);
let lit = null;
function light(arm) {
  if (arm === lit) return;
  for (const part of keys.get(lit) ?? []) part.classList.remove("on");
  for (const part of keys.get(arm) ?? []) part.classList.add("on");
  lit = arm;
}
const armOf = (event) => event.target.closest?.("[data-arm]")?.dataset.arm ?? kept;
document.addEventListener("pointerover", (event) => { if (!event.target.closest?.(".lines .plot")) light(armOf(event)); });
document.addEventListener("focusin", (event) => light(armOf(event)));
document.addEventListener("click", (event) => {
  const entry = event.target.closest?.(".legend [data-arm]");
  if (entry) light((kept = kept === entry.dataset.arm ? null : entry.dataset.arm) ?? entry.dataset.arm);
  else if (kept && !event.target.closest?.(".chart")) light((kept = null));
});

// Tooltips at once, and from near by: the titles of SVG marks, which browsers show late and only on the mark.
const tip = make("div", { className: "tip", hidden: true });
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
for (const title of all("svg title")) {
  const mark = title.parentNode;
  mark.tipText = title.textContent;
  title.remove();
}
let near = null;
function show(mark, event) {
  if (near !== mark) {
    near?.classList.remove("near");
    mark?.classList.add("near");
    near = mark;
  }
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.tipText;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width < innerWidth ? event.clientX + 14 : event.clientX - 14 - width;
  const top = event.clientY - height - 10 > 0 ? event.clientY - height - 10 : event.clientY + 18;
  tip.style.setProperty("left", `${Math.max(4, left)}px`);
  tip.style.setProperty("top", `${top}px`);
}
const REACH = 30; // pixels from the pointer to a point that it means
function nearest(chart, event) {
  const box = chart.getBoundingClientRect();
  chart.dots ??= all(".dot", chart).map((dot) => [parseFloat(dot.getAttribute("cx")) / 100, Number(dot.getAttribute("cy")), dot]);
  let best = null, least = REACH * REACH;
  for (const [share, y, dot] of chart.dots) {
    const distance = (box.left + share * box.width - event.clientX) ** 2 + (box.top + y - event.clientY) ** 2;
    if (distance < least) [best, least] = [dot, distance];
  }
  return best;
}
for (const type of ["pointermove", "pointerdown"]) {
  document.addEventListener(type, (event) => {
    const chart = event.target.closest?.(".lines .plot");
    let mark = chart && nearest(chart, event);
    if (chart) light(mark?.closest("[data-arm]")?.dataset.arm ?? armOf(event));
    for (let node = event.target; !mark && node instanceof SVGElement; node = node.parentNode) if (node.tipText) mark = node;
    show(mark ?? null, event);
  });
}
document.addEventListener("scroll", () => show(null), { passive: true });

// Pictures open large.
const dialog = make("dialog");
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
for (const link of all("a.large")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const caption = make("p", { textContent: link.parentNode.querySelector("figcaption")?.textContent ?? "" });
    dialog.replaceChildren(link.querySelector("img").cloneNode(), caption);
    dialog.showModal();
  });
}

// Code to copy.
for (const figure of all("figure.code")) {
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  figure.append(button);
  button.addEventListener("click", async () => {
    const code = figure.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// On paper all is open; the contents follow the reader.
let opened = [];
addEventListener("beforeprint", () => {
  opened = all("details:not([open])");
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
const sections = all("main > section");
const seen = new IntersectionObserver(() => {
  const current = sections.filter((section) => section.getBoundingClientRect().top < innerHeight / 3).pop();
  const id = current?.querySelector("h2")?.id;
  for (const link of all("nav li a")) link.classList.toggle("here", link.hash === `#${id}`);
}, { threshold: [0, 0.02, 0.1, 0.5, 1] });
for (const section of sections) seen.observe(section);
