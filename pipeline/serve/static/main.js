// The page: joins viewer, tools and server.

import { get, post } from "./api.js";
import { OpenCase } from "./case.js";
import { Ink } from "./ink.js";
import { ask, clearMessages, tell } from "./messages.js";
import { colourOf } from "./palette.js";
import { markClass, press, showCases, showClasses } from "./panel.js";
import { followPointer } from "./pointer.js";
import { followKeys } from "./shortcuts.js";
import { Viewer } from "./viewer.js";
import { showWindow, followWindow } from "./window.js";

const POLL = 400; // milliseconds
const OPPOSITE = { R: "L", A: "P", S: "I" };
const element = (id) => document.getElementById(id);

const viewer = new Viewer(element("image"), () => ink.draw());
const ink = new Ink(element("ink"), element("annotated"), viewer);

let classes = []; // {name, value, colour}
let chosen = null; // one of them
let tool = "point";
let open = null; // OpenCase
let list = { cases: [], faults: {} };
let working = 0;

const ready = () => open !== null && open.revision !== null;

/** Run something for the user; what goes wrong is told. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    if (!error.reason) console.error(error);
    const unknown = `The page made a mistake (${error.message}). Load it again; saved work is kept.`;
    tell(error.reason ? error.message : unknown, "error");
  }
}

// Cases

async function refreshCases() {
  list = await get("/api/cases");
  drawCases();
}

function drawCases() {
  showCases(list, { current: open?.name, filter: element("filter").value, open: openCase });
}

function openCase(name) {
  return attempt(async () => {
    if (open?.unsaved && !(await ask("Leave this case?", `The corrections of ${open.name} are not saved.`, "Leave without saving"))) return;
    const discard = Boolean(open?.unsaved);
    await post("/api/open", { case: name, discard });
    clearMessages();
    await follow();
  });
}

/** Show how an opening goes until it is done; then the case that is open. */
async function follow() {
  for (;;) {
    const state = await get("/api/state");
    const { opening, failure } = state;
    element("opening").hidden = !opening;
    if (opening) {
      element("empty").hidden = true;
      element("opening-title").textContent = opening.case;
      const step = state.case?.name === opening.case ? "Computing the automatic result" : "Reading the image";
      element("opening-text").textContent = `${step}, ${Math.round(opening.seconds)} s`;
    }
    await show(state.case);
    if (!opening) {
      if (failure) tell(failure, "error");
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
}

/** Bring the page to what the server says is open. */
async function show(shown) {
  if (!shown) {
    open = null;
    element("empty").hidden = !element("opening").hidden;
    update();
    return;
  }
  element("empty").hidden = true;
  if (open?.name !== shown.name || (ready() && !shown.ready)) {
    open = new OpenCase(shown, viewer, update);
    await open.showImage(0, { keep: false });
    fillChannels();
    setAxis(largestSlices(shown.shape));
    showWindow(viewer);
  }
  if (shown.ready && !ready()) {
    setAxis(shown.slice_axis);
    await open.loadLabels();
    await refreshCases();
  }
  update();
}

function largestSlices(shape) {
  return shape.indexOf(Math.min(...shape));
}

function fillChannels() {
  const select = element("channel");
  select.replaceChildren(...open.channels.map((name, i) => new Option(name, i)));
  select.hidden = open.channels.length < 2;
}

// What is shown

/** Bring everything around the image up to date. */
function update() {
  element("case-name").textContent = open?.name ?? "No case open";
  element("unsaved").hidden = !open?.unsaved;
  for (const control of document.querySelectorAll(".needs-case")) control.disabled = !ready();
  element("undo").disabled = element("reset").disabled = !ready() || !open.marks.length;
  element("ink").classList.toggle("ready", ready());
  element("working").hidden = working === 0;
  const marks = open?.marks ?? [];
  element("prompts").textContent = marks.length ? `${marks.length} click${marks.length > 1 ? "s" : ""}` : "";
  ink.marks = marks.map((mark) => ({ ...mark, colour: colourOfLabel(mark.label) }));
  ink.draw();
  showSlice();
  drawCases();
}

function colourOfLabel(name) {
  return classes.find((one) => one.name === name)?.colour ?? [200, 200, 200];
}

function showSlice() {
  const slider = element("slice");
  slider.max = Math.max(0, viewer.slices - 1);
  slider.value = viewer.slice;
  element("slice-number").textContent = open ? `${viewer.slice + 1} / ${viewer.slices}` : "–";
}

function setAxis(axis) {
  viewer.setAxis(axis);
  press("views", "axis", axis);
  showSlice();
}

function setSlice(index) {
  if (!open) return;
  viewer.setSlice(index);
  showSlice();
}

function setTool(name) {
  tool = name;
  press("tools", "tool", name);
  element("radius-row").hidden = name !== "scribble";
}

function setRadius(radius) {
  element("radius").value = radius;
  element("radius-value").textContent = `${element("radius").value} voxels`;
}

function setOpacity(percent) {
  element("opacity").value = percent;
  element("opacity-value").textContent = `${percent} %`;
  if (viewer.shape) viewer.setOpacity(percent / 100);
  else viewer.opacity = percent / 100;
}

function choose(one) {
  chosen = one;
  markClass(one);
}

function showPosition(voxel) {
  const inside = voxel && open;
  const named = (v, i) => `${"RAS"[i]} ${v.toFixed(1)}`.replace(/^(.) -/, (_, way) => `${OPPOSITE[way]} `);
  const world = inside && open.worldOf(voxel).map(named).join("   ");
  element("position").textContent = inside ? `${world} mm` : "\u00a0";
  if (!inside) {
    element("under").textContent = "";
    return;
  }
  const label = classes.find((one) => one.value === viewer.labelAt(voxel));
  const name = document.createElement("b");
  name.textContent = label?.name ?? "background";
  element("under").replaceChildren(`value ${+viewer.valueAt(voxel).toPrecision(4)}   `, name);
}

// What changes the label map

async function step(action) {
  working += 1;
  update();
  await attempt(action);
  working -= 1;
  ink.stroke = null;
  update();
}

function addPoint(voxel, positive) {
  ink.stroke = { points: [voxel], positive, radius: 0, colour: chosen.colour, pending: true };
  return step(() => open.point(chosen.name, positive, voxel));
}

function drawStroke(voxels, positive, finished) {
  const radius = Number(element("radius").value);
  ink.stroke = voxels.length ? { points: [...voxels], positive, radius, colour: chosen.colour } : null;
  ink.draw();
  if (finished && voxels.length) step(() => open.scribble(chosen.name, positive, voxels, radius));
}

function undo() {
  if (!element("undo").disabled) step(() => open.undo());
}

async function reset() {
  const text = "All clicks of this case are removed, and the automatic result comes back.";
  if (await ask("Remove all clicks?", text, "Remove all")) step(() => open.reset());
}

function suggest() {
  if (!ready()) return;
  step(async () => {
    const { axis, index } = await open.suggestSlice();
    setAxis(axis);
    setSlice(index);
  });
}

async function save({ overwrite = false } = {}) {
  if (!ready()) return;
  await attempt(async () => {
    try {
      const { label_map: file } = await open.save({ overwrite });
      tell(`Saved: ${file}`);
      await refreshCases();
    } catch (error) {
      if (error.reason !== "exists") throw error;
      const text = `${error.message} It will be replaced by what you see now.`;
      if (await ask("Replace the earlier result?", text, "Replace")) await save({ overwrite: true });
    }
  });
}

// Wiring

function wireControls() {
  element("views").onclick = ({ target }) => open && target.dataset.axis && setAxis(Number(target.dataset.axis));
  element("tools").onclick = ({ target }) => target.dataset.tool && setTool(target.dataset.tool);
  element("channel").onchange = ({ target }) =>
    attempt(async () => {
      await open.showImage(Number(target.value), { keep: true });
      showWindow(viewer);
    });
  element("filter").oninput = drawCases;
  element("slice").oninput = ({ target }) => setSlice(Number(target.value));
  element("previous").onclick = () => setSlice(viewer.slice - 1);
  element("next").onclick = () => setSlice(viewer.slice + 1);
  element("radius").oninput = ({ target }) => setRadius(target.value);
  element("opacity").oninput = ({ target }) => setOpacity(target.value);
  element("suggest").onclick = suggest;
  element("undo").onclick = undo;
  element("reset").onclick = reset;
  element("save").onclick = () => save();
  element("help").onclick = () => element("keys").showModal();
  followWindow(viewer);
  window.addEventListener("beforeunload", (event) => open?.unsaved && event.preventDefault());
}

function wireKeys() {
  const classKeys = Object.fromEntries(
    classes.slice(0, 9).map((one, place) => [String(place + 1), () => choose(one)]),
  );
  const axes = { a: 2, c: 1, s: 0 };
  const views = Object.entries(axes).map(([key, axis]) => [key, () => open && setAxis(axis)]);
  const radius = (change) => () => setRadius(Number(element("radius").value) + change);
  followKeys({
    ...classKeys,
    ...Object.fromEntries(views),
    p: () => setTool("point"),
    b: () => setTool("scribble"),
    "[": radius(-0.5),
    "]": radius(0.5),
    arrowup: () => setSlice(viewer.slice + 1),
    arrowdown: () => setSlice(viewer.slice - 1),
    "+": () => open && viewer.zoom(1.25),
    "-": () => open && viewer.zoom(0.8),
    0: () => open && viewer.fit(),
    " ": () => viewer.shape && viewer.setOpacity(0),
    n: suggest,
    "?": () => element("keys").showModal(),
    "ctrl+z": undo,
    "ctrl+s": () => save(),
  });
  window.addEventListener("keyup", ({ key }) => key === " " && setOpacity(element("opacity").value));
}

await attempt(async () => {
  const state = await get("/api/state");
  const ordered = Object.entries(state.labels).sort((one, other) => one[1] - other[1]);
  classes = ordered.map(([name, value], place) => ({ name, value, colour: colourOf(place) }));
  await viewer.attach();
  viewer.setColours(classes.map(({ value, colour }) => [value, colour]));
  showClasses(classes, choose);
  choose(classes[0]);
  setTool("point");
  setRadius(2);
  setOpacity(45);
  element("output").textContent = `Results in ${state.output.split(/[\\/]/).at(-1)}`;
  element("output").title = state.output;
  wireControls();
  wireKeys();
  followPointer(element("ink"), viewer, {
    tool: () => tool,
    start: ready,
    point: addPoint,
    stroke: drawStroke,
    hover: showPosition,
    scroll: (slices) => setSlice(viewer.slice + slices),
  });
  await refreshCases();
  await follow();
});
