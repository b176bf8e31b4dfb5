// Opens a page from disk in headless Chromium, uses it by mouse and keyboard, and prints what was found as JSON.
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

for (const [device, viewport] of Object.entries(sizes)) {
  for (const colorScheme of ["light", "dark"]) {
    const told = { errors: [], requests: [] };
    found[`${device}-${colorScheme}`] = told;
    // A page's own policy forbids what axe is put in by.
    const context = await browser.newContext({ viewport, colorScheme, bypassCSP: process.env.CHECK === "axe" });
    const page = await context.newPage();
    page.setDefaultTimeout(180000); // of a machine that is busy
    page.on("console", (message) => { if (["error", "warning"].includes(message.type())) told.errors.push(message.text()); });
    page.on("pageerror", (error) => told.errors.push(String(error)));
    page.on("request", (request) => { if (request.url() !== address) told.requests.push(request.url()); });
    await page.goto(address);
    const charts = await page.locator("[data-chart]").count();
    await page.waitForFunction(
      () => [...document.querySelectorAll("[data-chart]")].every((place) => place.dataset.drawn === place.dataset.chart),
    );
    told.charts = charts;
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
    // The budget curve of another figure, by the keyboard.
    told.curves = [];
    for (const id of ["metric", "against"]) {
      if (!(await page.locator(`#${id}`).count())) continue;
      await page.locator(`#${id}`).focus();
      await page.keyboard.press("ArrowDown");
      await page.waitForFunction(() => {
        const place = document.getElementById("curve");
        return place.hidden || place.dataset.drawn === place.dataset.chart;
      });
      told.curves.push(await page.locator("#curve").getAttribute("data-chart"));
    }
    // Over a point stands what it is.
    const point = page.locator("#curve svg .mark-symbol path").first();
    if (await point.count()) {
      await point.hover({ force: true });
      await page.waitForTimeout(300);
      told.hover = await page.locator("#vg-tooltip-element").innerText();
    }
    const column = (place) => page.$$eval("#rows tbody tr:not([hidden])", (rows, n) => rows.map((row) => row.cells[n].textContent), place);
    const button = (place) => page.locator("#rows thead th button").nth(place);
    told.first = await column(1);
    await button(1).click();
    told.by_mouse = await column(1);
    await button(9).focus();
    await page.keyboard.press("Enter");
    told.by_keyboard = await column(9);
    told.sorted = await page.locator("#rows thead th").nth(9).getAttribute("aria-sort");
    await page.keyboard.press("Enter");
    told.reversed = await column(9);
    await page.locator("#filter").focus();
    await page.keyboard.type("teacher");
    told.filtered = await column(1);
    told.shown = await page.locator("#shown").innerText();
    await context.close();
  }
}
await browser.close();
console.log(JSON.stringify(found));
