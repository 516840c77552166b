// Makes static/vendor: NiiVue as one file, and the licences of all that is in it (`make vendor`).
// zarrita, which reads images from remote stores, is left out: two thirds of the size, never used.

import { readFile, readdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const vendor = process.argv[2] ?? join(here, "static", "vendor");

const withoutRemoteStores = {
  name: "without-remote-stores",
  setup(bundle) {
    bundle.onResolve({ filter: /^zarrita$/ }, () => ({ path: "zarrita", namespace: "empty" }));
    bundle.onLoad({ filter: /.*/, namespace: "empty" }, () => ({ contents: "export {};" }));
  },
};

const { metafile } = await build({
  stdin: {
    contents: 'export { Niivue, NVImage, SLICE_TYPE } from "@niivue/niivue";',
    resolveDir: here,
  },
  bundle: true,
  minify: true,
  format: "esm",
  metafile: true,
  logLevel: "error",
  outfile: join(vendor, "niivue.js"),
  plugins: [withoutRemoteStores],
});

const inside = /node_modules\/((?:@[^/]+\/)?[^/]+)\//;
const roots = new Map();
for (const path of Object.keys(metafile.inputs)) {
  const match = inside.exec(path);
  if (match) roots.set(match[1], path.slice(0, match.index + match[0].length));
}

const sections = [];
for (const [name, root] of [...roots].sort()) {
  const { version } = JSON.parse(await readFile(join(root, "package.json"), "utf8"));
  const file = (await readdir(root)).find((entry) => /^licen[cs]e/i.test(entry));
  // NiiVue's npm package has no licence file; its text is kept here.
  const path = file ? join(root, file) : join(here, "niivue_license.txt");
  if (!file && name !== "@niivue/niivue") throw new Error(`${name} has no licence file`);
  sections.push(`${name} ${version}\n\n${(await readFile(path, "utf8")).trim()}\n`);
}
await writeFile(join(vendor, "LICENSES.txt"), sections.join(`\n${"-".repeat(78)}\n\n`));
