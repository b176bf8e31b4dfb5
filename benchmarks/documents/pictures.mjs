// Takes pictures of pages that lie on disk, in headless Chromium.
//   node pictures.mjs WANTED.json NODE_MODULES CHROMIUM
// WANTED.json lists the pictures: page, out, width, height, scale, theme ("light" or "dark").
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [wanted, modules, chromium_file] = process.argv.slice(2);
const { chromium } = createRequire(pathToFileURL(`${modules}/`))("playwright-core");
const browser = await chromium.launch({ executablePath: chromium_file, args: ["--no-sandbox"] });
for (const { page: file, out, width, height, scale, theme } of JSON.parse(readFileSync(wanted, "utf8"))) {
  const context = await browser.newContext({ viewport: { width, height }, deviceScaleFactor: scale, colorScheme: theme });
  const page = await context.newPage();
  page.setDefaultTimeout(180000); // of a machine that is busy
  await page.goto(pathToFileURL(file).href);
  await page.waitForFunction(
    () => [...document.querySelectorAll("[data-chart]")].every((place) => place.dataset.drawn === place.dataset.chart),
  );
  await page.screenshot({ path: out });
  await context.close();
}
await browser.close();
