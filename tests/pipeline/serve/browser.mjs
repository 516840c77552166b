// One page of Chromium that does what it is told: a line {"call": "mouse.click", "with": [...]} on
// standard input is a call on playwright's page; the answer is a line on standard output.

import { createInterface } from "node:readline";

import { chromium } from "playwright-core";

const browser = await chromium.launch({
  executablePath: process.argv[2],
  // A machine without a graphics card draws WebGL on the processor; root may not use the sandbox.
  args: ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
});
const page = await browser.newPage({ viewport: { width: 1200, height: 640 } });
const complaints = [];
page.on("console", (message) => {
  if (["error", "warning"].includes(message.type())) complaints.push(message.text());
});
page.on("pageerror", (error) => complaints.push(String(error)));

const answer = (content) => console.log(JSON.stringify(content));
answer({ result: "ready" });

for await (const line of createInterface({ input: process.stdin })) {
  const { call, with: given } = JSON.parse(line);
  try {
    if (call === "complaints") {
      answer({ result: complaints.splice(0) });
      continue;
    }
    const path = call.split(".");
    const name = path.pop();
    const target = path.reduce((object, part) => object[part], page);
    const result = await target[name](...given);
    const plain = ["evaluate", "textContent"].includes(name);
    answer({ result: plain ? (result ?? null) : null });
  } catch (error) {
    answer({ error: String(error) });
  }
}
await browser.close();
