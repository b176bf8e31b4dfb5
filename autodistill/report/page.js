"use strict";
const read = (id) => { const held = document.getElementById(id); return held ? JSON.parse(held.textContent) : null; };
const charts = read("charts"), shared = read("data");
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [text, soft, line] = ["--text", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
  return {
    background: null, font: "system-ui, sans-serif", view: { stroke: line },
    point: { opacity: 0.95 }, // points that let the page through are hard to see on a dark one
    title: { color: text, fontSize: 14, frame: "bounds" },
    axis: { labelColor: soft, titleColor: text, gridColor: line, domainColor: soft, tickColor: soft,
      labelFontSize: 12, titleFontSize: 12, labelSeparation: 6 },
    legend: { labelColor: text, titleColor: text, orient: "bottom", columns: innerWidth < 640 ? 1 : 4, labelFontSize: 12,
      labelLimit: 260, symbolBaseFillColor: soft, symbolBaseStrokeColor: soft },
    style: { "guide-label": { fill: soft }, "guide-title": { fill: text } },
  };
}

// A title in as many lines as a width takes; a word that is wider ends in dots.
function titled(title, width) {
  const most = Math.floor(width / 8), lines = [""];
  for (const word of title.split(" ")) {
    const line = lines.pop(), longer = line ? `${line} ${word}` : word;
    lines.push(...(line && longer.length > most ? [line, word] : [longer]));
  }
  return { text: lines, limit: width };
}

async function draw(place) {
  const name = place.dataset.chart, found = charts[name];
  if (!found) return;
  const width = Math.max(place.clientWidth, 240);
  const spec = { ...found, datasets: shared, width, autosize: { type: "fit-x", contains: "padding" } };
  if (found.title) spec.title = titled(found.title, width);
  const options = { actions: false, ast: true, renderer: "svg", defaultStyle: false, config: theme(),
    tooltip: { theme: dark.matches ? "dark" : "light" } };
  await embed(place, spec, options);
  const told = place.querySelector("svg");
  if (told && found.description) told.setAttribute("aria-label", found.description);
  place.dataset.drawn = name;
}

function drawAll() { return Promise.all([...document.querySelectorAll("[data-chart]")].map(draw)); }

function chooseCurve() {
  const metric = document.getElementById("metric"), against = document.getElementById("against");
  const place = document.getElementById("curve");
  if (!metric || !against || !place) return;
  const choose = () => {
    const name = `budget-${metric.value}-${against.value}`;
    const none = document.getElementById("no-curve");
    place.hidden = !charts[name];
    none.hidden = !!charts[name];
    place.dataset.chart = name;
    draw(place);
  };
  metric.addEventListener("change", choose);
  against.addEventListener("change", choose);
}

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.n === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.n);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => compare(value(a, column), value(b, column)));
    // What has no figure stays last, whichever way the others stand.
    const known = rows.filter((row) => row.cells[column].textContent.trim() !== "-");
    const unknown = rows.filter((row) => row.cells[column].textContent.trim() === "-");
    body.append(...(down ? known.reverse() : known), ...unknown);
  }));
}

function filterable(table) {
  const words = document.getElementById("filter"), fits = document.getElementById("fits");
  const told = document.getElementById("shown");
  const apply = () => {
    const wanted = words.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const said = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => said.includes(word)) || (fits.checked && row.dataset.fits === "no");
      shown += row.hidden ? 0 : 1;
    }
    told.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  };
  words.addEventListener("input", apply);
  fits.addEventListener("change", apply);
  apply();
}

function reloading() {
  const asked = document.getElementById("reload");
  if (!asked) return;
  asked.checked = sessionStorage.getItem("reload") !== "no";
  asked.addEventListener("change", () => sessionStorage.setItem("reload", asked.checked ? "yes" : "no"));
  setInterval(() => { if (asked.checked && !document.hidden) location.reload(); }, 30000);
}

const rows = document.getElementById("rows");
if (rows) { sortable(rows); filterable(rows); }
reloading();
if (charts && typeof embed === "function") {
  chooseCurve();
  drawAll();
  dark.addEventListener("change", drawAll);
  let wide = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === wide) return;
    wide = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
}
