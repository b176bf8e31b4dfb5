// Opens Ray's dashboard in headless Chromium, enters the token that it asks for, and prints what was found as JSON.
//   node ray_dashboard.mjs ADDRESS TOKEN SCREENSHOTS NODE_MODULES CHROMIUM
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [address, token, shots, modules, chromium_file] = process.argv.slice(2);
const { chromium } = createRequire(pathToFileURL(`${modules}/`))("playwright-core");
const browser = await chromium.launch({ executablePath: chromium_file, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
page.setDefaultTimeout(90000); // of a machine that is busy
const told = { elsewhere: [], refused: 0 };
page.on("request", (request) => { if (!request.url().startsWith(address)) told.elsewhere.push(request.url()); });
page.on("response", (response) => { if (response.status() === 401) told.refused += 1; });
await page.goto(address);
const field = page.locator('input[type=password]');
await field.waitFor();
await page.screenshot({ path: `${shots}/before.png` });
await field.fill("0".repeat(64));
await page.getByRole("button", { name: "Submit" }).click();
await page.getByText(/invalid|incorrect|not valid/i).first().waitFor();
told.wrong = await page.getByText(/invalid|incorrect|not valid/i).first().innerText();
await field.fill(token);
await page.getByRole("button", { name: "Submit" }).click();
await field.waitFor({ state: "detached" });
await page.goto(`${address}/#/actors`);
await page.getByText("ALIVE").first().waitFor();
await page.screenshot({ path: `${shots}/actors.png` });
told.actors = await page.locator("body").innerText();
await browser.close();
console.log(JSON.stringify(told));
