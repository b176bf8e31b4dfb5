// Opens a page from disk in headless Chromium, uses it by mouse and keyboard, and prints what was found as JSON. What a
// page does not have is left out: a comparison has no table that can be sorted.
//   node browser.mjs PAGE.html SCREENSHOTS NODE_MODULES CHROMIUM
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [page_file, shots, modules, chromium_file] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${modules}/`));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const address = pathToFileURL(page_file).href;
const browser = await chromium.launch({ executablePath: chromium_file, args: ["--no-sandbox"] });
const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };
const found = {};

const drawn = (page) => page.waitForFunction(
  () => [...document.querySelectorAll("[data-chart]")].every((place) => place.hidden || place.dataset.drawn === place.dataset.chart),
);

// What is wrong with the charts as they stand: without marks, wider than their place, or with text that is cut or
// overlaps other text of the chart.
const faults = (page) => page.evaluate(() => {
  const told = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    if (place.hidden) continue;
    const name = place.dataset.chart, svg = place.querySelector("svg");
    if (!svg) { told.push(`${name}: not drawn`); continue; }
    if (!svg.querySelector("[class*='mark-']:is(.role-mark, [class*='role-mark']) path")) told.push(`${name}: no marks`);
    const whole = svg.getBoundingClientRect();
    if (whole.right > place.getBoundingClientRect().right + 1) told.push(`${name}: wider than its place`);
    const texts = [...svg.querySelectorAll("text")]
      .filter((text) => text.textContent.trim() && getComputedStyle(text).opacity !== "0" && text.getAttribute("opacity") !== "0")
      .map((text) => ({ said: text.textContent, box: text.getBoundingClientRect() }));
    for (const [n, { said, box }] of texts.entries()) {
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1 || box.bottom > whole.bottom + 1) {
        told.push(`${name}: '${said}' is cut`);
      }
      for (const other of texts.slice(n + 1)) {
        const across = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
        const down = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
        if (across > 2 && down > 4) told.push(`${name}: '${said}' overlaps '${other.said}'`);
      }
    }
  }
  return told;
});

for (const [device, viewport] of Object.entries(sizes)) {
  for (const colorScheme of ["light", "dark"]) {
    const told = { errors: [], requests: [], faults: [] };
    found[`${device}-${colorScheme}`] = told;
    // A page's own policy forbids what axe is put in by.
    const context = await browser.newContext({ viewport, colorScheme, bypassCSP: process.env.CHECK === "axe" });
    const page = await context.newPage();
    page.setDefaultTimeout(180000); // of a machine that is busy
    page.on("console", (message) => { if (["error", "warning"].includes(message.type())) told.errors.push(message.text()); });
    page.on("pageerror", (error) => told.errors.push(String(error)));
    page.on("request", (request) => { if (request.url() !== address) told.requests.push(request.url()); });
    await page.goto(address);
    await drawn(page);
    told.charts = await page.$$eval("[data-chart]", (places) => places.map((place) => place.dataset.chart));
    told.marks = await page.locator("[data-chart] svg .mark-symbol path, [data-chart] svg .mark-rect path").count();
    told.sideways = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (process.env.CHECK === "axe") {
      await page.evaluate(axe);
      const result = await page.evaluate(() => globalThis.axe.run(document));
      told.violations = result.violations.map((one) => ({ id: one.id, nodes: one.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)) }));
      await context.close();
      continue;
    }
    await page.screenshot({ path: `${shots}/${device}-${colorScheme}.png`, fullPage: true });
    told.faults.push(...await faults(page));
    // The other theme while the page is open: charts are drawn again in its colors.
    const color = () => page.$eval("[data-chart] svg .role-title text", (text) => getComputedStyle(text).fill);
    const before = await color();
    await page.emulateMedia({ colorScheme: colorScheme === "light" ? "dark" : "light" });
    await page.waitForFunction((old) => {
      const text = document.querySelector("[data-chart] svg .role-title text");
      return text && getComputedStyle(text).fill !== old;
    }, before);
    await page.emulateMedia({ colorScheme });
    await page.waitForFunction((old) => {
      const text = document.querySelector("[data-chart] svg .role-title text");
      return text && getComputedStyle(text).fill === old;
    }, before);
    if (await page.locator("#curve").count()) {
      // The budget curve of another figure, by the keyboard.
      told.curves = [];
      for (const id of ["metric", "against"]) {
        await page.locator(`#${id}`).focus();
        await page.keyboard.press("ArrowDown");
        await drawn(page);
        told.curves.push(await page.locator("#curve").getAttribute("data-chart"));
      }
      // Every one of them, by the lists.
      told.lists = [];
      const choices = (id) => page.$$eval(`#${id} option`, (options) => options.map((option) => option.value));
      for (const metric of await choices("metric")) {
        for (const against of await choices("against")) {
          await page.locator("#metric").selectOption(metric);
          await page.locator("#against").selectOption(against);
          await drawn(page);
          if (await page.locator("#curve").isVisible()) {
            told.lists.push(await page.locator("#curve").getAttribute("data-chart"));
            told.faults.push(...(await faults(page)).filter((fault) => fault.startsWith("budget-")));
          } else if (!(await page.locator("#no-curve").isVisible())) {
            told.faults.push(`${metric} against ${against}: neither a curve nor a word`);
          }
        }
      }
      await page.locator("#metric").selectOption({ index: 0 });
      await page.locator("#against").selectOption({ index: 0 });
      await drawn(page);
    }
    // Over a point stands what it is.
    const point = page.locator("[data-chart] svg .mark-symbol.role-mark path").first();
    if (await point.count()) {
      await point.hover({ force: true });
      await page.locator("#vg-tooltip-element.visible").waitFor();
      told.hover = await page.locator("#vg-tooltip-element").innerText();
    }
    if (await page.locator("#rows").count()) {
      const column = (place) => page.$$eval("#rows tbody tr:not([hidden])", (rows, n) => rows.map((row) => row.cells[n].textContent), place);
      const button = (place) => page.locator("#rows thead th button").nth(place);
      const titles = await page.$$eval("#rows thead th", (heads) => heads.map((head) => head.textContent.trim()));
      const row = titles.indexOf("row"), memory = titles.indexOf("memory");
      told.first = await column(row);
      await button(row).click();
      told.by_mouse = await column(row);
      await button(memory).focus();
      await page.keyboard.press("Enter");
      told.by_keyboard = await column(memory);
      told.sorted = await page.locator("#rows thead th").nth(memory).getAttribute("aria-sort");
      await page.keyboard.press("Space");
      told.reversed = await column(memory);
      await page.locator("#filter").focus();
      await page.keyboard.type("teacher");
      told.filtered = await column(row);
      told.shown = await page.locator("#shown").innerText();
      await page.locator("#filter").fill("");
      await page.locator("#fits").click();
      told.fits_by_mouse = await column(row);
      await page.keyboard.press("Space");
      told.again = await column(row);
      told.over = await page.$$eval("#rows tbody tr[data-fits=no]", (rows) => rows.length);
    }
    await context.close();
  }
}
await browser.close();
console.log(JSON.stringify(found));
